"""The model behind the engine: a batch of streams on one device, whose rows come and go; those on
a mesh are in `stages.py`.

A stream begins with a silent block that nobody sees: its first frames blend the still portrait
in (`stream.LEAD_FRAMES`), so every block after it has its twelve frames.
"""

import abc
import argparse
import dataclasses
import itertools
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.data import speech
from liveavatar_jax.data.image import parse_size, to_pixels
from liveavatar_jax.data.prompt import Tokenizer
from liveavatar_jax.devices import prepare
from liveavatar_jax.generate import ear
from liveavatar_jax.models.attention import KVCache
from liveavatar_jax.models.text import TextEncoder
from liveavatar_jax.models.vae import VAE
from liveavatar_jax.parallel.mesh import MeshSpec
from liveavatar_jax.player import load, load_avatar, opened
from liveavatar_jax.types import Array, LiveAvatarError
from liveavatar_jax.weights import checkpoint, packed
from liveavatar_jax.weights.convert import TOKENIZER
from serve.engine import Maker, Window
from serve.wire import Ready

Report = Callable[[str, float], None]


class Streams(abc.ABC):
    """What makers have in common: ears, a reader of prompts, and what they tell of themselves."""

    def __init__(self, folder: Path, cfg: ModelConfig, slots: int):
        self.cfg, self.slots = cfg, slots
        self._prompt = Prompt(folder, cfg)
        self._encode, self._window, _ = ear(folder, cfg, speech.SpeechWindow())
        self.left = self._window.left
        self.took: dict[str, float] = {}
        self._hops = [0] * slots
        self._moments = [speech.PRIOR] * slots
        self.silence = Window("", 0, 0, np.zeros(self._window.samples, np.int16))
        self._features = (1, *self._hear(0, self.silence).shape)

    def told(self, name: str, size: tuple[int, int], compiled: "Compiled", delay: int = 0) -> Ready:
        begun = time.monotonic()
        self.open(0, np.zeros((*size, 3), np.uint8), "", 0)
        return Ready(
            name, size[1], size[0], self.slots, self.cfg.block, self._window.ahead, delay,
            together=True, opening=time.monotonic() - begun, compiling=compiled.seconds,
            cached=compiled.cached,
        )  # fmt: skip

    @abc.abstractmethod
    def open(self, slot: int, picture: np.ndarray, prompt: str, seed: int) -> None: ...

    def memory(self) -> dict[str, float]:
        found = {}
        for device in jax.local_devices():
            if stats := device.memory_stats():
                found[f"{device.platform}:{device.id}"] = float(stats["bytes_in_use"])
        return found

    def _begin(self, slot: int) -> None:
        """Nothing was heard there yet."""
        self._hops[slot], self._moments[slot] = 0, speech.PRIOR

    def _hear(self, slot: int, window: Window) -> np.ndarray:
        """The features of a block, as `speech.listen` has them."""
        sound = window.samples.astype(np.float32) / 32768
        fresh = sound[-speech.BLOCK_SAMPLES if window.first else self.left :]
        if float(np.mean(fresh.astype(np.float64) ** 2)) > 1e-6:
            self._moments[slot] = self._moments[slot].add(fresh)
        asked = self._window.ask(self._hops[slot], self._moments[slot])
        self._hops[slot] += 1
        return self._encode(sound[None], asked)[0]

    def _chunk(self, heard: Mapping[int, np.ndarray], **labels: np.ndarray) -> stream.Chunk:
        """Features of the rows that have some; the others rest."""
        audio = np.zeros((self.slots, *self._features), np.float32)
        for slot, features in heard.items():
            audio[slot, 0] = features
        live = np.isin(np.arange(self.slots), list(heard))
        return stream.Chunk(audio=audio, live=live, **labels)  # type: ignore[arg-type]


