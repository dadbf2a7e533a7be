"""The networks that read puppets: what they are taught, and that they can read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from liveavatar_jax.data.identity import HAIRSTYLES
from liveavatar_jax.data.puppet import EXPRESSIONS, IDENTITY_NOISE, identity
from liveavatar_jax.metrics import readers
from liveavatar_jax.metrics.readers import ATTRIBUTES, READERS, load
from liveavatar_jax.weights.packed import PRESET, PRESETS
from train.readers import attributes, measured, mouths, spoilt, train

SHIPPED = PRESETS / PRESET / READERS


def test_what_is_taught_about_looks_is_what_they_are():
    """All in 0..1; one hairstyle each; and of no hair no colour is asked."""
    noise = np.random.default_rng(0).random((200, IDENTITY_NOISE), np.float32)
    who = identity(jnp.asarray(noise))
    values, seen = (np.asarray(x) for x in attributes(who))
    assert values.shape == seen.shape == (200, ATTRIBUTES)
    assert readers.STYLES == len(HAIRSTYLES) and readers.EXPRESSIONS == len(EXPRESSIONS)
    assert (values >= 0).all() and (values <= 1).all()
    np.testing.assert_allclose(values[:, :3], who.colour["skin"], atol=1e-6)
    style = values[:, -readers.STYLES :]
    assert (style.sum(axis=1) == 1).all() and (style.argmax(axis=1) == who.picks["style"]).all()
    bald = np.asarray(who.picks["style"]) == list(HAIRSTYLES).index("no")
    assert bald.any() and (seen[bald, 3:6] == 0).all() and (seen[~bald] == 1).all()


def test_mouths_are_of_all_sizes_and_round_ones_narrow():
    mouth = np.asarray(mouths(jax.random.key(0), 4000))
    assert mouth.min() >= 0 and mouth.max() <= 1
    assert 0.15 < (mouth[:, 0] == 0).mean() < 0.25 and mouth[:, 0].max() > 0.95
    assert np.corrcoef(mouth[:, 1], mouth[:, 2])[0, 1] < -0.4


def test_pictures_are_spoilt_but_remain_pictures():
    """Some more and some less; a flat one stays flat but for its grain and its light."""
    random = np.random.default_rng(1)
    frames = jnp.asarray(random.uniform(-1, 1, (48, 64, 64, 3)).astype(np.float32))
    got = np.asarray(jax.jit(spoilt)(frames, jax.random.key(2)))
    assert np.isfinite(got).all() and np.abs(got).max() <= 1
    apart = np.abs(got - np.asarray(frames)).mean(axis=(1, 2, 3))
    assert 0.15 < (apart < 0.02).mean() < 0.55 and (apart > 0.2).mean() > 0.3
    flat = np.asarray(jax.jit(spoilt)(jnp.full((16, 64, 64, 3), 0.3), jax.random.key(3)))
    assert np.abs(flat.mean(axis=(1, 2)) - 0.3).max() < 0.25 and flat.std(axis=(1, 2)).max() < 0.08


@pytest.mark.slow
def test_a_minute_of_training_opens_its_eyes():
    network, steps = train(1.0, steps=150)
    assert steps == 150
    figures = measured(network, batches=2)
    assert figures["drawn"]["R2 open"] > 0.4 and figures["drawn"]["expression"] > 0.35


def test_the_readers_that_are_shipped_can_read():
    """Identities that they have not seen, as drawn and spoilt."""
    if not SHIPPED.is_file():
        pytest.skip(f"no {SHIPPED.name} in the preset")
    figures = measured(load(SHIPPED), batches=2)
    for name, least in (("drawn", (0.95, 0.9)), ("spoilt", (0.93, 0.85))):
        assert figures[name]["R2 open"] > least[0] and figures[name]["expression"] > least[1]
