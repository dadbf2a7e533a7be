"""A plan of training: its steps compiled for a pod that is not there, and what follows."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from liveavatar_jax.data.records import Shapes
from liveavatar_jax.parallel.collectives import Collective
from liveavatar_jax.parallel.mesh import TrainMesh
from liveavatar_jax.plan import steps
from liveavatar_jax.plan.aot import Compiled, compile_ahead
from liveavatar_jax.plan.chips import Chip, chip
from liveavatar_jax.plan.cost import Cost, Size
from liveavatar_jax.plan.report import latents
from liveavatar_jax.plan.training import Phase, critic, forcing, recipe, student, total
from liveavatar_jax.types import LiveAvatarError
from train.experiment import Distill, Forcing

_COUNTS = {"step": forcing, "student": student, "critic": critic}


@dataclasses.dataclass(frozen=True)
class Request:
    """The wishes of the command line."""

    config: str
    topology: str = "v5p:4x4x4"
    mesh: str | None = None
    changes: Sequence[str] = ()
    size: str = "720*400"  # where neither experiment nor data say
    compile: bool = True
    timeout: float = 3600.0


@dataclasses.dataclass(frozen=True)
class Pod:
    """Chips of one kind, in slices of TPUs or in hosts of GPUs."""

    chip: Chip
    devices: int
    slices: int = 1

    @property
    def island(self) -> int:
        """Devices that fast links join."""
        return self.devices // self.slices if self.chip.platform == "tpu" else self.chip.host

    def rate(self, groups: Sequence[Sequence[int]]) -> float:
        """Bytes per second that a device of a collective sends: on a TPU along both directions of
        one dimension of the torus; beyond the island all its members send side by side."""
        inside = self.chip.link * (2 if self.chip.platform == "tpu" else 1)
        beside = [[member // self.island for member in group] for group in groups]
        if all(len(set(places)) == 1 for places in beside):
            return inside
        return min(inside, self.chip.network * max(places.count(places[0]) for places in beside))


@dataclasses.dataclass(frozen=True)
class Step:
    """One jitted step. FLOPs and bytes are those of one device."""

    phases: Mapping[str, Phase]
    compiled: Compiled | None
    caches: float  # bytes of rings and sink within the temporaries
    links: float  # seconds that collectives take, one after the other
    chip: Chip

    @property
    def products(self) -> float:
        """Seconds of products at the peak, or of the least traffic with the memory."""
        run = total(self.phases).run
        return max(run.flops / self.chip.peak["bf16"], run.bytes / self.chip.bandwidth)

    @property
    def seconds(self) -> tuple[float, float]:
        """At least: collectives beside the products, and behind them."""
        return max(self.products, self.links), self.products + self.links

    @property
    def utilisation(self) -> tuple[float, float]:
        """Model FLOPs against the peak in those seconds: no step reaches more."""
        model = total(self.phases).model.flops / self.chip.peak["bf16"]
        best, worst = self.seconds
        return model / best, model / worst

    @property
    def peak(self) -> float | None:
        """Bytes at the peak, or those the compiler asked for; None where nothing was compiled."""
        if self.compiled is None:
            return None
        memory = self.compiled.memory
        return float(self.compiled.needed or 0) if memory is None else float(memory.peak)

    @property
    def fits(self) -> bool:
        memory = self.compiled and self.compiled.memory
        return memory is not None and memory.peak <= self.chip.memory


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is known of one plan."""

    pod: Pod
    mesh: TrainMesh
    batch: int
    shapes: Shapes
    remat: str
    steps: Mapping[str, Step]
    ratio: int  # steps of the critic for each of the student


def parse(topology: str, slices: int) -> Pod:
    """ "v5p:4x4x8", "v6e:8x8", "h100:64" or "h100:8x8" (hosts x GPUs); of each slice.

    Raises LiveAvatarError for an unknown chip and for a slice that is not listed.
    """
    name, _, shape = topology.partition(":")
    target = chip(name)
    if not re.fullmatch(r"\d+(x\d+)*", shape):
        raise LiveAvatarError(
            f"--topology {topology!r} is not understood; write v5p:4x4x4, v6e:8x8 or h100:64"
        )
    count = math.prod(map(int, shape.split("x")))
    if target.platform == "tpu" and shape not in target.target.values():
        known = ", ".join(target.target.values())
        raise LiveAvatarError(f"--topology {topology!r}: {name} is listed as {known}")
    return Pod(target, count * (slices if target.platform == "tpu" else 1),
               slices if target.platform == "tpu" else 1)  # fmt: skip


