"""What every module shares: the alphabet of axes, the array types, and `struct`.

Axes, used in every annotation, einops pattern and einsum string:

    b  batch                  t    tokens of one block        l     layers
    f  latent frames          s    slots of the ring (tokens) step  denoising steps
    h w  latent rows, columns n    heads                      stage devices of the pipeline
    c  channels               d    head width                 a     speakers (audio streams)
    p  tokens of one latent frame
    F H W  video frames, pixel rows, pixel columns            dim   model width

Video is channels-last everywhere: latents `b f h w c`, pixels `b F H W 3` in [-1, 1].
"""

import dataclasses
from typing import TypeVar, dataclass_transform

import jax
from jaxtyping import Array as Array
from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Int as Int
from jaxtyping import Key as Key
from jaxtyping import PyTree as PyTree
from jaxtyping import UInt8 as UInt8

T = TypeVar("T")


class LiveAvatarError(ValueError):
    """Bad input: one clear sentence naming the file, field or tensor, and the remedy."""


@dataclass_transform(frozen_default=True)
def struct(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree: the one way to declare state.

    The shapes on its fields are for readers and never checked, for JAX also fills a pytree
    with stacked arrays, `PartitionSpec`s and `None`s on its way through `vmap` and `tree.map`.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    cls.__no_type_check__ = True  # type: ignore[attr-defined]
    return jax.tree_util.register_dataclass(cls)
