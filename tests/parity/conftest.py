"""Reads fixtures and compares by the measure the sidecars use: max|a - b| / max|b|."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np
import pytest
from safetensors.numpy import load_file


@dataclass
class Fixture:
    tensors: dict[str, np.ndarray]
    sidecar: dict[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def check(self, name: str, ours, peak: float | None = None) -> None:
        """`ours` in the published axis order, against tensor `name`, at the sidecar's tolerance."""
        want = self.tensors[name]
        ours = np.asarray(ours, np.float64)
        assert ours.shape == want.shape, f"{name}: {ours.shape} is not {want.shape}"
        if peak is None:
            peak = self.sidecar["suggested_tolerance"]["peak_relative"]
        error = np.abs(ours - want).max() / np.abs(want).max()
        assert error <= peak, f"{name}: off by {error:.1e} of the peak, allowed {peak:.0e}"


@pytest.fixture(scope="session")
def fixture(parity: Path):
    def load(name: str) -> Fixture:
        return Fixture(
            load_file(parity / f"{name}.safetensors"),
            json.loads((parity / f"{name}.json").read_text()),
        )

    return load


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/parity" in item.path.as_posix():
            item.add_marker(pytest.mark.parity)
