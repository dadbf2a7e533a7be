from fractions import Fraction
from pathlib import Path

import av
import librosa
import numpy as np
import pytest
import soundfile

from liveavatar_jax.data.audio import in_blocks, load_audio, open_sound, read_audio
from liveavatar_jax.data.speech import Moments
from liveavatar_jax.types import LiveAvatarError

# librosa.load imports a reader that warns of Python 3.13
pytestmark = pytest.mark.filterwarnings("ignore:.* slated for removal in Python 3.13")

SPEECH = Path(__file__).parent / "data" / "speech.wav"
CODECS = {  # file, codec, sample format
    "mp3": ("libmp3lame", "fltp"),
    "flac": ("flac", "s16"),
    "m4a": ("aac", "fltp"),
    "mp4": ("aac", "fltp"),
    "ogg": ("libopus", "flt"),
    "opus": ("libopus", "flt"),
}


def tones(rate, seconds, channels):
    """A tone of its own on each channel, fading in: mistakes of order and time show."""
    t = np.arange(round(rate * seconds)) / rate
    tone = [0.3 * np.sin(2 * np.pi * (300 + 170 * c) * t) * t / seconds for c in range(channels)]
    return np.stack(tone, axis=1).astype(np.float32)


def encoded(path, x, rate):
    """`x` [samples, channels] in the codec that the suffix asks for."""
    codec, kind = CODECS[path.suffix[1:]]
    layout = {1: "mono", 2: "stereo"}[x.shape[1]]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x.T), "fltp", layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        resampler = av.AudioResampler(kind, layout, rate)
        for part in resampler.resample(frame) + resampler.resample(None):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def wav(tmp_path, x, rate, subtype="PCM_16"):
    soundfile.write(tmp_path / "sound.wav", x, rate, subtype=subtype)
    return tmp_path / "sound.wav"


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 24000, 44100, 48000, 96000])
@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_is_what_librosa_loads(tmp_path, rate, channels):
    path = wav(tmp_path, tones(rate, 0.7371, channels), rate)
    ours = load_audio(path)
    theirs, _ = librosa.load(path, sr=16000)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-7)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels", [2, 3, 6])
def test_every_sample_format_is_what_librosa_loads(tmp_path, subtype, channels):
    path = wav(tmp_path, tones(24000, 0.3, channels), 24000, subtype)
    theirs, _ = librosa.load(path, sr=16000)
    np.testing.assert_allclose(load_audio(path), theirs, rtol=0, atol=2e-7)


def test_real_speech_is_what_librosa_loads():
    theirs, _ = librosa.load(SPEECH, sr=16000)
    ours = load_audio(SPEECH)
    assert ours.shape == theirs.shape == (32000,)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("channels", [1, 2])
def test_every_codec_keeps_the_sound_in_its_place(tmp_path, suffix, channels):
    rate = 48000 if suffix in ("ogg", "opus") else 44100
    x = tones(rate, 1.5, channels)
    ours = load_audio(encoded(tmp_path / f"sound.{suffix}", x, rate))
    want = librosa.resample(x.mean(axis=1), orig_sr=rate, target_sr=16000, res_type="soxr_hq")
    padding = len(ours) - len(want)
    assert 0 <= padding <= 1024 * 16000 / rate, "at most one block of the codec's own silence"
    ours = ours[: len(want)]
    gain = np.dot(ours, want) / np.dot(want, want)
    assert 0.94 < gain < 1.01  # LAME takes 5 % off
    # one sample of shift would be 12 %
    assert np.linalg.norm(ours - gain * want) < 0.02 * np.linalg.norm(want)


def test_flac_loses_nothing(tmp_path):
    x = tones(44100, 0.5, 2)
    flac = load_audio(encoded(tmp_path / "sound.flac", x, 44100))
    np.testing.assert_allclose(flac, load_audio(wav(tmp_path, x, 44100)), rtol=0, atol=5e-5)


@pytest.mark.parametrize("chunk", [1, 37, 16000, 10**6])
@pytest.mark.parametrize("rate", [16000, 44100])
def test_chunks_are_the_whole_in_pieces(tmp_path, chunk, rate):
    path = wav(tmp_path, tones(rate, 0.2, 2), rate)
    chunks = list(read_audio(path, chunk=chunk))
    assert all(len(c) == chunk for c in chunks[:-1]) and 0 < len(chunks[-1]) <= chunk
    np.testing.assert_array_equal(np.concatenate(chunks), load_audio(path))


