"""Convolutions over channels-last video: in 3-D, in 2-D per frame, and of a picture twice as large.

One name each; which algorithm runs is settled here and nowhere else. Kernels are cast to the
dtype of what they convolve.
"""

import jax
import jax.numpy as jnp
from einops import rearrange

from liveavatar_jax.types import Array, Float

Pad = tuple[tuple[int, int], tuple[int, int]]


def conv2d(
    x: Float[Array, "*n h w c"],
    kernel: Float[Array, "kh kw c o"],
    *,
    stride: int = 1,
    pad: Pad | None = None,
) -> Float[Array, "*n y x o"]:
    """Convolves each picture, in zeros (before, after) its rows and columns; None keeps its size.

    On CPU, zeros belong into `pad`: XLA has a fast routine for padded pictures, and takes up to
    four times as long over one that was padded by hand.
    """
    y = jax.lax.conv_general_dilated(
        x.reshape(-1, *x.shape[-3:]),
        kernel.astype(x.dtype),
        window_strides=(stride, stride),
        padding=pad or _same(kernel),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def conv3d(
    x: Float[Array, "b _ h w c"], kernel: Float[Array, "3 kh kw c o"]
) -> Float[Array, "b f h w o"]:
    """Convolves three frames into one, so f + 2 frames into f; rows and columns stay (odd kernels).

    The platform is that of the compiled program, so a program lowered for another device than
    this host's gets that device's algorithm.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=_conv3d_by_taps, default=_conv3d_plain)


def _conv3d_plain(x, kernel):
    """cuDNN and the TPU compiler have fast 3-D convolutions of their own."""
    return jax.lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        window_strides=(1, 1, 1),
        padding=((0, 0), *_same(kernel)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )


def _conv3d_by_taps(x, kernel):
    """The same by 2-D convolutions, for which the CPU has a fast routine and in 3-D has not.

    Three taps of one output frame are three 2-D convolutions. A pair of output frames shares four
    input frames and needs four instead of six, by Winograd's F(2, 3) along time (Lavin and Gray,
    arXiv 1509.09308, section 4.1); its only factor is 1/2, so it rounds hardly more than they do.
    In float32 always: a CPU would convert narrower types anyway, and sums of frames round less.
    """
    dtype, f = x.dtype, x.shape[1] - 2
    x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
    k0, k1, k2 = kernel

    if f % 2:
        first, second, third = (conv2d(x[:, i : i + f], k) for i, k in enumerate((k0, k1, k2)))
        y = first + second + third
    else:
        x0, x1, x2, x3 = (x[:, i : i + f - 1 : 2] for i in range(4))
        outer, inner = (k0 + k2) / 2, k1 / 2
        plus = conv2d(x1 + x2, outer + inner)
        minus = conv2d(x2 - x1, outer - inner)
        first, last = conv2d(x0 - x2, k0), conv2d(x1 - x3, k2)
        y = jnp.stack([first + plus + minus, plus - minus - last], axis=2)
        y = rearrange(y, "b pair two h w o -> b (pair two) h w o")
    return y.astype(dtype)


@jax.custom_vjp
def conv2d_doubled(
    x: Float[Array, "*n h w c"], kernel: Float[Array, "3 3 c o"]
) -> Float[Array, "*n 2*h 2*w o"]:
    """Convolves the picture of twice the size (nearest neighbour) with a 3×3 kernel.

    Three taps over doubled rows meet two different rows only: the upper of two new rows sees the
    row before once and its own twice, the lower its own twice and the row after once. So each of
    the four positions in a doubled pixel is a 2×2 convolution of the small picture, 4/9 of the
    work, and nothing large is ever made. All four run as one convolution.
    """
    h, w = x.shape[-3:-1]
    kernel = _pair_taps(_pair_taps(kernel, axis=0), axis=2)  # row, y, column, x
    kernel = rearrange(kernel, "row y col x c o -> row col c (y x o)")
    corners = conv2d(x, kernel, pad=((1, 1), (1, 1)))
    corners = rearrange(corners, "... (y x o) -> y x ... o", y=2, x=2)
    rows = [
        jnp.stack([corners[y, x, ..., y : y + h, x : x + w, :] for x in (0, 1)], axis=-2)
        for y in (0, 1)
    ]
    doubled = jnp.stack(rows, axis=-4)
    return rearrange(doubled, "... h y w x o -> ... (h y) (w x) o")


def _doubled_forward(x, kernel):
    return conv2d_doubled(x, kernel), (x, kernel)


def _doubled_backward(given, dy):
    """Of the picture as it would be if it were made large: XLA has no fast routine on a CPU for
    the kernel's gradient above, and takes eight times as long."""

    def plain(x, kernel):
        return conv2d(jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2), kernel)

    return jax.vjp(plain, *given)[1](dy)


conv2d_doubled.defvjp(_doubled_forward, _doubled_backward)


def _pair_taps(kernel, axis: int):
    """Splits an axis of three taps in two: a row (or column), and the new one that sees it."""
    a, b, c = jnp.unstack(kernel, axis=axis)
    upper, lower = jnp.stack([a, b + c], axis), jnp.stack([a + b, c], axis)
    return jnp.stack([upper, lower], axis + 1)


def _same(kernel) -> Pad:
    kh, kw = kernel.shape[-4:-2]
    return (kh // 2, kh // 2), (kw // 2, kw // 2)
