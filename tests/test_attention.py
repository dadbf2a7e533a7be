"""One name, several formulations, one result."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.models.attention import attention


def heads(t, s, b=2, n=3, d=16, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return [
        jax.random.normal(key, (b, n, tokens, d)).astype(dtype)
        for key, tokens in zip(keys, (t, s, s), strict=True)
    ]


def textbook(q, k, v):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    score = np.einsum("bntd,bnsd->bnts", q, k) / np.sqrt(q.shape[-1])
    weight = np.exp(score - score.max(-1, keepdims=True))
    return np.einsum("bnts,bnsd->bntd", weight / weight.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("implementation", ["chunked", "plain"])
@pytest.mark.parametrize("t", [1, 37, 512, 513, 1100])
def test_it_is_the_textbook_s(implementation, t):
    q, k, v = heads(t, 50)
    ours = jax.jit(functools.partial(attention, implementation=implementation))(q, k, v)
    np.testing.assert_allclose(ours, textbook(q, k, v), atol=1e-5)


@pytest.mark.parametrize("lengths", [(1, 50), (20, 20), (50, 7)])
def test_keys_beyond_a_row_s_length_do_not_count(lengths):
    q, k, v = heads(9, 50)
    run = jax.jit(functools.partial(attention, implementation="chunked"))
    for row, length in enumerate(lengths):
        v = v.at[row, :, length:].set(1e30)
    ours = run(q, k, v, jnp.asarray(lengths))
    for row, length in enumerate(lengths):
        some = (a[row : row + 1] for a in (q, k[:, :, :length], v[:, :, :length]))
        np.testing.assert_allclose(ours[row : row + 1], textbook(*some), atol=1e-5)


def test_scores_of_half_precision_heads_are_float32():
    q, k, v = heads(64, 2000, dtype=jnp.bfloat16)
    ours = attention(q, k, v, implementation="chunked")
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float64), textbook(q, k, v), atol=2e-2)


def test_the_whole_score_matrix_is_never_held():
    q, k, v = heads(3375, 16_000, b=1, n=4, d=32)
    compiled = jax.jit(functools.partial(attention, implementation="chunked")).lower(q, k, v)
    used = compiled.compile().memory_analysis().temp_size_in_bytes
    assert used < 3375 * 16_000 * 4 / 2  # of one head alone, in float32


def test_nvidia_s_kernel_gets_every_head_as_a_row(monkeypatch):
    """With JAX's own formula in its place: the kernel is not there on a CPU."""
    kernel = jax.nn.dot_product_attention

    def stand_in(*qkv, implementation, **options):
        assert implementation == "cudnn"
        return kernel(*qkv, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    q, k, v = heads(9, 50)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        ours = attention(q, k, v, jnp.asarray([20, 50]), implementation="cudnn")
        every = attention(q, k, v, implementation="cudnn")
    np.testing.assert_allclose(every, textbook(q, k, v), atol=1e-5)
    np.testing.assert_allclose(ours[1], every[1], atol=1e-5)
    some = (a[:1] for a in (q, k[:, :, :20], v[:, :, :20]))
    np.testing.assert_allclose(ours[:1], textbook(*some), atol=1e-5)


def test_a_tpu_program_calls_the_flash_kernel():
    q, k, v = (jax.ShapeDtypeStruct((1, 4, s, 128), jnp.bfloat16) for s in (300, 700, 700))
    run = jax.jit(functools.partial(attention, implementation="pallas"))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = run.trace(q, k, v, jnp.full(1, 500)).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in program
