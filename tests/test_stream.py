"""Laws of the stream, on a network of a few thousand weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax import stream
from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig
from liveavatar_jax.models.attention import KVCache
from liveavatar_jax.types import LiveAvatarError

from .networks import random

SIDE = 64
DIT = DiTConfig.tiny(dim=32, ffn_dim=48, heads=2, layers=2, inject_layers=(1,), audio_layers=3)
NET = ModelConfig.tiny(dit=DIT)
FIXED = StreamConfig(dtype="float32", distance=20)


@functools.cache
def weights() -> stream.Avatar:
    cfg = dataclasses.replace(NET, stream=FIXED)
    return random(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0)))


def avatar(**changes) -> stream.Avatar:
    abstract = dataclasses.replace(NET, stream=dataclasses.replace(FIXED, **changes))
    made = jax.eval_shape(lambda: stream.Avatar(abstract, rngs=nnx.Rngs(0)))
    return jax.tree.unflatten(jax.tree.structure(made), jax.tree.leaves(weights()))


def chunk(i: int, speakers: int = 1) -> stream.Chunk:
    shape = (1, speakers, 12, DIT.audio_layers, DIT.audio_dim)
    return stream.Chunk(audio=jax.random.normal(jax.random.key(100 + i), shape))


@functools.cache
def portrait() -> stream.Portrait:
    picture = jnp.sin(jnp.arange(SIDE * SIDE * 3.0)).reshape(1, SIDE, SIDE, 3)
    return jax.jit(stream.encode_portrait)(weights(), picture)


start = jax.jit(stream.start, static_argnames="position")


@jax.jit
def denoise(model, state, drawn, chunk):
    state, flight = stream.denoise(model, state, drawn, chunk)
    return state, flight.x


step = jax.jit(stream.step, donate_argnums=1)
prefill = jax.jit(lambda dit, *given: dit.prefill(*given))


@jax.jit
def forward_at(dit, level, x, audio, state: stream.StreamState, distance):
    """One forward of the first cache, with every frame at one level."""
    return dit.denoise(
        x,
        dit.level(jnp.full((1, 3), level)),
        state.cache,
        state.text,
        dit.audio(jnp.concatenate([jnp.repeat(audio[:, :, :1], 5, axis=2), audio], axis=2)),
        step=0,
        block=state.block,
        position=state.position,
        distance=distance,
        speakers=state.speakers,
    )


def started(model: stream.Avatar, seed: int = 0, **options) -> stream.StreamState:
    context = jax.random.normal(jax.random.key(7), (1, 5, DIT.text_dim))
    return start(model, copied(portrait()), context, jax.random.key(seed), **options)


def copied(tree):
    """For steps that donate their state."""
    return jax.tree.map(jnp.copy, tree)


def roll(model: stream.Avatar, state: stream.StreamState, blocks: int, draws=None):
    """Latents of some blocks. `draws` replaces the state's own random numbers."""
    out = []
    for i in range(blocks):
        drawn = draws[i] if draws else stream.draw(model, state)
        state, x = denoise(model, state, drawn, chunk(i))
        out.append(x)
    return jnp.stack(out), state


def close(a, b, tolerance=2e-5):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.isfinite(a).all()
    assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def differ(a, b):
    assert np.abs(np.asarray(a) - np.asarray(b)).max() > 1e-3 * np.abs(np.asarray(b)).max()


def test_a_step_keeps_the_state_s_shape_and_compiles_once():
    model = avatar()
    state = started(model)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    before = step._cache_size()
    for i in range(6):
        state, frames = step(model, state, chunk(i))
        assert frames.shape == (1, 12, SIDE, SIDE, 3)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes
    assert step._cache_size() == before + 1
    assert (state.block.tolist(), state.position.tolist()) == ([6], [18])
    assert np.isfinite(frames).all() and np.abs(frames).max() <= 1


def test_a_step_is_its_three_parts():
    model = avatar()
    state = started(model)
    _, flight = jax.jit(stream.denoise)(model, state, stream.draw(model, state), chunk(0))
    _, ours = jax.jit(stream.decode)(model.vae, state.decoder, flight.x, flight.live)
    _, whole = step(model, state, chunk(0))
    close(ours, whole)


