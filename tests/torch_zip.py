"""Writes torch's zip format without torch, for tests of its reader."""

import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@dataclass
class Storage:
    kind: type
    key: str
    array: np.ndarray


@dataclass
class Tensor:
    """What torch.save stores of a tensor: a call of _rebuild_tensor_v2 on a storage."""

    storage: Storage
    offset: int
    shape: tuple
    strides: tuple

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2  # type: ignore
        return rebuild, (self.storage, self.offset, self.shape, self.strides, False, OrderedDict())


class Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        if isinstance(obj, Storage):
            return ("storage", obj.kind, obj.key, "cpu", obj.array.size)
        return None


def fake_torch(patch: pytest.MonkeyPatch) -> Any:
    """Just enough of a module named torch for a pickle to refer to it."""
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "BFloat16Storage", "SecretStorage"):
        setattr(torch, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*_):
        raise AssertionError("the reader must not look this up")

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    patch.setitem(sys.modules, "torch", torch)
    patch.setitem(sys.modules, "torch._utils", utils)
    return torch


def save_pth(path: Path, state, *storages: Storage, compression=zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        with archive.open("net/data.pkl", "w") as file:
            Pickler(file, protocol=2).dump(state)
        for storage in storages:
            archive.writestr(f"net/data/{storage.key}", storage.array.tobytes())
        archive.writestr("net/byteorder", "little")
    return path


def save_state(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """A flat state dict of float32 tensors, as the VAE and the text encoder are published."""
    with pytest.MonkeyPatch.context() as patch:
        torch = fake_torch(patch)
        storages = [Storage(torch.FloatStorage, str(i), t) for i, t in enumerate(tensors.values())]
        steps = [tuple(n // t.itemsize for n in t.strides) for t in tensors.values()]
        state = {
            name: Tensor(storage, 0, storage.array.shape, strides)
            for name, storage, strides in zip(tensors, storages, steps, strict=True)
        }
        save_pth(path, state, *storages)
