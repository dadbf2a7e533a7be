"""Whole clips: what is seen from where, in both directions and with a clean past."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax.config import DiTConfig
from liveavatar_jax.models.attention import KV, KVCache, attention
from liveavatar_jax.models.clip import bidirectional, causal, condition
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.models.layers import rotate

from .networks import random

CFG = DiTConfig.tiny(layers=2, inject_layers=(1,))
H, W, BLOCK = 4, 6, 2
PATCHES = (H // 2) * (W // 2)


@functools.cache
def dit(remat: str = "none", predicts: str = "velocity") -> CausalDiT:
    cfg = dataclasses.replace(CFG, remat=remat, predicts=predicts)
    return random(lambda: CausalDiT(cfg, rngs=nnx.Rngs(0)))


def normal(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(i), shape)


def given(model: CausalDiT, frames: int, **more):
    reference, motion = normal(0, 1, 1, H, W, 16), normal(1, 1, 19, H, W, 16)
    features = normal(3, 1, 1, 4 * frames, CFG.audio_layers, CFG.audio_dim)
    return condition(model, reference, motion, normal(2, 1, 5, CFG.text_dim), features, **more)


@jax.jit
def both_ways(model, x, sigma, pose=None):
    known = dataclasses.replace(given(model, x.shape[1]), pose=pose)
    return bidirectional(model, x, sigma, known)


def test_both_ways_is_dense_attention_over_noise_and_condition():
    """Against a sequence without padding, one token a frame and a level of its own for each."""
    frames = 3
    x, sigma = normal(9, 1, frames, H, W, 16), jnp.full(1, 0.6)

    @jax.jit
    def dense(model, x):
        known = given(model, frames)
        conditions, turn = model.conditions(known.reference, known.motion)
        noise = model.embed(x, None)
        tokens = jnp.concatenate([noise.reshape(1, -1, CFG.dim), conditions], axis=1)
        count = frames * PATCHES
        grid = model.turn(jnp.zeros(1, jnp.int32), frames, H, W)
        turn = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), grid, turn)
        level = model.level(jnp.where(jnp.arange(tokens.shape[1]) < count, 0.6, 0.0)[None])
        for layer in range(CFG.layers):
            pick = lambda tree, at: jax.tree.map(lambda a: a[at], tree)
            text = pick(known.text, layer)

            def own(q, k, v):
                q, k, v = (a[:, :, 0].swapaxes(1, 2) for a in (q, k, v))
                y = attention(rotate(q, turn), rotate(k, turn), v, implementation="plain")
                return y.swapaxes(1, 2)[:, :, None], None

            def prompt(q, text=text):
                y = attention(q[:, :, 0].swapaxes(1, 2), text.k, text.v)
                return y.swapaxes(1, 2)[:, :, None]

            tokens, _ = pick(model.blocks, layer)(tokens[:, :, None], level.blocks, own, prompt)
            tokens = tokens[:, :, 0]
            if layer in CFG.inject_layers:
                injector = pick(model.injectors, CFG.inject_layers.index(layer))
                noise = tokens[:, :count].reshape(1, frames, PATCHES, CFG.dim)
                noise = injector(noise, known.audio, known.speakers)
                tokens = jnp.concatenate([noise.reshape(1, count, CFG.dim), tokens[:, count:]], 1)
        noise = tokens[:, :count].reshape(1, frames, PATCHES, CFG.dim)
        y = model.head(noise, level.head[:, :1].repeat(frames, 1))
        return model.unpatchify(y, H, W)

    np.testing.assert_allclose(both_ways(dit(), x, sigma), dense(dit(), x), atol=3e-5)


def test_both_ways_sees_the_future():
    x, sigma = normal(9, 1, 4, H, W, 16), jnp.full(1, 0.6)
    changed = both_ways(dit(), x.at[:, 3].add(1.0), sigma)
    assert np.abs(changed[:, 0] - both_ways(dit(), x, sigma)[:, 0]).max() > 1e-3


@functools.partial(jax.jit, static_argnames=("window", "forced"))
def clip(model, x, past, sigma, window=None, forced=True, position=None, distance=None):
    known = given(model, x.shape[1])
    return causal(
        model, x, sigma, known, block_frames=BLOCK, window=window, position=position,
        distance=distance, past=past if forced else None,
    )  # fmt: skip


@pytest.mark.parametrize("predicts", [pytest.param("velocity", marks=pytest.mark.slow), "offset"])
def test_teacher_forcing_is_a_stream_with_a_clean_history(predicts):
    """Each noisy block against a ring of the clean ones before it, rolled far into the video."""
    model = dit(predicts=predicts)
    blocks, ring_blocks, far, ahead = 3, 2, 100, 7
    frames = blocks * BLOCK
    x, past = normal(9, 1, frames, H, W, 16), normal(10, 1, frames, H, W, 16)
    sigma = jnp.repeat(jnp.asarray([[0.9, 0.3, 0.6]]), BLOCK, axis=1)
    position, distance = jnp.full(1, far), jnp.full((1, blocks), ahead)
    want = clip(model, x, past, sigma, ring_blocks, position=position, distance=distance)

    @jax.jit
    def stream(model):
        known = given(model, frames)
        sink = model.prefill(known.reference, known.motion, known.text)
        ring = jnp.zeros((1, CFG.layers, 1, CFG.heads, ring_blocks * BLOCK * PATCHES, CFG.head_dim))
        cache, out = KVCache(ring=KV(k=ring, v=ring), sink=sink), []
        for j in range(blocks):
            at = slice(BLOCK * j, BLOCK * (j + 1))
            heard = jax.tree.map(lambda a, at=at: a[:, :, at], known.audio)
            block = jnp.full(1, j)

            def run(x, sigma, cache=cache, j=j, heard=heard, block=block):
                return model.denoise(
                    x, model.level(sigma), cache, known.text, heard, step=0, block=block,
                    position=position + BLOCK * j, distance=distance[:, j],
                    speakers=known.speakers,
                )  # fmt: skip

            out.append(run(x[:, at], sigma[:, at])[0])
            clean = run(past[:, at], jnp.zeros((1, BLOCK)))[1]
            cache = cache.append(clean, 0, block, jnp.ones(1, bool))
        return jnp.concatenate(out, axis=1)

    np.testing.assert_allclose(want, stream(model), atol=3e-5 * max(1.0, np.abs(want).max()))


def test_a_velocity_is_made_of_an_offset():
    """From the pose to the clean latents; over the noise level, but never over less than 0.05."""
    x, pose = normal(9, 1, 4, H, W, 16), normal(11, 1, 1, H, W, 16)
    for sigma in (0.02, 0.6):
        said = both_ways(dit(), x, jnp.full(1, sigma), pose=pose)
        made = both_ways(dit(predicts="offset"), x, jnp.full(1, sigma), pose=pose)
        np.testing.assert_allclose(made, (x - pose - said) / max(sigma, 0.05), rtol=1e-4, atol=1e-3)
    levels = jnp.repeat(jnp.asarray([[0.9, 0.02]]), BLOCK, axis=1)
    said, made = (clip(dit(predicts=p), x, x, levels, None, False) for p in ("velocity", "offset"))
    want = (x - said) / jnp.maximum(levels, 0.05)[..., None, None, None]
    np.testing.assert_allclose(made, want, rtol=1e-4, atol=1e-3)


def test_places_are_told_apart():
    """Tokens of a flat picture differ by where they are, in noise, and in the reference; and
    frames do not."""
    cfg = dataclasses.replace(CFG, places=(H // 2, W // 2))
    model = random(lambda: CausalDiT(cfg, rngs=nnx.Rngs(0)))
    flat = jnp.ones((1, 2, H, W, 16))
    noise, (shown, _) = model.embed(flat, None), model.conditions(flat[:, :1], None)
    np.testing.assert_array_equal(noise[0, 0], noise[0, 1])
    for tokens in (noise[0, 0], shown[0]):
        apart = tokens - tokens[:1]
        place = model.place[...] - model.place[...][:1]
        np.testing.assert_allclose(apart, place, atol=1e-5)
    assert np.abs(place).max() > 0.05
    # and what the head says is scaled by place
    offsets = dataclasses.replace(cfg, predicts="offset")
    model = random(lambda: CausalDiT(offsets, rngs=nnx.Rngs(0)))
    said, x, sigma = normal(3, 1, 2, H, W, 16), flat, jnp.full((1, 2), 0.5)
    clean = x - 0.5 * model.velocity(said, x, None, sigma)
    np.testing.assert_allclose(clean, said * model.spread[...][None, None], atol=1e-5)


def test_a_window_hides_what_a_ring_has_forgotten():
    x, sigma = normal(9, 1, 6, H, W, 16), jnp.full((1, 6), 0.5)
    seen = lambda x: clip(dit(), x, x, sigma, 1, forced=False)
    want, changed = seen(x), seen(x.at[:, :BLOCK].add(1.0))
    np.testing.assert_array_equal(changed[:, BLOCK:], want[:, BLOCK:])


def test_audio_by_blocks_forgets_the_earlier_ones():
    @functools.partial(jax.jit, static_argnames="blocks")
    def heard(features, blocks):
        reference, text = normal(0, 1, 1, H, W, 16), normal(2, 1, 5, CFG.text_dim)
        return condition(dit(), reference, None, text, features, blocks=blocks).audio.local

    features = normal(3, 1, 1, 16, CFG.audio_layers, CFG.audio_dim)
    changed = features.at[:, :, :8].add(1.0)
    np.testing.assert_array_equal(heard(features, 2)[:, :, 2:], heard(changed, 2)[:, :, 2:])
    assert np.abs(heard(features, 1)[:, :, 2] - heard(changed, 1)[:, :, 2]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["full", "dots"])
def test_what_a_gradient_keeps_changes_no_number(policy):
    x, sigma = normal(9, 1, 4, H, W, 16), jnp.full((1, 4), 0.5)

    @jax.jit
    def gradient(model):
        return jax.grad(lambda m: jnp.sum(clip(m, x, x, sigma) ** 2))(model)

    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    jax.tree.map(same, jax.tree.leaves(gradient(dit(policy))), jax.tree.leaves(gradient(dit())))
