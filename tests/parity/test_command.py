"""The published layout, converted, and two real portraits that speak two real recordings."""

import av
import pytest
import soundfile

from liveavatar_jax import cli


@pytest.fixture(scope="module")
def converted(parity, tmp_path_factory):
    tiny = parity / "tiny_checkpoint"
    out = tmp_path_factory.mktemp("converted") / "avatar"
    lora = tiny / "LiveAvatar" / "liveavatar.safetensors"
    assert cli.main(["convert", "--base", str(tiny), "--lora", str(lora), "--out", str(out)]) == 0
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion_blogger", "music_producer"])
def test_a_real_portrait_speaks_a_real_recording(parity, converted, tmp_path, name):
    examples = parity.parent / "examples"
    if not examples.is_dir():
        pytest.skip("no example portraits beside the fixtures")
    out = tmp_path / "out.mp4"
    given = {"weights": converted, "image": examples / f"{name}.jpg", "out": out}
    given |= {"audio": examples / f"{name}.wav", "size": "128*128", "device": "cpu"}
    assert cli.main(["generate", *(f"--{key}={value}" for key, value in given.items())]) == 0
    sound = soundfile.info(examples / f"{name}.wav")
    with av.open(str(out)) as file:
        video, track = file.streams.video[0], file.streams.audio[0]
        assert video.average_rate == 25
        seconds = float(track.duration * track.time_base)
        frames = sum(1 for _ in file.decode(video=0))
    assert frames == -(-sound.frames * 25 // sound.samplerate)
    assert seconds == pytest.approx(frames / 25, abs=1e-3)
