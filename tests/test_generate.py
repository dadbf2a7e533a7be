"""The command as a user meets it: files in, a video out, one sentence where that cannot be."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import jax
import numpy as np
import pytest
import soundfile
from flax import nnx
from PIL import Image

from liveavatar_jax import cli, stream
from liveavatar_jax.config import DiTConfig, MelConfig, ModelConfig, SpeechConfig
from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax.generate import with_lead
from liveavatar_jax.models.speech import SpeechEncoder
from liveavatar_jax.models.text import TextEncoder
from liveavatar_jax.weights import checkpoint, packed

from .networks import random

DATA = Path(__file__).parent / "data"
PORTRAIT, SPEECH = DATA / "portrait.jpg", DATA / "speech.wav"
DIT = DiTConfig.tiny(dim=32, ffn_dim=48, heads=2, layers=2, inject_layers=(1,), audio_layers=5)


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory, monkeypatch):
    """The command's cache of compiled programs, away from the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    mine = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", mine)


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("weights") / "tiny")


def saved(folder: Path, **changes) -> Path:
    """A converted checkpoint with random weights, whose speech encoder fits its DiT."""
    dit = dataclasses.replace(DIT, **changes)
    cfg = ModelConfig.tiny(dit=dit, speech=SpeechConfig.tiny(layers=4))
    avatar = random(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0)))
    networks = {
        "dit": avatar.dit,
        "vae": avatar.vae,
        "text": random(lambda: TextEncoder(cfg.text, rngs=nnx.Rngs(0))),
        "speech": random(lambda: SpeechEncoder(cfg.speech, rngs=nnx.Rngs(0))),
    }
    checkpoint.save(folder, cfg, networks)
    return folder


def command(weights: Path, out: Path, *more, image=PORTRAIT, audio=SPEECH) -> list[str]:
    given = ["generate", "--weights", weights, "--image", image, "--audio", audio, "--out", out]
    return [str(part) for part in (*given, "--size", "64*64", "--device", "cpu", *more)]


def decoded(path: Path) -> tuple[list[np.ndarray], float]:
    with av.open(str(path)) as file:
        frames = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
    with av.open(str(path)) as file:
        sound = file.streams.audio[0]
        return frames, float(sound.duration * sound.time_base)


