"""A clip file to the windows that are worth encoding, or the reason why there is none.

One pass decodes the picture, at 25 frames a second, cropped around the face and scaled. Where
the scene changes is seen on the way: a detector of a few lines on frames that are there anyway,
instead of a library that would decode every clip once more and bring all of OpenCV along. It has
the rule of PySceneDetect's adaptive detector: a frame differs from the one before it much more
than its neighbours do. Hard cuts are found, slow fades are not.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from PIL import Image

from liveavatar_jax.config import insist
from liveavatar_jax.data.audio import SAMPLE_RATE, read_audio
from liveavatar_jax.data.records import FPS, PER_LATENT, reason
from liveavatar_jax.types import LiveAvatarError

PAST = 73  # video frames before a window, encoded with it
SAMPLES = SAMPLE_RATE // FPS  # of one video frame
THUMB = 32  # pixels a side of the pictures that scenes are told apart by
NEIGHBOURS = 2  # frames to each side that a cut must stand out from
CELL = 16  # sides are multiples: VAE stride 8, patches of 2


@dataclasses.dataclass(frozen=True)
class WindowConfig:
    """What of a clip becomes training windows."""

    height: int = 400
    width: int = 720
    latents: int = 21  # of a window: 84 frames, 3.36 s
    stride: int = 84  # video frames from one window to the next
    windows: int = 4  # of a clip at most, spread over it
    least_past: int = 0  # true frames before a window; what lacks of 73 is its scene's first frame
    references: int = 3  # pictures of the speaker: the window's first frame, and others
    longest: float = 30.0  # seconds of a clip that are looked at
    least_fps: float = 20.0
    longest_gap: float = 0.25  # seconds between two frames of a clip
    enlarge: float = 1.5  # by which a crop may be scaled up
    loudness: float = -50.0  # dB below which a clip is silent
    cut: float = 8.0  # mean change of a pixel (0..255) that may be a cut
    stands_out: float = 3.0  # times the change around it

    def __post_init__(self):
        for name in ("height", "width"):
            value = getattr(self, name)
            insist(value > 0 and value % CELL == 0, self, name, f"be a multiple of {CELL}")
        for name in ("latents", "stride", "windows", "references"):
            insist(getattr(self, name) >= 1, self, name, "be at least 1")
        insist(0 <= self.least_past <= PAST, self, "least_past", f"lie within 0..{PAST}")
        insist(self.longest * FPS >= self.needed, self, "longest", "be as long as one window")

    @property
    def frames(self) -> int:
        """Video frames of a window."""
        return PER_LATENT * self.latents

    @property
    def picture(self) -> tuple[int, int, int]:
        """The shape of a frame."""
        return self.height, self.width, 3

    @property
    def needed(self) -> int:
        """Video frames of the shortest clip that gives a window."""
        return self.least_past + self.frames


@dataclasses.dataclass(frozen=True)
class Dropped:
    """A clip that is not used: a reason to count by, and the particulars."""

    reason: str
    detail: str = ""


class _Unfit(Exception):
    """Carries a Dropped out of the middle of a file."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.dropped = Dropped(reason, detail)