class Compiled:
    """What compiling took in this process from now on."""

    def __init__(self) -> None:
        self.seconds, self.cached = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._took)
        jax.monitoring.register_event_listener(self._hit)

    def _took(self, event: str, duration_secs: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.seconds += duration_secs

    def _hit(self, event: str, **about: Any) -> None:
        self.cached += event.endswith("compilation_cache/cache_hits")


def make(args: argparse.Namespace, report: Report) -> Maker:
    """As the flags of the engine say. Raises LiveAvatarError where that does not go."""
    prepare(args)
    folder = args.weights or packed.preset()
    cfg = checkpoint.load_config(folder)
    if cfg.block != speech.BLOCK:
        raise LiveAvatarError(
            f"{folder} makes {cfg.block} frames at once, and a live stream hears "
            f"{speech.BLOCK}; set stream.block_frames of its config to "
            f"{speech.BLOCK // cfg.vae.frames_per_latent}"
        )
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    cfg = dataclasses.replace(cfg, stream=dataclasses.replace(cfg.stream, dtype=dtype))
    size = (cfg.size, cfg.size) if cfg.size else _sides(args.size or "720*400")
    # For good: whatever is called under another precision is compiled once more.
    jax.config.update("jax_default_matmul_precision", "highest" if dtype == "float32" else None)
    if args.mesh is None:
        return Rows(folder, cfg, args.slots, size, report, args.quantise)
    from serve.stages import Stages

    return Stages(folder, cfg, MeshSpec.parse(args.mesh), args.slots, size, report, args.quantise)


class Rows(Streams):
    """A `Maker` over one compiled step of `slots` rows; a row at rest costs as much as any."""

    def __init__(
        self, folder: Path, cfg: ModelConfig, slots: int, size: tuple[int, int], report: Report,
        quantised: str | None = None,
    ):  # fmt: skip
        report("load", 0.0)
        compiled, self.avatar = Compiled(), load_avatar(folder, cfg, quantised)
        report("load", 0.3)
        super().__init__(folder, cfg, slots)
        report("compile", 0.4)
        self._compile(size, report)
        report("warm", 0.9)
        for slot in range(slots):
            self.open(slot, np.zeros((*size, 3), np.uint8), "", 0)
        self.ready = self.told(folder.name, size, compiled)
        report("warm", 1.0)

    # ---- a Maker

    def open(self, slot: int, picture: np.ndarray, prompt: str, seed: int) -> None:
        given = jnp.asarray(to_pixels(picture)[None]).astype(self.cfg.stream.dtype)
        one = self._open(self.avatar, given, self._prompt(prompt), jax.random.key(seed))
        self._state = self._insert(self._state, one, np.int32(slot))
        self._begin(slot)
        self.make({slot: self.silence})

    def close(self, slot: int) -> None:
        pass  # the row rests until the next stream takes it

    def change(self, slot: int, prompt: str) -> None:
        self._state = self._retell(self.avatar, self._state, self._prompt(prompt), np.int32(slot))

    def make(self, windows: Mapping[int, Window]) -> Mapping[int, np.ndarray]:
        times = [time.monotonic()]
        heard = {slot: self._hear(slot, window) for slot, window in windows.items()}
        times.append(time.monotonic())
        state, flight = self._denoise(self.avatar, self._state, self._chunk(heard))
        jax.block_until_ready(flight)
        times.append(time.monotonic())
        decoder, frames = self._decode(self.avatar.vae, state.decoder, flight.x, flight.live)
        self._state = dataclasses.replace(state, decoder=decoder)
        frames = np.asarray(frames)
        times.append(time.monotonic())
        stages = zip(("audio", "denoise", "vae"), itertools.pairwise(times), strict=True)
        self.took = {stage: end - begun for stage, (begun, end) in stages}
        return {slot: frames[slot] for slot in windows}

    # ---- what it is made of

    def _compile(self, size: tuple[int, int], report: Report) -> None:
        cfg, slots = self.cfg, self.slots
        picture = jnp.zeros((1, *size, 3), cfg.stream.dtype)
        given = (self.avatar, picture, self._prompt(""), jax.random.key(0))
        self._open = jax.jit(opened).lower(*given).compile()
        report("compile", 0.5)
        one = jax.eval_shape(opened, *given)
        many = jax.ShapeDtypeStruct((slots, *size, 3), picture.dtype)
        context = jax.ShapeDtypeStruct((slots, *given[2].shape[1:]), given[2].dtype)
        shape = jax.eval_shape(opened, self.avatar, many, context, given[3])
        # Whatever stands in a row goes when one is opened in it.
        self._state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)
        at = np.int32(0)
        self._insert = jax.jit(_inserted, donate_argnums=0).lower(shape, one, at).compile()
        retell = jax.jit(_retold, donate_argnums=1)
        self._retell = retell.lower(self.avatar, shape, given[2], at).compile()
        report("compile", 0.7)
        denoise = jax.jit(_denoised, donate_argnums=1)
        self._denoise = denoise.lower(self.avatar, shape, self._chunk({})).compile()
        report("compile", 0.8)
        state, flight = jax.eval_shape(_denoised, self.avatar, shape, self._chunk({}))
        given = (self.avatar.vae, state.decoder, flight.x, flight.live)
        self._decode = jax.jit(_decoded, donate_argnums=1).lower(*given).compile()


