"""Stage 1 at the published size: 14B, 720x400, clips of 21 latents, one a chip.

    uv run --extra plan --extra train liveavatar-jax plan --train configs/forcing_pod.py
    STAGE=forcing CLUSTER=... IMAGE=... OUT=gs://... configs/launch/xpk.sh

Expects, below the root: `avatar`, made by `liveavatar-jax convert` of the base, and `clips`, shards
of encoded clips of that size. Adapters of rank 128 learn over the frozen base, as published.

Expected: takes 28 of 79 GiB of 64 H100s, as compiled ahead. Chips with less memory part each clip
over four: `--mesh fsdp=16,sequence=4 --set data.batch=16` on 64 of v6e. What is compiled and what
is not, memory and times: README, "Training on a pod".
"""

from liveavatar_jax.config import DiTConfig, ModelConfig
from liveavatar_jax.data.clips import DataConfig, Source
from liveavatar_jax.parallel.mesh import TrainMesh
from train.experiment import Forcing


def config() -> Forcing:
    return Forcing(
        model=ModelConfig(dit=DiTConfig(remat="full")),
        weights="avatar",
        data=DataConfig(sources=(Source(("clips",)),), batch=64),
        mesh=TrainMesh(fsdp=64),
        positions=1125,  # three minutes of video
        steps=25_000,
    )
