"""Runs that begin with weights: a converted base, samples by its decoder, a trained student."""

import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

import train.run
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.models.vae import VAE
from liveavatar_jax.weights import checkpoint
from train import checkpoints, distill, forcing
from train.export import export

from .networks import random

CONFIG = """
import dataclasses
from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig, VAEConfig
from liveavatar_jax.data.clips import DataConfig
from liveavatar_jax.data.records import Shapes
from train.experiment import Adapters, {kind}, adam

SEVERAL_DEVICES = True  # for conftest

def config():
    rate, sizes = adam(1e-2), dict(layers=2, audio_dim=32, text_dim=48)
    dit = DiTConfig.tiny(dim=32, ffn_dim=32, heads=2, layers=2, inject_layers=(1,), audio_layers=2)
    stream = StreamConfig(steps=2, block_frames=2, ring_blocks=2, sink_after=None, dtype="float32")
    model = ModelConfig.tiny(dit=dit, stream=stream)
    shapes = Shapes(f=4, m=19, h=4, w=4, c=16, dtype="float32", **sizes)
    return {kind}(
        model=model, weights={weights!r}, adapters=Adapters(rank=2, alpha=4.0), optimiser=rate,
        synthetic=shapes, data=DataConfig(batch=1, text_len=16), steps=2, save_every=1,
        average_from=0,
    )
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A converted checkpoint of a tiny model: what adapters adapt, and a decoder."""
    folder = tmp_path_factory.mktemp("weights") / "avatar"
    names: dict = {}
    exec(CONFIG.format(kind="Forcing", weights=None), names)
    cfg: ModelConfig = names["config"]().model
    dit = random(lambda: CausalDiT(cfg.dit, rngs=nnx.Rngs(0)))
    vae = random(lambda: VAE(cfg.vae, rngs=nnx.Rngs(0)))
    checkpoint.save(folder, cfg, {"dit": dit, "vae": vae})
    return folder


@pytest.fixture
def run(tmp_path, weights, monkeypatch, capsys):
    """Runs a stage in this process; returns the exit code and what it said."""
    monkeypatch.setattr(train.run, "prepare", lambda args: None)

    def run(stage, out: str, *flags: str) -> tuple[int, str]:
        kind = {forcing: "Forcing", distill: "Distill"}[stage]
        config = tmp_path / f"{kind}.py"
        config.write_text(CONFIG.format(kind=kind, weights=str(weights)))
        code = stage.main([str(config), "--out", str(tmp_path / out), *flags])
        return code, capsys.readouterr().err

    return run


@pytest.mark.slow
def test_a_student_goes_from_stage_to_stage(run, tmp_path):
    """Stage 1 on a converted base, its samples, the published form of its adapters, and stage 2,
    which begins with them."""
    code, _ = run(forcing, "one", "--set", "sample_every=2")
    assert code == 0
    with av.open(next((tmp_path / "one" / "samples").glob("*.mp4"))) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 16 and frames[0].shape == (32, 32, 3)
    assert np.std(np.stack(frames)) > 1

    lora = tmp_path / "lora.safetensors"
    export(tmp_path / "one", lora, part="average")
    negative = tmp_path / "negative.safetensors"
    save_file({"text": np.ones((3, 48), np.float32)}, negative)
    begins = ["--set", f"start={lora}", f"negative={negative}", "steps=1", "data.text_len=8"]
    code, _ = run(distill, "two", *begins, "schedule.ratio=2", "schedule.alone=true")
    assert code == 0
    first = checkpoints.read(tmp_path / "one", 2, ["average.blocks.ffn_in.kernel.b"])
    then = checkpoints.read(tmp_path / "two", 1, ["student.params.blocks.ffn_in.kernel.b"])
    moved = np.abs(first.popitem()[1] - then.popitem()[1])
    assert 0 < moved.max() < 0.05  # by one step of 0.01 for each number
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert "student/dmd_gradient" in json.loads(lines[0])


@pytest.mark.slow
def test_samples_on_a_mesh_are_those_of_one_device(run, tmp_path):
    """The decoder lies on one device, whatever the rest does."""
    seen = []
    for mesh in ("data=1", "data=2"):
        changes = ["--set", "sample_every=1", "steps=1", "data.batch=2", "--mesh", mesh]
        assert run(forcing, mesh, *changes)[0] == 0
        with av.open(next((tmp_path / mesh / "samples").glob("*.mp4"))) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
        seen.append(np.stack(frames).astype(np.float32))
    assert np.abs(seen[0] - seen[1]).mean() < 1


@pytest.mark.parametrize("changes, words", [
    (["model.dit.ffn_dim=48"], "model.dit.ffn_dim is 48, and .* has 32; take the model of the"),
    (["adapters.rank=3", "start={lora}"], "is another LoRA than the experiment's"),
    (["negative={lora}"], 'has no tensor "text"'),
    (["weights=null", "sample_every=1"], "sample_every needs the decoder"),
    (["model.dit.fnn_dim=48"], "has no field 'fnn_dim', did you mean 'ffn_dim'"),
    (["synthetic.f=5"], "clips of 5 latent frames do not make 2 whole blocks of 2"),
    (["blocks=3"], "do not make 3 whole blocks"),
    (["window=3"], "window = 3 must be at most the 2 blocks"),
    (["positions=5"], "set policy.positions"),
    (["vary=true"], "must be given with vary"),
    (["clip=-1.0"], "clip = -1.0 must be None or above 0"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(run, tmp_path, changes, words):
    lora = tmp_path / "lora.safetensors"
    name = "blocks.{}.ffn.0.lora_{}.default.weight"
    shapes = {"A": (2, 32), "B": (32, 2)}
    factors = {
        name.format(i, f): np.zeros(s, np.float32) for i in range(2) for f, s in shapes.items()
    }
    save_file(factors, lora)
    code, said = run(distill, "bad", "--set", *(c.format(lora=lora) for c in changes))
    assert code == 2 and len(said.strip().splitlines()) == 1, said
    assert re.search(words, said), said
