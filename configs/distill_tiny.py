"""Stage 2 on noise, in a minute on a laptop: to see that everything runs.

    uv run --extra train python -m train.distill configs/distill_tiny.py --out runs/distill

Expected: 20 steps, of which every fifth also moves the student; the critic's loss falls.
"""

from liveavatar_jax.config import ModelConfig
from liveavatar_jax.data.clips import DataConfig
from liveavatar_jax.data.records import Shapes
from train.experiment import Adapters, Distill, adam


def config() -> Distill:
    model = ModelConfig.tiny()
    dit = model.dit
    return Distill(
        model=model,
        adapters=Adapters(rank=8, alpha=8.0),
        optimiser=adam(1e-3),
        critic_optimiser=adam(2e-4),
        synthetic=Shapes(f=12, m=19, h=8, w=8, c=dit.latent_channels, layers=dit.audio_layers,
                         audio_dim=dit.audio_dim, text_dim=dit.text_dim, dtype="float32"),
        data=DataConfig(batch=2, text_len=dit.text_len),
        steps=20,
        save_every=10,
    )  # fmt: skip
