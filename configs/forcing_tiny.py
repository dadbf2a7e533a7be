"""Stage 1 on noise, in seconds on a laptop: to see that everything runs.

    uv run --extra train python -m train.forcing configs/forcing_tiny.py --out runs/forcing

Expected: 20 steps, the loss falls a little; noise has nothing to teach.
"""

from liveavatar_jax.config import ModelConfig
from liveavatar_jax.data.clips import DataConfig
from liveavatar_jax.data.records import Shapes
from train.experiment import Adapters, Forcing, adam


def config() -> Forcing:
    model = ModelConfig.tiny()
    dit = model.dit
    return Forcing(
        model=model,
        adapters=Adapters(rank=8, alpha=8.0),
        optimiser=adam(1e-3),
        synthetic=Shapes(f=12, m=19, h=8, w=8, c=dit.latent_channels, layers=dit.audio_layers,
                         audio_dim=dit.audio_dim, text_dim=dit.text_dim, dtype="float32"),
        data=DataConfig(batch=2, text_len=dit.text_len),
        steps=20,
        save_every=10,
    )  # fmt: skip
