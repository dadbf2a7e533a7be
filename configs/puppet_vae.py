"""The VAE of the puppet preset: 8x8 pixels and 4 frames a latent, 24 channels, four of which tell
motion.

uv run --extra train python -m train.autoencoder configs/puppet_vae.py --out runs/puppet/vae

Two shared cores of an AMD EPYC: 75 s for the linear code, then 0.45 s a step. Of clips that it has
not seen and whose mouths move at random, the linear code alone has 26.5 dB in all, 23.7 of mouths
and 20.1 of eyes. What is shipped came in other runs: 800 steps with noise of 0.12, evenly drawn and
on motion as well (26.8, 23.9 and 20.6), 1,000 more (27.1 dB in all of the held-out clips, 25.9 of
mouths), then 1,200 with `noise` 0.5 as it is now (0.2 dB less, but eyes and mouths of generated
latents are cleaner); it is the mean of both networks (27.0, 25.8).
"""

from liveavatar_jax.config import VAEConfig
from train.experiment import Autoencoder


def config() -> Autoencoder:
    motion = (0.9, 0.97, 0.088, 0.088)  # pixels along x and y, and pixels a frame
    vae = VAEConfig(
        dim=48, z_dim=24, cells=2, latent_mean=(0.0,) * 24, latent_std=(*motion, *(1.0,) * 20)
    )
    return Autoencoder(vae, rate=3e-3, noise=0.3, square=8.0, edges=0.35, motion=0.3,
                       focus=(6.0, 6.0), linear=0.05, average=0.99, steps=2500)  # fmt: skip
