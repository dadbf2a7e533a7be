"""Trains the puppet readers, which the metrics of puppets rest on.

    python -m train.readers --out DIR --minutes 3      # DIR/readers.safetensors, readers.json

Pictures are drawn as it goes, never twice the same; a part of them is blurred, coarsened, noisy,
shifted or of other brightness, as what a model generates may be. In the end it is measured on
identities that were not trained on: R² of the mouth and the share of expressions that are right,
on pictures as drawn and on spoilt ones.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from liveavatar_jax.data.puppet import (
    EXPRESSIONS,
    GESTURE_NOISE,
    IDENTITY_NOISE,
    WARM,
    Identity,
    draw,
    gestures,
    identity,
)
from liveavatar_jax.metrics.readers import (
    COLOURS,
    FLAGS,
    READERS,
    SIZE,
    STYLES,
    Reader,
    save,
    weights,
)
from liveavatar_jax.types import Array, Float, Int, Key, LiveAvatarError, struct

BATCH = 96
RATE, DECAY = 2e-3, 1e-4
AVERAGE = 0.995  # of the weights, for the file
TRAIN, HELD_OUT = 0, 2  # splits of identities
MOUTH = ("open", "width", "round")


@struct
class Batch:
    """Pictures and what they were drawn from."""

    frames: Float[Array, "b H W 3"]
    mouth: Float[Array, "b 3"]
    expression: Int[Array, " b"]
    attributes: Float[Array, "b k"]
    seen: Float[Array, "b k"]  # 0 for what cannot be seen, as the colour of no hair


def attributes(who: Identity) -> tuple[Float[Array, "b k"], Float[Array, "b k"]]:
    """What the reader is to say about looks, in 0..1, and 0 where nothing of it is to be seen."""
    bald = who.style["cap"][:, None] < 0.5
    colours = jnp.concatenate([who.colour[name] for name in COLOURS], axis=1)
    flags = jnp.stack([getattr(who, name) for name in FLAGS], axis=1)
    style = jax.nn.one_hot(who.picks["style"], STYLES)
    values = jnp.concatenate([colours, flags, style], axis=1)
    seen = [~bald if name == "hair" else jnp.ones_like(bald) for name in COLOURS]
    seen = [jnp.repeat(each, 3, axis=1) for each in seen]
    rest = jnp.ones((len(values), len(FLAGS) + STYLES), bool)
    return values, jnp.concatenate([*seen, rest], axis=1).astype(jnp.float32)


def mouths(key: Key[Array, ""], b: int) -> Float[Array, "b 3"]:
    """Openings of all sizes, a fifth of them shut; round lips are narrow, as they are in speech."""
    keys = jax.random.split(key, 4)
    shut = jax.random.uniform(keys[1], (b,)) < 0.2
    opened = jnp.where(shut, 0.0, jax.random.uniform(keys[0], (b,)))
    rounded = jnp.maximum(jax.random.uniform(keys[2], (b,), minval=-0.6), 0.0)
    width = 0.6 - 0.5 * rounded + 0.18 * jax.random.normal(keys[3], (b,))
    return jnp.stack([opened, jnp.clip(width, 0.0, 1.0), rounded], axis=1)


def drawn(who: Float[Array, "b k"], key: Key[Array, ""], size: int = SIZE) -> Batch:
    """One frame of each puppet, with any mouth and expression."""
    b = len(who)
    keys = jax.random.split(key, 3)
    mouth = mouths(keys[0], b)
    expression = jax.random.randint(keys[1], (b,), 0, len(EXPRESSIONS))
    noise = jax.random.normal(keys[2], (b, WARM + 1, GESTURE_NOISE))
    puppet = identity(who)
    frames: Any = draw(puppet, gestures(noise, expression, mouth[:, None]), size)[:, 0]
    values, seen = attributes(puppet)
    return Batch(frames, mouth, expression, values, seen)


def spoilt(frames: Float[Array, "b H W 3"], key: Key[Array, ""]) -> Float[Array, "b H W 3"]:
    """As a model might have made them; about a third stays as drawn.

    Blur of up to 1.4 pixels of 64, halved and doubled resolution, shifts of up to 2 pixels, other
    contrast and brightness, and noise.
    """
    b, size = len(frames), frames.shape[1]
    keys = jax.random.split(key, 8)
    some = jax.random.uniform(keys[0], (b, 1, 1)) > 0.33
    at = jnp.arange(size, dtype=jnp.float32)
    sigma = jnp.where(some, jax.random.uniform(keys[1], (b, 1, 1), maxval=1.4), 0.0)
    sigma = jnp.maximum(sigma * size / 64, 0.05)

    def along(key: Array, place: Array) -> Float[Array, "b H H"]:
        """Blur and a shift along rows or columns, as matrices."""
        shift = jnp.where(some, jax.random.uniform(key, (b, 1, 1), minval=-2, maxval=2), 0.0)
        from_ = jnp.clip(at[None, :, None] + shift * size / 64, 0.0, size - 1.0)
        far = from_ - place[None, None, :]
        weight = jnp.exp(-0.5 * (far / sigma) ** 2) + 1e-3 * jnp.maximum(1 - jnp.abs(far), 0.0)
        return weight / weight.sum(axis=2, keepdims=True)

    y = jnp.einsum("brH,bHWc->brWc", along(keys[2], at), frames)
    y = jnp.einsum("bsW,brWc->brsc", along(keys[3], at), y)
    halves = y.reshape(b, size // 2, 2, size // 2, 2, 3).mean(axis=(2, 4))
    coarse = jax.image.resize(halves, y.shape, "linear")
    rough = some & (jax.random.uniform(keys[4], (b, 1, 1)) < 0.25)
    y = jnp.where(rough[..., None], coarse, y)
    hard = jnp.where(some, jax.random.uniform(keys[5], (b, 1, 1), minval=0.85, maxval=1.1), 1.0)
    light = jnp.where(some, 0.05 * jax.random.normal(keys[6], (b, 1, 1)), 0.0)
    grain = jnp.where(some, 0.06, 0.01)[..., None] * jax.random.normal(keys[7], y.shape)
    return jnp.clip(y * hard[..., None] + light[..., None] + grain, -1.0, 1.0)


def loss(network: Reader, batch: Batch) -> Float[Array, ""]:
    _, said = network.raw(batch.frames)
    mouth, expression, looks = jnp.split(said, (3, 3 + len(EXPRESSIONS)), axis=1)
    of_mouth = (jax.nn.sigmoid(mouth) - batch.mouth) ** 2 * jnp.array([[4.0, 1.0, 1.0]])
    log_p = jax.nn.log_softmax(expression)
    of_expression = -jnp.take_along_axis(log_p, batch.expression[:, None], axis=1)
    of_looks = optax.sigmoid_binary_cross_entropy(looks, batch.attributes) * batch.seen
    return 10 * of_mouth.mean() + 0.3 * of_expression.mean() + of_looks.mean()


def optimiser() -> optax.GradientTransformation:
    """AdamW without its rate, which falls with time."""
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(DECAY)
    )


@functools.partial(jax.jit, donate_argnums=0)
def train_step(
    state: tuple[Any, Any, Any], who: Float[Array, "b k"], key: Key[Array, ""],
    rate: Float[Array, ""],
) -> tuple[tuple[Any, Any, Any], Float[Array, ""]]:  # fmt: skip
    """state: the network, its running average, and the optimiser's."""
    network, average, moments = state
    first, second = jax.random.split(key)
    batch = drawn(who, first)
    batch = dataclasses.replace(batch, frames=spoilt(batch.frames, second))
    value, gradient = jax.value_and_grad(loss)(network, batch)
    updates, moments = optimiser().update(gradient, moments, network)
    network = jax.tree.map(lambda x, u: x - rate * u, network, updates)
    average = jax.tree.map(lambda a, x: AVERAGE * a + (1 - AVERAGE) * x, average, network)
    return (network, average, moments), value


