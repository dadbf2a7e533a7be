"""Stage 2 of the published size on a pod: 64 chips of v5p, a clip of 21 latents each.

    python -m train.distill configs/distill_pod.py --out gs://bucket/distill --cluster
"""

from liveavatar_jax.config import DiTConfig, ModelConfig
from liveavatar_jax.data.clips import DataConfig, Source
from liveavatar_jax.parallel.mesh import TrainMesh
from train.experiment import Distill


def config() -> Distill:
    return Distill(
        model=ModelConfig(dit=DiTConfig(remat="full")),
        data=DataConfig(batch=64),
        mesh=TrainMesh(fsdp=64),
    )
