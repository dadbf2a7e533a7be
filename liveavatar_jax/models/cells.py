"""The coder of small presets. A video is its first picture, the key, in motion: a latent says how
four frames have moved from it, and what they show that a moved key does not (mouths, lids), where
the key has it. So what a head does is a few smooth numbers, whoever it is, and pictures stay sharp
however long a video is.

The encoder has learnt nothing but a linear code for each place, and the decoder little more: a few
convolutions retouch what its linear code shows.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from liveavatar_jax.config import VAEConfig
from liveavatar_jax.models.causal import Conv, FeatureCache
from liveavatar_jax.models.conv import conv2d
from liveavatar_jax.models.layers import Linear
from liveavatar_jax.models.motion import over_pixels, search, warped
from liveavatar_jax.types import Array, Float

HINTS = 8  # channels of a frame that tell a pixel what the latent says around it
SLACK = 0.2  # pixels; as far as a search is wrong, latents may begin apart from the last one
MOTION = 4  # channels of a latent: mean displacement of its frames along x and y, and its growth


class Places(nnx.Module):
    """A linear map of its own for each place of a picture: heads are nearly aligned."""

    def __init__(self, cfg: VAEConfig, inputs: int, outputs: int):
        rows, columns = cfg.grid
        self.kernel = nnx.Param(jnp.zeros((rows, columns, inputs, outputs), cfg.param_dtype))
        self.bias = nnx.Param(jnp.zeros((rows, columns, outputs), cfg.param_dtype))

    def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f h w o"]:
        return self.change(x) + self.bias[...].astype(x.dtype)[None, None]

    def change(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f h w o"]:
        """What a difference of inputs makes."""
        return jnp.einsum("b f h w i, h w i o -> b f h w o", x, self.kernel[...].astype(x.dtype))


class CellEncoder(nnx.Module):
    """Displacements from the key, and a linear code of the frames as they are when moved back. The
    first frame of a video is the key, and stands still for the others of its latent."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.group, self.size = cfg.frames_per_latent, cfg.pixels_per_latent
        self.look = Places(cfg, 3 * self.group * self.size**2, cfg.z_dim - MOTION)

    def __call__(
        self, frames: Float[Array, "b F H W 3"], cache: FeatureCache | None
    ) -> tuple[Float[Array, "b f h w c"], FeatureCache]:
        if cache is None:
            cache, frames = FeatureCache((frames,)), jnp.repeat(frames, self.group, axis=1)
        motion = along_latents(search(cache.tails[0], frames, self.size), self.group)
        still = warped(frames, -over_pixels(by_frame(motion, self.group), self.size))
        code = self.look(into_cells(still, self.group, self.size))
        return jnp.concatenate([motion.astype(code.dtype), code], axis=-1), cache


class CellDecoder(nnx.Module):
    """The inverse: the key, and what a linear map adds to it where code differs from the key's,
    retouched, and moved.

    The cache has the latent of the key, its picture, and what retouching says of it alone, which
    is taken off: a latent that is the key's shows the key. Of the past it knows but where it led:
    what a diffusion model makes jumps from block to block, and heads do not.
    """

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.group, self.size = cfg.frames_per_latent, cfg.pixels_per_latent
        self.show = Places(cfg, cfg.z_dim - MOTION, 3 * self.group * self.size**2)
        self.retouch = Retouch(cfg, rngs=rngs)

    def begin(
        self, latent: Float[Array, "b 1 h w c"], picture: Float[Array, "b 1 H W 3"] | None = None
    ) -> FeatureCache:
        """Before the first latent; without its picture the linear code says what the key is."""
        if picture is None:
            shown = self.show(latent[..., MOTION:])
            picture = into_pixels(shown, self.group, self.size)[:, -1:]
        picture = picture.astype(latent.dtype)
        still = jnp.repeat(picture, self.group, axis=1)
        known = self.retouch(jnp.zeros_like(latent), still, picture)
        no_past = jnp.zeros((*latent.shape[:-1], 3), latent.dtype)
        return FeatureCache((latent, picture, known, no_past))

    def __call__(
        self, latent: Float[Array, "b f h w c"], cache: FeatureCache | None
    ) -> tuple[Float[Array, "b F H W 3"], FeatureCache]:
        memory = self.begin(latent[:, :1]) if cache is None else cache
        key, picture, known, led = memory.tails
        apart = latent - key
        added = self.show.change(apart[..., MOTION:])
        still = picture + into_pixels(added, self.group, self.size)
        tiled = jnp.tile(known, (1, latent.shape[1], 1, 1, 1))
        still = still + self.retouch(apart, still, picture) - tiled
        exact = lambda x: x.astype(jnp.float32)  # bfloat16 knows 2 pixels to a 64th
        flow, led = joined(exact(latent[..., :MOTION]), exact(led), self.group)
        frames = warped(still, over_pixels(flow, self.size))
        memory = FeatureCache((key, picture, known, led.astype(latent.dtype)))
        return frames if cache is not None else frames[:, -1:], memory


