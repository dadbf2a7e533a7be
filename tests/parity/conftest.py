"""Reads fixtures and compares by the measure the sidecars use: max|a - b| / max|b|."""

import json
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

from liveavatar_jax.config import DiTConfig
from liveavatar_jax.models.audio import PAST
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.weights import rules, wan


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


def dit_config(sidecar: dict[str, Any]) -> DiTConfig:
    c = sidecar["config"]
    return DiTConfig(
        dim=c["dim"],
        ffn_dim=c["ffn_dim"],
        heads=c["num_heads"],
        layers=c["num_layers"],
        latent_channels=c["in_dim"],
        freq_dim=c["freq_dim"],
        text_dim=c["text_dim"],
        text_len=c["text_len"],
        audio_dim=c["audio_dim"],
        audio_layers=sidecar["audio_feature_layers"],
        audio_tokens=c["num_audio_token"],
        inject_layers=tuple(c["audio_inject_layers"]),
        param_dtype="float32",
    )


@pytest.fixture(scope="session")
def dit(parity: Path, fixture) -> CausalDiT:
    """The small published checkpoint, widened to float32."""
    cfg = dit_config(fixture("dit_common").sidecar)
    folder = parity / "tiny_checkpoint" / "Wan2.2-S2V-14B"
    tensors = {}
    for shard in sorted(folder.glob("diffusion_pytorch_model-*.safetensors")):
        tensors |= load_file(shard)
    abstract = jax.eval_shape(lambda: CausalDiT(cfg, rngs=nnx.Rngs(0)))
    return rules.load(abstract, tensors, wan.DIT_RULES, where=folder.name)


def latents(x: np.ndarray) -> jnp.ndarray:
    """Published latents [b c f h w] or [c f h w] in our order [b f h w c]."""
    x = x if x.ndim == 5 else x[None]
    return jnp.asarray(x.transpose(0, 2, 3, 4, 1))


def published(x: jnp.ndarray) -> np.ndarray:
    """Our latents [1 f h w c] as [c f h w]."""
    return np.asarray(x)[0].transpose(3, 0, 1, 2)


def features(x: np.ndarray) -> jnp.ndarray:
    """Published speech features [a layers c F] as [1 a F layers c]."""
    return jnp.asarray(x.transpose(0, 3, 1, 2))[None]


def after_repeats(x: jnp.ndarray) -> jnp.ndarray:
    """A block's features behind copies of its first frame, as the released code has it."""
    return jnp.concatenate([jnp.repeat(x[:, :, :1], PAST, axis=2), x], axis=2)
