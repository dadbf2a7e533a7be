import contextlib
import os
import resource
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax.types import LiveAvatarError

SPEECH = Path(__file__).parent / "data" / "speech.wav"
SIZE = (64, 96)
LOUD = 0.25  # a click, against the codec's noise


@dataclass
class Played:
    """What a player gets to see and hear."""

    times: list[float]  # of the frames, in seconds
    levels: np.ndarray  # mean green of each frame
    rate: int = 0
    sound: np.ndarray | None = None  # [channels, samples], trimmed as presented

    def clicks(self):
        """Times in seconds of the clicks, the middle of each."""
        loud = np.flatnonzero(np.abs(self.sound[0]) > LOUD)
        groups = np.split(loud, np.flatnonzero(np.diff(loud) > self.rate // 20) + 1)
        peaks = [g[np.abs(self.sound[0, g]).argmax()] for g in groups if len(g)]
        return np.array(peaks) / self.rate


def play(path, torn=False):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        played = Played(
            [f.time for f in frames],
            np.array([f.to_ndarray(format="rgb24")[..., 1].mean() for f in frames]),
        )
    with av.open(str(path)) as container:
        if container.streams.audio:
            stream = container.streams.audio[0]
            pieces = list(container.decode(stream))
            assert pieces[0].time == 0
            sound = np.concatenate([p.to_ndarray() for p in pieces], axis=1)
            played.rate = stream.rate
            if not torn:  # else the index that tells the length was not written yet
                # libavformat trims the front by the edit list, of the end only whole packets
                end = round(float(stream.duration * stream.time_base) * stream.rate)
                assert 0 <= sound.shape[1] - end < 1024
                sound = sound[:, :end]
            played.sound = sound
    return played


def grey(n, start=0):
    """n frames whose brightness tells their number."""
    levels = 20 + 5 * (np.arange(start, start + n) % 40)
    return np.broadcast_to(levels[:, None, None, None], (n, *SIZE, 3)).astype(np.uint8)


def noise(n):
    return np.random.default_rng(n).integers(0, 256, (n, *SIZE, 3), dtype=np.uint8)


def clicks(path, rate, seconds, channels=1, every=0.4):
    x = np.zeros((round(rate * seconds), channels))
    for start in np.arange(0, seconds, every):
        at = round(start * rate)
        x[at : at + rate // 2000] = 0.9  # half a millisecond
    soundfile.write(path, x, rate)
    return path


def test_every_frame_arrives_once_and_in_order(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", SIZE) as video:
        for start in range(0, 60, 12):
            video.write(grey(12, start))
        video.write(grey(1, 60)[0])
        assert video.frames == 61
    played = play(tmp_path / "a.mp4")
    np.testing.assert_allclose(played.times, np.arange(61) / 25, rtol=0, atol=1e-6)
    np.testing.assert_allclose(played.levels, grey(61)[:, 0, 0, 0], rtol=0, atol=2.5)
    assert played.sound is None


@pytest.mark.parametrize("fps", [30, Fraction(30000, 1001)])
def test_other_frame_rates_are_kept(tmp_path, fps):
    with VideoWriter(tmp_path / "a.mp4", SIZE, fps=fps, audio=SPEECH) as video:
        video.write(grey(30))
    played = play(tmp_path / "a.mp4")
    np.testing.assert_allclose(played.times, np.arange(30) / float(fps), rtol=0, atol=1e-4)
    assert abs(played.sound.shape[1] / played.rate - 30 / float(fps)) <= 1e-3


def test_colours_survive(tmp_path):
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 64, 200)], np.uint8)
    with VideoWriter(tmp_path / "a.mp4", SIZE) as video:
        for colour in colours:
            video.write(np.broadcast_to(colour, (*SIZE, 3)))
    with av.open(str(tmp_path / "a.mp4")) as container:
        for frame, colour in zip(container.decode(video=0), colours, strict=True):
            assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, 16..235
            middle = frame.to_ndarray(format="rgb24")[32, 48].astype(int)
            assert np.abs(middle - colour).max() <= 4


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 24000, 44100, 48000, 96000])
def test_a_click_is_heard_in_its_frame(tmp_path, rate):
    track = clicks(tmp_path / "clicks.wav", rate, 4)
    with VideoWriter(tmp_path / "a.mp4", SIZE, audio=track) as video:
        for start in range(0, 100, 10):
            video.write(grey(10, start))
    played = play(tmp_path / "a.mp4")
    np.testing.assert_allclose(played.clicks(), np.arange(0, 4, 0.4), rtol=0, atol=1e-3)
    assert len(played.times) == 100
    assert played.rate == min(rate, 48000)


