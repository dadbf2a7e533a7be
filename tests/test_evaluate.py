"""The judging of a model as a user meets it: a list in, a table and a report out."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import soundfile
from flax import nnx
from PIL import Image

from liveavatar_jax import cli, stream
from liveavatar_jax.config import ModelConfig, StreamConfig
from liveavatar_jax.data.takes import read_takes, read_truth
from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax.evaluate import evaluate
from liveavatar_jax.metrics.readers import Reader, save
from liveavatar_jax.player import load_avatar
from liveavatar_jax.protocol import Job, Request, Window
from liveavatar_jax.rows import WARM_UP, Rows
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import checkpoint

from .test_generate import private_cache as private_cache
from .test_generate import saved

FRAMES = (21, 30, 26)  # of the clips


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("weights") / "tiny")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Three clips, the first with all that may be known of it, the last with nothing."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    rows = ["id,file,image,audio,caption,truth,mood"]
    for i, frames in enumerate(FRAMES):
        picture = np.full((64, 64, 3), 60 * i + 40, np.uint8)
        picture[16:48, 16:48] = random.integers(0, 255, 3)
        Image.fromarray(picture).save(folder / f"c{i}.png")
        soundfile.write(folder / f"c{i}.wav", 0.3 * random.standard_normal(640 * frames), 16000)
        video = np.repeat(picture[None], frames, axis=0)
        video[:, 40:44, 28:36] = random.integers(0, 255, (frames, 1, 1, 1))
        with VideoWriter(folder / f"c{i}.mp4", (64, 64)) as film:
            film.write(video)
        np.savez(
            folder / f"c{i}.npz",
            mouth=random.random((frames, 3)).astype(np.float32),
            mouth_box=np.tile([[0.6, 0.4, 0.7, 0.6]], (frames, 1)),
            expression=np.asarray(i),
            fps=np.asarray(25.0),
        )
        cells = [f"c{i}.mp4", f"c{i}.png", f"c{i}.wav", "", f"c{i}.npz"]
        rows.append(",".join([f"c{i}", *(cells if i < 2 else ["", *cells[1:3], "", ""]), "x"]))
    (folder / "clips.csv").write_text("\n".join(rows) + "\n")
    save(folder / "readers.safetensors", Reader(rngs=nnx.Rngs(0)))
    return folder / "clips.csv"


def command(clips: Path, out: Path, *more: object) -> list[str]:
    given = ["evaluate", "--clips", clips, "--out", out, "--device", "cpu", *more]
    return [str(part) for part in given]


@pytest.fixture(scope="module")
def judged(weights, clips, tmp_path_factory) -> tuple[Path, str]:
    """A whole evaluation of the clips, timing included."""
    out = tmp_path_factory.mktemp("out") / "report"
    readers = clips.parent / "readers.safetensors"
    request = Request(clips, out, weights, readers=readers, steps=1)
    report = evaluate(request)
    assert report.finished
    return out, str(report)


def test_the_table_has_what_can_be_known(judged):
    out, said = judged
    for words in ("mouth, correlation with truth", "Fréchet distance, reader", "frames a second",
                  "expression as the prompt says", "too few", "3 clips"):  # fmt: skip
        assert words in said
    told = json.loads((out / "metrics.json").read_text())
    found = told["metrics"]
    for name in ("mouth", "shuffled", "lag", "worst", "amplitude", "ceiling", "width", "envelope",
                 "looks", "colour", "sharpness", "psnr", "psnr_mouth", "flicker",
                 "dynamic_ratio", "expression", "fps", "first_frame"):  # fmt: skip
        assert np.isfinite(found[name]["value"]), name
    assert found["mouth"]["low"] <= found["mouth"]["value"] <= found["mouth"]["high"]
    assert told["about"]["clips"] == 3 and set(told["clips"]) == {"c0", "c1", "c2"}
    assert sorted(path.name for path in (out / "videos").iterdir()) == [
        "c0.mp4",
        "c1.mp4",
        "c2.mp4",
    ]


def test_the_report_is_one_file_that_asks_nobody(judged):
    text = (judged[0] / "report.html").read_text()
    assert "<script" not in text and not re.search(r"(src|href)=\"(?!data:)", text)
    assert text.count("<svg") >= 3 and text.count("data:image/png") == 5
    assert len(text) < 400_000
    assert {"c0", "c1", "c2"} <= set(re.findall(r"<b>(c\d)</b>", text))


def test_what_is_done_is_not_made_again(judged, weights, clips, monkeypatch):
    """Without a clip's file only that clip is made, and nothing changes."""
    out, _ = judged
    before = json.loads((out / "metrics.json").read_text())
    first, second = out / "seen" / "c0.npz", out / "seen" / "c1.npz"
    stamp = first.stat().st_mtime_ns
    second.unlink()
    readers = clips.parent / "readers.safetensors"
    request = Request(clips, out, weights, readers=readers, steps=1)
    evaluate(request)
    assert first.stat().st_mtime_ns == stamp and second.is_file()
    after = json.loads((out / "metrics.json").read_text())
    assert after["metrics"].keys() == before["metrics"].keys()
    for name in ("mouth", "colour", "psnr"):
        assert after["metrics"][name]["value"] == pytest.approx(before["metrics"][name]["value"],
                                                                rel=1e-3), name  # fmt: skip
    monkeypatch.setattr("liveavatar_jax.evaluate._see_model", lambda *_: pytest.fail("made again"))
    assert evaluate(request).finished
    with pytest.raises(LiveAvatarError, match=r"begun with another protocol, seed"):
        evaluate(dataclasses.replace(request, protocol="long", seed=3))


