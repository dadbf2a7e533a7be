"""The networks of a run: one frozen base with adapters, or whole ones."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from liveavatar_jax.config import DiTConfig, StreamConfig
from liveavatar_jax.diffusion.losses import Discriminator
from liveavatar_jax.models import lora
from liveavatar_jax.models.clip import Condition, condition
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.types import Array, Float, Key, struct
from train.experiment import Distill, Forcing

Batch = Mapping[str, Array]  # as `data.clips` has it


@struct
class Frozen:
    """What a run never changes."""

    base: CausalDiT | None  # what adapters adapt, and the teacher; None where nothing needs it
    negative: Float[Array, "t k"]  # the text that guidance leans away from


def network(exp: Forcing, frozen: Frozen, params: Any) -> CausalDiT:
    """The network that a learner's parameters stand for."""
    if exp.adapters is None:
        return params
    assert frozen.base is not None
    return lora.attach(frozen.base, params, exp.adapters.scale)


def fresh(cfg: DiTConfig, seed: int) -> CausalDiT:
    """A network that has learnt nothing: at every noise level a plain transformer, whose head is
    silent, and which hears nothing. Gates that are near zero, as random time embeddings make them,
    learn slowly; and what random injectors say is only in the way, so networks learn to shut them
    before they learn what to do with them."""
    dit = CausalDiT(cfg, rngs=nnx.Rngs(seed))
    known = leaves(dit)
    silent = ("time_proj.kernel", "head.out.kernel", "injectors.attn.o.kernel")
    still = {path: jnp.zeros_like(known[path]) for path in silent}
    gates = known["blocks.modulation"].at[:, (2, 5)].set(1.0)
    return replace(dit, known | still | {"blocks.modulation": gates})


def initial(exp: Forcing, base: CausalDiT, key: Key[Array, ""]) -> Any:
    """A learner's parameters before it has learnt: adapters that change nothing, or the base."""
    if exp.adapters is None:  # a copy: what learns is donated from step to step
        return jax.tree.map(lambda a: jnp.copy(a.astype(jnp.float32)), base)
    return lora.init(base, exp.adapters.targets, exp.adapters.rank, key=key)


def discriminator(exp: Distill, key: Key[Array, ""]) -> Discriminator | None:
    if exp.discriminator is None:
        return None
    return Discriminator(exp.model.dit.dim, exp.discriminator, rngs=nnx.Rngs(key))


def conditioned(
    exp: Forcing,
    dit: CausalDiT,
    batch: Batch,
    motion: Float[Array, "b m h w c"],
    *,
    context: Float[Array, "#b t k"] | None = None,
    audio: bool = True,
    by_block: bool = False,
) -> Condition:
    """What a clip of the batch is made for, with `motion` where the stream has that.

    context: another text than the batch's. Without audio all its features are zero; `by_block`
    hears each block by itself, if the stream does.
    """
    dtype = exp.model.stream.dtype
    features, text = batch["audio"], batch["text"]
    text = text if context is None else jnp.broadcast_to(context, (len(text), *context.shape[1:]))
    apart = by_block and exp.model.stream.audio_past == "repeat"
    blocks = features.shape[2] // (4 * exp.model.stream.block_frames) if apart else 1
    reference, motion = batch["reference"].astype(dtype), motion.astype(dtype)
    given = condition(
        dit,
        reference,
        motion if exp.model.stream.motion else None,
        text,
        features if audio else jnp.zeros_like(features),
        blocks=blocks,
    )
    return posed(given, exp.model.stream)


def posed(given: Condition, cfg: StreamConfig) -> Condition:
    """With what a stream shows where there is no pose."""
    return dataclasses.replace(given, pose=given.reference) if cfg.pose == "portrait" else given
