"""What networks learn from: Flax modules over callables, which know no concrete network.

Stage 1, `DiffusionForcing` and `TeacherForcing`, are losses of a velocity on real clips. Stage 2
has two sides. A generator objective answers one question, "what is dL/dx on this clip?"; so every
one of them works with `rollout.replay`, and none needs the graph that made the clip. A critic
objective is a loss of the critic on a clip that it takes as it is.

Guidance has one convention: `none + scale · (full - none)`, where 1 is no guidance. (The 3 of
Self-Forcing, which adds to the conditioned result, is 4 here.)

Everything is float32, whatever the networks compute in.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from liveavatar_jax.diffusion.flow import (
    TRAIN_STEPS,
    add_noise,
    clean_from,
    shifted,
    target,
    training_levels,
)
from liveavatar_jax.models.layers import Linear, standardise
from liveavatar_jax.types import Array, Float, Key, LiveAvatarError

Clip = Float[Array, "b f h w c"]
Metrics = dict[str, Float[Array, ""]]
Focus = tuple[tuple[float | tuple[float, ...], ...], ...]


# ---- what objectives may ask, and where they look


@dataclasses.dataclass(frozen=True)
class Scores:
    """The networks around a clip, bound to its condition.

    teacher: (noisy clip, level of each row, hear the text, hear the audio) -> velocity
    critic: (noisy clip, level) -> velocity
    realness: (noisy clip, level) -> logits "b f" of a discriminator on the critic's features
    reward: clip -> one number a row; no gradient flows through it
    """

    teacher: Callable[[Clip, Float[Array, " b"], bool, bool], Clip]
    critic: Callable[[Clip, Float[Array, " b"]], Clip]
    realness: Callable[[Clip, Float[Array, " b"]], Float[Array, "b f"]] | None = None
    reward: Callable[[Clip], Float[Array, " b"]] | None = None


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How far the teacher leans towards text and audio; equal scales need two passes, not three."""

    text: float = 4.0
    audio: float = 4.0

    @property
    def passes(self) -> int:
        """Forwards of the teacher."""
        if self.text == self.audio:
            return 1 if self.text == 1.0 else 2
        return 3

    def velocity(self, teacher: Callable[..., Clip], x: Clip, sigma: Float[Array, " b"]) -> Clip:
        """`none + text · (with text - none) + audio · (with both - with text)`."""
        full = _wide(teacher(x, sigma, True, True))
        if self.passes == 1:
            return full
        none = _wide(teacher(x, sigma, False, False))
        if self.passes == 2:
            return none + self.text * (full - none)
        read = _wide(teacher(x, sigma, True, False))
        return none + self.text * (read - none) + self.audio * (full - read)


@dataclasses.dataclass(frozen=True)
class Levels:
    """One noise level a clip: uniform, shifted towards noise, then kept within low and high."""

    shift: float = 5.0
    low: float = 0.02
    high: float = 0.98

    def draw(self, key: Key[Array, ""], b: int) -> Float[Array, " b"]:
        sigma = jax.random.randint(key, (b,), 0, TRAIN_STEPS) / TRAIN_STEPS
        return jnp.clip(shifted(sigma, self.shift), self.low, self.high)

    def noised(self, x: Clip, key: Key[Array, ""]) -> tuple[Clip, Clip, Float[Array, " b"]]:
        """The clip at a level of its own, the noise, and the level."""
        keys = jax.random.split(key)
        sigma, noise = self.draw(keys[0], len(x)), jax.random.normal(keys[1], x.shape)
        return add_noise(x, noise, _over(sigma, x)), noise, sigma


# ---- stage 1


