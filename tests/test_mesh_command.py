"""`generate` over a mesh, in one process and in two."""

import os
import signal
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from liveavatar_jax import cli
from liveavatar_jax.data.video import VideoWriter

from .processes import started
from .test_generate import command, private_cache, saved  # noqa: F401

# Keeps the frames as they were before x264, and says when some have come.
WATCHED = """
import sys
import numpy as np
from liveavatar_jax import cli
from liveavatar_jax.data.video import VideoWriter

SEVERAL_DEVICES = True  # for conftest

seen, write = [], VideoWriter.write

def watched(video, frames):
    seen.append(frames.copy())
    print("wrote", sum(map(len, seen)), flush=True)
    write(video, frames)

VideoWriter.write = watched
code = cli.main(sys.argv[2:])
if seen:
    np.save(sys.argv[1], np.concatenate(seen))
sys.exit(code)
"""


@pytest.fixture(scope="module")
def eight_heads(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("weights") / "mesh", dim=64, heads=8)


def frames(monkeypatch, *argv: str) -> np.ndarray:
    seen, write = [], VideoWriter.write

    def watched(video, frames):
        seen.append(frames.copy())
        write(video, frames)

    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", watched)
        assert cli.main(list(argv)) == 0
    return np.concatenate(seen)


def close(ours: np.ndarray, want: np.ndarray) -> None:
    assert ours.shape == want.shape
    off = np.abs(ours.astype(int) - want.astype(int))
    assert off.max() <= 1 and (off > 0).mean() < 1e-3  # bytes, rounded


@pytest.fixture(scope="module")
def want(eight_heads, tmp_path_factory) -> np.ndarray:
    """Frames of one device."""
    with pytest.MonkeyPatch.context() as patch:
        out = tmp_path_factory.mktemp("want") / "out.mp4"
        return frames(patch, *command(eight_heads, out))


def test_a_mesh_makes_the_same_video(eight_heads, want, tmp_path, monkeypatch, capfd):
    out = tmp_path / "out.mp4"
    argv = command(eight_heads, out, "--mesh", "stage=4,vae=2", "--warm", "2")
    close(frames(monkeypatch, *argv), want)
    assert f"{len(want)} frames" in capfd.readouterr().out
    with av.open(str(out)) as file:
        assert sum(1 for _ in file.decode(video=0)) == len(want)


def in_two(folder: Path, out: Path, *more: str):
    argv = command(folder, out, "--mesh", "stage=4,tensor=2", "--heartbeat", "10", *more)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    try:
        return started(["-c", WATCHED, str(out.with_suffix(".npy")), *argv])
    finally:
        del os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"]


@pytest.mark.slow
def test_two_processes_make_the_same_video(eight_heads, want, tmp_path):
    """Only the first one has the portrait, and only the last one writes."""
    out = tmp_path / "out.mp4"
    with in_two(eight_heads, out, "--warm", "1") as (first, last):
        assert (first.wait(240), last.wait(30)) == (0, 0), (first.err, last.err)
        assert "wrote" not in first.out and f"{len(want)} frames" in last.out
    close(np.load(out.with_suffix(".npy")), want)


@pytest.mark.slow
def test_a_lost_process_ends_the_other_with_a_sentence(eight_heads, tmp_path):
    out, long = tmp_path / "out.mp4", tmp_path / "long.wav"
    soundfile.write(long, np.random.default_rng(0).normal(0, 0.1, 16_000 * 600), 16_000)
    with in_two(eight_heads, out, "--audio", str(long)) as (first, last):
        last.wait_for("wrote", 240)
        first.send(signal.SIGKILL)
        assert last.wait(10 + 5 + 2) == 2
        said = [line for line in last.err.splitlines() if "lost" in line]
        assert (
            len(said) == 1 and "start all of them again" in said[0] and "Traceback" not in last.err
        )
    with av.open(str(out)) as file:  # what had come is there
        assert sum(1 for _ in file.decode(video=0)) > 0


@pytest.mark.parametrize(
    "more, words",
    [
        (["--mesh", "stage=3"], "does not match the 4 denoising steps"),
        (["--mesh", "stage=4", "--steps", "3"], "use stage=3 or --steps 4"),
        (["--mesh", "stage=4,tensor=3"], "does not divide the 8 attention heads"),
        (["--mesh", "stage=4,tensor=4"], "needs 16 devices"),
        (["--mesh", "4"], "'4' is not understood"),
        (["--warm", "1"], "--warm is for a mesh"),
        (["--mesh", "stage=3", "--steps", "3", "--warm", "1"], "shares the 8 heads out over all 3"),
        (["--mesh", "stage=4", "--warm", "-1"], "--warm -1 must be at least 0"),
        (["--fake-devices", "2"], "comes too late"),
        (["--coordinator", "127.0.0.1:1"], "--processes and --process-id missing"),
    ],
)
def test_bad_meshes_are_one_sentence(eight_heads, tmp_path, capsys, more, words):
    assert cli.main(command(eight_heads, tmp_path / "out.mp4", *more)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in said and said.startswith("liveavatar-jax: ")
    assert not (tmp_path / "out.mp4").exists()
