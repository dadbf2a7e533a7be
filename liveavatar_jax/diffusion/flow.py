"""Flow matching: x = (1 - sigma) · clean + sigma · noise, velocity = noise - clean.

`sigma` in [0, 1] is the noise level, 1 = noise, everywhere in this project; the published code's
timesteps are 1000 · sigma.
"""

import functools
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from liveavatar_jax.types import Array, Float, Int

TRAIN_STEPS = 1000


Levels = TypeVar("Levels", np.ndarray, Array)


def shifted(sigma: Levels, shift: float) -> Levels:
    """Levels moved towards noise: `shift · s / (1 + (shift - 1) · s)`."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sampling_levels(steps: int, shift: float = 3.0) -> np.ndarray:
    """The `steps + 1` levels of the released sampler, from 1 to 0, float32.

    It shifts twice: once the ends of the range, and once more the equally spaced levels between
    them. Four steps give 1, 0.8577, 0.6022, 0.0089 and 0.
    """
    lowest = float(shifted(np.asarray([1 / TRAIN_STEPS]), shift)[0])
    levels = shifted(np.linspace(1.0, lowest, steps), shift)
    return np.append(levels, 0.0).astype(np.float32)


def euler(
    x: Float[Array, "*b"],
    velocity: Float[Array, "*b"],
    sigma: Float[Array, ""],
    to: Float[Array, ""],
) -> Float[Array, "*b"]:
    """One solver step from level `sigma` to level `to`, in float32."""
    y = x.astype(jnp.float32) + (to - sigma) * velocity.astype(jnp.float32)
    return y.astype(x.dtype)


def add_noise(
    clean: Float[Array, "*#b"], noise: Float[Array, "*#b"], sigma: Float[Array, "*#b"]
) -> Float[Array, "*#b"]:
    """`clean` at level `sigma`, which broadcasts."""
    return (1.0 - sigma) * clean + sigma * noise


def target(clean: Float[Array, "*b"], noise: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The velocity that the network learns."""
    return noise - clean


def clean_from(
    x: Float[Array, "*#b"], velocity: Float[Array, "*#b"], sigma: Float[Array, "*#b"]
) -> Float[Array, "*#b"]:
    """The clean signal that a velocity at level `sigma` points to, in float32."""
    return x.astype(jnp.float32) - sigma * velocity.astype(jnp.float32)


@functools.cache
def training_levels(shift: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """The 1000 levels of the training schedule (descending) and their loss weights, float32.

    The weight is a bell around timestep 500 over the shifted timesteps, less its minimum, with
    mean 1.
    """
    # The original steps down from 1 and up from 0 by a float32 step; so do we, to the last bit.
    step, i = float(np.float32(1 / TRAIN_STEPS)), np.arange(TRAIN_STEPS)
    equal = np.where(i < TRAIN_STEPS // 2, 1 - step * i, step * (TRAIN_STEPS - i))
    levels = shifted(equal.astype(np.float32), shift)
    bell = np.exp(-2 * ((TRAIN_STEPS * levels - 500) / TRAIN_STEPS) ** 2)
    bell = bell - bell.min()
    return levels.astype(np.float32), (bell * TRAIN_STEPS / bell.sum()).astype(np.float32)


def nearest_level(t: Float[Array, "*b"], shift: float = 5.0) -> Int[Array, "*b"]:
    """Index into `training_levels` of the timestep (0..1000) nearest to t, the first on ties."""
    timesteps = TRAIN_STEPS * jnp.asarray(training_levels(shift)[0])
    return jnp.argmin(jnp.abs(timesteps[None] - t.reshape(-1, 1)), axis=-1).reshape(t.shape)