@pytest.mark.parametrize(("channels", "kept"), [(1, 1), (2, 2), (6, 1)])
def test_channels_are_kept_up_to_two(tmp_path, channels, kept):
    track = clicks(tmp_path / "clicks.wav", 24000, 1, channels)
    with VideoWriter(tmp_path / "a.mp4", SIZE, audio=track) as video:
        video.write(grey(25))
    played = play(tmp_path / "a.mp4")
    assert played.sound.shape[0] == kept
    np.testing.assert_allclose(played.clicks(), [0, 0.4, 0.8], rtol=0, atol=1e-3)


@pytest.mark.parametrize("frames", [1, 13, 49, 50, 51, 77])
def test_sound_is_as_long_as_the_picture(tmp_path, frames):
    with VideoWriter(tmp_path / "a.mp4", SIZE, audio=SPEECH) as video:  # two seconds
        video.write(grey(frames))
    played = play(tmp_path / "a.mp4")
    assert len(played.times) == frames
    assert played.sound.shape[1] == round(frames / 25 * 24000)
    silence = played.sound[:, 2 * 24000 + 2048 :]
    assert silence.size == 0 or np.abs(silence).max() < 1e-3
    assert np.abs(played.sound[:, : 24000 // 25]).max() > 1e-3


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, RuntimeError])
def test_what_was_written_before_an_exception_plays(tmp_path, trouble):
    with pytest.raises(trouble), VideoWriter(tmp_path / "a.mp4", SIZE, audio=SPEECH) as video:
        video.write(grey(33))
        raise trouble
    played = play(tmp_path / "a.mp4")
    assert len(played.times) == 33 and played.sound.shape[1] == 33 * 960


ENDLESS = """
    import sys
    import numpy as np
    from liveavatar_jax.data.video import VideoWriter
    with VideoWriter(sys.argv[1], (64, 96), audio=sys.argv[2]) as video:
        while True:
            video.write(np.full((64, 96, 3), video.frames % 200, np.uint8))
            if video.frames == 200:
                print("written", flush=True)
            if video.frames > 200:
                import time; time.sleep(0.01)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_leaves_a_playable_file(tmp_path, sent):
    command = [sys.executable, "-c", textwrap.dedent(ENDLESS), tmp_path / "a.mp4", SPEECH]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
        assert run.stdout.readline() == b"written\n"
        run.send_signal(sent)
    played = play(tmp_path / "a.mp4", torn=sent == signal.SIGKILL)
    # a hard kill costs the encoder's look-ahead and the fragment that was not complete
    assert len(played.times) >= (200 if sent == signal.SIGINT else 100)
    np.testing.assert_allclose(np.diff(played.times), 0.04, rtol=0, atol=1e-6)
    assert played.times[0] == 0


def test_an_older_file_is_kept_until_the_first_frame(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"older")
    with VideoWriter(path, SIZE):
        pass
    assert path.read_bytes() == b"older"
    with VideoWriter(path, SIZE) as video:
        video.write(grey(3))
    assert len(play(path).times) == 3


def test_without_a_frame_there_is_no_file(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", SIZE):
        pass
    assert not (tmp_path / "a.mp4").exists()


def test_closing_twice_is_closing_once(tmp_path):
    video = VideoWriter(tmp_path / "a.mp4", SIZE)
    video.write(grey(2))
    video.close()
    content = (tmp_path / "a.mp4").read_bytes()
    video.close()
    with pytest.raises(LiveAvatarError, match=r"a\.mp4 is closed"):
        video.write(grey(1))
    assert (tmp_path / "a.mp4").read_bytes() == content


def test_paths_that_cannot_be_written_are_refused_at_once(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    for name, why in [
        ("missing/a.mp4", "no such file or directory"),
        ("folder.mp4", "is a directory"),
        ("a.avi", r"must be named \.mp4"),
        ("a", r"must be named \.mp4"),
    ]:
        with pytest.raises(LiveAvatarError, match=rf"{name}:? .*{why}"):
            VideoWriter(tmp_path / name, SIZE)
    assert os.listdir(tmp_path) == ["folder.mp4"]


def test_a_path_without_permission_is_refused(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # tests may run as root, whom nothing stops
    with pytest.raises(LiveAvatarError, match=r"cannot write .*a\.mp4: permission denied"):
        VideoWriter(tmp_path / "a.mp4", SIZE)


def test_the_output_must_not_be_the_sound(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", SIZE, audio=SPEECH) as video:
        video.write(grey(25))
    content = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(LiveAvatarError, match="overwrite its own sound"):
        VideoWriter(tmp_path / "a.mp4", SIZE, audio=tmp_path / "." / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == content


@pytest.mark.parametrize("size", [(63, 64), (64, 97), (0, 64)])
def test_odd_sizes_are_refused(tmp_path, size):
    with pytest.raises(LiveAvatarError, match="even sides"):
        VideoWriter(tmp_path / "a.mp4", size)


def test_frames_of_another_size_are_refused(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", SIZE) as video:
        with pytest.raises(LiveAvatarError, match=r"frames uint8\[3, 96, 64, 3\] must be"):
            video.write(np.zeros((3, 96, 64, 3), np.uint8))


def test_bad_sound_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"nothing")
    with pytest.raises(LiveAvatarError, match=r"a\.wav"):
        VideoWriter(tmp_path / "a.mp4", SIZE, audio=tmp_path / "a.wav")
    assert os.listdir(tmp_path) == ["a.wav"]


def test_sound_that_fails_midway_leaves_a_playable_file(tmp_path):
    x = np.zeros(24000 * 3, np.float32)
    x[40000] = np.nan
    soundfile.write(tmp_path / "nan.wav", x, 24000, subtype="FLOAT")
    with pytest.raises(LiveAvatarError, match="not finite"):
        with VideoWriter(tmp_path / "a.mp4", SIZE, audio=tmp_path / "nan.wav") as video:
            video.write(grey(75))
    assert 35 < len(play(tmp_path / "a.mp4").times) < 50


@contextlib.contextmanager
def disk(size):
    """Inside, no file of this process can grow beyond `size` bytes, its log not either."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_whole_fragments(tmp_path):
    said = r"cannot write .*a\.mp4 .*: the disk is full; .* plays"
    with pytest.raises(LiveAvatarError, match=said), disk(1_000_000):
        with VideoWriter(tmp_path / "a.mp4", SIZE, audio=SPEECH) as video:
            for _ in range(40):
                video.write(noise(12))
    played = play(tmp_path / "a.mp4", torn=True)
    assert 100 < len(played.times) < video.frames
    np.testing.assert_allclose(np.diff(played.times), 0.04, rtol=0, atol=1e-6)


