"""Reads fixtures and compares by the measure the sidecars use: max|a - b| / max|b|."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from liveavatar_jax.models.audio import PAST
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.weights import files, rules, wan


@dataclass
class Fixture:
    tensors: dict[str, np.ndarray]
    sidecar: dict[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name]

    def said(self, words: str) -> list[int]:
        """The numbers in the first match of a pattern in what the sidecar says was computed."""
        found = re.search(words, " ".join(self.sidecar["computation"]))
        assert found, f"the sidecar says nothing like {words!r}"
        return [int(number) for number in re.findall(r"\d+", found[0])]

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


@pytest.fixture(scope="session")
def dit(parity: Path) -> CausalDiT:
    """The small published checkpoint, widened to float32."""
    folder = parity / "tiny_checkpoint" / "Wan2.2-S2V-14B"
    tensors = files.read(folder)
    config = json.loads((folder / "config.json").read_text())
    cfg = wan.dit_config(config, tensors.stored, "config.json", param_dtype="float32")
    abstract = jax.eval_shape(lambda: CausalDiT(cfg, rngs=nnx.Rngs(0)))
    return rules.load(abstract, tensors, wan.DIT_RULES, where=folder.name)


def latents(x: np.ndarray) -> jnp.ndarray:
    """Published latents [b c f h w] or [c f h w] in our order [b f h w c]."""
    x = x if x.ndim == 5 else x[None]
    return jnp.asarray(x.transpose(0, 2, 3, 4, 1))


def published(x: jnp.ndarray) -> np.ndarray:
    """Our latents [1 f h w c] as [c f h w]."""
    return np.asarray(x)[0].transpose(3, 0, 1, 2)


def by_head(x) -> jnp.ndarray:
    """Published heads [b tokens n d] in our order [b n tokens d]; and the other way round."""
    return jnp.asarray(x).swapaxes(-3, -2)


def features(x: np.ndarray) -> jnp.ndarray:
    """Published speech features [a layers c F] as [1 a F layers c]."""
    return jnp.asarray(x.transpose(0, 3, 1, 2))[None]


def part(audio: jnp.ndarray, j: int, frames: int) -> jnp.ndarray:
    """Features of block j of `frames` latent frames; four video frames are one latent frame."""
    return audio[:, :, 4 * frames * j : 4 * frames * (j + 1)]


def after_repeats(x: jnp.ndarray) -> jnp.ndarray:
    """A block's features behind copies of its first frame, as the released code has it."""
    return jnp.concatenate([jnp.repeat(x[:, :, :1], PAST, axis=2), x], axis=2)
