"""What `plan` prints: from results to text, or to plain values for JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from liveavatar_jax.parallel.collectives import Collective, bytes_by_axes
from liveavatar_jax.plan.aot import Compiled, Memory
from liveavatar_jax.plan.chips import GIB, Chip
from liveavatar_jax.plan.cost import Cost
from liveavatar_jax.plan.projection import PUBLISHED_SECONDS, Projection, Roofline


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is known of one plan."""

    chip: Chip
    mesh: dict[str, int]
    pixels: tuple[int, int]  # width, height
    weights: str  # dtype of products with weights
    compiled: dict[str, Compiled]  # by program, such as "stage" and "decoder"; may be empty
    costs: dict[str, Cost]  # of one device and one tick, by program
    projections: Sequence[Projection]


def fits(compiled: Compiled, chip: Chip) -> bool:
    return compiled.memory is not None and compiled.memory.peak <= chip.memory


def to_json(report: Report) -> dict[str, Any]:
    """Plain values; sizes in bytes, times in seconds."""
    return {
        "chip": {"name": report.chip.name, "source": report.chip.source},
        "mesh": report.mesh,
        "pixels": list(report.pixels),
        "weights": report.weights,
        "memory": {
            name: {
                "fits": fits(program, report.chip),
                "limit": report.chip.memory,
                "needed": program.needed,
                "compile_seconds": program.seconds,
                **_sizes(program.memory),
            }
            for name, program in report.compiled.items()
        },
        "collectives": {
            name: [dataclasses.asdict(each) | {"sent": each.sent} for each in program.collectives]
            for name, program in report.compiled.items()
        },
        "costs": {name: dataclasses.asdict(cost) for name, cost in report.costs.items()},
        "projections": [_projection(p) for p in report.projections],
    }


def to_text(report: Report) -> str:
    """Tables for a terminal, with what is compiled, counted and assumed told apart."""
    chip, (width, height) = report.chip, report.pixels
    mesh = ",".join(f"{axis}={size}" for axis, size in report.mesh.items())
    parts = [
        f"{chip.name}, {mesh}, {width}x{height}, {report.weights} weights    [{chip.source}]",
        _memory(report),
        *(_collectives(name, c.collectives) for name, c in report.compiled.items()),
        _costs(report.costs),
        _projections(report.projections),
    ]
    return "\n\n".join(part for part in parts if part)


def _sizes(memory: Memory | None) -> dict[str, Any]:
    return {} if memory is None else {**dataclasses.asdict(memory), "peak": memory.peak}


def _memory(report: Report) -> str:
    limit = report.chip.memory
    lines = []
    for name, program in report.compiled.items():
        memory = program.memory
        if memory is None:
            needed = (program.needed or 0) / GIB
            lines.append((name, "refused by the compiler", f"{needed:.1f}", "does not fit"))
            continue
        rest = memory.arguments - sum(memory.parts.values())
        sizes = {**memory.parts, "inputs, padding": rest, "outputs": memory.outputs}
        sizes["temporaries"] = memory.temporaries
        lines += [(name, part, f"{size / GIB:.2f}", "") for part, size in sizes.items()]
        verdict = "fits" if fits(program, report.chip) else "does not fit"
        lines.append((name, "peak", f"{memory.peak / GIB:.2f}", f"{verdict} {limit / GIB:.1f}"))
    return _table(("memory per device", "", "GiB", ""), lines) if lines else ""


def _collectives(name: str, found: Sequence[Collective]) -> str:
    if not found:
        return ""
    merged: dict[tuple[str, ...], list[Any]] = {}
    for each in found:
        where = (" in loop" if each.in_loop else "") + (" in branch" if each.in_branch else "")
        times = "?" if each.times is None else str(each.times)
        key = ("+".join(each.axes) or "none", each.kind + where, each.shape[:40], times)
        merged.setdefault(key, [0, each.sent])[0] += 1
    lines = [(*key, str(n), _mega(sent)) for key, (n, sent) in merged.items()]
    sums = ((("+".join(axes) or "none"), sent) for axes, sent in bytes_by_axes(found).items())
    lines += [(axes, "total a tick", "", "", "", _mega(sent)) for axes, sent in sums]
    return _table((f"{name}: axis", "collective", "shape", "times", "count", "MB sent"), lines)


def _costs(costs: dict[str, Cost]) -> str:
    lines = [
        (name, f"{c.flops_matrix / 1e12:.1f}", f"{c.flops_attention / 1e12:.1f}",
         f"{c.bytes_weights / 1e9:.1f}", f"{c.bytes_cache / 1e9:.1f}",
         f"{c.bytes_activations / 1e9:.1f}")
        for name, c in costs.items()
    ]  # fmt: skip
    head = (
        "per device and tick",
        "TFLOP matrix",
        "attention",
        "GB weights",
        "cache",
        "activations",
    )
    return _table(head, lines)


def _projections(projections: Sequence[Projection]) -> str:
    head = ("steps", "sessions", "stage ms", "limit", "decoder ms", "FPS", "first s",
            "share", "FPS", "first s", "real time")  # fmt: skip
    lines = []
    for p in projections:
        share = p.efficiency
        lines.append(
            (str(p.steps), str(p.sessions), f"{p.stage.seconds * 1e3:.0f}", p.stage.limit,
             f"{p.decoder.seconds * 1e3:.0f}", f"{p.fps(1.0):.1f}", f"{p.first_frame(1.0):.2f}",
             f"{share:.2f}", f"{p.fps(share):.1f}", f"{p.first_frame(share):.2f}",
             "yes" if p.real_time else "no")
        )  # fmt: skip
    published = ", ".join(f"{s * 1e3:.0f} ms in {w}" for w, s in PUBLISHED_SECONDS.items())
    note = (
        "FPS are of each session. Left of `share`: the roofline, which no program reaches. Right "
        f"of it: projected\nat the share that the paper's stages reach on H800 ({published})."
    )
    return f"{_table(head, lines)}\n{note}" if lines else ""


def _projection(p: Projection) -> dict[str, Any]:
    def times(r: Roofline) -> dict[str, Any]:
        return {**dataclasses.asdict(r), "limit": r.limit}

    shares = {"roofline": 1.0, "projected": p.efficiency}
    return {
        "steps": p.steps,
        "sessions": p.sessions,
        "stage": times(p.stage),
        "decoder": times(p.decoder),
        "efficiency": p.efficiency,
        **{
            name: {"tick": p.tick(e), "fps": p.fps(e), "first_frame": p.first_frame(e)}
            for name, e in shares.items()
        },
    }


def _mega(sent: float) -> str:
    return f"{sent / 1e6:.3f}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        texts = (
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(cells, widths, strict=True)
        )
        return "  ".join(texts).rstrip()

    return "\n".join([row(head), *map(row, lines)])
