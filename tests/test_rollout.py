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


def given(past: str, blocks: int = BLOCKS, rows: int = 2) -> Given:
    features = normal(3, rows, 1, 4 * F * blocks, DIT.audio_layers, DIT.audio_dim)
    keys = jax.random.split(jax.random.key(4), blocks)
    return Given(chunk=said(features, blocks, past), key=keys)


def begin(learner: Streamed, model: CausalDiT, rows: int = 2):
    reference, motion = normal(0, rows, 1, H, W, 16), normal(1, rows, 19, H, W, 16)
    context = normal(2, rows, 5, DIT.text_dim)
    return learner.start(model, reference, motion, context, jax.random.key(7))


def steps(exit: int, first: int = 0) -> Steps:
    return Steps(first=jnp.int32(first), exit=jnp.int32(exit))


@pytest.mark.parametrize(
    "history, past", [(None, "true"), pytest.param(0.3, "repeat", marks=pytest.mark.slow)]
)
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


@pytest.mark.slow  # of a small student it is taken below
@pytest.mark.parametrize("history, past, window", [(None, "repeat", 2), (0.4, "true", None)])
def test_replay_is_the_full_gradient(history, past, window):
    """Of adapters and of all weights together, with the sink renewed on the way."""
    learner, at = student(history=history, audio_past=past), steps(1)
    policy, some, kept = learner.policy, given(past), window or BLOCKS

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


@pytest.mark.slow
def test_replay_needs_the_memory_of_one_block():
    replayed, full = [peak(n, False) for n in (4, 12)], [peak(n, True) for n in (4, 12)]
    latents = 8 * F * H * W * 16 * 4 * 10  # the clip itself, ten times over
    assert replayed[1] - replayed[0] < latents
    assert full[1] - full[0] > 10 * (replayed[1] - replayed[0])


@struct
class Ball:
    x: jax.Array


@struct
class Shelf:
    """A memory: what each ring holds, and something made from the network."""

    rings: jax.Array
    text: jax.Array


class Toy:
    """A student of a few numbers, with everything that a student has."""

    sigma = jnp.asarray([1.0, 0.7, 0.3, 0.0])

    def __init__(self, own_rings=False, again=None):
        self.own_rings, self.again = own_rings, again

    def start(self, rows=1):
        rings = jnp.zeros((3 if self.own_rings else 1, rows, 2, 1, 1, 2))
        return Shelf(rings=rings, text=jnp.zeros(2))

    def enter(self, model, memory, given):
        return dataclasses.replace(memory, text=model["text"]), Ball(given.chunk)

    def live(self, model, memory, flight, given):
        return dataclasses.replace(memory, text=model["text"]), flight

    def velocity(self, model, memory, flight, step, ring):
        scale = model["step"][jnp.minimum(step, 2)]
        v = jnp.sin(scale * flight.x + memory.rings[ring] + memory.text[None, None, None, None])
        return v, v * model["key"]

    def remember(self, memory, flight, fresh, ring):
        return dataclasses.replace(
            memory, rings=memory.rings.at[ring].multiply(0.5).at[ring].add(fresh)
        )

    def leave(self, memory, flight):
        return dataclasses.replace(memory, rings=memory.rings + 0.01 * flight.x[None])

    def alone(self, memory, ring):
        return dataclasses.replace(memory, rings=memory.rings[ring][None])


TOY = {
    "step": jnp.asarray([0.3, -0.2, 0.5]), "text": jnp.asarray([0.1, 0.7]), "key": jnp.asarray(0.8)
}  # fmt: skip


def toy_given(blocks=4, rows=2):
    noise, real = normal(0, blocks, rows, 2, 1, 1, 2), normal(1, blocks, rows, 2, 1, 1, 2)
    return Given(chunk=noise, key=jax.random.split(jax.random.key(0), blocks), clean=real)


def loss(x):
    """Couples all blocks."""
    return jnp.mean(jnp.cumsum(x, axis=1) ** 2 * jnp.cos(x))