def _denoised(model: stream.Avatar, state: Any, chunk: stream.Chunk) -> Any:
    return stream.denoise(model, state, stream.draw(model, state), chunk)


def _decoded(vae: VAE, cache: Any, x: Array, live: Array) -> Any:
    cache, frames = stream.decode(vae, cache, x, live)
    return cache, stream.pixels(frames)


# Where the batch stands in the leaves of a `StreamState`; in its rings and sinks, see below.
_AXES = {"levels": 1, "text": 1}


def _inserted(state: Any, one: Any, row: Array) -> Any:
    """The streams, with another in a row."""

    def put(axis: int, old: Any, new: Any) -> Any:
        at = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, axis)
        return jax.tree.map(at, old, new)

    rest = {name: put(_AXES.get(name, 0), old, getattr(one, name))
            for name, old in vars(state).items() if name != "cache"}  # fmt: skip
    ring, sink = put(2, state.cache.ring, one.cache.ring), put(1, state.cache.sink, one.cache.sink)
    return dataclasses.replace(state, cache=KVCache(ring=ring, sink=sink), **rest)


def _retold(avatar: stream.Avatar, state: Any, context: Array, row: Array) -> Any:
    text = avatar.dit.text(context.astype(avatar.cfg.dtype))
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, 1)
    return dataclasses.replace(state, text=jax.tree.map(put, state.text, text))


def _prompt_rows(encoder: TextEncoder, ids: Array, mask: Array) -> Array:
    rows = encoder(ids, mask)
    return rows * mask[..., None].astype(rows.dtype)


class Prompt:
    """Rows of the text encoder, [1, text_len, k], zeros after the prompt: one shape for all."""

    def __init__(self, folder: Path, cfg: ModelConfig):
        self.cfg, self._tokenizer = cfg.dit, None
        if (folder / TOKENIZER).is_file():
            self._tokenizer = Tokenizer(folder)
            self._encoder = load(folder, "text")
            self._rows = jax.jit(_prompt_rows)

    def __call__(self, prompt: str) -> Array:
        if self._tokenizer is None:
            return jnp.zeros((1, self.cfg.text_len, self.cfg.text_dim))
        ids, mask = self._tokenizer(prompt, self.cfg.text_len)
        return self._rows(self._encoder, ids, mask)


def _sides(size: str) -> tuple[int, int]:
    """Rows and columns of a size such as 720*400. Raises LiveAvatarError for what is none."""
    parse_size(size)
    columns, rows = (int(side) for side in re.split(r"[*xX×]", size))
    return rows, columns
