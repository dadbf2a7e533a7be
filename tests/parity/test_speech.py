import json
from functools import partial

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
import soundfile
from einops import rearrange
from flax import nnx
from safetensors.numpy import load_file

from liveavatar_jax.config import SpeechConfig
from liveavatar_jax.data import speech
from liveavatar_jax.models.speech import SpeechEncoder, window_features
from liveavatar_jax.weights.encoders import SPEECH_IGNORE, SPEECH_RULES, speech_config
from liveavatar_jax.weights.rules import load


@pytest.fixture(scope="module")
def wav2vec2(fixture):
    return fixture("wav2vec2")


@pytest.fixture(scope="module")
def encoder(parity):
    (folder,) = (parity / "tiny_checkpoint").glob("*/wav2vec2*")
    cfg = speech_config(json.loads((folder / "config.json").read_text()), "config.json")
    abstract = jax.eval_shape(lambda: SpeechEncoder(cfg, rngs=nnx.Rngs(0)))
    tensors = load_file(folder / "model.safetensors")
    return load(abstract, tensors, SPEECH_RULES, where="model.safetensors", ignore=SPEECH_IGNORE)


@pytest.fixture(scope="module")
def states(wav2vec2, encoder):
    return jax.jit(lambda m, x: m(x))(encoder, jnp.asarray(wav2vec2["normalised"])[None])


def published(features, frames):
    """Our [b, F, states, dim] as the original's clips [1, states, dim, frames]."""
    clips = rearrange(features[0], "(clip F) l c -> clip l c F", F=frames)
    return clips[:1]


def test_normalised_waveform_equals_the_original(wav2vec2):
    wav2vec2.check("normalised", speech.normalise(wav2vec2["in.waveform"]))


def test_convolutions_equal_the_original(wav2vec2, encoder):
    x = encoder.local(jnp.asarray(wav2vec2["normalised"])[None])
    wav2vec2.check("conv_features", x[0].T)
    x = encoder.pos_conv(encoder.project(encoder.project_norm(x)))
    wav2vec2.check("pos_conv_embedding", x[0])


def test_hidden_states_equal_the_original(wav2vec2, states):
    wav2vec2.check("hidden_states", rearrange(states, "1 t l c -> l t c"))


def test_video_features_equal_the_original(wav2vec2, states):
    features = np.asarray(speech.video_features(states))
    wav2vec2.check("audio_input.clip48", published(features, 48))
    repeats = wav2vec2.sidecar["num_repeat"]["12"]
    assert features.shape[1] == 12 * repeats
    wav2vec2.check("audio_input.clip12", published(features, 12 * repeats))


def test_interpolation_to_30_hz_equals_the_original(wav2vec2, states):
    want = wav2vec2["interpolated_30fps"]
    assert speech.resampled_frames(states.shape[1]) == want.shape[1]
    features = np.asarray(speech.video_features(states))[0]
    rows = speech.source_index(np.arange(len(features)))
    shown = rows < want.shape[1]
    got = np.zeros_like(want)
    got[:, rows[shown]] = features[shown].transpose(1, 0, 2)
    skipped = np.setdiff1d(np.arange(want.shape[1]), rows[shown])
    got[:, skipped] = want[:, skipped]  # rows that no video frame shows
    assert len(skipped) < want.shape[1] / 5
    wav2vec2.check("interpolated_30fps", got)


def test_every_index_table_is_reproduced(wav2vec2):
    for count, table in wav2vec2.sidecar["index_tables"].items():
        clips = speech.clip_count(int(count))
        assert clips == table["num_repeat"], count
        rows = speech.source_index(np.arange(48 * clips))
        got = np.where(rows < int(count), rows, -1)
        np.testing.assert_array_equal(got, table["source_index"], err_msg=count)


def test_every_length_is_reproduced(wav2vec2, encoder):
    for samples, want in wav2vec2.sidecar["length_table"].items():
        frames = speech.speech_frames(int(samples))
        assert frames == encoder.frames(int(samples)) == want["wav2vec_frames"], samples
        assert speech.resampled_frames(frames) == want["frames_30fps"], samples
        assert speech.clip_count(want["frames_30fps"]) == want["num_clips"], samples
        assert speech.block_count(int(samples)) == 4 * want["num_clips"], samples


