import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax.config import LATENT_MEAN, VAEConfig
from liveavatar_jax.models.causal import CausalConv
from liveavatar_jax.models.cells import MOTION, SLACK, along_latents, by_frame, joined
from liveavatar_jax.models.conv import conv2d, conv2d_doubled, conv3d
from liveavatar_jax.models.vae import VAE, denormalise, normalise
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.rules import export, load
from liveavatar_jax.weights.vae import VAE_RULES, vae_config

from .networks import random, same

# Three levels instead of four (4 frames and 4×4 pixels a latent), for the compiler's sake.
SMALL = VAEConfig(dim=4, dim_mult=(1, 2, 2), res_blocks=1, time_down=(True, True))
Z = len(LATENT_MEAN)

encode = jax.jit(lambda vae, video, cache: vae.encode(video, cache))
decode = jax.jit(lambda vae, latents, cache: vae.decode(latents, cache))


# As small presets have it: all work at the size of the latents.
CELLS = dataclasses.replace(SMALL, dim=8, cells=2, grid=(3, 5))


@pytest.fixture(scope="module")
def vae():
    return random(lambda: VAE(SMALL, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def cells():
    return random(lambda: VAE(CELLS, rngs=nnx.Rngs(0)))


def noise(*shape, key=0):
    return jax.random.normal(jax.random.key(key), shape)


def in_calls(code, vae, x, sizes):
    outputs, cache = [], None
    for piece in jnp.split(x, np.cumsum(sizes)[:-1], axis=1):
        y, cache = code(vae, piece, cache)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1)


def assert_close(a, b, peak=1e-5):
    assert a.shape == b.shape
    assert jnp.abs(a - b).max() <= peak * jnp.abs(b).max()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (2, 3)])
def test_decode_is_equal_for_every_split(vae, sizes):
    latents = noise(2, 5, 3, 5, Z)
    whole = in_calls(decode, vae, latents, [5])
    assert whole.shape == (2, 17, 12, 20, 3)
    assert_close(in_calls(decode, vae, latents, sizes), whole)


@pytest.mark.parametrize("sizes", [(1, 4, 4, 4), (5, 8)])
def test_encode_is_equal_for_every_split(vae, sizes):
    video = noise(2, 13, 12, 20, 3)
    whole = in_calls(encode, vae, video, [13])
    assert whole.shape == (2, 4, 3, 5, Z)
    assert_close(in_calls(encode, vae, video, sizes), whole)


def test_frames_do_not_know_of_later_latents(vae):
    latents = noise(2, 5, 3, 5, Z)
    changed = latents.at[:, 3:].add(1.0)
    frames, other = (decode(vae, z, None)[0] for z in (latents, changed))
    assert_close(other[:, :9], frames[:, :9])
    assert jnp.abs(other[:, 9:] - frames[:, 9:]).max() > 0.01


def test_rows_of_a_batch_do_not_know_of_each_other(vae):
    latents = noise(2, 5, 3, 5, Z)
    frames, _ = decode(vae, latents, None)
    swapped, _ = decode(vae, latents[::-1], None)
    assert_close(swapped[::-1], frames)


def test_call_leaves_the_given_cache_alone(vae):
    _, cache = decode(vae, noise(2, 1, 3, 5, Z), None)
    before = jax.tree.map(np.array, cache)
    first, after = decode(vae, noise(2, 1, 3, 5, Z, key=1), cache)
    again, _ = decode(vae, noise(2, 1, 3, 5, Z, key=1), cache)
    jax.tree.map(np.testing.assert_array_equal, before, cache)
    np.testing.assert_array_equal(first, again)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after, cache)), strict=True))


def test_a_second_video_begins_as_the_first_did(vae):
    latents = noise(2, 1, 3, 5, Z)
    first, cache = decode(vae, latents, None)
    decode(vae, noise(2, 1, 3, 5, Z, key=1), cache)
    second, _ = decode(vae, latents, None)
    np.testing.assert_array_equal(first, second)


def test_step_compiles_once_and_reuses_the_memory_of_its_cache(vae):
    step = jax.jit(lambda vae, z, cache: vae.decode(z, cache), donate_argnames="cache")
    latents = noise(2, 1, 3, 5, Z)
    _, cache = decode(vae, latents, None)
    for _ in range(3):
        given = cache
        _, cache = step(vae, latents, given)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert step._cache_size() == 1


@pytest.mark.parametrize("call", ["encode", "decode"])
def test_memory_does_not_grow_with_the_video(vae, call):
    code = getattr(VAE, call)
    x = noise(1, 1, 3, 5, Z) if call == "decode" else noise(1, 1, 12, 20, 3)
    _, cache = jax.eval_shape(lambda vae: code(vae, x), vae)

    def spare(frames):
        """Bytes of the call beside its arguments, its results and one copy of its input."""
        x_long = jnp.repeat(x, frames, axis=1)
        compiled = jax.jit(code).lower(vae, x_long, cache).compile()
        return compiled.memory_analysis().temp_size_in_bytes - x_long.nbytes

    assert spare(80) <= 1.02 * spare(8)