@pytest.mark.parametrize("transition", ["ode", "renoise"])
@pytest.mark.parametrize(
    "own_rings, again", [(True, None), (False, None), (False, 0.0), (False, 0.4)]
)
def test_replay_is_the_full_gradient_for_every_policy(own_rings, again, transition):
    learner, policy, window = Toy(own_rings, again), Policy(transition=transition), 3
    some = toy_given()

    def made(model, at):
        return rollout(learner, model, learner.start(2), some, at, policy, window=window)

    @jax.jit
    def both(model, at):
        out = made(model, at)
        last = jax.tree.map(lambda a: a[4 - window :], some)
        got = replay(learner, lambda m: m, model, out, last, jax.grad(loss)(out.x), policy)
        return got, jax.grad(lambda model: loss(made(model, at).x))(model)

    for at in (steps(0), steps(1), steps(2), steps(2, first=1)):
        got, want = both(TOY, at)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), got, want)
        assert float(want["key"]) == 0  # what is remembered carries no gradient
        assert np.flatnonzero(want["step"]).tolist() == [int(at.exit)]
        assert float(jnp.abs(want["text"]).max()) > 1e-4


def test_the_gradient_is_that_of_the_exit_steps_alone():
    """By hand: the sum over blocks of the derivative of the exit's prediction, all else fixed."""
    learner, at = Toy(own_rings=True), steps(1)
    some = toy_given()
    out = rollout(learner, TOY, learner.start(2), some, at)
    want, ring = 0.0, jnp.zeros((2, 2, 1, 1, 2))
    for x, clean in zip(out.inputs, jnp.split(out.x, 4, axis=1), strict=True):
        angle = TOY["step"][1] * x + ring + TOY["text"][None, None, None, None]
        want += float(jnp.sum(-learner.sigma[1] * jnp.cos(angle) * x))
        ring = 0.5 * ring + jnp.sin(angle) * TOY["key"] + 0.01 * clean
    made = lambda model: rollout(learner, model, learner.start(2), some, at).x.sum()
    np.testing.assert_allclose(jax.grad(made)(TOY)["step"][1], want, rtol=1e-5)


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


def test_exits_come_as_often_as_they_are_weighted():
    policy = Policy(anchor=0.5, anchor_steps=(1.0, 0.0), exits=(0.25, 0.0, 0.75))
    draw = jax.jit(jax.vmap(lambda key: draw_steps(policy, 3, key)))
    drawn = draw(jax.random.split(jax.random.key(0), 4000))
    first, exit = np.asarray(drawn.first), np.asarray(drawn.exit)
    share = np.bincount(exit[first == 0], minlength=3) / (first == 0).sum()
    np.testing.assert_allclose(share, policy.exits, atol=0.03)
    assert (exit[first > 0] == 2).all(), "what does not run is no exit"


def test_an_anchored_rollout_starts_from_the_real_clip():
    learner, some = Toy(), toy_given()
    anchored = rollout(learner, TOY, learner.start(2), some, steps(2, first=2)).inputs
    np.testing.assert_allclose(anchored, 0.7 * some.clean + 0.3 * some.chunk, rtol=1e-5)
    plain = dataclasses.replace(some, clean=None)
    same = [rollout(learner, TOY, learner.start(2), each, steps(2)).x for each in (some, plain)]
    np.testing.assert_array_equal(*same)


def test_early_blocks_can_be_left_out():
    """A rollout of four blocks without the first two is one of two blocks."""
    learner, some = Toy(own_rings=True), toy_given()
    late = jax.tree.map(lambda a: a[2:], some)
    skipped = rollout(learner, TOY, learner.start(2), some, steps(1), window=1, skip=jnp.int32(2))
    short = rollout(learner, TOY, learner.start(2), late, steps(1), window=1)
    np.testing.assert_allclose(skipped.x, short.x, rtol=1e-6)


@pytest.mark.parametrize("changes, words", [
    ({"transition": "sde"}, "Policy.transition = 'sde' must be one of ode, renoise"),
    ({"history": "own"}, "Policy.history = 'own' must be one of stream, exit"),
    ({"anchor": 2.0}, "Policy.anchor = 2.0 must be a probability"),
    ({"exits": (1.0, 0.0)}, r"Policy.exits = \(1.0, 0.0\) must be weights, the last above 0"),
])  # fmt: skip
def test_policies_that_make_no_sense_are_refused(changes, words):
    with pytest.raises(LiveAvatarError, match=words):
        Policy(**changes)


@pytest.mark.parametrize("policy, words", [
    (Policy(anchor=0.3), "anchor_steps has 3 weights and must have 2"),
    (Policy(exits=(0.5, 0.5)), "exits has 2 weights and must have 3"),
])  # fmt: skip
def test_weights_are_as_many_as_steps(policy, words):
    with pytest.raises(LiveAvatarError, match=words):
        draw_steps(policy, 3, jax.random.key(0))
