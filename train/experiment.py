"""What an experiment is: every choice of a run, as a frozen dataclass that a config file builds."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from flax import nnx

from liveavatar_jax.config import ModelConfig, VAEConfig, insist
from liveavatar_jax.data.clips import DataConfig
from liveavatar_jax.data.records import Shapes
from liveavatar_jax.diffusion.losses import DMD, Critic, DiffusionForcing
from liveavatar_jax.diffusion.rollout import Policy
from liveavatar_jax.parallel.mesh import TrainMesh
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.weights.wan import LORA_TARGETS

LINEAR = ("decoder.show",)  # the linear code within a VAE


def slowly(
    optimiser: optax.GradientTransformation, factor: float, *beginnings: str
) -> optax.GradientTransformation:
    """Leaves whose paths begin so go at `factor` times the rate."""
    chosen = lambda params: replace(params, {p: p.startswith(beginnings) for p in leaves(params)})
    return optax.chain(optimiser, optax.masked(optax.scale(factor), chosen))


def adam(rate: float) -> optax.GradientTransformation:
    """As the recipes of self-forcing have it: no momentum, for the target moves."""
    return optax.adamw(rate, 0.0, 0.999, weight_decay=0.01)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Low-rank adapters over one frozen base; without, whole networks are trained."""

    rank: int = 128
    alpha: float = 64.0
    targets: tuple[str, ...] = LORA_TARGETS

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class Forcing:
    """Stage 1: the causal student learns on real clips.

    weights: folder of `liveavatar-jax convert`; random weights of `seed` without.
    start: what the student begins with: a LoRA file for adapters, else a converted folder.
    motion: what the motion frames show: "motion", what was before the clip, or "still", the
    reference standing still, as in a stream.
    scaffold: in stage 1, every motion latent is noised to a random level of its own, so that the
    student looks at its past and not at them.
    positions: the clip stands at a random latent frame up to here.
    """

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    weights: str | None = None
    start: str | None = None
    adapters: Adapters | None = Adapters()
    objective: nnx.Module = dataclasses.field(default_factory=DiffusionForcing)
    optimiser: optax.GradientTransformation = dataclasses.field(default_factory=lambda: adam(1e-5))
    motion: str = "motion"
    scaffold: bool = True
    positions: int = 0
    clip: float | None = 10.0
    average: float | None = 0.99
    average_from: int = 200  # updates
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    synthetic: Shapes | None = None  # noise of these shapes instead of records
    mesh: TrainMesh = dataclasses.field(default_factory=TrainMesh)
    steps: int = 25_000
    accumulate: int = 1
    seed: int = 0
    save_every: int = 500
    keep: int = 3
    keep_every: int | None = None
    sample_every: int | None = None
    negative: str | None = None  # safetensors with "text", which guidance leans away from

    def __post_init__(self):
        for name in ("steps", "accumulate", "save_every", "keep"):
            insist(getattr(self, name) >= 1, self, name, "be at least 1")
        insist(self.positions >= 0, self, "positions", "be at least 0")
        known = self.motion in ("motion", "still")
        insist(known, self, "motion", 'be "motion" or "still"')
        for name in ("sample_every", "keep_every"):
            value = getattr(self, name)
            insist(value is None or value >= 1, self, name, "be None or at least 1")
        insist(self.clip is None or self.clip > 0, self, "clip", "be None or above 0")
        insist(self.average is None or 0 <= self.average < 1, self, "average", "lie in [0, 1)")
        insist(self.data.batch % self.accumulate == 0, self, "accumulate",
                 f"divide data.batch = {self.data.batch}")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Who learns when: the critic in each step, the student in every `ratio`-th.

    alone: the critic rests in the steps of the student (4 : 1 instead of 5 : 1).
    first: who is first where both learn; each has a batch and a rollout of its own.
    """

    ratio: int = 5
    alone: bool = False
    first: str = "student"

    def __post_init__(self):
        insist(self.ratio >= 1, self, "ratio", "be at least 1")
        insist(self.first in ("student", "critic"), self, "first", "be student or critic")
        insist(not self.alone or self.ratio > 1, self, "ratio", "be above 1 with alone")

    def sides(self, step: int) -> tuple[str, ...]:
        """Who learns in step 0, 1, ..."""
        if step % self.ratio:
            return ("critic",)
        if self.alone:
            return ("student",)
        return ("student", "critic") if self.first == "student" else ("critic", "student")


@dataclasses.dataclass(frozen=True)
class Distill(Forcing):
    """Stage 2: the student learns on its own rollouts from a teacher and a critic.

    objective: a generator objective of `losses`; critic: a critic objective.
    blocks: of a rollout, all that a record has by default; window: the last ones, which are
    scored and learn; vary: rollouts have a random length from `window` to `blocks`.
    discriminator: width of one on the critic's features. reward: (clip, batch) -> one number a
    row. teacher: (noisy clip, level, hear text, hear audio, batch) -> velocity, instead of the
    base.
    """

    objective: nnx.Module = dataclasses.field(default_factory=DMD)
    critic: nnx.Module = dataclasses.field(default_factory=Critic)
    critic_optimiser: optax.GradientTransformation = dataclasses.field(
        default_factory=lambda: adam(2e-6)
    )
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    policy: Policy = dataclasses.field(default_factory=Policy)
    blocks: int | None = None
    window: int | None = None
    vary: bool = False
    discriminator: int | None = None
    reward: Callable[..., Any] | None = None
    teacher: Callable[..., Any] | None = None
    average_from: int = 40  # updates of the student, 200 of the critic at 5 : 1
    steps: int = 2_500

    def __post_init__(self):
        super().__post_init__()
        insist(self.positions == 0, self, "positions", "be 0 in stage 2; set policy.positions")
        for name in ("blocks", "window", "discriminator"):
            value = getattr(self, name)
            insist(value is None or value >= 1, self, name, "be None or at least 1")
        if self.blocks is not None and self.window is not None:
            insist(self.window <= self.blocks, self, "window", f"be at most {self.blocks}")
        insist(not self.vary or self.window is not None, self, "window", "be given with vary")


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The decoder of a small preset's VAE learns on drawn puppets; the encoder is known.

    start: a packed model whose decoder goes on learning; None: a new one. noise: on the code in its
    latents, up to this deviation, so that it makes good a diffusion model's errors.
    frames: of a clip, whole latents.
    focus: weights of mouth and of eyes. square: of the square error beside the absolute one, edges:
    of the gradients over rows and columns, motion: over frames. rate: rises for `warm` steps, and
    falls along half a cosine; `linear` times that for the linear code, which begins as the best
    there is.
    """

    vae: VAEConfig
    start: str | None = None
    noise: float = 0.1
    size: int = 64
    batch: int = 4
    frames: int = 8
    rate: float = 2e-3
    warm: int = 100
    linear: float = 0.2
    focus: tuple[float, float] = (6.0, 4.0)
    square: float = 2.0
    edges: float = 0.7
    motion: float = 0.7
    clip: float = 1.0
    average: float = 0.999
    steps: int = 6_000
    judge_every: int = 500
    save_every: int = 500
    keep: int = 2
    seed: int = 0

    def __post_init__(self):
        insist(self.vae.cells is not None, self, "vae", "have cells, for only these are trained")
        group = self.vae.frames_per_latent
        insist(self.frames % group == 0, self, "frames", f"divide by {group}")
        side, grid = self.vae.pixels_per_latent, self.vae.grid
        insist(self.size % side == 0, self, "size", f"divide by {side}")
        insist((self.size // side,) * 2 == grid, self, "size", f"make {grid}, as vae.grid has it")
        for name in ("batch", "steps", "judge_every", "save_every", "keep"):
            insist(getattr(self, name) >= 1, self, name, "be at least 1")

    @property
    def optimiser(self) -> optax.GradientTransformation:
        rate = optax.warmup_cosine_decay_schedule(0.0, self.rate, self.warm, self.steps)
        return slowly(optax.adam(rate, 0.9, 0.98), self.linear, *LINEAR)
