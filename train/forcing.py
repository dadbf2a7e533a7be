"""Stage 1, diffusion forcing: the causal student learns on real clips, block by block. With the
objective `FlowMatching` it is a teacher that learns, which looks both ways.

    python -m train.forcing configs/forcing_tiny.py --out runs/forcing

One jitted, donated step; the loop around it reads, watches, saves and can be stopped at any
moment and started again.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from liveavatar_jax.diffusion.flow import add_noise
from liveavatar_jax.models.attention import Layout
from liveavatar_jax.models.clip import bidirectional, causal
from liveavatar_jax.types import Array, Float, Key
from train.experiment import Forcing
from train.networks import Batch, Frozen, conditioned, initial, network
from train.run import Run, command
from train.state import Metrics, TrainState, accumulate, averaged, begin, learn


def start(exp: Forcing, frozen: Frozen, params: Any = None) -> TrainState:
    """The state before the first step; `params` are what the student begins with."""
    if params is None:
        assert frozen.base is not None
        params = initial(exp, frozen.base, jax.random.key(exp.seed))
    average = None if exp.average is None else jax.tree.map(jnp.copy, params)
    return TrainState(begin(params, exp.optimiser), average)


def train_step(
    exp: Forcing, layout: Layout, frozen: Frozen, state: TrainState, batch: Batch
) -> tuple[TrainState, Metrics]:
    """One update on a batch, which is cut into `exp.accumulate` parts."""
    key = jax.random.fold_in(jax.random.key(exp.seed), state.student.updates)

    def part(batch: Batch, key: Key[Array, ""]) -> tuple[Any, Metrics]:
        grads, metrics = jax.grad(loss, argnums=3, has_aux=True)(
            exp, layout, frozen, state.student.params, batch, key
        )
        return grads, metrics

    grads, metrics = accumulate(part, batch, jax.random.split(key, exp.accumulate))
    student, more = learn(state.student, exp.optimiser, grads, exp.clip)
    average = state.average
    if exp.average is not None:
        average = averaged(average, student.params, exp.average, student.updates, exp.average_from)
    return TrainState(student, average), metrics | more


def loss(
    exp: Forcing, layout: Layout, frozen: Frozen, params: Any, batch: Batch, key: Key[Array, ""]
) -> tuple[Float[Array, ""], Metrics]:
    """The objective on a batch, at random places of longer videos, with noised motion."""
    cfg, dit = exp.model.stream, network(exp, frozen, params)
    keys = jax.random.split(key, 5)
    clean, motion = batch["latents"].astype(jnp.float32), batch[exp.motion].astype(jnp.float32)
    b, f = clean.shape[:2]
    if exp.scaffold:
        sigma = jax.random.uniform(keys[0], (*motion.shape[:2], 1, 1, 1))
        motion = add_noise(motion, jax.random.normal(keys[1], motion.shape), sigma)
    near, far = cfg.distance_range
    blocks = -(-f // cfg.block_frames)
    distance = jax.random.randint(keys[2], (b, blocks), near, far + 1)
    position = jax.random.randint(keys[3], (b,), 0, exp.positions + 1)
    objective: Any = exp.objective
    given = conditioned(exp, dit, batch, motion, by_block=objective.causal)

    def velocity(x: Array, sigma: Array, past: Array | None) -> Array:
        if not objective.causal:
            return bidirectional(dit, x.astype(cfg.dtype), sigma[:, 0], given, layout)
        past = None if past is None else past.astype(cfg.dtype)
        return causal(
            dit, x.astype(cfg.dtype), sigma, given, block_frames=cfg.block_frames,
            window=cfg.ring_blocks, position=position, distance=distance, past=past, layout=layout,
        )  # fmt: skip

    return objective(velocity, clean, keys[4], cfg.block_frames)


def main(argv: Sequence[str] | None = None) -> int:
    return command(__doc__, Forcing, train, argv)


def train(run: Run) -> int:
    """The loop. Returns the exit code."""
    exp, frozen = run.experiment, run.frozen()
    state, done = run.begin(functools.partial(start, exp), frozen)
    if exp.adapters is None:  # then the base was but a beginning
        frozen = dataclasses.replace(frozen, base=None)
    compiled = run.compiled(functools.partial(train_step, exp, run.layout), state)
    with run.watching(done) as (watch, stop):
        for step in range(done, exp.steps):
            state, metrics = compiled(frozen, state, run.next_batch())
            watch(step + 1, metrics, run.flops(["step"]))
            stopped = stop.agreed()
            if stopped or run.due(step + 1):
                with watch.aside():
                    run.save(step + 1, state)
            if run.due_sample(step + 1) and not stopped:
                with watch.aside():
                    run.sample(watch, step + 1, frozen, state)
            if stopped:
                break
    return stop.code


if __name__ == "__main__":
    sys.exit(main())
