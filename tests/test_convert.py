"""Published folders become one checkpoint: the same numbers, a layer at a time, all or nothing."""

import json
import shutil
import tracemalloc
from collections import namedtuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from liveavatar_jax.config import DiTConfig, ModelConfig, SpeechConfig, TextConfig
from liveavatar_jax.models import lora
from liveavatar_jax.paths import leaves
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import checkpoint, wan
from liveavatar_jax.weights.convert import SPEECH_FOLDER, TEXT_FILE, VAE_FILE, convert
from liveavatar_jax.weights.rules import export

from .networks import same
from .torch_zip import save_state

CFG = ModelConfig(
    dit=DiTConfig.tiny(param_dtype="bfloat16"),
    vae=ModelConfig.tiny().vae,
    text=TextConfig.tiny(),
    speech=SpeechConfig.tiny(),
)
DIT_SHARDS = "diffusion_pytorch_model-0000{}-of-00002.safetensors"


def make(which):
    """Random weights of the shapes of a network, exact in bfloat16."""
    rng = np.random.default_rng(len(which))
    draw = lambda x: jnp.asarray(rng.normal(size=x.shape).astype(ml_dtypes.bfloat16), x.dtype)
    return jax.tree.map(draw, checkpoint.abstract(CFG, which))


@pytest.fixture(scope="module")
def networks():
    return {which: make(which) for which in checkpoint.NETWORKS}


@pytest.fixture(scope="module")
def factors(networks):
    """Multiples of 1/8, whose products sum up without rounding in any order."""
    fresh = lora.init(networks["dit"], wan.LORA_TARGETS, 4, key=jax.random.key(0))
    draw = lambda x: jax.random.randint(jax.random.key(x.size), x.shape, -8, 9) / 8
    return jax.tree.map(draw, fresh)


def save_shards(folder, tensors):
    names = sorted(tensors)
    halves = names[::2], names[1::2]
    for i, half in enumerate(halves, 1):
        save_file({name: tensors[name] for name in half}, folder / DIT_SHARDS.format(i))
    listed = {name: DIT_SHARDS.format(i) for i, half in enumerate(halves, 1) for name in half}
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))


@pytest.fixture(scope="module")
def pristine(networks, factors, tmp_path_factory):
    """The published layout, made of our own networks."""
    root = tmp_path_factory.mktemp("published")
    base = root / "Wan2.2-S2V-14B"
    (base / SPEECH_FOLDER).mkdir(parents=True)
    tensors = {k: export(net, checkpoint.NETWORKS[k].rules) for k, net in networks.items()}
    save_shards(base, tensors["dit"])
    (base / "config.json").write_text(json.dumps(published_config(CFG.dit)))
    save_state(base / VAE_FILE, tensors["vae"])
    save_state(base / TEXT_FILE, tensors["text"])
    save_file(tensors["speech"], base / SPEECH_FOLDER / "model.safetensors")
    (base / SPEECH_FOLDER / "config.json").write_text(json.dumps(published_speech(CFG.speech)))
    (base / "google" / "umt5-xxl").mkdir(parents=True)
    (base / "google" / "umt5-xxl" / "spiece.model").write_text("pieces")
    (root / "LiveAvatar").mkdir()
    save_file(export(factors, wan.LORA_RULES), root / "LiveAvatar" / "liveavatar.safetensors")
    return root


@pytest.fixture
def published(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "published")


def published_config(cfg):
    names = dict(dim="dim", ffn_dim="ffn_dim", heads="num_heads", layers="num_layers")
    names |= dict(freq_dim="freq_dim", text_dim="text_dim", text_len="text_len")
    names |= dict(audio_dim="audio_dim", inject_layers="audio_inject_layers")
    return {"model_type": "s2v"} | {theirs: getattr(cfg, ours) for ours, theirs in names.items()}


def published_speech(cfg):
    sizes = dict(hidden_size=cfg.dim, intermediate_size=cfg.ffn_dim, num_hidden_layers=cfg.layers)
    sizes |= dict(num_attention_heads=cfg.heads, num_conv_pos_embeddings=cfg.pos_kernel)
    sizes |= dict(num_conv_pos_embedding_groups=cfg.pos_groups, feat_extract_norm="layer")
    sizes |= dict(conv_bias=True, do_stable_layer_norm=True)
    return sizes | {f: getattr(cfg, f) for f in ("conv_dim", "conv_kernel", "conv_stride")}


