"""The decoder of the puppet preset learns on, from latents with a diffusion model's noise.

uv run --extra train python -m train.autoencoder configs/puppet_decoder.py --out runs/puppet/decoder

Two shared cores of an AMD EPYC, beside another run: 330 ms a step, 28 minutes. The decoder that it
began with stood still within latents and jumped between them: the picture changed 0.37 of truth's
change within a latent and 2.3 from one to the next. With half of an even motion as `move` it was
0.71 and 1.7; after these steps 0.59 and 1.5, with 26.9 dB in all and 24.5 of mouths that move at
random (and 0.3 and 0.2 dB more than before where latents have noise of 0.08). What is shipped is
three quarters these weights and one quarter those that they began with: 26.95 and 24.6 dB.
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
