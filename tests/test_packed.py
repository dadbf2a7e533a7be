"""A packed model is read like a converted checkpoint, or says what is wrong."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from liveavatar_jax import stream
from liveavatar_jax.config import DiTConfig, ModelConfig
from liveavatar_jax.data.image import load_portrait
from liveavatar_jax.models.text import TextEncoder
from liveavatar_jax.paths import leaves
from liveavatar_jax.player import load_avatar
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import checkpoint, packed

from .networks import random, same

DIT = DiTConfig.tiny(dim=32, ffn_dim=48, heads=2, layers=2, inject_layers=(1,))
CFG = ModelConfig.tiny(dit=DIT)


@pytest.fixture(scope="module")
def networks():
    avatar = random(lambda: stream.Avatar(CFG, rngs=nnx.Rngs(0)))
    text = random(lambda: TextEncoder(CFG.text, rngs=nnx.Rngs(0)))
    return {"dit": avatar.dit, "vae": avatar.vae, "text": text}


@pytest.fixture(scope="module")
def folder(networks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed") / "tiny"
    packed.pack(folder, CFG, networks, dtype="float32")
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def converted(networks, tmp_path_factory):
    """The same networks as a converted checkpoint."""
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    checkpoint.save(folder, CFG, networks)
    return folder


@pytest.mark.parametrize("which", ["dit", "vae", "text"])
def test_what_was_packed_comes_back(folder, networks, which):
    assert checkpoint.load_config(folder) == CFG
    same(checkpoint.restore(folder, which), networks[which])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_it_is_placed_cast_and_quantised_like_a_converted_one(folder, converted, kind):
    mesh = jax.make_mesh((2,), ("tensor",), (jax.sharding.AxisType.Auto,))
    columns = {"blocks.ffn_in.weight": (None, "tensor"), "blocks.ffn_in.kernel": (None, "tensor"),
               "patch.kernel": ("tensor",)}  # fmt: skip

    def sharding(path):
        return NamedSharding(mesh, PartitionSpec(*columns.get(path, ())))

    for how in ({}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantised": kind}):
        ours = checkpoint.restore(folder, "dit", sharding, **how)
        same(ours, checkpoint.restore(converted, "dit", sharding, **how))
        for path, leaf in leaves(ours).items():
            assert leaf.sharding.is_equivalent_to(sharding(path), leaf.ndim), path


def test_an_avatar_is_loaded_from_either(folder, converted):
    cfg = dataclasses.replace(CFG, stream=dataclasses.replace(CFG.stream, dtype="bfloat16"))
    same(load_avatar(folder, cfg), load_avatar(converted, cfg))


def test_halves_are_half_as_large_and_come_back_rounded(folder, networks, tmp_path):
    packed.pack(tmp_path, CFG, networks)
    size = lambda folder: packed.file_of(folder, "dit").stat().st_size
    assert size(tmp_path) < 0.55 * size(folder)
    rounded = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float16).astype(jnp.float32), networks["dit"]
    )
    same(checkpoint.restore(tmp_path, "dit"), rounded)


def test_every_leaf_may_have_a_dtype_of_its_own(networks, tmp_path):
    wide = lambda path: "float32" if path.endswith("embedding") else "float16"
    packed.pack(tmp_path, CFG, {"text": networks["text"]}, dtype=wide)
    kinds = {name: a.dtype for name, a in load_file(packed.file_of(tmp_path, "text")).items()}
    assert kinds.pop("embedding") == np.float32 and set(kinds.values()) == {np.dtype("float16")}


def test_packing_again_exchanges_what_is_given(copy, networks):
    vae = jax.tree.map(lambda a: 2 * a, networks["vae"])
    before = checkpoint.fingerprint(copy)
    packed.pack(copy, CFG, {"vae": vae}, dtype="float32")
    same(checkpoint.restore(copy, "vae"), vae)
    same(checkpoint.restore(copy, "dit"), networks["dit"])
    assert checkpoint.fingerprint(copy) != before
    assert not list(copy.glob("*.partial"))


def test_a_network_of_any_kind_can_be_a_file(networks, tmp_path):
    packed.write(tmp_path / "mine.safetensors", networks["text"], "float32")
    abstract = jax.eval_shape(lambda: TextEncoder(CFG.text, rngs=nnx.Rngs(0)))
    same(packed.read(tmp_path / "mine.safetensors", abstract), networks["text"])


def sentence(error):
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text
    return text


def test_a_missing_network_is_named(copy):
    packed.file_of(copy, "vae").unlink()
    with pytest.raises(LiveAvatarError) as error:
        checkpoint.restore(copy, "vae")
    assert "vae.safetensors" in sentence(error)


@pytest.mark.parametrize("size", [0, 5, 500, -100])
def test_a_damaged_file_is_named(copy, size):
    path = packed.file_of(copy, "text")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(LiveAvatarError) as error:
        checkpoint.restore(copy, "text")
    assert "text.safetensors" in sentence(error)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: t | {"extra": np.zeros(3, np.float32)}, "extra is no weight"),
        (lambda t: {k: v for k, v in t.items() if k != "embedding"}, "has no embedding"),
        (lambda t: t | {"embedding": t["embedding"][:5]}, r"embedding has shape [5, 48]"),
    ],
)
def test_a_file_of_another_network_is_refused(copy, change, said):
    path = packed.file_of(copy, "text")
    save_file(change(load_file(path)), path)
    with pytest.raises(LiveAvatarError) as error:
        checkpoint.restore(copy, "text")
    assert said in sentence(error) and "text.safetensors" in sentence(error)


def test_what_half_precision_cannot_hold_is_refused(networks, tmp_path):
    large = jax.tree.map(lambda a: 1e6 * jnp.ones_like(a), networks["text"])
    with pytest.raises(LiveAvatarError, match="float16 cannot hold"):
        packed.write(tmp_path / "text.safetensors", large)
    with pytest.raises(LiveAvatarError, match="'int8' must be one of"):
        packed.write(tmp_path / "text.safetensors", large, "int8")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_named(networks, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LiveAvatarError) as error:
        packed.pack(tmp_path / "file" / "out", CFG, {})
    assert "file" in sentence(error)


def test_a_preset_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "PRESETS", tmp_path)
    with pytest.raises(LiveAvatarError, match="no built-in model 'puppet'; name a converted"):
        packed.preset()
    packed.pack(tmp_path / "puppet", CFG, {})
    assert packed.preset() == tmp_path / "puppet"
    with pytest.raises(LiveAvatarError, match="'doll'; there is puppet; name"):
        packed.preset("doll")


def test_the_built_in_model_brings_a_portrait_and_a_recording():
    folder = packed.PRESETS / packed.PRESET
    assert load_portrait(packed.own(folder, packed.PORTRAIT, ""), 64 * 64).shape == (64, 64, 3)
    sound = soundfile.info(packed.own(folder, packed.SPEECH, ""))
    assert (sound.samplerate, sound.channels) == (16_000, 1) and 8 <= sound.duration <= 10
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 30 * 2**20