def plan(request: Request) -> Report:
    """Compiles and counts what is asked; no device is touched in this process.

    Raises LiveAvatarError for what cannot be planned; what is too large for the chip is a result.
    """
    exp = steps.experiment(request.config, request.mesh, request.changes)
    pod, size = parse(request.topology, exp.mesh.slices), latents(request.size)
    if exp.mesh.devices != pod.devices:
        raise LiveAvatarError(
            f"mesh {exp.mesh} has {exp.mesh.devices} devices, and {request.topology} has "
            f"{pod.devices}; give --mesh with that product"
        )
    exp.mesh.check(exp.model.dit, exp.data.batch // exp.accumulate)
    shapes = steps.shapes(exp, size)
    found = {name: _step(request, exp, pod, shapes, name) for name in steps.names(exp)}
    ratio = exp.schedule.ratio - exp.schedule.alone if isinstance(exp, Distill) else 0
    return Report(pod, exp.mesh, exp.data.batch, shapes, exp.model.dit.remat, found, ratio)


def _step(request: Request, exp: Forcing, pod: Pod, shapes: Shapes, name: str) -> Step:
    size = Size(shapes.h, shapes.w)
    share = exp.data.batch / pod.devices
    phases = {
        phase: Phase(_share(each.model, share, exp), _share(each.again, share, exp))
        for phase, each in _COUNTS[name](exp.model, size, recipe(exp, shapes)).items()
    }
    compiled = _compiled(request, exp, pod, shapes, name) if request.compile else None
    links = (
        math.fsum(_seconds(each, pod, exp) for each in compiled.collectives) if compiled else 0.0
    )
    return Step(phases, compiled, _caches(exp, size, share, name), links, pod.chip)


def _share(cost: Cost, rows: float, exp: Forcing) -> Cost:
    """Of one device, from one row's; a pass reads its part of the weights once for all rows."""
    weights = cost.bytes_weights * exp.accumulate / exp.mesh.tensor
    return dataclasses.replace(cost * rows, bytes_weights=weights)


def _compiled(request: Request, exp: Forcing, pod: Pod, shapes: Shapes, name: str) -> Compiled:
    """Where the experiment leaves the choice, attention is Pallas' on a TPU; for a GPU it is
    chunked, for cuDNN would have to be installed to compile its kernel."""
    return compile_ahead(
        "liveavatar_jax.plan.steps:build",
        pod.chip,
        pod.devices,
        request.timeout,
        slices=pod.slices,
        loops=(exp.model.stream.steps - 1) / 2,  # steps before the exit, on average
        step=name,
        config=request.config,
        mesh=str(exp.mesh),
        changes=list(request.changes),
        size=[shapes.h, shapes.w],
        kernel="pallas" if pod.chip.platform == "tpu" else "chunked",
    )


def _seconds(each: Collective, pod: Pod, exp: Forcing) -> float:
    """Branches in a loop are taken by the layers that hear audio."""
    dit = exp.model.dit
    share = len(dit.inject_layers) / dit.layers if each.in_branch and each.in_loop else 1.0
    return each.sent * (each.times or 0.0) * share / pod.rate(each.groups)


def _caches(exp: Forcing, size: Size, rows: float, name: str) -> float:
    """Rings and sink, which a rollout keeps in 16 bits."""
    if name == "step" or not isinstance(exp, Distill):
        return 0.0
    dit, stream = exp.model.dit, exp.model.stream
    rings = stream.rings if exp.policy.history == "stream" else 1
    tokens = rings * stream.ring_blocks * stream.block_frames * size.frame
    return rows * 4.0 * dit.dim * dit.layers * (tokens + size.sink(stream.motion))
