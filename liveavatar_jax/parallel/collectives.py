"""The collectives of a compiled program, read from its text.

A compiler may add, merge and move them, so what a program sends is only known once it is
compiled. Texts of CPU, GPU and TPU programs are understood; a CPU program may have widened
16-bit collectives to float32.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from liveavatar_jax.types import LiveAvatarError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16}
_BITS |= {"f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}

_NAME = r"%?([\w.\-]+)"
_COMPUTATION = re.compile(rf"^(ENTRY )?{_NAME} \(.*\{{$")
_INSTRUCTION = re.compile(rf"^\s+(?:ROOT )?{_NAME} = (.*?[\]}})]) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(rf"\b(body|condition|calls|to_apply|\w+_computation)={_NAME}")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(
    r"replica_groups=(\{(?:\{[\d,]*\},?)*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?"
    r"|mesh\[[^\]]*\](?:, device_ids=\(\[[\d,]+\]T\([\d,]+\)\))? \{[\w',]*\})"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program; sizes are those of one device, for one run of it."""

    kind: str  # one of KINDS
    shape: str  # of the result, such as "bf16[512,1024]"
    bytes: int  # of the larger of operand and result
    groups: tuple[tuple[int, ...], ...]  # devices that exchange; of a permute, (source, target)
    axes: tuple[str, ...]  # of the mesh, along which they differ
    times: (
        float | int | None
    )  # it runs in a tick; None in a loop whose count the text does not tell
    in_loop: bool
    in_branch: bool

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time, by the usual ring algorithms."""
        if self.kind == "collective-permute":
            return float(self.bytes)
        n = len(self.groups[0])
        return self.bytes * (n - 1) / n * (2 if self.kind == "all-reduce" else 1)


def collectives(
    text: str, mesh: Mapping[str, int], loops: float | int | None = None
) -> list[Collective]:
    """All collectives in the text of a compiled program (`compiled.as_text()`).

    `mesh` gives the sizes of the mesh's axes; devices are numbered along it row by row, as in
    `mesh.devices.flat`. An asynchronous pair counts once. `loops` is how often loops are taken to
    run whose count depends on data. Raises LiveAvatarError for groups in a notation that is not
    known here.
    """
    computations = _computations(text)
    runs = _runs(computations, loops)
    found = []
    for name, lines in computations.items():
        for line in lines:
            head = _INSTRUCTION.match(line)
            kind = head and head[3].removesuffix("-start")
            if head and kind in KINDS and name in runs:
                found.append(_collective(kind, head[2], head[3], line, mesh, runs[name]))
    return found


def bytes_by_axes(found: Iterable[Collective], taken: float = 1.0) -> dict[tuple[str, ...], float]:
    """Bytes that one device sends in a run of the program, by the axes they travel along.

    Branches in a loop run `taken` of the times: layers that hear audio. Left out are loops whose
    count depends on data, branches outside of all loops, and loops in branches: here that is the
    refresh of a sink, and a steady tick has none.
    """
    total: dict[tuple[str, ...], float] = defaultdict(float)
    for each in found:
        share = taken * each.in_loop if each.in_branch else 1.0
        total[each.axes] += each.sent * (each.times or 0) * share
    return dict(total)


@dataclasses.dataclass(frozen=True)
class _Run:
    times: float | int | None = 1
    in_loop: bool = False
    in_branch: bool = False


def _collective(
    kind: str, result: str, opcode: str, line: str, mesh: Mapping[str, int], run: _Run
) -> Collective:
    groups = _groups(kind, line, math.prod(mesh.values()))
    if opcode.endswith("-start") and kind != "all-reduce":
        result = _elements(result)[1]  # (operand, result, ...)
    arrays = _ARRAY.findall(result)
    size = sum(_bytes(dtype, shape) for dtype, shape in arrays)
    return Collective(
        kind=kind,
        shape=" ".join(f"{dtype}[{shape}]" for dtype, shape in arrays),
        bytes=size * len(groups[0]) if kind == "reduce-scatter" else size,
        groups=groups,
        axes=_axes(groups, mesh),
        **dataclasses.asdict(run),
    )


def _computations(text: str) -> dict[str, list[str]]:
    """Lines by computation; the entry is called ""."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = found[("" if head[1] else head[2])] = []
        else:
            lines.append(line)
    return found


