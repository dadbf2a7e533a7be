"""What `plan --train` prints: from results to text, or to plain values for JSON."""

import dataclasses
from collections import defaultdict
from typing import Any

from liveavatar_jax.plan.chips import GIB
from liveavatar_jax.plan.pod import Report, Step
from liveavatar_jax.plan.table import columns
from liveavatar_jax.plan.training import total


def to_json(report: Report) -> dict[str, Any]:
    """Plain values; sizes in bytes, times in seconds, FLOPs of one device."""
    return {
        "chip": report.pod.chip.name,
        "devices": report.pod.devices,
        "slices": report.pod.slices,
        "mesh": report.mesh.shape,
        "batch": report.batch,
        "shapes": dataclasses.asdict(report.shapes),
        "remat": report.remat,
        "steps": {name: _plain(step) for name, step in report.steps.items()},
        "ratio": report.ratio,
    }


def _plain(step: Step) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "model_flops": {name: each.model.flops for name, each in step.phases.items()},
        "run_flops": {name: each.run.flops for name, each in step.phases.items()},
        "products": step.products,
        "links": step.links,
        "seconds": step.seconds,
        "utilisation": step.utilisation,
        "caches": step.caches,
    }
    if step.compiled is not None:
        memory = step.compiled.memory
        plain |= {
            "fits": step.fits,
            "peak": step.peak,
            "memory": None if memory is None else dataclasses.asdict(memory),
            "compile_seconds": step.compiled.seconds,
            "sent": {"+".join(axes): size for (axes, _), size in _sent(step).items()},
        }
    return plain


def to_text(report: Report) -> str:
    """Tables for a terminal."""
    pod, shapes = report.pod, report.shapes
    slices = f" in {pod.slices} slices" if pod.slices > 1 else ""
    head = (
        f"{pod.devices} x {pod.chip.name}{slices}, {report.mesh}, batch {report.batch} of "
        f"{shapes.f} latents of {8 * shapes.w}x{8 * shapes.h}, remat {report.remat}    "
        f"[{pod.chip.source}]"
    )
    parts = [head, _memory(report), _collectives(report), _costs(report), _times(report)]
    return "\n\n".join(part for part in parts if part)


def _memory(report: Report) -> str:
    lines: list[tuple[str, ...]] = []
    limit = report.pod.chip.memory
    for name, step in report.steps.items():
        if step.compiled is None:
            continue
        memory = step.compiled.memory
        if memory is None:
            needed = f"{(step.peak or 0) / GIB:.2f}"
            lines.append((name, "refused by the compiler", needed, "does not fit"))
            continue
        sizes = dict(memory.parts) | {"outputs, padding": memory.arguments + memory.outputs
                                      - sum(memory.parts.values())}  # fmt: skip
        sizes["temporaries"] = memory.temporaries
        lines += [(name, part, f"{size / GIB:.2f}", "") for part, size in sizes.items()]
        if step.caches:
            lines.append((name, "  of these rings, sink", f"{step.caches / GIB:.2f}", "counted"))
        if memory.host:
            lines.append((name, "in the host's memory", f"{memory.host / GIB:.2f}", ""))
        verdict = "fits" if step.fits else "does not fit"
        lines.append((name, "peak", f"{memory.peak / GIB:.2f}", f"{verdict} {limit / GIB:.1f}"))
    return columns(("memory per device", "", "GiB", ""), lines) if lines else ""


def _sent(step: Step) -> dict[tuple[tuple[str, ...], str], float]:
    """Bytes that a device sends in a step, by axes and kind; branches as if always taken."""
    found: dict[tuple[tuple[str, ...], str], float] = defaultdict(float)
    for each in step.compiled.collectives if step.compiled else ():
        found[each.axes, each.kind] += each.sent * (each.times or 0.0)
    return dict(found)


def _collectives(report: Report) -> str:
    lines = [
        (name, "+".join(axes) or "-", kind, f"{size / 1e9:.1f}")
        for name, step in report.steps.items()
        for (axes, kind), size in sorted(_sent(step).items(), key=lambda item: -item[1])
        if size > 1e8
    ]
    return columns(("sent per device", "axes", "collective", "GB"), lines) if lines else ""


def _costs(report: Report) -> str:
    lines = []
    for name, step in report.steps.items():
        for phase, each in [*step.phases.items(), ("all", total(step.phases))]:
            model, again = each.model.flops / 1e12, each.again.flops / 1e12
            lines.append((name, phase, f"{model:.0f}", f"{again:.0f}"))
    return columns(("TFLOP per device", "phase", "model", "again"), lines)


def _times(report: Report) -> str:
    lines = []
    compiled = all(step.compiled for step in report.steps.values())
    for name, step in report.steps.items():
        (best, worst), (high, low) = step.seconds, step.utilisation
        lines.append((name, f"{step.products:.2f}", f"{step.links:.2f}", f"{best:.2f}",
                      f"{worst:.2f}", f"{high:.1%}", f"{low:.1%}"))  # fmt: skip
    head = ("seconds", "products", "links", "overlapped", "one by one", "MFU", "MFU")
    text = f"{columns(head, lines)}\n{_NOTE}"
    if report.ratio and compiled:
        both = [step.seconds for step in (report.steps["student"], report.steps["critic"])]
        best, worst = (s + report.ratio * c for s, c in zip(*both, strict=True))
        text += f"\nOne update of the student with {report.ratio} of the critic: "
        text += f"{best:.1f} to {worst:.1f} s, {report.batch / worst:.2f} clips/s and more."
    return text


_NOTE = """\
A roofline, which no program reaches: products at the peak of bf16, collectives at the full rate of
their links, beside the products or behind them. Model FLOPs of MFU leave out what is computed
again (remat, the scores of a flash kernel's backward, the forward of the replay)."""
