"""Sampler and training schedule against the original's tables."""

import jax.numpy as jnp
import numpy as np

from liveavatar_jax.diffusion import flow


def close(ours, want, **tolerance):
    np.testing.assert_allclose(np.asarray(ours), want, **tolerance)


def test_sampler_levels(fixture):
    want = fixture("scheduler")
    for name in want.tensors:
        if name.startswith("euler.sigmas.n"):
            levels = flow.sampling_levels(int(name.removeprefix("euler.sigmas.n")))
            close(levels, want[name], rtol=1e-6, atol=1e-5)
            timesteps = want[name.replace("sigmas", "timesteps")]
            close(1000 * levels[:-1], timesteps, rtol=0, atol=1e-4)


def test_four_euler_steps(fixture):
    want = fixture("scheduler")
    levels = jnp.asarray(flow.sampling_levels(4))
    x = jnp.asarray(want["in.euler.sample0"])
    for i in range(4):
        x = flow.euler(x, jnp.asarray(want[f"in.euler.velocity{i}"]), levels[i], levels[i + 1])
        close(x, want[f"euler.sample_after{i}"], rtol=1e-6, atol=1e-5)


def test_training_schedule(fixture):
    want = fixture("scheduler")
    levels, weights = flow.training_levels()
    close(levels, want["omni.sigmas"], rtol=1e-6, atol=1e-5)
    close(1000 * levels, want["omni.timesteps"], rtol=0, atol=1e-4)
    close(weights, want["omni.weights"], rtol=1e-6, atol=1e-5)
    index = flow.nearest_level(jnp.asarray(want["in.omni.query_t"]))
    close(index, want["omni.query_index"])
    close(levels[index], want["omni.query_sigma"], rtol=1e-6, atol=1e-5)
    close(weights[index], want["omni.query_weight"], rtol=1e-6, atol=1e-5)
    clean, noise = jnp.asarray(want["in.omni.x0"]), jnp.asarray(want["in.omni.noise"])
    sigma = jnp.asarray(levels[index])[:, None, None, None]
    noised = flow.add_noise(clean[None], noise[None], sigma)
    close(noised, want["omni.noised"], rtol=1e-6, atol=1e-5)
    close(flow.target(clean, noise), want["omni.target"], rtol=1e-6, atol=1e-5)
