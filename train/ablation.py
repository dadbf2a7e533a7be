"""The rows of the table of `train.world`: variants of the recipe, and how each is trained."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig
from liveavatar_jax.data.clips import DataConfig
from liveavatar_jax.diffusion.losses import (
    DMD,
    Adversarial,
    AdversarialCritic,
    Critic,
    DiffusionForcing,
    Guidance,
    Levels,
    Rewarded,
    Scores,
    SiD,
    TeacherForcing,
)
from liveavatar_jax.diffusion.rollout import Policy
from liveavatar_jax.models import lora
from liveavatar_jax.models.attention import KV, KVCache, Layout, overwrite
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.types import Array, Bool, Float, Int, Key, LiveAvatarError
from train import distill, forcing
from train.experiment import Adapters, Distill, Forcing, Schedule
from train.gaussians import HEARD, TEXT, World, kinds, positions, pushes, sample, velocity
from train.networks import Frozen

WORLD = World()
BLOCK = 2  # latent frames
LONG = 10  # clips that a long video lasts
LEVELS = Levels(shift=1.5)  # texture is decided at low noise
NONE = Guidance(1.0, 1.0)
LAST = (0.0, 0.0, 0.0, 1.0)  # the exit that the stream takes, too


# ---- the rows


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long rows train. `distill` counts updates of the critic, `warm` those before them, and
    `judged` clips of each side of a comparison."""

    batch: int = 128
    forcing: int = 2000
    warm: int = 300
    distill: int = 1500
    judged: int = 2048


@dataclasses.dataclass(frozen=True)
class Row:
    """A variant of the recipe, by what is different."""

    says: str
    past: str | None = "noisy"  # of stage 1: "noisy" or "clean", None = without it
    distilled: bool = True
    stream: dict[str, Any] = dataclasses.field(default_factory=dict)
    policy: dict[str, Any] = dataclasses.field(default_factory=dict)
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def reward(x: Float[Array, "b f h w c"], batch: dict[str, Array]) -> Float[Array, " b"]:
    """How well a clip follows its audio."""
    return jnp.mean(positions(WORLD, x) * pushes(batch["audio"]), axis=1) - WORLD.push


ROWS = {
    "exact": Row("exact clips again: the floor", None, False),
    "teacher": Row("the exact teacher, 4 solver steps", None, False),
    "untrained": Row("a student that learnt nothing", None, False),
    "forcing": Row("stage 1 alone, 4 steps", "noisy", False),
    "forcing-64": Row("stage 1 alone, 64 steps", "noisy", False, {"steps": 64}),
    "full": Row("both stages, history at each step's own level"),
    "clean": Row("history run again clean; teacher forcing", "clean", stream={"history": 0.0}),
    "fixed": Row("history run again at level 0.3", stream={"history": 0.3}),
    "random": Row("exits at random, as published", policy={"exits": None}),
    "exit": Row("one ring, at the level of the exit", policy={"history": "exit"}),
    "renoise": Row("new noise between the steps", policy={"transition": "renoise"}),
    "direct": Row("without stage 1", None),
    "ratio-1": Row("1 update of the critic for 1", changes={"schedule": Schedule(1)}),
    "ratio-2": Row("2 updates of the critic for 1", changes={"schedule": Schedule(2)}),
    "sid": Row("SiD instead of DMD", changes={"objective": SiD(NONE, LEVELS)}),
    "rewarded": Row("rows weighted by reward", changes={
        "objective": Rewarded(DMD(NONE, LEVELS), beta=1.0), "reward": reward}),
    "gan": Row("a GAN term beside", changes={
        "objective": Adversarial(DMD(NONE, LEVELS)), "critic": AdversarialCritic(Critic(LEVELS)),
        "discriminator": 32}),
    "anchored": Row("3 of 10 rollouts start from real clips", policy={"anchor": 0.3}),
    "longer": Row("rollouts of 3 to 6 blocks, the last 3 learn", changes={
        "blocks": 6, "window": 3, "vary": True}),
    "lora": Row("adapters of rank 8 on stage 1", changes={"adapters": Adapters(8, 8.0)}),
}  # fmt: skip
QUICK = ("exact", "forcing", "full")