def test_moments_of_a_file_are_those_of_the_whole():
    x = load_audio(SPEECH).astype(np.float64)
    moments = Moments.of(read_audio(SPEECH))
    assert moments.count == 32000
    assert abs(moments.mean - x.mean()) < 1e-12
    assert abs(moments.deviation / 32000 / x.var() - 1) < 1e-12


def test_moments_survive_a_large_offset(tmp_path):
    x = 1000 + tones(16000, 2.5, 1)
    moments = Moments.of(read_audio(wav(tmp_path, x, 16000, "FLOAT")))
    assert abs(moments.deviation / x.size / x.astype(np.float64).var() - 1) < 1e-9


@pytest.mark.parametrize("size", [1, 7, 64])
def test_blocks_keep_every_sample(size):
    x = np.arange(2 * 200, dtype=np.float32).reshape(2, 200)
    blocks = list(in_blocks(np.split(x, [3, 3, 90, 91], axis=1), size))
    assert {b.shape[1] for b in blocks[:-1]} == {size}
    np.testing.assert_array_equal(np.concatenate(blocks, axis=1), x)


def test_ten_milliseconds_and_one_sample_are_sound(tmp_path):
    assert load_audio(wav(tmp_path, tones(48000, 0.01, 1), 48000)).shape == (160,)
    assert load_audio(wav(tmp_path, np.full(1, 0.5, np.float32), 48000)).shape == (1,)


def test_silence_is_sound(tmp_path):
    path = wav(tmp_path, np.zeros(24000, np.float32), 24000)
    assert not load_audio(path).any()
    assert Moments.of(read_audio(path)) == Moments(16000, 0.0, 0.0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_values_that_are_no_numbers_are_refused_with_their_place(tmp_path, value, subtype):
    x = np.zeros(48000 * 2)
    x[72000] = value
    path = wav(tmp_path, x, 48000, subtype)
    with pytest.raises(LiveAvatarError, match=r"sound\.wav holds values .* finite .* near 1\.[45]"):
        load_audio(path)


def test_values_beyond_float32_are_refused(tmp_path):
    with pytest.raises(LiveAvatarError, match="finite"):
        load_audio(wav(tmp_path, np.full(1000, 1e300), 16000, "DOUBLE"))


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(LiveAvatarError, match=r"nothing\.wav: no such file"):
        load_audio(tmp_path / "nothing.wav")
    with pytest.raises(LiveAvatarError, match="is a directory"):
        load_audio(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a sound", bytes(5000), SPEECH.read_bytes()[:44]])
@pytest.mark.parametrize("suffix", ["wav", "mp3"])
def test_files_without_sound_are_refused_in_one_sentence(tmp_path, content, suffix):
    path = tmp_path / f"sound.{suffix}"
    path.write_bytes(content)
    with pytest.raises(LiveAvatarError, match=rf"sound\.{suffix} .*(no sound|holds no sound)"):
        load_audio(path)


def test_a_picture_has_no_audio_track():
    with pytest.raises(LiveAvatarError, match=r"portrait\.jpg has no audio track"):
        open_sound(SPEECH.with_name("portrait.jpg"))


def test_a_file_cut_short_is_read_up_to_the_cut(tmp_path):
    for suffix in ("mp3", "flac", "opus"):
        rate = 48000 if suffix == "opus" else 44100
        whole = encoded(tmp_path / f"sound.{suffix}", tones(rate, 2, 1), rate)
        content = whole.read_bytes()
        whole.write_bytes(content[: len(content) * 2 // 3 - 50])
        assert 0.9 < len(load_audio(whole)) / 16000 < 1.9, suffix


def test_a_hole_in_the_middle_is_refused_with_its_place(tmp_path):
    path = encoded(tmp_path / "sound.m4a", tones(44100, 4, 1), 44100)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(range(250)) * 8
    path.write_bytes(content)
    with pytest.raises(LiveAvatarError, match=r"sound\.m4a is damaged near [12]\.\d\d s"):
        load_audio(path)


def test_nothing_reaches_the_terminal(tmp_path, capfd):
    for content in (b"", bytes(5000), b"ID3" + bytes(range(256)) * 40):
        (tmp_path / "sound.mp3").write_bytes(content)
        with pytest.raises(LiveAvatarError):
            load_audio(tmp_path / "sound.mp3")
    load_audio(SPEECH)
    assert capfd.readouterr() == ("", "")
