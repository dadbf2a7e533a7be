"""The VAE of the puppet preset: 8x8 pixels and 4 frames a latent, 24 channels.

uv run --extra train python -m train.autoencoder configs/puppet_vae.py --out runs/puppet/vae
"""

from liveavatar_jax.config import VAEConfig
from train.experiment import Autoencoder


def config() -> Autoencoder:
    vae = VAEConfig(
        dim=160, z_dim=24, cells=(2, 4), latent_mean=(0.0,) * 24, latent_std=(1.0,) * 24
    )
    return Autoencoder(
        vae,
        rate=2e-3,
        focus=(6.0, 4.0),
        square=2.0,
        motion=0.7,
        average=0.999,
        steps=5_000,
        judge_every=500,
        save_every=1000,
    )
