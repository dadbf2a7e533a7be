import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax.config import TextConfig
from liveavatar_jax.models.text import TextEncoder, relative_buckets
from liveavatar_jax.weights.encoders import TEXT_RULES, text_config
from liveavatar_jax.weights.rules import load


@pytest.fixture(scope="module")
def umt5(fixture):
    return fixture("umt5")


@pytest.fixture(scope="module")
def encoder(umt5):
    weights = {k.removeprefix("w."): v for k, v in umt5.tensors.items() if k.startswith("w.")}
    cfg = text_config(weights, param_dtype="float32")
    abstract = jax.eval_shape(lambda: TextEncoder(cfg, rngs=nnx.Rngs(0)))
    return load(abstract, weights, TEXT_RULES, where="umt5.safetensors")


def test_sizes_are_read_from_the_tensors(umt5, encoder):
    want, got = umt5.sidecar["config"], encoder.cfg
    assert (got.vocab, got.dim, got.attn_dim) == (want["vocab"], want["dim"], want["dim_attn"])
    assert (got.ffn_dim, got.heads) == (want["dim_ffn"], want["num_heads"])
    assert (got.layers, got.buckets) == (want["num_layers"], want["num_buckets"])


def test_text_rows_equal_the_original(umt5, encoder):
    run = jax.jit(lambda m, ids, mask: m(ids, mask))
    umt5.check("out", run(encoder, jnp.asarray(umt5["in.ids"]), jnp.asarray(umt5["in.mask"])))


def test_first_layer_equals_the_original(umt5, encoder):
    ids, mask = jnp.asarray(umt5["in.ids"]), jnp.asarray(umt5["in.mask"])
    first = jax.tree.map(lambda stack: stack[0], encoder.layers)
    bucket = jnp.asarray(relative_buckets(ids.shape[1], encoder.cfg))
    umt5.check("hidden_after_block0", first(encoder.embedding[...][ids], mask.astype(bool), bucket))


def test_buckets_equal_the_originals_table(umt5, encoder):
    relative, index = umt5["buckets.relative_position"], umt5["buckets.index"]
    reach = int(np.abs(relative).max())
    table = relative_buckets(reach + 1, encoder.cfg)
    for r, want in zip(relative, index, strict=True):
        query, key = (0, r) if r >= 0 else (-r, 0)
        assert table[query, key] == want, f"relative position {r}"


def test_bfloat16_stays_near_the_original(umt5, encoder):
    weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), encoder)
    out = weights(jnp.asarray(umt5["in.ids"]), jnp.asarray(umt5["in.mask"]))
    assert out.dtype == jnp.bfloat16
    umt5.check("out", np.asarray(out, ml_dtypes.bfloat16).astype(np.float32), peak=0.05)


def test_every_published_tensor_has_its_place(parity):
    manifest = json.loads((parity / "manifests" / "umt5_xxl_encoder.json").read_text())
    tensors = {
        name: jax.ShapeDtypeStruct(t["shape"], jnp.dtype(t["dtype"]))
        for name, t in manifest["tensors"].items()
    }
    assert text_config(tensors) == TextConfig()
    abstract = jax.eval_shape(lambda: TextEncoder(TextConfig(), rngs=nnx.Rngs(0)))
    load(abstract, tensors, TEXT_RULES, where="umt5_xxl_encoder.json")
    assert sum(x.size for x in jax.tree.leaves(abstract)) == manifest["num_parameters"]
