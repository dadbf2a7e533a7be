"""Attention, its projections, and the cache that a stream keeps per denoising step.

What attention reads has the heads before the tokens, "b n s d", in the cache as well: kernels
work a head at a time, and of any other order the compiler would turn a whole ring round first.
"""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from liveavatar_jax.models.layers import Linear, RMSNorm
from liveavatar_jax.types import Array, Bool, Float, Int, LiveAvatarError, struct

_ROWS = 512  # queries handled at once on a CPU


@struct
class KV:
    """Keys and values; of one layer, or of all with a leading l."""

    k: Float[Array, "*l b n s d"]
    v: Float[Array, "*l b n s d"]

    @property
    def tokens(self) -> int:
        return self.k.shape[-2]


@struct
class KVCache:
    """What a stream remembers, in all layers.

    Every denoising step has a ring of its own, with the last blocks at its noise level; their
    keys are rotated by absolute position, so their order is free. The sink holds the condition
    tokens with unrotated keys, for they roll along; they know no level, so all steps share them.
    """

    ring: KV  # "step l b n s d"
    sink: KV  # "l b n t d"

    def append(
        self,
        fresh: KV,
        step: int | Int[Array, ""],
        block: Int[Array, " b"],
        live: Bool[Array, " b"],
    ) -> "KVCache":
        """`fresh` ("l b n t d") takes the slot of each live row's oldest block at that step.

        `block` were seen before. Written row by row into place, so that a donated ring is
        never held twice.
        """
        t, slots = fresh.tokens, slots_of(self.ring, fresh)

        def write(ring: Array, new: Array) -> Array:
            for row in range(len(block)):
                at = (step, 0, row, 0, block[row] % slots * t, 0)
                some = new[None, :, row : row + 1]
                old = jax.lax.dynamic_slice(ring, at, some.shape)
                some = jnp.where(live[row], some.astype(ring.dtype), old)
                ring = jax.lax.dynamic_update_slice(ring, some, at)
            return ring

        ring = KV(k=write(self.ring.k, fresh.k), v=write(self.ring.v, fresh.v))
        return KVCache(ring=ring, sink=self.sink)


def slots_of(ring: KV, fresh: KV) -> int:
    """How many blocks like `fresh` the ring holds.

    Raises:
        LiveAvatarError: the ring does not hold whole blocks of this size.
    """
    if ring.tokens % fresh.tokens:
        raise LiveAvatarError(
            f"a ring of {ring.tokens} tokens cannot hold whole blocks of {fresh.tokens}; start the "
            "stream anew"
        )
    return ring.tokens // fresh.tokens


def overwrite(ring: KV, fresh: KV, block: Int[Array, " b"]) -> KV:
    """One layer's ring ("b n s d") with block number `block` of every row in its slot.

    By selection, which fuses into whatever reads the ring next.
    """
    slots = slots_of(ring, fresh)
    own = (jnp.arange(slots)[None] == block[:, None] % slots)[:, None, :, None, None]

    def select(old: Array, new: Array) -> Array:
        slotted = rearrange(old, "b n (s t) d -> b n s t d", s=slots)
        slotted = jnp.where(own, new[:, :, None].astype(old.dtype), slotted)
        return rearrange(slotted, "b n s t d -> b n (s t) d")

    return KV(k=select(ring.k, fresh.k), v=select(ring.v, fresh.v))


def attention(
    q: Float[Array, "b n t d"],
    k: Float[Array, "b n s d"],
    v: Float[Array, "b n s d"],
    length: Int[Array, " b"] | None = None,
    implementation: str = "auto",
) -> Float[Array, "b n t d"]:
    """Softmax attention over each row's first `length` keys (all, if None), softmax in float32.

    `implementation`: "chunked" (any device), "cudnn" (NVIDIA, 16-bit inputs), "pallas" (TPU),
    "plain" (a handful of keys), or "auto", the best for the default backend and these inputs.
    """
    if implementation == "auto":
        backend = jax.default_backend()
        short = q.dtype in (jnp.bfloat16, jnp.float16)
        fused = {"gpu": "cudnn", "tpu": "pallas"} if short else {}
        implementation = fused.get(backend, "chunked")
    return _IMPLEMENTATIONS[implementation](q, k, v, length)