def test_the_same_seed_gives_the_same_video_and_another_seed_another():
    model = avatar(distance=(4, 30))
    one, _ = roll(model, started(model), 2)
    same, _ = roll(model, started(model), 2)
    other, _ = roll(model, started(model, seed=1), 2)
    np.testing.assert_array_equal(one, same)
    differ(one, other)


def test_nothing_of_one_video_leaks_into_the_next():
    """The released decoder keeps its state: a second video starts with the first one's."""
    model = avatar()
    videos = []
    for _ in range(2):
        state, video = started(model), []
        for i in range(2):
            state, frames = step(model, state, chunk(i))
            video.append(np.asarray(frames))
        videos.append(video)
    np.testing.assert_array_equal(*videos)


@pytest.mark.parametrize("far", [45_000, 62_500 * 3, 300_000_000])
def test_far_positions_are_as_good_as_near_ones(far):
    """The released position table ends after 7,195 s. Attention is relative, so a stream of
    rolling parts only must not notice where in the video it is: 10,000 s and far beyond."""
    model = avatar(motion=False, sink_after=None)
    near = started(model, position=300)
    draws = [
        stream.draw(model, dataclasses.replace(near, block=jnp.full(1, i, jnp.int32)))
        for i in range(5)
    ]
    want, _ = roll(model, near, 5, draws)
    ours, state = roll(model, started(model, position=300 + far), 5, draws)
    assert state.position.tolist() == [315 + far]
    close(ours, want, 5e-5)


@pytest.mark.parametrize("block, seen", [(0, []), (2, [0, 1]), (4, [1, 2, 3]), (6, [0, 1, 3])])
def test_a_block_sees_the_three_before_it_and_nothing_else(block, seen):
    """Slot `block % 4` is that of the oldest block and is overwritten before it is attended to."""
    model = avatar(sink_after=None)
    state = dataclasses.replace(started(model), block=jnp.full(1, block, jnp.int32))
    drawn = stream.draw(model, state)
    _, want = denoise(model, state, drawn, chunk(0))
    for slot in range(FIXED.ring_blocks):
        at = (..., slice(48 * slot, 48 * slot + 48), slice(None))
        ring = jax.tree.map(lambda a, at=at: a.at[at].add(1.0), state.cache.ring)
        other = dataclasses.replace(state, cache=KVCache(ring=ring, sink=state.cache.sink))
        _, x = denoise(model, other, drawn, chunk(0))
        differ(x, want) if slot in seen else np.testing.assert_array_equal(x, want)


def test_a_block_number_of_years_is_as_good_as_a_small_one():
    """Counted in tokens it would overflow: after four days at the published size."""
    model = avatar(motion=False, sink_after=None, distance=30)
    state = started(model, position=300)
    drawn = stream.draw(model, state)
    ring = jax.tree.map(lambda a: a + 1.0, state.cache.ring)
    cache = KVCache(ring=ring, sink=state.cache.sink)
    latents = []
    for block in (8, 50_000_000):
        at = dataclasses.replace(state, cache=cache, block=jnp.full(1, block, jnp.int32))
        latents.append(denoise(model, at, drawn, chunk(0))[1])
    np.testing.assert_array_equal(*latents)


def test_each_step_remembers_its_own_level():
    model = avatar()
    _, state = roll(model, started(model), 1)
    k = state.cache.ring.k
    for i in range(FIXED.steps):
        for j in range(i):
            differ(k[i], k[j])


@pytest.mark.parametrize("level", [0.0, 0.557])
def test_history_at_a_fixed_level_is_a_forward_at_that_level(level):
    model = avatar(history=level)
    state = started(model)
    drawn = stream.draw(model, state)
    after, x = denoise(model, state, drawn, chunk(0))
    assert len(after.cache.ring.k) == 1
    again = (1 - level) * x + level * drawn.renoise
    _, fresh = forward_at(model.dit, level, again, chunk(0).audio, state, drawn.distance[:, -1])
    close(after.cache.ring.k[0][..., :48, :], fresh.k)
    close(after.cache.ring.v[0][..., :48, :], fresh.v)
    own, _ = roll(avatar(), started(avatar()), 2)
    fixed, _ = roll(model, started(model), 2)
    close(own[0], fixed[0])  # the first block has no history
    differ(own[1], fixed[1])


