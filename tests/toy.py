"""A run as small as can be, to be stopped, killed and resumed: `python -m tests.toy RUN ...`.

Every number of the state is made of numbers at its own place and of the key, so that steps are
the same to the bit however the state is split over devices.
"""

import argparse
import functools
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from liveavatar_jax.models.lora import Factors
from liveavatar_jax.parallel import hosts
from liveavatar_jax.types import Float, Int, Key, LiveAvatarError, struct
from train.checkpoints import Checkpoints
from train.metrics import Watch, finite
from train.signals import stopping

ADAM = optax.adam(1e-2)
CONFIG = {"rate": 1e-2, "mesh": "8", "steps": 4}
FREE = ("mesh", "steps")


@struct
class State:
    student: dict[str, Factors]
    ema: dict[str, Factors]
    critic: nnx.Module
    adam: Any
    key: Key[jax.Array, ""]
    seen: Float[jax.Array, "8 4"]
    step: Int[jax.Array, ""]


def init(size: int = 16) -> State:
    keys = jax.random.split(jax.random.key(7), 3)
    a = jax.random.normal(keys[0], (2, 8, size))
    student = {"blocks.q.kernel": Factors(a, 0.5 * jnp.ones((2, size, 8), jnp.bfloat16))}
    return State(
        student=student,
        ema=jax.tree.map(jnp.zeros_like, student),
        critic=nnx.Linear(8, size, rngs=nnx.Rngs(keys[1])),
        adam=ADAM.init(student),
        key=keys[2],
        seen=jnp.zeros((8, 4)),
        step=jnp.int32(0),
    )


def step(state: State) -> tuple[State, dict[str, Any]]:
    key = jax.random.fold_in(state.key, state.step)
    noise = lambda x: jax.random.normal(key, x.shape, x.dtype)
    grads = jax.tree.map(lambda x: x + noise(x), state.student)
    with jax.numpy_dtype_promotion("standard"):  # as optax wants it
        change, adam = ADAM.update(grads, state.adam)
    student = optax.apply_updates(state.student, change)
    new = State(
        student=student,  # type: ignore[arg-type]
        ema=jax.tree.map(lambda old, x: old + (x - old) / 4, state.ema, student),
        critic=jax.tree.map(lambda x: x + noise(x) / 8, state.critic),
        adam=adam,
        key=state.key,
        seen=state.seen + noise(state.seen),
        step=state.step + 1,
    )
    return new, {"loss": state.seen[0, 0], "grads": finite(grads)}


ADVANCE = jax.jit(step, donate_argnums=0)


def shardings(state: State, mesh: str) -> State:
    """mesh: rows x columns, such as "8", "2x4" or "1"."""
    sizes = [int(n) for n in mesh.split("x")]
    sizes = (*sizes, 1)[:2]
    devices = jax.devices()[: sizes[0] * sizes[1]]
    made = jax.make_mesh(sizes, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=devices)

    def place(x: Any) -> NamedSharding:
        axes = ["data", "fsdp"][: x.ndim]
        axes = [a if n % made.shape[a] == 0 else None for a, n in zip(axes, x.shape, strict=False)]
        return NamedSharding(made, PartitionSpec(*axes))

    return jax.tree.map(place, state)


@functools.cache
def _first(mesh: str, size: int) -> Callable[[], State]:
    places = shardings(jax.eval_shape(lambda: init(size)), mesh)
    return jax.jit(lambda: init(size), out_shardings=places)


def started(mesh: str, size: int = 16) -> State:
    """The first state, in place."""
    return _first(mesh, size)()


def abstract(mesh: str, size: int = 16) -> State:
    shapes = jax.eval_shape(lambda: init(size))
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(place, shapes, shardings(shapes, mesh))


def after(steps: int, mesh: str = "8", size: int = 16, state: State | None = None) -> State:
    """The state of a run that nothing interrupted."""
    state = started(mesh, size) if state is None else state
    for _ in range(steps):
        state, _ = ADVANCE(state)
    return state


def kill_at(moment: int, folder: Path) -> None:
    """SIGKILL at the so-manieth thing that is done to a file below the folder; counts them."""
    done = 0

    def look(event: str, args: tuple) -> None:
        nonlocal done
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if str(folder) in " ".join(map(str, args)):
                done += 1
                print(f"touched {done}", flush=True)
                if done == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--mesh", default="8")
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--sleep", type=float, default=0)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--kill-from", type=int, default=0)
    parser.add_argument("--file-size", type=int, help="of a file at most, after the first step")
    hosts.add_arguments(parser)
    args = parser.parse_args()
    if args.fake_devices is not None:
        hosts.fake_devices(args.fake_devices)
    jax.config.update("jax_disable_most_optimizations", True)  # as in tests
    hosts.initialise(args.coordinator, args.processes, args.process_id, heartbeat=args.heartbeat)
    try:
        with hosts.guard():
            return train(args)
    except LiveAvatarError as error:
        print(f"toy: {error}", file=sys.stderr)
        return 2


def train(args: argparse.Namespace) -> int:
    state, start = started(args.mesh, args.size), 0
    here = jax.set_mesh(state.seen.sharding.mesh)  # type: ignore[attr-defined]
    with here, stopping() as stop, Checkpoints(args.run, CONFIG, keep=2, may_differ=FREE) as saved:
        if saved.latest is not None:
            state, data = saved.restore(abstract(args.mesh, args.size))
            start = data["position"]
            assert int(state.step) == start
        with Watch(args.run, args.steps, start=start, last_good=lambda: saved.latest) as watch:
            for i in range(start + 1, args.steps + 1):
                state, metrics = ADVANCE(state)
                watch(i, metrics)
                print(f"step {i}", flush=True)
                time.sleep(args.sleep)
                over = stop.agreed()
                if i % args.every == 0 or over or i == args.steps:
                    if args.kill_at is not None and i > args.kill_from:
                        kill_at(args.kill_at, args.run / "checkpoints")
                        args.kill_at = None
                    with watch.aside():
                        saved.save(i, state, {"position": i})
                    if args.file_size:
                        saved.wait()
                        size = (args.file_size, resource.RLIM_INFINITY)
                        resource.setrlimit(resource.RLIMIT_FSIZE, size)
                if over:
                    break
    print(f"ended with {int(state.step)}", flush=True)
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
