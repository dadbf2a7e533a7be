"""The steps of training as shapes on devices that are not there: no weight is made.

What is compiled is what `train` runs: the one step of stage 1, or those of student and critic.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.sharding import Mesh, NamedSharding

from liveavatar_jax.data.records import Shapes
from liveavatar_jax.models.condition import MOTION_FRAMES
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.parallel.mesh import ROWS, TrainMesh
from liveavatar_jax.parallel.sharding import layout, trained
from liveavatar_jax.plan.aot import Program
from train import distill, forcing
from train.experiment import Distill, Forcing
from train.networks import Frozen
from train.run import load

STEPS = {"step": forcing.train_step, "student": distill.student_step, "critic": distill.critic_step}
BLOCKS = 7  # of a clip of 21 latents, where neither experiment nor data say otherwise


def experiment(config: str, mesh: str | None, changes: Sequence[str]) -> Forcing:
    """The experiment of a config file, of either stage, on another mesh if one is given.

    Raises LiveAvatarError as `train.run.load`, and for a mesh that is not understood.
    """
    exp = load(Path(config), (Forcing, Distill), changes)
    return exp if mesh is None else dataclasses.replace(exp, mesh=TrainMesh.parse(mesh))


def names(exp: Forcing) -> tuple[str, ...]:
    """Of the steps that the experiment runs."""
    return ("student", "critic") if isinstance(exp, Distill) else ("step",)


def shapes(exp: Forcing, size: Sequence[int]) -> Shapes:
    """Of its records: those of its synthetic data, else of `size` in latents (height, width)."""
    if exp.synthetic is not None:
        return exp.synthetic
    dit, stream = exp.model.dit, exp.model.stream
    blocks = (isinstance(exp, Distill) and exp.blocks) or BLOCKS
    return Shapes(
        f=blocks * stream.block_frames, m=MOTION_FRAMES, h=size[0], w=size[1],
        c=dit.latent_channels, layers=dit.audio_layers, audio_dim=dit.audio_dim,
        text_dim=dit.text_dim,
    )  # fmt: skip


def build(
    devices: list[Any],
    step: str,
    config: str,
    mesh: str | None,
    changes: Sequence[str],
    size: Sequence[int],
    kernel: str,
) -> Program:
    """One step of an experiment. `kernel` is the attention where the experiment leaves it open."""
    exp = experiment(config, mesh, changes)
    if exp.model.dit.attention == "auto":
        dit = dataclasses.replace(exp.model.dit, attention=kernel)
        exp = dataclasses.replace(exp, model=dataclasses.replace(exp.model, dit=dit))
    places = exp.mesh.make(devices)
    base = jax.eval_shape(lambda: CausalDiT(exp.model.dit, rngs=nnx.Rngs(0)))
    text: Any = jax.ShapeDtypeStruct((exp.model.dit.text_len, exp.model.dit.text_dim), jnp.bfloat16)
    frozen = Frozen(base=base, negative=text)
    start = distill.start if isinstance(exp, Distill) else forcing.start
    state = jax.eval_shape(functools.partial(start, exp), frozen)  # type: ignore[arg-type]
    frozen, state = _put(frozen, trained(frozen, places)), _put(state, trained(state, places))
    batch = _batch(exp, shapes(exp, size), places)

    def run(frozen: Any, state: Any, batch: Any) -> Any:
        state, metrics = STEPS[step](exp, layout(places), frozen, state, batch)  # type: ignore
        keep = jax.lax.with_sharding_constraint
        return jax.tree.map(lambda a, b: keep(a, b), state, trained(state, places)), metrics

    learners = [state.student, *([state.critic] if isinstance(exp, Distill) else [])]
    parts = {
        "base": frozen,
        "trained": [learner.params for learner in learners],
        "optimisers": [learner.optimiser for learner in learners],
        "average": state.average,
        "batch": batch,
    }
    return Program(run, (frozen, state, batch), places, (1,), parts)


def _batch(exp: Forcing, of: Shapes, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    rows = NamedSharding(mesh, P(ROWS))
    sizes = of.batch(exp.data.batch, exp.data.text_len)
    return {
        name: jax.ShapeDtypeStruct(size, jnp.dtype(of.dtype), sharding=rows)
        for name, size in sizes.items()
    }


def _put(tree: Any, places: Any) -> Any:
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    return jax.tree.map(place, tree, places)
