"""Small parts that every network shares: linear maps, norms, rotary phase, timestep embedding."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from liveavatar_jax.types import Array, Float, Int, struct

Body = Callable[[Array, Any], tuple[Array, Any]]  # of a scan over layers
THETA = 10_000.0  # base of every frequency ladder


class Map(nnx.Module):
    """`x @ kernel` in the dtype of x, whatever dtype the weights are kept in."""

    def __init__(self, inputs: int, outputs: int, param_dtype: str, *, rngs: nnx.Rngs):
        scale = inputs**-0.5
        kernel = scale * jax.random.normal(rngs.params(), (inputs, outputs), jnp.float32)
        self.kernel = nnx.Param(kernel.astype(param_dtype))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        return jnp.dot(x, self.kernel[...].astype(x.dtype))


class Linear(Map):
    """A `Map` with a bias."""

    def __init__(self, inputs: int, outputs: int, param_dtype: str, *, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, param_dtype, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(outputs, param_dtype))

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        y = super().__call__(x)
        return y + along_last(self.bias[...], y)


class RMSNorm(nnx.Module):
    def __init__(self, dim: int, param_dtype: str, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))

    def __call__(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        y = x.astype(jnp.float32)  # as published
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
        return (y * along_last(self.scale[...], y)).astype(x.dtype)


class LayerNorm(nnx.Module):
    def __init__(self, dim: int, param_dtype: str, eps: float = 1e-6, *, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(dim, param_dtype))
        self.bias = nnx.Param(jnp.zeros(dim, param_dtype))

    def __call__(self, x: Float[Array, "*b dim"]) -> Float[Array, "*b dim"]:
        y = standardise(x, self.eps)
        y = y * along_last(self.scale[...], y) + along_last(self.bias[...], y)
        return y.astype(x.dtype)


RESIDUAL = "residual stream"  # name of what "offload" keeps: the input of every layer


def remat(policy: str) -> Callable[[Body], Body]:
    """What a gradient keeps of a layer that is run by `scan`; the rest it computes again.

    "none" keeps everything, "dots" the products with weights, "full" the layer's input alone, and
    "offload" that input in the memory of the host. Without a gradient all four are the same.
    """
    if policy == "none":
        return lambda body: body
    saved = {
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        "full": jax.checkpoint_policies.nothing_saveable,
        "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[RESIDUAL],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[policy]

    def wrap(body: Body) -> Body:
        def named(x: Array, layer: Any) -> Any:
            return body(checkpoint_name(x, RESIDUAL), layer)

        return jax.checkpoint(named, policy=saved, prevent_cse=False)

    return wrap


def along_last(vector: Float[Array, " i"], like: Float[Array, "*b i"]) -> Float[Array, "*#b i"]:
    """A vector over the last axis, in the rank and dtype of `like`."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


def standardise(x: Float[Array, "*b dim"], eps: float = 1e-6) -> Float[Array, "*b dim"]:
    """Layer norm without gain or bias; the result is float32, as published."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)


def modulate(
    x: Float[Array, "*#b dim"],
    shift: Float[Array, "*#b dim"],
    scale: Float[Array, "*#b dim"],
    eps: float = 1e-6,
) -> Float[Array, "*#b dim"]:
    """Adaptive layer norm: standardised, scaled by 1 + scale and shifted, in float32."""
    return (standardise(x, eps) * (1.0 + scale) + shift).astype(x.dtype)


@struct
class Phase:
    """Rotation of pairs of neighbouring channels, float32."""

    cos: Float[Array, "*b t pairs"]
    sin: Float[Array, "*b t pairs"]


_BASE, _DIGITS = 256, 4


@functools.cache
def _digit_tables(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of `digit · 256^k · frequency`, [digits, 256, pairs], through float64."""
    frequency = THETA ** (-np.arange(pairs) / pairs)
    weight = float(_BASE) ** np.arange(_DIGITS)
    angle = weight[:, None, None] * np.arange(_BASE)[None, :, None] * frequency
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def phase(position: Int[Array, "*t"] | Float[Array, "*t"], pairs: int) -> Phase:
    """cos and sin of `position · 10000^(-j / pairs)`, exact to float32 for |position| < 2^31.

    A float32 product loses the phase (an error of 2e-3 at position 45,000), and accelerators
    have no float64. So the position is read as four digits in base 256: a rotation by a sum is
    the product of rotations, and those of single digits come from tables made in float64.
    """
    whole = jnp.abs(jnp.trunc(position)).astype(jnp.int32)
    cos, sin = jnp.ones((*whole.shape, pairs)), jnp.zeros((*whole.shape, pairs))
    for k, (c, s) in enumerate(zip(*_digit_tables(pairs), strict=True)):
        digit = (whole >> (8 * k)) & (_BASE - 1)
        c, s = jnp.asarray(c)[digit], jnp.asarray(s)[digit]
        cos, sin = cos * c - sin * s, sin * c + cos * s
    if jnp.issubdtype(position.dtype, jnp.floating):
        rest = jnp.abs(position) - whole.astype(position.dtype)
        angle = rest[..., None] * along_last(jnp.asarray(THETA ** (-np.arange(pairs) / pairs)), cos)
        c, s = jnp.cos(angle), jnp.sin(angle)
        cos, sin = cos * c - sin * s, sin * c + cos * s
    return Phase(cos=cos, sin=jnp.where((position < 0)[..., None], -sin, sin))


def grid_phase(
    frames: Int[Array, "b f"], rows: Int[Array, " h"], cols: Int[Array, " w"], head_dim: int
) -> Phase:
    """Rotary phase of every token of a frame × row × column grid, `[b, f·h·w, head_dim / 2]`.

    A third of the pairs turns with the row, a third with the column, the rest with the frame;
    every row of the batch has frames of its own.
    """
    pairs = head_dim // 2
    side = pairs // 3
    parts = (
        (phase(frames, pairs - 2 * side), (slice(None), slice(None), None, None)),
        (phase(rows, side), (None, None, slice(None), None)),
        (phase(cols, side), (None, None, None, slice(None))),
    )
    grid = (*frames.shape, len(rows), len(cols))

    def spread(field: str) -> Float[Array, "b t pairs"]:
        axes = [getattr(p, field)[at] for p, at in parts]
        whole = [jnp.broadcast_to(a, (*grid, a.shape[-1])) for a in axes]
        return jnp.concatenate(whole, axis=-1).reshape(len(frames), -1, pairs)

    return Phase(cos=spread("cos"), sin=spread("sin"))


def rotate(x: Float[Array, "b n t d"], by: Phase) -> Float[Array, "b n t d"]:
    """Rotary embedding: channels (2j, 2j + 1) of every head turn by the token's phase j."""
    pair = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    re, im = pair[..., 0], pair[..., 1]
    cos, sin = by.cos[:, None], by.sin[:, None]
    turned = jnp.stack([re * cos - im * sin, im * cos + re * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def timestep_sinusoid(t: Float[Array, "*b"], width: int) -> Float[Array, "*b width"]:
    """`[cos | sin]` of t on the frequency ladder, accurate as in float64; t in 0..1000."""
    p = phase(t.astype(jnp.float32), width // 2)
    return jnp.concatenate([p.cos, p.sin], axis=-1)
