"""A world whose density is known: a thing of one of three kinds moves as its audio drives it.

The reference shows a clip's kind, as a portrait does. A frame is the kind's own place, plus a
position along the kind's own direction, plus a sign (eyes open or shut, anew in each frame) across
it, plus texture. The position is an AR(1) process that each frame's audio pushes; so a block has to
go on from the one before. Given the audio, a clip is a mixture of Gaussians, and so is the clip at
any noise level: the velocity that a perfect bidirectional teacher would give is a formula. The law
of every stretch of frames given its own audio is the same wherever it lies, so long videos have
one, too.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from liveavatar_jax.diffusion.flow import target
from liveavatar_jax.types import Array, Float, Int, Key

SIDE = 2  # latents of 2 x 2: one token a frame
WIDTH = SIDE * SIDE  # numbers a frame
HEARD = 6  # numbers of a speech feature; the first one is what pushes
TEXT = 4  # width of a row of text, all zeros


@dataclasses.dataclass(frozen=True)
class World:
    """Positions follow z' = keep · z + push · audio + shake · noise, audio and noise N(0, 1).

    spread: of the kinds' places from the middle. blink: size of what has a random sign. texture:
    standard deviation.
    """

    frames: int = 6
    kinds: int = 3
    spread: float = 1.5
    keep: float = 0.8
    push: float = 0.5
    shake: float = 0.3
    blink: float = 0.8
    texture: float = 0.25

    @property
    def variance(self) -> float:
        """Of a position, whatever is said."""
        return (self.push**2 + self.shake**2) / (1 - self.keep**2)

    @property
    def places(self) -> Float[np.ndarray, "kinds w"]:
        turn = 2 * math.pi * np.arange(self.kinds) / self.kinds
        return self.spread * np.stack([np.cos(turn), np.sin(turn)], 1) @ _basis()[:2]

    @property
    def directions(self) -> Float[np.ndarray, "kinds w"]:
        """Unit vectors of movement, across all places."""
        turn = 2 * math.pi * np.arange(self.kinds) / self.kinds + 0.5
        return np.stack([np.cos(turn), np.sin(turn)], 1) @ _basis()[2:]

    @property
    def eyes(self) -> Float[np.ndarray, "kinds w"]:
        """Unit vectors of what blinks, across places and directions."""
        turn = 2 * math.pi * np.arange(self.kinds) / self.kinds + 0.5
        return np.stack([-np.sin(turn), np.cos(turn)], 1) @ _basis()[2:]

    def driven(self, frames: int) -> Float[np.ndarray, "f f"]:
        """What each frame's audio (second axis) does to each frame's position."""
        lag = np.arange(frames)[:, None] - np.arange(frames)
        return np.where(lag >= 0, self.push * self.keep ** np.maximum(lag, 0), 0.0)

    def covariance(self, frames: int, heard: bool = True) -> Float[np.ndarray, "f f"]:
        """Of the positions in a stretch of frames, given its audio or not."""
        lag = np.abs(np.arange(frames)[:, None] - np.arange(frames))
        driven = self.driven(frames)
        return self.variance * self.keep**lag - (driven @ driven.T if heard else 0.0)


def sample(
    world: World, key: Key[Array, ""], rows: int, frames: int | None = None
) -> dict[str, Array]:
    """A batch as `data.clips` has it, latents drawn from the exact law given their audio."""
    frames = frames or world.frames
    keys = jax.random.split(key, 5)
    push = jax.random.normal(keys[0], (rows, frames))
    kind = jax.random.randint(keys[1], (rows,), 0, world.kinds)
    root = _wide(np.linalg.cholesky(world.covariance(frames) + 1e-9 * np.eye(frames)))
    position = push @ _wide(world.driven(frames)).T
    position = position + jax.random.normal(keys[2], (rows, frames)) @ root.T
    clip = _wide(world.places)[kind][:, None]
    clip = clip + position[..., None] * _wide(world.directions)[kind][:, None, :]
    sign = jax.random.rademacher(keys[4], (rows, frames, 1), jnp.float32)
    clip = clip + world.blink * sign * _wide(world.eyes)[kind][:, None, :]
    clip = clip + world.texture * jax.random.normal(keys[3], (rows, frames, WIDTH))
    still = jnp.zeros((rows, 1, SIDE, SIDE, 1))
    return {
        "latents": rearrange(clip, "b f (h w) -> b f h w 1", h=SIDE),
        "audio": features(push),
        "text": jnp.zeros((rows, 1, TEXT)),
        "reference": rearrange(_wide(world.places)[kind], "b (h w) -> b 1 h w 1", h=SIDE),
        "motion": still,
        "still": still,
    }


def features(push: Float[Array, "b f"]) -> Float[Array, "b 1 F 1 i"]:
    """Speech features of four video frames a latent frame: the push, and bends of it."""
    bends = [jnp.tanh(2.0 * (push - at)) for at in (-1.5, -0.5, 0.5, 1.5)]
    each = jnp.stack([push, jnp.ones_like(push), *bends], axis=-1)
    return jnp.repeat(each, 4, axis=1)[:, None, :, None]


def pushes(audio: Float[Array, "b 1 F 1 i"]) -> Float[Array, "b f"]:
    """The inverse of `features`."""
    return audio[:, 0, ::4, 0, 0]


def velocity(
    world: World,
    x: Float[Array, "b f h w c"],
    sigma: Float[Array, " b"],
    push: Float[Array, "b f"] | None,
    kind: Int[Array, " b"] | None = None,
) -> Float[Array, "b f h w c"]:
    """E[noise - clean | x at level sigma > 0], given audio and kind or not: the perfect teacher."""
    level = sigma[:, None, None, None, None]
    clean = expected(world, x, sigma, push, kind)
    return target(clean, (x - (1 - level) * clean) / level)


def expected(
    world: World,
    x: Float[Array, "b f h w c"],
    sigma: Float[Array, " b"],
    push: Float[Array, "b f"] | None,
    kind: Int[Array, " b"] | None = None,
) -> Float[Array, "b f h w c"]:
    """E[clean | x at level sigma]: each kind's and sign's regression, weighted by its chance."""
    frames, (h, w) = x.shape[1], x.shape[2:4]
    spectrum, axes = np.linalg.eigh(world.covariance(frames, push is not None))
    along, around = _wide(spectrum)[None] + world.texture**2, world.texture**2
    axes, directions = _wide(axes), _wide(world.directions)
    middle = jnp.zeros((len(x), frames)) if push is None else push @ _wide(world.driven(frames)).T
    mean = jnp.einsum("bf,mw->bmfw", middle, directions) + _wide(world.places)[None, :, None]
    alpha, noise = (1 - sigma)[:, None], (sigma**2)[:, None]
    rest = rearrange(x, "b f h w 1 -> b 1 f (h w)") - alpha[..., None, None] * mean
    u = jnp.einsum("bmfw,mw,fe->bme", rest, directions, axes)
    wide = (alpha**2 * along + noise)[:, None]  # variances along the direction
    thin = alpha**2 * around + noise  # and across it
    eyes = _wide(world.eyes)
    pull = alpha[..., None] * world.blink / thin[..., None]  # towards the likelier sign
    pull = pull * jnp.einsum("bmfw,mw->bmf", rest, eyes)
    across = jnp.sum(rest**2, axis=(2, 3)) - jnp.sum(u**2, axis=2)
    log = -0.5 * (jnp.sum(u**2 / wide, axis=2) + across / thin)
    log = log + jnp.sum(jnp.logaddexp(pull, -pull), axis=2)
    if kind is not None:
        log = jnp.where(jnp.arange(world.kinds)[None] == kind[:, None], log, -jnp.inf)
    share = jax.nn.softmax(log, axis=-1)  # determinants are the same for all kinds
    gain = (along[:, None] / wide - (around / thin)[..., None]) * u
    more = jnp.einsum("bme,fe,mw->bmfw", gain, axes, directions)
    sure = 1 - alpha**2 * around / thin  # how much of the sign is not in the texture already
    signs = jnp.einsum("bmf,mw->bmfw", world.blink * sure[..., None] * jnp.tanh(pull), eyes)
    clean = mean + alpha[..., None, None] * ((around / thin)[..., None, None] * rest + more) + signs
    return rearrange(jnp.einsum("bm,bmfw->bfw", share, clean), "b f (h w) -> b f h w 1", h=h, w=w)


def kinds(world: World, x: Float[Array, "b f h w c"]) -> Int[Array, "b f"]:
    """The kind whose place is nearest, frame by frame, whatever its position."""
    flat = rearrange(x, "b f h w 1 -> b f (h w)")
    plane = _wide(_basis()[:2])
    far = (flat @ plane.T)[None] - (_wide(world.places) @ plane.T)[:, None, None]
    return jnp.argmin(jnp.sum(far**2, axis=-1), axis=0)


def positions(world: World, x: Float[Array, "b f h w c"]) -> Float[Array, "b f"]:
    """Along the direction of each frame's kind."""
    flat = rearrange(x, "b f h w 1 -> b f (h w)")
    return jnp.sum(flat * _wide(world.directions)[kinds(world, x)], axis=-1)


def _basis() -> Float[np.ndarray, "w w"]:
    """Orthonormal rows that mix all pixels, so that no pixel means anything by itself."""
    return np.linalg.qr(np.random.default_rng(0).normal(size=(WIDTH, WIDTH)))[0]


def _wide(x: np.ndarray) -> Array:
    return jnp.asarray(x, jnp.float32)
