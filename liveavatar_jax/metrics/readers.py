"""Reads back from a picture of a puppet what it was drawn from: mouth, expression, looks.

A small network, trained by train/readers.py on pictures that are drawn as it goes, blurred, noisy
and shifted ones among them, so that what a model generates is read as well as what is drawn.
"""

import functools
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from liveavatar_jax.models.conv import conv2d
from liveavatar_jax.models.layers import Linear, along_last
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.types import Array, Float, LiveAvatarError, UInt8, struct

READERS = "readers.safetensors"  # beside the weights of a model
SIZE = 64  # of the pictures that it reads; others are resized
WIDTHS = (24, 48, 64, 96)  # channels at 1/2, 1/4, 1/8 and 1/16 of the picture
HIDDEN = 96
PATCHES = 8  # to a side, whose mean colours are seen as they are
EXPRESSIONS = 4
COLOURS = ("skin", "hair", "iris", "clothes", "wall")
FLAGS = ("beard", "moustache", "glasses", "glasses_square")
STYLES = 8
ATTRIBUTES = 3 * len(COLOURS) + len(FLAGS) + STYLES  # colours, flags, and shares of hairstyles
BATCH = 12  # pictures that are read at once: a block of a stream


@struct
class Reading:
    """Of each picture."""

    mouth: Float[Array, "n 3"]  # open, width, round in 0..1
    expression: Float[Array, "n 4"]  # logits
    attributes: Float[Array, "n k"]  # in 0..1
    features: Float[Array, "n c"]  # from which the others are read


class Conv(nnx.Module):
    """A convolution with its bias, by default over 3 x 3 pixels."""

    def __init__(self, c: int, out: int, window: int = 3, *, rngs: nnx.Rngs):
        init = jax.nn.initializers.he_normal()
        self.kernel = nnx.Param(init(rngs.params(), (window, window, c, out)))
        self.bias = nnx.Param(jnp.zeros(out))

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w o"]:
        y = conv2d(x, self.kernel[...])
        return y + along_last(self.bias[...], y)


class Reader(nnx.Module):
    """The network. Every level halves the picture, space to depth, and looks around."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.enter = Conv(12, WIDTHS[0], rngs=rngs)
        pairs = list(itertools.pairwise(WIDTHS))
        self.merge = nnx.List([Conv(4 * c, out, 1, rngs=rngs) for c, out in pairs])
        self.look = nnx.List([Conv(out, out, rngs=rngs) for _, out in pairs])
        self.squeeze = Conv(WIDTHS[-1], WIDTHS[-1] // 2, 1, rngs=rngs)
        inputs = (SIZE // 16) ** 2 * (WIDTHS[-1] // 2) + 3 * PATCHES**2
        self.gather = Linear(inputs, HIDDEN, "float32", rngs=rngs)
        self.tell = Linear(HIDDEN, 3 + EXPRESSIONS + ATTRIBUTES, "float32", rngs=rngs)

    def __call__(self, frames: Float[Array, "n H W 3"]) -> Reading:
        """Pictures in [-1, 1], of any size."""
        features, said = self.raw(frames)
        return Reading(
            mouth=jax.nn.sigmoid(said[:, :3]),
            expression=said[:, 3 : 3 + EXPRESSIONS],
            attributes=jax.nn.sigmoid(said[:, 3 + EXPRESSIONS :]),
            features=features,
        )

    def raw(
        self, frames: Float[Array, "n H W 3"]
    ) -> tuple[Float[Array, "n c"], Float[Array, "n k"]]:
        """Features, and all that is said as logits."""
        frames = sized(frames)
        cell = SIZE // PATCHES
        colours = reduce(frames, "n (h y) (w x) c -> n (h w c)", "mean", y=cell, x=cell)
        x = jax.nn.relu(self.enter(_halved(frames)))
        for merge, look in zip(self.merge, self.look, strict=True):
            x = jax.nn.relu(merge(_halved(x)))
            x = x + jax.nn.relu(look(x))
        x = jax.nn.relu(self.squeeze(x))
        found = jnp.concatenate([rearrange(x, "n h w c -> n (h w c)"), colours], axis=1)
        features = jax.nn.relu(self.gather(found))
        return features, self.tell(features)


def sized(frames: Float[Array, "n H W 3"]) -> Float[Array, "n 64 64 3"]:
    """Pictures of the size that is read; of multiples of it the means of squares."""
    n, height, width, _ = frames.shape
    if height % SIZE == 0 and width % SIZE == 0:
        return reduce(frames, "n (h y) (w x) c -> n h w c", "mean", h=SIZE, w=SIZE)
    return jax.image.resize(frames, (n, SIZE, SIZE, 3), "linear")


def _halved(x: Float[Array, "n H W c"]) -> Float[Array, "n h w c4"]:
    return rearrange(x, "n (h y) (w x) c -> n h w (y x c)", y=2, x=2)


class Readers:
    """The network of a file, compiled, for bytes on the host."""

    def __init__(self, path: Path):
        self.network = load(path)
        self._run = jax.jit(lambda network, frames: network(frames.astype(jnp.float32) / 127.5 - 1))

    def __call__(self, frames: UInt8[np.ndarray, "F H W 3"]) -> dict[str, np.ndarray]:
        """What is read of each frame, by the fields of `Reading`."""
        parts = []
        for at in range(0, len(frames), BATCH):
            some = frames[at : at + BATCH]
            full = np.pad(some, ((0, BATCH - len(some)), (0, 0), (0, 0), (0, 0)))
            read = self._run(self.network, full)
            parts.append({k: np.asarray(getattr(read, k))[: len(some)] for k in FIELDS})
        return {k: np.concatenate([part[k] for part in parts]) for k in FIELDS}


FIELDS = ("mouth", "expression", "attributes", "features")


def save(path: Path, network: Reader) -> None:
    """As safetensors, by attribute path, in float16."""
    save_file({k: np.asarray(v, np.float16) for k, v in leaves(network).items()}, path)


def load(path: Path) -> Reader:
    """Raises LiveAvatarError for a file that is missing, damaged or of another network."""
    network = jax.eval_shape(lambda: Reader(rngs=nnx.Rngs(0)))
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LiveAvatarError(
            f"{path} is missing or no safetensors file ({error}); `python -m train.readers` "
            "makes one"
        ) from None
    wanted = {k: v.shape for k, v in leaves(network).items()}
    if {k: v.shape for k, v in held.items()} != wanted:
        raise LiveAvatarError(f"{path} holds another network; `python -m train.readers` makes one")
    return replace(network, {k: jnp.asarray(v, jnp.float32) for k, v in held.items()})


@functools.cache
def weights() -> int:
    """How many the network has."""
    return sum(x.size for x in leaves(jax.eval_shape(lambda: Reader(rngs=nnx.Rngs(0)))).values())