@pytest.fixture(scope="module")
def converted(pristine, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(pristine, pristine / "LiveAvatar", out, progress=False)
    return out


def test_config_is_read_from_the_published_files(converted):
    assert checkpoint.load_config(converted) == CFG


@pytest.mark.parametrize("which", ["vae", "text", "speech"])
def test_networks_come_back_as_published(converted, networks, which):
    same(checkpoint.restore(converted, which), networks[which])


def test_lora_is_merged_into_the_base(converted, networks, factors):
    same(checkpoint.restore(converted, "dit"), lora.merge(networks["dit"], factors, 0.5))


def test_tokenizer_comes_along(converted):
    assert (converted / "spiece.model").read_text() == "pieces"


@pytest.fixture
def written(monkeypatch):
    """Counts the items that are really written."""
    items = []
    write = checkpoint.write

    def counting(folder, arrays):
        items.append(f"{folder.parent.name}/{folder.name}")
        return write(folder, arrays)

    monkeypatch.setattr(checkpoint, "write", counting)
    return items


def test_an_interrupted_conversion_goes_on_at_the_item(
    published, converted, tmp_path, monkeypatch, written
):
    counting = checkpoint.write

    def interrupted(folder, arrays):
        if len(written) == 4:
            (folder.parent / (folder.name + ".orbax-checkpoint-tmp-1")).mkdir()
            raise KeyboardInterrupt
        counting(folder, arrays)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(published, published / "LiveAvatar", out, progress=False)
    assert not out.exists() and not (tmp_path / "out.partial" / "config.json").exists()
    first = list(written)
    convert(published, published / "LiveAvatar", out, progress=False)
    assert not (tmp_path / "out.partial").exists()
    assert len(set(written)) == len(written) > len(first) == 4
    for which in checkpoint.NETWORKS:
        same(checkpoint.restore(out, which), checkpoint.restore(converted, which))


def test_another_source_starts_anew(published, tmp_path):
    partial = checkpoint.begin(tmp_path / "out", {"files": {"a": 1}})
    (partial / "dit" / "rest.0").mkdir(parents=True)
    assert (checkpoint.begin(tmp_path / "out", {"files": {"a": 1}}) / "dit" / "rest.0").exists()
    checkpoint.begin(tmp_path / "out", {"files": {"a": 2}})
    assert not (partial / "dit").exists()


def test_converting_twice_writes_once(pristine, converted, written):
    assert convert(pristine, pristine / "LiveAvatar", converted, progress=False) == CFG
    assert not written
    with pytest.raises(LiveAvatarError, match="out is there already"):
        convert(pristine, None, converted, progress=False)


def test_alpha_is_the_given_or_the_files_or_half_the_rank(
    published, tmp_path, networks, factors, monkeypatch
):
    """With rank 4: scale 0.5 from nothing, 3 from alpha 12 in the file, 0.25 from a given 1."""
    first_layer = {}

    def write(folder, arrays):
        folder.mkdir(parents=True)
        if folder.name == "blocks.000.0":
            first_layer.update(arrays)

    monkeypatch.setattr(checkpoint, "write", write)
    note = published / "LiveAvatar" / "adapter_config.json"
    for i, (said, given, scale) in enumerate(
        [({}, None, 0.5), ({"lora_alpha": 12, "r": 4}, None, 3.0), ({"lora_alpha": 12}, 1.0, 0.25)]
    ):
        note.write_text(json.dumps(said))
        out = tmp_path / str(i)
        convert(published, published / "LiveAvatar", out, alpha=given, progress=False)
        merged = leaves(lora.merge(networks["dit"], factors, scale))
        for path in ("blocks.self_attn.q.kernel", "blocks.ffn_in.kernel"):
            np.testing.assert_array_equal(first_layer[path][0], merged[path][0])
    note.write_text('{"use_dora": true}')
    with pytest.raises(LiveAvatarError, match="use_dora is not supported"):
        convert(published, published / "LiveAvatar", tmp_path / "out", progress=False)


def edit(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_faults_of_all_files_are_listed_at_once_and_nothing_is_written(published, tmp_path):
    base = published / "Wan2.2-S2V-14B"
    shard = base / DIT_SHARDS.format(1)
    edit(shard, lambda t: t.update({"blocks.9.modulation": t.pop("blocks.0.modulation")}))
    shard.write_bytes(shard.read_bytes()[:-1])
    edit(
        base / SPEECH_FOLDER / "model.safetensors",
        lambda t: t.update({"wav2vec2.encoder.layer_norm.bias": np.zeros(7, np.float32)}),
    )
    edit(
        published / "LiveAvatar" / "liveavatar.safetensors",
        lambda t: t.update({"blocks.0.ffn.1.lora_A.default.weight": np.zeros((4, 4))}),
    )
    with pytest.raises(LiveAvatarError) as error:
        convert(published, published / "LiveAvatar", tmp_path / "out", progress=False)
    said = str(error.value)
    assert "absent: blocks.0.modulation is not in" in said
    assert "missing: blocks.0.modulation" in said and "unknown: blocks.9.modulation" in said
    assert "truncated: " in said and shard.name in said
    assert "wav2vec2.encoder.layer_norm.bias has shape (7,), not (32,)" in said
    assert "unknown: blocks.0.ffn.1.lora_A.default.weight (nearest name" in said
    assert not list(tmp_path.glob("out*"))


def test_a_lora_that_matches_nothing_is_refused(published, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"unet.down.lora_A.weight": np.zeros((4, 4), np.float32)}, path)
    with pytest.raises(LiveAvatarError, match=r"other\.safetensors adapts no layer of CausalDiT"):
        convert(published, path, tmp_path / "out", progress=False)


def test_too_small_a_disk_is_noticed_before_writing(published, tmp_path, monkeypatch, written):
    usage = namedtuple("usage", "total used free")(10**6, 0, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(LiveAvatarError, match=r"needs .* GiB more, but its disk has 0\.0 GiB free"):
        convert(published, None, tmp_path / "out", progress=False)
    assert not written


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (VAE_FILE, rf"{VAE_FILE} is missing"),
        (DIT_SHARDS.format(1), r"lists .*-00001-of-00002\.safetensors, which is missing"),
        ("config.json", r"config\.json is missing"),
        (f"{SPEECH_FOLDER}/model.safetensors", r"holds no \.safetensors"),
    ],
)
def test_a_missing_file_is_named(published, tmp_path, lost, said):
    (published / "Wan2.2-S2V-14B" / lost).unlink()
    with pytest.raises(LiveAvatarError, match=said):
        convert(published, None, tmp_path / "out", progress=False)


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(LiveAvatarError, match=r"holds neither Wan2\.1_VAE\.pth nor"):
        convert(tmp_path, None, tmp_path / "out", progress=False)