@pytest.mark.parametrize("after", [1, 4])
def test_the_sink_becomes_our_own_first_frame(after):
    model, static = avatar(sink_after=after), avatar(sink_after=None)
    ours, state = roll(model, started(model), after + 1)
    want, kept = roll(static, started(static), after + 1)
    close(ours[:after], want[:after])
    differ(ours[after], want[after])
    first = ours[0][:, :1]
    sink = prefill(model.dit, first, state.motion, state.text)
    close(state.cache.sink.k, sink.k)
    differ(kept.cache.sink.k, state.cache.sink.k)


def test_true_audio_past_hears_the_block_before():
    def second_block(model, past):
        state, _ = denoise(model, started(model), draws[0], past)
        return denoise(model, state, draws[1], chunk(1))[0].cache.ring.k[:, 0]

    for past, hears in (("true", True), ("repeat", False)):
        model = avatar(audio_past=past)
        state = started(model)
        draws = [
            stream.draw(model, dataclasses.replace(state, block=jnp.full(1, i, jnp.int32)))
            for i in (0, 1)
        ]
        state, _ = denoise(model, state, draws[0], chunk(0))
        other = state if state.past is None else dataclasses.replace(state, past=state.past + 1)
        _, x = denoise(model, state, draws[1], chunk(1))
        _, y = denoise(model, other, draws[1], chunk(1))
        assert (state.past is not None) == hears
        (differ if hears else close)(x, y)


@pytest.mark.parametrize("steps", [1, 3])
def test_fewer_steps(steps):
    model = avatar(steps=steps)
    x, state = roll(model, started(model), 2)
    assert len(state.cache.ring.k) == steps and np.isfinite(x).all()


def test_a_random_sink_distance_is_drawn_per_forward_within_its_range():
    model = avatar(distance=(4, 30))
    state = started(model)
    drawn = np.concatenate([
        stream.draw(model, dataclasses.replace(state, block=jnp.full(1, i, jnp.int32))).distance
        for i in range(60)
    ])  # fmt: skip
    assert drawn.min() == 4 and drawn.max() == 30 and len(np.unique(drawn)) > 20
    assert (np.asarray(stream.draw(avatar(), state).distance) == 20).all()


def test_a_sink_that_does_not_roll_is_left_behind():
    """Rolling, it keeps its distance, and a block is the same wherever in the video it is."""
    for distance, same in ((20, close), (None, differ)):
        model = avatar(distance=distance, motion=False)
        near, far = (roll(model, started(model, position=at), 1)[0] for at in (100, 200))
        same(near, far)


def test_the_portrait_stands_in_for_a_pose():
    """As a pose video in which it stands still would, also once the sink is our own frame."""
    model, plain = avatar(pose="portrait", sink_after=1), avatar(sink_after=1)
    state, other = started(model), started(plain)
    assert other.portrait is None
    for at in range(3):
        drawn = stream.draw(model, state)
        shown = dataclasses.replace(chunk(at), pose=jnp.repeat(state.portrait, 3, axis=1))
        state, x = denoise(model, state, drawn, chunk(at))
        _, z = denoise(plain, other, drawn, chunk(at))
        other, y = denoise(plain, other, drawn, shown)
        close(x, y)
        differ(x, z)


def test_two_speakers_are_heard_where_their_masks_are():
    model = avatar()
    left = jnp.tile(jnp.asarray([1.0, 1.0, 0.0, 0.0]), 4)
    state = started(model, speakers=jnp.stack([left, 1 - left])[None])
    drawn, both = stream.draw(model, state), chunk(0, speakers=2)
    _, x = denoise(model, state, drawn, both)
    louder = dataclasses.replace(both, audio=both.audio.at[:, 1].add(1.0))
    _, y = denoise(model, state, drawn, louder)
    differ(x, y)
    alone = dataclasses.replace(state, speakers=state.speakers.at[:, 1].set(0.0))
    _, x = denoise(model, alone, drawn, both)
    _, y = denoise(model, alone, drawn, louder)
    np.testing.assert_array_equal(x, y)


