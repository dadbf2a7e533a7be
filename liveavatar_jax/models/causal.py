"""What the coders of a VAE are made of, and what they remember from one piece of a video to the
next."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from liveavatar_jax.config import VAEConfig
from liveavatar_jax.models.conv import conv2d, conv3d
from liveavatar_jax.models.layers import Linear, along_last
from liveavatar_jax.types import Array, Float, struct

Tail = Any  # what one layer keeps: arrays of frames; None before the first frame of a video


@struct
class FeatureCache:
    """What a coder remembers of a video: the last input frames of every convolution over time.

    A pytree of arrays whose shapes depend on the config and the frame size only, about 9.5 KB
    a pixel for the published decoder in float32. It comes out of a call that was given none; an
    encoder and a decoder each have their own.
    """

    tails: tuple[Tail, ...]  # one per layer, in the order they run


class Conv(nnx.Module):
    """Kernel and bias of a convolution, for the layers below to apply."""

    def __init__(self, cfg: VAEConfig, c: int, out: int, window, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.lecun_normal()
        dtype = jnp.dtype(cfg.param_dtype)
        shape = (*window, c, out)
        self.kernel = nnx.Param(init(rngs.params(), shape, dtype))
        self.bias = nnx.Param(jnp.zeros((out,), dtype))

    def shift(self, x: Float[Array, "*n o"]) -> Float[Array, "*n o"]:
        return x + along_last(self.bias[...], x)


class CausalConv(Conv):
    """A convolution over the current frame and the two before it, zeros before the first."""

    def __init__(self, cfg: VAEConfig, c: int, out: int, window=(3, 3, 3), *, rngs: nnx.Rngs):
        super().__init__(cfg, c, out, window, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], tail: Tail):
        kernel = self.kernel[...]
        if tail is None:  # one frame: the zeros before it leave one tap of three
            return self.shift(conv2d(x, kernel[-1])), jnp.concatenate([jnp.zeros_like(x), x], 1)
        x = jnp.concatenate([tail, x], axis=1)
        return self.shift(conv3d(x, kernel)), x[:, -2:]


class Norm(nnx.Module):
    """Root mean square norm over channels, in float32, followed by SiLU where a layer says so."""

    def __init__(self, cfg: VAEConfig, c: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones((c,), cfg.param_dtype))

    def __call__(self, x: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        wide = x.astype(jnp.float32)
        square = jnp.sum(wide * wide, axis=-1, keepdims=True)
        unit = wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))  # published: length at least 1e-12
        scale = along_last(self.scale[...], wide) * x.shape[-1] ** 0.5
        return (unit * scale).astype(x.dtype)


class Attention(nnx.Module):
    """One-headed self-attention of each frame by itself."""

    def __init__(self, cfg: VAEConfig, c: int, *, rngs: nnx.Rngs):
        self.norm = Norm(cfg, c, rngs=rngs)
        self.qkv = Linear(c, 3 * c, cfg.param_dtype, rngs=rngs)
        self.out = Linear(c, c, cfg.param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b f h w c"], tail: Tail):
        q, k, v = rearrange(self.qkv(self.norm(x)), "b f h w (n c) -> n (b f) (h w) c", n=3)
        scores = jnp.einsum("b t c, b s c -> b t s", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * x.shape[-1] ** -0.5).astype(x.dtype)
        y = jnp.einsum("b t s, b s c -> b t c", weights, v)
        return x + self.out(y.reshape(x.shape)), ()


def run(layers, x, cache):
    """One piece of a video through all layers, each with its own tail."""
    tails = [None] * len(layers) if cache is None else cache.tails
    kept = []
    for layer, tail in zip(layers, tails, strict=True):
        x, tail = layer(x, tail)
        kept.append(tail)
    return x, FeatureCache(tuple(kept))