def _runs(
    computations: Mapping[str, Sequence[str]], loops: float | int | None = None
) -> dict[str, _Run]:
    """How each computation that the entry reaches is run."""
    runs, waiting = {"": _Run()}, [""]
    while waiting:
        name = waiting.pop()
        for line in computations.get(name, ()):
            for called, run in _calls(line, runs[name], computations, loops):
                if called not in runs:
                    runs[called] = run
                    waiting.append(called)
    return runs


def _calls(
    line: str,
    run: _Run,
    computations: Mapping[str, Sequence[str]],
    loops: float | int | None = None,
) -> list[tuple[str, _Run]]:
    called = dict((key, name) for key, name in _CALLED.findall(line))
    found = [(name, run) for key, name in called.items() if key in ("calls", "to_apply")]
    if "body" in called:
        trips: float | int | None = _trips(line, computations.get(called.get("condition", ""), ()))
        trips = loops if trips is None else trips
        times = None if trips is None or run.times is None else run.times * trips
        if run.in_branch:
            times = None
        looped = dataclasses.replace(run, times=times, in_loop=True)
        found += [(called[key], looped) for key in ("body", "condition")]
    branches = [called[key] for key in ("true_computation", "false_computation") if key in called]
    if match := _BRANCHES.search(line):
        branches += re.findall(_NAME, match[1])
    taken = dataclasses.replace(run, in_branch=True)
    return found + [(name, taken) for name in branches]


def _trips(line: str, condition: Sequence[str]) -> int | None:
    """As the compiler states it, else the one number that the loop's condition compares with."""
    if stated := _TRIPS.search(line):
        return int(stated[1])
    bounds = [
        int(n) for text in condition for n in re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
    ]
    return bounds[0] if len(bounds) == 1 else None


def _groups(kind: str, line: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Groups as they stand, or as one of two formulas over the devices in order."""
    match = (_PAIRS if kind == "collective-permute" else _GROUPS).search(line)
    text = match[1] if match else ""
    if text.startswith("["):  # [groups, each] <= [shape] T(order)
        into, shape, *order = map(_ints, re.findall(r"[\[(]([\d,]+)[\])]", text))
        numbers = np.arange(math.prod(shape)).reshape(shape)
        table = (numbers.transpose(order[0]) if order else numbers).reshape(into)
        return tuple(map(tuple, table.tolist()))
    if text.startswith("mesh"):  # mesh['a'=4,'b'=2] {'b'}: devices that differ in b alone
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", text)}
        along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'(?!=)", text)]
        table = np.arange(math.prod(sizes.values()))
        if order := re.search(r"\(\[([\d,]+)\]T\(([\d,]+)\)\)", text):
            table = table.reshape(_ints(order[1])).transpose(_ints(order[2]))
        table = table.reshape(tuple(sizes.values()))
        table = np.moveaxis(table, along, range(-len(along), 0))
        each = math.prod(table.shape[-len(along) :])
        return tuple(map(tuple, table.reshape(-1, each).tolist()))
    groups = tuple(tuple(_ints(group)) for group in re.findall(r"\{([\d,]+)\}", text))
    if not groups and re.search(r"(replica_groups|source_target_pairs)=(?!\{\})", line):
        raise LiveAvatarError(f"the groups of this collective are not understood: {line[:300]}")
    return groups or (tuple(range(devices)),)


def _axes(groups: Sequence[Sequence[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    shape = tuple(mesh.values())
    places = [np.stack(np.unravel_index(np.asarray(group), shape)) for group in groups]
    differ: Any = np.any([np.ptp(place, axis=1) > 0 for place in places], axis=0)
    return tuple(axis for axis, varies in zip(mesh, differ, strict=True) if varies)


def _elements(shape: str) -> list[str]:
    """The parts of a tuple's shape, split at the commas outside all brackets."""
    parts, depth = [""], 0
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _bytes(dtype: str, shape: str) -> int:
    bits = 8 if dtype.startswith("f8") else _BITS.get(dtype, 32)
    return math.prod(_ints(shape)) * bits // 8


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
