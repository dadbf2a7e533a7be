"""Pictures that move: by how much, found again, and through fields that fit heads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.data import puppet
from liveavatar_jax.models import motion
from train.clips import at_rest

SIZE = 8


def puppets(count):
    """Portraits of 64 x 64 pixels."""
    who = puppet.identity(
        np.random.default_rng(3).random((count, puppet.IDENTITY_NOISE), np.float32)
    )
    rest = jax.tree.map(lambda x: np.repeat(x, count, axis=0), at_rest())
    return who, jnp.asarray(puppet.draw(who, rest, 64))


def flows(count, frames, key=0):
    """Of what heads do, a pixel or two each."""
    basis = motion.fields(8, 8)
    some = np.random.default_rng(key).normal(size=(count, frames, len(basis)))
    return jnp.asarray(0.5 * np.einsum("b f k, k h w d -> b f h w d", some, basis), jnp.float32)


def test_a_picture_that_does_not_move_stays_what_it_is():
    picture = jax.random.normal(jax.random.key(0), (1, 2, 16, 24, 3))
    np.testing.assert_array_equal(motion.warped(picture, jnp.zeros((1, 2, 16, 24, 2))), picture)


@pytest.mark.parametrize("x, y", [(1, 0), (0, -2), (3, 2)])
def test_pixels_come_from_where_the_field_says(x, y):
    """Whole ones as they are; halves as a cubic through four of them."""
    picture = jax.random.normal(jax.random.key(0), (1, 1, 64, 64, 3))
    flow = jnp.broadcast_to(jnp.asarray([x, y], jnp.float32), (1, 1, 64, 64, 2))
    moved = motion.warped(picture, flow)
    want = jnp.roll(picture, (-y, -x), axis=(2, 3))
    inside = np.s_[:, :, 8:-8, 8:-8]
    np.testing.assert_allclose(moved[inside], want[inside], atol=1e-6)
    half = motion.warped(picture, flow.at[..., 0].add(0.5))
    taps = [jnp.roll(want, -d, axis=3) * w
            for d, w in ((-1, -1 / 16), (0, 9 / 16), (1, 9 / 16), (2, -1 / 16))]  # fmt: skip
    np.testing.assert_allclose(half[inside], sum(taps)[inside], atol=1e-5)


def test_fields_over_pixels_are_bilinear():
    """So what shifts, turns and grows does so in all pixels."""
    y, x = np.meshgrid(*2 * [(np.arange(8) + 0.5) * SIZE], indexing="ij")
    cells = jnp.asarray(np.stack([0.1 * x + 0.3 * y, 1 - 0.2 * x], -1), jnp.float32)
    y, x = np.meshgrid(*2 * [np.arange(64) + 0.5], indexing="ij")
    want = np.stack([0.1 * x + 0.3 * y, 1 - 0.2 * x], -1)
    inside = np.s_[4:-4, 4:-4]
    np.testing.assert_allclose(motion.over_pixels(cells, SIZE)[inside], want[inside], atol=1e-4)


def test_motion_is_found_again():
    """To a seventh of a pixel, where pictures show something; and that of the key is nothing."""
    _, keys = puppets(4)
    true = flows(4, 3)
    wide = motion.over_pixels(true, SIZE)
    frames = motion.warped(jnp.repeat(keys, 3, axis=1), wide)
    search = jax.jit(lambda key, frames: motion.search(key, frames, SIZE))
    found = motion.over_pixels(search(keys, frames), SIZE)
    shown = (jnp.abs(jnp.gradient(keys, axis=3)).max(axis=-1) > 0.1).astype(jnp.float32)
    error = lambda flow: float(
        jnp.sqrt(
            jnp.sum((flow - wide)[..., 0] ** 2 * shown) / jnp.sum(shown * jnp.ones((4, 3, 1, 1)))
        )
    )
    assert error(0 * wide) > 0.5 and error(found) < 0.15
    assert not search(keys, jnp.repeat(keys, 3, axis=1)).any()


def test_mouths_and_eyes_are_not_taken_for_motion():
    """A head that only speaks and blinks stands still, to a quarter of a pixel on average."""
    who, keys = puppets(8)
    rng = np.random.default_rng(0)
    mouth = rng.random((8, 4, 3), np.float32)
    still = np.zeros((8, puppet.WARM + 4, puppet.GESTURE_NOISE), np.float32)
    still[:, puppet.WARM :, -1] = 3.0 * (rng.random((8, 4)) > 0.5)  # blinks
    pose = puppet.gestures(still, np.zeros(8, int), mouth)
    flow = motion.search(keys, jnp.asarray(puppet.draw(who, pose, 64)), SIZE)
    assert float(jnp.abs(flow).mean()) < 0.25


def test_gradients_pass_through_motion():
    picture = jax.random.normal(jax.random.key(0), (1, 1, 16, 16, 3))
    flow = jnp.full((1, 1, 16, 16, 2), 0.3)
    grads = jax.grad(lambda x, flow: jnp.sum(motion.warped(x, flow) ** 2), (0, 1))(picture, flow)
    assert all(jnp.isfinite(g).all() and jnp.abs(g).max() > 0 for g in grads)