def test_an_interrupt_leaves_a_report_of_what_is_done(judged, weights, clips, monkeypatch):
    out, _ = judged
    gone = out / "seen" / "c1.npz"
    kept = gone.read_bytes()
    gone.unlink()

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("liveavatar_jax.evaluate._see_model", interrupted)
    readers = clips.parent / "readers.safetensors"
    report = evaluate(Request(clips, out, weights, readers=readers, steps=1))
    assert not report.finished and "interrupted: 2 of 3" in str(report)
    gone.write_bytes(kept)


def test_finished_videos_need_no_model(clips, tmp_path, capsys):
    """The true videos, judged as if a model had made them, are as good as truth."""
    out = tmp_path / "report"
    arguments = command(clips, out, "--videos", clips.parent, "--limit", "2",
                        "--readers", clips.parent / "readers.safetensors")  # fmt: skip
    assert cli.main(arguments) == 0
    assert "sharpness over truth" in capsys.readouterr().out
    found = json.loads((out / "metrics.json").read_text())["metrics"]
    for name in ("sharpness", "dynamic_ratio"):
        assert found[name]["value"] == pytest.approx(1)
    assert found["psnr"]["value"] == pytest.approx(99)
    assert found["frechet/reader"]["value"] == pytest.approx(0, abs=1e-4)
    assert found["mouth"]["value"] == pytest.approx(found["ceiling"]["value"])


def test_a_real_clip_without_truth_is_judged_by_what_is_left(clips, tmp_path):
    listed = tmp_path / "clips.csv"
    listed.write_text("id,image,audio\n" + ",".join(
        ["only", str(clips.parent / "c2.png"), str(clips.parent / "c2.wav")]) + "\n")  # fmt: skip
    (tmp_path / "only.mp4").write_bytes((clips.parent / "c2.mp4").read_bytes())
    seen = []

    def embed(frames):
        seen.append(frames.shape)
        return frames.reshape(len(frames), -1)[:, :5].astype(np.float64)

    request = Request(listed, tmp_path / "out", videos=tmp_path)
    lines = {line.key: line for line in evaluate(request, {"corner": embed}).lines}
    assert lines["cosine/corner"].value > 0.9 and seen
    assert {"colour", "flicker", "sharpness_portrait"} <= lines.keys()
    assert not {"mouth", "psnr", "expression"} & lines.keys()


def test_windows_are_those_of_the_protocol():
    assert Window.all("short", 250, None) == [Window("", 0, 250)]
    assert Window.all("long", 250, None) == [Window("", 0, 7500)]
    assert Window.all("long", 9000, None) == [Window("", 0, 9000)]
    horizon = Window.all("horizon", 250, None)
    assert [w.name for w in horizon] == ["0-10", "100-110", "1000-1010", "10000-10010"]
    assert horizon[-1].start == 250_000 and all(w.stop - w.start == 250 for w in horizon)
    assert len(Window.all("horizon", 250, 1010.0)) == 3


def test_truth_comes_round_with_the_sound(clips):
    (take,) = read_takes(clips, 1)
    job = Job.of(Request(clips, Path("."), Path("."), protocol="long"), 0, take, ModelConfig())
    known = job.known(job.windows[0])
    mouth = np.asarray(read_truth(take.truth)["mouth"])
    assert len(known["true_open"]) == 7500
    np.testing.assert_array_equal(known["true_open"][FRAMES[0] : 2 * FRAMES[0]], mouth[:, 0])
    np.testing.assert_array_equal(known["level"][:20], known["level"][FRAMES[0] :][:20])


@functools.cache
def tiny(folder: Path) -> stream.Avatar:
    cfg = checkpoint.load_config(folder)
    policy = StreamConfig(dtype="float32", steps=1)
    return load_avatar(folder, dataclasses.replace(cfg, stream=policy))


