"""The VAE of the puppet preset: 8x8 pixels and 4 frames a latent, 24 channels.

uv run --extra train python -m train.autoencoder configs/puppet_vae.py --out runs/puppet/vae

Two shared cores of an AMD EPYC: 120 ms a step, 17 minutes. Expected of pictures that it has not
seen: 27.0 dB in all, 24.8 of mouths that move at random, 21.6 of eyes. It begins at 26.0 and 24.2
with the linear code alone; with that code at 1/20 of the rate it got to 26.8 in 5,000 steps. A code
that all places share got to 27.3 dB in 13,000 steps, but lost the motion of mouths (opening after a
round trip 0.79 instead of 0.92).
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
        linear=0.2,
        focus=(6.0, 4.0),
        square=2.0,
        motion=0.7,
        average=0.999,
        steps=9_000,
        judge_every=1000,
        save_every=1000,
    )
