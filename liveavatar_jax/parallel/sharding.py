"""Where every array lies: one table of regular expressions a kind of tree.

A row names the last axes of the leaves whose path it finds; the axes before them (stacked layers,
batch) are whole. The first row that matches counts.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import P
from jax.sharding import NamedSharding

from liveavatar_jax.models.attention import KV, ONE_DEVICE, KVCache, Layout, attention
from liveavatar_jax.parallel.mesh import FSDP, ROWS, SEQUENCE, STAGE, TENSOR, VAE
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.types import Array, Bool, Float, Int, LiveAvatarError

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

# Training: networks, adapters (`a` leads into the rank, `b` out of it), and what an optimiser or
# an average keeps of them, whose paths contain those of the weights. Everything that is large is
# parted over `fsdp` too, adapters as well: with their moments, rank 128 would take 10.8 GB of
# every device, and gathering them adds a twentieth to what gathering the weights sends.
TRAINING: Table = (
    (r"(\.|^)a$", ((TENSOR, FSDP), None)),
    (r"(\.|^)b$", (None, (TENSOR, FSDP))),
    # Small, and over both axes at once XLA (jax 0.10.2) gets their few rows wrong on a mesh of
    # data x fsdp x tensor.
    (r"\b(audio|time_\w+)\..*kernel", (FSDP, None)),
    (r"\b(o|ffn_out|adain)\.(\w+\.)*kernel", (TENSOR, FSDP)),
    (r"\b(q|k|v|ffn_in)\.(\w+\.)*bias|\.norm_[qk]\.scale", (TENSOR,)),
    (r"kernel", (FSDP, TENSOR)),
    # 0.05 % of the weights, which would be gathered in every layer
    (r"bias|scale|modulation|type_embedding|layer_weights|pad_token", ()),
)


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


def trained(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """`shardings` by TRAINING of networks, adapters, optimiser states, averages.

    What an axis does not divide is left whole along it: see `undivided`.
    """
    found = {path: NamedSharding(mesh, spec) for path, (spec, _) in _fitted(tree, mesh).items()}
    return replace(tree, found)


def undivided(tree: Any, mesh: jax.sharding.Mesh, above: int = 2**20) -> list[str]:
    """One line for each leaf of more than `above` bytes that TRAINING wants parted further than
    its sizes allow, or does not name."""
    lines = []
    for path, (spec, wanted) in _fitted(tree, mesh).items():
        leaf = leaves(tree)[path]
        if spec == wanted or math.prod(leaf.shape) * leaf.dtype.itemsize <= above:
            continue
        named = "is not in the table" if wanted is None else f"does not divide over {wanted}"
        lines.append(f"{path} {leaf.shape} {named}: it lies as {spec}")
    return lines


def _fitted(tree: Any, mesh: jax.sharding.Mesh) -> dict[str, tuple[P, P | None]]:
    """Of every leaf, the spec that it gets and the one that the table names."""
    found = {}
    for path, leaf in leaves(tree).items():
        wanted = spec_of(path, len(leaf.shape), TRAINING) if leaf.shape else P()
        found[path] = (fit(wanted or P(), leaf.shape, mesh.shape), wanted)
    return found


def fit(spec: P, shape: tuple[int, ...], sizes: Mapping[str, int]) -> P:
    """The spec without the axes, the last ones first, that do not divide their dimension."""

    def along(axis: Axis, size: int) -> Axis:
        names = axis if isinstance(axis, tuple) else (axis,) if axis else ()
        while names and size % math.prod(sizes[name] for name in names):
            names = names[:-1]
        return (names if isinstance(axis, tuple) else names[0]) if names else None

    return P(*(along(axis, size) for axis, size in zip(spec, shape, strict=False)))


def layout(mesh: jax.sharding.Mesh) -> Layout:
    """How a forward of training lies on a mesh of TRAIN_AXES; use it under `jax.set_mesh`."""
    if mesh.size == 1:
        return ONE_DEVICE
    parts = mesh.shape[SEQUENCE]
    return Parted(heads=HEADS, tokens=(SEQUENCE,), parts=parts, rows=ROWS)


@dataclasses.dataclass(frozen=True)
class Parted(Layout):
    """Tokens parted over `tokens`, heads over `heads`, rows of the batch over `rows`; weights
    over `tensor` as they come.

    Self-attention exchanges tokens for heads and back (all-to-all, as in DeepSpeed-Ulysses,
    arXiv 2309.14509); attention to the prompt needs no exchange.
    """

    heads: tuple[str, ...]
    tokens: tuple[str, ...]
    parts: int  # devices along `tokens`
    rows: tuple[str, ...] = ()

    def split(self, x: Float[Array, "b f p dim"]) -> Float[Array, "b f pp dim"]:
        padding = -x.shape[2] % self.parts
        # Whole up to here: the compiler would else part the latents, whose columns do not fit.
        x = jnp.pad(self._pin(x), ((0, 0), (0, 0), (0, padding), (0, 0)))
        return self._pin(x, None, self.tokens)

    def by_row(self, tree: Any) -> Any:
        # Left to the compiler, levels made of parted weights come out wrong on a mesh of data,
        # fsdp and tensor (XLA of jax 0.10.2).
        return jax.tree.map(self._pin, tree) if self.rows else tree

    def join(self, x: Float[Array, "b f pp k"], p: int) -> Float[Array, "b f p k"]:
        return super().join(self._pin(x), p)

    def gather(self, x: Float[Array, "b f pp n d"], p: int) -> Float[Array, "b n t d"]:
        return super().gather(self._pin(self._by_token(x), None, None, self.heads), p)

    def scatter(
        self, x: Float[Array, "b n t d"], f: int, padded: int
    ) -> Float[Array, "b f pp n d"]:
        return self._by_token(self._pin(super().scatter(x, f, padded), None, None, self.heads))

    def kept(self, cache: KV) -> KV:
        by_heads = lambda a: P(*[None] * (a.ndim - 4), self.rows or None, self.heads, None, None)
        pin = lambda a: jax.lax.with_sharding_constraint(a, by_heads(a))
        return jax.tree.map(pin, cache)

    def append(
        self,
        cache: KVCache,
        fresh: KV,
        step: int | Int[Array, ""],
        block: Int[Array, " b"],
        live: Bool[Array, " b"],
    ) -> KVCache:
        if not self.rows:
            return super().append(cache, fresh, step, block, live)
        whole, rows = P(None, None, self.rows, self.heads), P(self.rows)
        new = P(None, self.rows, self.heads)

        def own(ring: KV, fresh: KV, step: Array, block: Array, live: Array) -> KV:
            return KVCache(ring=ring, sink=fresh).append(fresh, step, block, live).ring

        write = self._on(self.heads, (whole, new, P(), rows, rows), whole)(own)
        ring = write(cache.ring, fresh, jnp.asarray(step), block, live)
        return KVCache(ring=ring, sink=cache.sink)

    def _by_token(self, x: Float[Array, "b f pp n d"]) -> Float[Array, "b f pp n d"]:
        return self._pin(x, None, self.tokens, TENSOR)

    def attention(
        self,
        q: Float[Array, "b n t d"],
        k: Float[Array, "b n s d"],
        v: Float[Array, "b n s d"],
        length: Int[Array, " b"] | None,
        implementation: str,
    ) -> Float[Array, "b n t d"]:
        rows = self.rows or None
        own = P(rows, self.heads)
        if length is None:
            run = lambda q, k, v: attention(q, k, v, None, implementation)
            return self._on(self.heads, (own,) * 3, own)(run)(q, k, v)
        run = lambda q, k, v, length: attention(q, k, v, length, implementation)
        return self._on(self.heads, (own, own, own, P(rows)), own)(run)(q, k, v, length)

    def cross(
        self, q: Float[Array, "b f pp n d"], k: Array, v: Array, implementation: str
    ) -> Float[Array, "b f pp n d"]:
        rows = self.rows or None
        own, keys = P(rows, None, self.tokens, TENSOR), P(rows, TENSOR)
        run = lambda q, k, v: Layout().cross(q, k, v, implementation)
        return self._on((*self.tokens, TENSOR), (own, keys, keys), own)(run)(q, k, v)

    def _on(self, axes: tuple[str, ...], given: tuple[P, ...], back: P):
        """By hand, for no kernel can be parted by the compiler."""
        axes = (*self.rows, *axes)
        return lambda run: jax.shard_map(
            run, in_specs=given, out_specs=back, axis_names=set(axes), check_vma=False
        )

    def _pin(self, x: Array, *axes: Axis) -> Array:
        """`axes` are those after the rows of the batch."""
        return jax.lax.with_sharding_constraint(x, P(self.rows or None, *axes))