class Retouch(nnx.Module):
    """What a picture of the linear code lacks, from it, the key, and the latent around each pixel:
    convolutions over patches of 2 x 2 pixels, the same for all places but for what these say."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.group, self.size, dim = cfg.frames_per_latent, cfg.pixels_per_latent, cfg.dim
        self.hear = Linear(cfg.z_dim, self.group * HINTS, cfg.param_dtype, rngs=rngs)
        self.place = nnx.Param(jnp.zeros((*cfg.grid, self.group * HINTS), cfg.param_dtype))
        conv = lambda c, out: Conv(cfg, c, out, (3, 3), rngs=rngs)
        self.conv_in, self.out = conv(2 * 12 + HINTS, dim), conv(dim, 12)
        self.convs = nnx.List([conv(dim, dim) for _ in range(cfg.cells or 0)])

    def __call__(
        self,
        apart: Float[Array, "b f h w c"],
        still: Float[Array, "b F H W 3"],
        key: Float[Array, "b 1 H W 3"],
    ) -> Float[Array, "b F H W 3"]:
        hints = self.hear(apart) + self.place[...].astype(apart.dtype)[None, None]
        hints = rearrange(hints, "b f h w (t k) -> b (f t) h w k", t=self.group)
        hints = over_pixels(hints, self.size // 2)
        fine = hints.shape[1]
        pair = lambda x: rearrange(
            jnp.broadcast_to(x, (len(x), fine, *x.shape[2:])),
            "b F (h p) (w q) c -> b F h w (p q c)", p=2, q=2,
        )  # fmt: skip
        y = jnp.concatenate([pair(still), pair(key), hints], axis=-1)
        apply = lambda conv, x: conv.shift(conv2d(x, conv.kernel[...]))
        y = apply(self.conv_in, y)
        for conv in self.convs:
            y = y + apply(conv, jax.nn.silu(y))
        y = apply(self.out, jax.nn.silu(y))
        return rearrange(y, "b F h w (p q c) -> b F (h p) (w q) c", p=2, q=2)


def into_cells(
    frames: Float[Array, "b F H W c"], group: int, size: int
) -> Float[Array, "b f h w k"]:
    return rearrange(
        frames, "b (f t) (h p) (w q) c -> b f h w (t p q c)", t=group, p=size, q=size
    )  # fmt: skip


def into_pixels(
    cells: Float[Array, "b f h w k"], group: int, size: int
) -> Float[Array, "b F H W c"]:
    return rearrange(
        cells, "b f h w (t p q c) -> b (f t) (h p) (w q) c", t=group, p=size, q=size
    )  # fmt: skip


def along_latents(flow: Float[Array, "b F h w 2"], group: int) -> Float[Array, "b f h w 4"]:
    """Mean and growth a frame of what moves evenly within each latent, by least squares."""
    flow, at = rearrange(flow, "b (f t) h w d -> b f t h w d", t=group), _times(group)
    growth = jnp.einsum("b f t h w d, t -> b f h w d", flow, at / (at**2).sum())
    return jnp.concatenate([flow.mean(axis=2), growth], axis=-1)


def by_frame(motion: Float[Array, "b f h w 4"], group: int) -> Float[Array, "b F h w 2"]:
    """The inverse of `along_latents`."""
    mean, growth = jnp.split(motion, 2, axis=-1)
    at = _times(group).astype(motion.dtype)[None, None, :, None, None, None]
    return rearrange(mean[:, :, None] + growth[:, :, None] * at, "b f t h w d -> b (f t) h w d")


def joined(
    motion: Float[Array, "b f h w 4"], led: Float[Array, "b 1 h w 3"], group: int
) -> tuple[Float[Array, "b F h w 2"], Float[Array, "b 1 h w 3"]]:
    """Displacements of frames, in one line with those before: what a latent begins apart from where
    the last one led, beyond SLACK, is made good along its frames.

    led: where that is, and 1; zeros before the first, which begins where it says.
    """
    mean, growth = jnp.split(motion, 2, axis=-1)
    begins, after = mean - growth * (0.5 * group), mean + growth * (0.5 * group)
    led = jnp.concatenate([led, jnp.pad(after, [(0, 0)] * 4 + [(0, 1)], constant_values=1)], 1)
    apart = led[:, :-1, ..., :2] - begins
    apart = led[:, :-1, ..., 2:] * (apart - jnp.clip(apart, -SLACK, SLACK))
    fade = 1 - (jnp.arange(group, dtype=motion.dtype) + 0.5) / group
    fade = fade[None, None, :, None, None, None]
    glide = rearrange(apart[:, :, None] * fade, "b f t h w d -> b (f t) h w d")
    return by_frame(motion, group) + glide, led[:, -1:]


def _times(group: int) -> Array:
    return jnp.arange(group, dtype=jnp.float32) - 0.5 * (group - 1)
