import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax.config import SpeechConfig
from liveavatar_jax.data import speech
from liveavatar_jax.data.speech import Listener, Moments, SpeechWindow, feed, file_features, listen
from liveavatar_jax.models.speech import SpeechEncoder, window_features
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.encoders import SPEECH_RULES, speech_config
from liveavatar_jax.weights.rules import export, load

from .networks import random, same

TINY = SpeechConfig.tiny(layers=3)
SMALL = SpeechWindow(left=9600, ahead=3200)  # 0.6 s before and 0.2 s after a block of 0.48 s


@pytest.fixture(scope="module")
def encoder():
    return random(lambda: SpeechEncoder(TINY, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def encode(encoder):
    return partial(jax.jit(window_features), encoder)


@pytest.fixture(scope="module")
def run():
    return jax.jit(lambda m, x, heard=None: m(x, heard))


def voice(samples, seed=0):
    """Noise that swells and fades like syllables."""
    noise = np.random.default_rng(seed).normal(size=samples)
    swell = 0.55 + 0.45 * np.sin(np.arange(samples) * 2 * np.pi * 4 / 16000 + seed)
    return (0.1 * swell * noise + 0.01).astype(np.float32)


def whole(encoder, run, waveform):
    """The published way: the recording in one piece."""
    states = run(encoder, jnp.asarray(speech.normalise(waveform))[None])
    return np.asarray(speech.video_features(states))[0]


def pieces(waveform, seed):
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(waveform), 20))
    return np.split(waveform, cuts)


def listened(encode, chunks, listener):
    given = []
    for chunk in chunks:
        listener = feed(listener, chunk)
        while True:
            features, listener = listen(encode, listener)
            if features is None:
                break
            given.append(np.asarray(features))
    return np.concatenate(given), listener


# The network


@pytest.mark.parametrize("samples", [0, 160, 399, 400, 719, 720, 16000])
def test_every_length_makes_its_number_of_frames(encoder, samples):
    states = jax.eval_shape(encoder, jnp.zeros((1, samples)))
    assert states.shape == (1, speech.speech_frames(samples), TINY.layers + 1, TINY.dim)
    assert encoder.frames(samples) == states.shape[1]
    assert encoder.hop() == speech.STEP


def test_what_is_not_heard_might_as_well_not_be_there(encoder, run):
    x = jnp.asarray(voice(12000))[None]
    heard = (jnp.arange(encoder.frames(12000)) >= 6)[None]
    masked = run(encoder, x.at[:, : 6 * 320].set(9.0), heard)[:, 6:]
    np.testing.assert_allclose(masked, run(encoder, x[:, 6 * 320 :]), rtol=1e-4, atol=1e-4)


def test_the_states_are_the_inputs_of_the_layers_and_the_normed_output(encoder, run):
    states = run(encoder, jnp.asarray(voice(4000))[None])
    everything = jnp.ones(states.shape[:2], bool)
    step = jax.jit(lambda m, i, x: jax.tree.map(lambda w: w[i], m.layers)(x, everything))
    for i in range(TINY.layers):
        y = step(encoder, i, states[:, :, i])
        got = y if i + 1 < TINY.layers else encoder.norm(y)
        np.testing.assert_allclose(got, states[:, :, i + 1], rtol=1e-4, atol=1e-4)


def test_positional_kernel_has_the_gain_of_its_tap(encoder):
    conv = encoder.pos_conv
    norms = jnp.sqrt(jnp.sum(conv.kernel() ** 2, axis=(1, 2)))
    np.testing.assert_allclose(norms, conv.g[...], rtol=1e-5)


