"""The decoder of the puppet preset learns on, from latents with a diffusion model's noise.

uv run --extra train python -m train.autoencoder configs/puppet_decoder.py --out runs/puppet/decoder
"""

from liveavatar_jax.weights.checkpoint import load_config
from train.experiment import Autoencoder
from train.preset import MODEL

STEPS = 5000


def config() -> Autoencoder:
    return Autoencoder(
        load_config(MODEL).vae,
        start=str(MODEL),
        noise=0.15,
        frames=13,
        rate=1e-3,
        linear=0.2,
        focus=(5.0, 4.0),
        motion=2.0,
        average=0.999,
        steps=STEPS,
        judge_every=500,
        save_every=500,
    )