def test_gradient_reaches_every_weight_and_every_frame():
    cfg = VAEConfig(dim=4, dim_mult=(1, 2), res_blocks=1, time_down=(True,))
    vae = random(lambda: VAE(cfg, rngs=nnx.Rngs(0)))

    def loss(vae, video):
        latents, _ = vae.encode(video)
        frames, _ = vae.decode(latents)
        return jnp.mean(frames**2)

    grads, by_frame = jax.jit(jax.grad(loss, argnums=(0, 1)))(vae, noise(1, 5, 4, 4, 3))
    for path, grad in jax.tree.leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        assert jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0, name
    assert (jnp.abs(by_frame).max(axis=(0, 2, 3, 4)) > 0).all()


@pytest.mark.parametrize("coder", ["vae", "cells"])
def test_results_and_caches_take_the_dtype_of_the_input(coder, request):
    vae, latents = request.getfixturevalue(coder), noise(2, 5, 3, 5, Z)
    full, _ = decode(vae, latents, None)
    half, cache = decode(vae, latents.astype(jnp.bfloat16), None)
    assert {leaf.dtype for leaf in jax.tree.leaves((half, cache))} == {jnp.dtype(jnp.bfloat16)}
    assert_close(half.astype(jnp.float32), full, peak=0.05)


def test_normalise_and_denormalise_are_inverse():
    latents = noise(2, 3, 4, 5, Z)
    assert_close(normalise(denormalise(latents, SMALL), SMALL), latents)


@pytest.mark.parametrize("size", [(1, 1, 8, 10, 3), (1, 1, 12, 20, 4), (1, 3, 12, 20, 3)])
def test_video_of_a_wrong_size_is_refused(vae, size):
    with pytest.raises(LiveAvatarError, match=r"video (is|has)"):
        vae.encode(jnp.zeros(size))


def test_video_goes_on_in_groups_of_four_frames(vae):
    cache = jax.eval_shape(vae.encode, jnp.zeros((1, 1, 12, 20, 3)))[1]
    with pytest.raises(LiveAvatarError, match="video has 5 frames; give 4·k"):
        vae.encode(jnp.zeros((1, 5, 12, 20, 3)), cache)


@pytest.mark.parametrize("size", [(1, 0, 3, 5, Z), (1, 1, 3, 5, Z - 1)])
def test_latents_of_a_wrong_shape_are_refused(vae, size):
    with pytest.raises(LiveAvatarError, match="latents of shape"):
        vae.decode(jnp.zeros(size))


@pytest.mark.parametrize("size", [(2, 1, 3, 5, Z), (1, 1, 3, 6, Z)])
def test_cache_of_another_video_is_refused(vae, size):
    cache = jax.eval_shape(vae.decode, jnp.zeros((1, 1, 3, 5, Z)))[1]
    with pytest.raises(LiveAvatarError, match="the cache is of a decode call with batch 1, 3×5"):
        vae.decode(jnp.zeros(size), cache)


def test_cache_of_the_encoder_is_refused_by_the_decoder(vae):
    cache = jax.eval_shape(vae.encode, jnp.zeros((1, 1, 12, 20, 3)))[1]
    with pytest.raises(LiveAvatarError, match="3 channels"):
        vae.decode(jnp.zeros((1, 1, 12, 20, Z)), cache)


def test_cells_stream_as_the_published_form_does(cells):
    video, latents = noise(2, 9, 12, 20, 3), noise(2, 3, 3, 5, Z)
    whole = in_calls(encode, cells, video, [9])
    assert whole.shape == (2, 3, 3, 5, Z)
    assert_close(in_calls(encode, cells, video, (1, 4, 4)), whole)
    frames = in_calls(decode, cells, latents, [3])
    assert frames.shape == (2, 9, 12, 20, 3)
    assert_close(in_calls(decode, cells, latents, (1, 2)), frames)
    other = in_calls(decode, cells, latents.at[:, 2].add(1.0), [3])
    assert_close(other[:, :5], frames[:, :5])
    assert jnp.abs(other[:, 5:] - frames[:, 5:]).max() > 0.01


def test_cells_take_several_latents_at_once(cells):
    """As training does: the same as one after another."""
    video, latents = noise(2, 9, 12, 20, 3), noise(2, 3, 3, 5, Z)
    first, cache = cells.latents(video[:, :1], None)
    rest, _ = cells.latents(video[:, 1:], cache)
    assert_close(jnp.concatenate([first, rest], 1), in_calls(encode, cells, video, [9]))
    first, cache = cells.shown(latents[:, :1], None)
    rest, _ = cells.shown(latents[:, 1:], cache)
    assert_close(jnp.concatenate([first, rest], 1), in_calls(decode, cells, latents, [3]))


