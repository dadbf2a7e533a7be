"""Rotary phase, timestep embedding, norms."""

import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.models import layers


def exact(position, pairs):
    """Through float64 on the host."""
    return np.multiply.outer(np.asarray(position, np.float64), 1e4 ** (-np.arange(pairs) / pairs))


@pytest.mark.parametrize("start", [0, 255, 40_000, 62_500, 10_000_000, 2_000_000_000])
@pytest.mark.parametrize("pairs", [1, 7, 22])
def test_phase_is_exact_at_any_position(start, pairs):
    position = np.arange(start, start + 40)
    turn = layers.phase(jnp.asarray(position, jnp.int32), pairs)
    np.testing.assert_allclose(turn.cos, np.cos(exact(position, pairs)), atol=1e-6)
    np.testing.assert_allclose(turn.sin, np.sin(exact(position, pairs)), atol=1e-6)


def test_negative_positions_turn_back():
    position = jnp.arange(-20, 0)
    turn = layers.phase(position, 5)
    np.testing.assert_allclose(turn.sin, np.sin(exact(position, 5)), atol=1e-6)
    np.testing.assert_allclose(turn.cos, np.cos(exact(position, 5)), atol=1e-6)


def test_timesteps_between_integers_are_exact():
    t = np.asarray([0.0, 8.928571, 602.15057, 857.6923, 999.9999], np.float32)
    ours = layers.timestep_sinusoid(jnp.asarray(t), 64)
    angle = exact(t, 32)
    np.testing.assert_allclose(ours[:, :32], np.cos(angle), atol=1e-6)
    np.testing.assert_allclose(ours[:, 32:], np.sin(angle), atol=1e-6)


def test_products_of_rotated_vectors_depend_on_the_distance_only():
    q, k = np.random.default_rng(0).standard_normal((2, 1, 2, 1, 24)).astype(np.float32)

    def product(a, b):
        turned = []
        for x, at in ((q, a), (k, b)):
            turn = layers.grid_phase(jnp.asarray([[at]]), jnp.arange(1), jnp.arange(1), 24)
            turned.append(layers.rotate(jnp.asarray(x), turn))
        return np.asarray((turned[0] * turned[1]).sum(-1))

    np.testing.assert_allclose(product(5, 2), product(1_000_005, 1_000_002), atol=2e-5)
    assert np.abs(product(5, 2) - product(5, 3)).max() > 1e-2


def test_norms_are_made_in_float32():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)) * 100, jnp.bfloat16)
    y = layers.standardise(x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(-1), 1, atol=1e-4)
