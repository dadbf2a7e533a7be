"""The objectives against their formulas, written once more in numpy and float64."""

import dataclasses
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax.diffusion.flow import shifted, training_levels
from liveavatar_jax.diffusion.losses import (
    DMD,
    Adversarial,
    AdversarialCritic,
    Critic,
    DiffusionForcing,
    Discriminator,
    FlowMatching,
    Guidance,
    Levels,
    Rewarded,
    Scores,
    SiD,
    TeacherForcing,
)
from liveavatar_jax.types import LiveAvatarError

SHAPE = (3, 6, 2, 4, 5)
KEY = jax.random.key(11)
X = jax.random.normal(jax.random.key(0), SHAPE)
WEIGHT = jax.random.normal(jax.random.key(1), SHAPE[2:])


def over(sigma):
    return np.asarray(sigma, np.float64)[:, None, None, None, None]


def teacher(x, sigma, text, audio):
    """Not linear, and each condition adds something of its own."""
    v = jnp.tanh(x) * (1 + sigma[:, None, None, None, None])
    return v + (0.3 * WEIGHT[None, None] if text else 0.0) + (0.2 * x if audio else 0.0)


def critic(x, sigma):
    return 0.5 * x - 0.1 * sigma[:, None, None, None, None]


SCORES = Scores(teacher, critic)


def noised(levels: Levels):
    """What an objective draws from its key, in float64."""
    noisy, noise, sigma = levels.noised(X, KEY)
    return (np.asarray(a, np.float64) for a in (noisy, noise, sigma))


@pytest.mark.parametrize("guidance", [Guidance(1.0, 1.0), Guidance(4.0, 4.0), Guidance(3.0, 6.0)])
def test_dmd_gradient_is_that_of_the_formula(guidance):
    gradient, _ = DMD(guidance)(X, SCORES, KEY)
    y, _, s = noised(Levels())
    x, sigma = np.asarray(X, np.float64), over(s)
    t = lambda text, audio: (
        np.tanh(y) * (1 + sigma)
        + text * 0.3 * np.asarray(WEIGHT, np.float64)
        + audio * 0.2 * y
    )  # fmt: skip
    none, read, full = t(0, 0), t(1, 0), t(1, 1)
    if guidance.text == guidance.audio:  # w_std of both together
        velocity = none + guidance.text * (full - none)
    else:
        velocity = none + guidance.text * (read - none) + guidance.audio * (full - read)
    fake, real = y - sigma * (0.5 * y - 0.1 * sigma), y - sigma * velocity
    norm = np.abs(x - real).mean(axis=(1, 2, 3, 4), keepdims=True)
    want = (fake - real) / norm / x.size
    np.testing.assert_allclose(gradient, want, atol=2e-6 * np.abs(want).max())


def test_dmd_gradient_is_zero_when_teacher_and_critic_agree():
    same = Scores(lambda x, sigma, text, audio: critic(x, sigma), critic)
    assert np.abs(DMD(Guidance(4.0, 7.0))(X, same, KEY)[0]).max() < 1e-9
    assert np.abs(DMD(Guidance(1.0, 1.0))(X, SCORES, KEY)[0]).max() > 1e-4


def test_a_clip_that_is_the_teachers_own_stays_finite():
    exact = lambda x, sigma, *_: (x - X) / sigma[:, None, None, None, None]
    gradient, _ = DMD(Guidance(1.0, 1.0))(X, Scores(exact, critic), KEY)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("guidance, passes", [((1, 1), 1), ((4, 4), 2), ((4, 1), 3)])
def test_guidance_costs_no_more_passes_than_it_says(guidance, passes):
    calls = []

    def counted(*args):
        calls.append(args)
        return teacher(*args)

    guidance = Guidance(*map(float, guidance))
    guidance.velocity(counted, X, jnp.full(3, 0.5))
    assert len(calls) == guidance.passes == passes