def test_a_file_streamed_through_a_window_that_holds_it_equals_the_original(wav2vec2, encoder):
    waveform = wav2vec2["in.waveform"]
    encode = partial(jax.jit(window_features), encoder)
    chunks = np.array_split(waveform, 7)
    window = speech.SpeechWindow(left=19200, hop=1)  # 32,000 samples
    blocks = list(speech.file_features(encode, chunks, speech.Moments.of(chunks), window))
    wav2vec2.check("audio_input.clip48", published(np.concatenate(blocks)[None], 48))


@pytest.fixture(scope="module")
def recordings(parity, encoder):
    """Real speech at 16 kHz, and its features as published."""
    paths = sorted((parity.parent / "examples").glob("*.wav"))
    if not paths:
        pytest.skip("no example recordings beside the fixtures")
    run = jax.jit(lambda m, x: m(x))
    found = []
    for path in paths:
        waveform, rate = soundfile.read(path, dtype="float32")
        waveform = librosa.resample(waveform, orig_sr=rate, target_sr=16000, res_type="soxr_hq")
        states = run(encoder, jnp.asarray(speech.normalise(waveform))[None])
        found.append((waveform, np.asarray(speech.video_features(states))[0]))
    return found


def deviation(encoder, recordings, window):
    """Of the windowed form from the whole file, relative to how much the features vary."""
    compiled = partial(jax.jit(window_features), encoder)
    apart = []
    for waveform, want in recordings:
        chunks = np.array_split(waveform, 5)
        got = speech.file_features(compiled, chunks, speech.Moments.of(chunks), window)
        got = np.concatenate(list(got))
        sounding = np.abs(want).max(axis=(1, 2)) > 0
        assert (got[~sounding] == 0).all()
        varies = want[sounding] - want[sounding].mean(0)
        apart.append(np.sqrt(((got - want) ** 2).sum() / (varies**2).sum()))
    return max(apart)


def test_files_that_fit_the_window_are_exact(encoder, recordings):
    assert deviation(encoder, recordings, speech.SpeechWindow.for_files()) < 1e-4


def test_the_deviation_of_smaller_windows_is_as_documented(encoder, recordings):
    """The weights are random, see SpeechWindow: all taps of the position are equally loud."""
    bounds = {(32000, 7680): 0.85, (64000, 7680): 0.82, (64000, 15360): 0.42}
    windows = (speech.SpeechWindow(left=left, ahead=ahead) for left, ahead in bounds)
    errors = [deviation(encoder, recordings[:2], window) for window in windows]
    print("(left, ahead) samples and RMS deviation:", dict(zip(bounds, errors, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert all(error < bound for error, bound in zip(errors, bounds.values(), strict=True)), errors


def test_every_published_tensor_has_its_place(parity):
    name = "wav2vec2_large_xlsr_53_english.json"
    manifest = json.loads((parity / "manifests" / name).read_text())
    tensors = {
        name: jax.ShapeDtypeStruct(t["shape"], jnp.dtype(t["dtype"]))
        for name, t in manifest["tensors"].items()
    }
    abstract = jax.eval_shape(lambda: SpeechEncoder(SpeechConfig(), rngs=nnx.Rngs(0)))
    load(abstract, tensors, SPEECH_RULES, where=name, ignore=SPEECH_IGNORE)
    newer = {
        name.replace("weight_g", "parametrizations.weight.original0").replace(
            "weight_v", "parametrizations.weight.original1"
        ): tensor
        for name, tensor in tensors.items()
    }
    assert newer != tensors
    load(abstract, newer, SPEECH_RULES, where=name, ignore=SPEECH_IGNORE)


def test_the_published_config_has_the_default_sizes(parity):
    name = "wav2vec2_large_xlsr_53_english.json"
    config = json.loads((parity / "manifests" / name).read_text())["config"]
    assert speech_config(config, name) == SpeechConfig()
