"""Attention, its projections, and the cache that a stream keeps per denoising step."""

import functools
import math
from typing import cast

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from liveavatar_jax.models.layers import Linear, RMSNorm
from liveavatar_jax.types import Array, Float, Int, LiveAvatarError, struct

_ROWS = 512  # queries handled at once on a CPU


@struct
class KV:
    """Keys and values; of one layer, or of all with a leading l."""

    k: Float[Array, "*l b s n d"]
    v: Float[Array, "*l b s n d"]

    @property
    def tokens(self) -> int:
        return self.k.shape[-3]


@struct
class KVCache:
    """What one denoising step remembers, in all layers.

    The ring holds the last blocks with their keys rotated by absolute position, so their order
    is free. The sink holds the condition tokens with unrotated keys, for they roll along.
    """

    ring: KV  # "l b s n d"
    sink: KV  # "l b t n d"

    def append(self, fresh: KV, block: Int[Array, ""]) -> "KVCache":
        """`fresh` ("l b t n d") takes the slot of the oldest block; `block` were seen before."""
        return KVCache(ring=overwrite(self.ring, fresh, block), sink=self.sink)


def overwrite(ring: KV, fresh: KV, block: Int[Array, ""]) -> KV:
    """Ring with block number `block` in its slot; leading axes are free.

    Raises:
        LiveAvatarError: the ring does not hold whole blocks of this size.
    """
    t = fresh.tokens
    if ring.tokens % t:
        raise LiveAvatarError(
            f"a ring of {ring.tokens} tokens cannot hold whole blocks of {t}; start the stream anew"
        )
    start = block % (ring.tokens // t) * t

    def write(old: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=-3)

    return KV(k=write(ring.k, fresh.k), v=write(ring.v, fresh.v))


def attention(
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s n d"],
    v: Float[Array, "b s n d"],
    length: Int[Array, ""] | None = None,
    implementation: str = "auto",
) -> Float[Array, "b t n d"]:
    """Softmax attention over the first `length` keys (all, if None), softmax in float32.

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
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s n d"],
    v: Float[Array, "b s n d"],
    length: Int[Array, ""] | None,
) -> Float[Array, "b t n d"]:
    """One head and at most `_ROWS` queries at a time.

    XLA's CPU back end runs a batched product several times slower than a plain one, and the
    whole score matrix would leave the cache (and, at 14B, the memory).
    """
    b, t, _, d = q.shape
    rows = math.ceil(t / math.ceil(t / _ROWS))
    padding = ((0, 0), (0, -t % rows), (0, 0), (0, 0))
    queries = rearrange(jnp.pad(q * d**-0.5, padding), "b (i t) n d -> (b n) i t d", t=rows)
    seen = k.shape[1] if length is None else length
    hidden = jnp.where(jnp.arange(k.shape[1]) < seen, 0.0, -jnp.inf)[None]

    def one_head(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head

        def some_rows(q: Array) -> Array:
            score = jnp.dot(q, k.T, preferred_element_type=jnp.float32) + hidden
            weight = jnp.exp(score - score.max(axis=-1, keepdims=True))
            y = jnp.dot(weight.astype(v.dtype), v, preferred_element_type=jnp.float32)
            return (y / weight.sum(axis=-1, keepdims=True)).astype(q.dtype)

        return jax.lax.map(some_rows, q) if len(q) > 1 else some_rows(q[0])[None]

    keys, values = (rearrange(a, "b s n d -> (b n) s d") for a in (k, v))
    y = jax.lax.map(one_head, (queries, keys, values))
    return rearrange(y, "(b n) i t d -> b (i t) n d", b=b)[:, :t]


def _cudnn(
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s n d"],
    v: Float[Array, "b s n d"],
    length: Int[Array, ""] | None,
) -> Float[Array, "b t n d"]:
    lengths = None if length is None else jnp.broadcast_to(length, len(q))
    y = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation="cudnn")
    return cast(Array, y)


def _pallas(
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s n d"],
    v: Float[Array, "b s n d"],
    length: Int[Array, ""] | None,
) -> Float[Array, "b t n d"]:
    """The TPU flash kernel; it wants whole tiles, and hides keys by segment."""
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    t, s = q.shape[1], k.shape[1]
    tile = 128
    q, k, v = (
        jnp.pad(a, ((0, 0), (0, -a.shape[1] % tile), (0, 0), (0, 0))).swapaxes(1, 2)
        for a in (q, k, v)
    )
    seen = (jnp.arange(k.shape[2]) < (s if length is None else length)).astype(jnp.int32)
    segments = flash.SegmentIds(
        q=jnp.ones((len(q), q.shape[2]), jnp.int32),
        kv=jnp.broadcast_to(seen, (len(k), len(seen))),
    )
    y = flash.flash_attention(q, k, v, segment_ids=segments, sm_scale=q.shape[-1] ** -0.5)
    return y.swapaxes(1, 2)[:, :t]


def _plain(
    q: Float[Array, "b t n d"],
    k: Float[Array, "b s n d"],
    v: Float[Array, "b s n d"],
    length: Int[Array, ""] | None,
) -> Float[Array, "b t n d"]:
    """The textbook formula, for a handful of keys."""
    assert length is None
    score = jnp.einsum("btnd,bsnd->btns", q * q.shape[-1] ** -0.5, k)
    weight = jax.nn.softmax(score.astype(jnp.float32), axis=-1).astype(v.dtype)
    return jnp.einsum("btns,bsnd->btnd", weight, v)


_IMPLEMENTATIONS = {"chunked": _chunked, "cudnn": _cudnn, "pallas": _pallas, "plain": _plain}


class Attention(nnx.Module):
    """Query, key, value and output maps; q and k are RMS-normalised over the full width."""

    def __init__(self, dim: int, heads: int, implementation: str, dtype: str, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dim, dim, dtype, rngs=rngs)
        self.heads = heads
        self.implementation = implementation
        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        self.norm_q = RMSNorm(dim, dtype, rngs=rngs)
        self.norm_k = RMSNorm(dim, dtype, rngs=rngs)

    def query(self, x: Float[Array, "b t dim"]) -> Float[Array, "b t n d"]:
        return self._split(self.norm_q(self.q(x)))

    def keys_values(self, x: Float[Array, "b s dim"]) -> KV:
        return KV(k=self._split(self.norm_k(self.k(x))), v=self._split(self.v(x)))

    def __call__(self, x: Float[Array, "b t dim"], context: KV) -> Float[Array, "b t dim"]:
        """Cross-attention to keys and values made before."""
        y = attention(self.query(x), context.k, context.v, implementation=self.implementation)
        return self.o(rearrange(y, "b t n d -> b t (n d)"))

    def _split(self, x: Float[Array, "b t dim"]) -> Float[Array, "b t n d"]:
        return rearrange(x, "b t (n d) -> b t n d", n=self.heads)
