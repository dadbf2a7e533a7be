"""Stage 2, self-forcing DMD: the student learns on its own rollouts, from a teacher and a critic.

    python -m train.distill configs/distill_tiny.py --out runs/distill

A student step makes a clip without a gradient, asks the objective for dL/dx on the whole of it,
and takes that back block by block. A critic step makes another clip and learns its velocity. With
adapters, student and critic are two sets of them over one frozen base, which itself is the
teacher.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from liveavatar_jax.diffusion.losses import Scores
from liveavatar_jax.diffusion.rollout import Given, Rollout, draw_steps, replay, rollout
from liveavatar_jax.models.attention import Layout
from liveavatar_jax.models.clip import bidirectional, hidden
from liveavatar_jax.types import Array, Float, Key
from train.experiment import Distill
from train.networks import Batch, Frozen, conditioned, discriminator, initial, network
from train.run import Run, command
from train.state import (
    DistillState,
    Learner,
    Metrics,
    accumulate,
    as_metrics,
    averaged,
    begin,
    learn,
)
from train.student import Streamed, said

STUDENT, CRITIC = range(2)  # far apart in the keys of a step


def start(exp: Distill, frozen: Frozen, params: Any = None) -> DistillState:
    """The state before the first step; `params` are what the student begins with."""
    assert frozen.base is not None
    keys = jax.random.split(jax.random.key(exp.seed), 3)
    if params is None:
        params = initial(exp, frozen.base, keys[0])
    judge = {"network": initial(exp, frozen.base, keys[1])}
    if exp.discriminator is not None:
        judge["discriminator"] = discriminator(exp, keys[2])
    average = None if exp.average is None else jax.tree.map(jnp.copy, params)
    student, critic = begin(params, exp.optimiser), begin(judge, exp.critic_optimiser)
    return DistillState(student, critic, average)


def student_step(
    exp: Distill, layout: Layout, frozen: Frozen, state: DistillState, batch: Batch
) -> tuple[DistillState, Metrics]:
    """One update of the student; `exp.objective` says what is wanted of its clips."""
    key = _key(exp, STUDENT, state.student)

    def part(batch: Batch, key: Key[Array, ""]) -> tuple[Any, Metrics]:
        keys = jax.random.split(key)
        made, learner, given = generate(exp, layout, frozen, state.student.params, batch, keys[0])
        judged = scores(exp, layout, frozen, state.critic.params, window(exp, batch, made.x))
        gradient, metrics = exp.objective(made.x, judged, keys[1])
        if made.x.shape[1] < _frames(exp, batch):
            # The scores know nothing of what was before the window, and would have it begin anew.
            gradient = gradient.at[:, : exp.model.stream.block_frames].set(0.0)
        make = functools.partial(network, exp, frozen)
        kept = jax.tree.map(lambda a: a[-len(made.inputs) :], given)
        grads = replay(learner, make, state.student.params, made, kept, gradient, exp.policy)
        exit = made.steps.exit.astype(jnp.float32)
        return grads, metrics | {"exit": exit}

    grads, metrics = accumulate(part, batch, jax.random.split(key, exp.accumulate))
    student, more = learn(state.student, exp.optimiser, grads, exp.clip)
    average = state.average
    if exp.average is not None:
        average = averaged(average, student.params, exp.average, student.updates, exp.average_from)
    state = DistillState(student, state.critic, average)
    return state, as_metrics(metrics | more, "student")


def critic_step(
    exp: Distill, layout: Layout, frozen: Frozen, state: DistillState, batch: Batch
) -> tuple[DistillState, Metrics]:
    """One update of critic and discriminator, on a rollout of their own."""
    key = _key(exp, CRITIC, state.critic)

    def part(batch: Batch, key: Key[Array, ""]) -> tuple[Any, Metrics]:
        keys = jax.random.split(key)
        made, _, _ = generate(exp, layout, frozen, state.student.params, batch, keys[0])
        seen = window(exp, batch, made.x)
        x, real = jax.lax.stop_gradient(made.x), seen["latents"]

        def loss(params: Any) -> tuple[Float[Array, ""], Metrics]:
            return exp.critic(x, scores(exp, layout, frozen, params, seen), real, keys[1])

        return jax.grad(loss, has_aux=True)(state.critic.params)

    grads, metrics = accumulate(part, batch, jax.random.split(key, exp.accumulate))
    critic, more = learn(state.critic, exp.critic_optimiser, grads, exp.clip)
    state = DistillState(state.student, critic, state.average)
    return state, as_metrics(metrics | more, "critic")


def generate(
    exp: Distill, layout: Layout, frozen: Frozen, params: Any, batch: Batch, key: Key[Array, ""]
) -> tuple[Rollout, Streamed, Given]:
    """A rollout of the student for a batch, without a gradient, and what `replay` needs."""
    cfg = exp.model.stream
    keys = jax.random.split(key, 4)
    frames = _frames(exp, batch)
    blocks = frames // cfg.block_frames
    kept = exp.window or blocks
    learner = Streamed(exp.model, exp.policy, layout)
    student = network(exp, frozen, jax.lax.stop_gradient(params))
    memory = learner.start(student, batch["reference"], batch["still"], batch["text"], keys[0])
    real = batch["latents"][:, :frames] if exp.policy.anchor else None
    given = Given(
        chunk=said(batch["audio"][:, :, : 4 * frames], blocks, cfg.audio_past),
        key=jax.random.split(keys[1], blocks),
        clean=None if real is None else rearrange(real, "b (j f) h w c -> j b f h w c", j=blocks),
    )
    steps = draw_steps(exp.policy, cfg.steps, keys[2])
    skip = jax.random.randint(keys[3], (), 0, blocks - kept + 1) if exp.vary else 0
    made = rollout(learner, student, memory, given, steps, exp.policy, window=kept, skip=skip)
    return made, learner, given


def window(exp: Distill, batch: Batch, x: Float[Array, "b f h w c"]) -> Batch:
    """The batch as of the frames of `x`, the last ones of its rollout."""
    frames = _frames(exp, batch)
    own = slice(frames - x.shape[1], frames)
    heard = slice(4 * own.start, 4 * own.stop)
    return {**batch, "latents": batch["latents"][:, own], "audio": batch["audio"][:, :, heard]}


def scores(exp: Distill, layout: Layout, frozen: Frozen, params: Any, batch: Batch) -> Scores:
    """Teacher and critic, bound to what the clips of a batch are made for; `params` are the
    critic's. Both see the reference standing still where the student does."""
    dtype = exp.model.stream.dtype
    judge = network(exp, frozen, params["network"])

    def teacher(x: Array, sigma: Array, text: bool, audio: bool) -> Array:
        if exp.teacher is not None:
            return exp.teacher(x, sigma, text, audio, batch)
        assert frozen.base is not None
        context = None if text else frozen.negative[None]
        given = conditioned(exp, frozen.base, batch, batch["still"], context=context, audio=audio)
        return bidirectional(frozen.base, x.astype(dtype), sigma, given, layout)

    def critic(x: Array, sigma: Array) -> Array:
        given = conditioned(exp, judge, batch, batch["still"])
        return bidirectional(judge, x.astype(dtype), sigma, given, layout)

    def realness(x: Array, sigma: Array) -> Array:
        given = conditioned(exp, judge, batch, batch["still"])
        tokens, _ = hidden(judge, x.astype(dtype), sigma, given, layout)
        patches = (x.shape[2] // 2) * (x.shape[3] // 2)
        return params["discriminator"](layout.join(tokens, patches))

    reward = exp.reward and functools.partial(exp.reward, batch=batch)
    return Scores(teacher, critic, realness if exp.discriminator else None, reward)


def _frames(exp: Distill, batch: Batch) -> int:
    """Latent frames of a rollout."""
    if exp.blocks is None:
        return batch["audio"].shape[2] // 4
    return exp.blocks * exp.model.stream.block_frames


def _key(exp: Distill, side: int, learner: Learner) -> Key[Array, ""]:
    """Of one update of one side, the same on all hosts."""
    key = jax.random.fold_in(jax.random.key(exp.seed), side)
    return jax.random.fold_in(key, learner.updates)


def main(argv: Sequence[str] | None = None) -> int:
    return command(__doc__, Distill, train, argv)


def train(run: Run) -> int:
    """The loop. Returns the exit code."""
    exp, frozen = run.experiment, run.frozen()
    steps = {"student": student_step, "critic": critic_step}
    state, done = run.begin(functools.partial(start, exp), frozen)
    bind = lambda step: run.compiled(functools.partial(step, exp, run.layout), state)
    compiled = {side: bind(step) for side, step in steps.items()}
    with run.watching(done) as (watch, stop):
        for step in range(done, exp.steps):
            metrics: Metrics = {}
            for side in exp.schedule.sides(step):
                state, more = compiled[side](frozen, state, run.next_batch())
                metrics |= more
            watch(step + 1, metrics, run.flops(exp.schedule.sides(step)))
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
