"""Pictures in and out of the front: portraits that callers send, frames as JPEG or MP4."""

import io
import threading
from fractions import Fraction

import av
import numpy as np
from PIL import Image, ImageOps

from liveavatar_jax.data.image import fit_portrait
from liveavatar_jax.types import LiveAvatarError
from serve.wire import FPS, RATE, Ready

MOST = 12_000_000  # bytes of a portrait's file
PIXELS = 40_000_000  # of a portrait; looked at before anything is decoded
FORMATS = ("JPEG", "PNG", "WEBP")
VISIBLE = 256  # rows of a video, below which it is enlarged: colours have half of them
FRAGMENT = 240_000  # microseconds of a piece of MP4


def checked(data: bytes, least: tuple[int, int] = (1024, 1024)) -> np.ndarray:
    """A picture of unknown origin, uint8 [h, w, 3]. The size that it claims is looked at before
    anything is decoded. A JPEG far above `least` rows and columns is decoded smaller.

    Raises LiveAvatarError for what is no picture, or too large.
    """
    if len(data) > MOST:
        raise LiveAvatarError(f"the portrait has {len(data)} bytes; at most {MOST} are taken")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > PIXELS:
                raise LiveAvatarError(
                    f"the portrait has {width} x {height} pixels; at most {PIXELS} are taken"
                )
            if min(width, height) < 16 or max(width, height) > 8 * min(width, height):
                raise LiveAvatarError(
                    f"the portrait has {width} x {height} pixels; crop it around the face"
                )
            image.draft("RGB", (2 * least[1], 2 * least[0]))
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"))
    except LiveAvatarError:
        raise
    except Exception:  # Pillow's plugins raise anything on damaged files
        raise LiveAvatarError("the portrait is no JPEG, PNG or WebP, or is damaged") from None


def portrait(data: bytes, ready: Ready) -> np.ndarray:
    """A portrait of unknown origin in the model's size. Raises LiveAvatarError as `checked`."""
    size = (ready.height, ready.width)
    return fit_portrait(checked(data, size), size, above=0.25)


def enlarged(frame: np.ndarray) -> np.ndarray:
    """A frame as video codecs want it: a small one several times as large."""
    rows, columns, _ = frame.shape
    if rows >= VISIBLE:
        return frame
    scale = VISIBLE // rows
    size = (scale * columns, scale * rows)
    return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))


def jpeg(frame: np.ndarray, quality: int = 88) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "JPEG", quality=quality, subsampling=0)
    return out.getvalue()


class Movie:
    """Frames and their sound as a fragmented MP4 (H.264, AAC), piece by piece. Times go on from
    `frames`, so one may follow another in a stream; two are left for AAC, which begins early."""

    def __init__(self, height: int, width: int, frames: int = 2):
        self._out, self._lock, self._closed = _Bytes(), threading.Lock(), False
        options = {
            "movflags": "empty_moov+default_base_moof+frag_discont", "avoid_negative_ts":
            "disabled", "frag_duration": str(FRAGMENT),
        }  # fmt: skip
        self._file = av.open(self._out, "w", format="mp4", options=options)
        video = self._file.add_stream("libx264", rate=FPS)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        video.options = {"preset": "ultrafast", "tune": "zerolatency", "g": str(4 * FPS)}
        audio = self._file.add_stream("aac", rate=RATE)
        audio.layout = "mono"
        video.time_base, audio.time_base = Fraction(1, FPS), Fraction(1, RATE)
        self._video, self._audio, self.frames = video, audio, frames

    def add(self, frame: np.ndarray, samples: np.ndarray) -> bytes:
        """What there is to send after this frame; often nothing."""
        with self._lock:
            return b"" if self._closed else self._add(frame, samples)

    def close(self) -> None:
        """It holds threads and memory until then."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._file.close()

    def _add(self, frame: np.ndarray, samples: np.ndarray) -> bytes:
        picture = av.VideoFrame.from_ndarray(frame, "rgb24")
        picture.pts = self.frames
        sound = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
        sound.sample_rate, sound.pts = RATE, self.frames * len(samples)
        sound.time_base = Fraction(1, RATE)
        self._file.mux(self._video.encode(picture))
        self._file.mux(self._audio.encode(sound))
        self.frames += 1
        return self._out.take()

    def again(self) -> "Movie":
        """The next one, without what this one holds back."""
        self.close()
        return Movie(self._video.height, self._video.width, self.frames)


class _Bytes:
    """A file that is read by taking what was written."""

    def __init__(self) -> None:
        self._held = bytearray()

    def write(self, data: bytes) -> int:
        self._held += data
        return len(data)

    def take(self) -> bytes:
        taken, self._held = bytes(self._held), bytearray()
        return taken