@dataclasses.dataclass(frozen=True)
class Window:
    """Numbers of frames of a clip."""

    start: int  # its first frame
    scene: int  # the first frame of its scene, where its past ends at the latest
    references: tuple[int, ...]  # the first is `start`

    @property
    def past(self) -> int:
        """True frames before it, of the 73."""
        return min(PAST, self.start - self.scene)

    def with_past(self, frames: int) -> np.ndarray:
        """The numbers of the 73 frames before a window of `frames`, and of its own."""
        return np.arange(self.start - PAST, self.start + frames).clip(self.scene)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A clip with its windows."""

    frames: np.ndarray  # uint8 [F, height, width, 3], 25 a second
    samples: np.ndarray  # float32 at 16 kHz; the first belongs to the first frame
    windows: tuple[Window, ...]
    lost: int = 0  # windows that a change of scene cost


def examine(
    path: Path, cfg: WindowConfig, *, start: float = 0.0, end: float | None = None,
    whole: bool | None = True, x: float = 0.5, y: float = 0.5,
) -> Kept | Dropped:  # fmt: skip
    """Reads the clip at `start` to `end` seconds of a file, or, of a file that is not `whole`,
    from its beginning; `x` and `y` tell where the face is, in 0..1."""
    try:
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as file:
            stream = _video_of(file, cfg)
            length = _length(file, stream)
            start, end = _span(start, end, whole, length)
            _long_enough(end - start, cfg)
            frames = np.empty((round(min(end - start, cfg.longest) * FPS), *cfg.picture), np.uint8)
            count = 0
            for picture in _pictures(file, stream, cfg, start, len(frames), (x, y)):
                frames[count] = picture
                count += 1
            _long_enough(count / FPS, cfg)
            late = _begin(file.streams.audio[0]) - _begin(stream) - start
        samples = _samples(path, late, count, cfg)
    except _Unfit as error:
        return error.dropped
    except FFmpegError as error:
        return Dropped("unreadable", reason(error).lower())
    except LiveAvatarError as error:
        return Dropped("unreadable sound", str(error))
    count = min(count, len(samples) // SAMPLES)
    frames = frames[:count]
    windows, lost = find_windows(cuts(frames, cfg), count, cfg)
    if not windows and lost:
        return Dropped("scene cut", f"{lost} windows cross one")
    if not windows:
        return _too_short(count / FPS, cfg)
    return Kept(frames, samples, windows, lost)


def find_windows(
    scenes: list[int], count: int, cfg: WindowConfig
) -> tuple[tuple[Window, ...], int]:
    """The windows of a clip of `count` frames that is cut before each frame of `scenes`, and how
    many more there would be without a cut."""

    def starts(begin: int, end: int) -> range:
        return range(begin + cfg.least_past, end - cfg.frames + 1, cfg.stride)

    found = []
    for begin, end in itertools.pairwise([0, *scenes, count]):
        others = cfg.references - 1
        pick = [begin + (2 * i + 1) * (end - begin) // (2 * others) for i in range(others)]
        found += [Window(at, begin, (at, *pick)) for at in starts(begin, end)]
    lost = max(0, len(starts(0, count)) - len(found))
    if len(found) > cfg.windows:
        spread = np.linspace(0, len(found) - 1, cfg.windows).round().astype(int)
        found = [found[i] for i in spread]
    return tuple(found), lost


def cuts(frames: np.ndarray, cfg: WindowConfig) -> list[int]:
    """The frames [F, H, W, 3] that begin a new scene."""
    small = [
        np.asarray(Image.fromarray(frame).resize((THUMB, THUMB), Image.Resampling.BOX), np.float32)
        for frame in frames
    ]
    change = np.array([0.0, *(np.abs(b - a).mean() for a, b in itertools.pairwise(small))])
    found = []
    for i in np.flatnonzero(change >= cfg.cut):
        around = change[max(1, i - NEIGHBOURS) : i + NEIGHBOURS + 1]
        usual = (around.sum() - change[i]) / max(1, len(around) - 1)
        if change[i] >= cfg.stands_out * usual:
            found.append(int(i))
    return found


# The file


def _video_of(file: InputContainer, cfg: WindowConfig) -> av.VideoStream:
    if not file.streams.video:
        raise _Unfit("no video")
    if not file.streams.audio:
        raise _Unfit("no audio")
    stream = file.streams.video[0]
    stream.thread_type = "NONE"  # a process a core decodes already
    fps = float(stream.average_rate or 0)
    if fps < cfg.least_fps:
        raise _Unfit("frame rate", f"{fps:.2f} frames/s")
    return stream


def _begin(stream: av.VideoStream | av.AudioStream) -> float:
    """Seconds at which a track begins."""
    return float((stream.start_time or 0) * (stream.time_base or 0))


def _length(file: InputContainer, stream: av.VideoStream) -> float:
    """Seconds, as the file claims."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return (file.duration or 0) / av.time_base


def _span(
    start: float, end: float | None, whole: bool | None, length: float
) -> tuple[float, float]:
    """Where in the file the clip lies."""
    if end is None:
        if not length:
            raise _Unfit("unreadable", "its length is unknown; give the end of the clip")
        return start, length
    if whole is None:  # a second is what cutting at keyframes adds
        whole = not abs(length - (end - start)) <= 1.0
        if whole and length < end - 0.5:
            raise _Unfit("wrong length", f"{length:.2f} s is neither the clip nor the whole video")
    return (start, end) if whole else (0.0, end - start)


