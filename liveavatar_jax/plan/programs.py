"""The programs of a pipeline as shapes on devices that are not there: no weight is made.

`Program.parts` are what lies on a device between two ticks, by name.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx
from jax import P
from jax.sharding import Mesh, NamedSharding

from liveavatar_jax.config import ModelConfig, from_dict
from liveavatar_jax.models.quantise import quantise
from liveavatar_jax.parallel import stages
from liveavatar_jax.parallel.mesh import STAGE, MeshSpec
from liveavatar_jax.parallel.pipeline import Pipeline
from liveavatar_jax.parallel.sharding import OPENING, STATE, WEIGHTS, of_decoder, shardings
from liveavatar_jax.plan.aot import Program
from liveavatar_jax.stream import Avatar, StreamState


@dataclasses.dataclass(frozen=True)
class Plan:
    """A pipeline on the devices of a topology, and the shapes of its weights."""

    pipeline: Pipeline
    dit: Avatar
    vae: Avatar

    @classmethod
    def of(
        cls, devices: list[Any], config: dict, mesh: str, size: list[int], rows: int, weights: str
    ) -> "Plan":
        """`config` as of `config.to_dict`, `size` in latents; `weights` other than bf16 are those
        of `quantise`."""
        cfg: ModelConfig = from_dict(ModelConfig, config)
        pipeline = Pipeline(cfg, MeshSpec.parse(mesh), *size, rows=rows, devices=devices)
        avatar = jax.eval_shape(lambda: Avatar(cfg, rngs=nnx.Rngs(0)))
        if weights != "bf16":
            avatar.dit = jax.eval_shape(lambda dit: quantise(dit, weights), avatar.dit)
        dit, vae = stages.split(avatar)
        return cls(pipeline, _put(dit, shardings(dit, WEIGHTS, pipeline.meshes.stages)), vae)


def stage(devices: list[Any], **request: Any) -> Program:
    """A tick of the stages."""
    plan = Plan.of(devices, **request)
    pipeline, mesh = plan.pipeline, plan.pipeline.meshes.stages
    state = pipeline.shapes.stages
    state = _put(state, shardings(state, STATE, mesh, lead=(STAGE,)))
    flight = _on(mesh, P(STAGE), pipeline.shapes.flight)
    chunk = jax.eval_shape(lambda a: stages.lead(a, pipeline.spec.stage), pipeline.shapes.chunk)
    given = (plan.dit, state, flight, _on(mesh, P(STAGE), chunk))
    return Program(pipeline._tick, given, mesh, (1, 2), _parts(plan.dit, state, flight))


def opening(devices: list[Any], **request: Any) -> Program:
    """A block of a stream that is not in the pipeline yet, on all stages (`Pipeline.warm`)."""
    alone: dict[str, Any] = request | {"rows": 1}
    plan = Plan.of(devices, **alone)
    pipeline, mesh = plan.pipeline, plan.pipeline.meshes.stages
    session = pipeline.shapes.session
    session = _put(session, shardings(session, OPENING, mesh))
    chunk = _on(mesh, P(), pipeline.shapes.chunk)
    given = (plan.dit, session, chunk)
    return Program(pipeline._warm, given, mesh, (1,), _parts(plan.dit, session))


def decoder(devices: list[Any], **request: Any) -> Program:
    """A block of latents to frames."""
    plan = Plan.of(devices, **request)
    pipeline, mesh = plan.pipeline, plan.pipeline.meshes.vae
    cache, width = pipeline.shapes.decoder[pipeline.rows], pipeline.shapes.session.first.shape[3]
    cache = _put(cache, shardings(cache, of_decoder(pipeline.rows, width, mesh.size), mesh))
    vae, flight = _on(mesh, P(), plan.vae), pipeline.shapes.flight
    x, live = jax.eval_shape(lambda a: (a.x[:1], a.live[:1]), flight)
    given = (vae, cache, *_on(mesh, P(), (x, live)))
    decode = pipeline._decode[pipeline.rows]
    return Program(decode, given, mesh, (1,), {"weights": vae, "cache": cache})


def _parts(dit: Avatar, state: StreamState, *flight: Any) -> dict[str, Any]:
    cache = state.cache
    rest = dataclasses.replace(state, cache=None, text=None)
    return {
        "weights": dit,
        "ring": cache.ring,
        "sink": cache.sink,
        "prompt": state.text,
        "in flight, rest": (rest, flight),
    }


def _put(tree: Any, places: Any) -> Any:
    place = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    return jax.tree.map(place, tree, places)


def _on(mesh: Mesh, spec: P, tree: Any) -> Any:
    return _put(tree, jax.tree.map(lambda _: NamedSharding(mesh, spec), tree))
