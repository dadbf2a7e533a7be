"""A plan: what is asked, what is compiled and counted for it, and what follows."""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

from liveavatar_jax.config import ModelConfig, from_dict, to_dict
from liveavatar_jax.parallel.collectives import bytes_by_axes
from liveavatar_jax.parallel.mesh import MeshSpec
from liveavatar_jax.plan.aot import Compiled, compile_ahead
from liveavatar_jax.plan.chips import Chip, chip
from liveavatar_jax.plan.cost import Cost, Size, decode, forward, held, prefill, reduced
from liveavatar_jax.plan.projection import WEIGHT_BYTES, Projection, project, sharing
from liveavatar_jax.types import LiveAvatarError


@dataclasses.dataclass(frozen=True)
class Request:
    """The wishes of the command line; `changes` are those of `configure`."""

    mesh: str = "stage=4,vae=1"
    chip: str = "h800"
    weights: str = "bf16"
    size: str = "720*400"
    sessions: Sequence[int] = (1,)
    steps: Sequence[int] | None = None  # to project; None: 2, 3, 4 and the mesh's
    changes: Sequence[str] = ()
    compile: bool = True
    timeout: float = 1800.0  # seconds a program


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is known of one plan. Bytes of one device."""

    chip: Chip
    mesh: MeshSpec
    pixels: tuple[int, int]  # width, height
    weights: str  # dtype of products with weights
    sessions: int  # those of the compiled programs and of `held`
    held: dict[str, float]  # counted: what a stage's device keeps
    compiled: dict[str, Compiled]  # by program: stage, opening, decoder; may be empty
    injected: float  # share of the layers that hear audio: how often their branch is taken
    costs: dict[str, Cost]  # of one device and one tick, by program
    projections: Sequence[Projection]

    def needed(self, sessions: int) -> float:
        """Bytes of a stage's device while all programs that it has are in use.

        For other numbers of sessions than the compiled one, all but the weights is taken to grow
        with them. Where nothing is compiled, this is what lies there between two ticks.
        """
        more = sessions / self.sessions
        if not self.compiled:
            weights = self.held["weights"]
            return weights + (sum(self.held.values()) - weights) * more
        own = {name: each for name, each in self.compiled.items() if name != "decoder"}
        if not self.mesh.vae:
            own = self.compiled
        refused = [each.needed or 0 for each in own.values() if each.memory is None]
        if refused:
            return float(max(refused)) * max(1.0, more)
        memories = {name: each.memory for name, each in own.items() if each.memory}
        stage = memories["stage"]
        weights = stage.parts["weights"]
        fixed, growing = float(weights), float(stage.arguments - weights)
        if "opening" in memories:  # a stream that is not in the pipeline yet, of the same weights
            fixed += memories["opening"].arguments - memories["opening"].parts["weights"]
        if "decoder" in memories:
            fixed += memories["decoder"].parts["weights"]
            growing += memories["decoder"].arguments - memories["decoder"].parts["weights"]
        at_work = {name: each.outputs + each.temporaries for name, each in memories.items()}
        once = at_work.pop("opening", 0)
        return fixed + growing * more + max(once, max(at_work.values()) * more)

    def fits(self, sessions: int) -> bool:
        return self.needed(sessions) <= self.chip.memory


def configure(changes: Sequence[str], stages: int) -> ModelConfig:
    """The published config with `changes` such as "dit.layers=60", values as in JSON; as many
    steps as stages unless they say otherwise.

    Raises LiveAvatarError for unknown fields and values that do not fit.
    """
    values = to_dict(ModelConfig())
    values["stream"]["steps"] = stages
    for change in changes:
        path, given, text = change.partition("=")
        *rooms, field = path.split(".")
        inside: Any = values
        for room in rooms:
            inside = inside.get(room) if isinstance(inside, dict) else None
        if not given or not field or not isinstance(inside, dict):
            raise LiveAvatarError(
                f"--set {change!r} is not understood; write ROOM.FIELD=VALUE, as in dit.layers=60, "
                f"where the room is one of {', '.join(values)}"
            )
        try:
            inside[field] = json.loads(text)
        except json.JSONDecodeError:
            inside[field] = text
    return from_dict(ModelConfig, values)


def latents(size: str) -> tuple[int, int]:
    """Height and width in latents of a picture such as "720*400" (width*height in pixels).

    Raises LiveAvatarError for anything else, and for sides that are no multiples of 16.
    """
    match = re.fullmatch(r"(\d{1,5})\s*[*xX×]\s*(\d{1,5})", size.strip())
    sides = [int(side) for side in match.groups()] if match else [1]
    if any(side % 16 or not side for side in sides):
        raise LiveAvatarError(
            f"--size {size!r} must be WIDTH*HEIGHT in multiples of 16 pixels, as in 720*400"
        )
    return sides[1] // 8, sides[0] // 8


def plan(request: Request) -> Report:
    """Compiles and counts what is asked; no device is touched in this process.

    Raises LiveAvatarError for what cannot be planned; what is too large for the chip is a result.
    """
    spec, target = MeshSpec.parse(request.mesh), chip(request.chip)
    projected_steps = request.steps or sorted({2, 3, 4, spec.stage})
    for name, numbers in (("sessions", request.sessions), ("steps", projected_steps)):
        if min(numbers) < 1:
            raise LiveAvatarError(f"--{name} must be at least 1")
    if request.weights not in WEIGHT_BYTES:
        known = ", ".join(WEIGHT_BYTES)
        raise LiveAvatarError(f"--weights {request.weights} must be one of {known}")
    cfg, (height, width) = configure(request.changes, spec.stage), latents(request.size)
    size = Size(height, width, request.sessions[0], WEIGHT_BYTES[request.weights])
    spec.check(cfg, width, size.rows)
    compiled = _compiled(request, cfg, spec, target, size) if request.compile else {}
    inside = {"tensor": spec.tensor, "sequence": spec.sequence}
    injected = len(cfg.dit.inject_layers) / cfg.dit.layers
    tick, opening = (_sent(compiled.get(name), injected) for name in ("stage", "opening"))

    def projected(steps: int, sessions: int) -> Projection:
        each = dataclasses.replace(size, rows=sessions)
        more = sessions / size.rows
        sent = reduced(cfg, each, **inside) if tick is None else tick * more
        once = None if opening is None else opening / spec.stage
        return project(
            cfg, each, target, steps=steps, weights=request.weights, sent=sent, opening=once,
            decoders=spec.vae, **inside,
        )  # fmt: skip

    once, pixels = dataclasses.replace(size, rows=1), dataclasses.replace(size, weight_bytes=4)
    beside = sharing(spec.vae, min(spec.stage_devices, target.host), width)
    return Report(
        chip=target,
        mesh=spec,
        pixels=(8 * width, 8 * height),
        weights=request.weights,
        sessions=size.rows,
        held=held(cfg, size, **inside),
        compiled=compiled,
        injected=injected,
        costs={
            "stage": forward(cfg, size).split(**inside),
            "sink's refresh": prefill(cfg, once).split(**inside),
            "decoder": decode(cfg, pixels).split(sequence=beside),
        },
        projections=[projected(s, n) for s in projected_steps for n in request.sessions],
    )


def _compiled(
    request: Request, cfg: ModelConfig, spec: MeshSpec, target: Chip, size: Size
) -> dict[str, Compiled]:
    """Where the config leaves the choice, attention is Pallas' on a TPU; for a GPU it is chunked,
    for cuDNN would have to be installed to compile its kernel."""
    if cfg.dit.attention == "auto":
        kernel = "pallas" if target.platform == "tpu" else "chunked"
        cfg = dataclasses.replace(cfg, dit=dataclasses.replace(cfg.dit, attention=kernel))
    names = ["stage", "decoder"]
    if cfg.dit.heads % spec.stage_devices == 0:
        names.insert(1, "opening")
    asked = {
        "config": to_dict(cfg),
        "mesh": str(spec),
        "size": [size.height, size.width],
        "rows": size.rows,
        "weights": request.weights,
    }
    return {
        name: compile_ahead(
            f"liveavatar_jax.plan.programs:{name}", target, spec.devices, request.timeout, **asked
        )
        for name in names
    }


def _sent(compiled: Compiled | None, taken: float) -> float | None:
    """Bytes that a device sends in a run; None if that is not known."""
    if compiled is None or compiled.memory is None:
        return None
    return sum(bytes_by_axes(compiled.collectives, taken).values())