def played(weights: Path, numbers: list[int], pictures: np.ndarray, wanted, blocks: int) -> dict:
    avatar = tiny(weights)
    cfg, b = avatar.dit.cfg, len(numbers)

    def chunk(i: int) -> stream.Chunk:
        rows = [np.random.default_rng((n, i)).standard_normal(
            (1, 12, cfg.audio_layers, cfg.audio_dim)) for n in numbers]  # fmt: skip
        return stream.Chunk(audio=np.stack(rows).astype(np.float32), live=np.ones(b, bool))

    context = np.zeros((b, cfg.text_len, cfg.text_dim), np.float32)
    rows = Rows(avatar, pictures[numbers], context, 5, np.array(numbers, np.int32), chunk(0))
    return dict(rows.play(map(chunk, range(blocks)), wanted))


def test_a_row_is_the_same_stream_in_any_company_and_decoded_late(weights):
    """Rows do not meet; and a window decoded from WARM_UP latents before it is what it would be
    had everything been decoded."""
    pictures = np.random.default_rng(1).uniform(-1, 1, (3, 64, 64, 3)).astype(np.float32)
    last = -(-WARM_UP // 3) + 6
    with jax.default_matmul_precision("highest"):
        every = played(weights, [2, 0], pictures, lambda i: True, last + 1)
        alone = played(weights, [0], pictures, lambda i: i == last, last + 1)
    assert len(every) == last + 1 and list(alone) == [last]
    apart = np.abs(every[last][1].astype(int) - alone[last][0].astype(int))
    assert apart.max() <= 1, apart.max()
    assert np.abs(every[last][0].astype(int) - every[last][1]).mean() > 1


def test_blocks_may_have_another_size(weights, clips, tmp_path):
    """As many frames are seen, and it is noted where blocks begin."""
    request = Request(clips, tmp_path, weights, steps=1, limit=1, timing=False,
                      changes=("stream.block_frames=1", "stream.ring_blocks=12"))  # fmt: skip
    assert evaluate(request).finished
    with np.load(tmp_path / "seen" / "c0.npz") as seen:
        assert len(seen["change"]) == FRAMES[0]
        assert [int(seen[name]) for name in ("lead", "block", "latent")] == [3, 4, 4]


def test_bad_input_is_one_sentence(weights, clips, tmp_path, capsys):
    def listed(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    image, audio = clips.parent / "c0.png", clips.parent / "c0.wav"
    good = f"a,{image},{audio}\n"
    np.savez(tmp_path / "flat.npz", mouth=np.zeros(5))
    np.savez(tmp_path / "fast.npz", fps=np.asarray(50.0))
    truth = lambda n: listed(f"{n}.csv", f"id,image,audio,truth\na,{image},{audio},{n}.npz\n")
    out = tmp_path / "out"
    videos = ["--videos", tmp_path]
    cases = [
        (command(tmp_path / "none.csv", out, *videos), "none.csv"),
        (command(listed("bare.csv", "id,file\n"), out, *videos), "no column image"),
        (command(listed("empty.csv", "id,image,audio\n"), out, *videos), "no clips"),
        (command(listed("gone.csv", "id,image,audio\na,b,c\n"), out, *videos), "line 2"),
        (command(listed("few.csv", "id,image,audio\na,b\n"), out, *videos), "columns"),
        (command(listed("twice.csv", f"id,image,audio\n{good}{good}"), out, *videos), "twice"),
        (command(listed("name.csv", f"id,image,audio\na/{good}"), out, *videos), "'a/a'"),
        (command(truth("flat"), out / "1", *videos), "shape (5,)"),
        (command(truth("fast"), out / "2", *videos), "50 frames a second"),
        (command(clips, out / "3", "--videos", tmp_path / "none"), "not a folder"),
        (command(clips, out / "4", *videos), "c0.mp4"),
        (command(clips, out / "5", "--weights", tmp_path / "none"), "not a converted checkpoint"),
        (command(clips, out, *videos, "--limit", "0"), "--limit"),
        (command(clips, out, *videos, "--set", "stream.history=0.0"), "--set changes a model"),
        (command(clips, out / "7", "--weights", weights, "--set", "stream.histry=0"), "history"),
        (command(clips, out, *videos, "--real", "fid"), "NAME=FILE"),
        (command(clips, out, *videos, "--real", f"fid={tmp_path / 'flat.npz'}"), "flat.npz"),
        (command(clips, out, *videos, "--readers", clips), "clips.csv"),
        (command(clips, out / "6", *videos, "--protocol", "horizon", "--seconds", "5"), "window"),
    ]
    for arguments, named in cases:
        assert cli.main(arguments) == 2, arguments
        _, said = capsys.readouterr()
        said = said.splitlines()[-1]
        assert said.startswith("liveavatar-jax: ") and named in said, said
    with pytest.raises(LiveAvatarError, match="either --weights"):
        evaluate(Request(clips, out))
