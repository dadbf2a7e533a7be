"""The released LoRA merged into the released DiT, tensor by tensor."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax.models import lora
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import wan
from liveavatar_jax.weights.files import read
from liveavatar_jax.weights.rules import export, load
from liveavatar_jax.weights.wan import DIT_RULES, LORA_RULES, LORA_TARGETS, abstract_lora


@pytest.fixture(scope="module")
def tensors(parity):
    return read(parity / "tiny_checkpoint" / "LiveAvatar" / "liveavatar.safetensors")


def abstract_dit(parity, dtype="float32"):
    folder = parity / "tiny_checkpoint" / "Wan2.2-S2V-14B"
    published = json.loads((folder / "config.json").read_text())
    cfg = wan.dit_config(published, read(folder).stored, "config.json", param_dtype=dtype)
    return jax.eval_shape(lambda: CausalDiT(cfg, rngs=nnx.Rngs(0)))


def plain(tensors):
    """The keys as the released code wants them, whatever prefix the fixture gives them."""
    return {name.removeprefix("base_model.model."): np.asarray(tensors[name]) for name in tensors}


def published_weights(dit):
    return {k: np.asarray(v, np.float32) for k, v in export(dit, DIT_RULES).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_the_originals(fixture, parity, tensors, dtype):
    golden = fixture("lora")
    base = read(parity / "tiny_checkpoint" / "Wan2.2-S2V-14B")
    dit = load(abstract_dit(parity, dtype), base, DIT_RULES, where="tiny DiT")
    factors = load(abstract_lora(dit, tensors, where="lora"), tensors, LORA_RULES, where="lora")
    before = published_weights(dit)
    after = published_weights(lora.merge(dit, factors, golden.sidecar["config"]["scale"]))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == set(golden.sidecar["modules_changed_by_merge"])
    prefix = f"merged_{dtype}."
    names = [name.removeprefix(prefix) for name in golden.tensors if name.startswith(prefix)]
    assert names
    for name in names:
        want = golden[prefix + name]
        if dtype == "float32":
            tolerance = golden.sidecar["suggested_tolerance"]["merged_float32"]
            np.testing.assert_allclose(after[name], want, **tolerance)
        else:  # exact, but for one unit in the last place where the sum lies on a tie
            unit = np.abs(want) * 2.0**-7
            assert (np.abs(after[name] - want) <= unit).all()
            assert (after[name] != want).mean() < 1e-3


def test_released_targets_are_ours(parity, tensors):
    dit = abstract_dit(parity)
    ours = jax.eval_shape(lambda: lora.init(dit, LORA_TARGETS, 8, key=jax.random.key(0)))
    assert set(ours) == set(abstract_lora(dit, tensors, where="lora"))


def respelt(tensors, spell):
    return {spell(name): tensor for name, tensor in plain(tensors).items()}


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: "base_model.model." + name,
        lambda name: name.replace(".default", ""),
        lambda name: "base_model.model." + name.replace(".default", ""),
    ],
)
def test_every_spelling_of_the_keys_is_read(parity, tensors, spell):
    dit = abstract_dit(parity)
    spelt = respelt(tensors, spell)
    a = load(abstract_lora(dit, tensors, where="lora"), tensors, LORA_RULES, where="lora")
    b = load(abstract_lora(dit, spelt, where="lora"), spelt, LORA_RULES, where="lora")
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert set(export(b, LORA_RULES)) == set(plain(tensors))


def test_faults_of_a_lora_are_listed_at_once(parity, tensors):
    dit = abstract_dit(parity)
    broken = plain(tensors)
    q = "blocks.1.self_attn.{}.lora_{}.default.weight"
    broken["blocks.1.self_atn.q.lora_A.default.weight"] = broken.pop(q.format("q", "A"))
    del broken[q.format("k", "A")]
    dim, rank = broken[q.format("v", "B")].shape
    broken[q.format("v", "B")] = jnp.zeros((3, rank))
    with pytest.raises(LiveAvatarError) as error:
        load(abstract_lora(dit, broken, where="l.safetensors"), broken, LORA_RULES, where="lora")
    said = str(error.value)
    assert "lora does not fit the model in 4 place(s)" in said
    assert f"missing: {q.format('q', 'A')}" in said and f"missing: {q.format('k', 'A')}" in said
    assert f"self_atn.q.lora_A.default.weight (nearest name: {q.format('q', 'A')})" in said
    assert f"misshapen: {q.format('v', 'B')} has shape (3, {rank}), not ({dim}, {rank})" in said


def test_a_lora_that_matches_nothing_is_refused(parity, tensors):
    dit = abstract_dit(parity)
    astray = respelt(tensors, lambda name: "unet." + name)
    with pytest.raises(LiveAvatarError, match=r"x adapts no layer of CausalDiT.*is unet\."):
        abstract_lora(dit, astray, where="x")
