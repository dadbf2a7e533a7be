"""The model behind the engine: a batch of streams on one device, whose rows come and go.

A stream begins with a silent block that nobody sees: its first frames blend the still portrait
in (`stream.LEAD_FRAMES`), so every block after it has its twelve frames.
"""

import argparse
import dataclasses
import re
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
from liveavatar_jax.player import frames_of, load, load_avatar, opened
from liveavatar_jax.types import Array, LiveAvatarError
from liveavatar_jax.weights import checkpoint, packed
from liveavatar_jax.weights.convert import TOKENIZER
from serve.engine import Window
from serve.wire import Ready

Report = Callable[[str, float], None]


class Rows:
    """A `Maker` over one compiled step of `slots` rows; a row at rest costs as much as any."""

    def __init__(
        self, folder: Path, cfg: ModelConfig, slots: int, size: tuple[int, int], report: Report
    ):
        report("load", 0.0)
        self.cfg, self.avatar = cfg, load_avatar(folder, cfg)
        report("load", 0.3)
        self._prompt = _Prompt(folder, cfg)
        self._encode, self._window, _ = ear(folder, cfg, speech.SpeechWindow())
        self.left = self._window.left
        self._hops = [0] * slots
        self._moments = [speech.PRIOR] * slots
        self.ready = Ready(
            folder.name, size[1], size[0], slots, cfg.block, self._window.ahead, 0, together=True
        )
        report("compile", 0.4)
        self._compile(size, report)
        report("warm", 0.9)
        for slot in range(slots):
            self.open(slot, np.zeros((*size, 3), np.uint8), "", 0)
        report("warm", 1.0)

    @classmethod
    def load(cls, args: argparse.Namespace, report: Report) -> "Rows":
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
        with jax.default_matmul_precision("highest" if dtype == "float32" else None):
            return cls(folder, cfg, args.slots, size, report)

    # ---- a Maker

    def open(self, slot: int, picture: np.ndarray, prompt: str, seed: int) -> None:
        given = jnp.asarray(to_pixels(picture)[None]).astype(self.cfg.stream.dtype)
        one = self._open(self.avatar, given, self._prompt(prompt), jax.random.key(seed))
        self._state = self._insert(self._state, one, np.int32(slot))
        self._hops[slot], self._moments[slot] = 0, speech.PRIOR
        silence = np.zeros(self._window.samples, np.int16)
        self.make({slot: Window("", 0, 0, silence)})

    def change(self, slot: int, prompt: str) -> None:
        self._state = self._retell(self.avatar, self._state, self._prompt(prompt), np.int32(slot))

    def close(self, slot: int) -> None:
        pass  # the row rests until the next stream takes it

    def make(self, windows: Mapping[int, Window]) -> Mapping[int, np.ndarray]:
        slots = self.ready.slots
        audio = np.zeros((slots, *self._features), np.float32)
        for slot, window in windows.items():
            audio[slot, 0] = self._hear(slot, window.samples)
        live = np.isin(np.arange(slots), list(windows))
        chunk = stream.Chunk(audio=audio, live=live)  # type: ignore[arg-type]
        self._state, frames = self._step(self.avatar, self._state, chunk)
        frames = np.asarray(frames)
        return {slot: frames[slot] for slot in windows}

    # ---- what it is made of

    def _hear(self, slot: int, samples: np.ndarray) -> np.ndarray:
        """The features of a block, as `speech.listen` has them."""
        sound = samples.astype(np.float32) / 32768
        fresh = sound[self.left : self.left + speech.BLOCK_SAMPLES]
        if float(np.mean(fresh**2)) > 1e-6:
            self._moments[slot] = self._moments[slot].add(fresh)
        asked = self._window.ask(self._hops[slot], self._moments[slot])
        self._hops[slot] += 1
        return self._encode(sound[None], asked)[0]

    def _compile(self, size: tuple[int, int], report: Report) -> None:
        cfg, slots = self.cfg, self.ready.slots
        heard = self._hear(0, np.zeros(self._window.samples, np.int16))
        self._features = (1, *heard.shape)
        picture = jnp.zeros((1, *size, 3), cfg.stream.dtype)
        given = (self.avatar, picture, self._prompt(""), jax.random.key(0))
        self._open = jax.jit(opened).lower(*given).compile()
        report("compile", 0.5)
        many = jnp.zeros((slots, *size, 3), cfg.stream.dtype)
        context = jnp.repeat(given[2], slots, axis=0)
        self._state = jax.jit(opened)(self.avatar, many, context, jax.random.key(0))
        shape = jax.eval_shape(lambda: self._state)
        report("compile", 0.6)
        one = jax.eval_shape(opened, *given)
        at = np.int32(0)
        self._insert = jax.jit(_inserted, donate_argnums=0).lower(shape, one, at).compile()
        retell = jax.jit(_retold, donate_argnums=1)
        self._retell = retell.lower(self.avatar, shape, given[2], at).compile()
        report("compile", 0.7)
        chunk = stream.Chunk(
            audio=np.zeros((slots, *self._features), np.float32),  # type: ignore[arg-type]
            live=np.zeros(slots, bool),  # type: ignore[arg-type]
        )
        step = jax.jit(frames_of, donate_argnums=1)
        self._step = step.lower(self.avatar, shape, chunk).compile()


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


class _Prompt:
    """Rows of the text encoder, [1, text_len, k], zeros after the prompt: one shape for all."""

    def __init__(self, folder: Path, cfg: ModelConfig):
        self.cfg, self._tokenizer = cfg.dit, None
        if (folder / TOKENIZER).is_file():
            self._tokenizer = Tokenizer(folder)
            self._encoder = load(folder, "text")
            self._rows = jax.jit(lambda encoder, ids, mask: encoder(ids, mask) * mask[..., None])

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