def train(minutes: float, seed: int = 0, steps: int | None = None) -> tuple[Reader, int]:
    """The averaged weights, and how many steps there was time for; the rate falls with time."""
    network = jax.jit(lambda: Reader(rngs=nnx.Rngs(seed)))()
    state = network, jax.tree.map(jnp.copy, network), optimiser().init(network)
    random = np.random.default_rng((seed, TRAIN))
    done, began = 0, time.monotonic()
    with tqdm(unit="step", mininterval=2) as bar:
        while (share := _share(done, began, minutes, steps)) < 1:
            rate = RATE * min(1.0, (done + 1) / 50) * (0.5 + 0.5 * np.cos(np.pi * share))
            who = random.random((BATCH, IDENTITY_NOISE), np.float32)
            key = jax.random.fold_in(jax.random.key(seed), done)
            state, value = train_step(state, jnp.asarray(who), key, jnp.float32(rate))
            done += 1
            if done == 1:
                began = time.monotonic()  # compiling is not training
            if done % 20 == 0:
                bar.set_postfix(loss=f"{float(value):.4f}")
            bar.update()
    return state[1], done


def _share(done: int, began: float, minutes: float, steps: int | None) -> float:
    if steps is not None:
        return done / steps
    return (time.monotonic() - began) / (60 * minutes) if done else 0.0


