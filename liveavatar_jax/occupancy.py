"""Whether the pipeline keeps its stages busy: two denoising steps on two cores of this machine.

    python -m liveavatar_jax.occupancy '{"size": "laptop", "blocks": 100, "cores": [0], ...}'

is one measured process; devices, threads and the cores they may use belong to a whole process.
Variants take turns, and what other programs took of the cores meanwhile stands beside each figure.
"""

import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from liveavatar_jax import stream
from liveavatar_jax.bench import SIZES, made_up
from liveavatar_jax.config import ModelConfig, VAEConfig
from liveavatar_jax.models.condition import MOTION_FRAMES
from liveavatar_jax.parallel import hosts
from liveavatar_jax.parallel.mesh import MeshSpec
from liveavatar_jax.parallel.pipeline import Pipeline
from liveavatar_jax.types import LiveAvatarError

STEPS = 2
BLOCKS = 100
WARM = 6  # blocks: compiled, ring full, sink refreshed
LAYERS = 4  # of the size's DiT, so that a step takes 0.2 to 0.3 s at the size "laptop"
JOIN = 300.0  # seconds in which both processes have to come

# Processes, cores of each, and mesh; no mesh is one step after the other.
VARIANTS: dict[str, tuple[tuple[int, ...], ...]] = {
    "sequence": ((0,),),
    "two sequences": ((0,), (1,)),  # what the two cores can give at most
    "pipeline": ((0, 1),),  # two fake devices in one process
    "bound stages": ((0,), (1,)),  # one device a process, one process a core
    "with decoder": ((0, 1),),  # on a third fake device
}
MESHES = {
    "pipeline": "stage=2",
    "bound stages": "stage=2",
    "with decoder": "stage=2,vae=1",
}


def measure(size: str, rounds: int, blocks: int = BLOCKS) -> dict[str, Any]:
    """Every variant `rounds` times, in turns: seconds, utilisation and speed-up of each.

    Raises LiveAvatarError where processes cannot be bound to two cores.
    """
    if not hasattr(os, "sched_setaffinity") or len(os.sched_getaffinity(0)) < 2:
        raise LiveAvatarError(
            "the pipeline is timed on two cores of its own under Linux; there are fewer here"
        )
    runs = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name in VARIANTS:
            runs[name].append(_run(name, size, blocks))
    per_block = {name: [run["seconds"] for run in of] for name, of in runs.items()}
    rows = []
    for name, of in runs.items():
        faster = [a / b for a, b in zip(per_block["sequence"], per_block[name], strict=True)]
        rows.append(
            {
                "variant": name,
                "seconds": statistics.median(per_block[name]),
                "min": min(per_block[name]),
                "max": max(per_block[name]),
                "speedup": statistics.median(faster),
                "busy": np.median([run["busy"] for run in of], axis=0).tolist(),
                "slots": of[0]["slots"],
                "others": statistics.median(run["others"] for run in of),
            }
        )
    return {"size": size, "blocks": blocks, "rounds": rounds, "variants": rows}


def table(report: dict[str, Any]) -> str:
    """One line a variant. `busy`: CPU time over wall time of each process, per core it has;
    `slots`: of a stage's ticks, those with a block in it, fill and drain being without; `others`:
    what other programs took of the machine."""
    head = (
        f"{'pipeline ' + report['size']:22} {'s/block':>8} {'min':>8} {'max':>8} "
        f"{'speed-up':>8} {'busy':>11} {'slots':>6} {'others':>7}"
    )
    rows = [
        f"{r['variant']:22} {r['seconds']:8.3f} {r['min']:8.3f} {r['max']:8.3f} "
        f"{r['speedup']:8.2f} {' '.join(f'{b:5.1%}' for b in r['busy']):>11} "
        f"{r['slots']:6.1%} {r['others']:7.1%}"
        for r in report["variants"]
    ]
    return "\n".join([head, *rows])


