"""Frames and sound into an mp4 file, as they come, in constant memory.

The file is written in place as hybrid fragmented mp4: about every two seconds a self-contained
fragment reaches the disk, so what is there plays even after a hard kill or on a full disk, and
`close` turns the whole into an ordinary indexed mp4 without reading it again. (The alternative,
"faststart", is unplayable until its last byte and then copies the file.)
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from itertools import chain, repeat
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.error import FFmpegError
from PIL import Image

from liveavatar_jax.data.audio import in_blocks, open_sound, resample
from liveavatar_jax.types import Float, LiveAvatarError, UInt8

MUXER = {"movflags": "hybrid_fragmented+frag_keyframe+delay_moov", "flush_packets": "1"}
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
AAC_BLOCK = 1024  # samples of one AAC frame
AAC_RATES = (7350, 8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
BT709 = 1  # the code of matrix, primaries and transfer in libav


class VideoWriter:
    """Writes uint8 RGB frames and the sound of a file to an mp4 (H.264 4:2:0, AAC).

        with VideoWriter("out.mp4", (704, 384), audio="speech.wav") as video:
            video.write(frames)  # [F, H, W, 3] or [H, W, 3]

    The first sample belongs to the first frame, and the sound lasts exactly as long as the
    frames, cut or filled up with silence. Leaving the `with` block, be it by an exception or by
    Ctrl-C, finishes the file with the frames written so far. Before the first frame `path` is
    left alone, so that a run that fails early costs no older result.

    size: rows and columns of the frames; the video's are `scale` times these. pixels: yuv420p
    plays anywhere and halves the resolution of colours; yuv444p keeps it, as tiny pictures need.
    mark: draws into each frame of the video.

    Raises LiveAvatarError for odd sizes, for a path that cannot be written, for sound that
    cannot be read, and when the disk is full; then the whole fragments written so far remain as
    a playable file, or none at all.
    """

    def __init__(
        self,
        path: str | Path,
        size: tuple[int, int],
        *,
        fps: int | Fraction = 25,
        audio: str | Path | None = None,
        crf: int = 18,
        scale: int = 1,
        pixels: str = "yuv420p",
        mark: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        if size[0] % 2 or size[1] % 2 or min(size) < 2:
            raise LiveAvatarError(f"video of {size[1]}x{size[0]} pixels must have even sides")
        self.path, self.size, self.fps, self.crf = Path(path), size, Fraction(fps), crf
        self.scale, self.pixels, self.mark = scale, pixels, mark
        self.frames = 0  # written so far
        self._container: OutputContainer | None = None
        self._sound = _SoundTrack(audio) if audio is not None else None
        _check_writable(self.path, audio)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def write(self, frames: UInt8[np.ndarray, "*F H W 3"]) -> None:
        """Appends one frame [H, W, 3] or a block of frames [F, H, W, 3]."""
        if frames.shape[-3:] != (*self.size, 3) or frames.dtype != np.uint8:
            raise LiveAvatarError(
                f"frames {frames.dtype}{list(frames.shape)} must be uint8 [..., "
                f"{self.size[0]}, {self.size[1]}, 3]"
            )
        if self.frames and self._container is None:
            raise LiveAvatarError(f"{self.path} is closed; open another writer")
        for image in frames.reshape(-1, *frames.shape[-3:]):
            with self._failing_cleanly():
                self._append(image)

    def close(self) -> None:
        """Finishes the file; without a frame there is none. Called again, does nothing."""
        container = self._container
        if container is None:
            return
        with self._failing_cleanly():
            try:
                container.mux(self._video.encode(None))
                if self._sound:
                    container.mux(self._sound.finish(self.frames / self.fps))
            finally:
                self._container = None
                container.close()

    def _append(self, image: UInt8[np.ndarray, "H W 3"]) -> None:
        container = self._container or self._open()
        if self.scale != 1:  # before the colours lose half of their places
            wide = self.size[1] * self.scale, self.size[0] * self.scale
            image = np.asarray(Image.fromarray(image).resize(wide, Image.Resampling.LANCZOS))
        image = image if self.mark is None else self.mark(image)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
        frame = frame.reformat(format=self.pixels, dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.time_base = self.frames, 1 / self.fps
        container.mux(self._video.encode(frame))
        self.frames += 1
        if self._sound:  # keeps pace, so that the muxer has nothing to hold back
            container.mux(self._sound.until(self.frames / self.fps))

    def _open(self) -> OutputContainer:
        container = av.open(f"file:{self.path}", "w", format="mp4", options=MUXER)
        fragment = str(round(2 * self.fps))
        options = {"crf": str(self.crf), "preset": "veryfast", "g": fragment}
        self._video = container.add_stream("libx264", self.fps, options)
        self._video.height, self._video.width = (side * self.scale for side in self.size)
        self._video.pix_fmt = self.pixels
        code = self._video.codec_context
        code.colorspace = code.color_primaries = code.color_trc = BT709
        code.color_range = 1  # 16..235
        if self._sound:
            self._sound.join(container)
        self.path.open("wb").close()  # from here on whatever lies there is ours
        self._container = container
        return container

    @contextmanager
    def _failing_cleanly(self):
        """What the disk refuses becomes one sentence and a file that plays, or no file."""
        try:
            yield
        except (FFmpegError, OSError) as error:
            container, self._container = self._container, None
            with suppress(FFmpegError):  # the first error says it all
                if container is not None:
                    container.close()
            kept = container is not None and _keep_whole_fragments(self.path)
            why = "the disk is full" if error.errno in DISK_FULL else str(error.strerror).lower()
            rest = "its beginning is kept and plays" if kept else "nothing is kept"
            raise LiveAvatarError(
                f"cannot write {self.path} beyond frame {self.frames}: {why}; {rest}"
            ) from None


class _SoundTrack:
    """The sound of a file as AAC: its own rate and up to two channels, more of them averaged."""

    def __init__(self, path: str | Path):
        sound = open_sound(path)
        self.rate = sound.rate if sound.rate in AAC_RATES else 48_000
        self.layout = "stereo" if sound.channels == 2 else "mono"
        pieces = sound.pieces
        if sound.channels > 2:
            pieces = (x.mean(axis=0, keepdims=True) for x in pieces)
        self._blocks = _endless(in_blocks(resample(pieces, sound.rate, self.rate), AAC_BLOCK))
        self.samples = 0  # encoded so far

    def join(self, container: OutputContainer) -> None:
        self._aac = container.add_stream("aac", self.rate, layout=self.layout)
        channels = self._aac.layout.nb_channels
        self._aac.bit_rate = channels * min(96_000, 6 * self.rate)  # AAC allows 6 bits a sample

    def until(self, seconds: Fraction) -> list[av.Packet]:
        """The whole blocks that end by then."""
        packets = []
        while self.samples + AAC_BLOCK <= round(seconds * self.rate):
            packets += self._encode(next(self._blocks))
        return packets

    def finish(self, seconds: Fraction) -> list[av.Packet]:
        """All that is left, to the very sample."""
        packets = self.until(seconds)
        if rest := round(seconds * self.rate) - self.samples:
            packets += self._encode(next(self._blocks)[:, :rest])
        return packets + self._aac.encode(None)

    def _encode(self, x: Float[np.ndarray, "channels _"]) -> list[av.Packet]:
        x = np.ascontiguousarray(np.broadcast_to(x, (self._aac.layout.nb_channels, x.shape[1])))
        frame = av.AudioFrame.from_ndarray(x, "fltp", self.layout)
        frame.sample_rate, frame.time_base = self.rate, Fraction(1, self.rate)
        frame.pts = self.samples
        self.samples += x.shape[1]
        return self._aac.encode(frame)


def _endless(
    blocks: Iterator[Float[np.ndarray, "channels _"]],
) -> Iterator[Float[np.ndarray, "channels _"]]:
    """Whole AAC blocks, and silence when there are no more."""
    whole = (np.pad(x, ((0, 0), (0, AAC_BLOCK - x.shape[1]))) for x in blocks)
    return chain(whole, repeat(np.zeros((1, AAC_BLOCK), np.float32)))


def _check_writable(path: Path, audio: str | Path | None) -> None:
    if path.suffix.lower() != ".mp4":
        raise LiveAvatarError(f"the output {path} must be named .mp4, the one format written")
    if audio is not None and path.exists() and path.samefile(audio):
        raise LiveAvatarError(f"the output {path} would overwrite its own sound; name another file")
    new = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise LiveAvatarError(f"cannot write {path}: {str(error.strerror).lower()}") from None
    if new:
        path.unlink()


def _keep_whole_fragments(path: Path) -> bool:
    """Cuts a torn mp4 behind its last whole fragment (moof, mdat); without one, deletes it."""
    whole = position = 0
    size = path.stat().st_size
    with path.open("rb") as file:
        while position + 8 <= size:
            file.seek(position)
            position += max(8, int.from_bytes(file.read(4), "big"))
            if file.read(4) == b"mdat" and position <= size:
                whole = position
    if whole:
        os.truncate(path, whole)
    else:
        path.unlink()
    return whole > 0
