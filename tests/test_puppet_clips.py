"""Puppet clips as files: the list that evaluation and encoding read, and the truth beside it."""

import av
import numpy as np
import pytest
from PIL import Image

from liveavatar_jax.data import puppet
from liveavatar_jax.data.audio import load_audio
from liveavatar_jax.data.filters import Kept, WindowConfig, examine
from liveavatar_jax.data.listing import Folder, Found, read_list
from train import clips

pytest.importorskip("espeakng_loader", reason="the extra `puppet` is not installed")
F = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("clips")
    clips.write_clips(out, "held-out", 2, F, 32, seed=1)
    return out


def frames(path):
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def test_all_files_of_a_clip_belong_together(folder):
    entry = read_list(folder / "clips.csv")[1]
    video = frames(folder / f"{entry.id}.mp4")
    assert video.shape == (F, 32, 32, 3)
    assert load_audio(folder / f"{entry.id}.wav").shape == (F * 640,)
    with np.load(folder / f"{entry.id}.npz") as file:
        truth = dict(file)
    assert truth["mouth"].shape == (F, 3) and truth["mouth_box"].shape == (F, 4)
    assert puppet.EXPRESSIONS[int(truth["expression"])] == "smiling"
    who = puppet.identity(truth["identity_noise"][None])
    pose = puppet.gestures(truth["gesture_noise"][None], np.array([1]), truth["mouth"][None])
    again = clips.to_bytes(np.asarray(puppet.draw(who, pose, 32)))[0]
    assert np.abs(again.astype(int) - video).mean() < 1.5  # what the codec costs
    portrait = np.asarray(Image.open(folder / f"{entry.id}.png")).astype(int)
    assert 0 < np.abs(portrait - video[0]).mean() < 40


def test_the_list_is_read_as_one_of_real_clips(folder):
    entries = read_list(folder / "clips.csv")
    assert [entry.id for entry in entries] == ["held-out-0000", "held-out-0001"]
    assert all(entry.caption for entry in entries)
    found = Folder(folder).find(entries[0])
    assert isinstance(found, Found) and found.path == folder / "held-out-0000.mp4"
    kept = examine(found.path, WindowConfig(height=32, width=32, latents=2), whole=found.whole)
    assert isinstance(kept, Kept) and len(kept.windows) >= 1


def test_clips_of_a_split_are_always_the_same_and_never_of_another():
    one, again = (clips.stage("train", 3, 30, seed=2) for _ in range(2))
    assert np.array_equal(one.said.waveform, again.said.waveform) and one.caption == again.caption
    other = clips.stage("validation", 3, 30, seed=2)
    assert not np.array_equal(one.identity_noise, other.identity_noise)
    assert one.said.voice.name != other.said.voice.name


def test_a_stopped_run_goes_on(folder, monkeypatch):
    (folder / "held-out-0001.npz").unlink()
    before = (folder / "held-out-0000.mp4").stat().st_mtime_ns
    written = []
    keep = clips._write
    spy = lambda out, row, *rest: (written.append(row["file"]), keep(out, row, *rest))
    monkeypatch.setattr(clips, "_write", spy)
    clips.write_clips(folder, "held-out", 2, F, 32, seed=1)
    assert written == ["held-out-0001.mp4"]
    assert (folder / "held-out-0000.mp4").stat().st_mtime_ns == before


def test_bad_input_is_one_sentence(tmp_path, capsys):
    assert clips.main(["--out", str(tmp_path), "--size", "31"]) == 1
    assert "31x31 pixels must have even sides" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert clips.main(["--out", str(tmp_path / "file" / "x"), "--count", "1"]) == 1
    assert capsys.readouterr().err.startswith("error: cannot write")
