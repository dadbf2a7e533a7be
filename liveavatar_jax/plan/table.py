"""What `plan` prints: from results to text, or to plain values for JSON."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from liveavatar_jax.parallel.collectives import bytes_by_axes
from liveavatar_jax.plan.chips import GIB
from liveavatar_jax.plan.cost import Cost
from liveavatar_jax.plan.projection import PUBLISHED_SECONDS, Projection
from liveavatar_jax.plan.report import Report

_LISTED = 6  # collectives of a program in the text; JSON has all


def to_json(report: Report) -> dict[str, Any]:
    """Plain values; sizes in bytes, times in seconds."""
    plain = dataclasses.asdict(report)
    for name, program in report.compiled.items():
        entry = plain["compiled"][name]
        del entry["text"]
        entry["peak"] = program.needed if program.memory is None else program.memory.peak
        entry["fits"] = program.memory is not None and entry["peak"] <= report.chip.memory
    for entry, p in zip(plain["projections"], report.projections, strict=True):
        for name, share in (("roofline", 1.0), ("projected", p.efficiency)):
            seconds = {"first_frame": p.first_frame(share), "warm": p.first_frame_warm(share)}
            entry[name] = {"fps": p.fps(share), **seconds, "warm_blocks": p.warm_blocks(share)}
        entry["memory"], entry["fits"] = report.needed(p.sessions), report.fits(p.sessions)
    return plain


def to_text(report: Report) -> str:
    """Tables for a terminal, with what is compiled, counted and assumed told apart."""
    chip, (width, height) = report.chip, report.pixels
    parts = [
        f"{chip.name}, {report.mesh}, {width}x{height}, {report.weights} weights    "
        f"[{chip.source}]",
        _memory(report),
        *(_collectives(report, name) for name in report.compiled),
        _costs(report.costs),
        _projections(report),
    ]
    return "\n\n".join(part for part in parts if part)


def _memory(report: Report) -> str:
    limit = report.chip.memory
    if not report.compiled:
        lines = [(name, _gib(size)) for name, size in report.held.items()]
        return columns(("memory per device of a stage, counted", "GiB"), lines)
    lines: list[tuple[str, ...]] = []
    for name, program in report.compiled.items():
        memory = program.memory
        if memory is None:
            needed = _gib(program.needed or 0)
            lines.append((name, "refused by the compiler", needed, "does not fit"))
            continue
        rest = memory.arguments - sum(memory.parts.values())
        sizes = {**memory.parts, "inputs, padding": rest, "outputs": memory.outputs}
        sizes["temporaries"] = memory.temporaries
        lines += [(name, part, _gib(size), "") for part, size in sizes.items()]
        verdict = "fits" if memory.peak <= limit else "does not fit"
        lines.append((name, "peak", _gib(memory.peak), f"{verdict} {limit / GIB:.1f}"))
    return columns(("memory per device, compiled", "", "GiB", ""), lines)


def _gib(size: float | int) -> str:
    return f"{size / GIB:.2f}"


def _collectives(report: Report, name: str) -> str:
    """The largest ones, and all by axes."""
    found = report.compiled[name].collectives
    if not found:
        return ""
    same = Counter(dataclasses.replace(each, groups=()) for each in found)
    sent = {dataclasses.replace(each, groups=()): each.sent for each in found}
    total = lambda each: sent[each] * (each.times or 0) * same[each]
    lines = []
    for each in sorted(same, key=total, reverse=True)[:_LISTED]:
        where = " in loop" * each.in_loop + " in branch" * each.in_branch
        times = "?" if each.times is None else str(each.times)
        cells = ("+".join(each.axes), each.kind + where, each.shape[:40], times, str(same[each]))
        lines.append((*cells, f"{sent[each] / 1e6:.3f}"))
    for axes, sum_ in bytes_by_axes(found, report.injected).items():
        lines.append(("+".join(axes), "all of a run", "", "", "", f"{sum_ / 1e6:.3f}"))
    return columns((f"{name}: axis", "collective", "shape", "times", "count", "MB sent"), lines)


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
    return columns(head, lines)


def _projections(report: Report) -> str:
    head = ("steps", "sessions", "roofline ms", "limit", "decoder", "FPS", "stage ms", "refresh",
            "FPS", "real time", "first s", "warm", "saved", "blocks", "GiB", "")  # fmt: skip
    lines = []
    for p in report.projections:
        share = p.efficiency
        first, warm = p.first_frame(share), p.first_frame_warm(share)
        blocks = p.warm_blocks(share)
        lines.append(
            (str(p.steps), str(p.sessions), _ms(p.stage.seconds), p.stage.limit,
             _ms(p.decoder.seconds), f"{p.fps(1.0):.1f}", _ms(p.stage.at(share)),
             _ms(p.refresh.at(share)), f"{p.fps(share):.1f}", "yes" if p.real_time else "no",
             f"{first:.2f}",
             *(("-", "-") if warm is None else (f"{warm:.2f}", f"{first - warm:.2f}")),
             "none" if blocks is None else str(blocks),
             _gib(report.needed(p.sessions)), _verdict(report, p))
        )  # fmt: skip
    published = ", ".join(f"{_ms(s)} ms in {w}" for w, s in PUBLISHED_SECONDS.items())
    share = report.projections[0].efficiency
    return f"{columns(head, lines)}\n{_NOTE.format(share=share, published=published)}"


_NOTE = """\
FPS are of each session, the first ones those of the roofline, which no program reaches. From the
second `ms` on: the projection, at the share of the roofline ({share:.2f}) that the paper's stage
reaches on H800 ({published}); on other chips that is an assumption.
`refresh`: each of as many ticks as there are steps is longer by it when a session renews its sink,
once. `first`: the pipeline fills; `warm`: all stages make the first block together; `blocks`: the
least `--warm N` with which playback at 25 FPS does not wait while the pipeline fills; `-` where
the heads cannot be parted over all stages.
`GiB`: a device of a stage with all its programs."""


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}"


def _verdict(report: Report, p: Projection) -> str:
    if not report.fits(p.sessions):
        return "does not fit"
    return "fits" if report.compiled else "and temporaries"


def columns(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table for a terminal."""
    widths = [max(len(row[i]) for row in (head, *lines)) for i in range(len(head))]

    def row(cells: Sequence[str]) -> str:
        texts = (
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(cells, widths, strict=True)
        )
        return "  ".join(texts).rstrip()

    return "\n".join([row(head), *map(row, lines)])
