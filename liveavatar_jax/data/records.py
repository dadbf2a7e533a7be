"""What training reads: one window of a clip, encoded, as one record of an ArrayRecord shard.

A record is a safetensors blob: six arrays, and one JSON value of metadata. Nothing in it is ever
executed, and any tool that knows safetensors can look inside.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from safetensors.numpy import save

from liveavatar_jax.types import LiveAvatarError

FPS = 25  # of every window, whatever its clip had
PER_LATENT = 4  # video frames of a latent
SUFFIX = ".array_record"
# One record a group, or no record could be read by itself; what is encoded does not compress.
OPTIONS = "group_size:1,uncompressed"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
AXES = {
    "latents": "f h w c",
    "motion": "m h w c",
    "references": "k h w c",
    "stills": "k m h w c",
    "text": "t k",
    "audio": "F layers k",
}


class BrokenRecord(LiveAvatarError):
    """A record that cannot be used; the sentence names the field, not yet the shard."""


@dataclasses.dataclass(frozen=True)
class About:
    """Where a window comes from."""

    id: str
    start: float  # seconds, of the window in its clip
    frames: int  # video frames of the window
    past: int = 0  # true video frames before it; those that lack are its first one, standing still
    fps: float = float(FPS)
    caption: str = ""
    scores: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Clip:
    """One window: latents of the VAE, and what the DiT is to know of it. Float arrays."""

    latents: np.ndarray  # f h w c, of the window
    motion: np.ndarray  # m h w c, of the 73 video frames before it, encoded in one go with it
    references: np.ndarray  # k h w c; 0 is its first frame, the others are elsewhere in the clip
    stills: np.ndarray  # k m h w c, of each reference standing still for 73 frames
    text: np.ndarray  # t k, rows of the caption, unpadded
    audio: np.ndarray  # F layers k, speech features of its 4 f video frames
    about: About


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The sizes that all records of one training run share; the axes are those of `Clip`."""

    f: int
    m: int
    h: int
    w: int
    c: int
    layers: int
    audio_dim: int
    text_dim: int
    dtype: str = "bfloat16"

    @classmethod
    def of(cls, clip: Clip) -> "Shapes":
        f, h, w, c = clip.latents.shape
        _, layers, audio_dim = clip.audio.shape
        dtype = clip.latents.dtype.name
        return cls(f, len(clip.motion), h, w, c, layers, audio_dim, clip.text.shape[1], dtype)

    def batch(self, rows: int, text_len: int) -> dict[str, tuple[int, ...]]:
        """The shapes of a batch's arrays."""
        grid = (self.h, self.w, self.c)
        return {
            "latents": (rows, self.f, *grid),
            "motion": (rows, self.m, *grid),
            "reference": (rows, 1, *grid),
            "still": (rows, self.m, *grid),
            "text": (rows, text_len, self.text_dim),
            "audio": (rows, 1, PER_LATENT * self.f, self.layers, self.audio_dim),
        }


def pack(clip: Clip) -> bytes:
    """The record of a clip. Raises BrokenRecord for one that `unpack` would refuse."""
    _check(clip)
    arrays = {name: np.ascontiguousarray(getattr(clip, name)) for name in AXES}
    about = json.dumps(dataclasses.asdict(clip.about), allow_nan=False)
    return save(arrays, {"about": about})


def unpack(blob: bytes) -> Clip:
    """The clip of a record; its arrays are read-only views of `blob`.

    Raises BrokenRecord where a field is missing, of another dtype or rank, at odds with another
    field, or not finite.
    """
    header, offset = _header(blob)
    missing = [name for name in AXES if name not in header]
    if missing:
        raise BrokenRecord(f"it has no field {', '.join(missing)}")
    arrays = {name: _array(blob, offset, name, header[name]) for name in AXES}
    about = _about(header.get("__metadata__"))
    clip = Clip(**arrays, about=about)
    _check(clip)
    return clip


def require(clip: Clip, shapes: Shapes, text_len: int) -> None:
    """Raises BrokenRecord, naming the field, where a clip is not of the shapes of the run."""
    own = dataclasses.replace(Shapes.of(clip), dtype=shapes.dtype)  # a dtype can be converted
    for field, have in dataclasses.asdict(own).items():
        want = getattr(shapes, field)
        if have != want:
            raise BrokenRecord(f"its {_MEANING[field]} is {have}, while that of others is {want}")
    if len(clip.text) > text_len:
        raise BrokenRecord(f"its text has {len(clip.text)} rows, more than text_len = {text_len}")


_MEANING = {
    "f": "latents' length (f)",
    "m": "motion's length (m)",
    "h": "latents' height (h)",
    "w": "latents' width (w)",
    "c": "latents' number of channels (c)",
    "layers": "audio's number of layers",
    "audio_dim": "audio's width (k)",
    "text_dim": "text's width (k)",
}


