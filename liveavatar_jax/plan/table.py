"""What `plan` prints: from results to text, or to plain values for JSON."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from liveavatar_jax.parallel.collectives import Collective, bytes_by_axes
from liveavatar_jax.plan.aot import Compiled
from liveavatar_jax.plan.chips import GIB, Chip
from liveavatar_jax.plan.cost import Cost
from liveavatar_jax.plan.projection import PUBLISHED_SECONDS, Projection


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
    plain = dataclasses.asdict(report)
    for name, program in report.compiled.items():
        entry = plain["compiled"][name]
        del entry["text"]
        entry["fits"] = fits(program, report.chip)
        entry["peak"] = program.needed if program.memory is None else program.memory.peak
    for entry, p in zip(plain["projections"], report.projections, strict=True):
        for name, share in (("roofline", 1.0), ("projected", p.efficiency)):
            seconds = {"first_frame": p.first_frame(share), "warm": p.first_frame_warm(share)}
            entry[name] = {"fps": p.fps(share), **seconds}
    return plain


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
    same = Counter(dataclasses.replace(each, groups=()) for each in found)
    sent = {dataclasses.replace(each, groups=()): each.sent for each in found}
    lines = []
    for each, count in same.items():
        where = " in loop" * each.in_loop + " in branch" * each.in_branch
        times = "?" if each.times is None else str(each.times)
        cells = ("+".join(each.axes), each.kind + where, each.shape[:40], times, str(count))
        lines.append((*cells, f"{sent[each] / 1e6:.3f}"))
    for axes, total in bytes_by_axes(found).items():
        lines.append(("+".join(axes), "all, a steady tick", "", "", "", f"{total / 1e6:.3f}"))
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
    head = ("steps", "sessions", "stage ms", "limit", "decoder", "refresh", "FPS", "first s",
            "warm", "share", "FPS", "first s", "warm", "real time")  # fmt: skip
    lines = []
    for p in projections:
        share = p.efficiency
        lines.append(
            (str(p.steps), str(p.sessions), f"{p.stage.seconds * 1e3:.0f}", p.stage.limit,
             f"{p.decoder.seconds * 1e3:.0f}", f"{p.refresh.seconds * 1e3:.0f}",
             *_figures(p, 1.0), f"{share:.2f}", *_figures(p, share),
             "yes" if p.real_time else "no")
        )  # fmt: skip
    published = ", ".join(f"{s * 1e3:.0f} ms in {w}" for w, s in PUBLISHED_SECONDS.items())
    note = (
        "FPS are of each session; warm: the first frame where all stages open a stream together.\n"
        "Left of `share` is the roofline, which no program reaches; right of it the projection, at "
        f"the\nshare of its roofline that the paper's stage reaches on H800 ({published})."
    )
    return f"{_table(head, lines)}\n{note}" if lines else ""


def _figures(p: Projection, share: float) -> tuple[str, ...]:
    seconds = (p.first_frame(share), p.first_frame_warm(share))
    return (f"{p.fps(share):.1f}", *(f"{s:.2f}" for s in seconds))


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        texts = (
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(cells, widths, strict=True)
        )
        return "  ".join(texts).rstrip()

    return "\n".join([row(head), *map(row, lines)])