def _chunked(
    q: Float[Array, "b n t d"],
    k: Float[Array, "b n s d"],
    v: Float[Array, "b n s d"],
    length: Int[Array, " b"] | None,
) -> Float[Array, "b n t d"]:
    """One head and at most `_ROWS` queries at a time.

    XLA's CPU back end runs a batched product several times slower than a plain one, and the
    whole score matrix would leave the cache (and, at 14B, the memory).
    """
    b, n, t, d = q.shape
    rows = math.ceil(t / math.ceil(t / _ROWS))
    padding = ((0, 0), (0, 0), (0, -t % rows), (0, 0))
    queries = rearrange(jnp.pad(q * d**-0.5, padding), "b n (i t) d -> (b n) i t d", t=rows)
    seen = jnp.full(b * n, k.shape[2]) if length is None else jnp.repeat(length, n)

    def one_head(head: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, seen = head
        hidden = jnp.where(jnp.arange(len(k)) < seen, 0.0, -jnp.inf)[None]

        @jax.checkpoint  # a gradient would else keep all scores
        def some_rows(q: Array) -> Array:
            score = jnp.dot(q, k.T, preferred_element_type=jnp.float32) + hidden
            weight = jnp.exp(score - score.max(axis=-1, keepdims=True))
            y = jnp.dot(weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (y / weight.sum(axis=-1, keepdims=True)).astype(q.dtype)

        return jax.lax.map(some_rows, q) if len(q) > 1 else some_rows(q[0])[None]

    keys, values = (rearrange(a, "b n s d -> (b n) s d") for a in (k, v))
    y = jax.lax.map(one_head, (queries, keys, values, seen))
    return rearrange(y, "(b n) i t d -> b n (i t) d", b=b)[:, :, :t]


def _cudnn(
    q: Float[Array, "b n t d"],
    k: Float[Array, "b n s d"],
    v: Float[Array, "b n s d"],
    length: Int[Array, " b"] | None,
) -> Float[Array, "b n t d"]:
    """Each head is a row of the batch: JAX takes heads behind the tokens, and so none moves."""
    b, n = q.shape[:2]
    q, k, v = (rearrange(a, "b n s d -> (b n) s 1 d") for a in (q, k, v))
    seen = None if length is None else jnp.repeat(length, n)
    y = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=seen, implementation="cudnn")
    return rearrange(cast(Array, y), "(b n) t 1 d -> b n t d", b=b)


def _pallas(
    q: Float[Array, "b n t d"],
    k: Float[Array, "b n s d"],
    v: Float[Array, "b n s d"],
    length: Int[Array, " b"] | None,
) -> Float[Array, "b n t d"]:
    """The TPU flash kernel; it wants whole tiles, and hides keys by segment."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    b, t, s = len(q), q.shape[2], k.shape[2]
    tile = 128
    q, k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, -a.shape[2] % tile), (0, 0))) for a in (q, k, v))
    length = jnp.full(b, s) if length is None else length
    seen = jnp.arange(k.shape[2])[None] < length[:, None]
    segments = flash.SegmentIds(q=jnp.ones((b, q.shape[2]), jnp.int32), kv=seen.astype(jnp.int32))
    y = flash.flash_attention(q, k, v, segment_ids=segments, sm_scale=q.shape[-1] ** -0.5)
    return y[:, :, :t]


def _plain(
    q: Float[Array, "b n t d"],
    k: Float[Array, "b n s d"],
    v: Float[Array, "b n s d"],
    length: Int[Array, " b"] | None,
) -> Float[Array, "b n t d"]:
    """The textbook formula, for a handful of keys."""
    assert length is None
    score = jnp.einsum("bntd,bnsd->bnts", q * q.shape[-1] ** -0.5, k)
    weight = jax.nn.softmax(score.astype(jnp.float32), axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bnsd->bntd", weight, v)


_IMPLEMENTATIONS = {"chunked": _chunked, "cudnn": _cudnn, "pallas": _pallas, "plain": _plain}


class Layout:
    """Where the arrays of a forward lie: here, on one device. `parallel` knows of others.

    Between attentions tokens are "b f p dim"; a layout may part them over devices, padded to
    `p'` a frame. Attention wants all tokens of some heads, "b n t d" without padding.
    """

    rows: tuple[str, ...] = ()  # axes that the rows of the batch are parted over

    def split(self, x: Float[Array, "b f p dim"]) -> Float[Array, "b f pp dim"]:
        """Tokens, parted."""
        return x

    def by_row(self, tree: Any) -> Any:
        """Arrays that lead with the rows of the batch and are whole otherwise."""
        return tree

    def join(self, x: Float[Array, "b f pp k"], p: int) -> Float[Array, "b f p k"]:
        """The inverse of `split`."""
        return x[:, :, :p]

    def gather(self, x: Float[Array, "b f pp n d"], p: int) -> Float[Array, "b n t d"]:
        """All tokens of this device's heads."""
        return rearrange(x[:, :, :p], "b f p n d -> b n (f p) d")

    def scatter(
        self, x: Float[Array, "b n t d"], f: int, padded: int
    ) -> Float[Array, "b f pp n d"]:
        """The inverse of `gather`."""
        x = rearrange(x, "b n (f p) d -> b f p n d", f=f)
        return jnp.pad(x, ((0, 0), (0, 0), (0, padded - x.shape[2]), (0, 0), (0, 0)))

    def kept(self, cache: KV) -> KV:
        """Keys and values as they lie from call to call."""
        return cache

    def append(
        self,
        cache: KVCache,
        fresh: KV,
        step: int | Int[Array, ""],
        block: Int[Array, " b"],
        live: Bool[Array, " b"],
    ) -> KVCache:
        """`KVCache.append`, each device its rows and heads."""
        return cache.append(fresh, step, block, live)

    def attention(
        self,
        q: Float[Array, "b n t d"],
        k: Float[Array, "b n s d"],
        v: Float[Array, "b n s d"],
        length: Int[Array, " b"] | None,
        implementation: str,
    ) -> Float[Array, "b n t d"]:
        """`attention`, each device over its heads."""
        return attention(q, k, v, length, implementation)

    def cross(
        self, q: Float[Array, "b f pp n d"], k: Array, v: Array, implementation: str
    ) -> Float[Array, "b f pp n d"]:
        """Attention to a few keys that no level and no block changes, each device its tokens."""
        y = attention(rearrange(q, "b f p n d -> b n (f p) d"), k, v, None, implementation)
        return rearrange(y, "b n (f p) d -> b f p n d", f=q.shape[1])


ONE_DEVICE = Layout()


class Attention(nnx.Module):
    """Query, key, value and output maps; q and k are RMS-normalised over the full width."""

    def __init__(self, dim: int, heads: int, implementation: str, dtype: str, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dim, dim, dtype, rngs=rngs)
        self.heads = heads
        self.implementation = implementation
        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        self.norm_q = RMSNorm(dim, dtype, rngs=rngs)
        self.norm_k = RMSNorm(dim, dtype, rngs=rngs)

    def query(self, x: Float[Array, "*b t dim"]) -> Float[Array, "*b t n d"]:
        return self._split(self.norm_q(self.q(x)))

    def keys(self, x: Float[Array, "*b s dim"]) -> Float[Array, "*b s n d"]:
        return self._split(self.norm_k(self.k(x)))

    def values(self, x: Float[Array, "*b s dim"]) -> Float[Array, "*b s n d"]:
        return self._split(self.v(x))

    def context(self, x: Float[Array, "b s dim"]) -> KV:
        """Keys and values, as attention reads them."""
        return KV(k=self.keys(x).swapaxes(1, 2), v=self.values(x).swapaxes(1, 2))

    def out(self, y: Float[Array, "*b t n d"]) -> Float[Array, "*b t dim"]:
        return self.o(rearrange(y, "... n d -> ... (n d)"))

    def __call__(self, x: Float[Array, "b t dim"], context: KV) -> Float[Array, "b t dim"]:
        """Cross-attention to the `context` of other tokens."""
        q = self.query(x).swapaxes(1, 2)
        y = attention(q, context.k, context.v, implementation=self.implementation)
        return self.out(y.swapaxes(1, 2))

    def _split(self, x: Float[Array, "*b t dim"]) -> Float[Array, "*b t n d"]:
        return rearrange(x, "... (n d) -> ... n d", n=self.heads)