def test_a_latent_of_the_key_shows_the_key(cells):
    """Its very picture, whatever residuals have learnt; and a still one needs no search."""
    picture = jnp.tanh(noise(2, 12, 20, 3))
    still = cells.still(picture, 9)
    assert_close(still, in_calls(encode, cells, jnp.repeat(picture[:, None], 9, axis=1), [9]))
    frames, _ = cells.decode(still, cells.primed(still, picture))
    assert_close(frames, jnp.repeat(picture[:, None], 12, axis=1))
    frames, _ = cells.decode(still.at[:, 1].add(1.0), cells.primed(still, picture))
    assert jnp.abs(frames[:, 4:8] - picture[:, None]).max() > 0.1


def test_a_published_decoder_is_primed_by_what_it_shows(vae):
    latents = noise(1, 2, 3, 5, Z)
    same(vae.primed(latents), vae.decode(latents)[1])
    video = jnp.repeat(noise(1, 1, 12, 20, 3), 5, axis=1)
    assert_close(vae.still(video[:, 0], 5), vae.encode(video)[0])


def test_motion_moves_the_key(cells):
    """By its mean over four frames, here none, and by its growth from one to the next."""
    bare = jax.tree.map(jnp.zeros_like, cells)
    picture = jnp.tanh(noise(1, 12, 20, 3))
    flow = jnp.zeros((1, 1, 3, 5, Z)).at[..., 2].set(2 / 3)
    cache = bare.decoder.begin(jnp.zeros((1, 1, 3, 5, Z)), picture[:, None])
    frames, _ = bare.decoder(flow, cache)
    for frame, by in (frames[0, 0], -1), (frames[0, -1], 1):
        want = jnp.roll(picture[0], -by, axis=1)
        np.testing.assert_allclose(frame[:, 4:-4], want[:, 4:-4], atol=1e-5)
    motion = along_latents(by_frame(noise(1, 2, 3, 5, MOTION), 4), 4)
    np.testing.assert_allclose(motion, noise(1, 2, 3, 5, MOTION), atol=1e-5)


def test_a_head_does_not_jump_from_latent_to_latent():
    """What goes on evenly stays as it is, and so do the first latent and what a search may get
    wrong; what a later one begins apart from where the last one led is made good in four frames."""
    frame = jnp.arange(12, dtype=jnp.float32)[None, :, None, None, None]
    even = along_latents(0.5 * frame - 2.0 + jnp.zeros((1, 12, 3, 5, 2)), 4)
    none = jnp.zeros((1, 1, 3, 5, 3))
    there, led = joined(even, none, 4)
    np.testing.assert_allclose(there, by_frame(even, 4), atol=1e-5)
    np.testing.assert_allclose(led[..., :2], 0.5 * 11.5 - 2.0, atol=1e-5)
    beside = lambda by: joined(even.at[:, 1, ..., :2].add(by), none, 4)[0] - there
    np.testing.assert_allclose(beside(3.0 + SLACK)[:, :4], 0.0, atol=1e-5)
    apart = beside(3.0 + SLACK)[0, 4:, 0, 0, 0]
    faded = 3.0 * np.array([0.875, 0.625, 0.375, 0.125])
    np.testing.assert_allclose(apart, [*(3.0 + SLACK - faded), *faded], atol=1e-5)
    np.testing.assert_allclose(beside(SLACK)[0, 4:8], SLACK, atol=1e-5)


def test_cells_refuse_the_cache_of_another_video(cells):
    cache = jax.eval_shape(cells.decode, jnp.zeros((1, 1, 3, 5, Z)))[1]
    with pytest.raises(LiveAvatarError, match="the cache is of a decode call with batch 1, 3×5"):
        cells.decode(jnp.zeros((1, 1, 3, 6, Z)), cache)


def test_cells_know_pictures_of_one_size(cells):
    with pytest.raises(LiveAvatarError, match="video is 16×12 pixels; this VAE knows 20×12 alone"):
        cells.encode(jnp.zeros((1, 1, 12, 16, 3)))
    with pytest.raises(LiveAvatarError, match="cannot be decoded"):
        cells.decode(jnp.zeros((1, 1, 3, 4, Z)))


