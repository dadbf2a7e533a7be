"""The programs that `plan` compiles, as shapes: no weight is made, no device is touched."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig, from_dict
from liveavatar_jax.models.condition import MOTION_FRAMES
from liveavatar_jax.models.quantise import quantise
from liveavatar_jax.plan.aot import Program


def denoise(
    devices: list[Any],
    config: dict,
    height: int,
    width: int,
    rows: int = 1,
    weights: str = "bf16",
) -> Program:
    """The tick of one stage on one device: one step of a block against its ring and sink.

    `weights` other than bf16 are those of `quantise`.
    """
    cfg: ModelConfig = from_dict(ModelConfig, config)
    cfg = dataclasses.replace(cfg, stream=dataclasses.replace(cfg.stream, steps=1))
    model, state = _stream(cfg, height, width, rows)
    drawn = jax.eval_shape(stream.draw, model, state)
    video = 4 * cfg.stream.block_frames
    heard = (rows, 1, video, cfg.dit.audio_layers, cfg.dit.audio_dim)
    chunk = stream.Chunk(audio=_shape(heard, cfg.stream.dtype))
    if weights != "bf16":
        model.dit = jax.eval_shape(lambda dit: quantise(dit, weights), model.dit)
    del model.vae  # it lives on another device, and so does its cache
    state = dataclasses.replace(state, decoder=None)
    program = _alone(devices, stream.denoise, model, state, drawn, chunk)
    model, state, *_ = program.arguments
    cache = state.cache
    parts = {"weights": model, "ring": cache.ring, "sink": cache.sink, "text": state.text}
    return dataclasses.replace(program, parts=parts)


def decode(devices: list[Any], config: dict, height: int, width: int, rows: int = 1) -> Program:
    """A block of latents to frames, on one device."""
    cfg: ModelConfig = from_dict(ModelConfig, config)
    model, state = _stream(cfg, height, width, rows)
    latents = (rows, cfg.stream.block_frames, height, width, cfg.dit.latent_channels)
    given = (model.vae, state.decoder, _shape(latents, cfg.stream.dtype), _shape((rows,), "bool"))
    program = _alone(devices, stream.decode, *given)
    vae, cache, *_ = program.arguments
    return dataclasses.replace(program, parts={"weights": vae, "cache": cache})


def _stream(
    cfg: ModelConfig, height: int, width: int, rows: int
) -> tuple[stream.Avatar, stream.StreamState]:
    """Model and running state, as shapes."""
    model = jax.eval_shape(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0)))
    dtype, picture = cfg.stream.dtype, (height, width, cfg.dit.latent_channels)
    reference, motion = (_shape((rows, n, *picture), dtype) for n in (1, MOTION_FRAMES))
    portrait = jax.eval_shape(stream.from_latents, model, reference, motion)
    context = _shape((rows, cfg.dit.text_len, cfg.dit.text_dim), dtype)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return model, jax.eval_shape(stream.start, model, portrait, context, key)


def _shape(shape: tuple[int, ...], dtype: str) -> Any:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def _alone(devices: list[Any], function: Any, *arguments: Any) -> Program:
    """On the first device; the second argument is the state, and donated."""
    mesh = Mesh(np.array(devices[:1]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())

    def put(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return Program(function, jax.tree.map(put, arguments), mesh, donate=(1,))
