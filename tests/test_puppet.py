"""The puppet: one picture for numpy and JAX at every size, and a face that does what it is told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.data import puppet
from liveavatar_jax.data.gestures import CHANNELS, FPS

B, F = 6, 4


def people(count=B, seed=0, split=0):
    noise = np.random.default_rng((seed, split)).random((count, puppet.IDENTITY_NOISE))
    return puppet.identity(noise.astype(np.float32))


def still(mouth, expression=0):
    """Poses of puppets that keep still, with a mouth of [b, F, 3]."""
    mouth = np.asarray(mouth, np.float32)
    noise = np.zeros((len(mouth), puppet.WARM + mouth.shape[1], puppet.GESTURE_NOISE), np.float32)
    return puppet.gestures(noise, np.full(len(mouth), expression), mouth)


def lively(count=B, frames=F, seed=0):
    rng = np.random.default_rng(seed)
    shape = (count, puppet.WARM + frames, puppet.GESTURE_NOISE)
    mouth = rng.random((count, frames, 3), dtype=np.float32)
    noise = rng.standard_normal(shape, dtype=np.float32)
    return puppet.gestures(noise, np.arange(count) % 4, mouth)


def openings(*values):
    """One mouth of each opening, as frames of a clip."""
    return [[(value, 0.5, 0.0) for value in values]]


@pytest.fixture(scope="module")
def picture():
    return puppet.draw(people(), lively(), 64)


def test_numpy_and_jax_draw_the_same(picture):
    def film(uniforms, normals, expression, mouth):
        who = puppet.identity(uniforms)
        pose = puppet.gestures(normals, expression, mouth)
        return puppet.draw(who, pose, 64), puppet.regions(who, pose, 64)

    rng = np.random.default_rng(3)
    arrays = (
        rng.random((2, puppet.IDENTITY_NOISE), dtype=np.float32),
        rng.standard_normal((2, puppet.WARM + 2, puppet.GESTURE_NOISE), dtype=np.float32),
        np.array([1, 2], np.int32),
        rng.random((2, 2, 3), dtype=np.float32),
    )
    here, boxes = film(*arrays)
    there, boxes_there = jax.jit(film)(*map(jnp.asarray, arrays))
    assert here.dtype == there.dtype == np.float32 and here.shape == (2, 2, 64, 64, 3)
    # a pixel at an edge, whose share of a shape hangs on the last bits, may differ a little
    assert np.abs(here - there).max() < 2e-3 and np.abs(here - there).mean() < 1e-6
    assert (boxes.mouth == boxes_there.mouth).mean() > 0.999


def test_pictures_lie_within_range(picture):
    assert np.isfinite(picture).all()
    assert picture.min() >= -1 and picture.max() <= 1
    assert picture.max() > 0.8 and picture.min() < -0.7


def test_every_size_is_the_same_picture_scaled(picture):
    large = puppet.draw(people(2), jax.tree.map(lambda x: x[:2], lively()), 256)
    small = large.reshape(2, F, 64, 4, 64, 4, 3).mean(axis=(3, 5))
    error = small - picture[:2]
    assert 10 * np.log10(4 / (error**2).mean()) > 32
    assert np.abs(error).mean() < 0.015


def test_the_same_numbers_give_the_same_picture(picture):
    assert np.array_equal(picture, puppet.draw(people(), lively(), 64))


def test_identities_differ():
    who = people(16)
    faces = puppet.draw(who, still(np.tile([[[0.0, 0.5, 0.0]]], (16, 1, 1))), 32)[:, 0]
    apart = np.abs(faces[:, None] - faces[None]).mean(axis=(2, 3, 4))
    assert apart[~np.eye(16, dtype=bool)].min() > 0.03
    words = [tuple(puppet.traits(who, i).values()) for i in range(16)]
    assert len(set(words)) == 16


def test_splits_share_nobody():
    noise = [np.random.default_rng((5, split)).random((50, 4)) for split in range(3)]
    rows = [tuple(row) for part in noise for row in part]
    assert len(set(rows)) == 150


def dark(who, pose, size=64):
    """Pixels as dark as the inside of a mouth, by count of their shares, within the box."""
    picture = puppet.draw(who, pose, size)
    red = np.clip((-0.30 - picture[..., 0]) / 0.4, 0, 1)
    return (red * puppet.regions(who, pose, size).mouth).sum(axis=(2, 3))[0]


@pytest.mark.parametrize("expression", range(4))
def test_a_mouth_that_opens_grows_darker_inside(expression):
    who = people(40)
    fair = next(  # a dark skin or beard is no darker inside
        i for i in range(40)
        if who.colour["skin"][i, 0] > 0.85 and not who.beard[i] and not who.moustache[i]
    )  # fmt: skip
    one = jax.tree.map(lambda x: x[fair : fair + 1], who)
    area = dark(one, still(openings(*np.linspace(0, 1, 9)), expression))
    assert (np.diff(area) > 0).all()
    assert area[-1] > area[0] + 20


def test_expressions_and_opening_are_told_apart():
    """An expression moves eyes and brows too, an opening leaves them alone."""
    who, size = people(1), 64
    shut, opened = (still(openings(value)) for value in (0.0, 0.9))
    eyes = puppet.regions(who, shut, size).eyes[..., None]
    look = lambda pose: puppet.draw(who, pose, size)
    rest = look(shut)
    assert np.abs((look(opened) - rest) * eyes).max() < 1e-6
    for expression in (1, 2, 3):
        changed = np.abs((look(still(openings(0.0), expression)) - rest) * eyes)
        assert changed.sum() > 20


def test_a_blink_shuts_the_eyes():
    who = people(4)
    awake = still(np.tile([[[0.0, 0.5, 0.0]]], (4, 1, 1)))
    asleep = dataclasses.replace(awake, lids=0 * awake.lids)
    eyes = puppet.regions(who, awake, 64).eyes
    white = [
        ((puppet.draw(who, pose, 64).min(axis=-1) > 0.9) * eyes).sum(axis=(1, 2, 3))
        for pose in (awake, asleep)
    ]
    assert (white[0] > 25).all() and (white[1] < 0.1 * white[0]).all()


def test_blinks_come_now_and_then():
    pose = lively(8, 500)
    shut = pose.lids < 0.25 * pose.lids.max(axis=1, keepdims=True)
    begun = (shut[:, 1:] & ~shut[:, :-1]).sum() / (8 * 500 / FPS)
    assert 0.1 < begun < 0.5  # a second


def test_regions_hold_mouth_and_eyes():
    """All that speech changes lies in the mouth's box, but for the chin."""
    who = people(8)
    mouth = lambda value: np.tile([[value]], (8, 1, 1))
    shut, opened = still(mouth((0.0, 0.5, 0.0))), still(mouth((0.7, 0.9, 0.0)))
    moved = np.abs(puppet.draw(who, opened, 64) - puppet.draw(who, shut, 64)).sum(axis=-1)
    box = puppet.regions(who, shut, 64).mouth
    assert set(np.unique(box)) == {0.0, 1.0} and 0.05 < box.mean() < 0.2
    chin = np.arange(64)[:, None] > 64 * 0.80
    assert (moved * box).sum() > 0.97 * (moved * ~chin).sum()

    asleep = dataclasses.replace(shut, lids=0 * shut.lids)
    moved = np.abs(puppet.draw(who, asleep, 64) - puppet.draw(who, shut, 64)).sum(axis=-1)
    assert (moved * puppet.regions(who, shut, 64).eyes).sum() > 0.99 * moved.sum()


