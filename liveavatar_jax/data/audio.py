"""Sound files of any kind: decoded piece by piece, to the mono float32 the networks hear.

Resampling is soxr at high quality with librosa's length rule, so that `load_audio` returns
what `librosa.load(path, sr=16000)` returns, with which the original reads its speech.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import av
import numpy as np
import soxr
from av.error import FFmpegError, InvalidDataError

from liveavatar_jax.types import Float, LiveAvatarError

SAMPLE_RATE = 16_000  # of the speech encoder


@dataclass(frozen=True)
class Sound:
    """An open audio track: `pieces` decodes it as it is read, once, at its own rate."""

    rate: int  # samples per second
    channels: int
    pieces: Iterator[Float[np.ndarray, "channels _"]]


def load_audio(path: str | Path, rate: int = SAMPLE_RATE) -> Float[np.ndarray, " samples"]:
    """The whole file as mono float32 at `rate`; raises LiveAvatarError as `open_sound`."""
    return np.concatenate(list(read_audio(path, rate)))


def read_audio(
    path: str | Path, rate: int = SAMPLE_RATE, chunk: int = SAMPLE_RATE
) -> Iterator[Float[np.ndarray, " samples"]]:
    """The samples of `load_audio` in chunks of `chunk`, the last one shorter, in constant memory.

    Channels are averaged. Raises LiveAvatarError as `open_sound`, when the iteration starts.
    """
    sound = open_sound(path)
    mono = (piece.mean(axis=0, keepdims=True) for piece in sound.pieces)
    for block in in_blocks(resample(mono, sound.rate, rate), chunk):
        yield block[0]


def open_sound(path: str | Path) -> Sound:
    """Opens the first audio track of a file (wav, mp3, flac, m4a, ogg, opus, mp4, ...).

    Raises LiveAvatarError where there is none, where it holds no sample or, while the pieces
    are read, where it is damaged between sound parts or holds values that are not finite.
    """
    frames = _decode(path)
    first = next(frames, None)
    if first is None:
        raise LiveAvatarError(f"the audio file {path} holds no sound; record or convert it again")
    rate, channels = first.sample_rate, first.layout.nb_channels
    if not 1_000 <= rate <= 1_000_000:
        raise LiveAvatarError(f"the audio file {path} claims {rate} samples/s; convert it to WAV")

    def pieces():
        samples = 0
        for frame in chain([first], frames):
            x, at = _values(frame), f"{samples / rate:.2f} s"
            if (frame.sample_rate, len(x)) != (rate, channels):
                raise LiveAvatarError(
                    f"the audio file {path} changes its rate or channels at {at}; "
                    "convert it to WAV first"
                )
            if not np.isfinite(x).all():
                raise LiveAvatarError(
                    f"the audio file {path} holds values that are not finite numbers near {at}; "
                    "export it again"
                )
            samples += x.shape[1]
            yield x

    return Sound(rate, channels, pieces())


def resample(
    pieces: Iterable[Float[np.ndarray, "channels _"]], source: int, target: int
) -> Iterator[Float[np.ndarray, "channels _"]]:
    """Pieces at `source` Hz as pieces at `target` Hz, by soxr at high quality.

    The total is ceil(samples * target / source), for which librosa adds one zero at times.
    """
    if source == target:
        yield from pieces
        return
    stream, taken, given = None, 0, 0
    for x in pieces:
        stream = stream or soxr.ResampleStream(source, target, len(x), "float32", "HQ")
        y = stream.resample_chunk(np.ascontiguousarray(x.T))
        taken, given = taken + x.shape[1], given + len(y)
        yield y.T
    if stream is not None:
        y = stream.resample_chunk(np.zeros((0, len(x)), np.float32), last=True)
        missing = math.ceil(taken * (target / source)) - given - len(y)
        yield np.pad(y, ((0, missing), (0, 0))).T


def in_blocks(
    pieces: Iterable[Float[np.ndarray, "channels _"]], size: int
) -> Iterator[Float[np.ndarray, "channels _"]]:
    """The same samples in blocks of `size`; the last one may be shorter, none is empty."""
    rest = None
    for piece in pieces:
        rest = piece if rest is None else np.concatenate([rest, piece], axis=1)
        while rest.shape[1] >= size:
            yield rest[:, :size]
            rest = rest[:, size:]
    if rest is not None and rest.shape[1]:
        yield rest


def _decode(path: str | Path) -> Iterator[av.AudioFrame]:
    """Frames of the first audio track.

    What cannot be decoded is passed over at both ends, where files cut out of a stream or cut
    short have half a packet, and refused in between, where sound and picture would part.
    """
    try:
        # files only: a playlist must not reach for the network
        container = av.open(f"file:{path}", options={"protocol_whitelist": "file"})
    except Exception as error:
        raise _unreadable(path, error) from None
    with container:
        if not container.streams.audio:
            raise LiveAvatarError(f"{path} has no audio track; give a sound file such as WAV")
        started = lost = False
        for packet in container.demux(container.streams.audio[0]):
            try:
                frames = packet.decode()
            except InvalidDataError:
                lost = started
                continue
            except FFmpegError as error:
                raise _unreadable(path, error) from None
            if frames and lost:
                at = float(frames[0].time or 0)
                raise LiveAvatarError(
                    f"the audio file {path} is damaged near {at:.2f} s; convert it to WAV again"
                )
            started = started or bool(frames)
            yield from frames


def _unreadable(path: str | Path, error: Exception) -> LiveAvatarError:
    if isinstance(error, OSError) and error.strerror:
        return LiveAvatarError(f"cannot read the audio file {path}: {error.strerror.lower()}")
    return LiveAvatarError(
        f"the audio file {path} ({Path(path).stat().st_size} bytes) is empty, damaged or no sound; "
        "convert it to WAV"
    )


def _values(frame: av.AudioFrame) -> Float[np.ndarray, "channels _"]:
    """A frame of any sample format as float32 in [-1, 1]."""
    x = frame.to_ndarray()
    if not frame.format.is_planar:
        x = x.reshape(-1, frame.layout.nb_channels).T
    if x.dtype == np.uint8:
        return (x.astype(np.float32) - 128) / 128
    if x.dtype.kind == "i":
        return x.astype(np.float32) / 2.0 ** (8 * x.itemsize - 1)
    with np.errstate(over="ignore"):  # a double beyond float32 becomes infinite and is refused
        return x.astype(np.float32)