def test_without_residuals_cells_are_a_linear_coder_of_each_place(cells):
    """With all other weights zero, the maps of pixels and back are what remains, where nothing
    moves; of pictures and of what changes in them."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(3, 5, 192, Z - MOTION)))[0].astype(np.float32)
    maps = {"encoder.look.kernel": basis, "decoder.show.kernel": basis.swapaxes(2, 3)}
    maps = {path: jnp.asarray(array, jnp.float32) for path, array in maps.items()}
    bare = replace(cells, leaves(jax.tree.map(jnp.zeros_like, cells)) | maps)
    picture = noise(1, 12, 20, 3)
    latents = denormalise(bare.still(picture, 5), CELLS)
    here = np.repeat(np.asarray(picture)[0, None, 4:8, 12:16], 4, axis=0).reshape(192)
    own = basis[1, 3]
    np.testing.assert_allclose(latents[0, :, 1, 3, MOTION:], np.stack([here @ own] * 2), atol=1e-5)
    np.testing.assert_allclose(latents[..., :MOTION], 0.0, atol=1e-6)
    shown = lambda x, picture=None: bare.decode(
        normalise(x, CELLS), bare.primed(normalise(latents, CELLS), picture))[0]  # fmt: skip
    here = (own @ (own.T @ here)).reshape(4, 4, 4, 3)[-1:]
    np.testing.assert_allclose(shown(latents)[0, :4, 4:8, 12:16], here.repeat(4, axis=0), atol=1e-4)
    change = noise(Z - MOTION)
    frames = shown(latents.at[:, 1, 1, 3, MOTION:].add(change), picture)
    apart = np.asarray(frames - picture[:, None])[0, 4:, 4:8, 12:16]
    np.testing.assert_allclose(apart, (own @ change).reshape(4, 4, 4, 3), atol=1e-4)


def test_gradient_reaches_every_weight_of_cells(cells):
    """Of the decoder; that of the encoder's code as well, and its search needs none."""

    def loss(vae, video):
        first, cache = vae.latents(video[:, :1], None)
        latents, _ = vae.latents(video[:, 1:], cache)
        frames, cache = vae.shown(first, None)
        more, _ = vae.shown(latents, cache)
        return jnp.mean(frames**2) + jnp.mean(more**2)

    grads = jax.jit(jax.grad(loss))(cells, noise(1, 9, 12, 20, 3))
    for path, grad in leaves(grads).items():
        assert jnp.isfinite(grad).all() and jnp.abs(grad).max() > 0, path


def test_initial_weights_keep_the_scale_of_what_passes():
    conv = CausalConv(SMALL, 16, 24, rngs=nnx.Rngs(0))
    kernel, bias = conv.kernel[...], conv.bias[...]
    assert float(kernel.std()) == pytest.approx((27 * 16) ** -0.5, rel=0.05)
    assert not bias.any()


@pytest.mark.parametrize("wrong, words", [
    ({"z_dim": 8}, "latent_mean = .* have 8 entries, as z_dim = 8"),
    ({"dim_mult": (1, 2)}, "time_down = .* have 1 entries"),
    ({"cells": 0}, "cells = 0 must be None or at least 1"),
    ({"cells": 1, "z_dim": 4, "latent_mean": (0.0,) * 4, "latent_std": (1.0,) * 4}, "z_dim = 4"),
])  # fmt: skip
def test_a_config_that_does_not_fit_itself_is_refused(wrong, words):
    with pytest.raises(LiveAvatarError, match=words):
        VAEConfig.tiny(**wrong)


def test_a_file_names_its_config_and_fills_every_weight(vae):
    tensors = export(vae, VAE_RULES)
    assert vae_config(tensors) == SMALL
    loaded = load(jax.eval_shape(lambda: vae), tensors, VAE_RULES, where="here")
    same(loaded, vae)


def test_a_foreign_file_is_refused():
    with pytest.raises(LiveAvatarError, match=r"no tensor 'encoder\.conv1\.weight'"):
        vae_config({"blocks.0.weight": np.zeros(3)})


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [3, 1])
def test_3d_convolution_by_taps_is_the_plain_one(frames, window):
    x, kernel = noise(2, frames + 2, 5, 7, 6), noise(3, window, window, 6, 8, key=1)
    pad = ((0, 0), (window // 2,) * 2, (window // 2,) * 2)
    plain = jax.lax.conv_general_dilated(
        x, kernel, (1, 1, 1), pad, dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
    )
    assert_close(conv3d(x, kernel), plain, peak=1e-6)


@pytest.mark.parametrize("platform, ranks", [("cpu", {4}), ("tpu", {5}), ("cuda", {5})])
def test_each_platform_gets_its_own_3d_convolution(platform, ranks):
    args = noise(1, 4, 4, 4, 2), noise(3, 3, 3, 2, 2)
    text = jax.jit(conv3d).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    lines = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert {line.split("-> tensor<")[1].count("x") for line in lines} == ranks


def test_convolution_of_a_doubled_picture_is_that_of_the_large_one():
    x, kernel = noise(2, 3, 5, 7, 6), noise(3, 3, 6, 4, key=1)
    large = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
    assert_close(conv2d_doubled(x, kernel), conv2d(large, kernel), peak=1e-6)
