"""What training keeps from step to step, and how gradients change it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from liveavatar_jax.types import Array, Float, Int, struct
from train.metrics import finite

Metrics = dict[str, Any]


@struct
class Learner:
    """Something that learns: a network, or the adapters of one, and its optimiser. The keys of a
    step are made from the seed and the number of updates."""

    params: Any
    optimiser: Any
    updates: Int[Array, ""]


@struct
class TrainState:
    """Of stage 1."""

    student: Learner
    average: Any  # of the student's parameters; None where none is wanted


@struct
class DistillState:
    """Of stage 2. The critic's parameters are {"network": ..., "discriminator": ... or None}."""

    student: Learner
    critic: Learner
    average: Any


def begin(params: Any, optimiser: optax.GradientTransformation) -> Learner:
    """A learner that has learnt nothing yet."""
    return Learner(params, optimiser.init(params), jnp.zeros((), jnp.int32))


def learn(
    learner: Learner, optimiser: optax.GradientTransformation, grads: Any, clip: float | None
) -> tuple[Learner, Metrics]:
    """One update; gradients are scaled down to a global norm of `clip`.

    The norm before that is reported, and which leaves of the gradient are finite.
    """
    norm = optax.tree.norm(grads)
    metrics = {"grad_norm": norm, "grads": finite(grads)}
    if clip is not None:
        grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / (norm + 1e-6)), grads)
    with jax.numpy_dtype_promotion("standard"):  # which optax counts on
        changes, state = optimiser.update(grads, learner.optimiser, learner.params)
        params = optax.apply_updates(learner.params, changes)
    return Learner(params, state, learner.updates + 1), metrics


def averaged(average: Any, params: Any, decay: float, update: Int[Array, ""], start: int) -> Any:
    """The exponential moving average after update number `update`; a copy until `start`."""
    keep = jnp.where(update > start, decay, 0.0)
    return jax.tree.map(lambda a, p: (keep * a + (1 - keep) * p).astype(a.dtype), average, params)


def accumulate(
    step: Callable[[Any, Any], tuple[Any, Metrics]], batch: Any, keys: Any
) -> tuple[Any, Metrics]:
    """Mean gradients and metrics of `step(part, key)` over as many parts of a batch as keys.

    The parts are taken across the rows, so that each lies over all devices as the batch does.
    """
    parts = len(keys)
    if parts == 1:
        return step(batch, keys[0])
    split = lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(lambda a, b: a + b / parts, total, step(*part)), None

    batch = jax.tree.map(split, batch)
    shapes = jax.eval_shape(step, *jax.tree.map(lambda a: a[0], (batch, keys)))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), shapes)
    return jax.lax.scan(add, zeros, (batch, keys))[0]


def as_metrics(metrics: dict[str, Float[Array, ""]], prefix: str) -> Metrics:
    """Names of one side of the training, "student/..."."""
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