def write_shard(path: Path, records: Iterable[bytes]) -> int:
    """Writes a whole shard, or none, and says how many records it holds; without a record there
    is none. Raises LiveAvatarError when it cannot be written or does not read back."""
    partial = path.with_name(path.name + ".partial")
    count, writer = 0, None
    try:
        try:
            for record in records:
                if writer is None:
                    partial.unlink(missing_ok=True)
                    writer = ArrayRecordWriter(str(partial), OPTIONS)
                writer.write(record)
                count += 1
        finally:
            if writer is not None:
                writer.close()
        if count:
            if count_records(partial) != count:
                raise OSError("what was written does not read back")
            partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError | RuntimeError) and not isinstance(error, LiveAvatarError):
            raise LiveAvatarError(
                f"cannot write {path}: {reason(error)}; free some space or name another folder"
            ) from None
        raise
    return count


def count_records(path: Path) -> int:
    """Records of a shard; raises LiveAvatarError when it is no whole ArrayRecord file."""
    try:
        reader = ArrayRecordReader(str(path), options="readahead_buffer_size:0")
        try:
            whole, count = reader.ok(), reader.num_records()
        finally:
            if reader.ok():  # closing a damaged one raises again
                reader.close()
    except (RuntimeError, OSError, ValueError) as error:
        raise LiveAvatarError(
            f"the shard {path} is damaged ({reason(error)}); copy or encode it again"
        ) from None
    if not whole or count < 1:
        raise LiveAvatarError(f"the shard {path} is cut off or empty; copy or encode it again")
    return count


def reason(error: BaseException) -> str:
    """An error of a library in one line, without the full stop."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return said.splitlines()[0].split("; at byte")[0].rstrip(".")


def _header(blob: bytes) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors blob, and where its data begins."""
    try:
        (size,) = struct.unpack_from("<Q", blob)
        header = json.loads(blob[8 : 8 + size])
        if isinstance(header, dict):
            return header, 8 + size
    except (struct.error, ValueError):
        pass
    raise BrokenRecord("it is not a safetensors blob")


def _about(metadata: Any) -> About:
    try:
        given = json.loads(metadata["about"])
        casts = {
            "id": str,
            "caption": str,
            "start": float,
            "fps": float,
            "frames": int,
            "past": int,
        }
        known = {name: cast(given[name]) for name, cast in casts.items() if name in given}
        scores = {str(name): float(value) for name, value in given.get("scores", {}).items()}
        return About(**known, scores=scores)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BrokenRecord("it has no metadata `about` with id, start and frames") from None


def _array(blob: bytes, offset: int, name: str, entry: dict[str, Any]) -> np.ndarray:
    """One array of a blob, as a view."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        shape = tuple(int(n) for n in shape)
    except (KeyError, TypeError, ValueError):
        raise BrokenRecord(f"its field {name} has no proper header") from None
    if dtype not in DTYPES:
        raise BrokenRecord(f"its field {name} is {dtype}; it must be one of {', '.join(DTYPES)}")
    dtype, count = np.dtype(DTYPES[dtype]), math.prod(shape)
    whole = min((begin, *shape), default=0) >= 0 and end - begin == count * dtype.itemsize
    if not whole or offset + end > len(blob):
        raise BrokenRecord(f"its field {name} is cut off")
    return np.frombuffer(blob, dtype, count, offset + begin).reshape(shape)


def _check(clip: Clip) -> None:
    """Ranks, sizes that hang together, and finite numbers."""
    sizes: dict[str, tuple[str, int]] = {}
    for name, axes in AXES.items():
        array = getattr(clip, name)
        if array.dtype not in DTYPES.values():
            raise BrokenRecord(f"its field {name} is {array.dtype}; it must be a float of 2 or 4 B")
        if array.ndim != len(axes.split()) or 0 in array.shape:
            raise BrokenRecord(f"its field {name} has shape {array.shape}; it must be [{axes}]")
        for axis, size in zip(axes.split(), array.shape, strict=True):
            axis = (
                name if axis == "k" and name in ("text", "audio") else axis
            )  # widths of their own
            first, known = sizes.setdefault(axis, (name, size))
            if known != size:
                raise BrokenRecord(
                    f"its fields {first} and {name} differ in {axis}: {known} and {size}"
                )
        if not _finite(array):
            raise BrokenRecord(f"its field {name} holds values that are not finite")
    frames = PER_LATENT * sizes["f"][1]
    if sizes["F"][1] != frames:
        raise BrokenRecord(
            f"its field audio has {sizes['F'][1]} frames; its latents are of {frames}"
        )


def _finite(array: np.ndarray) -> bool:
    """By the exponents alone, as whole numbers: two passes at the speed of memory, no copy."""
    infinity = np.array(np.inf, array.dtype)
    unsigned, signed = (f"{kind}{array.itemsize}" for kind in "ui")
    top, bottom = infinity.view(signed), (-infinity).view(unsigned)
    return bool(array.view(signed).max() < top and array.view(unsigned).max() < bottom)
