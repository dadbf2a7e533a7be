"""What the student makes of a batch: all denoising steps, and the frames for whoever watches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from liveavatar_jax import stream
from liveavatar_jax.diffusion.rollout import Given, Policy, Steps, rollout
from liveavatar_jax.models.attention import Layout
from liveavatar_jax.models.vae import VAE
from liveavatar_jax.types import Array, Float, UInt8
from train.experiment import Forcing
from train.networks import Batch, Frozen, network
from train.student import Streamed, said


def sampled(
    exp: Forcing, layout: Layout, frozen: Frozen, params: Any, batch: Batch
) -> Float[Array, "b f h w c"]:
    """Latents as the stream makes them, the noise always the same."""
    cfg = exp.model.stream
    blocks = batch["audio"].shape[2] // (4 * cfg.block_frames)
    student, learner = network(exp, frozen, params), Streamed(exp.model, Policy(), layout)
    keys = jax.random.split(jax.random.key(0))
    memory = learner.start(student, batch["reference"], batch["still"], batch["text"], keys[0])
    audio = batch["audio"][:, :, : 4 * blocks * cfg.block_frames]
    given = Given(said(audio, blocks, cfg.audio_past), jax.random.split(keys[1], blocks))
    all_steps = Steps(first=jnp.zeros((), jnp.int32), exit=jnp.asarray(cfg.steps - 1, jnp.int32))
    return rollout(learner, student, memory, given, all_steps).x


def decoded(
    vae: VAE, still: Float[np.ndarray, "1 m h w c"], latents: Float[np.ndarray, "1 f h w c"]
) -> UInt8[np.ndarray, "F H W 3"]:
    """The frames of a clip, as bytes; the decoder comes from the standing portrait, as in a
    stream."""
    return np.asarray(_decoded(vae, still, latents))[0]


@jax.jit
def _decoded(vae: VAE, still: Array, latents: Array) -> Array:
    frames, _ = vae.decode(latents, vae.primed(still))
    return stream.pixels(jnp.clip(frames, -1.0, 1.0))