def test_levels_are_shifted_and_kept_within_their_ends():
    sigma = np.asarray(Levels().draw(KEY, 20_000))
    assert sigma.min() == np.float32(0.02) and sigma.max() == np.float32(0.98)
    inside = np.quantile(sigma, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(inside, shifted(np.array([0.25, 0.5, 0.75]), 5.0), atol=0.01)


def test_sid_gradient_is_that_of_the_formula():
    """With linear networks the derivative is short enough to write down."""
    a, b, alpha = 0.7, 0.4, 1.2
    over_ = lambda sigma: sigma[:, None, None, None, None]
    linear = Scores(lambda x, sigma, *_: a * over_(sigma) * x, lambda x, sigma: b * x)
    gradient, _ = SiD(Guidance(1.0, 1.0), alpha=alpha)(X, linear, KEY)
    y, _, s = noised(Levels())
    x, s = np.asarray(X, np.float64), over(s)
    real, fake = 1 - a * s * s, 1 - b * s  # times y
    d, e = real - fake, real - alpha * (real - fake)
    norm = np.abs(x - real * y).mean(axis=(1, 2, 3, 4), keepdims=True)
    want = d * ((1 - s) * (e * y - x) + y * (e * (1 - s) - 1)) / norm / x.size
    np.testing.assert_allclose(gradient, want, atol=2e-6 * np.abs(want).max())


def test_a_reward_weights_each_row():
    reward = jnp.asarray([-1.0, 0.0, 9.0])
    scores = dataclasses.replace(SCORES, reward=lambda x: reward)
    plain, _ = DMD()(X, SCORES, KEY)
    gradient, metrics = Rewarded(DMD(), beta=2.0)(X, scores, KEY)
    weight = over(np.minimum(np.exp(2 * np.asarray(reward)), 20))
    np.testing.assert_allclose(gradient, weight * plain, rtol=1e-6)
    np.testing.assert_allclose(metrics["reward"], 8 / 3, rtol=1e-6)


def realness(x, sigma):
    return jnp.sum(x * WEIGHT[None, None], axis=(2, 3, 4)) - sigma[:, None]


def test_the_adversarial_term_is_added_with_its_weight():
    scores = dataclasses.replace(SCORES, realness=realness)
    gradient, _ = Adversarial(DMD(), weight=0.5)(X, scores, KEY)
    keys = jax.random.split(KEY)
    plain, _ = DMD()(X, SCORES, keys[0])
    noisy, _, sigma = Levels(1.0, 0.0, 1.0).noised(X, keys[1])
    logits = np.asarray(realness(noisy, sigma), np.float64)
    slope = -1 / (1 + np.exp(logits)) / logits.size * (1 - np.asarray(sigma, np.float64)[:, None])
    want = plain + 0.5 * slope[:, :, None, None, None] * np.asarray(WEIGHT, np.float64)
    np.testing.assert_allclose(gradient, want, atol=1e-6 * np.abs(want).max())


def test_the_critic_learns_the_velocity_of_what_was_made():
    loss, _ = Critic()(X, SCORES, None, KEY)
    y, noise, s = noised(Levels())
    want = np.mean((0.5 * y - 0.1 * over(s) - (noise - np.asarray(X, np.float64))) ** 2)
    np.testing.assert_allclose(loss, want, rtol=1e-5)


def test_the_discriminator_learns_to_tell_real_from_made():
    real, objective = X + 1.0, AdversarialCritic(Critic(), weight=2.0, smooth=3.0)
    scores = dataclasses.replace(SCORES, realness=realness)
    loss, metrics = objective(X, scores, real, KEY)
    keys = jax.random.split(KEY, 3)
    levels = Levels(1.0, 0.0, 1.0)
    logits = lambda x: np.asarray(realness(*levels.noised(x, keys[1])[::2]), np.float64)
    soft = lambda z: np.log1p(np.exp(z)).mean()
    near = real + 0.1 * jax.random.normal(keys[2], SHAPE)
    gan = soft(logits(X)) + soft(-logits(real)) + 3 * ((logits(near) - logits(real)) ** 2).mean()
    np.testing.assert_allclose(metrics["discriminator_loss"], gan, rtol=1e-4)
    plain, _ = Critic()(X, SCORES, None, keys[0])
    np.testing.assert_allclose(loss, plain + 2 * gan, rtol=1e-4)


def test_a_discriminator_reads_tokens_and_says_one_number_a_frame():
    judge = Discriminator(8, width=4, rngs=nnx.Rngs(0))
    hidden = jax.random.normal(KEY, (2, 3, 5, 8))
    assert judge(hidden).shape == (2, 3)
    shuffled = hidden[:, :, jnp.asarray([3, 1, 4, 0, 2])]
    np.testing.assert_allclose(judge(shuffled), judge(hidden), atol=1e-6)


# ---- stage 1


@pytest.mark.parametrize("bell", [True, False])
def test_diffusion_forcing_is_the_formula(bell):
    seen = {}

    def velocity(x, sigma, past):
        seen.update(x=x, sigma=sigma, past=past)
        return 0.5 * x

    objective = DiffusionForcing(bell=bell)
    loss, _ = objective(velocity, X, KEY, 2)
    sigma = np.asarray(seen["sigma"])
    assert seen["past"] is None and (sigma[:, ::2] == sigma[:, 1::2]).all()
    assert len(np.unique(sigma)) > 5  # of nine blocks
    levels, weights = training_levels(5.0)
    weight = weights[np.argmin(np.abs(levels[:, None] - sigma.reshape(-1)), axis=0)]
    x, s = np.asarray(X, np.float64), np.asarray(sigma, np.float64)[:, :, None, None, None]
    noise = (np.asarray(seen["x"], np.float64) - (1 - s) * x) / s
    error = ((0.5 * np.asarray(seen["x"]) - (noise - x)) ** 2).mean(axis=(2, 3, 4)).reshape(-1)
    want = (weight * error).mean() if bell else error.mean()
    np.testing.assert_allclose(loss, want, rtol=1e-3)


def test_flow_matching_has_one_level_a_clip():
    """A teacher looks both ways, and knows one level; the rest is as in diffusion forcing."""
    seen = {}

    def velocity(x, sigma, past):
        seen.update(x=x, sigma=sigma)
        return jnp.zeros_like(x)

    FlowMatching(bell=False)(velocity, X, KEY, 3)
    sigma = np.asarray(seen["sigma"])
    assert (sigma == sigma[:, :1]).all() and len(np.unique(sigma[:, 0])) == len(sigma)
    assert DiffusionForcing.causal and not FlowMatching.causal


@pytest.mark.parametrize("together", [0.0, 0.5, 1.0])
def test_a_share_of_clips_has_one_level_for_all_blocks(together):
    """As in the stream, where history keeps the level of its own step."""
    clips = jnp.zeros((400, 6, 1, 1, 1))
    draw = lambda share: np.asarray(DiffusionForcing(together=share)._draw(clips, KEY, 3)[0])
    row, apart = draw(together), draw(0.0)
    one = row[:, 0] == row[:, -1]
    assert abs(one.mean() - together) < 0.08
    np.testing.assert_array_equal(row[~one], apart[~one])
    np.testing.assert_array_equal(row[:, :3], apart[:, :3])


@pytest.mark.parametrize("make", [DiffusionForcing, FlowMatching, TeacherForcing])
def test_errors_of_clean_latents(make):
    """They are those of the velocity times the level."""
    off = lambda x, levels, past: noise - X + 1 / levels[..., None, None, None]
    noise = make(bell=False)._draw(X, KEY, 3)[1]
    loss, metrics = make(bell=False, clean=True)(off, X, KEY, 3)
    np.testing.assert_allclose((loss, metrics["flow_error"]), 1.0, rtol=1e-4)


def test_a_critic_s_errors_of_clean_latents():
    def scored(clean: bool):
        def off(x, sigma):
            noise = (x - (1 - over(sigma)) * X) / over(sigma)
            return noise - X + 1 / over(sigma)

        loss, _ = Critic(Levels(low=0.2), clean)(X, Scores(teacher, off), None, KEY)
        return float(loss)

    assert scored(False) > 1.1
    assert scored(True) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("bell", [True, False])
def test_focus_weighs_rows_and_columns(bell):
    """As if each cell's error were counted that often, with weights of mean 1."""
    zero = lambda x, sigma, past: jnp.zeros_like(x)
    focus = tuple(tuple(float(1 + 3 * (i == 1 and j > 1)) for j in range(4)) for i in range(2))
    loss, metrics = DiffusionForcing(bell=bell, focus=focus)(zero, X, KEY, 3)
    each = []
    for i in range(2):
        for j in range(4):
            alone = tuple(tuple(float((i, j) == (k, l)) for l in range(4)) for k in range(2))
            each.append(focus[i][j] * DiffusionForcing(bell=bell, focus=alone)(zero, X, KEY, 3)[0])
    np.testing.assert_allclose(loss, sum(map(float, each)) / np.sum(focus), rtol=1e-5)
    plain = DiffusionForcing(bell=bell)(zero, X, KEY, 3)[1]["flow_error"]
    np.testing.assert_allclose(metrics["flow_error"], plain, rtol=1e-6)
    channels = tuple(tuple((1.0, 0.0, 2.0, 0.0, 1.0) for _ in range(4)) for _ in range(2))
    loss, _ = DiffusionForcing(bell=False, focus=channels)(zero, X, KEY, 3)
    apart = np.asarray(DiffusionForcing(bell=False)._draw(X, KEY, 3)[1] - X) ** 2
    weights = np.array(channels[0][0]) / np.mean(channels[0][0])
    np.testing.assert_allclose(loss, np.mean(apart * weights), rtol=1e-5)
    with pytest.raises(LiveAvatarError, match=r"focus weights \(2, 3\) rows and columns"):
        DiffusionForcing(focus=((1.0, 1.0, 1.0),) * 2)(zero, X, KEY, 3)


def test_focus_weighs_stage_2_as_well():
    """The gradient of the student, and the critic's errors, as it weights errors in stage 1."""
    focus = tuple(tuple(float(1 + 3 * (i == 1 and j > 1)) for j in range(4)) for i in range(2))
    weights = (np.array(focus) / np.mean(focus))[None, None, :, :, None]
    plain, _ = DMD()(X, SCORES, KEY)
    gradient, _ = DMD(focus=focus)(X, SCORES, KEY)
    np.testing.assert_allclose(gradient, plain * weights, rtol=1e-5)
    still = Scores(SCORES.teacher, lambda x, sigma: jnp.zeros_like(x))
    loss, _ = Critic(focus=focus)(X, still, None, KEY)
    noise = np.asarray(Levels().noised(X, KEY)[1])
    np.testing.assert_allclose(loss, np.mean((noise - np.asarray(X)) ** 2 * weights), rtol=1e-5)
    with pytest.raises(LiveAvatarError, match=r"focus weights \(2, 3\) rows and columns"):
        Critic(focus=((1.0, 1.0, 1.0),) * 2)(X, still, None, KEY)


@pytest.mark.parametrize("augment", [0.0, 0.3])
def test_teacher_forcing_shows_the_real_past(augment):
    def velocity(x, sigma, past):
        error = np.abs(past - X).max(axis=(2, 3, 4))
        assert (error > 0).all() if augment else (error == 0).all()
        return jnp.zeros_like(x)

    TeacherForcing(augment=augment)(velocity, X, KEY, 2)


# ---- what is missing is named


@pytest.mark.parametrize("call, words", [
    (lambda: Rewarded(DMD())(X, SCORES, KEY), "needs a reward"),
    (lambda: Adversarial(DMD())(X, SCORES, KEY), "set `discriminator`"),
    (lambda: AdversarialCritic(Critic())(X, SCORES, None, KEY), "needs real clips"),
])  # fmt: skip
def test_what_an_objective_lacks_is_named(call, words):
    with pytest.raises(LiveAvatarError, match=words):
        call()


def test_objectives_are_static_in_a_program():
    """They hold no arrays, so that a step closes over them and compiles once."""
    objective = Rewarded(Adversarial(SiD()))
    assert not jax.tree.leaves(objective)
    run = jax.jit(functools.partial(DMD(), scores=SCORES))
    run(X, key=KEY)
    run(X + 1, key=jax.random.key(1))
    assert run._cache_size() == 1


def test_the_variant_in_the_readme_is_one():
    """Its gradient is DMD's before the norm, cut off."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "class Huber" in b)
    names = {"nnx": nnx, "jnp": jnp, "Levels": Levels}
    exec(block, names)
    gradient, _ = names["Huber"](0.1)(X, SCORES, KEY)
    plain, _ = DMD(Guidance(1.0, 1.0))(X, SCORES, KEY)
    cut = np.abs(np.asarray(gradient)) * X.size > 0.0999
    assert 0.1 < cut.mean() < 0.9
    assert (np.sign(gradient) == -np.sign(plain)).mean() < 1e-3
