"""What was trained, in the published form: export and import are each other's inverse."""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from liveavatar_jax.config import DiTConfig
from liveavatar_jax.models import lora
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.files import read
from liveavatar_jax.weights.rules import load
from liveavatar_jax.weights.wan import DIT_RULES, LORA_TARGETS
from tests.networks import random, same
from train import export as exporting
from train.checkpoints import Checkpoints
from train.export import main, read_lora

CFG = DiTConfig.tiny()
CONFIG = {"train": {"lora": {"rank": 4, "alpha": 3.0}}, "steps": 7}
MAKE = lambda: CausalDiT(CFG, rngs=nnx.Rngs(0))


def factors(seed: int, dtype: str = "float32"):
    return random(
        lambda: lora.init(
            jax.eval_shape(MAKE), LORA_TARGETS, 4, key=jax.random.key(0), dtype=dtype
        ),
        seed,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a LoRA, and one with a whole network."""
    folder = tmp_path_factory.mktemp("runs")
    with Checkpoints(folder / "lora", CONFIG) as there:
        for step in (1, 2):
            learner = {"params": factors(step), "optimiser": factors(step + 20)}
            state = {"student": learner, "average": factors(step + 10, "bfloat16")}
            there.save(step, state | {"key": jax.random.key(step)}, {})
    with Checkpoints(folder / "full", {"steps": 7}) as there:
        learner = {"params": {"network": random(MAKE), "discriminator": jnp.ones(3)}}
        there.save(1, {"critic": learner, "average": None, "updates": jnp.int32(1)}, {})
    return folder


def test_a_lora_comes_back_as_it_was_trained(run, tmp_path):
    out = tmp_path / "new" / "lora.safetensors"
    assert main([str(run / "lora"), "--out", str(out)]) == 0
    found, scale = read_lora(out, jax.eval_shape(MAKE))
    same(found, factors(2))
    assert scale == 0.75
    assert main([str(run / "lora"), "--out", str(out), "--step", "1", "--ema"]) == 0
    found, _ = read_lora(out, jax.eval_shape(MAKE))
    same(found, factors(11, "bfloat16"))
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_names_are_the_published_ones(run, tmp_path):
    out = tmp_path / "lora.safetensors"
    assert main([str(run / "lora"), "--out", str(out), "--dtype", "bfloat16", "--alpha", "2"]) == 0
    tensors = read(out)
    q = tensors["blocks.1.self_attn.q.lora_A.default.weight"]
    assert q.shape == (4, CFG.dim) and q.dtype == jnp.bfloat16
    assert "audio_injector.injector.0.o.lora_B.default.weight" in tensors
    assert read_lora(out, jax.eval_shape(MAKE))[1] == 0.5


@pytest.mark.parametrize("size", [exporting.SHARD, 100_000])
def test_a_network_comes_back_as_it_was_trained(run, tmp_path, monkeypatch, size):
    monkeypatch.setattr(exporting, "SHARD", size)
    assert main([str(run / "full"), "--out", str(tmp_path / "dit"), "--part", "critic"]) == 0
    tensors = read(tmp_path / "dit")
    assert (len(tensors.files) > 3) == (size == 100_000)
    same(load(jax.eval_shape(MAKE), tensors, DIT_RULES, where="dit"), random(MAKE))


@pytest.mark.parametrize(
    "run_name, args, said",
    [
        ("none", [], r"none/checkpoints has no step; name the folder of a run"),
        ("lora", ["--step", "5"], r"checkpoints has the steps 1, 2; name the folder of a run, and"),
        ("lora", ["--part", "critic"], r"step 2 of .*/lora has no 'critic', but average, key@"),
        ("lora", ["--out", "folder"], r"--out folder must be a \.safetensors file, for this is a"),
        ("full", ["--part", "critic", "--out", "x.bin"], r"--out x\.bin must be a folder, for"),
        ("full", ["--part", "critic", "--out", "{run}"], r"is there already; remove it or name"),
        ("lora", ["--out", "{run}/lora/checkpoints/2/config/metadata/x.safetensors"],
         r"x\.safetensors cannot be written \("),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_said(run, tmp_path, capsys, run_name, args, said):
    args = ["--out", str(tmp_path / "x.safetensors"), *args]
    args = [arg.replace("{run}", str(run)) for arg in args]
    assert main([str(run / run_name), *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.export: ") and re.search(said, line), line


def test_a_lora_whose_alpha_nobody_said_is_refused(tmp_path):
    with Checkpoints(tmp_path, {"steps": 7}) as there:
        there.save(1, {"student": factors(0)}, {})
    with pytest.raises(LiveAvatarError, match="has no alpha beside a rank; give it with --alpha"):
        exporting.export(tmp_path, tmp_path / "x.safetensors")
    exporting.export(tmp_path, tmp_path / "x.safetensors", alpha=1.0)


def test_weights_without_a_published_name_are_refused(tmp_path):
    with Checkpoints(tmp_path, {}) as there:
        there.save(1, {"critic": {"head.kernel": jnp.ones((2, 2)), "x": jnp.ones(2)}}, {})
    with pytest.raises(LiveAvatarError, match=r"head\.kernel and 1 more have no published name"):
        exporting.export(tmp_path, tmp_path / "x", part="critic")
