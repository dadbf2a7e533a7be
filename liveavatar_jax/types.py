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
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

from jaxtyping import Bool as Bool
from jaxtyping import Float as Float
from jaxtyping import Int as Int
from jaxtyping import Key as Key
from jaxtyping import UInt8 as UInt8

if TYPE_CHECKING:
    from jaxtyping import Array as Array

T = TypeVar("T")


def __getattr__(name: str) -> Any:
    """`Array`, and JAX with it, where it is asked for: the front of `serve` uses the host's rooms
    alone, and must start at once and without a device."""
    if name == "Array":
        from jaxtyping import Array

        return Array
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class LiveAvatarError(ValueError):
    """Bad input: one clear sentence naming the file, field or tensor, and the remedy."""


@dataclass_transform(frozen_default=True)
def struct(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree: the one way to declare state.

    The shapes on its fields are for readers and never checked, for JAX also fills a pytree
    with stacked arrays, `PartitionSpec`s and `None`s on its way through `vmap` and `tree.map`.
    """
    import jax

    cls = dataclasses.dataclass(frozen=True)(cls)
    cls.__no_type_check__ = True  # type: ignore[attr-defined]
    return jax.tree_util.register_dataclass(cls)
