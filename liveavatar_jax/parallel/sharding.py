"""Where every array lies: one table of regular expressions a kind of tree.

A row names the last axes of the leaves whose path it finds; the axes before them (stacked layers,
batch) are whole. The first row that matches counts.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import NamedSharding

from liveavatar_jax.models.attention import Layout, attention
from liveavatar_jax.parallel.mesh import SEQUENCE, STAGE, TENSOR, VAE
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.types import Array, Float, Int, LiveAvatarError

Axis = str | tuple[str, ...] | None
Table = tuple[tuple[str, tuple[Axis, ...]], ...]

# Columns of what leads into the heads or the hidden layer, rows of what leads out of it. The
# kernels of `quantise` are "out in".
WEIGHTS: Table = (
    (r"\.(q|k|v|ffn_in)\.kernel", (None, TENSOR)),
    (r"\.(q|k|v|ffn_in)\.weight", (TENSOR, None)),
    (r"\.(q|k|v|ffn_in)\.(bias|scale)", (TENSOR,)),
    (r"\.norm_[qk]\.scale", (TENSOR,)),
    (r"\.(o|ffn_out|adain)\.kernel", (TENSOR, None)),
    (r"\.(o|ffn_out|adain)\.weight", (None, TENSOR)),
    (r"time_proj\.kernel", (TENSOR, None)),
    (r"\b(text_in|text_out|time_in|time_out|packer|audio)\.|modulation", ()),  # small or run once
)
# Heads; those of the prompt are whole along `sequence`, for each part of the tokens needs all.
HEADS = (TENSOR, SEQUENCE)
STATE: Table = (
    (r"cache\.(ring|sink)\.[kv]", (HEADS, None, None)),
    (r"text\.[kv]", (TENSOR, None, None)),
)
# A stream that is not in the pipeline yet: the heads of every step's ring over all stages, or,
# where they do not divide, each step's ring on its stage.
OPENING: Table = ((r"cache\.ring\.[kv]", ((TENSOR, STAGE, SEQUENCE), None, None)), *STATE)
STEPWISE: Table = ((r"cache\.ring\.[kv]", (STAGE, None, None, HEADS, None, None)), *STATE)


def of_decoder(rows: int, width: int, devices: int) -> Table:
    """For what the decoder takes, keeps and makes, "b f h w c" all of it: parted by streams if
    they divide, else by columns, whose convolutions look over the edge, else not at all."""
    if rows % devices == 0:
        return ((r"", (VAE, None, None, None, None)),)
    return ((r"", (VAE, None)),) if width % devices == 0 else ()


def spec_of(path: str, ndim: int, table: Table, lead: tuple[Axis, ...] = ()) -> P | None:
    """The spec of one leaf, None if no row matches; `lead` names its first axes."""
    for pattern, last in table:
        if re.search(pattern, path):
            whole = ndim - len(lead) - len(last)
            if whole < 0:
                raise LiveAvatarError(f"{path} has {ndim} axes, too few for {lead} and {last}")
            return P(*lead, *[None] * whole, *last)
    return None


def shardings(tree: Any, table: Table, mesh: jax.sharding.Mesh, lead: tuple[Axis, ...] = ()) -> Any:
    """A tree of the same kind with the sharding of every leaf; what no row names is whole."""

    def place(path: str, leaf: Any) -> NamedSharding:
        spec = spec_of(path, len(leaf.shape), table, lead) or P(*lead)
        return NamedSharding(mesh, spec)

    return replace(tree, {path: place(path, leaf) for path, leaf in leaves(tree).items()})


@dataclasses.dataclass(frozen=True)
class Parted(Layout):
    """Tokens parted over `tokens`, heads over `heads`; weights over `tensor` as they come.

    Self-attention exchanges tokens for heads and back (all-to-all, as in DeepSpeed-Ulysses,
    arXiv 2309.14509); attention to the prompt needs no exchange.
    """

    heads: tuple[str, ...]
    tokens: tuple[str, ...]
    parts: int  # devices along `tokens`

    def split(self, x: Float[Array, "b f p dim"]) -> Float[Array, "b f pp dim"]:
        padding = -x.shape[2] % self.parts
        # Whole up to here: the compiler would else part the latents, whose columns do not fit.
        x = jnp.pad(_pin(x), ((0, 0), (0, 0), (0, padding), (0, 0)))
        return _pin(x, None, None, self.tokens)

    def join(self, x: Float[Array, "b f pp k"], p: int) -> Float[Array, "b f p k"]:
        return super().join(_pin(x), p)

    def gather(self, x: Float[Array, "b f pp n d"], p: int) -> Float[Array, "b n t d"]:
        return super().gather(_pin(self._by_token(x), None, None, None, self.heads), p)

    def scatter(
        self, x: Float[Array, "b n t d"], f: int, padded: int
    ) -> Float[Array, "b f pp n d"]:
        return self._by_token(_pin(super().scatter(x, f, padded), None, None, None, self.heads))

    def _by_token(self, x: Float[Array, "b f pp n d"]) -> Float[Array, "b f pp n d"]:
        return _pin(x, None, None, self.tokens, TENSOR)

    def attention(
        self,
        q: Float[Array, "b n t d"],
        k: Float[Array, "b n s d"],
        v: Float[Array, "b n s d"],
        length: Int[Array, " b"] | None,
        implementation: str,
    ) -> Float[Array, "b n t d"]:
        own = P(None, self.heads)
        if length is None:
            run = lambda q, k, v: attention(q, k, v, None, implementation)
            return self._on(self.heads, (own,) * 3, own)(run)(q, k, v)
        run = lambda q, k, v, length: attention(q, k, v, length, implementation)
        return self._on(self.heads, (own, own, own, P()), own)(run)(q, k, v, length)

    def cross(
        self, q: Float[Array, "b f pp n d"], k: Array, v: Array, implementation: str
    ) -> Float[Array, "b f pp n d"]:
        own, keys = P(None, None, self.tokens, TENSOR), P(None, TENSOR)
        run = lambda q, k, v: Layout().cross(q, k, v, implementation)
        return self._on((*self.tokens, TENSOR), (own, keys, keys), own)(run)(q, k, v)

    def _on(self, axes: tuple[str, ...], given: tuple[P, ...], back: P):
        """By hand, for no kernel can be parted by the compiler."""
        return lambda run: jax.shard_map(
            run, in_specs=given, out_specs=back, axis_names=set(axes), check_vma=False
        )


def _pin(x: Array, *axes: Axis) -> Array:
    return jax.lax.with_sharding_constraint(x, P(*axes))
