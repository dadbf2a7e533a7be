import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.config import DiTConfig, MelConfig, ModelConfig, from_dict, to_dict
from liveavatar_jax.data import speech
from liveavatar_jax.models.mel import log_mel
from liveavatar_jax.types import LiveAvatarError

MEL = MelConfig()
FLAT = MelConfig(bins=40, layers=16, ahead=12, flat=True)
FRAME = 640  # samples of a video frame


def padded(waveform, cfg=MEL):
    return jnp.asarray(np.pad(waveform, (cfg.past, cfg.future)).astype(np.float32))[None]


def tone(hertz, samples=FRAME * 20, loudness=1.0):
    return loudness * np.sin(2 * np.pi * hertz * np.arange(samples) / 16000)


def test_the_default_has_the_shape_of_a_small_models_audio():
    small = DiTConfig.tiny()
    features = jax.eval_shape(lambda x: log_mel(x, MEL), padded(tone(440)))
    assert features.shape == (1, 20, small.audio_layers, small.audio_dim)


def test_any_cutting_into_windows_gives_equal_features():
    waveform = np.random.default_rng(0).normal(size=FRAME * 36) * 0.1
    whole = log_mel(padded(waveform), MEL)
    step = jax.jit(lambda x: log_mel(x, MEL))
    x = padded(waveform)
    hops = [x[:, at : at + MEL.past + 12 * FRAME + MEL.future] for at in range(0, 36 * FRAME, 7680)]
    np.testing.assert_allclose(
        jnp.concatenate([step(hop) for hop in hops], axis=1), whole, rtol=1e-4, atol=1e-4
    )
    assert step._cache_size() == 1


@pytest.mark.parametrize("cfg", [MEL, FLAT], ids=["layers", "flat"])
def test_files_and_streams_give_the_same_features_in_any_pieces(cfg):
    waveform = (np.random.default_rng(0).normal(size=50000) * 0.1).astype(np.float32)
    blocks = speech.block_count(len(waveform))
    silent = np.zeros(12 * FRAME * blocks - len(waveform) + 7680, np.float32)
    want = log_mel(padded(np.concatenate([waveform, silent]), cfg), cfg)[0, : 12 * blocks]
    moments = speech.Moments.of([waveform])
    for hop in (1, 3):
        window = speech.mel_window(cfg, hop)
        encode = jax.jit(speech.mel_encode(cfg, window))
        chunks = np.array_split(waveform, 13)
        file = np.concatenate(list(speech.file_features(encode, chunks, moments, window)))
        np.testing.assert_allclose(file, want, rtol=1e-4, atol=1e-4)
        listener, stream = speech.Listener.start(window), []
        for chunk in [*chunks, silent, silent]:
            listener = speech.feed(listener, chunk)
            while (heard := speech.listen(encode, listener))[0] is not None:
                listener = heard[1]
                stream.append(heard[0])
        np.testing.assert_allclose(np.concatenate(stream)[: len(want)], want, rtol=1e-4, atol=1e-4)
        assert encode._cache_size() == 1


def test_the_stream_waits_for_no_more_than_the_look_ahead():
    assert speech.mel_window(MEL).ahead == MEL.future == 1280
    assert speech.mel_window(FLAT).ahead == FLAT.future == 1920


def test_a_frame_depends_on_its_stated_samples_alone():
    rng = np.random.default_rng(0)
    x = padded(rng.normal(size=FRAME * 20) * 0.1)
    end = MEL.past + 6 * FRAME + MEL.future  # of frame 5, counted from the window's first sample
    later = x.at[:, end:].set(0.5)
    earlier = x.at[:, : 5 * FRAME].set(0.5)
    a, b, c = log_mel(x, MEL)[0], log_mel(later, MEL)[0], log_mel(earlier, MEL)[0]
    np.testing.assert_array_equal(a[:6], b[:6])
    assert (a[6] != b[6]).any()
    np.testing.assert_array_equal(a[5:], c[5:])
    assert (a[4] != c[4]).any()