def model(**stream: Any) -> ModelConfig:
    """Networks of one token a frame."""
    dit = DiTConfig(
        dim=32, ffn_dim=64, heads=2, layers=2, latent_channels=1, freq_dim=32, text_dim=TEXT,
        text_len=1, audio_dim=HEARD, audio_layers=1, audio_tokens=1, inject_layers=(0, 1),
        param_dtype="float32",
    )  # fmt: skip
    fixed = {"shift": 1.0, "block_frames": BLOCK, "ring_blocks": 3, "sink_after": None,
             "distance": 4, "motion": False, "dtype": "float32"}  # fmt: skip
    return dataclasses.replace(ModelConfig.tiny(), dit=dit, stream=StreamConfig(**fixed | stream))


def stage_1(row: Row, budget: Budget) -> Forcing:
    objective = TeacherForcing if row.past == "clean" else DiffusionForcing
    return Forcing(
        model=model(**row.stream),
        adapters=None,
        objective=objective(shift=1.0),
        optimiser=adam(2e-3, budget.forcing),
        scaffold=False,
        positions=LONG * WORLD.frames,
        data=DataConfig(batch=budget.batch),
        steps=budget.forcing,
    )


def stage_2(row: Row, budget: Budget) -> Distill:
    schedule = row.changes.get("schedule", Schedule(5))
    usual = Distill(
        model=model(**row.stream),
        adapters=None,
        objective=DMD(NONE, LEVELS),
        critic=Critic(LEVELS),
        optimiser=adam(2e-4, budget.distill // schedule.ratio, 0.0),
        critic_optimiser=adam(1e-3, budget.warm + budget.distill, 0.0),
        schedule=schedule,
        policy=Policy(**{"positions": LONG * WORLD.frames, "exits": LAST} | row.policy),
        teacher=teacher,
        average=0.99,
        data=DataConfig(batch=budget.batch),
        steps=budget.distill,
    )
    exp = dataclasses.replace(usual, **row.changes)
    both = {"objective": FromTeacher(exp.objective), "critic": FromTeacher(exp.critic)}
    return dataclasses.replace(exp, **both)


def adam(rate: float, updates: int, momentum: float = 0.5) -> optax.GradientTransformation:
    """Fast first, slow at last."""
    return optax.adam(optax.cosine_decay_schedule(rate, updates, 0.05), momentum, 0.99)


def teacher(x: Array, sigma: Array, text: bool, audio: bool, batch: dict[str, Array]) -> Array:
    """The exact velocity; no text says anything."""
    push = pushes(batch["audio"]) if audio else None
    return velocity(WORLD, x, sigma, push, kinds(WORLD, batch["reference"])[:, 0])


class FromTeacher(nnx.Module):
    """Any objective of either side, with a critic that is the teacher plus what it has learnt: as
    critics begin that are copies of a teacher, which a formula cannot be."""

    def __init__(self, objective: nnx.Module):
        self.objective = objective

    def __call__(self, x: Float[Array, "b f h w c"], scores: Scores, *rest: Any) -> Any:
        def critic(x: Array, sigma: Array) -> Array:
            return scores.teacher(x, sigma, True, True) + scores.critic(x, sigma)

        return self.objective(x, dataclasses.replace(scores, critic=critic), *rest)


# ---- training


class ManyRows(Layout):
    """Very many rows of very few tokens: one product for all rows, and no loop over them."""

    def attention(
        self,
        q: Float[Array, "b n t d"],
        k: Float[Array, "b n s d"],
        v: Float[Array, "b n s d"],
        length: Int[Array, " b"] | None,
        implementation: str,
    ) -> Float[Array, "b n t d"]:
        score = jnp.einsum("bntd,bnsd->bnts", q * q.shape[-1] ** -0.5, k)
        if length is not None:
            hidden = jnp.arange(k.shape[2])[None] >= length[:, None]
            score = jnp.where(hidden[:, None, None], -jnp.inf, score)
        return jnp.einsum("bnts,bnsd->bntd", jax.nn.softmax(score, axis=-1), v)

    def cross(
        self, q: Float[Array, "b f pp n d"], k: Array, v: Array, implementation: str
    ) -> Float[Array, "b f pp n d"]:
        y = self.attention(jnp.moveaxis(q[:, :, 0], 1, 2), k, v, None, implementation)
        return jnp.moveaxis(y, 1, 2)[:, :, None]

    def append(
        self,
        cache: KVCache,
        fresh: KV,
        step: int | Int[Array, ""],
        block: Int[Array, " b"],
        live: Bool[Array, " b"],
    ) -> KVCache:
        """All rows are live here."""
        own = jax.tree.map(lambda a: a[step], cache.ring)
        own = jax.vmap(overwrite, (0, 0, None))(own, fresh, block)
        return KVCache(jax.tree.map(lambda a, b: a.at[step].set(b), cache.ring, own), cache.sink)


MANY = ManyRows()


def trained(name: str, budget: Budget, folder: Path, show: bool = True) -> tuple[Forcing, Any]:
    """The experiment that a row ends with, and its student, on average over the last updates."""
    row = ROWS[name]
    base = jax.jit(lambda: CausalDiT(model().dit, rngs=nnx.Rngs(0)))()
    frozen = Frozen(base=base, negative=jnp.zeros((1, TEXT)))
    exp, student = stage_1(row, budget), base
    if row.past is not None:
        path = folder / f"stage-1-{row.past}-{budget.forcing}x{budget.batch}.npz"
        student = _kept(path, base, lambda: _forced(row, budget, frozen, show))
    if row.distilled:
        exp, start = stage_2(row, budget), student
        path = folder / f"{name}-{budget.forcing}-{budget.warm}-{budget.distill}x{budget.batch}.npz"
        student = _kept(path, base, lambda: _distilled(exp, budget.warm, frozen, start, show))
    return dataclasses.replace(exp, adapters=None), student


def _forced(row: Row, budget: Budget, frozen: Frozen, show: bool) -> Any:
    """The student after stage 1."""
    exp = stage_1(dataclasses.replace(row, stream={}), budget)
    state = jax.jit(functools.partial(forcing.start, exp))(frozen)
    step = _compiled(forcing.train_step, exp, frozen, WORLD.frames)
    for i in tqdm(range(exp.steps), "stage 1", disable=not show, mininterval=5):
        state, metrics = step(state, jax.random.fold_in(jax.random.key(1), i))
        _refuse_nonfinite(metrics, i)
    return state.average


def _distilled(exp: Distill, warm: int, frozen: Frozen, student: Any, show: bool) -> Any:
    """The student after stage 2; the critic begins earlier, for it starts from nothing."""
    if exp.adapters is not None:
        frozen, student = Frozen(base=student, negative=frozen.negative), None
    state = jax.jit(functools.partial(distill.start, exp))(frozen, student)
    frames = BLOCK * (exp.blocks or WORLD.frames // BLOCK)
    bind = lambda step: _compiled(step, exp, frozen, frames)
    steps = {"student": bind(distill.student_step), "critic": bind(distill.critic_step)}
    sides = [*[("critic",)] * warm, *map(exp.schedule.sides, range(exp.steps))]
    for i, some in enumerate(tqdm(sides, "stage 2", disable=not show, mininterval=5)):
        for j, side in enumerate(some):
            key = jax.random.fold_in(jax.random.key(2), 2 * i + j)
            state, metrics = steps[side](state, key)
            _refuse_nonfinite(metrics, i)
    if exp.adapters is not None:
        return lora.apply(frozen.base, state.average, exp.adapters.scale)
    return state.average


def _kept(path: Path, like: Any, make: Callable[[], Any]) -> Any:
    """A student from the folder, or made and put there."""
    leaves, tree = jax.tree.flatten(like)
    if path.exists():
        with np.load(path) as stored:
            return tree.unflatten(jnp.asarray(stored[f"arr_{i}"]) for i in range(len(leaves)))
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, *map(np.asarray, jax.tree.leaves(made)))
    part.rename(path)
    return made


def _compiled(step: Callable[..., Any], exp: Any, frozen: Frozen, frames: int) -> Callable:
    """A step on a batch of its own."""

    def one(frozen: Frozen, state: Any, key: Key[Array, ""]) -> tuple[Any, Any]:
        return step(exp, MANY, frozen, state, sample(WORLD, key, exp.data.batch, frames))

    return functools.partial(jax.jit(one, donate_argnums=1), frozen)


def _refuse_nonfinite(metrics: dict[str, Any], step: int) -> None:
    if step % 100 == 0:
        bad = [k for k, v in metrics.items() if k.endswith("grad_norm") and not np.isfinite(v)]
        if bad:
            raise LiveAvatarError(f"{bad[0]} is not finite in update {step}; lower the rates")
