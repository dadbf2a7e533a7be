"""From files of all sorts to shards: what is kept, what is dropped and why, and going on."""

import csv
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from array_record.python.array_record_module import ArrayRecordReader

from liveavatar_jax import cli
from liveavatar_jax.data import filters
from liveavatar_jax.data.audio import load_audio
from liveavatar_jax.data.clips import DataConfig, Shards, Source, open_clips
from liveavatar_jax.data.filters import Dropped, Kept, WindowConfig, examine, find_windows
from liveavatar_jax.data.image import to_pixels
from liveavatar_jax.data.listing import Demand, Entry, Folder, Found, Scores, read_list
from liveavatar_jax.data.prompt import PROMPT, Tokenizer
from liveavatar_jax.data.records import Clip
from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax.data.workers import Job, examined
from liveavatar_jax.encode import Captions, Networks, parse_part, parse_windows
from liveavatar_jax.player import load
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import checkpoint

from .test_generate import private_cache, weights  # noqa: F401
from .test_text import folder as published  # noqa: F401

CFG = WindowConfig(height=32, width=48, latents=2, stride=10, windows=3, references=3)


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
    """Processes that start here import in a fraction of the time when the bytecode is kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONDONTWRITEBYTECODE", "")
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.getbasetemp() / "bytecode"))
        yield


def talk(
    path: Path, seconds: float = 2.0, *, fps: int = 25, size=(48, 64), cut: float | None = None,
    sound: bool = True, loud: float = 0.3, seed: int = 0,
) -> Path:  # fmt: skip
    """Somebody in front of a wall whose mouth moves with a noise; frame i has brightness i in its
    upper left corner. After `cut` seconds it is someone else elsewhere."""
    rng, frames = np.random.default_rng(seed), round(seconds * fps)
    path.parent.mkdir(parents=True, exist_ok=True)
    wav = path.with_suffix(".wav")
    if sound:
        volume = np.abs(np.sin(np.arange(round(16000 * seconds)) / 2000))
        soundfile.write(wav, loud * volume * rng.uniform(-1, 1, len(volume)), 16000)
    walls = rng.integers(0, 255, (2, 4, 4, 3), np.uint8)
    with VideoWriter(path, size, fps=fps, audio=wav if sound else None, crf=10) as video:
        for i in range(frames):
            wall = walls[int(cut is not None and i / fps >= cut)]
            picture = np.kron(wall, np.ones((size[0] // 4, size[1] // 4, 1), np.uint8))
            mouth = slice(size[0] // 2, size[0] // 2 + 2 + round(6 * abs(np.sin(i / 3))))
            picture[mouth, size[1] // 3 : size[1] // 2] = 200
            picture[:16, :16] = min(255, 40 + 2 * i)
            video.write(picture)
    wav.unlink(missing_ok=True)
    return path


def shade(frame: np.ndarray) -> float:
    """The number that `talk` wrote into a frame."""
    return (float(frame[2:8, 2:8].mean()) - 40) / 2


def dropped(result) -> str:
    assert isinstance(result, Dropped)
    return result.reason


# The filter


def test_a_clip_becomes_frames_and_samples_of_the_same_seconds(tmp_path):
    path = talk(tmp_path / "a.mp4")
    kept = examine(path, dataclasses.replace(CFG, height=48, width=64))
    assert isinstance(kept, Kept)
    assert kept.frames.shape == (50, 48, 64, 3) and kept.samples.shape == (32000,)
    seen = [shade(frame) for frame in kept.frames]
    np.testing.assert_allclose(seen, np.arange(50), atol=1)
    np.testing.assert_allclose(kept.samples, load_audio(path)[:32000], atol=1e-6)
    assert [w.start for w in kept.windows] == [0, 20, 40]


@pytest.mark.parametrize("fps", [24, 30, 50])
def test_frame_rates_become_25(tmp_path, fps):
    """The frame at each moment is the nearest one there is."""
    path = talk(tmp_path / "a.mp4", 1.2, fps=fps)
    kept = examine(path, dataclasses.replace(CFG, height=48, width=64))
    assert isinstance(kept, Kept) and len(kept.frames) == 30
    seen = np.array([shade(frame) for frame in kept.frames])
    np.testing.assert_allclose(seen / fps, np.arange(30) / 25, atol=0.5 / fps + 0.7 / fps)


def test_a_part_of_a_video_is_what_was_asked_for(tmp_path):
    path = talk(tmp_path / "a.mp4", 4.0, loud=0.5)
    kept = examine(path, dataclasses.replace(CFG, height=48, width=64), start=1.6, end=2.6)
    assert isinstance(kept, Kept) and len(kept.frames) == 25
    np.testing.assert_allclose([shade(f) for f in kept.frames], 40 + np.arange(25), atol=1)
    np.testing.assert_allclose(kept.samples, load_audio(path)[25600:41600], atol=1e-6)


def test_the_crop_is_around_the_face(tmp_path):
    """A picture of 64 x 32 whose left half is dark and whose right half is bright."""
    path, wav = tmp_path / "a.mp4", tmp_path / "a.wav"
    soundfile.write(wav, np.random.default_rng(0).uniform(-0.5, 0.5, 16000), 16000)
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, 32:] = 200
    with VideoWriter(path, (32, 64), audio=wav) as video:
        video.write(np.repeat(picture[None], 25, 0))
    square = dataclasses.replace(CFG, height=32, width=32)
    for x, share in ((0.0, 0.0), (0.25, 0.0), (0.5, 0.5), (0.75, 1.0), (1.0, 1.0)):
        kept = examine(path, square, x=x)
        assert isinstance(kept, Kept)
        assert abs(kept.frames[5].mean() / 200 - share) < 0.04, x


def test_each_fault_has_its_reason(tmp_path):
    broken = talk(tmp_path / "broken.mp4")
    broken.write_bytes(broken.read_bytes()[:2000])
    text = tmp_path / "text.mp4"
    text.write_text("this is not a video")
    only_sound = tmp_path / "sound.wav"
    soundfile.write(only_sound, np.ones(16000), 16000)
    empty = tmp_path / "empty.mp4"
    empty.touch()
    cases = [
        (talk(tmp_path / "short.mp4", 0.2), {}, "too short"),
        (talk(tmp_path / "mute.mp4", sound=False), {}, "no audio"),
        (talk(tmp_path / "quiet.mp4", loud=0.001), {}, "silent"),
        (talk(tmp_path / "slow.mp4", fps=10), {}, "frame rate"),
        (talk(tmp_path / "small.mp4", size=(16, 32)), {}, "too small"),
        (talk(tmp_path / "fine.mp4"), {"start": 5.0, "end": 6.0}, "too short"),
        (talk(tmp_path / "odd.mp4"), {"start": 5.0, "end": 9.0, "whole": None}, "wrong length"),
        (broken, {}, "unreadable"),
        (text, {}, "unreadable"),
        (empty, {}, "unreadable"),
        (only_sound, {}, "no video"),
        (tmp_path / "gone.mp4", {}, "unreadable"),
    ]
    for path, asked, reason in cases:
        assert dropped(examine(path, CFG, **asked)) == reason, path


def test_no_window_crosses_a_cut(tmp_path):
    whole = examine(talk(tmp_path / "a.mp4", 3.0), CFG)
    assert isinstance(whole, Kept) and whole.lost == 0
    many = dataclasses.replace(CFG, windows=99)
    for at in (1.0, 1.48):
        kept = examine(talk(tmp_path / "b.mp4", 3.0, cut=at), many)
        assert isinstance(kept, Kept)
        assert filters.cuts(kept.frames, CFG) == [round(25 * at)]
        for window in kept.windows:
            numbers = {*window.with_past(8), *window.references}
            assert len({n >= 25 * at for n in numbers}) == 1
    long = dataclasses.replace(CFG, latents=12)
    assert dropped(examine(talk(tmp_path / "c.mp4", 3.0, cut=1.48), long)) == "scene cut"


def test_windows_are_within_the_clip_and_say_what_is_true_of_their_past():
    for count, scenes, least in ((200, [], 0), (200, [90], 0), (200, [90], 73), (81, [], 73)):
        cfg = dataclasses.replace(CFG, windows=99, least_past=least)
        windows, _ = find_windows(scenes, count, cfg)
        assert windows
        for window in windows:
            numbers = window.with_past(cfg.frames)
            assert len(numbers) == 73 + cfg.frames and window.past >= least
            assert numbers[73] == window.start == window.references[0]
            assert 0 <= numbers.min() and numbers.max() < count
            true = numbers[73 - window.past : 73]
            np.testing.assert_array_equal(true, np.arange(window.start - window.past, window.start))
            assert (numbers[: 73 - window.past] == window.scene).all()
    assert find_windows([], 80, dataclasses.replace(CFG, least_past=73)) == ((), 0)
    few = find_windows([], 500, CFG)[0]
    assert [w.start for w in few] == [0, 240, 490]  # of 0, 10, ... 490


def test_a_worker_that_dies_costs_one_clip(tmp_path):
    """One that is killed over and over at the same clip, as by a decoder that crashes."""
    good = talk(tmp_path / "good.mp4", 1.0)
    jobs = [Job(Entry(str(i)), good) for i in range(4)]
    jobs[1] = Job(Entry("1"), _Deadly(good))
    jobs[3] = Job(Entry("3"), None, dropped=Dropped("missing"))
    results = list(examined(jobs, CFG, 1))
    assert [job.entry.id for job, _ in results] == list("0123")
    kinds = [r.reason if isinstance(r, Dropped) else "kept" for _, r in results]
    assert kinds == ["kept", "crash", "kept", "missing"]


class _Deadly(type(Path())):
    """A path that kills who unpickles it."""

    def __reduce__(self):
        return os._exit, (1,)


# The list


def listed(path: Path, text: str) -> list[Entry]:
    path.write_text(text)
    return read_list(path)


def test_lists_are_understood(tmp_path):
    path = tmp_path / "list.csv"
    one = listed(path, "--ab_c,3.5,12.000000,0.25,0.75\nxyz,0,4,0.5,0.5\n")
    assert one[0] == Entry("--ab_c", 3.5, 12.0, 0.25, 0.75)
    assert one[0].name == "--ab_c_3.5_12" and len(one) == 2
    two = listed(path, '\ufefffile,caption,extra\nsub/a b.mp4,"a man, speaking",7\nc.mp4,,\n')
    assert two[0] == Entry("a b", caption="a man, speaking", file="sub/a b.mp4")
    assert two[1].caption is None and two[1].x == 0.5
    three = listed(path, "youtube_id,start_sec,end_sec,face_center_x,face_center_y\nq,1,2,0,1\n")
    assert three == [Entry("q", 1.0, 2.0, 0.0, 1.0)]
    for text, said in (
        ("", "no clips"),
        ("a,1,2,0.5,0.5\nb,1,2,0.5\n", "line 2 has 4 columns"),
        ("a,one,2,0.5,0.5\n", "line 1: start = 'one'"),
        ("a,3,2,0.5,0.5\n", "end must be after start"),
        ("a,1,2,0.5,1.5\n", "line 1: the face"),
        ("a,1,nan,0.5,0.5\n", "end = 'nan'"),
        ("file,caption\n,hm\n", "neither id nor file"),
    ):
        with pytest.raises(LiveAvatarError, match=said):
            listed(path, text)
    with pytest.raises(LiveAvatarError, match="cannot read"):
        read_list(tmp_path / "missing.csv")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LiveAvatarError, match="UTF-8"):
        read_list(path)


def test_files_are_found_by_their_names(tmp_path):
    names = [
        "a_1.000000_2.500000.mp4", "a_7_9.mp4", "deep/b.webm", "c-best.mkv", "cc.mp4",
        "e.mp4", "deep/e.mp4", "f_1_2.mp4", "f_1.0_2.0.mp4", "g (1).mp4", "g (2).mp4", "h.txt",
    ]  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    folder = Folder(tmp_path)
    for entry, found in (
        (Entry("a", 1.0, 2.5), Found(tmp_path / names[0], False)),
        (Entry("a", 7.0, 9.0), Found(tmp_path / names[1], False)),
        (Entry("a", 3.0, 4.0), "missing"),  # both files are of other times
        (Entry("b", 3.0, 4.0), Found(tmp_path / "deep/b.webm", True)),
        (Entry("c", 3.0, 4.0), Found(tmp_path / "c-best.mkv", None)),
        (Entry("e", 3.0, 4.0), "ambiguous"),
        (Entry("f", 1.0, 2.0), "ambiguous"),
        (Entry("g", 1.0, 2.0), "ambiguous"),
        (Entry("h", 1.0, 2.0), "missing"),
        (Entry("x", file="cc.mp4"), Found(tmp_path / "cc.mp4", None)),
        (Entry("x", file="no.mp4"), "missing"),
    ):
        assert folder.find(entry) == found, entry
    with pytest.raises(LiveAvatarError, match="not a folder"):
        Folder(tmp_path / "missing")


def test_scores_are_read_and_demanded(tmp_path):
    table, tree = tmp_path / "s.csv", tmp_path / "s.json"
    table.write_text("id,sync,offset\na,3.5,2\nb_1_2,2.5,\n")
    tree.write_text('{"a": {"sync": 3.5, "offset": 2}, "b_1_2": {"sync": 2.5}}')
    for scores in (Scores(table), Scores(tree)):
        assert scores.of(Entry("a", 5.0, 6.0)) == {"sync": 3.5, "offset": 2.0}
        assert scores.of(Entry("b", 1.0, 2.0)) == {"sync": 2.5}
        assert scores.of(Entry("c")) == {}
    demand = Demand.parse("sync >= 3")
    assert demand.met({"sync": 3.0}) and not demand.met({"sync": 2.9}) and not demand.met({})
    for text in ("sync", "sync=3", ">=3", "sync>=x"):
        with pytest.raises(LiveAvatarError, match="demand"):
            Demand.parse(text)
    table.write_text("name,sync\na,3\n")
    tree.write_text("[1]")
    for path in (table, tree, tmp_path / "missing.json"):
        with pytest.raises(LiveAvatarError):
            Scores(path)


# The command


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder with files of all sorts, and list.csv."""
    folder = tmp_path_factory.mktemp("clips")
    talk(folder / "aaa_3.000000_5.000000.mp4", seed=1)
    talk(folder / "bbb.mp4", 4.0, fps=30, seed=2)
    talk(folder / "cut_0_2.mp4", cut=1.0, seed=3)
    talk(folder / "mute_0_2.mp4", sound=False)
    talk(folder / "short_0_0.2.mp4", 0.2)
    talk(folder / "tiny_0_2.mp4", size=(16, 16))
    (folder / "torn_0_2.mp4").write_bytes(b"\x00" * 5000)
    talk(folder / "ddd_0_2.mp4", seed=4)
    rows = [
        ("aaa", 3, 5), ("bbb", 1, 3), ("gone", 0, 2), ("cut", 0, 2), ("mute", 0, 2),
        ("short", 0, 0.2), ("tiny", 0, 2), ("torn", 0, 2), ("ddd", 0, 2), ("aaa", 3.0, 5.0),
    ]  # fmt: skip
    lines = [f"{name},{start},{end},0.5,0.5" for name, start, end in rows]
    (folder / "list.csv").write_text("\n".join(lines))
    return folder


