"""Stage 2 of the puppet preset: self-forcing DMD to 4 steps.

uv run --extra train --extra puppet python -m train.preset --until preset

Two shared cores of an AMD EPYC: 1.8 s a step with nothing else, 9 minutes (13 beside other
training); every second one is the student's as well. Expected: mouth 0.76 with the truth,
worst tenth 0.60, amplitude 0.85, sharpness 0.87, dynamic degree 0.82 of truth's.
"""

import optax

from liveavatar_jax.data.clips import DataConfig, Source
from liveavatar_jax.diffusion.losses import DMD, Critic, Guidance, Levels
from liveavatar_jax.diffusion.rollout import Policy
from liveavatar_jax.weights.checkpoint import load_config
from train.experiment import Distill, Schedule
from train.preset import MODEL, OUT, SHARDS, focus

STEPS, RATIO = 300, 2


def config() -> Distill:
    adam = lambda rate, updates: optax.adam(
        optax.cosine_decay_schedule(rate, updates, 0.05), 0.0, 0.99
    )
    levels, weights = Levels(shift=2.0, low=0.2), focus()
    return Distill(
        model=load_config(MODEL),
        weights=str(OUT / "teacher_model"),
        start=str(OUT / "forcing_model"),
        adapters=None,
        objective=DMD(Guidance(1.0, 1.0), levels, weights),
        critic=Critic(levels, clean=True, focus=weights),
        optimiser=adam(1.5e-4, STEPS // RATIO),
        critic_optimiser=adam(4e-4, STEPS),
        schedule=Schedule(RATIO),
        policy=Policy(positions=3000, exits=(0.0, 0.0, 0.0, 1.0)),
        clip=1.0,
        average=0.99,
        average_from=20,
        data=DataConfig((Source((str(SHARDS),)),), batch=4, text_len=32, reference="first"),
        steps=STEPS,
        save_every=100,
        keep=2,
    )  # fmt: skip
