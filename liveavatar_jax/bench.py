"""How long each component takes: compiled, on random weights, waited for."""

import dataclasses
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tqdm import tqdm

from liveavatar_jax import stream
from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig
from liveavatar_jax.data.speech import Moments, SpeechWindow, mel_encode, mel_window
from liveavatar_jax.models.attention import KV
from liveavatar_jax.models.condition import MOTION_FRAMES
from liveavatar_jax.models.speech import SpeechEncoder, window_features
from liveavatar_jax.types import Array, LiveAvatarError
from liveavatar_jax.weights import checkpoint, packed

COMPONENTS = ("audio", "prefill", "denoise", "decode", "block")
PIPELINE = "pipeline"  # minutes, in processes of its own: only when asked for


@dataclass(frozen=True)
class Size:
    """A model and the latent height and width that it is timed at."""

    model: ModelConfig
    height: int
    width: int


def _laptop() -> ModelConfig:
    dit = DiTConfig(
        dim=512,
        ffn_dim=2048,
        heads=8,
        layers=8,
        inject_layers=(0, 2, 4, 6),
        param_dtype="float32",
    )
    return ModelConfig(dit=dit, stream=StreamConfig(dtype="float32"))


SIZES: dict[str, Callable[[], Size]] = {
    "tiny": lambda: Size(ModelConfig.tiny(), 16, 16),
    "laptop": lambda: Size(_laptop(), 24, 24),
    "14b": lambda: Size(ModelConfig(), 48, 88),
    "puppet": lambda: Size(checkpoint.load_config(packed.preset("puppet")), 8, 8),
}


def bench(sizes: Sequence[str], only: Sequence[str] | None, repeats: int, file: Path | None) -> str:
    """A table of medians and ranges in seconds; the same figures as JSON in `file`.

    Raises LiveAvatarError for unknown names, and a file that cannot be written.
    """
    chosen, all_known = list(only or COMPONENTS), (*COMPONENTS, PIPELINE)
    for name, known in [*((s, SIZES) for s in sizes), *((c, all_known) for c in chosen)]:
        if name not in known:
            raise LiveAvatarError(f"nothing called {name!r} to time; choose of {', '.join(known)}")
    if repeats < 1:
        raise LiveAvatarError(f"--repeats {repeats} must be at least 1")
    from liveavatar_jax import occupancy  # which times what is here

    rows, occupied = [], []
    with tqdm(total=len(sizes) * len(chosen), leave=False, unit="component") as bar:
        for name in sizes:
            for component, run in _compiled(SIZES[name](), chosen):
                bar.set_description(f"{name} {component}")
                rows.append({"size": name, "component": component, **_time(run, repeats)})
                bar.update()
            if PIPELINE in chosen:
                bar.set_description(f"{name} {PIPELINE}")
                occupied.append(occupancy.measure(name, repeats))
                bar.update()
    report = {"machine": machine(), "repeats": repeats, "seconds": rows, PIPELINE: occupied}
    if file is not None:
        try:
            file.write_text(json.dumps(report, indent=1) + "\n")
        except OSError as error:
            raise LiveAvatarError(f"{file} cannot be written ({error.strerror})") from None
    return "\n".join([_table(report), *map(occupancy.table, occupied)])


def machine() -> dict[str, Any]:
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else platform.machine() + " CPU",
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
    }


