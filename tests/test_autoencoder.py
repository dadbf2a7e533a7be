"""The VAE's own stage: what it begins with, that it learns, and that it goes on where it was."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.config import DiTConfig, ModelConfig, VAEConfig
from liveavatar_jax.models.cells import MOTION, into_cells
from liveavatar_jax.paths import leaves
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import packed
from train import autoencoder
from train.experiment import Autoencoder

VAE = VAEConfig(
    dim=16, dim_mult=(1, 1, 1, 1), time_down=(True, False, False), cells=2, z_dim=16, grid=(2, 2),
    latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16,
)  # fmt: skip
EXP = Autoencoder(VAE, size=16, batch=3, frames=4, steps=4, save_every=2, judge_every=4, warm=1)
CONFIG = """
import dataclasses
from train.experiment import Autoencoder
from liveavatar_jax.config import DiTConfig, ModelConfig, VAEConfig
def config():
    return {exp!r}
"""


@pytest.fixture(autouse=True)
def simple(monkeypatch):
    """Clips that cost nothing: smooth, in motion, and with more than a code can hold."""

    def drawn(key, batch, frames, size):
        noise = jax.random.normal(key, (batch, frames + 1, size // 2, size // 2, 3))
        video = jnp.concatenate([2 * noise[:, :1], noise[:, 1:] + 2 * noise[:, :1]], axis=1)
        video = jnp.tanh(jax.image.resize(video, (batch, frames + 1, size, size, 3), "bilinear"))
        here = jnp.arange(size) < size // 2
        mask = jnp.broadcast_to(here.astype(jnp.float32), (batch, frames, size, size))
        return autoencoder.Clips(video[:, :1], video[:, 1:], mouth=mask, eyes=1 - mask)

    real = autoencoder.drawn
    monkeypatch.setattr(autoencoder, "drawn", drawn)
    monkeypatch.setattr(autoencoder, "PEOPLE", 64)
    monkeypatch.setattr(autoencoder, "CROWDS", 8)
    return real


def first():
    return autoencoder.fresh(EXP, jax.random.key(0))


def test_puppets_are_drawn_as_they_are_needed(simple):
    clips = jax.eval_shape(lambda key: simple(key, 3, 4, 16), jax.random.key(0))
    assert (clips.key.shape, clips.video.shape) == ((3, 1, 16, 16, 3), (3, 4, 16, 16, 3))
    assert clips.mouth.shape == clips.eyes.shape == (3, 4, 16, 16)


def test_it_begins_as_the_best_linear_code_of_each_place(monkeypatch):
    """No other linear code of as many numbers is closer to how frames, moved back, differ from
    keys, but for the sample; and it has unit deviation."""
    monkeypatch.setattr(autoencoder, "WHOLE", 0.0)
    vae, clips = first(), autoencoder.drawn(jax.random.key(5), 512, 2, 16)
    back = autoencoder.moved_back(VAE, clips)
    apart = into_cells(back - clips.key, 2, 8)
    code, _ = vae.latents(clips.video, vae.latents(clips.key, None)[1])
    key, _ = vae.latents(clips.key, None)
    made = vae.decoder.show.change((code - key)[..., MOTION:])
    power = [np.linalg.svd(apart[:, 0, i, j], compute_uv=False) ** 2
             for i in range(2) for j in range(2)]  # fmt: skip
    best = np.sum(np.array(power)[:, VAE.z_dim - MOTION :]) / apart.size
    error = float(jnp.mean((made - apart) ** 2))
    assert best < error < 1.6 * best
    np.testing.assert_allclose(code[..., MOTION:].std((0, 1, 2, 3)), 1.0, atol=0.15)


def test_it_learns(monkeypatch):
    """What no linear code can say: where a disc is, on discs that it has not seen, from latents
    with noise; and the latents stay what they are."""

    def discs(key, batch, frames, size):
        where = jax.random.uniform(key, (batch, 1, 1, 1, 2))
        at = (jnp.arange(size, dtype=jnp.float32) + 0.5) / size
        grid = jnp.stack(jnp.meshgrid(at, at, indexing="ij"), axis=-1)
        far = jnp.sqrt(jnp.sum((grid[None, None] - where) ** 2, axis=-1))
        video = jnp.repeat(jnp.tanh(20 * (0.25 - far))[..., None], frames, axis=1)
        video = jnp.repeat(video, 3, axis=-1)
        inside = (video[..., 0] > 0).astype(jnp.float32)
        return autoencoder.Clips(-jnp.ones_like(video[:, :1]), video, mouth=inside, eyes=inside)

    monkeypatch.setattr(autoencoder, "drawn", discs)
    exp = dataclasses.replace(EXP, steps=100, rate=4e-3, linear=0.5, warm=5, batch=8, noise=0.3)
    begun = first()
    state = jax.jit(functools.partial(autoencoder.start, exp))(begun)
    step = jax.jit(functools.partial(autoencoder.train_step, exp), donate_argnums=0)
    see = autoencoder.batches(exp)
    unseen = see(begun, jnp.asarray(10_000))
    error = jax.jit(lambda vae: autoencoder.loss(exp, vae, unseen, jax.random.key(9))[0])
    before = error(begun)
    for update in range(exp.steps):
        state, _ = step(state, see(begun, jnp.asarray(update)))
    after = state.learner.params
    assert error(after) < 0.8 * before
    old, new = leaves(begun), leaves(after)
    moved = {path for path in old if not np.array_equal(old[path], new[path])}
    assert "decoder.show.kernel" in moved
    assert all(path.startswith("decoder.") for path in moved)


def test_a_decoder_that_is_there_learns_on(tmp_path):
    begun = first()
    packed.pack(tmp_path, ModelConfig(dit=DiTConfig(), vae=VAE), {"vae": begun}, "float32")
    config, run = tmp_path / "small.py", tmp_path / "run"
    exp = dataclasses.replace(EXP, start=str(tmp_path), steps=2, rate=1e-9)
    config.write_text(CONFIG.format(exp=exp))
    assert autoencoder.main([str(config), "--out", str(run)]) == 0
    for path, leaf in leaves(autoencoder.latest(exp, run).average).items():
        np.testing.assert_allclose(leaf, leaves(begun)[path], atol=1e-6, err_msg=path)


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
    ({"frames": 5}, "frames = 5 must divide by 2"),
    ({"size": 20}, "size = 20 must divide by 8"),
    ({"size": 24}, r"size = 24 must make \(2, 2\), as vae.grid has it"),
    ({"batch": 0}, "batch = 0 must be at least 1"),
    ({"vae": VAEConfig()}, "vae = .* must have cells"),
])  # fmt: skip
def test_a_config_that_makes_no_sense_is_refused(wrong, words):
    with pytest.raises(LiveAvatarError, match=words):
        dataclasses.replace(EXP, **wrong)
