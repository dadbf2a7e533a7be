"""The teacher of the puppet preset: it sees whole clips, both ways, at one noise level each.

uv run --extra train --extra puppet python -m train.preset --until "pack teacher"

Two shared cores of an AMD EPYC: 560 ms a step with nothing else, 26 minutes (46 beside other
training). Flow error about 0.19, of latents as they count 0.13. What is shipped came in two runs,
each with a cosine of its own: 2,000 steps in which eyes did not count more, 800 in which they did.
"""

import optax

from liveavatar_jax.data.clips import DataConfig, Source
from liveavatar_jax.diffusion.losses import FlowMatching
from liveavatar_jax.weights.checkpoint import load_config
from train.experiment import Forcing
from train.preset import MODEL, SHARDS, START, adam, focus

STEPS = 2800


def config() -> Forcing:
    rate = optax.warmup_cosine_decay_schedule(0.0, 1.6e-3, 50, STEPS, 3e-5)
    return Forcing(
        model=load_config(MODEL),
        start=str(START),
        adapters=None,
        objective=FlowMatching(shift=3.0, bell=False, focus=focus(), clean=True),
        optimiser=adam(rate),
        motion="still",
        scaffold=False,
        clip=1.0,
        average=0.995,
        average_from=50,
        data=DataConfig((Source((str(SHARDS),)),), batch=4, text_len=32, reference="first",
                        drop_text=0.1, drop_audio=0.05),
        steps=STEPS,
        save_every=250,
        keep=2,
    )  # fmt: skip
