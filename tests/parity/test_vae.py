import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax.config import LATENT_MEAN, LATENT_STD, VAEConfig
from liveavatar_jax.models.vae import VAE, denormalise
from liveavatar_jax.weights.rules import export, load
from liveavatar_jax.weights.vae import VAE_RULES, vae_config

encode = jax.jit(lambda vae, video, cache: vae.encode(video, cache))
decode = jax.jit(lambda vae, latents, cache: vae.decode(latents, cache))
CODERS = ("encoder", "decoder")


@pytest.fixture(scope="module")
def golden(fixture):
    return fixture("vae")


@pytest.fixture(scope="module")
def published(golden):
    return {name[2:]: w for name, w in golden.tensors.items() if name.startswith("w.")}


@pytest.fixture(scope="module")
def vae(published):
    cfg = vae_config(published)
    return load(abstract(cfg), published, VAE_RULES, where="vae.safetensors")


def abstract(cfg):
    return jax.eval_shape(lambda: VAE(cfg, rngs=nnx.Rngs(0)))


def ours(published):
    return jnp.asarray(published.transpose(0, 2, 3, 4, 1))


def theirs(x):
    return np.asarray(x).transpose(0, 4, 1, 2, 3)


@pytest.fixture
def check(golden):
    """Both of the sidecar's measures: relative to the peak, and value by value."""
    tolerance = golden.sidecar["suggested_tolerance"]
    peak = float(re.search(r"below (\d\S*)", tolerance["note"])[1])

    def check(name, x):
        golden.check(name, theirs(x), peak)
        bounds = {k: tolerance[k] for k in ("rtol", "atol")}
        np.testing.assert_allclose(theirs(x), golden[name], err_msg=name, **bounds)

    return check


def test_config_is_read_from_the_file(golden, published):
    c = golden.sidecar["config"]
    assert vae_config(published) == VAEConfig(
        dim=c["dim"],
        z_dim=c["z_dim"],
        dim_mult=tuple(c["dim_mult"]),
        res_blocks=c["num_res_blocks"],
        time_down=tuple(c["temporal_downsample_encoder"]),
    )


def test_statistics_are_the_published(golden):
    assert list(LATENT_MEAN) == golden.sidecar["latent_mean"]
    assert list(LATENT_STD) == golden.sidecar["latent_std"]


def test_encode(vae, golden, check):
    latents, _ = encode(vae, ours(golden["in.video"]), None)
    check("encode.mu_normalised", latents)
    check("encode.mu_raw", denormalise(latents, VAEConfig()))


def test_decode(vae, golden, check):
    video, _ = decode(vae, ours(golden["in.latent"]), None)
    check("decode.video", video)


def test_stream_encode(vae, golden, check):
    sizes = golden.sidecar["calls"]["stream_encode_frames_per_call"]
    assert sum(sizes) == golden["in.video"].shape[2]
    cache = None
    for call, frames in enumerate(pieces(ours(golden["in.video"]), sizes)):
        latents, cache = encode(vae, frames, cache)
        check(f"stream_encode.call{call}", latents)


def test_stream_decode(vae, golden, check):
    sizes = golden.sidecar["calls"]["stream_decode_latents_per_call"]
    assert sum(sizes) == golden["in.stream_latents"].shape[2]
    cache = None
    for call, latents in enumerate(pieces(ours(golden["in.stream_latents"]), sizes)):
        video, cache = decode(vae, latents, cache)
        check(f"stream_decode.call{call}", video)


def pieces(x, sizes):
    return jnp.split(x, np.cumsum(sizes)[:-1], axis=1)


@pytest.mark.parametrize("coder", CODERS)
def test_every_layer(vae, golden, check, coder):
    if coder == "encoder":
        steps = pieces(ours(golden["in.video"])[:, :5], [1, 4])
    else:
        latents = denormalise(ours(golden["in.latent"])[:, :3], VAEConfig())
        steps = pieces(vae.from_latents(latents), [1, 1, 1])
    checked, tails = set(), None
    for step, x in enumerate(steps):
        outputs, tails = trace(getattr(vae, coder), x, tails)
        for layer, y in outputs.items():
            name = f"trace.{coder}.{layer}.step{step}"
            if name in golden.tensors:
                check(name, y)
                checked.add(name)
    assert checked == {name for name in golden.tensors if name.startswith(f"trace.{coder}.")}


@jax.jit
def trace(coder, x, tails):
    """The output of every layer by its published name."""
    names = {"down": "downsamples", "up": "upsamples", "middle": "middle"}
    lists = {id(m): f"{names[k]}.{i}" for k in names for i, m in enumerate(getattr(coder, k, ()))}
    lists |= {id(coder.conv_in): "conv1", id(coder.head): "head"}
    outputs, kept = {}, []
    for layer, tail in zip(coder.layers, tails or [None] * len(coder.layers), strict=True):
        x, tail = layer(x, tail)
        outputs[lists[id(layer)]] = x
        kept.append(tail)
    return outputs, kept


def test_export_of_an_import_is_the_identity(vae, published):
    exported = export(vae, VAE_RULES)
    assert exported.keys() == published.keys()
    for name, tensor in published.items():
        np.testing.assert_array_equal(exported[name], tensor, err_msg=name)


def test_full_size_names_and_shapes(parity):
    manifest = json.loads((parity / "manifests" / "wan2.1_vae.json").read_text())
    tensors = {
        name: jax.ShapeDtypeStruct(tuple(tensor["shape"]), tensor["dtype"])
        for name, tensor in manifest["tensors"].items()
    }
    assert vae_config(tensors) == VAEConfig()
    net = load(abstract(VAEConfig()), tensors, VAE_RULES, where="Wan2.1_VAE.pth")
    assert sum(leaf.size for leaf in jax.tree.leaves(net)) == manifest["num_parameters"]