def held_out(seed: int, batches: int, size: int) -> Iterator[tuple[Batch, Batch]]:
    """As drawn, and spoilt."""
    random = np.random.default_rng((seed, HELD_OUT))
    make = jax.jit(functools.partial(drawn, size=size))
    spoil = jax.jit(spoilt)
    for i in range(batches):
        who = random.random((BATCH, IDENTITY_NOISE), np.float32)
        keys = jax.random.split(jax.random.key(1_000_000 + seed + i))
        batch = make(who, keys[0])
        yield batch, dataclasses.replace(batch, frames=spoil(batch.frames, keys[1]))


def measured(network: Reader, seed: int = 0, batches: int = 16, size: int = SIZE) -> dict[str, Any]:
    """R² of each number of the mouth, the share of right expressions and hairstyles, and the mean
    error of looks, on puppets of held-out identities."""
    read = jax.jit(lambda network, frames: network(frames))
    figures: dict[str, Any] = {"pictures": BATCH * batches, "size": size}
    pairs = list(held_out(seed, batches, size))
    for name, which in (("drawn", 0), ("spoilt", 1)):
        true = [pair[which] for pair in pairs]
        seen = [read(network, batch.frames) for batch in true]
        join = lambda field, some: np.concatenate([np.asarray(getattr(x, field)) for x in some])
        mouth, said = join("mouth", true), join("mouth", seen)
        rest = ((said - mouth) ** 2).sum(axis=0) / ((mouth - mouth.mean(axis=0)) ** 2).sum(axis=0)
        right = join("expression", seen).argmax(axis=1) == join("expression", true)
        looks, told = join("attributes", true), join("attributes", seen)
        style = told[:, -STYLES:].argmax(axis=1) == looks[:, -STYLES:].argmax(axis=1)
        error = (np.abs(told - looks) * join("seen", true)).sum() / join("seen", true).sum()
        figures[name] = {
            **{f"R2 {k}": float(1 - r) for k, r in zip(MOUTH, rest, strict=True)},
            "expression": float(right.mean()),
            "hairstyle": float(style.mean()),
            "attributes": float(error),
        }
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train.readers", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of readers.safetensors")
    parser.add_argument("--minutes", type=float, default=3.0, help="of training (default: 3)")
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LiveAvatarError(f"cannot write {args.out}: {error.strerror}") from None
    network, steps = train(args.minutes, args.seed, args.steps)
    path = args.out / READERS
    save(path, network)
    figures = {"weights": weights(), "steps": steps, "batch": BATCH, **measured(network, args.seed)}
    (args.out / "readers.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LiveAvatarError as error:
        sys.exit(f"train.readers: {error}")
