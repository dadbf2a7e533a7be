"""The puppet preset: what its parts are, and that they fit each other."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax import cli, player
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.data import puppet
from liveavatar_jax.data.audio import load_audio
from liveavatar_jax.metrics import sync
from liveavatar_jax.metrics.readers import READERS, Readers
from liveavatar_jax.models.audio import PAST
from liveavatar_jax.models.cells import MOTION
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.protocol import frames_of
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import checkpoint, packed
from train import preset
from train.clips import at_rest
from train.experiment import Autoencoder, Distill, Forcing
from train.run import load

CONFIGS = Path(__file__).parents[1] / "configs"
VAE = load(CONFIGS / "puppet_vae.py", (Autoencoder,))


def model() -> ModelConfig:
    return preset.networks(VAE.vae, VAE.size)


def test_it_ships_in_thirty_megabytes():
    count = lambda which: sum(x.size for x in jax.tree.leaves(checkpoint.abstract(model(), which)))
    weights = sum(map(count, ("dit", "vae")))
    new = ("dit", "vae")
    there = sum(file.stat().st_size for file in preset.SHIPPED.iterdir() if file.stem not in new)
    assert 2 * weights + there < 30e6
    assert sum(file.stat().st_size for file in preset.SHIPPED.iterdir()) < 30e6


def test_what_is_shipped_speaks(tmp_path, capsys):
    """The main job: the mouth of the video follows the loudness of the recording, and is where it
    was when nobody is at it; not with another sound."""
    out = tmp_path / "avatar.mp4"
    assert cli.main(["generate", "--out", str(out), "--scale", "1"]) == 0
    assert "220 frames (8.80 s of video)" in capsys.readouterr().out
    frames = np.stack(list(frames_of(out)))
    opening = Readers(preset.SHIPPED / READERS)(frames)["mouth"][:, 0]
    level = sync.envelope(load_audio(preset.SHIPPED / packed.SPEECH))[: len(frames)]
    assert sync.correlation(opening, level) > 0.4
    assert abs(sync.correlation(opening, level[::-1])) < 0.25


def test_it_hears_no_further_than_120_ms_and_has_the_frames_of_the_big_one():
    cfg = model()
    assert cfg.mel is not None and cfg.mel.future <= 0.120 * 16_000
    assert cfg.mel.made == (cfg.dit.audio_layers, cfg.dit.audio_dim)
    assert (cfg.vae.pixels_per_latent, cfg.vae.frames_per_latent) == (8, 4)
    assert (cfg.stream.block_frames, cfg.stream.ring_blocks, cfg.stream.steps) == (3, 4, 4)
    dit = checkpoint.abstract(cfg, "dit")
    frames = jax.ShapeDtypeStruct((1, 1, PAST + 12, *cfg.mel.made), np.float32)
    tokens = jax.eval_shape(lambda dit, x: dit.audio(x), dit, frames)
    assert tokens.global_.shape[2] == 3


def test_its_stages_follow_each_other(tmp_path, monkeypatch):
    """With the model's folder there, the three configs load and train one network."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LiveAvatarError):
        load(CONFIGS / "puppet_teacher.py", (Forcing,))
    packed.pack(preset.MODEL, model(), {})
    shutil.copy(packed.file_of(preset.SHIPPED, "vae"), preset.MODEL)  # its code weighs latents
    kinds = {"teacher": Forcing, "forcing": Forcing, "distill": Distill}
    stages = {name: load(CONFIGS / f"puppet_{name}.py", (kind,)) for name, kind in kinds.items()}
    assert all(stage.model == model() for stage in stages.values())
    assert not stages["teacher"].objective.causal and stages["forcing"].objective.causal
    assert stages["forcing"].start == stages["distill"].weights
    focus = np.array(stages["teacher"].objective.focus)
    assert focus.shape == (*VAE.vae.grid, VAE.vae.z_dim)


def test_a_vae_that_is_not_done_is_not_built_upon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preset, "load", lambda *_: VAE)
    (preset.OUT / "vae").mkdir(parents=True)  # a run of its own, which goes before what is shipped
    monkeypatch.setattr(preset.export, "weights", lambda *_: (250, {}))
    with pytest.raises(LiveAvatarError, match=rf"is at step 250 of {VAE.steps}; let it finish"):
        preset.make_model()


