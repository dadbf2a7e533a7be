"""The pipeline over a mesh is the sequential stream, for every row by itself."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax import stream
from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig
from liveavatar_jax.parallel.mesh import MeshSpec
from liveavatar_jax.parallel.pipeline import Pipeline

from .networks import random

HEIGHT, WIDTH = 6, 10  # latents: 15 patches a frame, which nothing divides
DIT = DiTConfig.tiny(dim=64, ffn_dim=48, heads=8, layers=2, inject_layers=(1,), audio_layers=3)
STREAM = StreamConfig(dtype="float32", audio_past="true")
NET = ModelConfig.tiny(dit=DIT, stream=STREAM)
BLOCKS = 24


@functools.cache
def avatar() -> stream.Avatar:
    return random(lambda: stream.Avatar(NET, rngs=nnx.Rngs(0)))


@functools.cache
def picture(i: int) -> np.ndarray:
    size = (1, 8 * HEIGHT, 8 * WIDTH, 3)
    return np.asarray(jax.random.uniform(jax.random.key(50 + i), size, minval=-1.0))


@functools.cache
def context(i: int) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(70 + i), (1, 4, DIT.text_dim)))


@functools.cache
def audio(session: int, block: int) -> np.ndarray:
    key = jax.random.fold_in(jax.random.key(session), block)
    return np.asarray(jax.random.normal(key, (1, 1, 12, DIT.audio_layers, DIT.audio_dim)))


@functools.cache
def portrait(i: int) -> stream.Portrait:
    return jax.jit(stream.encode_portrait)(avatar(), picture(i))


@functools.cache
def alone(session: int, blocks: int = BLOCKS) -> list[np.ndarray]:
    """Frames of one session on one device."""
    start, step = jax.jit(stream.start), jax.jit(stream.step, donate_argnums=1)
    given = jax.tree.map(jnp.copy, portrait(session))
    state, out = start(avatar(), given, context(session), jax.random.key(session)), []
    for block in range(blocks):
        state, frames = step(avatar(), state, stream.Chunk(audio=audio(session, block)))
        out.append(np.asarray(stream.pixels(frames))[0])
    return out


def same(ours: np.ndarray, want: np.ndarray) -> None:
    """As bytes: float32 sums in another order may round to the neighbour."""
    assert np.abs(ours.astype(int) - want.astype(int)).max() <= 1


def opened(pipe: Pipeline, model, session: int):
    given = pipe.portrait(model, picture(session))
    return pipe.start(model, given, context(session), jax.random.key(session))


@pytest.mark.parametrize("spec", ["stage=4,vae=1", "stage=4", "stage=4,tensor=2", "stage=4,sequence=2"])
@pytest.mark.parametrize("warm", [0, 2])
def test_the_pipeline_is_the_stream(spec, warm):
    pipe = Pipeline(NET, MeshSpec.parse(spec), HEIGHT, WIDTH)
    model = pipe.place(avatar())
    session, out = opened(pipe, model, 0), []
    for block in range(warm):
        session, clip = pipe.warm(model, session, stream.Chunk(audio=audio(0, block)))
        out.append(np.asarray(clip.frames)[0])
    state = pipe.insert(pipe.empty(), session, 0)
    for block in range(warm, BLOCKS + pipe.delay):
        chunk = stream.Chunk(audio=audio(0, block)) if block < BLOCKS else None
        state, clip = pipe.step(model, state, chunk)
        if np.asarray(clip.live).any():
            assert np.asarray(clip.block).item() == len(out)
            out.append(np.asarray(clip.frames)[0])
    assert len(out) == BLOCKS
    for ours, want in zip(out, alone(0), strict=True):
        same(ours, want)