def test_a_disk_too_full_for_one_fragment_leaves_nothing(tmp_path):
    said = "the disk is full; nothing is kept"
    with pytest.raises(LiveAvatarError, match=said), disk(50_000):
        with VideoWriter(tmp_path / "a.mp4", SIZE) as video:
            for _ in range(20):
                video.write(noise(12))
    assert os.listdir(tmp_path) == []


def test_a_device_without_space_is_a_full_disk(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "a.mp4").symlink_to("/dev/full")
    with pytest.raises(LiveAvatarError, match="the disk is full; nothing is kept"):
        with VideoWriter(tmp_path / "a.mp4", SIZE) as video:
            video.write(grey(100))


def test_a_disk_that_fills_up_at_any_byte_leaves_what_plays(tmp_path):
    def write(path):
        with VideoWriter(path, SIZE, audio=SPEECH) as video:
            for start in range(0, 120, 12):
                video.write(grey(12, start))

    write(tmp_path / "whole.mp4")
    end = (tmp_path / "whole.mp4").stat().st_size
    for short in (1, 100, 1000, 3000, end // 3, end // 2, end - 40, end):
        with pytest.raises(LiveAvatarError, match="the disk is full"), disk(end - short):
            write(tmp_path / "a.mp4")
        if (tmp_path / "a.mp4").exists():
            played = play(tmp_path / "a.mp4", torn=True)
            np.testing.assert_allclose(played.times, np.arange(len(played.times)) / 25, atol=1e-6)
            assert len(played.times) >= 40  # the first fragment
        else:
            assert short >= end // 2


def test_nothing_reaches_the_terminal(tmp_path, capfd):
    with VideoWriter(tmp_path / "a.mp4", SIZE, audio=SPEECH) as video:
        video.write(grey(30))
    assert capfd.readouterr() == ("", "")


def test_memory_does_not_grow_with_the_length(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    soundfile.write(tmp_path / "long.wav", np.zeros(8000 * 240, np.float32), 8000)
    after = []
    with VideoWriter(tmp_path / "a.mp4", (16, 16), audio=tmp_path / "long.wav") as video:
        while video.frames < 6000:
            video.write(np.full((12, 16, 16, 3), video.frames % 256, np.uint8))
            if video.frames in (1200, 6000):
                after.append(resident())
    # frames and sound of the 192 seconds in between would be 9 MB; the index is 1.3 kB a second
    assert after[1] - after[0] < 3e6
