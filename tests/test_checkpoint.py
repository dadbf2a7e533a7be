"""A converted checkpoint comes back as it was, onto any devices, or says what is wrong."""

import dataclasses
import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from liveavatar_jax.config import ModelConfig, VAEConfig
from liveavatar_jax.paths import leaves
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import checkpoint

from .networks import same

CFG = ModelConfig.tiny()


def make(which, dtype="float32"):
    """Random weights of the shapes of a network."""
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(draw, checkpoint.abstract(CFG, which, dtype))


@pytest.fixture(scope="module")
def dit():
    return make("dit")


@pytest.fixture(scope="module")
def saved(dit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    checkpoint.save(folder, CFG, {"dit": dit})
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_restore_of_a_save_is_the_identity(saved, dit):
    assert checkpoint.load_config(saved) == CFG
    same(checkpoint.restore(saved, "dit"), dit)


def test_each_layer_is_an_item_of_its_own(saved):
    items = {path.name for path in (saved / "dit").iterdir()}
    layers = {f"blocks.{i:03d}.0" for i in range(3)} | {f"injectors.{i:03d}.0" for i in range(2)}
    assert items == layers | {"rest.0"}


def test_large_tables_are_cut_and_come_back_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 4096)
    text = make("text")
    items = checkpoint.plan(text, "text")
    pieces = [r for rows in items.values() for r in rows if r.leaf == "embedding"]
    assert [r.start for r in pieces] == [0, *(r.stop for r in pieces[:-1])] and len(pieces) > 3
    assert pieces[-1].stop == CFG.text.vocab
    assert all(r.nbytes(text.embedding) <= 4096 for r in pieces)
    checkpoint.save(tmp_path / "out", CFG, {"text": text})
    same(checkpoint.restore(tmp_path / "out", "text"), text)


def test_restore_is_sharded_as_asked(saved, dit):
    mesh = jax.make_mesh((2, 4), ("stage", "tensor"), (jax.sharding.AxisType.Auto,) * 2)

    def sharding(path):
        if path.startswith("blocks.") and path.endswith("ffn_in.kernel"):
            return NamedSharding(mesh, PartitionSpec(None, None, "tensor"))
        if path.startswith("injectors.") and path.endswith("adain.kernel"):
            return NamedSharding(mesh, PartitionSpec("stage", None, "tensor"))
        return NamedSharding(mesh, PartitionSpec())

    restored = checkpoint.restore(saved, "dit", sharding)
    same(restored, dit)
    for path, leaf in leaves(restored).items():
        assert leaf.sharding.is_equivalent_to(sharding(path), leaf.ndim), path
    assert restored.blocks.ffn_in.kernel[...].addressable_shards[0].data.shape[-1] == 256 // 4
    assert restored.injectors.adain.kernel[...].addressable_shards[0].data.shape[0] == 1


def test_restore_in_another_dtype_rounds_once(saved, dit):
    restored = checkpoint.restore(saved, "dit", dtype="bfloat16")
    assert restored.blocks.ffn_in.kernel.dtype == jnp.bfloat16
    same(restored, jax.tree.map(lambda x: x.astype(jnp.bfloat16), dit))


def test_bfloat16_is_stored_as_it_is_and_widened_exactly(tmp_path):
    cfg = dataclasses.replace(CFG, vae=VAEConfig.tiny(param_dtype="bfloat16"))
    vae = make("vae", "bfloat16")
    checkpoint.save(tmp_path / "out", cfg, {"vae": vae})
    same(checkpoint.restore(tmp_path / "out", "vae"), vae)
    wide = checkpoint.restore(tmp_path / "out", "vae", dtype="float32")
    same(wide, jax.tree.map(lambda x: x.astype(jnp.float32), vae))


def test_missing_and_foreign_folders_are_named(saved, tmp_path):
    with pytest.raises(LiveAvatarError, match="nowhere is not a converted checkpoint"):
        checkpoint.restore(tmp_path / "nowhere", "dit")
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel_S2V"}')
    with pytest.raises(LiveAvatarError, match="not the config of a converted checkpoint"):
        checkpoint.load_config(tmp_path)
    with pytest.raises(LiveAvatarError, match="it has no vae network"):
        checkpoint.restore(saved, "vae")


def test_unfinished_folder_is_refused(tmp_path):
    partial = checkpoint.begin(tmp_path / "out", {"files": {}})
    for folder in (tmp_path / "out", partial):
        with pytest.raises(LiveAvatarError, match="was interrupted; run the same"):
            checkpoint.restore(folder, "dit")


def test_damaged_copy_names_the_lost_files(copy):
    (copy / "dit" / "blocks.001.0" / "manifest.ocdbt").unlink()
    cut = copy / "dit" / "blocks.002.0" / "_METADATA"
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(LiveAvatarError) as error:
        checkpoint.restore(copy, "dit")
    said = str(error.value)
    assert "blocks.001.0/manifest.ocdbt" in said and "blocks.002.0/_METADATA" in said


def test_config_of_other_sizes_is_refused(copy):
    values = json.loads((copy / "config.json").read_text())
    values["dit"]["ffn_dim"] = 64
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(LiveAvatarError, match=r"has other shapes than config\.json"):
        checkpoint.restore(copy, "dit")


def test_a_taken_or_unwritable_folder_is_refused(saved, tmp_path):
    with pytest.raises(LiveAvatarError, match="is there already"):
        checkpoint.save(saved, CFG, {})
    (tmp_path / "file").touch()
    with pytest.raises(LiveAvatarError, match="cannot write"):
        checkpoint.save(tmp_path / "file" / "out", CFG, {})


def test_full_disk_leaves_no_item_and_says_so(tmp_path, monkeypatch):
    def save(folder, arrays):
        folder.with_name(folder.name + ".orbax-checkpoint-tmp").mkdir(parents=True)
        raise ValueError("RESOURCE_EXHAUSTED") from OSError(errno.ENOSPC, "No space left")

    monkeypatch.setattr(checkpoint._checkpointer(), "save", save)
    with pytest.raises(LiveAvatarError, match=r"the disk is full, .*rest\.0 could not be"):
        checkpoint.write(tmp_path / "dit" / "rest.0", {})
    assert not list((tmp_path / "dit").iterdir())


def test_other_failures_of_writing_are_not_hidden(tmp_path, monkeypatch):
    def save(folder, arrays):
        raise ValueError("something else")

    monkeypatch.setattr(checkpoint._checkpointer(), "save", save)
    with pytest.raises(ValueError, match="something else"):
        checkpoint.write(tmp_path / "rest.0", {})


def test_networks_of_the_published_size_need_no_memory():
    for which in checkpoint.NETWORKS:
        module = checkpoint.abstract(ModelConfig(), which)
        assert isinstance(module, nnx.Module)
        items, shapes = checkpoint.plan(module, which), leaves(module)
        sizes = {k: sum(r.nbytes(shapes[r.leaf]) for r in v) for k, v in items.items()}
        assert max(sizes.values()) <= checkpoint.PIECE, max(sizes, key=lambda k: sizes[k])
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values())
        assert sum(sizes.values()) == total
