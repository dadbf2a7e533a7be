"""The umT5 text encoder: token ids to the rows that the DiT's cross-attention reads."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from liveavatar_jax.config import TextConfig
from liveavatar_jax.models.layers import Map, RMSNorm
from liveavatar_jax.types import Array, Bool, Float, Int


class Layer(nnx.Module):
    """Pre-norm attention with its own relative position table, then a gated feed-forward."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        dim, attn, ffn, dtype = cfg.dim, cfg.attn_dim, cfg.ffn_dim, cfg.param_dtype
        self.heads = cfg.heads
        self.norm1 = RMSNorm(dim, dtype, rngs=rngs)
        self.q = Map(dim, attn, dtype, rngs=rngs)
        self.k = Map(dim, attn, dtype, rngs=rngs)
        self.v = Map(dim, attn, dtype, rngs=rngs)
        self.o = Map(attn, dim, dtype, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((cfg.buckets, cfg.heads), dtype))
        self.norm2 = RMSNorm(dim, dtype, rngs=rngs)
        self.gate = Map(dim, ffn, dtype, rngs=rngs)
        self.fc1 = Map(dim, ffn, dtype, rngs=rngs)
        self.fc2 = Map(ffn, dim, dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b t dim"],
        mask: Bool[Array, "b t"],
        bucket: Int[Array, "t t"],
    ) -> Float[Array, "b t dim"]:
        x = x + self.attend(self.norm1(x), mask, bucket)
        y = self.norm2(x)
        return x + self.fc2(self.fc1(y) * jax.nn.gelu(self.gate(y), approximate=True))

    def attend(
        self,
        x: Float[Array, "b t dim"],
        mask: Bool[Array, "b t"],
        bucket: Int[Array, "t t"],
    ) -> Float[Array, "b t dim"]:
        q, k, v = (
            rearrange(part(x), "b t (n d) -> b t n d", n=self.heads)
            for part in (self.q, self.k, self.v)
        )
        # T5 does not scale by the head width; logits and softmax are float32 as published
        logits = jnp.einsum("btnd,bsnd->bnts", q, k, preferred_element_type=jnp.float32)
        bias = self.position[...].astype(jnp.float32)[bucket]
        logits = logits + rearrange(bias, "t s n -> 1 n t s")
        lowest = jnp.finfo(jnp.float32).min  # finite: a row without any key stays finite
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, lowest), axis=-1)
        y = jnp.einsum("bnts,bsnd->btnd", weights.astype(x.dtype), v)
        return self.o(rearrange(y, "b t n d -> b t (n d)"))


class TextEncoder(nnx.Module):
    """The encoder half of umT5 (models_t5_umt5-xxl-enc-bf16.pth)."""

    def __init__(self, cfg: TextConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        table = jax.random.normal(rngs.params(), (cfg.vocab, cfg.dim), jnp.float32)
        self.embedding = nnx.Param(table.astype(cfg.param_dtype))
        make = lambda key: Layer(cfg, rngs=nnx.Rngs(key))
        self.layers = jax.vmap(make)(jax.random.split(rngs.params(), cfg.layers))
        self.norm = RMSNorm(cfg.dim, cfg.param_dtype, rngs=rngs)

    def __call__(
        self,
        ids: Int[Array, "b t"],
        mask: Bool[Array, "b t"] | Int[Array, "b t"],
        dtype: str | None = None,
    ) -> Float[Array, "b t dim"]:
        """ids, and which of them are prompt (mask 1) rather than padding, to text rows.

        Rows of padding are computed too but mean nothing: the published pipeline cuts each
        prompt off after its last token and pads with zeros. Runs in the dtype of the weights
        unless `dtype` names another.
        """
        x = self.embedding[...][ids].astype(dtype or self.embedding.dtype)
        mask = mask.astype(bool)
        bucket = jnp.asarray(relative_buckets(ids.shape[1], self.cfg))
        step = lambda x, layer: (layer(x, mask, bucket), None)
        x, _ = jax.lax.scan(step, x, self.layers)
        return self.norm(x)


@functools.lru_cache(maxsize=8)
def relative_buckets(tokens: int, cfg: TextConfig) -> np.ndarray:
    """The row of the position table for each query and key, int32 [tokens, tokens].

    Half of the buckets serve keys after the query. Of each half, one half is for exact
    distances, the other grows logarithmically up to `max_distance`. Bucket e + i of n
    logarithmic ones begins at distance d = e · (max / e)^(i / n), which is decided in whole
    numbers, dⁿ ≥ eⁿ⁻ⁱ · maxⁱ, for a rounded logarithm may miss its boundary by one.
    """
    side = cfg.buckets // 2
    exact = side // 2
    n = side - exact

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        reached = (distance**n >= exact ** (n - i) * cfg.max_distance**i for i in range(1, n))
        return exact + sum(reached)

    of = np.array([bucket(distance) for distance in range(tokens)], np.int32)
    relative = np.arange(tokens) - np.arange(tokens)[:, None]  # key minus query
    return np.where(relative > 0, side, 0).astype(np.int32) + of[np.abs(relative)]
