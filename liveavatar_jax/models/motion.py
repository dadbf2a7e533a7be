"""What moves in a picture of a head, found without learning, and moved again.

A picture is a still one, the key, seen through a field of displacements: pixel p shows what the key
has at p + flow(p). Fields are sums of a few smooth ones that fit a head before a wall: it shifts,
turns, comes nearer, looks aside (what is nearer moves further), breathes, and its chin goes down.
"""

import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce

from liveavatar_jax.types import Array, Float

FARTHEST = 0.06  # of the height of a picture: where displacements end
LEVELS = ((2, 1.2, 3), (1, 0.8, 2))  # of a search: shrunk by, blurred by pixels, iterations
STIFF = 1e-4  # how a search is held back where a picture shows little


def warped(
    picture: Float[Array, "b F H W c"], flow: Float[Array, "b F H W 2"]
) -> Float[Array, "b F H W c"]:
    """The picture seen through displacements in pixels, along x and y, by cubic interpolation.

    First along rows, then along columns; without gathers, which a CPU is slow at, and slower in
    their gradient. What lies outside is as the edge is.
    """
    most = math.ceil(FARTHEST * picture.shape[2])
    flow, reach = jnp.clip(flow, -most, most), most + 2
    for axis, by in ((3, flow[..., :1]), (2, flow[..., 1:])):
        weights = (_cubic(by - d).astype(picture.dtype) for d in range(-reach, reach + 1))
        picture = _sum(picture, weights, axis)
    return picture


def _cubic(x: Array) -> Array:
    """Catmull and Rom's kernel."""
    x = jnp.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def over_pixels(cells: Float[Array, "*n h w k"], size: int) -> Float[Array, "*n H W k"]:
    """Bilinear, from the middles of cells of size x size pixels."""
    rows, columns = (jnp.asarray(_between(n, size), cells.dtype) for n in cells.shape[-3:-1])
    return jnp.einsum("y h, x w, ... h w k -> ... y x k", rows, columns, cells)


def _between(count: int, size: int) -> np.ndarray:
    at = np.clip((np.arange(count * size) + 0.5) / size - 0.5, 0, count - 1)
    return np.maximum(0.0, 1 - np.abs(at[:, None] - np.arange(count)[None]))


def fields(rows: int, columns: int) -> Float[np.ndarray, "k rows columns 2"]:
    """What a head does, of unit size each, over the cells of a picture."""
    y, x = ((np.arange(n) + 0.5) / n * 2 - 1 for n in (rows, columns))
    y, x = np.meshgrid(y, x, indexing="ij")
    bump = lambda x0, y0, w, h: np.exp(-0.5 * (((x - x0) / w) ** 2 + ((y - y0) / h) ** 2))
    far = np.sqrt((x / 0.9) ** 2 + ((y + 0.1) / 1.0) ** 2)
    head = 1 / (1 + np.exp((far - 1.0) / 0.07))
    front, hair = bump(0, 0.05, 0.35, 0.4), bump(0, -0.75, 0.6, 0.25)
    body, chin = 1 / (1 + np.exp((0.8 - y) / 0.05)), bump(0, 0.7, 0.3, 0.15)
    none = np.zeros_like(x)
    found = [(m * a, m * b) for m, a, b in (
        (head, 1, 0), (head, 0, 1), (head, x, 0), (head, 0, y), (head, -y, x), (front, 1, 0),
        (front, 0, 1), (hair, 1, 0), (hair, 0, 1), (body, 1, 0), (body, 0, 1), (chin, 0, 1),
    )]  # fmt: skip
    return np.stack([np.stack([a + none, b + none], axis=-1) for a, b in found]).astype(np.float32)


def search(
    key: Float[Array, "b 1 H W 3"], frames: Float[Array, "b F H W 3"], size: int
) -> Float[Array, "b F h w 2"]:
    """Displacements of frames from the key over cells of size x size pixels, in pixels.

    Least squares in steps of Gauss and Newton (Lucas and Kanade's method), inverse: frames are
    moved back onto the key, whose gradients stay. Blurred at first, so that thin lines find each
    other. Mouths and eyes hardly count. A frame that is the key has a flow of exactly zero.
    """
    rows, columns = key.shape[-3] // size, key.shape[-2] // size
    basis = jnp.asarray(fields(rows, columns))
    key, frames = key.astype(jnp.float32), frames.astype(jnp.float32)
    flow = None
    for shrink, soft, times in LEVELS:
        wide = lambda x, shrink=shrink: over_pixels(x, size // shrink) / shrink
        still, seen = (_blurred(_shrunk(x, shrink), soft) for x in (key, frames))
        dy, dx = jnp.gradient(still[:, 0], axis=(1, 2))
        spread = wide(basis)
        slopes = jnp.einsum("b y x c, k y x -> b y x c k", dx, spread[..., 0])
        slopes += jnp.einsum("b y x c, k y x -> b y x c k", dy, spread[..., 1])
        slopes = rearrange(slopes, "b y x c k -> b (y x c) k")
        count = jnp.repeat(_counts(*still.shape[2:4]).reshape(-1), 3)
        counted = slopes * count[None, :, None]
        square = jnp.matmul(counted.mT, slopes) + STIFF * len(count) * jnp.eye(len(basis))[None]
        for _ in range(times):
            back = seen if flow is None else warped(seen, -wide(flow))
            apart = rearrange(back - still, "b f y x c -> b f (y x c)")
            step = jnp.linalg.solve(square, jnp.matmul(apart, counted).mT)
            step = jnp.einsum("b k f, k h w d -> b f h w d", step, basis)
            flow = step if flow is None else flow + step
    assert flow is not None
    return flow


def _counts(height: int, width: int) -> Float[Array, "H W"]:
    """How much each pixel counts in a search."""
    y, x = ((np.arange(n) + 0.5) / n * 2 - 1 for n in (height, width))
    bump = lambda y0, w, h: np.exp(-0.5 * ((x[None] / w) ** 2 + ((y[:, None] - y0) / h) ** 2))
    mouth, eyes = bump(0.42, 0.25, 0.13), bump(-0.1, 0.4, 0.14)
    return jnp.asarray(1 - 0.95 * mouth - 0.7 * eyes, jnp.float32)


def _shrunk(x: Array, by: int) -> Array:
    return x if by == 1 else reduce(x, "b f (h p) (w q) c -> b f h w c", "mean", p=by, q=by)


def _blurred(x: Array, width: float) -> Array:
    reach = math.ceil(2.5 * width)
    weight = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    for axis in (2, 3):
        x = _sum(x, weight / weight.sum(), axis)
    return x


def _sum(x: Array, weights: Iterable[Any], axis: int) -> Array:
    """Of the pictures that lie -n..n pixels on along an axis, each times its weight."""
    weights = list(weights)
    reach, length = len(weights) // 2, x.shape[axis]
    pad = [(0, 0)] * x.ndim
    pad[axis] = (reach, reach)
    x = jnp.pad(x, pad, mode="edge")
    parts = (w * jax.lax.slice_in_dim(x, i, i + length, axis=axis) for i, w in enumerate(weights))
    return functools.reduce(jnp.add, parts)
