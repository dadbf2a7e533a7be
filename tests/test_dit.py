"""Laws of the DiT that hold for any weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax.config import DiTConfig
from liveavatar_jax.models.attention import KV, KVCache
from liveavatar_jax.models.audio import AudioTokens
from liveavatar_jax.models.clip import Condition, causal
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.types import LiveAvatarError

from .networks import random

CFG = DiTConfig.tiny(dim=32, ffn_dim=48, heads=2, layers=3, inject_layers=(1,), audio_layers=3)
H, W, BLOCK = 8, 10, 3
PATCHES = H * W // 4


@functools.cache
def dit(cfg: DiTConfig = CFG) -> CausalDiT:
    return random(lambda: CausalDiT(cfg, rngs=nnx.Rngs(0)))


def normal(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(i), shape)


@jax.jit
def read(dit, rows, features):
    return dit.text(rows), dit.audio(features)


def given(frames: int, cfg: DiTConfig = CFG):
    features = normal(1, 1, 1, 5 + 4 * frames, cfg.audio_layers, cfg.audio_dim)
    text, audio = read(dit(cfg), normal(0, 1, 4, cfg.text_dim), features)
    reference, motion = normal(2, 1, 1, H, W, 16), normal(3, 1, 19, H, W, 16)
    return normal(4, 1, frames, H, W, 16), reference, motion, text, audio


@functools.partial(jax.jit, static_argnames="block_frames")
def whole(dit, x, sigma, reference, motion, text, audio, block_frames=BLOCK):
    everywhere = jnp.ones((1, 1, 1, PATCHES))
    condition = Condition(reference, motion, text, audio, everywhere)
    return causal(dit, x, sigma, condition, block_frames=block_frames)


@jax.jit
def prefill(dit, reference, motion, text):
    return dit.prefill(reference, motion, text)


@jax.jit
def one_block(dit, x, sigma, cache, text, audio, block):
    return dit.denoise(
        x,
        dit.level(sigma),
        cache,
        text,
        audio,
        step=0,
        block=block[None],
        position=BLOCK * block[None],
        distance=jnp.full(1, 4, jnp.int32),
        speakers=jnp.ones((1, 1, 1, PATCHES)),
    )


def test_streaming_matches_one_shot():
    """While nothing is forgotten and nothing rolls, a stream at one level per frame is the
    block-causal forward of the whole clip."""
    blocks = 4
    x, reference, motion, text, audio = given(BLOCK * blocks)
    sigma = jax.random.uniform(jax.random.key(9), (1, BLOCK * blocks))
    want = whole(dit(), x, sigma, reference, motion, text, audio)
    sink = prefill(dit(), reference, motion, text)
    ring = jnp.zeros((1, CFG.layers, 1, CFG.heads, blocks * BLOCK * PATCHES, CFG.head_dim))
    cache = KVCache(ring=KV(k=ring, v=ring), sink=sink)
    for i in range(blocks):
        at = slice(BLOCK * i, BLOCK * (i + 1))
        heard = AudioTokens(global_=audio.global_[:, :, at], local=audio.local[:, :, at])
        args = (x[:, at], sigma[:, at], cache, text, heard, jnp.int32(i))
        velocity, fresh = one_block(dit(), *args)
        np.testing.assert_allclose(velocity, want[:, at], atol=2e-5)
        cache = cache.append(fresh, 0, jnp.full(1, i, jnp.int32), jnp.ones(1, bool))
    assert one_block._cache_size() == 1


def test_the_future_is_not_seen():
    x, *rest = given(6)
    sigma = jnp.full((1, 6), 0.5)
    want = whole(dit(), x, sigma, *rest)
    changed = whole(dit(), x.at[:, BLOCK:].add(1.0), sigma, *rest)
    np.testing.assert_array_equal(changed[:, :BLOCK], want[:, :BLOCK])
    assert np.abs(changed[:, BLOCK:] - want[:, BLOCK:]).max() > 1e-2


@pytest.mark.parametrize("frames, block_frames", [(4, 3), (5, 2), (8, 4), (1, 3)])
def test_training_takes_any_number_of_frames(frames, block_frames):
    """The released training forward fails on whole multiples of 128 tokens, keeps the mask of the
    first shape, and wants whole blocks."""
    x, *rest = given(frames)
    y = whole(dit(), x, jnp.full((1, frames), 0.5), *rest, block_frames=block_frames)
    assert y.shape == x.shape and np.isfinite(y).all()


def test_audio_reaches_the_named_layers_and_no_others():
    """The original matches layers by substring: its layer 1 is also 10 to 19."""
    cfg = dataclasses.replace(CFG, layers=12, inject_layers=(1,))
    x, reference, motion, text, audio = given(BLOCK, cfg)
    louder = AudioTokens(global_=audio.global_ + 1, local=audio.local + 1)
    sigma = jnp.full((1, BLOCK), 0.5)

    def keys(audio):
        sink = prefill(dit(cfg), reference, motion, text)
        ring = jnp.zeros((1, cfg.layers, 1, cfg.heads, BLOCK * PATCHES, cfg.head_dim))
        cache = KVCache(ring=KV(k=ring, v=ring), sink=sink)
        return one_block(dit(cfg), x, sigma, cache, text, audio, jnp.int32(0))[1].k

    soft, loud = keys(audio), keys(louder)
    np.testing.assert_array_equal(soft[:2], loud[:2])
    for layer in range(2, 12):
        assert np.abs(soft[layer] - loud[layer]).max() > 1e-4
    # Without the one injector nothing is heard at all.
    deaf = dit(cfg)
    muted = jax.tree.map(jnp.zeros_like, deaf.injectors)
    silent = jax.tree.unflatten(jax.tree.structure(deaf), jax.tree.leaves(deaf))
    silent.injectors = muted
    a = whole(silent, x, sigma, reference, motion, text, audio)
    b = whole(silent, x, sigma, reference, motion, text, louder)
    np.testing.assert_array_equal(a, b)


def test_a_call_leaves_the_given_cache_alone():
    x, reference, motion, text, audio = given(BLOCK)
    sink = prefill(dit(), reference, motion, text)
    ring = jnp.zeros((1, CFG.layers, 1, CFG.heads, BLOCK * PATCHES, CFG.head_dim))
    cache = KVCache(ring=KV(k=ring, v=ring), sink=sink)
    _, fresh = one_block(dit(), x, jnp.full((1, BLOCK), 0.5), cache, text, audio, jnp.int32(0))
    after = cache.append(fresh, 0, jnp.full(1, 0, jnp.int32), jnp.ones(1, bool))
    assert (cache.ring.k == 0).all() and (after.ring.k != 0).any()


def test_wrong_numbers_of_audio_frames_are_refused():
    with pytest.raises(LiveAvatarError, match="5 \\+ 4k frames"):
        dit().audio(jnp.zeros((1, 1, 12, CFG.audio_layers, CFG.audio_dim)))


def test_gradients_reach_every_weight():
    x, reference, motion, _, _ = given(BLOCK)
    features = normal(1, 1, 1, 5 + 4 * BLOCK, CFG.audio_layers, CFG.audio_dim)

    @jax.jit
    @jax.grad
    def gradient(model):
        text, audio = model.text(normal(0, 1, 4, CFG.text_dim)), model.audio(features)
        y = whole(model, x, jnp.full((1, BLOCK), 0.5), reference, motion, text, audio)
        return jnp.sum(y * y)

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(dit())):
        name = jax.tree_util.keystr(path)
        assert np.isfinite(leaf).all(), name
        if "pose" not in name or "bias" in name:  # a pose of zeros has a bias only
            assert (np.asarray(leaf) != 0).any(), name
