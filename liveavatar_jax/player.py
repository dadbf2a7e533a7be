"""Who makes the blocks of a video: one device, or a mesh of them. Both have one face:

player = OneDevice(...) or OnMesh(...)       # compiles
for pixels in player.play(chunks, blocks):   # [F, H, W, 3] bytes, block after block
"""

import dataclasses
import itertools
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P
from jax.sharding import NamedSharding, Sharding

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.models.quantise import quantise
from liveavatar_jax.parallel import hosts
from liveavatar_jax.parallel.mesh import MeshSpec
from liveavatar_jax.parallel.pipeline import Clip, Pipeline, Placed
from liveavatar_jax.parallel.sharding import WEIGHTS, spec_of
from liveavatar_jax.paths import leaves
from liveavatar_jax.types import Array, Float, UInt8
from liveavatar_jax.weights import checkpoint

Pixels = UInt8[np.ndarray, "F H W 3"]


def load(folder: Path, which: str, dtype: str | None = None, quantised: str | None = None) -> Any:
    """A network of a converted checkpoint, whole on a device of every process."""
    network = checkpoint.restore(folder, which, hosts.everywhere(), dtype, quantised)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), network)


def load_avatar(folder: Path, cfg: ModelConfig, quantised: str | None = None) -> stream.Avatar:
    """DiT and VAE of a converted checkpoint, in the dtype of the stream.

    quantised: "int8" or "fp8", for the DiT's trunk, see models/quantise.py.
    """
    avatar = jax.eval_shape(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0)))
    avatar.dit = load(folder, "dit", cfg.stream.dtype, quantised)
    avatar.vae = load(folder, "vae", cfg.stream.dtype)
    return avatar


def opened(
    model: stream.Avatar, picture: Float[Array, "b H W 3"], context: Array, key: Array
) -> stream.StreamState:
    """The state before the first block."""
    return stream.start(model, stream.encode_portrait(model, picture), context, key)


def frames_of(
    model: stream.Avatar, state: stream.StreamState, chunk: stream.Chunk
) -> tuple[stream.StreamState, UInt8[Array, "b F H W 3"]]:
    """`stream.step`, with the frames as bytes."""
    state, frames = stream.step(model, state, chunk)
    return state, stream.pixels(frames)


class OneDevice:
    """The sequential stream."""

    def __init__(
        self, avatar: stream.Avatar, picture: np.ndarray, context: Array, seed: int,
        first: stream.Chunk,
    ):  # fmt: skip
        self.avatar = avatar
        dtype = avatar.cfg.dtype
        self.opening = (avatar, jnp.asarray(picture).astype(dtype), context, jax.random.key(seed))
        self.start = jax.jit(opened).lower(*self.opening).compile()
        state = jax.eval_shape(opened, *self.opening)
        step = jax.jit(frames_of, donate_argnums=1)
        self.step = step.lower(avatar, state, first).compile()

    def play(self, chunks: Iterator[stream.Chunk], blocks: int) -> Iterator[Pixels]:
        """Fetches a block while the device works on the next."""
        state, pending = self.start(*self.opening), None
        for chunk in itertools.islice(chunks, blocks):
            state, ready = self.step(self.avatar, state, chunk)
            if pending is not None:
                # All of it: a slice would be one more program, queued behind the next block.
                yield np.asarray(pending)[0]
            pending = ready
        if pending is not None:
            yield np.asarray(pending)[0]