def _compiled(size: Size, chosen: Sequence[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The chosen components, in a stream whose rings are full and whose decoder is warm."""
    cfg = size.model
    if "audio" in chosen:
        yield "audio", _speech(cfg)
    if set(chosen) <= {"audio", PIPELINE}:
        return
    avatar = made_up(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0)))
    dtype = cfg.stream.dtype
    reference = jnp.zeros((1, 1, size.height, size.width, cfg.dit.latent_channels), dtype)
    context = jnp.zeros((1, cfg.dit.text_len, cfg.dit.text_dim), dtype)
    state = jax.jit(_running)(avatar, reference, context, jax.random.key(0))
    heard = jnp.zeros((1, 1, 12, cfg.dit.audio_layers, cfg.dit.audio_dim), dtype)
    flight = jax.jit(_flight)(avatar, state, heard)
    runs = {
        "prefill": _thunk(_prefill, avatar, state),
        "denoise": _thunk(_denoise, avatar, state, flight),
        "decode": _thunk(_decode, avatar, state, flight),
        "block": _thunk(stream.step, avatar, state, stream.Chunk(audio=heard)),
    }
    yield from ((name, runs[name]) for name in COMPONENTS if name in chosen and name in runs)


def made_up(make: Callable[[], Any]) -> Any:
    """The module with small, varied weights: to compile its own random ones takes far longer."""

    def wave(leaf: jax.ShapeDtypeStruct) -> Array:
        i = jax.lax.iota(jnp.float32, math.prod(leaf.shape))
        return (0.03 * jnp.sin(i)).astype(leaf.dtype).reshape(leaf.shape)

    return jax.tree.map(wave, jax.eval_shape(make))


def _running(
    model: stream.Avatar, reference: Array, context: Array, key: Array
) -> stream.StreamState:
    portrait = stream.from_latents(model, reference, reference)
    still = jnp.repeat(reference, MOTION_FRAMES, axis=1)
    state = stream.start(model, dataclasses.replace(portrait, motion=still), context, key)
    return dataclasses.replace(state, block=jnp.full(1, 99), position=jnp.full(1, 297))


def _prefill(model: stream.Avatar, state: stream.StreamState) -> KV:
    return model.dit.prefill(state.first, state.motion, state.text)


def _flight(model: stream.Avatar, state: stream.StreamState, heard: Array) -> stream.InFlight:
    drawn = stream.draw(model, state)
    return stream.enter(model, state, drawn, stream.Chunk(audio=heard))[1]


def _denoise(
    model: stream.Avatar, state: stream.StreamState, flight: stream.InFlight
) -> tuple[stream.InFlight, KV]:
    level = jax.tree.map(lambda leaf: leaf[0], state.levels)
    return stream.advance(model, state.cache, state, flight, level, 0, 0)


def _decode(model: stream.Avatar, state: stream.StreamState, flight: stream.InFlight) -> Any:
    assert state.decoder is not None
    return stream.decode(model.vae, state.decoder, flight.x, flight.live)


def _speech(cfg: ModelConfig) -> Callable[[], Any]:
    """The speech features of one block of a live stream."""
    if (mel := cfg.log_mel) is not None:
        window = mel_window(mel)
        return _thunk(mel_encode(mel, window), jnp.zeros((1, window.samples)), None)
    encoder = made_up(lambda: SpeechEncoder(cfg.speech, rngs=nnx.Rngs(0)))
    window = SpeechWindow()
    samples = jnp.zeros((1, window.samples))
    return _thunk(window_features, encoder, samples, window.ask(0, Moments.prior()))


def _thunk(function: Callable, *given: Any) -> Callable[[], Any]:
    compiled = jax.jit(function)
    return lambda: compiled(*given)


def _time(run: Callable[[], Any], repeats: int) -> dict[str, float]:
    jax.block_until_ready(run())  # compiles
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - begun)
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def _table(report: dict[str, Any]) -> str:
    head = f"{'size':8} {'component':10} {'median s':>10} {'min':>10} {'max':>10}"
    rows = [
        f"{r['size']:8} {r['component']:10} {r['median']:10.4f} {r['min']:10.4f} {r['max']:10.4f}"
        + (f"   {12 / r['median']:.1f} FPS" if r["component"] == "block" else "")
        for r in report["seconds"]
    ]
    lines = [head, *rows] if rows else []
    return "\n".join([", ".join(f"{k} {v}" for k, v in report["machine"].items()), *lines])