def test_dtype_follows_the_weights_unless_told(encoder, run):
    x = jnp.asarray(speech.normalise(voice(8000)))[None]
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), encoder)
    rough, plain = run(half, x), run(encoder, x)
    told = jax.eval_shape(lambda m, x: m(x, dtype="float32"), half, x)
    assert (rough.dtype, plain.dtype, told.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    assert jnp.abs(rough.astype(jnp.float32) - plain).max() < 0.1 * jnp.abs(plain).max()


def test_export_undoes_import(encoder):
    published = export(encoder, SPEECH_RULES)
    assert "wav2vec2.encoder.pos_conv_embed.conv.weight_g" in published
    abstract = jax.eval_shape(lambda: SpeechEncoder(TINY, rngs=nnx.Rngs(0)))
    back = load(abstract, published, SPEECH_RULES, where="here")
    same(back, encoder)


def test_speech_encoders_of_another_kind_are_refused():
    with pytest.raises(LiveAvatarError, match=r"config\.json lacks 'feat_extract_norm'"):
        speech_config({}, "config.json")
    base = dict(feat_extract_norm="group", conv_bias=False, do_stable_layer_norm=False)
    sizes = "hidden_size intermediate_size num_attention_heads num_hidden_layers conv_dim"
    sizes += " num_conv_pos_embeddings num_conv_pos_embedding_groups conv_kernel conv_stride"
    with pytest.raises(LiveAvatarError, match=r"feat_extract_norm = 'group'.*xlsr-53"):
        speech_config(base | dict.fromkeys(sizes.split()), "config.json")
    with pytest.raises(LiveAvatarError, match="must divide by heads"):
        SpeechEncoder(dataclasses.replace(TINY, heads=5), rngs=nnx.Rngs(0))


# Video rate


def test_features_beyond_the_end_are_zero(encoder, run):
    features = whole(encoder, run, voice(33333))
    assert len(features) == 96  # two clips, of which 61 rows at 30 Hz fill 51 frames
    sounding = np.abs(features).max(axis=(1, 2)) > 0
    assert sounding.tolist() == [True] * 51 + [False] * 45


@pytest.mark.parametrize("samples", [0, 1, 160, 399, 400])
def test_a_blink_of_audio_becomes_one_clip_of_zeros(encoder, run, encode, samples):
    want = whole(encoder, run, voice(samples))
    assert want.shape == (48, TINY.layers + 1, TINY.dim) and (want == 0).all()
    chunks = [voice(samples)]
    got = list(file_features(encode, chunks, Moments.of(chunks), SMALL))
    np.testing.assert_array_equal(np.concatenate(got), want)


def test_one_row_at_30_hz_is_the_first_speech_frame(encoder, run):
    waveform = voice(720)  # two speech frames, one row
    states = run(encoder, jnp.asarray(speech.normalise(waveform))[None])
    np.testing.assert_array_equal(speech.video_features(states)[0, 0], states[0, 0])


def test_silence_is_finite(encoder, run, encode):
    waveform = np.zeros(20000, np.float32)
    assert np.isfinite(whole(encoder, run, waveform)).all()
    features, listener = listened(encode, [waveform], Listener.start(SMALL))
    assert np.isfinite(features).all()
    assert listener.moments == Moments.prior()  # a pause does not make the next word loud


def test_positions_stay_exact_however_long_the_recording():
    day = 24 * 3600 * 25
    for total in (None, speech.speech_frames(day * 640)):
        low, high, weight, sounding = speech._positions(day - np.arange(1000, 2000), total)
        assert sounding.all() and (high == low + 1).all()
        at = low + weight.astype(np.float64)
        spacing = -np.diff(at)
        assert ((spacing > 1.6) & (spacing < 3.4)).all()  # one or two rows of 5/3 frames
        assert np.abs(at - 2 * (day - np.arange(1000, 2000))).max() < 3


def test_live_positions_fall_behind_published_ones_by_seven_thirds_of_a_frame_at_most():
    for total in range(10, 4000, 7):
        rows = np.arange(12 * 4 * speech.clip_count(speech.resampled_frames(total)))
        low, _, weight, sounding = speech._positions(rows, total)
        live, _, fraction, _ = speech._positions(rows, None)
        apart = (low + weight) - (live + fraction)
        assert -1e-6 < apart[sounding].min() and apart[sounding].max() < 7 / 3 + 1e-6


@pytest.mark.parametrize("hop", [1, 3])
def test_every_frame_asked_for_lies_inside_the_window(hop):
    tight = SpeechWindow(left=320, ahead=1040, hop=hop)
    for total in (*range(0, 400), 5000, 7777, None):
        blocks = 60 if total is None else 4 * speech.clip_count(speech.resampled_frames(total))
        for i in range(-(-blocks // hop)):
            asked, first = tight.ask(i, Moments(), total), tight.first(i, total)
            low, high, _, sounding = speech._positions(np.arange(12 * hop) + 12 * hop * i, total)
            for ours, absolute in ((asked.low, low), (asked.high, high)):
                assert (0 <= ours).all() and (ours < tight.frames).all()
                assert (ours + first == absolute)[sounding].all()
                assert asked.heard[ours][sounding].all()


# Moments


def test_moments_do_not_depend_on_the_cutting():
    waveform = voice(50000)
    once, often = Moments.of([waveform]), Moments.of(pieces(waveform, 3))
    assert once.count == often.count == 50000
    np.testing.assert_allclose(once.mean, waveform.astype(np.float64).mean(), rtol=1e-12)
    np.testing.assert_allclose(
        [often.mean, often.std], [once.mean, waveform.astype(np.float64).std()], rtol=1e-4
    )
    np.testing.assert_allclose([often.mean, often.std], [once.mean, once.std], rtol=1e-12)


def test_moments_hold_a_small_variance_beside_a_large_mean():
    waveform = 1000 + np.random.default_rng(0).normal(size=(100, 1000)) * 1e-2
    np.testing.assert_allclose(Moments.of(waveform).deviation / 1e5, waveform.var(), rtol=1e-6)


# Windows


@pytest.mark.parametrize("samples", [1000, 9600, 20000, 27200])
def test_a_window_that_holds_the_file_gives_the_published_features(encoder, run, encode, samples):
    waveform = voice(samples)
    window = SpeechWindow(left=16320, ahead=3200)
    assert window.samples == 27200
    chunks = pieces(waveform, 1)
    got = np.concatenate(list(file_features(encode, chunks, Moments.of(chunks), window)))
    want = whole(encoder, run, waveform)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_file_is_heard_alike_in_any_pieces(encode):
    waveform = voice(60000)
    moments = Moments.of([waveform])
    once = np.concatenate(list(file_features(encode, [waveform], moments, SMALL)))
    often = np.concatenate(list(file_features(encode, pieces(waveform, 5), moments, SMALL)))
    assert len(once) == 12 * speech.block_count(60000)
    np.testing.assert_array_equal(once, often)


def test_a_stream_is_heard_alike_in_any_pieces(encode):
    waveform = voice(60000)
    once, _ = listened(encode, [waveform], Listener.start(SMALL))
    often, _ = listened(encode, pieces(waveform, 5), Listener.start(SMALL))
    assert len(once) == 12 * ((60000 - SMALL.ahead) // 7680)
    np.testing.assert_array_equal(once, often)


def test_the_first_state_is_exact_where_the_window_holds_all_taps(encoder, run, encode):
    """The positional convolution reaches 64 frames each way; attention comes only after it."""
    waveform = voice(90000)
    window = SpeechWindow(left=20800, ahead=24000)
    chunks = [waveform]
    got = np.concatenate(list(file_features(encode, chunks, Moments.of(chunks), window)))
    want = whole(encoder, run, waveform)
    assert window.samples < 90000
    np.testing.assert_allclose(got[:, 0], want[:, 0], rtol=1e-4, atol=1e-4)
    assert np.abs(got[:, -1] - want[:, -1]).max() > 1e-2


def test_longer_hops_ask_for_the_same_frames(encoder, encode):
    waveform = voice(45000)
    chunks, moments = [waveform], Moments.of([waveform])
    # both windows hold the whole file, so only the asking differs
    one = SpeechWindow(left=35200, ahead=3200, hop=1)
    three = SpeechWindow(left=22400, ahead=3200, hop=3)
    got = [np.concatenate(list(file_features(encode, chunks, moments, w))) for w in (one, three)]
    assert one.samples >= 45000 and three.samples >= 45000
    np.testing.assert_allclose(got[0], got[1], rtol=1e-4, atol=1e-4)


def test_a_stream_equals_a_file_where_both_see_the_same(encode, encoder, run):
    """The first blocks of a stream, with the file's moments, against a file that ends there."""
    waveform = voice(9600 + 7680 + 3200)
    fixed = Moments.of([waveform])
    listener = Listener.start(SMALL, moments=fixed, adapt=False)
    stream, listener = listened(encode, [waveform], listener)
    assert listener.moments == fixed
    asked = SMALL.ask(1, fixed)  # the hop whose window begins 1920 samples before the recording
    window = np.pad(waveform, (1920, 0))[: SMALL.samples]
    np.testing.assert_array_equal(stream[12:24], encode(window[None], asked)[0])
    cut = waveform[: SMALL.samples - 1920]
    states = run(encoder, jnp.asarray((cut - fixed.mean) / fixed.std, jnp.float32)[None])
    low, high, weight, _ = speech._positions(np.arange(12, 24), None)
    weight = weight[:, None, None]
    want = (1 - weight) * np.asarray(states[0])[low] + weight * np.asarray(states[0])[high]
    np.testing.assert_allclose(stream[12:24], want, rtol=1e-4, atol=1e-4)


def test_a_stream_knows_nothing_of_what_comes_after_its_look_ahead(encode):
    waveform = voice(40000)
    later = waveform.copy()
    later[7680 * 2 + SMALL.ahead :] = 0.7
    first, _ = listened(encode, [waveform], Listener.start(SMALL))
    second, _ = listened(encode, [later], Listener.start(SMALL))
    np.testing.assert_array_equal(first[:24], second[:24])
    assert np.abs(first[24:] - second[24:]).max() > 0.1


def test_a_listener_is_left_alone_by_feeding_and_listening(encode):
    listener = feed(Listener.start(SMALL), voice(30000))
    before = dataclasses.replace(listener, samples=listener.samples.copy())
    one, after = listen(encode, listener)
    two, _ = listen(encode, listener)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(listener.samples, before.samples)
    assert (listener.hop, after.hop) == (0, 1) and listener.moments == before.moments


def test_moments_of_a_stream_count_each_sample_once(encode):
    waveform = voice(7680 * 4 + SMALL.ahead)
    nothing = Moments()
    _, listener = listened(encode, pieces(waveform, 2), Listener.start(SMALL, moments=nothing))
    np.testing.assert_allclose(listener.moments.std, Moments.of([waveform]).std, rtol=1e-9)
    assert listener.moments.count == len(waveform)


def test_memory_of_a_stream_and_of_a_file_does_not_grow():
    held = []

    def encode(samples, hop):
        held.append(samples.nbytes)
        return np.zeros((1, len(hop.low), 1, 1), np.float32)

    listener = Listener.start(SMALL)
    for _ in range(400):
        listener = feed(listener, np.zeros(1600, np.float32))
        while (result := listen(encode, listener))[0] is not None:
            listener = result[1]
        assert len(listener.samples) < SMALL.samples + 1600
        assert listener.samples.base is None or len(listener.samples.base) < 2 * SMALL.samples
    reading = {"read": 0, "most": 0, "given": 0}

    def chunks():
        for _ in range(400):
            reading["read"] += 1600
            ahead = reading["read"] - 7680 * reading["given"]
            reading["most"] = max(reading["most"], ahead)
            yield np.zeros(1600, np.float32)

    for _ in file_features(encode, chunks(), Moments(400 * 1600), SMALL):
        reading["given"] += 1
    assert reading["most"] < SMALL.samples + 7680 + 1600
    assert set(held) == {4 * SMALL.samples}


def test_streams_and_files_compile_once(encoder):
    compiled = jax.jit(lambda *given: window_features(*given))
    encode = partial(compiled, encoder)
    for samples in (300, 20000, 60000):
        chunks = pieces(voice(samples), 1)
        for _ in file_features(encode, chunks, Moments.of(chunks), SMALL):
            pass
    listened(encode, chunks, Listener.start(SMALL))
    assert compiled._cache_size() == 1


def test_a_recording_that_ends_early_is_refused(encode):
    waveform = voice(30000)
    with pytest.raises(LiveAvatarError, match=r"ended after 20000 of 30000 samples"):
        list(file_features(encode, [waveform[:20000]], Moments.of([waveform]), SMALL))


@pytest.mark.parametrize(
    "field, value", [("left", 100), ("left", -320), ("ahead", 900), ("hop", 0)]
)
def test_windows_that_cannot_work_are_refused(field, value):
    with pytest.raises(LiveAvatarError, match=f"SpeechWindow.{field} = {value} "):
        SpeechWindow(**{field: value})
