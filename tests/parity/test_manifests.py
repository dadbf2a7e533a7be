"""The full-size published files fit our networks, name by name, without any memory; the tiny
checkpoint of the same layout converts to the weights behind the goldens."""

import json

import jax
import numpy as np
import pytest

from liveavatar_jax.config import ModelConfig
from liveavatar_jax.models import lora
from liveavatar_jax.paths import leaves
from liveavatar_jax.weights import checkpoint
from liveavatar_jax.weights.convert import convert
from liveavatar_jax.weights.encoders import speech_config, text_config
from liveavatar_jax.weights.rules import export, match, places
from liveavatar_jax.weights.vae import vae_config
from liveavatar_jax.weights.wan import LORA_RULES, LORA_TARGETS, abstract_lora, dit_config

MANIFESTS = {
    "dit": "wan2.2_s2v_14b_dit",
    "vae": "wan2.1_vae",
    "text": "umt5_xxl_encoder",
    "speech": "wav2vec2_large_xlsr_53_english",
}


def manifest(parity, name):
    listed = json.loads((parity / "manifests" / f"{name}.json").read_text())
    shapes = {
        name: jax.ShapeDtypeStruct(tuple(t["shape"]), t["dtype"])
        for name, t in listed["tensors"].items()
    }
    assert len(shapes) == listed["num_tensors"]
    return listed, shapes


@pytest.mark.parametrize("which", MANIFESTS)
def test_every_published_tensor_has_its_place(parity, which):
    listed, shapes = manifest(parity, MANIFESTS[which])
    module, network = checkpoint.abstract(ModelConfig(), which), checkpoint.NETWORKS[which]
    found = match(module, shapes, network.rules, where=which, ignore=network.ignore)
    unused = {name for name in shapes if name not in found}
    assert found == places(module, network.rules)
    ours = sum(leaf.size for leaf in leaves(module).values())
    theirs = sum(np.prod(shapes[name].shape, dtype=int) for name in unused)
    assert ours + theirs == listed["num_parameters"]
    for name, place in found.items():
        assert leaves(module)[place.leaf].dtype == shapes[name].dtype


def test_every_tensor_of_the_published_lora_has_its_place(parity):
    listed, shapes = manifest(parity, "liveavatar_lora_rank128")
    dit = checkpoint.abstract(ModelConfig(), "dit")
    abstract = abstract_lora(dit, shapes, where="lora")
    assert match(abstract, shapes, LORA_RULES, where="lora") == places(abstract, LORA_RULES)
    assert sum(leaf.size for leaf in leaves(abstract).values()) == listed["num_parameters"]
    ours = jax.eval_shape(
        lambda: lora.init(dit, LORA_TARGETS, listed["rank"], key=jax.random.key(0))
    )
    assert leaves(ours).keys() == leaves(abstract).keys()


def test_default_configs_are_those_of_the_published_files(parity):
    ours = ModelConfig()
    listed, shapes = manifest(parity, MANIFESTS["dit"])
    assert dit_config(listed["config"], shapes, "manifest") == ours.dit
    assert vae_config(manifest(parity, MANIFESTS["vae"])[1]) == ours.vae
    assert text_config(manifest(parity, MANIFESTS["text"])[1]) == ours.text
    listed, _ = manifest(parity, MANIFESTS["speech"])
    assert speech_config(listed["config"], "manifest") == ours.speech


@pytest.fixture(scope="module")
def converted(parity, tmp_path_factory):
    folder, out = parity / "tiny_checkpoint", tmp_path_factory.mktemp("tiny") / "out"
    convert(folder, folder / "LiveAvatar", out, progress=False)
    return out


@pytest.mark.parametrize(("which", "golden"), [("vae", "vae"), ("text", "umt5")])
def test_tiny_checkpoint_holds_the_weights_of_the_goldens(converted, fixture, which, golden):
    weights = fixture(golden).tensors
    network = checkpoint.restore(converted, which, dtype="float32")
    ours = export(network, checkpoint.NETWORKS[which].rules)
    assert {f"w.{name}" for name in ours} == {name for name in weights if name.startswith("w.")}
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, weights[f"w.{name}"].astype(np.float32))


def test_tiny_checkpoint_has_the_lora_merged_in(converted, fixture):
    golden = fixture("lora")
    dit = export(checkpoint.restore(converted, "dit"), checkpoint.NETWORKS["dit"].rules)
    prefix = "merged_bfloat16."
    names = [name.removeprefix(prefix) for name in golden.tensors if name.startswith(prefix)]
    for name in names:
        want, ours = golden[prefix + name], dit[name].astype(np.float32)
        assert (np.abs(ours - want) <= np.abs(want) * 2.0**-7).all()
        assert (ours != want).mean() < 1e-3
