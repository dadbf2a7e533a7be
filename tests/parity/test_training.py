"""The loss of stage 1 against the original's training forward, schedule and weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.diffusion.flow import nearest_level
from liveavatar_jax.diffusion.losses import DiffusionForcing
from liveavatar_jax.models.clip import Condition, causal

from .conftest import after_repeats, features, latents


class Drawn(DiffusionForcing):
    """With rows of the schedule and noise that are given instead of drawn."""

    def __init__(self, row, noise, **how):
        super().__init__(**how)
        self.row, self.noise = row, noise

    def _draw(self, clean, key, size):
        return self.row, self.noise


@pytest.fixture(scope="module")
def forward(dit, fixture):
    """The network on the clip of the fixture, at its own timesteps: (x) -> velocity."""
    want, common = fixture("dit_train"), fixture("dit_common")
    reference, motion = (latents(common[f"in.{n}_latents"]) for n in ("ref", "motion"))
    patches = (reference.shape[2] // 2) * (reference.shape[3] // 2)

    @jax.jit
    def velocity(dit, x):
        text = dit.text(jnp.asarray(common["in.context"])[None])
        heard = dit.audio(after_repeats(features(want["in.audio"])))
        given = Condition(reference, motion, text, heard, jnp.ones((1, 1, 1, patches)),
                          latents(want["in.cond_states"]))  # fmt: skip
        sigma = jnp.asarray(want["in.t_blockwise"]) / 1000
        return causal(dit, x, sigma, given, block_frames=want.sidecar["frames_per_block"])

    return functools.partial(velocity, dit)


@pytest.mark.parametrize("bell", [False, True])
def test_diffusion_forcing_loss(forward, fixture, bell):
    want, schedule = fixture("dit_train"), fixture("scheduler")
    t, goal = want["in.t_blockwise"], latents(want["in.target"])
    row = nearest_level(jnp.asarray(t))
    # The row whose level is nearest to t has another one; clip and noise are chosen for it, so
    # that the network gets the x and learns the target of the fixture.
    level = jnp.asarray(schedule["omni.sigmas"])[row][..., None, None, None]
    clean = latents(want["in.x"]) - level * goal
    objective, frames = Drawn(row, clean + goal, bell=bell), want.sidecar["frames_per_block"]

    def velocity(x, sigma, past):
        assert past is None
        np.testing.assert_allclose(x, latents(want["in.x"]), atol=1e-5)
        np.testing.assert_allclose(1000 * sigma, t, atol=1.5)
        return forward(x)

    loss, metrics = objective(velocity, clean, jax.random.key(0), frames)
    np.testing.assert_allclose(metrics["flow_error"], want["loss"][0], rtol=1e-5)
    error = np.asarray(want["velocity.blockwise_t"], np.float64) - want["in.target"][0]
    rows = np.abs(schedule["omni.timesteps"][:, None] - t).argmin(axis=0)
    weight = schedule["omni.weights"][rows] if bell else np.ones(len(rows))
    expected = np.mean(weight * np.mean(error**2, axis=(0, 2, 3)))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert not bell or abs(float(loss) / want["loss"][0] - 1) > 0.01


def test_diffusion_forcing_noises_aims_and_weights_as_the_original(fixture):
    want = fixture("scheduler")
    row = nearest_level(jnp.asarray(want["in.omni.query_t"]))[:, None]
    last = lambda x: jnp.asarray(np.moveaxis(x, -3, -1))  # [c h w] to [h w c]
    clips = lambda x: jnp.broadcast_to(last(x), (len(row), 1, *last(x).shape))
    clean, noise = clips(want["in.omni.x0"]), clips(want["in.omni.noise"])

    def velocity(x, sigma, past):
        np.testing.assert_allclose(x[:, 0], last(want["omni.noised"]), rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(sigma[:, 0], want["omni.query_sigma"], rtol=1e-6, atol=1e-5)
        return jnp.zeros_like(x)

    loss, _ = Drawn(row, noise)(velocity, clean, jax.random.key(0), 1)
    aim = np.mean(np.asarray(want["omni.target"], np.float64) ** 2)
    np.testing.assert_allclose(loss, np.mean(want["omni.query_weight"]) * aim, rtol=1e-5)
