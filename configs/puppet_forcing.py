"""Stage 1 of the puppet preset: the teacher becomes causal.

uv run --extra train --extra puppet python -m train.preset --until "pack forcing"

Two shared cores of an AMD EPYC: 560 ms a step with nothing else, 21 minutes (33 beside other
training). Flow error about 0.16. What is shipped came in two runs, as the teacher did: 1,500 steps
and 700.
"""

import optax

from liveavatar_jax.data.clips import DataConfig, Source
from liveavatar_jax.diffusion.losses import DiffusionForcing
from liveavatar_jax.weights.checkpoint import load_config
from train.experiment import Forcing
from train.preset import MODEL, OUT, SHARDS, adam, focus

STEPS = 2200


def config() -> Forcing:
    rate = optax.warmup_cosine_decay_schedule(0.0, 1.2e-3, 30, STEPS, 2e-5)
    return Forcing(
        model=load_config(MODEL),
        start=str(OUT / "teacher_model"),
        adapters=None,
        objective=DiffusionForcing(shift=2.0, bell=False, focus=focus(), clean=True, together=0.5),
        optimiser=adam(rate),
        motion="still",
        scaffold=False,
        positions=3000,
        clip=1.0,
        average=0.995,
        average_from=50,
        data=DataConfig((Source((str(SHARDS),)),), batch=4, text_len=32, reference="first",
                        drop_text=0.1),
        steps=STEPS,
        save_every=250,
        keep=2,
    )  # fmt: skip
