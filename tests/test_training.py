"""The steps of both stages: the same numbers on every mesh, and who learns what."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig
from liveavatar_jax.data.clips import DataConfig, open_synthetic
from liveavatar_jax.data.records import Shapes
from liveavatar_jax.diffusion.losses import (
    DMD,
    Adversarial,
    AdversarialCritic,
    Critic,
    DiffusionForcing,
)
from liveavatar_jax.diffusion.rollout import Policy
from liveavatar_jax.models.attention import ONE_DEVICE
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.parallel.batches import place
from liveavatar_jax.parallel.mesh import TrainMesh
from liveavatar_jax.parallel.sharding import layout, trained, undivided
from liveavatar_jax.paths import leaves
from liveavatar_jax.types import LiveAvatarError
from tests.networks import random
from train import distill, forcing
from train.experiment import Adapters, Distill, Forcing, Schedule
from train.metrics import Finite
from train.networks import Frozen, fresh, initial
from train.state import accumulate, averaged, begin, learn

SEVERAL_DEVICES = True  # for conftest

# Plain descent with momentum: a state is a sum of gradients, so it shows how exact they are.
SGD = optax.sgd(0.05, momentum=0.9)
STREAM = StreamConfig(steps=2, block_frames=1, ring_blocks=2, sink_after=1, dtype="float32")
DIT = DiTConfig.tiny(
    dim=64, ffn_dim=64, heads=8, layers=1, inject_layers=(0,), freq_dim=8,
    audio_layers=2, audio_dim=8, text_dim=8, text_len=4,
)  # fmt: skip
SHAPES = Shapes(f=3, m=19, h=4, w=4, c=16, layers=2, audio_dim=8, text_dim=8, dtype="float32")
COMMON: dict[str, Any] = {
    "model": ModelConfig.tiny(dit=DIT, stream=STREAM), "optimiser": SGD,
    "average": 0.9, "average_from": 1, "clip": None, "synthetic": SHAPES,
}  # fmt: skip
# Stage 1 trains whole networks on batches in two parts, stage 2 adapters, on whole batches.
FORCING = Forcing(
    **COMMON, adapters=None, objective=DiffusionForcing(), accumulate=2, positions=3,
    data=DataConfig(batch=16, text_len=4),
)  # fmt: skip
DISTILL = Distill(
    **COMMON, adapters=Adapters(rank=8, alpha=8.0), critic_optimiser=SGD,
    policy=Policy(positions=3), data=DataConfig(batch=8, text_len=4),
)  # fmt: skip
# What few runs use, all at once: a GAN term, a window of a rollout of random length, a real start.
VARIANT = dataclasses.replace(
    DISTILL, objective=Adversarial(DMD()), critic=AdversarialCritic(Critic()), discriminator=8,
    window=2, vary=True, policy=Policy(transition="renoise", history="exit", anchor=1.0),
)  # fmt: skip
STEPS = {
    "forcing": (FORCING, forcing, (forcing.train_step,) * 2),
    "distill": (DISTILL, distill, (distill.student_step, distill.critic_step) * 2),
    "variant": (VARIANT, distill, (distill.student_step, distill.critic_step) * 2),
}


def ran(kind: str, text: str) -> tuple[list[Any], list[dict[str, Any]]]:
    """The states before, between and after the steps, and their metrics, on a mesh."""
    exp, stage, steps = STEPS[kind]
    spec = TrainMesh.parse(text)
    spec.check(DIT, exp.data.batch // exp.accumulate)
    mesh = spec.make()
    base = random(lambda: CausalDiT(DIT, rngs=nnx.Rngs(0)))
    with jax.set_mesh(mesh):
        frozen = Frozen(jax.device_put(base, trained(base, mesh)), jnp.ones((4, 8)))
        state = stage.start(exp, frozen)
        places = trained(state, mesh)
        assert undivided(state, mesh, above=2**12) == []
        states, reports = [jax.device_put(state, places)], []
        bind = lambda step: jax.jit(
            functools.partial(step, exp, layout(mesh)), out_shardings=(places, None)
        )
        compiled = {step: bind(step) for step in steps}
        data = open_synthetic(exp.data, SHAPES, pool=len(steps))
        for step in steps:
            batch = place(next(data), mesh, exp.data.batch)
            state, metrics = compiled[step](frozen, states[-1], batch)
            states.append(state)
            reports.append(metrics)
        data.close()
        assert all(program._cache_size() == 1 for program in compiled.values())
    return states, reports


@functools.cache
def alone(kind: str) -> tuple[list[Any], list[dict[str, Any]]]:
    return ran(kind, "data=1")


def slow(kind: str, text: str) -> Any:
    return pytest.param(kind, text, marks=pytest.mark.slow)


AXES = ("data=8", "fsdp=8", "sequence=8", "tensor=8", "fsdp=2,sequence=4",
        "data=2,fsdp=2,tensor=2", "dcn_data=2,fsdp=2,tensor=2", "dcn_fsdp=2,fsdp=2,sequence=2",
        "data=2,sequence=2,tensor=2")  # fmt: skip


@pytest.mark.parametrize("kind, text", [
    ("forcing", "fsdp=2,sequence=2,tensor=2"),
    *(slow(kind, text) for kind in ("forcing", "distill") for text in AXES),
    slow("variant", "fsdp=2,sequence=2,tensor=2"),
    slow("variant", "data=8"),
])  # fmt: skip
def test_a_mesh_gives_the_same_numbers(kind: str, text: str):
    (want, reports), (got, ours) = alone(kind), ran(kind, text)
    for ours_, theirs in zip(ours, reports, strict=True):
        for name, value in theirs.items():
            if isinstance(value, Finite):
                assert value.ok.all() and ours_[name].ok.all()
            else:
                np.testing.assert_allclose(ours_[name], value, rtol=2e-5, err_msg=name)
    before, after, other = leaves(want[0]), leaves(want[-1]), leaves(got[-1])
    moved = 0
    for path, start in before.items():
        change, same = (np.asarray(x[path]) - np.asarray(start) for x in (after, other))
        peak = np.abs(change).max()
        moved += peak > 0
        last = np.spacing(np.abs(np.asarray(after[path], np.float32)).max())  # bit of the sum
        np.testing.assert_allclose(same, change, atol=5e-5 * peak + 2 * last, rtol=0, err_msg=path)
    assert moved > 0.9 * len(before)


# ---- who learns


def unchanged(before: Any, after: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, before, after)


def changed(before: Any, after: Any) -> bool:
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), before, after)))


def test_each_side_moves_itself_alone():
    states, _ = alone("distill")
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        sides = ("student", "critic") if i % 2 == 0 else ("critic", "student")
        moving, still = ((getattr(before, side), getattr(after, side)) for side in sides)
        assert changed(moving[0].params, moving[1].params)
        assert int(moving[1].updates) == int(moving[0].updates) + 1
        unchanged(*still)
        if i % 2:
            unchanged(before.average, after.average)


def test_the_rollouts_of_the_two_sides_differ():
    """Each has a key of its own, from the seed and the number of its updates."""
    keys = [distill._key(DISTILL, side, begin({}, SGD)) for side in (0, 1)]
    keys += [distill._key(dataclasses.replace(DISTILL, seed=1), 0, begin({}, SGD))]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 3


@pytest.mark.parametrize("schedule, want", [
    (Schedule(), "sc c c c c sc c"),
    (Schedule(ratio=2, first="critic"), "cs c cs c"),
    (Schedule(ratio=3, alone=True), "s c c s c"),
    (Schedule(ratio=1), "sc sc sc"),
])  # fmt: skip
def test_the_critic_learns_in_each_step_and_the_student_in_every_so_manieth(schedule, want):
    sides = [schedule.sides(step) for step in range(len(want.split()))]
    assert [tuple(side[0] for side in each) for each in sides] == [tuple(w) for w in want.split()]


@pytest.mark.parametrize("fields, words", [
    ({"ratio": 0}, r"Schedule\.ratio = 0 must be at least 1"),
    ({"first": "teacher"}, r"Schedule\.first = 'teacher' must be student or critic"),
    ({"ratio": 1, "alone": True}, r"Schedule\.ratio = 1 must be above 1 with alone"),
])  # fmt: skip
def test_a_schedule_without_a_critic_is_refused(fields, words):
    with pytest.raises(LiveAvatarError, match=words):
        Schedule(**fields)


@pytest.mark.parametrize("kind", ["forcing", "distill"])
def test_the_average_is_a_copy_at_first_and_then_lags(kind: str):
    states, _ = alone(kind)
    first, second = next(s for s in states if s.student.updates == 1), states[-1]
    unchanged(first.average, first.student.params)
    want = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, first.average, second.student.params)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
    jax.tree.map(close, second.average, want)
    assert changed(second.average, second.student.params)


def test_the_average_of_a_constant_is_the_constant_and_of_a_step_a_power():
    average = {"x": jnp.zeros(3)}
    for update in range(1, 8):
        average = averaged(average, {"x": jnp.ones(3)}, 0.5, jnp.int32(update), 0)
        np.testing.assert_allclose(average["x"], 1 - 0.5**update)
    average = averaged(average, {"x": jnp.full(3, 7.0)}, 0.5, jnp.int32(2), 2)
    np.testing.assert_array_equal(average["x"], 7)  # not before update 3


@pytest.mark.parametrize("clip, scale", [(None, 1), (10.0, 1), (5.0, 1), (1.0, 0.2)])
def test_gradients_are_scaled_down_to_the_norm_and_never_up(clip, scale):
    grads = {"a": jnp.asarray([3.0, 0.0]), "b": jnp.asarray([[4.0]])}
    before = begin(jax.tree.map(jnp.zeros_like, grads), optax.sgd(1.0))
    after, metrics = learn(before, optax.sgd(1.0), grads, clip)
    assert float(metrics["grad_norm"]) == 5  # before clipping
    for name, grad in grads.items():
        np.testing.assert_allclose(after.params[name], -scale * grad, rtol=1e-6)


def test_the_gradient_of_parts_is_the_mean_of_theirs():
    """Part i of n has rows i, n + i, ... and a key of its own."""

    def step(batch: Any, key: Any) -> tuple[Any, dict[str, Any]]:
        noise = jax.random.normal(key, batch["x"].shape)
        value, grad = jax.value_and_grad(lambda w: jnp.mean((w * batch["x"] + noise) ** 2))(2.0)
        return {"w": grad}, {"loss": value}

    batch = {"x": jnp.arange(6.0)}
    keys = jax.random.split(jax.random.key(0), 3)
    grads, metrics = accumulate(step, batch, keys)
    parts = [step({"x": batch["x"][i::3]}, keys[i]) for i in range(3)]
    np.testing.assert_allclose(grads["w"], np.mean([g["w"] for g, _ in parts]), rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], np.mean([m["loss"] for _, m in parts]), rtol=1e-6)
    plain = lambda batch, _: (jax.grad(lambda w: jnp.mean((w * batch["x"]) ** 2))(2.0), {})
    whole, parted = (accumulate(plain, batch, keys[:n])[0] for n in (1, 3))
    np.testing.assert_allclose(whole, parted, rtol=1e-6)  # where nothing is drawn


def test_what_has_learnt_nothing_is_a_plain_transformer_with_a_silent_head():
    """So with `predicts="offset"` it shows the portrait, standing still, at every level."""
    cfg = dataclasses.replace(DIT, predicts="offset")
    dit = fresh(cfg, 3)
    silent = (dit.head.out, dit.time_proj, dit.injectors.attn.o)
    assert not any(np.any(part.kernel[...]) for part in silent)
    gates = np.asarray(dit.blocks.modulation[...])
    np.testing.assert_array_equal(gates[:, (2, 5)], 1.0)
    np.testing.assert_array_equal(gates[:, (0, 1, 3, 4)], 0.0)
    x, pose = (jnp.asarray(np.random.default_rng(i).standard_normal(
        (1, n, 4, 4, cfg.latent_channels), np.float32)) for i, n in ((0, 3), (1, 1)))  # fmt: skip
    for sigma in (0.3, 1.0):
        said = dit.unpatchify(
            dit.head(dit.embed(x, pose), dit.level(jnp.full((1, 3), sigma)).head), 4, 4
        )
        velocity = dit.velocity(said, x, pose, jnp.full((1, 3), sigma))
        shown = np.broadcast_to(pose, x.shape)
        np.testing.assert_allclose(x - sigma * velocity, shown, atol=1e-5)


def test_a_gradient_of_the_base_is_never_made():
    """Of its kernels, one array is the shape in a step that trains adapters: the kernel itself."""
    sizes = dataclasses.replace(DIT, dim=48, ffn_dim=112, heads=4)
    exp = dataclasses.replace(
        FORCING, model=ModelConfig.tiny(dit=sizes, stream=STREAM), adapters=Adapters(8, 8.0),
        accumulate=1,
    )  # fmt: skip
    made = {}
    for trains in ("adapters", "network"):
        own = exp if trains == "adapters" else dataclasses.replace(exp, adapters=None)
        base = jax.eval_shape(lambda: CausalDiT(sizes, rngs=nnx.Rngs(0)))
        frozen = Frozen(base, jax.ShapeDtypeStruct((4, 8), jnp.float32))
        state = jax.eval_shape(functools.partial(forcing.start, own), frozen)
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.float32)
                 for name, shape in SHAPES.batch(2, 4).items()}  # fmt: skip
        step = functools.partial(forcing.train_step, own, ONE_DEVICE)
        text = str(jax.make_jaxpr(step)(frozen, state, batch))
        # Products that give the kernel of ffn_in, on its way to the hidden layer, or its transpose.
        products = [line for line in text.splitlines() if " = dot_general" in line]
        made[trains] = sum("[48,112] = " in line or "[112,48] = " in line for line in products)
    assert made["adapters"] == 0 < made["network"]


# ---- at the published size


def count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in leaves(tree).values())


@pytest.mark.parametrize("exp, stage", [(Forcing(), forcing), (Distill(), distill)])
def test_the_states_of_the_published_network(exp: Any, stage: Any):
    base = jax.eval_shape(lambda: CausalDiT(exp.model.dit, rngs=nnx.Rngs(0)))
    assert count(base) == 16_295_755_609
    adapters = jax.eval_shape(lambda base: initial(exp, base, jax.random.key(0)), base)
    assert count(adapters) == 676_331_520
    frozen = Frozen(base, jax.ShapeDtypeStruct((512, 4096), jnp.float32))
    state = jax.eval_shape(functools.partial(stage.start, exp), frozen)
    sides = [state.student] + ([state.critic] if stage is distill else [])
    for side in sides:
        assert count(side.params) == 676_331_520
        assert count(side.optimiser) - 2 * 676_331_520 in (1, 2)  # two moments, and counters
    assert count(state.average) == 676_331_520
    kinds = {str(leaf.dtype) for leaf in leaves(state).values()}
    assert kinds == {"float32", "int32"}
    whole = dataclasses.replace(exp, adapters=None)
    state = jax.eval_shape(functools.partial(stage.start, whole), frozen)
    assert count(state.student.params) == count(state.average) == 16_295_755_609
    assert {str(leaf.dtype) for leaf in leaves(state).values()} == {"float32", "int32"}
