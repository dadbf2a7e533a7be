"""Speech made by espeak-ng, and the mouth that belongs to it."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.data.mouth import FPS, SILENCE, Phoneme, mouth_shapes
from liveavatar_jax.data.sentences import SPLITS, sentence, split_of
from liveavatar_jax.data.spoken import open_speech
from liveavatar_jax.data.voice import ACCENTS, SPEAKERS, Voice, draw_voice, recite, say
from liveavatar_jax.models.mel import MelConfig, log_mel
from liveavatar_jax.types import LiveAvatarError
from train import speech

pytest.importorskip("espeakng_loader", reason="the extra `puppet` is not installed")

TEXT = "Happy people saw five big moths."


@pytest.fixture(scope="module")
def said():
    return say(TEXT, Voice("en-us+f2"))


def test_an_utterance_is_whole_frames_of_sound_and_mouth(said):
    assert said.waveform.dtype == said.mouth.dtype == np.float32
    assert len(said.waveform) == 640 * len(said.mouth)
    assert 0.02 < np.sqrt((said.waveform**2).mean()) < 0.5
    assert said.mouth.min() >= 0 and said.mouth.max() <= 1
    assert said.mouth[:, 0].max() > 0.6


def test_phonemes_follow_each_other_within_the_sound(said):
    names = [p.name for p in said.phonemes if p.name != SILENCE]
    assert names[:6] == ["h", "a", "p", "i", "p", "i"]
    starts = np.array([p.start for p in said.phonemes])
    ends = np.array([p.end for p in said.phonemes])
    assert (ends > starts).all() and (starts[1:] >= ends[:-1] - 1e-9).all()
    assert starts[0] >= 0 and ends[-1] <= len(said.waveform) / 16_000


def test_the_same_words_sound_the_same_whatever_was_said_before(said):
    say("Something else.", Voice("en+m3"))
    again = say(TEXT, Voice("en-us+f2"))
    assert np.array_equal(said.waveform, again.waveform) and said.phonemes == again.phonemes


def test_a_slow_voice_takes_longer(said):
    assert len(say(TEXT, Voice("en-us+f2", rate=100)).mouth) > 1.2 * len(said.mouth)


@pytest.mark.parametrize("split", SPLITS)
def test_lips_that_must_touch_do(split):
    for seed in range(4):
        said = say(sentence(np.random.default_rng(seed), split), Voice("en-us+m1", rate=190))
        for p in said.phonemes:
            if p.name in ("p", "b", "m"):
                near = range(int((p.start - 0.06) * FPS), int((p.end + 0.02) * FPS) + 1)
                shut = [said.mouth[f, 0] for f in near if 0 <= f < len(said.mouth)]
                assert min(shut) == 0, p


def test_silence_is_a_shut_mouth_at_rest():
    said = [Phoneme("a", 1.0, 1.3), Phoneme(SILENCE, 1.3, 3.0)]
    mouth = mouth_shapes(said, 75)
    time = (np.arange(75) + 0.5) / FPS
    quiet = (time < 0.9) | (time > 1.4)
    np.testing.assert_allclose(mouth[quiet], [[0, 0.5, 0]] * quiet.sum(), atol=1e-3)
    assert (mouth[quiet, 0] == 0).all() and mouth[28, 0] > 0.8


def test_vowels_have_shapes_of_their_own():
    shapes = {name: mouth_shapes([Phoneme(name, 0.0, 0.6)], 15)[7] for name in ("A", "i", "u", "f")}
    assert shapes["A"][0] > 0.9 > 0.4 > shapes["i"][0] > shapes["f"][0] > 0
    assert shapes["i"][1] > 0.9 and shapes["u"][1] < 0.1
    assert shapes["u"][2] > 0.9 and shapes["i"][2] < 0.01


def test_a_consonant_takes_the_shape_of_its_neighbours():
    def between(vowel):
        times = ((0.0, 0.3, vowel), (0.3, 0.36, "k"), (0.36, 0.6, vowel))
        return mouth_shapes([Phoneme(name, a, b) for a, b, name in times], 15)[8]

    assert between("u")[2] > 0.6 and between("i")[2] < 0.1


def test_splits_share_no_speaker_and_no_sentence():
    for i, one in enumerate(SPLITS):
        for other in SPLITS[i + 1 :]:
            assert not set(SPEAKERS[one]) & set(SPEAKERS[other])
    said = {split: {sentence(np.random.default_rng(i), split) for i in range(200)}
            for split in SPLITS}  # fmt: skip
    for split, texts in said.items():
        assert len(texts) > 190
        assert {split_of(text) for text in texts} == {split}


def test_every_voice_speaks():
    """espeak is silent about a variant it does not have; ask for the file instead."""
    import pathlib

    import espeakng_loader

    variants = pathlib.Path(espeakng_loader.get_data_path(), "voices", "!v")
    names = {name for split in SPLITS for name in SPEAKERS[split]}
    assert not names - {path.name for path in variants.iterdir()}
    for accent in {name for split in SPLITS for name in ACCENTS[split]}:
        assert say("Hello.", Voice(f"{accent}+m1")).mouth.max() > 0.3
    drawn = [draw_voice(np.random.default_rng(i), "held-out").name for i in range(50)]
    assert len(set(drawn)) > 15


def test_recitals_are_exact_and_repeatable():
    one, again = (recite(np.random.default_rng(4), "train", 100) for _ in range(2))
    assert np.array_equal(one.waveform, again.waveform) and one.text == again.text
    assert one.waveform.shape == (64_000,) and one.mouth.shape == (100, 3)
    assert np.abs(one.waveform).max() <= 1
    assert not np.array_equal(one.waveform, recite(np.random.default_rng(5), "train", 100).waveform)


def test_recitals_differ_in_loudness_and_noise():
    sounds = [recite(np.random.default_rng(i), "train", 50).waveform for i in range(12)]
    loud = [20 * np.log10(np.sqrt((x**2).mean())) for x in sounds]
    frames = [np.sqrt((x.reshape(-1, 160) ** 2).mean(axis=1)) for x in sounds]
    quiet = [20 * np.log10(np.quantile(x, 0.02)) for x in frames]
    assert np.ptp(loud) > 8 and np.ptp(quiet) > 15


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("speech")
    speech.make_speech(out, {"train": 50, "held-out": 50}, frames=80, workers=1)
    return out


def test_the_opening_can_be_heard_by_a_linear_reader(folder):
    """Ridge regression from log-mel spectra: other sentences and other voices."""
    cfg = MelConfig(bins=32, layers=25, ahead=10)

    def features(split):
        windows = [open_speech(folder, split).window(i, 0, 80, cfg.past, cfg.future)
                   for i in range(50)]  # fmt: skip
        waveforms, mouths = map(np.stack, zip(*windows, strict=True))
        mel = np.asarray(log_mel(jnp.asarray(waveforms), cfg)).reshape(4000, -1)
        return np.concatenate([mel, np.ones((4000, 1))], axis=1), mouths[..., 0].reshape(-1)

    x, y = features("train")
    weights = np.linalg.solve(x.T @ x + 50 * np.eye(x.shape[1]), x.T @ y)
    x, y = features("held-out")
    assert np.corrcoef(x @ weights, y)[0, 1] > 0.7
    lags = [np.corrcoef(np.roll(x @ weights, lag), y)[0, 1] for lag in range(-3, 4)]
    assert np.argmax(lags) == 3


def test_windows_are_cut_from_clips(folder):
    data = open_speech(folder, "held-out")
    assert len(data) == 50 and data.frames == 80 and len(data.texts) == 50
    whole, mouth = data.window(3, 0, 80)
    part, part_mouth = data.window(3, 20, 10, past=100, future=50)
    assert np.array_equal(part, whole[20 * 640 - 100 : 30 * 640 + 50])
    assert np.array_equal(part_mouth, mouth[20:30])
    first, _ = data.window(3, 0, 2, past=100, future=0)
    assert not first[:100].any() and np.array_equal(first[100:], whole[:1280])
    last, _ = data.window(3, 79, 1, past=0, future=90)
    assert not last[-90:].any()
    again = recite(np.random.default_rng((0, 2, 3)), "held-out", 80)
    np.testing.assert_allclose(whole, again.waveform, atol=1e-4)
    np.testing.assert_allclose(mouth, again.mouth, atol=1e-3)

    waveforms, mouths = data.draw(np.random.default_rng(0), 5, 8, past=240, future=160)
    assert waveforms.shape == (5, 240 + 8 * 640 + 160) and mouths.shape == (5, 8, 3)


def test_a_stopped_run_goes_on_where_it_was(folder, tmp_path, monkeypatch):
    made = []
    keep = speech.write_part
    monkeypatch.setattr(speech, "write_part", lambda *job: (made.append(job[0].name), keep(*job)))
    monkeypatch.setattr(speech, "PER_PART", 2)
    counts = {"train": 4, "held-out": 2}
    speech.make_speech(tmp_path, counts, frames=10, workers=1)
    assert made == ["train-00000.json", "train-00001.json", "held-out-00000.json"]
    before = (tmp_path / "train-00001.waveform.npy").read_bytes()
    (tmp_path / "train-00001.json").unlink()
    made.clear()
    speech.make_speech(tmp_path, counts, frames=10, workers=1)
    assert made == ["train-00001.json"]
    assert (tmp_path / "train-00001.waveform.npy").read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_two_processes_make_what_one_makes(tmp_path, monkeypatch):
    monkeypatch.setattr(speech, "PER_PART", 1)
    for workers in (1, 2):
        speech.make_speech(tmp_path / str(workers), {"train": 2}, frames=10, workers=workers)
    for name in ("train-00000.waveform.npy", "train-00001.mouth.npy"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda out: speech.make_speech(out, {"train": 2}, frames=81), "frames = 80 and not 81"),
        (lambda out: open_speech(out, "validation"), "no speech of the split 'validation'"),
        (lambda out: open_speech(out, "train").window(0, 70, 20), "70 to 90 do not lie in clips"),
        (lambda out: say("Hello.", Voice("xx-nowhere+m1")), "does not know the voice"),
        (lambda out: recite(np.random.default_rng(0), "test", 10), "split 'test' is unknown"),
    ],
)
def test_bad_input_is_one_sentence(folder, change, message):
    with pytest.raises(LiveAvatarError, match=message) as error:
        change(folder)
    assert "\n" not in str(error.value)


def test_damaged_speech_is_named(folder, tmp_path):
    (tmp_path / "train-00000.json").write_text(json.dumps({"texts": [], "voices": []}))
    with pytest.raises(LiveAvatarError, match="holds damaged speech"):
        open_speech(tmp_path, "train")


def test_without_espeak_the_remedy_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(LiveAvatarError, match=r"pip install 'liveavatar-jax\[puppet\]'"):
        say("Hello.", Voice("en-us+m1"))


def test_the_command_refuses_nonsense(tmp_path, capsys):
    assert speech.main(["--out", str(tmp_path), "--clips", "0"]) == 1
    assert "--clips 0 must be above 0" in capsys.readouterr().err