SETTINGS = ("latents=6", "stride=24", "references=2")  # 24 frames: of a cut of 2 s, one is left


def command(networks: Path, clips: Path, out: Path, *more) -> list[str]:
    given = ["encode", "--list", clips / "list.csv", "--clips", clips, "--out", out]
    given += ["--weights", networks, "--size", "48*32", "--per-shard", 3, "--workers", 1]
    return [str(part) for part in (*given, "--device", "cpu", "--set", *SETTINGS, *more)]


def blobs(out: Path) -> dict[str, list[bytes]]:
    """The records of a folder as they are, by shard."""
    found = {}
    for path in sorted(out.glob("*.array_record")):
        reader = ArrayRecordReader(str(path))
        found[path.name] = reader.read(list(range(reader.num_records())))
        reader.close()
    return found


def started(arguments: list[str]) -> subprocess.Popen:
    """The command in a process of its own, compiled for as many devices as here, and as here:
    else its numbers may differ in the last bit."""
    here = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_NUM_CPU_DEVICES": "8"}
    return subprocess.Popen(
        [sys.executable, "-m", "liveavatar_jax.cli", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore", **here},
    )  # fmt: skip


@pytest.fixture(scope="module")
def encoded(weights, clips, tmp_path_factory) -> Path:  # noqa: F811
    out = tmp_path_factory.mktemp("encoded") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
        assert cli.main(command(weights, clips, out)) == 0
    return out


def test_every_clip_is_used_or_in_the_report(encoded):
    report = json.loads((encoded / "report.json").read_text())
    reasons = {
        "missing": 1, "no audio": 1, "too short": 1, "too small": 1, "unreadable": 1,
        "listed twice": 1,
    }  # fmt: skip
    assert report["clips"] == 10 and report["dropped"] == reasons
    with (encoded / "dropped.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == ["gone", "mute", "short", "tiny", "torn", "aaa"]
    ids = {record.about.id for record in records(encoded)}
    assert ids == {
        "aaa_3_5/0", "aaa_3_5/24", "bbb_1_3/0", "bbb_1_3/24", "cut_0_2/0", "cut_0_2/25",
        "ddd_0_2/0", "ddd_0_2/24",
    }  # fmt: skip
    assert report["windows"] == len(ids) and not list(encoded.glob("*.partial"))


def records(out: Path) -> list:
    source = Shards([out], 64)
    return [source.read(i) for i in range(len(source))]


def test_a_record_is_what_the_networks_make_of_the_window(encoded, weights, clips):  # noqa: F811
    (record,) = (r for r in records(encoded) if r.about.id == "bbb_1_3/24")
    assert record.about.start == 24 / 25 and record.about.past == 24 and record.about.frames == 24
    cfg = checkpoint.load_config(weights)
    vae, encode = load(weights, "vae"), jax.jit(lambda vae, x: vae.encode(x)[0])
    windows = parse_windows("48*32", SETTINGS)
    kept = examine(clips / "bbb.mp4", windows, start=1.0, end=3.0)
    assert isinstance(kept, Kept)
    pixels = to_pixels(kept.frames)
    past = np.concatenate([np.repeat(pixels[:1], 73 - 24, 0), pixels[:24]])
    latents = np.asarray(encode(vae, np.concatenate([past, pixels[24:48]])[None]))[0]
    near = lambda a, b: np.testing.assert_allclose(
        np.asarray(a, np.float32), b, rtol=0.01, atol=0.01 * np.abs(b).max()
    )
    near(record.motion, latents[:19])
    near(record.latents, latents[19:])
    still = np.asarray(encode(vae, np.repeat(pixels[24:25], 73, 0)[None]))[0]
    near(record.stills[0], still)
    near(record.references[0], np.asarray(encode(vae, pixels[None, 24:25]))[0, 0])
    near(record.references[1], np.asarray(encode(vae, pixels[None, 25:26]))[0, 0])
    assert record.text.shape == (1, cfg.dit.text_dim)


def test_speech_features_are_of_the_window_and_know_the_clip(encoded, weights, clips):  # noqa: F811
    """Those of one pass over the whole clip, which fits the encoder's window."""
    from liveavatar_jax.data.speech import Moments, normalise, video_features

    cfg = checkpoint.load_config(weights)
    encoder = load(weights, "speech")
    samples = load_audio(clips / "ddd_0_2.mp4")[:32000]
    states = encoder(jnp.asarray(normalise(samples))[None])
    whole = np.asarray(video_features(states))[0]
    assert Moments.of([samples]).count == 32000 and cfg.log_mel is None
    for record in records(encoded):
        if record.about.id.startswith("ddd"):
            start = round(record.about.start * 25)
            want = whole[start : start + 24]
            np.testing.assert_allclose(
                np.asarray(record.audio, np.float32), want, atol=0.02 * np.abs(want).max()
            )


def test_captions_become_the_rows_of_the_text_encoder(weights, published, tmp_path):  # noqa: F811
    place = shutil.copytree(weights, tmp_path / "weights")
    shutil.copy(published / "google" / "umt5-xxl" / "spiece.model", place)
    cfg = checkpoint.load_config(place)
    entries = [Entry("a", caption="she smiles"), Entry("b")]
    captions = Captions(place, cfg, None, entries)
    tokenizer, encoder = Tokenizer(place), load(place, "text")
    for asked, text in (("she smiles", "she smiles"), (None, PROMPT)):
        ids, mask = tokenizer(text, cfg.dit.text_len)
        rows = captions(asked)
        want = np.asarray(encoder(jnp.asarray(ids), jnp.asarray(mask)))[0, : mask.sum()]
        assert rows.shape == want.shape and captions(asked) is rows
        np.testing.assert_allclose(np.asarray(rows, np.float32), want, rtol=0.01, atol=0.02)
    assert captions.encoder is not None
    one = Captions(place, cfg, "a man is speaking", [Entry("b")])
    assert one(None).shape[1] == cfg.dit.text_dim and one.encoder is None


def test_what_was_encoded_can_be_trained_on(encoded):
    cfg = DataConfig((Source((str(encoded),)),), batch=3, text_len=16)
    data = open_clips(cfg)
    batch = next(data)
    assert batch["latents"].shape == (3, 6, 4, 6, 16) and batch["motion"].shape[1] == 19
    assert batch["audio"].shape[:3] == (3, 1, 24) and len(data.ids(0)) == 3
    assert all(np.isfinite(x.astype(np.float32)).all() for x in batch.values())
    data.close()


def test_a_killed_run_goes_on_to_the_same_records(encoded, weights, clips, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    arguments = command(weights, clips, out)
    process = started(arguments)
    waiting = time.monotonic() + 240
    while not (out / "clips-00001.json").exists() and time.monotonic() < waiting:
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert not (out / "report.json").exists()
    kept = (out / "clips-00000.array_record").stat().st_mtime_ns
    assert cli.main(arguments) == 0
    assert (out / "clips-00000.array_record").stat().st_mtime_ns == kept
    assert blobs(out) == blobs(encoded)
    for name in ("dropped.csv", "clips-00002.json"):
        assert (out / name).read_text() == (encoded / name).read_text()


@pytest.fixture
def blank(monkeypatch) -> None:
    """Networks that see and hear nothing, at once."""

    def encode(networks, job, kept):
        grid, frames, k = (4, 6, 16), networks.windows.frames, networks.windows.references
        zeros = lambda *shape: np.zeros(shape, np.float32)
        for window in kept.windows:
            yield Clip(
                zeros(frames // 4, *grid), zeros(19, *grid), zeros(k, *grid), zeros(k, 19, *grid),
                zeros(1, 5), zeros(frames, 2, 3), networks.about(job, window),
            )  # fmt: skip

    monkeypatch.setattr(Networks, "encode", encode)


def test_parts_are_the_whole(encoded, weights, clips, tmp_path, capsys, blank):  # noqa: F811
    out = tmp_path / "out"
    for part in ("1/2", "2/2"):
        assert cli.main(command(weights, clips, out, "--part", part)) == 0
    whole, parts = ({r.about.id: r.about for r in records(folder)} for folder in (encoded, out))
    assert parts == whole
    reports = [json.loads((out / f"report-{i}of2.json").read_text()) for i in (1, 2)]
    assert sum(r["clips"] for r in reports) == 10
    said = capsys.readouterr()
    assert "dropped" in said.out and "missing" in said.out and "clip" in said.err


def test_an_interrupt_costs_its_shard_only(weights, clips, tmp_path, capsys, blank):  # noqa: F811
    """Ctrl-C at a clip of a shard and at one of the next; in the end the same records."""
    encode = Networks.encode
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert cli.main(command(weights, clips, whole)) == 0
    for stopped in ("bbb", "ddd"):

        def until(networks, job, kept, stopped=stopped):
            if job.entry.id == stopped:
                raise KeyboardInterrupt
            return encode(networks, job, kept)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Networks, "encode", until)
            assert cli.main(command(weights, clips, out)) == 130
        assert not list(out.glob("*.partial")) and not (out / "report.json").exists()
        assert "Traceback" not in capsys.readouterr().err
    assert cli.main(command(weights, clips, out)) == 0
    assert blobs(out) == blobs(whole)


def test_other_settings_do_not_mix_with_what_is_there(encoded, weights, clips, tmp_path, capsys):  # noqa: F811
    out = shutil.copytree(encoded, tmp_path / "out")
    for more, named in (
        (("--per-shard", "4"), "per_shard"),
        (("--set", "stride=9"), "windows.stride"),
        (("--part", "1/2"), "parts"),
    ):
        assert cli.main(command(weights, clips, out, *more)) == 2
        assert named in capsys.readouterr().err
    assert cli.main(command(weights, clips, out)) == 0  # nothing is left to do
    (out / "clips-00000.array_record").unlink()
    assert cli.main(command(weights, clips, out)) == 2
    assert "clips-00000.array_record is gone" in capsys.readouterr().err


def test_scores_decide(weights, clips, tmp_path, capsys, blank):  # noqa: F811
    scores, out = tmp_path / "scores.csv", tmp_path / "out"
    scores.write_text("id,sync\naaa,5\nddd,2\n")
    more = ("--scores", scores, "--require", "sync>=3")
    assert cli.main(command(weights, clips, out, *more)) == 0
    assert {r.about.id.split("_")[0] for r in records(out)} == {"aaa"}
    assert records(out)[0].about.scores == {"sync": 5.0}
    assert "score sync" in capsys.readouterr().out


def test_a_list_of_which_nothing_can_be_used_says_so(weights, clips, tmp_path, capsys, blank):  # noqa: F811
    wishes = tmp_path / "list.csv"
    wishes.write_text("gone,0,2,0.5,0.5\nmute,0,2,0.5,0.5\n")
    arguments = command(weights, clips, tmp_path / "out", "--list", wishes)
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert "no clip could be used" in said.err and "no audio" in said.out
    assert not list((tmp_path / "out").glob("*.array_record"))


def test_bad_input_is_one_sentence(weights, clips, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    file = tmp_path / "file"
    file.touch()
    base = command(weights, clips, out)
    with_list = lambda path: [path if x == str(clips / "list.csv") else x for x in base]
    cases = [
        ([*base, "--weights", str(tmp_path)], "not a converted checkpoint"),
        ([*base, "--clips", str(tmp_path / "none")], "none"),
        ([*base, "--size", "50*32"], "width"),
        ([*base, "--size", "big"], "big"),
        ([*base, "--set", "latents=many"], "latents"),
        ([*base, "--set", "latent=6"], "latents"),
        ([*base, "--part", "3/2"], "--part"),
        ([*base, "--workers", "0"], "--workers"),
        ([*base, "--require", "sync>=3"], "--scores"),
        ([*base, "--out", str(file)], "file"),
        (with_list(str(file)), "lists no clips"),
        (with_list(str(tmp_path / "none.csv")), "none.csv"),
        ([*base, "--caption", "hello"], "sentencepiece"),
    ]
    for arguments, named in cases:
        assert cli.main(arguments) == 2, arguments
        said = capsys.readouterr().err
        assert said.startswith("liveavatar-jax: ") and named in said, (arguments, said)
        assert said.count("\n") == 1


def test_parts_and_windows_of_the_command_line():
    assert parse_part("2/8") == (2, 8)
    assert parse_windows("720*400", ["stride=42", "cut=9"]).stride == 42
    with pytest.raises(LiveAvatarError):
        parse_part("0/8")


def test_bytes_of_a_rotated_film_stand_upright(tmp_path):
    path = talk(tmp_path / "a.mp4", 1.0, size=(48, 64))
    turned = tmp_path / "turned.mp4"
    with av.open(str(path)) as source, av.open(str(turned), "w") as out:
        streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    data = bytearray(turned.read_bytes())
    at = data.find(b"tkhd") + 4 + 40  # the matrix of the first track: quarter turn
    one = (1 << 16).to_bytes(4, "big", signed=True)
    minus = (-(1 << 16)).to_bytes(4, "big", signed=True)
    zero, unit = bytes(4), (1 << 30).to_bytes(4, "big")
    data[at : at + 36] = zero + one + zero + minus + zero + zero + zero + zero + unit
    turned.write_bytes(data)
    tall = dataclasses.replace(CFG, height=64, width=48)
    upright, flat = examine(turned, tall), examine(path, CFG)
    assert isinstance(upright, Kept) and isinstance(flat, Kept)
    corner = upright.frames[10][2:10, -10:-2]  # clockwise: what was upper left is upper right
    assert abs(corner.mean() - 60) < 6
