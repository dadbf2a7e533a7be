"""The VAE's own stage: what it begins with, that it learns, and that it goes on where it was."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.config import DiTConfig, ModelConfig, VAEConfig
from liveavatar_jax.paths import leaves
from liveavatar_jax.player import load as load_network
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import packed
from train import autoencoder
from train.experiment import Autoencoder

VAE = VAEConfig(
    dim=16, dim_mult=(1, 1, 1, 1), time_down=(True, False, False), cells=(1, 2), z_dim=12,
    grid=(2, 2),
    latent_mean=(0.0,) * 12, latent_std=(1.0,) * 12,
)  # fmt: skip
EXP = Autoencoder(VAE, size=16, batch=3, frames=5, steps=4, save_every=2, judge_every=4, warm=1)
CONFIG = """
import dataclasses
from train.experiment import Autoencoder
from liveavatar_jax.config import VAEConfig
def config():
    return {exp!r}
"""


@pytest.fixture(autouse=True)
def simple(monkeypatch):
    """Clips that cost nothing: smooth, in motion, and with more than a code can hold."""

    def drawn(key, batch, frames, size):
        noise = jax.random.normal(key, (batch, frames + 1, size // 2, size // 2, 3))
        video = noise[:, 1:] + 2 * noise[:, :1]
        video = jnp.tanh(jax.image.resize(video, (batch, frames, size, size, 3), "bilinear"))
        here = jnp.arange(size) < size // 2
        mask = jnp.broadcast_to(here.astype(jnp.float32), (batch, frames, size, size))
        return autoencoder.Clips(video=video, mouth=mask, eyes=1 - mask)

    real = autoencoder.drawn
    monkeypatch.setattr(autoencoder, "drawn", drawn)
    return real


def test_puppets_are_drawn_as_they_are_needed(simple):
    clips = jax.eval_shape(lambda key: simple(key, 3, 5, 16), jax.random.key(0))
    assert clips.video.shape == (3, 5, 16, 16, 3)
    assert clips.mouth.shape == clips.eyes.shape == (3, 5, 16, 16)


def test_it_begins_as_the_best_linear_code_of_each_place(monkeypatch):
    """No other linear code of as many numbers is closer to these cells, but for the sample."""
    monkeypatch.setattr(autoencoder, "PEOPLE", 128)
    vae = jax.jit(functools.partial(autoencoder.fresh, EXP))(jax.random.key(0))
    video = autoencoder.drawn(jax.random.key(5), 512, 3, 16).video
    moments = autoencoder.whole(vae.moments, video)
    made, _ = vae.decode(moments[..., :12])
    cells = np.asarray(video[:, 1:]).reshape(512, 2, 2, 8, 2, 8, 3)
    cells = cells.transpose(2, 4, 0, 1, 3, 5, 6).reshape(4, 512, -1)
    apart = cells - cells.mean(axis=1, keepdims=True)
    power = np.linalg.svd(apart, compute_uv=False) ** 2
    best = power[:, 12:].sum() / cells.size
    error = float(jnp.mean((made[:, 1:] - video[:, 1:]) ** 2))
    assert best < error < 1.6 * best
    np.testing.assert_allclose(moments[..., 12:], -5.0, atol=1e-5)
    assert 0.5 < float(moments[..., :12].std()) < 1.5


def test_it_learns(monkeypatch):
    """What no linear code can say: where a disc is, on discs that it has not seen."""

    def discs(key, batch, frames, size):
        where = jax.random.uniform(key, (batch, 1, 1, 1, 2))
        at = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
        grid = jnp.stack(jnp.meshgrid(at, at, indexing="ij"), axis=-1)
        far = jnp.sqrt(jnp.sum((grid[None, None] - where) ** 2, axis=-1))
        video = jnp.repeat(jnp.tanh(20 * (0.25 - far))[..., None], frames, axis=1)
        video = jnp.repeat(video, 3, axis=-1)
        inside = (video[..., 0] > 0).astype(jnp.float32)
        return autoencoder.Clips(video=video, mouth=inside, eyes=inside)

    monkeypatch.setattr(autoencoder, "drawn", discs)
    exp = dataclasses.replace(EXP, steps=100, rate=4e-3, warm=5, batch=8)
    state = jax.jit(functools.partial(autoencoder.start, exp))()
    step = jax.jit(functools.partial(autoencoder.train_step, exp), donate_argnums=0)
    unseen = autoencoder.batch(exp, jnp.asarray(10_000))
    error = jax.jit(lambda vae: autoencoder.loss(exp, vae, unseen, jax.random.key(9))[0])
    draw = jax.jit(functools.partial(autoencoder.batch, exp))
    before = error(state.learner.params)
    for update in range(exp.steps):
        state, _ = step(state, draw(jnp.asarray(update)))
    assert error(state.learner.params) < 0.8 * before


def test_a_decoder_learns_on_alone(tmp_path):
    """From latents with noise, which it learns to take away; the latents stay what they are."""
    cfg = ModelConfig(dit=DiTConfig(), vae=VAE)
    first = jax.jit(functools.partial(autoencoder.fresh, EXP))(jax.random.key(0))
    packed.pack(tmp_path, cfg, {"vae": first}, "float32")
    exp = dataclasses.replace(EXP, start=str(tmp_path), noise=2.0, steps=100, rate=4e-3,
                              linear=0.5, warm=5, batch=8)  # fmt: skip
    begun = load_network(tmp_path, "vae", "float32")
    state = jax.jit(functools.partial(autoencoder.start, exp))(begun)
    step = jax.jit(functools.partial(autoencoder.train_step, exp), donate_argnums=0)
    unseen = autoencoder.batch(exp, jnp.asarray(10_000))
    draw = jax.jit(functools.partial(autoencoder.batch, exp))
    error = jax.jit(lambda vae, exp: autoencoder.loss(exp, vae, unseen, jax.random.key(9))[0],
                    static_argnums=1)  # fmt: skip
    before = error(begun, exp)
    assert before > 1.1 * error(begun, dataclasses.replace(exp, noise=0.0))
    for update in range(exp.steps):
        state, _ = step(state, draw(jnp.asarray(update)))
    after = state.learner.params
    assert error(after, exp) < 0.9 * before
    old, new = leaves(first), leaves(after)
    moved = {path for path in old if not np.array_equal(old[path], new[path])}
    assert moved and all(path.startswith(("decoder.", "from_latents.")) for path in moved)
    assert any(path.startswith("decoder.move") for path in moved)


class Twice:
    """A stop that is asked for in the second step."""

    code, calls = 0, 0

    def agreed(self) -> bool:
        self.calls += 1
        return self.calls == 2


def test_it_goes_on_where_it_was(tmp_path, monkeypatch):
    config = tmp_path / "small.py"
    config.write_text(CONFIG.format(exp=EXP))
    run = lambda name, *more: autoencoder.main([str(config), "--out", str(tmp_path / name), *more])
    assert run("whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(autoencoder, "stopping", lambda: contextlib.nullcontext(Twice()))
        assert run("parts") == 0
    assert not (tmp_path / "parts" / "samples").exists()
    assert run("parts") == 0
    whole, parts = (autoencoder.latest(EXP, tmp_path / name) for name in ("whole", "parts"))
    for path, leaf in leaves(whole.average).items():
        np.testing.assert_array_equal(leaf, leaves(parts.average)[path], path)
    assert (tmp_path / "whole" / "samples" / "0000004-sample.mp4").is_file()


@pytest.mark.parametrize("wrong, words", [
    ({"frames": 4}, r"frames = 4 must be 1 \+ 2 k"),
    ({"size": 20}, "size = 20 must divide by 8"),
    ({"size": 24}, r"size = 24 must make \(2, 2\), as vae.grid has it"),
    ({"batch": 0}, "batch = 0 must be at least 1"),
    ({"noise": 0.1}, "noise = 0.1 must be 0 without a start"),
    ({"vae": VAEConfig()}, "vae = .* must have cells"),
])  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(wrong, words):
    with pytest.raises(LiveAvatarError, match=words):
        dataclasses.replace(EXP, **wrong)