def _run(name: str, size: str, blocks: int) -> dict[str, Any]:
    """The processes of one variant; seconds a block, with two streams at once over both."""
    cores, sets = sorted(os.sched_getaffinity(0)), VARIANTS[name]
    together = name in MESHES and len(sets) > 1
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    if kept := jax.config.values["jax_compilation_cache_dir"]:
        env["JAX_COMPILATION_CACHE_DIR"] = kept
    workers = []
    for i, own in enumerate(sets):
        task = {
            "size": size,
            "blocks": blocks,
            "cores": [cores[c] for c in own],
            "mesh": MESHES.get(name),
            "coordinator": f"127.0.0.1:{port}" if together else None,
            "processes": len(sets),
            "process": i,
        }
        command = [sys.executable, "-m", "liveavatar_jax.occupancy", json.dumps(task)]
        workers.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    written = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise LiveAvatarError(f"the measured process of {name!r} ended early; see above")
    found = [json.loads(text.splitlines()[-1]) for text in written]
    wall = max(each["wall"] for each in found)
    streams = len(sets) if name not in MESHES else 1
    used = sum(each["cpu"] for each in found)
    return {
        "seconds": wall / (blocks * streams),
        "busy": [
            each["cpu"] / (each["wall"] * len(own)) for each, own in zip(found, sets, strict=True)
        ],
        "slots": found[0]["slots"],
        "others": max(0.0, found[0]["machine"] - used) / (wall * os.cpu_count()),
    }


def work(task: dict[str, Any]) -> dict[str, float]:
    """One measured process: `blocks` blocks, from an empty pipeline until the last one is out."""
    tick, drain = _stream(task)
    for _ in range(WARM):
        tick(True)
    for _ in range(drain):
        tick(False)
    machine, cpu, begun = _machine(), time.process_time(), time.perf_counter()
    for _ in range(task["blocks"]):
        tick(True)
    for _ in range(drain):
        tick(False)
    return {
        "wall": time.perf_counter() - begun,
        "cpu": time.process_time() - cpu,
        "machine": _machine() - machine,
        "slots": task["blocks"] / (task["blocks"] + drain),
    }


def _machine() -> float:
    """CPU seconds that all programs have used since the machine was started."""
    user, nice, system, _, _, irq, soft, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _stream(task: dict[str, Any]) -> tuple[Callable[[bool], Any], int]:
    """One tick, waited for, with or without a new block; and the ticks that empty the pipeline."""
    size = SIZES[task["size"]]()
    cfg = _two_steps(size.model)
    avatar = jax.jit(lambda: made_up(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0))))()
    still = jnp.zeros((1, MOTION_FRAMES, size.height, size.width, cfg.dit.latent_channels))
    portrait = jax.jit(stream.from_latents)(avatar, still[:, :1], still)
    context = np.zeros((1, cfg.dit.text_len, cfg.dit.text_dim), np.float32)
    heard = (1, 1, 4 * cfg.stream.block_frames, cfg.dit.audio_layers, cfg.dit.audio_dim)
    chunk = stream.Chunk(audio=jnp.zeros(heard))
    key = jax.random.key(0)

    if task["mesh"] is None:
        state = jax.jit(lambda *given: stream.start(*given))(avatar, portrait, context, key)
        state = dataclasses.replace(state, decoder=None)
        block = lambda m, s, c: stream.denoise(m, s, stream.draw(m, s), c)
        denoise = jax.jit(block, donate_argnums=1)

        def one(live: bool) -> None:
            nonlocal state
            state, out = denoise(avatar, state, chunk)
            jax.block_until_ready(out.x)

        return one, 0

    pipeline = Pipeline(cfg, MeshSpec.parse(task["mesh"]), size.height, size.width)
    model = pipeline.place(avatar)
    session = pipeline.start(model, portrait, context, key)
    running = pipeline.insert(pipeline.empty(), session, 0)
    step = pipeline.step if pipeline.spec.vae else pipeline.tick

    def tick(live: bool) -> None:
        nonlocal running
        running, out = step(model, running, chunk if live else None)
        jax.block_until_ready(out)

    return tick, pipeline.delay


def _two_steps(cfg: ModelConfig) -> ModelConfig:
    layers = min(LAYERS, cfg.dit.layers)
    inject = tuple(i for i in cfg.dit.inject_layers if i < layers)
    return dataclasses.replace(
        cfg,
        dit=dataclasses.replace(cfg.dit, layers=layers, inject_layers=inject),
        vae=VAEConfig.tiny(),
        stream=dataclasses.replace(cfg.stream, steps=STEPS),
    )


def main(argument: str) -> None:
    task = json.loads(argument)
    os.sched_setaffinity(0, task["cores"])  # before JAX counts them for its threads
    devices = MeshSpec.parse(task["mesh"]).devices if task["mesh"] else 1
    jax.config.update("jax_num_cpu_devices", 1 if task["coordinator"] else devices)
    if task["coordinator"]:
        hosts.initialise(task["coordinator"], task["processes"], task["process"], join_timeout=JOIN)
    with hosts.guard():
        print(json.dumps(work(task)), flush=True)


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except LiveAvatarError as error:
        sys.exit(f"liveavatar-jax: {error}")
