"""The coder of small presets: the pixels of a latent, 4 frames of 8×8, are one position from the
first layer to the last. So all the work is products of wide matrices, once in four frames, which
a CPU is good at; and each place of the picture has a linear code of its own.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from liveavatar_jax.config import VAEConfig
from liveavatar_jax.models.causal import (
    Attention,
    CausalConv,
    Conv,
    FeatureCache,
    Norm,
    Tail,
    run,
)
from liveavatar_jax.models.conv import conv2d
from liveavatar_jax.models.layers import Linear
from liveavatar_jax.types import Array, Float


class Cell(nnx.Module):
    """Norm, SiLU, 3×3 convolution, SiLU, linear map; the input is added."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.norm = Norm(cfg, cfg.dim, rngs=rngs)
        self.conv = Conv(cfg, cfg.dim, cfg.dim, (3, 3), rngs=rngs)
        self.out = Linear(cfg.dim, cfg.dim, cfg.param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], tail: Tail):
        y = self.conv.shift(conv2d(jax.nn.silu(self.norm(x)), self.conv.kernel[...]))
        return x + self.out(jax.nn.silu(y)), ()


class CellHead(nnx.Module):
    """Norm, SiLU and a linear map."""

    def __init__(self, cfg: VAEConfig, out: int, *, rngs: nnx.Rngs):
        self.norm = Norm(cfg, cfg.dim, rngs=rngs)
        self.out = Linear(cfg.dim, out, cfg.param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], tail: Tail):
        return self.out(jax.nn.silu(self.norm(x))), ()


class Places(nnx.Module):
    """A linear map of its own for each place of a picture: drawn heads are nearly aligned."""

    def __init__(self, cfg: VAEConfig, inputs: int, outputs: int):
        rows, columns = cfg.grid
        self.kernel = nnx.Param(jnp.zeros((rows, columns, inputs, outputs), cfg.param_dtype))
        self.bias = nnx.Param(jnp.zeros((rows, columns, outputs), cfg.param_dtype))

    def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f h w o"]:
        y = jnp.einsum("b f h w i, h w i o -> b f h w o", x, self.kernel[...].astype(x.dtype))
        return y + self.bias[...].astype(x.dtype)[None, None]


class CellEncoder(nnx.Module):
    """The pixels of each latent by a linear map, and what cells add to it; no memory. The first
    frame of a video stands still for the others of its latent."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.group, self.size = cfg.frames_per_latent, cfg.pixels_per_latent
        pixels, (count, _) = 3 * self.group * self.size**2, cfg.cells or (0, 0)
        self.look = Places(cfg, pixels, cfg.z_dim)
        self.into = Linear(pixels, cfg.dim, cfg.param_dtype, rngs=rngs)
        self.place = nnx.Param(jnp.zeros((*cfg.grid, cfg.dim), cfg.param_dtype))
        self.cells = nnx.List([Cell(cfg, rngs=rngs) for _ in range(count)])
        self.attention = Attention(cfg, cfg.dim, rngs=rngs)
        self.head = CellHead(cfg, 2 * cfg.z_dim, rngs=rngs)

    def __call__(self, frames: Float[Array, "b F H W 3"], cache: FeatureCache | None):
        if cache is None:
            frames = jnp.repeat(frames, self.group, axis=1)
        x = rearrange(
            frames, "b (f t) (h p) (w q) c -> b f h w (t p q c)", t=self.group, p=self.size,
            q=self.size,
        )  # fmt: skip
        *first, last = self.cells
        y = self.into(x) + self.place[...].astype(x.dtype)[None, None]
        y, _ = run([*first, self.attention, last, self.head], y, None)
        means = self.look(x)
        return y + jnp.pad(means, (*((0, 0),) * 4, (0, means.shape[-1]))), FeatureCache(())


class CellDecoder(nnx.Module):
    """The inverse: pixels by linear maps of their latent and of how it differs from the one before
    it, without which pictures stand still within latents and jump between them; and what cells
    add, which see this latent and the two before it. Of the first latent of a video the last frame
    is shown."""

    def __init__(self, cfg: VAEConfig, *, rngs: nnx.Rngs):
        self.group, self.size = cfg.frames_per_latent, cfg.pixels_per_latent
        pixels, (_, count) = 3 * self.group * self.size**2, cfg.cells or (0, 0)
        self.show = Places(cfg, cfg.z_dim, pixels)
        self.move = Places(cfg, cfg.z_dim, pixels)
        self.conv_in = CausalConv(cfg, cfg.z_dim, cfg.dim, rngs=rngs)
        self.place = nnx.Param(jnp.zeros((*cfg.grid, cfg.dim), cfg.param_dtype))
        self.cells = nnx.List([Cell(cfg, rngs=rngs) for _ in range(count)])
        self.attention = Attention(cfg, cfg.dim, rngs=rngs)
        self.head = CellHead(cfg, pixels, rngs=rngs)

    def __call__(self, latent: Float[Array, "b f h w c"], cache: FeatureCache | None):
        first, *rest = self.cells
        y, after = run([self.conv_in], latent, cache)
        y = y + self.place[...].astype(y.dtype)[None, None]
        y, _ = run([first, self.attention, *rest, self.head], y, None)
        known = latent[:, :1] if cache is None else cache.tails[0][:, -1:]
        before = jnp.concatenate([known, latent[:, :-1]], axis=1)
        frames = rearrange(
            y + self.show(latent) + self.move(latent - before),
            "b f h w (t p q c) -> b (f t) (h p) (w q) c", t=self.group, p=self.size, q=self.size,
        )  # fmt: skip
        return frames if cache is not None else frames[:, -1:], after
