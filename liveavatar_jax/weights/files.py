"""Readers of foreign weight files: safetensors, alone or in shards, and torch's zip format.

Both list what a file holds from its header alone and map each tensor into memory only while it
is looked at. A `.pth` is a pickle; ours is opened by an unpickler that knows an ordered
dictionary, the storages and one function that notes where a tensor lies, and refuses all else:
no code of the file ever runs.
"""

import io
import json
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from liveavatar_jax.types import LiveAvatarError

_SAFETENSORS = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_TORCH = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_AGAIN = "download it again"


class Stored(NamedTuple):
    """Where a tensor lies in a file; strides count elements, None is the row-major order."""

    path: Path
    offset: int  # bytes
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes from the first element to the last."""
        if 0 in self.shape:
            return 0
        if self.strides is None:
            return math.prod(self.shape) * self.dtype.itemsize
        span = sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))
        return (span + 1) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The tensor, mapped into memory; dropping the array unmaps it."""
        if 0 in self.shape:
            return np.empty(self.shape, self.dtype)
        shape = self.shape if self.strides is None else (self.nbytes // self.dtype.itemsize,)
        flat = np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=shape)
        if self.strides is None:
            return flat
        steps = [step * self.dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)


class Tensors(Mapping):
    """The tensors of one or several files by published name; each look-up maps one into memory.

    stored: where each lies, with its shape and dtype; faults: a sentence for each that cannot be
    read, and looking it up raises it as LiveAvatarError; files: what was opened.
    """

    def __init__(self, stored: Mapping[str, Stored], faults: Mapping[str, str], files: list[Path]):
        self.stored = stored
        self.faults = faults
        self.files = files

    def __getitem__(self, name: str) -> np.ndarray:
        if name in self.faults:
            raise LiveAvatarError(self.faults[name])
        return self.stored[name].map()

    def __contains__(self, name: object) -> bool:
        return name in self.stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def read(path: Path) -> Tensors:
    """The tensors of a file (.safetensors, its .index.json, torch's .pth or .bin) or a folder.

    Raises LiveAvatarError naming the file when it is missing or cannot be understood; a file
    that merely ends too early is opened, with the tensors that it cuts off among `faults`.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise LiveAvatarError(f"{path} is missing; {_AGAIN}, or name the folder that holds it")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    read_one = _read_safetensors if path.suffix == ".safetensors" else _read_torch
    stored = read_one(path)
    size = path.stat().st_size
    faults = {
        name: f"truncated: {name} ends at byte {end:,}, but {path} at {size:,}; {_AGAIN}"
        for name, s in stored.items()
        if (end := s.offset + s.nbytes) > size
    }
    return Tensors(stored, faults, [path])


def _read_folder(folder: Path) -> Tensors:
    for pattern in ("*.safetensors.index.json", "*.safetensors", "pytorch_model.bin"):
        if found := sorted(folder.glob(pattern)):
            return _union([read(path) for path in found])
    raise LiveAvatarError(f"{folder} holds no .safetensors and no pytorch_model.bin; {_AGAIN}")


def _read_shards(index: Path) -> Tensors:
    try:
        listed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = {name: index.parent / name for name in sorted(set(listed.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LiveAvatarError(f"{index} is not an index of shards ({error}); {_AGAIN}") from None
    if absent := [name for name, path in shards.items() if not path.is_file()]:
        raise LiveAvatarError(f"{index} lists {', '.join(absent)}, which is missing; {_AGAIN}")
    parts = {name: read(path) for name, path in shards.items()}
    whole = _union(list(parts.values()))
    faults = {
        name: f"absent: {name} is not in {shards[shard]}, where {index.name} says it is; {_AGAIN}"
        for name, shard in listed.items()
        if name not in parts[shard]
    }
    return Tensors(whole.stored, {**faults, **whole.faults}, [index, *whole.files])


def _union(parts: list[Tensors]) -> Tensors:
    stored: dict[str, Stored] = {}
    faults: dict[str, str] = {}
    for part in parts:
        for name in stored.keys() & part.stored.keys():
            both = f"{stored[name].path} and {part.stored[name].path}"
            faults[name] = f"double: {name} is in {both}; keep one of them"
        stored |= part.stored
        faults |= part.faults
    return Tensors(stored, faults, [path for part in parts for path in part.files])


def _read_safetensors(path: Path) -> dict[str, Stored]:
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is cut off")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        stored = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            dtype, shape = np.dtype(_SAFETENSORS[entry["dtype"]]), tuple(entry["shape"])
            stored[name] = Stored(path, 8 + length + start, dtype, shape)
            if start < 0 or end - start != stored[name].nbytes:
                raise ValueError(f"{name} has {end - start} bytes for shape {shape}")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise LiveAvatarError(f"{path} is not a safetensors file ({error}); {_AGAIN}") from None
    return stored


def _read_torch(path: Path) -> dict[str, Stored]:
    try:
        with zipfile.ZipFile(path) as archive:
            found = _Pickle(path, archive).tensors()
    except zipfile.BadZipFile:
        raise LiveAvatarError(
            f"{path} is cut off, or older than torch 1.6; {_AGAIN}, or store it anew with "
            "torch.save(torch.load(f), f)"
        ) from None
    except LiveAvatarError:
        raise
    except Exception as error:  # a broken pickle may fail in any way
        raise LiveAvatarError(f"{path} is damaged ({error!r}); {_AGAIN}") from None
    return found


class _Storage(NamedTuple):
    offset: int
    nbytes: int
    dtype: np.dtype


class _Pickle(pickle.Unpickler):
    """Reads the data.pkl of torch's zip format; whatever is not listed here is refused."""

    def __init__(self, path: Path, archive: zipfile.ZipFile):
        self._path = path
        self._archive = archive
        (entry,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        self._root = entry.removesuffix("data.pkl")
        order = self._root + "byteorder"
        if order in archive.namelist() and archive.read(order) != b"little":
            raise LiveAvatarError(f"{path} is big-endian; store it anew on a usual machine")
        super().__init__(io.BytesIO(archive.read(entry)))

    def tensors(self) -> dict[str, Stored]:
        state = self.load()
        for wrapper in ("state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
                state = state[wrapper]
        if not isinstance(state, dict):
            raise LiveAvatarError(f"{self._path} holds a {type(state).__name__}, not a state dict")
        for name, value in state.items():
            if not isinstance(value, Stored):
                kind = type(value).__name__
                raise LiveAvatarError(f"{self._path}: {name} is a {kind}, not a tensor; remove it")
        return dict(state)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if module == "torch" and name in _TORCH:
            return name
        raise LiveAvatarError(
            f"{self._path} asks to run {module}.{name}, which no weights need, and was refused; "
            "take the published file"
        )

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage, key, _, numel = pid
        if kind != "storage" or not isinstance(key, str):
            raise ValueError(f"unknown reference {pid!r}")
        entry = self._archive.getinfo(f"{self._root}data/{key}")
        dtype = np.dtype(_TORCH[storage])
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise LiveAvatarError(f"{self._path} is compressed; store it anew with torch.save")
        if numel * dtype.itemsize > entry.file_size:
            raise ValueError(f"{entry.filename} has {entry.file_size} bytes for {numel} numbers")
        return _Storage(self._data_offset(entry), numel * dtype.itemsize, dtype)

    def _data_offset(self, entry: zipfile.ZipInfo) -> int:
        """The local header repeats the name and has its own extra field (torch aligns with it)."""
        with self._path.open("rb") as file:
            file.seek(entry.header_offset)
            name, extra = struct.unpack("<HH", file.read(30)[26:])
        return entry.header_offset + 30 + name + extra

    def _tensor(
        self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any
    ) -> Stored:
        if not isinstance(storage, _Storage) or len(shape) != len(strides):
            raise ValueError("a tensor without its storage")
        if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
            raise ValueError(f"a tensor at {offset} of shape {shape} and strides {strides}")
        start = offset * storage.dtype.itemsize
        row_major = all(
            n == 1 or step == math.prod(shape[i + 1 :])
            for i, (n, step) in enumerate(zip(shape, strides, strict=True))
        )
        steps = None if row_major else tuple(strides)
        stored = Stored(self._path, storage.offset + start, storage.dtype, tuple(shape), steps)
        if start + stored.nbytes > storage.nbytes:
            raise ValueError(f"a tensor of shape {shape} outside its storage")
        return stored