def test_boxes_follow_the_head():
    who, pose = people(1), still(openings(0.0))
    here = puppet.boxes(who, pose)[0]
    aside = puppet.boxes(who, dataclasses.replace(pose, x=pose.x + 0.1))[0]
    np.testing.assert_allclose(aside - here, [[[0, 0.05, 0, 0.05]]], atol=1e-6)


def test_motion_is_smooth():
    pose = lively(4, 200)
    for name in ("x", "y", "zoom", "yaw", "pitch", "roll", "breath", "brow", "smile"):
        value = getattr(pose, name)
        assert np.abs(np.diff(value, axis=1)).max() < 0.35 * (np.ptp(value) + 1e-6), name
        assert np.diff(value, axis=1).std() < 0.2 * value.std(), name


def test_a_clip_may_be_posed_in_parts():
    rng = np.random.default_rng(1)
    shape = (2, puppet.WARM + 40, len(CHANNELS))
    noise = rng.standard_normal(shape, dtype=np.float32)
    mouth, expression = rng.random((2, 40, 3), dtype=np.float32), np.array([0, 2])
    whole = puppet.gestures(noise, expression, mouth)
    part = puppet.gestures(noise[:, 25:], expression, mouth[:, 25:])
    same = lambda a, b: np.testing.assert_allclose(a[:, 25:], b, atol=1e-6)
    jax.tree.map(same, whole, part)
