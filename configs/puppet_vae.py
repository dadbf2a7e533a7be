"""The VAE of the puppet preset: 8x8 pixels and 4 frames a latent, 16 channels.

uv run --extra train python -m train.autoencoder configs/puppet_vae.py --out runs/puppet/vae
"""

from liveavatar_jax.config import VAEConfig
from train.experiment import Autoencoder


def config() -> Autoencoder:
    vae = VAEConfig(
        dim=48, dim_mult=(1, 2, 2), res_blocks=1, time_down=(True, True), space_down=(True, False),
        time_taps=(1, 1, 1), patch=4, shortcut=True, latent_mean=(0.0,) * 16,
        latent_std=(1.0,) * 16,
    )  # fmt: skip
    return Autoencoder(vae, rate=6e-4, steps=9000)