def test_bfloat16_stays_near_float32():
    """Measured: 0.0074 of the peak over twelve blocks; the bound is 0.025."""
    model = avatar()
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), avatar(dtype="bfloat16"))
    ours, _ = roll(half, started(half), 12)
    want, _ = roll(model, started(model), 12)
    assert ours.dtype == jnp.bfloat16
    error = np.abs(np.asarray(ours, np.float32) - want).max() / np.abs(want).max()
    assert 1e-4 < error < 0.025


def test_a_ring_that_does_not_hold_whole_blocks_is_refused():
    model = avatar()
    state = started(model)
    cut = jax.tree.map(lambda a: a[..., :100, :], state.cache.ring)
    state = dataclasses.replace(state, cache=KVCache(ring=cut, sink=state.cache.sink))
    with pytest.raises(LiveAvatarError, match="cannot hold whole blocks"):
        jax.eval_shape(stream.denoise, model, state, stream.draw(model, state), chunk(0))


def test_a_condition_cache_of_any_size_fits():
    """The released one holds 3,000 tokens, and overflows above 704x384."""
    model = avatar()
    big = jax.ShapeDtypeStruct((1, 160, 160, 16), jnp.float32)

    def sink(reference):
        motion = jnp.repeat(reference, 19, axis=1)
        return model.dit.prefill(reference, motion, model.dit.text(jnp.zeros((1, 1, 48))))

    shape = jax.eval_shape(sink, jax.ShapeDtypeStruct((1, *big.shape), jnp.float32)).k.shape
    assert shape[3] == 6400 + 6400 + 1600 + 1600


def test_a_float32_picture_opens_a_bfloat16_stream():
    """Nobody casts pictures by hand; the frames of the decoder's cache must fit its latents."""
    model = jax.tree.map(lambda w: w.astype(jnp.bfloat16), avatar(dtype="bfloat16"))
    picture = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)

    def first(picture):
        portrait = stream.encode_portrait(model, picture)
        state = stream.start(model, portrait, jnp.zeros((1, 1, DIT.text_dim)), jax.random.key(0))
        pose = jnp.zeros((1, 3, SIDE // 8, SIDE // 8, 16))
        return stream.step(model, state, dataclasses.replace(chunk(0), pose=pose))[1]

    assert jax.eval_shape(first, picture).dtype == jnp.bfloat16


def test_what_does_not_fit_is_one_clear_sentence():
    model = avatar()
    state, context = started(model), jnp.zeros((1, 5, DIT.text_dim))
    key, given = jax.random.key(0), portrait()

    def refuses(words, function, *args, **options):
        with pytest.raises(LiveAvatarError, match=words):
            jax.eval_shape(lambda *args: function(model, *args, **options), *args)

    refuses("multiples of 16 pixels", stream.encode_portrait, jnp.zeros((1, 72, 64, 3)))
    refuses("text of 17 rows", stream.start, given, jnp.zeros((1, 17, DIT.text_dim)), key)
    refuses("of width 3 does not fit", stream.start, given, jnp.zeros((1, 5, 3)), key)
    masks = jnp.ones((1, 2, 9))
    refuses("the 4 x 4 patches", stream.start, given, context, key, speakers=masks)
    drawn, said = stream.draw(model, state), chunk(0).audio
    refuses("chunk.audio", stream.denoise, state, drawn, chunk(0, speakers=2))
    refuses("chunk.audio", stream.denoise, state, drawn, stream.Chunk(audio=said[:, :, :8]))
    posed = dataclasses.replace(chunk(0), pose=jnp.zeros((1, 1, 8, 8, 16)))
    refuses("chunk.pose", stream.denoise, state, drawn, posed)