def test_a_video_has_the_sound_s_length(weights, tmp_path, capfd):
    out = tmp_path / "out.mp4"
    assert cli.main(command(weights, out)) == 0
    frames, seconds = decoded(out)
    speech = soundfile.info(SPEECH)
    assert len(frames) == -(-speech.frames * 25 // speech.samplerate)
    assert seconds == pytest.approx(len(frames) / 25, abs=1e-3)
    printed, progress = capfd.readouterr()
    for word in (f"{len(frames)} frames", "FPS", "real time", "first frame after"):
        assert word in printed
    assert "frame/s" in progress


@pytest.mark.slow
def test_the_seed_decides(weights, tmp_path, monkeypatch):
    """Compared before x264, whose threads now and then code the same frames differently."""
    videos, blocks, write = [], [], VideoWriter.write

    def watched(video, frames):
        blocks.append(frames.copy())
        write(video, frames)

    monkeypatch.setattr(VideoWriter, "write", watched)
    for seed in (1, 1, 2):
        blocks.clear()
        out = tmp_path / "out.mp4"
        assert cli.main(command(weights, out, "--seed", str(seed), "--steps", "1")) == 0
        videos.append(np.concatenate(blocks))
    np.testing.assert_array_equal(videos[0], videos[1])
    assert (videos[0] != videos[2]).any()


@pytest.mark.parametrize("frames", [4, 12, 16])
def test_speech_features_wait_for_the_frames_that_are_not_shown(frames):
    heard = np.arange(60.0).reshape(5, 12, 1, 1)
    blocks = list(itertools.islice(with_lead(heard, frames), 48 // frames))
    assert all(len(block) == frames for block in blocks)
    later, lead = np.concatenate(blocks)[:, 0, 0], stream.LEAD_FRAMES
    np.testing.assert_array_equal(later[lead:], np.arange(48.0 - lead))
    assert (later[:lead] == 0).all()


def test_ten_milliseconds_and_silence_are_speech_enough(weights, tmp_path):
    for name, samples in (("short", np.full(160, 0.1)), ("silent", np.zeros(16000))):
        audio, out = tmp_path / f"{name}.wav", tmp_path / f"{name}.mp4"
        soundfile.write(audio, samples, 16000)
        assert cli.main(command(weights, out, audio=audio)) == 0
        frames, _ = decoded(out)
        assert len(frames) == -(-len(samples) // 640)


def test_an_interrupt_leaves_a_playable_file(weights, tmp_path):
    audio, out = tmp_path / "long.wav", tmp_path / "long.mp4"
    soundfile.write(audio, np.sin(np.arange(16000 * 120) / 20), 16000)
    arguments = command(weights, out, audio=audio)
    process = subprocess.Popen(
        [sys.executable, "-m", "liveavatar_jax.cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    waiting = time.monotonic() + 240
    while not (out.exists() and out.stat().st_size > 2000) and time.monotonic() < waiting:
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    frames, seconds = decoded(out)
    assert process.returncode == 130 and "interrupted" in printed
    assert 0 < len(frames) < 3000
    assert f"{len(frames)} frames" in printed
    assert seconds == pytest.approx(len(frames) / 25, abs=1e-3)


def picture(path: Path, width: int, height: int) -> Path:
    Image.new("RGB", (width, height)).save(path)
    return path


def test_bad_input_is_one_sentence(weights, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x00" * 100)
    empty = tmp_path / "empty.wav"
    soundfile.write(empty, np.zeros(0), 16000)
    holes = tmp_path / "holes.wav"
    soundfile.write(holes, np.full(16000, np.nan), 16000, subtype="FLOAT")
    out = tmp_path / "out.mp4"
    missing = tmp_path / "missing"
    cases = [
        (command(weights, out, image=missing), "missing"),
        (command(weights, out, image=broken), "broken"),
        (command(weights, out, image=picture(tmp_path / "strip.png", 10_000, 10)), "strip.png"),
        (command(weights, out, audio=missing), "missing"),
        (command(weights, out, audio=broken), "broken"),
        (command(weights, out, audio=empty), "empty.wav"),
        (command(weights, out, audio=holes), "holes.wav"),
        (command(weights, missing / "out.mp4"), "missing"),
        (command(weights, tmp_path), str(tmp_path)),
        (command(missing, out), "not a converted checkpoint"),
        (command(weights, out, "--steps", "0"), "--steps"),
        (command(weights, out, "--size", "large"), "large"),
        (command(weights, out, "--prompt", "hello"), "sentencepiece"),
    ]
    for arguments, named in cases:
        assert cli.main(arguments) == 2, arguments
        _, said = capsys.readouterr()
        assert said.startswith("liveavatar-jax: ") and named in said
        assert said.count("\n") == 1 and "Traceback" not in said
        assert not out.exists()


def test_a_one_pixel_portrait_is_a_portrait(weights, tmp_path):
    out = tmp_path / "out.mp4"
    dot = picture(tmp_path / "dot.png", 1, 1)
    assert cli.main(command(weights, out, "--steps", "1", image=dot)) == 0
    assert decoded(out)[0][0].shape == (64, 64, 3)


@pytest.fixture
def preset(tmp_path_factory, monkeypatch) -> Path:
    """A built-in model of random weights, which has seen squares of 64 and hears log-mel."""
    presets = tmp_path_factory.mktemp("presets")
    monkeypatch.setattr(packed, "PRESETS", presets)
    mel = MelConfig(bins=8, layers=16, ahead=12, flat=True)
    dit = dataclasses.replace(DIT, audio_layers=1, audio_dim=128)
    cfg = ModelConfig.tiny(dit=dit, mel=mel, size=64)
    avatar = random(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0)))
    packed.pack(presets / "puppet", cfg, {"dit": avatar.dit, "vae": avatar.vae})
    picture(presets / "puppet" / packed.PORTRAIT, 64, 64)
    soundfile.write(presets / "puppet" / packed.SPEECH, np.sin(np.arange(16000) / 20), 16000)
    return presets / "puppet"


def test_without_arguments_the_built_in_model_speaks(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "--device", "cpu", "--steps", "1"]) == 0
    frames, seconds = decoded(tmp_path / "avatar.mp4")
    assert len(frames) == 25 and frames[0].shape == (384, 384, 3)
    assert seconds == pytest.approx(1.0)
    assert "photograph" not in capsys.readouterr().err


def test_each_argument_replaces_what_is_built_in(preset, tmp_path, capsys):
    audio, out = tmp_path / "short.wav", tmp_path / "mine.mp4"
    soundfile.write(audio, np.zeros(3200), 16000)
    given = ["--image", PORTRAIT, "--audio", audio, "--out", out, "--scale", "2", "--steps", "1"]
    assert cli.main(["generate", "--device", "cpu", *map(str, given)]) == 0
    frames, _ = decoded(out)
    assert len(frames) == 5 and frames[0].shape == (128, 128, 3)
    assert "photograph" in capsys.readouterr().err
    given = ["--weights", preset, "--out", out, "--size", "128*128", "--scale", "1"]
    assert cli.main(["generate", "--device", "cpu", "--steps", "1", *map(str, given)]) == 0
    assert decoded(out)[0][0].shape == (64, 64, 3)  # a portrait is never made larger
    assert "photograph" not in capsys.readouterr().err


def test_the_video_is_the_picture_larger(tmp_path):
    flat = np.full((1, 64, 64, 3), (200, 40, 90), np.uint8)
    flat[:, :32] = 0
    with VideoWriter(tmp_path / "out.mp4", (64, 64), scale=3) as video:
        video.write(flat)
    with av.open(str(tmp_path / "out.mp4")) as file:
        (shown,) = (f.to_ndarray(format="rgb24") for f in file.decode(video=0))
    assert shown.shape == (192, 192, 3)
    want = np.repeat(np.repeat(flat[0], 3, axis=0), 3, axis=1).astype(int)
    away = np.abs(np.arange(192) - 96) > 12  # from the edge, where Lanczos rings
    assert np.abs(shown.astype(int) - want)[away].max() <= 4


def test_what_is_not_built_in_is_asked_for(preset, tmp_path, monkeypatch, capsys):
    (preset / packed.PORTRAIT).unlink()
    (preset / packed.SPEECH).unlink()
    cases = [
        ([], "--image"),
        (["--image", str(PORTRAIT)], "--audio"),
        (["--preset", "doll"], "'doll'; there is puppet"),
        (["--scale", "0"], "--scale"),
    ]
    for given, named in cases:
        assert cli.main(["generate", *given]) == 2
        _, said = capsys.readouterr()
        assert said.startswith("liveavatar-jax: ") and named in said and said.count("\n") == 1
    monkeypatch.setattr(packed, "PRESETS", tmp_path)
    given = ["--image", str(PORTRAIT), "--audio", str(SPEECH), "--out", str(tmp_path / "out.mp4")]
    assert cli.main(["generate", *given]) == 2
    _, said = capsys.readouterr()
    assert "--weights" in said and "convert" in said and said.count("\n") == 1


MEASURE = """
import resource, sys
from liveavatar_jax import cli
assert cli.main(sys.argv[1:]) == 0
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_recording(weights, tmp_path):
    peaks = []
    for seconds in (60, 600):
        audio = tmp_path / f"{seconds}.wav"
        soundfile.write(audio, np.sin(np.arange(16000 * seconds) / 20), 16000)
        arguments = command(weights, tmp_path / "out.mp4", "--steps", "1", audio=audio)
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True
        )
        peaks.append(int(result.stdout.split("peak")[1]))
    assert peaks[1] <= 1.1 * peaks[0], peaks


def test_bench_prints_a_table_and_writes_json(tmp_path, capsys):
    figures = tmp_path / "figures.json"
    given = ["bench", "--sizes", "tiny", "--only", "prefill", "denoise", "--repeats", "1"]
    assert cli.main([*given, "--json", str(figures)]) == 0
    assert "denoise" in capsys.readouterr().out and '"median"' in figures.read_text()
    assert cli.main(["bench", "--sizes", "huge"]) == 2
    assert "huge" in capsys.readouterr().err
