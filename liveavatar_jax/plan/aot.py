"""Compiling for an accelerator that is not there, in a process of its own.

The TPU compiler comes with `libtpu`, the GPU compiler with JAX's CUDA plugin; neither needs a
device or a driver. Both read environment variables as they load, and `libtpu` may be loaded by
one process at a time unless told otherwise, so the compilation runs as

    python -m liveavatar_jax.plan.aot REQUEST.json RESULT.json

FLOPs are counted in `cost.py`, for compilers count a loop's body once, and for a GPU nothing.
"""

import dataclasses
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from liveavatar_jax.parallel.collectives import Collective, collectives
from liveavatar_jax.plan.chips import Chip, chip, gpu_target
from liveavatar_jax.types import LiveAvatarError

_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",  # of the process itself: it must not look for a device
    "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # cuDNN is not needed to compile
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",  # these three keep libtpu from complaining
    "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
_CAUSE = re.compile(r"[\w.]+(Error|Exception): ")
_TOO_LARGE = re.compile(r"\(?([\d.]+)([KMGT])\)? exceeds available")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """What is to be compiled: a function of shapes that carry shardings of the given devices."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    mesh: jax.sharding.Mesh
    donate: tuple[int, ...] = ()
    parts: dict[str, Any] = dataclasses.field(default_factory=dict)  # arguments to be listed


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device as the compiler assigned them."""

    arguments: int  # all that the program is given, whether it needs it or not
    outputs: int  # without those that take an argument's place
    temporaries: int
    parts: dict[str, int]  # of the arguments, by the names that the builder gave
    host: int = 0  # what a device keeps in the memory of its host

    @property
    def peak(self) -> int:
        """Temporaries are what the compiler needs at its peak, beside everything else."""
        return self.arguments + self.outputs + self.temporaries


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said. `memory` is None where it refused the program as too large."""

    memory: Memory | None
    needed: int | None  # bytes a device would need, where it was refused
    collectives: tuple[Collective, ...]
    seconds: float
    text: str = dataclasses.field(default="", repr=False)


def compile_ahead(
    builder: str,
    target: Chip,
    devices: int,
    timeout: float = 1800.0,
    slices: int = 1,
    loops: float | int | None = None,
    **request: Any,
) -> Compiled:
    """Compiles `builder`'s program for at least `devices` chips.

    `builder` is "package.module:function"; it is called there with the chips of the smallest
    topology that has so many, and `request`, plain JSON values, and returns a `Program`. TPUs may
    be those of several `slices`. `loops` is how often loops run whose count depends on data.

    Raises LiveAvatarError where the compiler is not installed, refuses the program for another
    reason than its size, or takes longer than `timeout` seconds.
    """
    if not installed(target):
        what = "libtpu" if target.platform == "tpu" else "JAX's CUDA plugin"
        raise LiveAvatarError(
            f"{what} is not installed, so nothing can be compiled for {target.name}; install the "
            "extra with `pip install 'liveavatar-jax[plan]'`"
        )
    with tempfile.TemporaryDirectory() as folder:
        ask, answer = Path(folder) / "request.json", Path(folder) / "result.json"
        asked = {"builder": builder, "chip": target.name, "devices": devices, "slices": slices,
                 "request": request}  # fmt: skip
        ask.write_text(json.dumps(asked))
        command = [sys.executable, "-m", __name__, str(ask), str(answer)]
        try:
            done = subprocess.run(
                command, env=os.environ | _ENVIRONMENT, capture_output=True, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            raise LiveAvatarError(
                f"compiling {builder} for {target.name} took longer than {timeout:.0f} s; plan "
                "for fewer devices or allow more time"
            ) from None
        if not answer.exists():
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["no word"]
            cause = next((line for line in reversed(said) if _CAUSE.match(line)), said[-1])
            raise LiveAvatarError(f"{builder} does not compile for {target.name}: {cause[:500]}")
        said = json.loads(answer.read_text())
    found = tuple(collectives(said["text"], said["mesh"], loops))
    memory = said["memory"] and Memory(**said["memory"])
    return Compiled(memory, said["needed"], found, said["seconds"], said["text"])


def installed(target: Chip) -> bool:
    """Whether the compiler for this chip can be loaded."""
    names = ("libtpu",) if target.platform == "tpu" else ("jax_cuda13_plugin", "jax_cuda12_plugin")
    return any(importlib.util.find_spec(name) for name in names)


# ---- in the process that compiles


def topology(target: Chip, devices: int, slices: int = 1) -> list[Any]:
    """All devices of the smallest slices, or hosts, of this chip that have so many."""
    name = target.topology(devices if target.platform == "cuda" else -(-devices // slices))
    if target.platform == "tpu":
        more = {"num_slices": slices} if slices > 1 else {}
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **more)
    else:
        described = topologies.get_topology_desc(
            target.name, "cuda", target_config=gpu_target(target), topology=name
        )
    return list(described.devices)


def _held(tree: Any) -> int:
    """Bytes of a tree of shapes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def _main(ask: str, answer: str) -> None:
    asked = json.loads(Path(ask).read_text())
    devices = topology(chip(asked["chip"]), asked["devices"], asked["slices"])
    module, function = asked["builder"].split(":")
    program = getattr(importlib.import_module(module), function)(devices, **asked["request"])
    begun = time.perf_counter()
    result = {"memory": None, "needed": None, "text": "", "mesh": dict(program.mesh.shape)}
    try:
        jitted = jax.jit(program.function, donate_argnums=program.donate, keep_unused=True)
        with jax.set_mesh(program.mesh):
            compiled = jitted.trace(*program.arguments).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        too_large = _TOO_LARGE.search(str(error))
        if not too_large:
            raise
        result["needed"] = int(float(too_large[1]) * _UNITS[too_large[2]])
    else:
        stats: Any = compiled.memory_analysis()
        result["memory"] = {
            "arguments": stats.argument_size_in_bytes,
            "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "parts": {name: _held(tree) for name, tree in program.parts.items()},
            "host": stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes,
        }
        result["text"] = compiled.as_text()
    result["seconds"] = time.perf_counter() - begun
    Path(answer).write_text(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