def test_layers_are_ten_milliseconds_apart():
    features = log_mel(padded(np.random.default_rng(0).normal(size=FRAME * 20) * 0.1), MEL)[0]
    np.testing.assert_array_equal(features[10, 4:], features[11, :-4])


def test_flat_features_are_the_layers_beside_each_other():
    x = padded(np.random.default_rng(0).normal(size=FRAME * 20) * 0.1, FLAT)
    flat = log_mel(x, FLAT)[0]
    layers = log_mel(x, dataclasses.replace(FLAT, flat=False))[0]
    assert flat.shape == (20, *FLAT.made) == (20, 1, 640)
    np.testing.assert_array_equal(flat.reshape(layers.shape), layers)
    np.testing.assert_array_equal(flat[10, 0, 160:], flat[11, 0, :-160])  # 40 ms later


def test_a_model_hears_what_fits_its_dit():
    dit = DiTConfig.tiny(audio_layers=1, audio_dim=640)
    cfg = ModelConfig.tiny(dit=dit, mel=FLAT)
    assert cfg.log_mel == FLAT and from_dict(ModelConfig, to_dict(cfg)) == cfg
    assert ModelConfig.tiny().log_mel is None  # its speech encoder fits
    assert ModelConfig.tiny(dit=DiTConfig.tiny(audio_layers=16)).log_mel == MelConfig(layers=16)
    with pytest.raises(LiveAvatarError, match="audio_dim = 640"):
        ModelConfig.tiny(mel=FLAT)
    with pytest.raises(LiveAvatarError, match=r"ModelConfig\.mel has no field 'bin'"):
        from_dict(ModelConfig, {"mel": {"bin": 40}})


def test_a_tone_rings_in_the_band_of_its_pitch():
    mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)
    edges = np.linspace(mel(MEL.lowest), mel(MEL.highest), MEL.bins + 2)
    for hertz in (200.0, 1000.0, 3000.0, 6000.0):
        loudest = int(jnp.argmax(log_mel(padded(tone(hertz)), MEL)[0, 10, 12]))
        assert edges[loudest] - 5 < mel(hertz) < edges[loudest + 2] + 5


def test_twenty_decibels_are_half_a_step():
    loud = log_mel(padded(tone(1000.0)), MEL)[0, 10, 12].max()
    soft = log_mel(padded(tone(1000.0, loudness=0.1)), MEL)[0, 10, 12].max()
    np.testing.assert_allclose(loud - soft, 1 / 2, atol=1e-3)
    assert 0.8 < loud <= 1.0


@pytest.mark.parametrize("loudness", [0.0, 1e-9, 1e-5])
def test_silence_is_minus_one(loudness):
    features = log_mel(padded(tone(300.0, loudness=loudness)), MEL)
    assert features.shape[1] == 20
    np.testing.assert_allclose(features, -1.0, atol=1e-3)


def test_less_than_a_frame_of_audio_makes_none():
    for samples in (0, 160, 639):
        assert log_mel(padded(np.ones(samples)), MEL).shape == (1, 0, MEL.layers, MEL.bins)


def test_the_first_frame_hears_the_recording_from_its_first_sample():
    click = np.zeros(FRAME * 4)
    click[0] = 1.0
    heard = np.asarray(log_mel(padded(click), MEL)[0, 0]).max(axis=-1) > -0.99
    first = MEL.layers - 4 - MEL.ahead  # the spectrum that ends 10 ms into the frame
    assert heard[first + 1] and not heard[:first].any()


@pytest.mark.parametrize(
    "field, value",
    [("ahead", 22), ("ahead", -1), ("bins", 0), ("bins", 200), ("highest", 9000.0)],
)
def test_settings_that_cannot_work_are_refused(field, value):
    with pytest.raises(LiveAvatarError, match=f"MelConfig.{field} = {value} "):
        MelConfig(**{field: value})
