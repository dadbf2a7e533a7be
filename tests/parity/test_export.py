"""A LoRA that was trained here and exported goes the way of the released one."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax import cli
from liveavatar_jax.models import lora
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.paths import leaves
from liveavatar_jax.weights import checkpoint, wan
from liveavatar_jax.weights.files import read
from liveavatar_jax.weights.rules import load
from tests.networks import random
from train.checkpoints import Checkpoints
from train.export import main, read_lora


@pytest.fixture(scope="module")
def base(parity):
    folder = parity / "tiny_checkpoint" / "Wan2.2-S2V-14B"
    published = json.loads((folder / "config.json").read_text())
    cfg = wan.dit_config(published, read(folder).stored, "config.json", param_dtype="bfloat16")
    shapes = jax.eval_shape(lambda: CausalDiT(cfg, rngs=nnx.Rngs(0)))
    return folder, load(shapes, read(folder), wan.DIT_RULES, where="tiny DiT")


def merged(dit, factors):
    return jax.jit(lambda dit, factors: lora.merge(dit, factors, 6.0 / 4))(dit, factors)


def test_the_released_lora_is_read_for_training(base, parity):
    path = parity / "tiny_checkpoint" / "LiveAvatar" / "liveavatar.safetensors"
    found, scale = read_lora(path, base[1])
    ours = jax.eval_shape(lambda: lora.init(base[1], wan.LORA_TARGETS, 8, key=jax.random.key(0)))
    assert set(found) == set(ours) and scale == 0.5


def test_an_exported_lora_is_converted_as_the_released_one_is(base, tmp_path):
    folder, dit = base
    init = lambda: lora.init(dit, wan.LORA_TARGETS, 4, key=jax.random.key(0))
    factors = random(init)
    with Checkpoints(tmp_path / "run", {"adapters": {"rank": 4, "alpha": 6.0}}) as there:
        there.save(1, {"student": factors}, {})
    file, out = tmp_path / "lora.safetensors", tmp_path / "weights"
    assert main([str(tmp_path / "run"), "--out", str(file)]) == 0
    converting = ["convert", "--base", str(folder), "--lora", str(file), "--out", str(out)]
    assert cli.main(converting) == 0
    found, want = (leaves(net) for net in (checkpoint.restore(out, "dit"), merged(dit, factors)))
    assert found.keys() == want.keys()
    for path in want:  # exact, but for one unit in the last place where the sum lies on a tie
        a, b = np.asarray(found[path], np.float32), np.asarray(want[path], np.float32)
        assert (np.abs(a - b) <= np.abs(b) * 2.0**-7).all(), path
        assert (a != b).mean() < 1e-3, path