def test_a_network_of_another_kind_is_refused(published, tmp_path):
    config = published / "Wan2.2-S2V-14B" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"enable_framepack": False}))
    with pytest.raises(LiveAvatarError, match="enable_framepack = False, but only True"):
        convert(published, None, tmp_path / "out", progress=False)
    del values["num_heads"]
    config.write_text(json.dumps(values))
    with pytest.raises(LiveAvatarError, match=r"config\.json lacks num_heads"):
        convert(published, None, tmp_path / "out", progress=False)


def test_conversion_holds_one_item_at_a_time(published, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "PIECE", 2**17)
    peaks = []

    def write(folder, arrays):
        folder.mkdir(parents=True)
        if tracemalloc.is_tracing():
            peaks.append(tracemalloc.get_traced_memory()[1])
        else:
            tracemalloc.start()

    monkeypatch.setattr(checkpoint, "write", write)
    convert(published, published / "LiveAvatar", tmp_path / "out", progress=False)
    tracemalloc.stop()
    leaf_sizes = [
        leaf.size * leaf.dtype.itemsize
        for which in checkpoint.NETWORKS
        for leaf in leaves(checkpoint.abstract(CFG, which)).values()
    ]
    bound = max(leaf_sizes) + 4 * checkpoint.PIECE
    assert len(peaks) > 30 and sum(leaf_sizes) > 5 * bound
    assert max(peaks) < bound


def test_a_speech_encoder_that_does_not_fit_is_announced(published, tmp_path, capsys):
    config = published / "Wan2.2-S2V-14B" / SPEECH_FOLDER / "config.json"
    values = json.loads(config.read_text()) | {"num_hidden_layers": 23}
    config.write_text(json.dumps(values))
    drop = lambda t: [t.pop(name) for name in list(t) if ".layers.23." in name]
    edit(published / "Wan2.2-S2V-14B" / SPEECH_FOLDER / "model.safetensors", drop)
    convert(published, None, tmp_path / "out", progress=False)
    assert "will be driven by log-mel features instead" in capsys.readouterr().err