class DiffusionForcing(nnx.Module):
    """Flow matching with a noise level of its own for each block (arXiv 2407.01392).

    Levels are rows of the training schedule, drawn uniformly; `bell` weights them as published,
    around the middle of the shifted timesteps. `focus` weights rows and columns of the latents,
    and channels where it has these.
    `clean` takes the error of the clean latents, which is that of the velocity times the level.
    `together` is the share of clips with one level for all blocks, as the stream has it where
    history keeps the level of its own step.
    """

    causal = True  # the network sees no later block

    def __init__(
        self,
        shift: float = 5.0,
        bell: bool = True,
        focus: Focus | None = None,
        clean: bool = False,
        together: float = 0.0,
    ):
        self.shift, self.bell, self.focus, self.clean = shift, bell, focus, clean
        self.together = together

    def __call__(
        self, velocity: Callable[..., Clip], clean: Clip, key: Key[Array, ""], block_frames: int
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of `velocity(x, sigma "b f", past)`; `past` is None here.

        Raises LiveAvatarError when `focus` has another grid than the latents.
        """
        row, noise = self._draw(clean, key, block_frames)
        levels, weight = (jnp.asarray(table)[row] for table in training_levels(self.shift))
        x = add_noise(clean, noise, _over(levels, clean))
        past = self._past(clean, key, block_frames)
        error = (_wide(velocity(x, levels, past)) - target(clean, noise)) ** 2
        if self.clean:
            error = error * _over(levels, clean) ** 2
        seen = {"flow_error": jnp.mean(error)}
        if self.focus is not None:
            error = error * _weights(self.focus, clean)
            seen["focus_error"] = jnp.mean(error)
        error = jnp.mean(error, axis=(2, 3, 4))
        return jnp.mean(weight * error) if self.bell else jnp.mean(error), seen

    def _draw(self, clean: Clip, key: Key[Array, ""], size: int) -> tuple[Array, Clip]:
        b, f = clean.shape[:2]
        blocks = -(-f // size)
        keys = jax.random.split(key)
        row = jax.random.randint(keys[0], (b, blocks), 0, TRAIN_STEPS)
        same = jax.random.uniform(jax.random.fold_in(key, 2), (b, 1)) < self.together
        row = jnp.where(same, row[:, :1], row)
        row = jnp.repeat(row, size, axis=1)[:, :f]
        return row, jax.random.normal(keys[1], clean.shape)

    def _past(self, clean: Clip, key: Key[Array, ""], size: int) -> Clip | None:
        return None


class TeacherForcing(DiffusionForcing):
    """Flow matching where each block sees the real ones before it, for a student whose history
    will be clean. `augment` noises them to random levels up to that; the network is told 0."""

    def __init__(
        self,
        shift: float = 5.0,
        bell: bool = True,
        focus: Focus | None = None,
        clean: bool = False,
        augment: float = 0.0,
    ):
        super().__init__(shift, bell, focus, clean)
        self.augment = augment

    def _past(self, clean: Clip, key: Key[Array, ""], size: int) -> Clip | None:
        keys = jax.random.split(jax.random.fold_in(key, 1))
        b, f = clean.shape[:2]
        sigma = jax.random.uniform(keys[0], (b, -(-f // size)), maxval=self.augment)
        sigma = jnp.repeat(sigma, size, axis=1)[:, :f]
        return add_noise(clean, jax.random.normal(keys[1], clean.shape), _over(sigma, clean))


class FlowMatching(DiffusionForcing):
    """One noise level a clip, for a network that looks both ways: the teacher of a small preset."""

    causal = False

    def _draw(self, clean: Clip, key: Key[Array, ""], size: int) -> tuple[Array, Clip]:
        return super()._draw(clean, key, clean.shape[1])


# ---- stage 2, the generator's side: what is dL/dx?


class DMD(nnx.Module):
    """Distribution matching distillation (arXiv 2311.18828), as Self-Forcing has it.

    dL/dx is the critic's clean clip minus the teacher's, over the mean distance of the clip from
    the teacher's (of each row by itself), over the number of elements. `focus` weights it as it
    weights errors in stage 1.
    """

    def __init__(
        self,
        guidance: Guidance = Guidance(),
        levels: Levels = Levels(),
        focus: Focus | None = None,
    ):
        self.guidance, self.levels, self.focus = guidance, levels, focus

    def __call__(self, x: Clip, scores: Scores, key: Key[Array, ""]) -> tuple[Clip, Metrics]:
        x = _wide(x)
        noisy, _, sigma = self.levels.noised(x, key)
        fake = clean_from(noisy, scores.critic(noisy, sigma), _over(sigma, x))
        velocity = self.guidance.velocity(scores.teacher, noisy, sigma)
        real = clean_from(noisy, velocity, _over(sigma, x))
        gradient = (fake - real) / _distance(x, real) / x.size
        if self.focus is not None:
            gradient = gradient * _weights(self.focus, x)
        return gradient, {"dmd_gradient": jnp.sqrt(jnp.mean((gradient * x.size) ** 2))}


class SiD(nnx.Module):
    """Score identity distillation (arXiv 2404.04057), as Self-Forcing has it.

    mean[(real - fake) · ((real - x) - alpha (real - fake))] over each row's distance, with the
    gradient through both networks as well; so they are differentiated by their input.
    """

    def __init__(
        self, guidance: Guidance = Guidance(), levels: Levels = Levels(), alpha: float = 1.0
    ):
        self.guidance, self.levels, self.alpha = guidance, levels, alpha

    def __call__(self, x: Clip, scores: Scores, key: Key[Array, ""]) -> tuple[Clip, Metrics]:
        def loss(x: Clip) -> Float[Array, ""]:
            noisy, _, sigma = self.levels.noised(x, key)
            fake = clean_from(noisy, scores.critic(noisy, sigma), _over(sigma, x))
            velocity = self.guidance.velocity(scores.teacher, noisy, sigma)
            real = clean_from(noisy, velocity, _over(sigma, x))
            product = (real - fake) * ((real - x) - self.alpha * (real - fake))
            return jnp.mean(product / jax.lax.stop_gradient(_distance(x, real)))

        value, gradient = jax.value_and_grad(loss)(_wide(x))
        return gradient, {"sid_loss": value}


class Rewarded(nnx.Module):
    """Any objective, each row weighted by exp(beta · reward) (Reward-Forcing, arXiv 2512.04678).

    `beta` is that of the source for a standardised reward; the weight is kept below `most`.
    """

    def __init__(self, objective: nnx.Module, beta: float = 2.0, most: float = 20.0):
        self.objective, self.beta, self.most = objective, beta, most

    def __call__(self, x: Clip, scores: Scores, key: Key[Array, ""]) -> tuple[Clip, Metrics]:
        if scores.reward is None:
            raise LiveAvatarError("Rewarded needs a reward: give the experiment a `reward`")
        gradient, metrics = self.objective(x, scores, key)
        reward = jax.lax.stop_gradient(_wide(scores.reward(x)))
        weight = jnp.minimum(jnp.exp(self.beta * reward), self.most)
        return _over(weight, x) * gradient, metrics | {"reward": jnp.mean(reward)}


class Adversarial(nnx.Module):
    """Any objective, and a GAN term beside it: weight · softplus(-realness) of the noised clip.

    That of DMD2 (arXiv 2405.14867), with a discriminator on the critic's features.
    """

    def __init__(
        self, objective: nnx.Module, weight: float = 0.003, levels: Levels = Levels(1.0, 0.0, 1.0)
    ):
        self.objective, self.weight, self.levels = objective, weight, levels

    def __call__(self, x: Clip, scores: Scores, key: Key[Array, ""]) -> tuple[Clip, Metrics]:
        keys = jax.random.split(key)
        gradient, metrics = self.objective(x, scores, keys[0])

        def loss(x: Clip) -> Float[Array, ""]:
            return jnp.mean(jax.nn.softplus(-_realness(scores, self.levels, x, keys[1])))

        value, more = jax.value_and_grad(loss)(_wide(x))
        return gradient + self.weight * more, metrics | {"gan_loss": value}


# ---- stage 2, the critic's side


class Critic(nnx.Module):
    """Flow matching on generated clips, unguided; `clean` and `focus` as in stage 1."""

    def __init__(self, levels: Levels = Levels(), clean: bool = False, focus: Focus | None = None):
        self.levels, self.clean, self.focus = levels, clean, focus

    def __call__(
        self, x: Clip, scores: Scores, real: Clip | None, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of `scores.critic` on the clip; `real` is a clip of the data, not needed."""
        x = _wide(x)
        noisy, noise, sigma = self.levels.noised(x, key)
        error = _wide(scores.critic(noisy, sigma)) - target(x, noise)
        error = (_over(sigma, x) * error if self.clean else error) ** 2
        if self.focus is not None:
            error = error * _weights(self.focus, x)
        loss = jnp.mean(error)
        return loss, {"critic_loss": loss}


class AdversarialCritic(nnx.Module):
    """A critic's loss, and that of the discriminator on its features.

    weight · [softplus(realness of generated clips) + softplus(-realness of real ones) + smooth ·
    the square of what a small step in noise changes in the latter (an approximate R1)].
    """

    def __init__(
        self,
        objective: nnx.Module,
        weight: float = 0.01,
        smooth: float = 0.0,
        levels: Levels = Levels(1.0, 0.0, 1.0),
    ):
        self.objective, self.weight, self.smooth, self.levels = objective, weight, smooth, levels

    def __call__(
        self, x: Clip, scores: Scores, real: Clip | None, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        if real is None:
            raise LiveAvatarError(
                "AdversarialCritic needs real clips: train on records that have latents"
            )
        keys = jax.random.split(key, 3)
        loss, metrics = self.objective(x, scores, real, keys[0])
        made = _realness(scores, self.levels, _wide(x), keys[1])
        true = _realness(scores, self.levels, _wide(real), keys[1])
        gan = jnp.mean(jax.nn.softplus(made)) + jnp.mean(jax.nn.softplus(-true))
        if self.smooth:
            near = _wide(real) + 0.1 * jax.random.normal(keys[2], real.shape)
            step = _realness(scores, self.levels, near, keys[1]) - true
            gan = gan + self.smooth * jnp.mean(step**2)
        return loss + self.weight * gan, metrics | {"discriminator_loss": gan}


class Discriminator(nnx.Module):
    """How real a clip looks, from the tokens after the critic's last layer; one logit a frame."""

    def __init__(self, dim: int, width: int = 256, *, rngs: nnx.Rngs):
        self.first = Linear(dim, width, "float32", rngs=rngs)
        self.last = Linear(width, 1, "float32", rngs=rngs)

    def __call__(self, hidden: Float[Array, "b f p dim"]) -> Float[Array, "b f"]:
        y = self.last(jax.nn.silu(self.first(standardise(hidden))))
        return jnp.mean(rearrange(y, "b f p 1 -> b f p"), axis=-1)


def _realness(scores: Scores, levels: Levels, x: Clip, key: Key[Array, ""]) -> Float[Array, "b f"]:
    if scores.realness is None:
        raise LiveAvatarError(
            "an adversarial objective needs a discriminator: set `discriminator` to its width"
        )
    noisy, _, sigma = levels.noised(x, key)
    return _wide(scores.realness(noisy, sigma))


def _distance(x: Clip, real: Clip) -> Float[Array, "b 1 1 1 1"]:
    """Mean distance of each row; the floor keeps a clip that the teacher does not change finite."""
    return jnp.maximum(jnp.mean(jnp.abs(x - real), axis=(1, 2, 3, 4), keepdims=True), 1e-6)


def _weights(focus: Focus, x: Clip) -> Float[Array, "1 1 h w #c"]:
    """Of mean 1, for a clip. Raises LiveAvatarError when they have another grid."""
    grid = jnp.asarray(focus, jnp.float32)
    if grid.shape not in (x.shape[2:4], x.shape[2:]):
        raise LiveAvatarError(
            f"focus weights {grid.shape} rows and columns of latents that have {x.shape[2:4]}"
        )
    return (grid / jnp.mean(grid)).reshape(1, 1, *grid.shape[:2], -1)


def _over(value: Array, x: Array) -> Array:
    """Trailing axes, so that `value` broadcasts over `x`."""
    return value.reshape(*value.shape, *(1,) * (x.ndim - value.ndim))


def _wide(x: Array) -> Array:
    return x.astype(jnp.float32)