def test_slopes_are_what_a_pixel_of_motion_changes():
    """Of all pixels of a latent where outlines are; little in the corner of a wall."""
    found = preset.slopes(model())
    assert found.shape == (8, 8, MOTION)
    assert found[4, 4, 0] > 20 * found[0, 0, 0]
    who = puppet.identity(
        np.random.default_rng(0).random((preset.PORTRAITS, puppet.IDENTITY_NOISE), np.float32)
    )
    rest = jax.tree.map(lambda x: np.repeat(x, preset.PORTRAITS, axis=0), at_rest())
    picture = puppet.draw(who, rest, 64)[:, 0]
    change = (np.roll(picture, -1, axis=2) - np.roll(picture, 1, axis=2)) / 2
    want = 4 * (change[:, 32:40, 24:32] ** 2).sum((1, 2, 3)).mean()
    np.testing.assert_allclose(found[4, 3, 0], want, rtol=1e-4)
    np.testing.assert_allclose(found[..., 2:], 1.25 * found[..., :2], rtol=1e-5)


def test_what_hears_learns_slowly():
    """Its inputs are many and far from centred; all else goes at the full rate."""
    rate, optimiser = 1e-2, preset.adam(1e-2)
    params = checkpoint.abstract(model(), "dit")
    params = replace(params, {path: jnp.ones(x.shape) for path, x in leaves(params).items()})
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the count
        steps, _ = jax.jit(lambda p: optimiser.update(p, optimiser.init(p)))(params)
    moved = {path: float(np.max(np.abs(x))) for path, x in leaves(steps).items()}
    slow = {path for path, most in moved.items() if most < rate / 2}
    assert slow == {f"audio.conv1_{part}.{leaf}" for part in ("local", "global")
                    for leaf in ("kernel", "bias")}  # fmt: skip
    np.testing.assert_allclose(moved["audio.conv1_local.kernel"], 0.05 * rate, rtol=1e-3)
    np.testing.assert_allclose(moved["audio.conv2.kernel"], rate, rtol=1e-3)


def test_it_begins_with_where_faces_move(tmp_path, monkeypatch):
    """As the clips say, against their portraits; and it shows the portrait, standing still."""
    monkeypatch.chdir(tmp_path)
    cfg = model()
    packed.pack(preset.MODEL, cfg, {})
    for name in ("vae.safetensors", "text.safetensors", "spiece.model"):
        shutil.copy(preset.SHIPPED / name, preset.MODEL)
    rng = np.random.default_rng(0)
    moves = np.linspace(0.0, 2.0, 8, dtype=np.float32)[:, None, None]  # from above to below

    class Clips:
        def __init__(self, *_):
            pass

        def __len__(self):
            return 40

        def __getitem__(self, i):
            still = rng.standard_normal((1, 8, 8, 24)).astype(np.float16)
            apart = moves * rng.standard_normal((21, 8, 8, 24)).astype(np.float32)
            return SimpleNamespace(latents=(still + apart).astype(np.float16), references=still)

    monkeypatch.setattr(preset, "Shards", Clips)
    preset.make_start()
    dit = player.load(preset.START, "dit", "float32")
    spread = np.asarray(dit.spread[...])
    np.testing.assert_allclose(spread.mean((1, 2)), np.minimum(moves[:, 0, 0], 1.0), atol=0.02)
    assert not np.any(dit.head.out.kernel[...])


def test_latents_count_by_the_pixels_they_change(monkeypatch):
    """Of the shipped coder: rows, columns and channels; codes of eyes and mouths more."""
    monkeypatch.setattr(preset, "MODEL", preset.SHIPPED)
    weight = np.array(preset.focus())
    vae = player.load(preset.SHIPPED, "vae", "float32")
    assert weight.shape == (*vae.cfg.grid, vae.cfg.z_dim)
    np.testing.assert_allclose(weight.mean(), 1.0, rtol=1e-5)
    code = np.sum(np.asarray(vae.decoder.show.kernel[...]) ** 2, axis=-1)
    changes = np.concatenate([preset.slopes(checkpoint.load_config(preset.SHIPPED)), code], -1)
    changes *= np.square(vae.cfg.latent_std)
    least = preset.FLOOR * changes.mean()
    assert (changes[:2] < least).any() and (changes[:2] > least).any()
    ratio = weight / np.maximum(changes, least)
    plain = np.concatenate([ratio[:2].ravel(), ratio[..., :MOTION].ravel()])
    np.testing.assert_allclose(plain, ratio[0, 0, 0], rtol=1e-4)
    np.testing.assert_allclose(ratio[2:4, 1:7, MOTION:], 4 * ratio[0, 0, 0], rtol=1e-4)
    by_place = weight[..., MOTION:].sum(-1)
    assert by_place[5, 3] > 20 * by_place[0, 3] and by_place[4, 2] > 2 * by_place[0, 3]