class OnMesh:
    """The pipeline, over the devices of one process or of several.

    The first process hears the audio, frames come out of the last one's `play`; all others only
    keep step.
    """

    def __init__(
        self, folder: Path, cfg: ModelConfig, spec: MeshSpec, picture: np.ndarray, context: Array,
        seed: int, *, quantised: str | None = None, warm: int = 0,
    ):  # fmt: skip
        _, height, width, _ = picture.shape
        self.pipeline = Pipeline(cfg, spec, height // 8, width // 8)
        self.model = placed(self.pipeline, folder, quantised)
        self.picture, self.context, self.seed = picture.astype(np.float32), context, seed
        self.blocks_at_once = warm
        self.pipeline.rehearse(self.model)

    def play(self, chunks: Iterator[stream.Chunk | None], blocks: int) -> Iterator[Pixels]:
        """Keeps the stages busy: the host is two ticks ahead of the frames that it fetches."""
        pipe, model = self.pipeline, self.model
        session, made = self._session(), min(self.blocks_at_once, blocks)
        early: Clip | None = None
        for _ in range(made):
            session, clip = pipe.warm(model, session, self._heard(next(chunks)))
            yield from pixels(early)
            early = clip
        state = pipe.insert(pipe.empty(), session, 0)
        del session  # its rings are as large as the pipeline's
        yield from pixels(early)
        ahead: deque[tuple[Array, Clip | None]] = deque()

        def oldest() -> Iterator[Pixels]:
            live, clip = ahead.popleft()
            jax.block_until_ready(live)  # who has no frames would else run ahead without bound
            yield from pixels(clip)

        for chunk in self._schedule(chunks, made, blocks):
            state, leaving = pipe.tick(model, state, chunk)
            state, clip = pipe.decode(model, state, leaving)
            ahead.append((leaving.live, clip))
            if len(ahead) > 2:
                yield from oldest()
        while ahead:
            yield from oldest()

    def _schedule(
        self, chunks: Iterator[stream.Chunk | None], made: int, blocks: int
    ) -> Iterator[stream.Chunk | None]:
        """Chunks and bubbles: before the sink is replaced, and while the stages run empty."""
        pause = self.pipeline.cfg.stream.sink_after
        for block in range(made, blocks):
            if block == pause and not made:
                yield from [None] * self.pipeline.wait
            yield next(chunks)
        yield from [None] * self.pipeline.delay

    def _session(self) -> stream.StreamState:
        """The portrait is encoded where the decoder is, and sent to all."""
        pipe, portrait = self.pipeline, self.pipeline.blank()
        if pipe.decodes:
            portrait = pipe.portrait(self.model, self.picture)
        known = jax.tree.map(np.asarray, (portrait.reference, portrait.motion))
        reference, motion = hosts.broadcast(known, source=jax.process_count() - 1)
        portrait = dataclasses.replace(portrait, reference=reference, motion=motion)
        return pipe.start(self.model, portrait, self.context, jax.random.key(self.seed))

    def _heard(self, chunk: stream.Chunk | None) -> stream.Chunk:
        """What the first process heard, for all."""
        return hosts.broadcast(self.pipeline.filled(chunk, 1))


def placed(pipeline: Pipeline, folder: Path, quantised: str | None = None) -> Placed:
    """DiT and VAE of a converted checkpoint on the mesh of a pipeline: the DiT straight onto the
    stages, the VAE by way of every process."""
    cfg, mesh = pipeline.cfg, pipeline.meshes.stages
    avatar = jax.eval_shape(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0)))
    shapes = leaves(avatar.dit)
    if quantised is not None:
        shapes |= leaves(jax.eval_shape(lambda dit: quantise(dit, quantised), avatar.dit))

    def place(path: str) -> Sharding:
        spec = spec_of(f"dit.{path}", len(shapes[path].shape), WEIGHTS)
        return NamedSharding(mesh, spec or P())

    avatar.dit = checkpoint.restore(folder, "dit", place, cfg.stream.dtype, quantised)
    avatar.vae = load(folder, "vae", cfg.stream.dtype)
    return pipeline.place(avatar)


def pixels(clip: Clip | None) -> Iterator[Pixels]:
    """Those of a clip that is no bubble; there is no clip where nothing is decoded."""
    if clip is not None and np.asarray(clip.live).all():
        yield np.asarray(clip.frames)[0]
