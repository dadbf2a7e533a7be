"""Laws of the self-forcing rollout: it streams, and its gradient is what it is said to be."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax import stream
from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig
from liveavatar_jax.diffusion.rollout import Given, Policy, Steps, draw_steps, replay, rollout
from liveavatar_jax.models import lora
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.types import LiveAvatarError, struct
from train.student import Streamed, said

from .networks import random

DIT = DiTConfig.tiny(dim=32, ffn_dim=32, heads=2, layers=2, inject_layers=(1,), audio_layers=2)
H = W = 4
BLOCKS, F = 3, 2
STREAM = StreamConfig(
    steps=3, block_frames=F, ring_blocks=2, sink_after=2, distance=(4, 12), dtype="float32"
)


@functools.cache
def dit(remat: str = "none") -> CausalDiT:
    cfg = dataclasses.replace(DIT, remat=remat)
    return random(lambda: CausalDiT(cfg, rngs=nnx.Rngs(0)))


def normal(i: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(i), shape)


INFERENCE = Policy()


def student(policy: Policy = INFERENCE, **changes: Any) -> Streamed:
    cfg = ModelConfig.tiny(dit=DIT, stream=dataclasses.replace(STREAM, **changes))
    return Streamed(cfg, policy)


def given(past: str, blocks: int = BLOCKS, rows: int = 2, clean: bool = False) -> Given:
    features = normal(3, rows, 1, 4 * F * blocks, DIT.audio_layers, DIT.audio_dim)
    keys = jax.random.split(jax.random.key(4), blocks)
    real = normal(5, blocks, rows, F, H, W, 16) if clean else None
    return Given(chunk=said(features, blocks, past), key=keys, clean=real)


def begin(learner: Streamed, model: CausalDiT, rows: int = 2):
    reference, motion = normal(0, rows, 1, H, W, 16), normal(1, rows, 19, H, W, 16)
    context = normal(2, rows, 5, DIT.text_dim)
    return learner.start(model, reference, motion, context, jax.random.key(7))


def steps(exit: int, first: int = 0) -> Steps:
    return Steps(first=jnp.int32(first), exit=jnp.int32(exit))


@pytest.mark.parametrize("history, past", [(None, "repeat"), (None, "true"), (0.3, "repeat")])
def test_a_rollout_to_the_last_step_is_the_stream(history, past):
    """Block for block, with sinks renewed, the ring overwritten and positions far in a video."""
    learner = student(Policy(positions=50), history=history, audio_past=past)
    some = given(past)

    @jax.jit
    def made(model):
        return rollout(learner, model, begin(learner, model), some, steps(2), learner.policy).x

    @jax.jit
    def streamed(model):
        avatar, state, out = learner._avatar(model), begin(learner, model).state, []
        for j in range(BLOCKS):
            drawn = stream.draw(avatar, state)
            if history is not None:  # the rollout draws this noise from the block's key
                key = jax.random.fold_in(some.key[j], STREAM.steps + 1)
                renoise = jax.random.normal(key, drawn.renoise.shape)
                drawn = dataclasses.replace(drawn, renoise=renoise)
            chunk = stream.Chunk(audio=some.chunk.audio[j])
            state, flight = stream.denoise(avatar, state, drawn, chunk)
            out.append(flight.x)
        return jnp.concatenate(out, axis=1)

    want = streamed(dit())
    np.testing.assert_allclose(made(dit()), want, atol=2e-5 * float(jnp.abs(want).max()))


# ---- gradients


POLICIES = {
    "own level": (INFERENCE, {}),
    "exit level, renoised": (Policy(history="exit", transition="renoise"), {}),
    "clean again": (INFERENCE, {"history": 0.0}),
    "fixed, renoised": (Policy(transition="renoise"), {"history": 0.4, "audio_past": "true"}),
    "anchored": (Policy(anchor=1.0, anchor_steps=(0.5, 0.5)), {}),
}


@pytest.mark.parametrize("name, window", [*((name, None) for name in POLICIES), ("own level", 2)])
def test_replay_is_the_full_gradient(name, window):
    """Of adapters and of all weights together, for a loss that couples all blocks."""
    policy, changes = POLICIES[name]
    learner = student(policy, **changes)
    some = given(learner.cfg.stream.audio_past, clean=policy.anchor > 0)
    at = steps(2, first=1) if policy.anchor else steps(1)
    kept = BLOCKS if window is None else window

    def loss(x):
        return jnp.mean(jnp.cumsum(x, axis=1) ** 2 * jnp.cos(x))

    def made(trainable):
        model = make(trainable)
        memory = begin(learner, model)
        return rollout(learner, model, memory, some, at, policy, window=window)

    def make(trainable):
        return lora.attach(trainable["all"], trainable["lora"], 0.5)

    @jax.jit
    def full(trainable):
        return jax.grad(lambda t: loss(made(t).x))(trainable)

    @jax.jit
    def by_blocks(trainable):
        out = made(jax.lax.stop_gradient(trainable))
        last = jax.tree.map(lambda a: a[BLOCKS - kept :], some)
        return replay(learner, make, trainable, out, last, jax.grad(loss)(out.x), policy)

    factors = lora.init(dit(), ("q", "ffn_in"), 2, key=jax.random.key(8))
    noise = lambda a: 0.3 * jax.random.normal(jax.random.key(a.size), a.shape)
    trainable = {"all": dit(), "lora": jax.tree.map(noise, factors)}
    want, got = full(trainable), by_blocks(trainable)
    size = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(want))
    assert size > 1e-3
    for part in ("all", "lora"):
        assert max(float(jnp.abs(a).max()) for a in jax.tree.leaves(want[part])) > 1e-3 * size
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * size)
    jax.tree.map(close, jax.tree.leaves(got), jax.tree.leaves(want))


def peak(blocks: int, full: bool) -> int:
    """Bytes of temporaries that the compiler plans for a gradient of a clip of so many blocks."""
    learner, some = student(sink_after=None), given("repeat", blocks, rows=1)

    def made(model):
        return rollout(learner, model, begin(learner, model, 1), some, steps(1), learner.policy)

    def gradient(model, cotangent):
        if full:
            return jax.grad(lambda model: jnp.sum(made(model).x * cotangent))(model)
        return replay(learner, lambda m: m, model, made(model), some, cotangent, learner.policy)

    clip = jax.ShapeDtypeStruct((1, blocks * F, H, W, 16), jnp.float32)
    stats = jax.jit(gradient).lower(dit(), clip).compile().memory_analysis()
    return stats.temp_size_in_bytes


def test_replay_needs_the_memory_of_one_block():
    replayed, full = [peak(n, False) for n in (4, 12)], [peak(n, True) for n in (4, 12)]
    latents = 8 * F * H * W * 16 * 4 * 10  # the clip itself, ten times over
    assert replayed[1] - replayed[0] < latents
    assert full[1] - full[0] > 10 * (replayed[1] - replayed[0])


@struct
class Ball:
    x: jax.Array


class Toy:
    """A student whose network is one number for each step, and whose memory is a sum."""

    sigma = jnp.asarray([1.0, 0.7, 0.3, 0.0])
    own_rings = False
    again = None

    def enter(self, model, memory, given):
        return memory, Ball(given.chunk)

    def live(self, model, memory, flight, given):
        return memory, flight

    def velocity(self, model, memory, flight, step, ring):
        v = model[step] * (flight.x + memory)
        return v, v.sum()

    def remember(self, memory, flight, fresh, ring):
        return memory + fresh

    def leave(self, memory, flight):
        return memory

    def alone(self, memory, ring):
        return memory


def test_gradient_flows_through_the_chosen_step_only():
    """Neither through earlier steps, nor through what earlier blocks are remembered by."""
    noise = normal(0, 4, 1, 1, 1, 1, 1)
    some = Given(chunk=noise, key=jax.random.split(jax.random.key(0), 4))
    model = jnp.asarray([0.3, -0.2, 0.5])
    for exit in range(3):

        def clip(model, exit=exit):
            return rollout(Toy(), model, jnp.zeros(()), some, steps(exit), Policy())

        grads = jax.grad(lambda m: clip(m).x.sum())(model)
        assert np.flatnonzero(grads).tolist() == [exit]
        # By hand: d clean / d model = -sigma (x + memory), whose sum telescopes with the memory.
        out, memory, want = clip(model), 0.0, 0.0
        for x in out.inputs:
            want -= float(Toy.sigma[exit]) * float(x.sum() + memory)
            memory += float(model[exit]) * float(x.sum() + memory)
        np.testing.assert_allclose(grads[exit], want, rtol=1e-5)


# ---- which steps, and what is refused


def test_all_hosts_draw_the_same_steps_and_all_steps_come():
    policy = Policy(anchor=0.5, anchor_steps=(0.2, 0.8))
    draw = jax.jit(jax.vmap(lambda key: draw_steps(policy, 3, key)))
    drawn = draw(jax.random.split(jax.random.key(0), 4000))
    first, exit = np.asarray(drawn.first), np.asarray(drawn.exit)
    assert (exit >= first).all() and exit.max() == 2
    share = np.bincount(first, minlength=3) / len(first)
    np.testing.assert_allclose(share, [0.5, 0.1, 0.4], atol=0.03)
    alone = np.bincount(exit[first == 0], minlength=3) / (first == 0).sum()
    np.testing.assert_allclose(alone, [1 / 3] * 3, atol=0.04)


def test_an_anchored_rollout_starts_from_the_real_clip():
    learner = student(Policy(anchor=1.0, anchor_steps=(0.5, 0.5)))
    real, far = given("repeat", clean=True), given("repeat")

    @jax.jit
    def inputs(model, some, first):
        at = Steps(first=first, exit=jnp.int32(2))
        return rollout(learner, model, begin(learner, model), some, at, learner.policy).inputs

    anchored = inputs(dit(), real, jnp.int32(2))  # the exit is the first step that runs
    noise = (anchored - (1 - learner.sigma[2]) * real.clean) / learner.sigma[2]
    plain = inputs(dit(), far, jnp.int32(2))
    np.testing.assert_allclose(noise, plain, atol=1e-2)  # sigma of the last step is small
    np.testing.assert_array_equal(
        inputs(dit(), real, jnp.int32(0)), inputs(dit(), far, jnp.int32(0))
    )


def test_early_blocks_can_be_left_out():
    """A rollout of three blocks without the first is one of two blocks."""
    learner = student(sink_after=None, distance=0)
    some = given("repeat")

    @functools.partial(jax.jit, static_argnames="window")
    def made(model, some, skip, window):
        memory = begin(learner, model)
        return rollout(learner, model, memory, some, steps(1), window=window, skip=skip).x

    short = made(dit(), jax.tree.map(lambda a: a[1:], some), 0, 1)
    np.testing.assert_allclose(made(dit(), some, 1, 1), short, atol=1e-5)


@pytest.mark.parametrize("changes, words", [
    ({"transition": "sde"}, "Policy.transition = 'sde' must be one of ode, renoise"),
    ({"history": "own"}, "Policy.history = 'own' must be one of stream, exit"),
    ({"anchor": 2.0}, "Policy.anchor = 2.0 must be a probability"),
])  # fmt: skip
def test_policies_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(LiveAvatarError, match=words):
        Policy(**changes)


def test_anchor_weights_are_one_a_later_step():
    with pytest.raises(LiveAvatarError, match=r"has 3 weights for 2 steps"):
        draw_steps(Policy(anchor=0.3), 3, jax.random.key(0))
