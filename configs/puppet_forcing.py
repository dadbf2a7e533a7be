"""Stage 1 of the puppet preset: the teacher becomes causal.

uv run --extra train --extra puppet python -m train.preset --until "pack forcing"

Two shared cores of an AMD EPYC: 560 ms a step with nothing else, 37 minutes. The shipped weights
came to it by another way, about as long: 3,300 steps without `together` and with levels shifted by
4 (and before them 1,500 of a teacher that heard nothing), 1,000 as here, and 2,000 from the
average of these. Expected of what streams with four steps: mouth 0.745 with the truth, worst tenth
0.52, amplitude 0.72, sharpness 0.77, dynamic degree 0.70 of truth's; flow error about 0.3.
"""

import optax

from liveavatar_jax.data.clips import DataConfig, Source
from liveavatar_jax.diffusion.losses import DiffusionForcing
from liveavatar_jax.weights.checkpoint import load_config
from train.experiment import Forcing
from train.preset import MODEL, OUT, SHARDS, adam, focus

STEPS = 4000


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
