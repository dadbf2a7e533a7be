"""The model behind the engine on a mesh of devices: each has one denoising step, and the streams
are rows of the one pipeline (`parallel/pipeline.py`).

A block comes out some ticks after it went in, and what is not there yet is a bubble. While a tick
runs, what left in the one before it is decoded and fetched.
"""

import collections
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.data.image import to_pixels
from liveavatar_jax.parallel.mesh import MeshSpec
from liveavatar_jax.parallel.pipeline import Clip, Pipeline
from liveavatar_jax.player import placed
from liveavatar_jax.stream import InFlight
from serve.avatar import Compiled, Report, Streams
from serve.engine import Window


class Stages(Streams):
    """A `Maker` over a pipeline of `slots` rows."""

    def __init__(
        self, folder: Path, cfg: ModelConfig, spec: MeshSpec, slots: int, size: tuple[int, int],
        report: Report, quantised: str | None = None,
    ):  # fmt: skip
        report("load", 0.0)
        compiled, self.pipe = (
            Compiled(),
            Pipeline(cfg, spec, size[0] // 8, size[1] // 8, rows=slots),
        )
        self.model = placed(self.pipe, folder, quantised)
        report("load", 0.3)
        super().__init__(folder, cfg, slots)
        report("compile", 0.4)
        self.pipe.rehearse(self.model)
        self.state = self.pipe.empty()
        # Whose stream is in a row: blocks of the one before it carry another number.
        self._stream = np.zeros(slots, np.int32)
        # What goes in, with the prompt from there on if that is another one.
        self._waiting = [collections.deque[tuple[np.ndarray, Any]]() for _ in range(slots)]
        self._prompts: dict[int, Any] = {}  # of the next block, by row
        self._rest = [0] * slots  # ticks for which nothing may go in
        self._gone = [0] * slots  # blocks of the stream that went in
        self._hidden = [0] * slots  # blocks that nobody is to see
        self._told: list[tuple[Any, int, int]] = []  # prompts, their row and the stage to come
        self._leaving: InFlight | None = None  # of the last tick, to be decoded
        self._clip: Clip | None = None  # what was decoded before its time
        report("warm", 0.9)
        self.open(0, np.zeros((*size, 3), np.uint8), "", 0)
        self.change(0, "")
        self.make({0: self.silence})
        for _ in range(self.pipe.wait + self.pipe.delay + 2):
            self.make({})
        self.ready = self.told(folder.name, size, compiled, self.pipe.delay + 1)
        report("warm", 1.0)

    # ---- a Maker

    def open(self, slot: int, picture: np.ndarray, prompt: str, seed: int) -> None:
        """The silent block that nobody sees is made on all stages at once, where heads divide."""
        portrait = self.pipe.portrait(self.model, to_pixels(picture)[None])
        context, key = self._prompt(prompt), jax.random.key(seed)
        session = self.pipe.start(self.model, portrait, context, key)
        self._decoded()  # or it would go on in the row's new decoder
        self._begin(slot)
        self._told = [told for told in self._told if told[1] != slot]
        self._stream[slot] += 1
        self._waiting[slot].clear()
        self._prompts.pop(slot, None)
        self._rest[slot] = self._gone[slot] = self._hidden[slot] = 0
        silent = self._hear(slot, self.silence)
        if self.pipe.can_warm:
            chunk = stream.Chunk(audio=silent[None, None])  # type: ignore[arg-type]
            session, _ = self.pipe.warm(self.model, session, chunk)
        else:
            self._waiting[slot].append((silent, None))
            self._hidden[slot] = 1
        self.state = self.pipe.insert(self.state, session, slot)
        jax.block_until_ready(self.state)  # what it takes is told, see `Ready`

    def change(self, slot: int, prompt: str) -> None:
        self._prompts[slot] = self.pipe.text(self.model, self._prompt(prompt))

    def close(self, slot: int) -> None:
        self._stream[slot] += 1
        self._waiting[slot].clear()

    def make(self, windows: Mapping[int, Window]) -> Mapping[int, np.ndarray]:
        begun = time.monotonic()
        for slot, window in windows.items():
            features = self._hear(slot, window)
            self._waiting[slot].append((features, self._prompts.pop(slot, None)))
        heard = {slot: self._next(slot) for slot in range(self.slots) if self._may_go(slot)}
        ears = time.monotonic()
        for text, slot, stage in self._told:
            self.state = self.pipe.retell(self.state, text, slot, stage)
        self._told = [(text, slot, stage + 1) for text, slot, stage in self._told
                      if stage + 1 < self.pipe.spec.stage]  # fmt: skip
        chunk = self._chunk(heard, epoch=self._stream.copy())
        self.state, leaving = self.pipe.tick(self.model, self.state, chunk)
        clip = self._decoded()  # while the stages run
        self._leaving, self._clip = leaving, None
        frames = {} if clip is None else self._shown(clip)
        self.took = {"audio": ears - begun, "denoise": time.monotonic() - ears}
        return frames

    # ---- of its own

    def _decoded(self) -> Clip | None:
        """Of the last tick; what is said in this one must not wait for it on the decoder's device,
        where ears may be as well."""
        if self._leaving is not None:
            self.state, self._clip = self.pipe.decode(self.model, self.state, self._leaving)
            self._leaving = None
        return self._clip

    def _may_go(self, slot: int) -> bool:
        if self._rest[slot]:
            self._rest[slot] -= 1
            return False
        return bool(self._waiting[slot])

    def _next(self, slot: int) -> np.ndarray:
        """The features that go in. Before the block that its sink is renewed for, a stream which
        began in the pipeline waits until its own first block is out."""
        self._gone[slot] += 1
        if not self.pipe.can_warm and self._gone[slot] == self.cfg.stream.sink_after:
            self._rest[slot] = self.pipe.wait
        features, text = self._waiting[slot].popleft()
        if text is not None:
            self._told.append((text, slot, 0))
        return features

    def _shown(self, clip: Clip) -> dict[int, np.ndarray]:
        live = np.asarray(clip.live)[0] & (np.asarray(clip.epoch)[0] == self._stream)
        if not live.any():
            return {}
        frames, shown = np.asarray(clip.frames), {}
        for slot in map(int, np.flatnonzero(live)):
            if self._hidden[slot]:
                self._hidden[slot] -= 1
            else:
                shown[slot] = frames[slot]
        return shown
