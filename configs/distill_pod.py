"""Stage 2 at the published size: 14B, 720x400, clips of 21 latents (7 blocks), one a chip.

    uv run --extra plan --extra train liveavatar-jax plan --train configs/distill_pod.py
    CLUSTER=... IMAGE=... OUT=gs://... configs/launch/xpk.sh

Expects, below the root: `avatar`, made by `liveavatar-jax convert` of the base, and `clips`, shards
of encoded clips of that size and the text that guidance leans away from
(`liveavatar-jax encode --negative TEXT`); start it from stage 1 with `--set start=FILE`
(`train.export`).
Student and critic are adapters of rank 128 over one frozen base, which is the teacher. Numbers are
those of the paper (student 1e-5, critic 2e-6, 5 : 1) where it states them.

Expected: the student's step takes 54 of 79 GiB of 64 H100s, as compiled ahead. Chips with less
memory part each clip over four: `--mesh fsdp=16,sequence=4 --set data.batch=16` on 64 of v6e. What
is compiled and what is not, memory and times: README, "Training on a pod".
"""

from liveavatar_jax.config import DiTConfig, ModelConfig
from liveavatar_jax.data.clips import DataConfig, Source
from liveavatar_jax.diffusion.rollout import Policy
from liveavatar_jax.parallel.mesh import TrainMesh
from train.experiment import Distill


def config() -> Distill:
    return Distill(
        model=ModelConfig(dit=DiTConfig(remat="full")),
        weights="avatar",
        data=DataConfig(sources=(Source(("clips",)),), batch=64),
        mesh=TrainMesh(fsdp=64),
        policy=Policy(positions=1125),  # three minutes of video
        negative="clips/negative.safetensors",
        steps=2_500,
        save_every=50,
    )