def _long_enough(seconds: float, cfg: WindowConfig) -> None:
    if seconds * FPS < cfg.needed - 0.5:
        dropped = _too_short(seconds, cfg)
        raise _Unfit(dropped.reason, dropped.detail)


def _too_short(seconds: float, cfg: WindowConfig) -> Dropped:
    return Dropped("too short", f"{seconds:.2f} s of {cfg.needed / FPS:.2f} s")


def _pictures(
    file: InputContainer, stream: av.VideoStream, cfg: WindowConfig,
    start: float, count: int, face: tuple[float, float],
) -> Iterator[np.ndarray]:  # fmt: skip
    """At each 25th of a second, the frame that is nearest in time; cropped and scaled."""
    origin, given, last = _begin(stream) + start, 0, None
    square = float(stream.sample_aspect_ratio or 1)  # of a pixel that is shown, wide to high
    if start > 1:
        file.seek(int((origin - 0.5) * av.time_base))  # to the keyframe before it
    for frame in file.decode(stream):
        if frame.time is None:
            raise _Unfit("unreadable", "a frame has no time")
        at = frame.time - origin
        if last is None:
            _crop(_upright(frame), square, cfg, face)  # or it is too small for any work
        elif at <= last[0]:
            raise _Unfit("unreadable", f"its frames are out of order at {at:.2f} s")
        elif at > 0 and at - last[0] > cfg.longest_gap:
            raise _Unfit("frame rate", f"nothing for {at - last[0]:.2f} s at {last[0]:.2f} s")
        picture = None
        while last is not None and given < count and given / FPS <= (last[0] + at) / 2:
            picture = _picture(last[1], square, cfg, face) if picture is None else picture
            yield picture
            given += 1
        if given == count:
            return
        last = (at, frame)
    if last is not None:  # it is seen for as long as others
        picture = _picture(last[1], square, cfg, face)
        until = last[0] + 1 / float(stream.average_rate or 1)
        while given < count and given / FPS < until - 1e-6:
            yield picture
            given += 1


def _picture(
    frame: av.VideoFrame, square: float, cfg: WindowConfig, face: tuple[float, float]
) -> np.ndarray:
    image = _upright(frame)
    box = _crop(image, square, cfg, face)
    return np.asarray(image.resize((cfg.width, cfg.height), Image.Resampling.BILINEAR, box))


def _upright(frame: av.VideoFrame) -> Image.Image:
    """Phones lie on their side when they film, and only say so."""
    return Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)))


def _crop(
    image: Image.Image, square: float, cfg: WindowConfig, face: tuple[float, float]
) -> tuple[float, float, float, float]:
    """The largest box of the wanted shape around the face that the picture holds, in pixels."""
    width, height = map(float, image.size)
    shape = cfg.width / cfg.height / square
    w, h = min(width, shape * height), min(height, width / shape)
    if max(cfg.height / h, cfg.width / (w * square)) > cfg.enlarge:
        raise _Unfit("too small", f"{image.width}x{image.height}")
    left = min(max(face[0] * width - w / 2, 0.0), width - w)
    top = min(max(face[1] * height - h / 2, 0.0), height - h)
    return left, top, left + w, top + h


def _samples(path: Path, late: float, frames: int, cfg: WindowConfig) -> np.ndarray:
    """The sound of the first `frames` frames; the track begins `late` seconds after them."""
    skip, wanted = round(-late * SAMPLE_RATE), frames * SAMPLES
    parts, have = [np.zeros(min(wanted, max(0, -skip)), np.float32)], max(0, -skip)
    skip = max(0, skip)
    for chunk in read_audio(path):
        chunk, skip = chunk[skip:], max(0, skip - len(chunk))
        parts.append(chunk)
        have += len(chunk)
        if have >= wanted:
            break
    samples = np.concatenate(parts)[:wanted]
    power = float((samples.astype(np.float64) ** 2).mean()) if len(samples) else 0.0
    level = 10 * math.log10(power + 1e-12)
    if level < cfg.loudness:
        raise _Unfit("silent", f"{level:.0f} dB")
    return samples
