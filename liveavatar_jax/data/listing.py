"""Which clips there are to encode: a list, the files of a folder, and scores made elsewhere.

A list without a header has the columns of AVSpeech: id, start and end in seconds, and the centre
of the face, x and y in 0..1 from the upper left corner. With a header any order will do, and
`file` or `id` is enough.
"""

import csv
import dataclasses
import json
import math
import operator
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from liveavatar_jax.types import LiveAvatarError

AVSPEECH = ("id", "start", "end", "x", "y")
ALIASES = {
    "youtube_id": "id", "path": "file", "start_sec": "start", "end_sec": "end",
    "face_center_x": "x", "face_center_y": "y", "text": "caption",
}  # fmt: skip
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".ts")
COMPARE = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


@dataclasses.dataclass(frozen=True)
class Entry:
    """A clip of the list. Without an end it lasts as long as its file."""

    id: str
    start: float | None = None  # seconds, in the video it was cut from
    end: float | None = None
    x: float = 0.5
    y: float = 0.5
    caption: str | None = None
    file: str | None = None

    @property
    def name(self) -> str:
        """Unlike those of other entries, and what downloaders call the file."""
        times = [f"{time:g}" for time in (self.start, self.end) if time is not None]
        return "_".join([self.id, *times])


@dataclasses.dataclass(frozen=True)
class Found:
    """The file of an entry; whether it holds the whole video, of which the clip is a part, or
    the clip alone. None: its length has to tell."""

    path: Path
    whole: bool | None


def read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Lines of a csv file that say something, with their numbers. Raises LiveAvatarError."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [(n, row) for n, row in enumerate(csv.reader(file), 1) if any(row)]
    except OSError as error:
        raise LiveAvatarError(f"cannot read {path}: {str(error.strerror).lower()}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise LiveAvatarError(
            f"{path} is no csv file in UTF-8 ({error}); export it again"
        ) from None
    if not rows:
        raise LiveAvatarError(f"{path} lists no clips")
    return rows


def read_list(path: Path) -> list[Entry]:
    """The clips of a csv file. Raises LiveAvatarError, naming line and column."""
    rows = read_rows(path)
    columns: Sequence[str] = AVSPEECH
    head = [ALIASES.get(cell.strip().lower(), cell.strip().lower()) for cell in rows[0][1]]
    if "id" in head or "file" in head:
        columns, rows = head, rows[1:]
    return [_entry(path, line, columns, row) for line, row in rows]


def _entry(path: Path, line: int, columns: Sequence[str], row: Sequence[str]) -> Entry:
    where = f"{path}, line {line}"
    if len(row) != len(columns):
        raise LiveAvatarError(
            f"{where} has {len(row)} columns instead of {len(columns)} ({', '.join(columns)})"
        )
    cells = {name: cell.strip() for name, cell in zip(columns, row, strict=True) if cell.strip()}

    def number(name: str, default: float | None) -> float | None:
        try:
            value = float(cells[name]) if name in cells else default
        except ValueError:
            value = math.nan
        if value is not None and not math.isfinite(value):
            raise LiveAvatarError(f"{where}: {name} = {cells[name]!r} must be a number")
        return value

    start, end = number("start", None), number("end", None)
    x, y = number("x", 0.5), number("y", 0.5)
    assert x is not None and y is not None
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise LiveAvatarError(f"{where}: the face at {x}, {y} must lie within 0..1 of the picture")
    if (start or 0) < 0 or (end is not None and end <= (start or 0)):
        raise LiveAvatarError(f"{where}: start = {start}, end = {end}; end must be after start")
    file = cells.get("file")
    name = cells.get("id") or (Path(file).stem if file else "")
    if not name:
        raise LiveAvatarError(f"{where}: it has neither id nor file")
    return Entry(name, start, end, x, y, cells.get("caption"), file)


class Folder:
    """The videos beneath a folder, looked through once. Raises LiveAvatarError where it is not."""

    def __init__(self, path: Path):
        if not path.is_dir():
            raise LiveAvatarError(f"{path} is not a folder; name the one that holds the clips")
        self.path = path
        self.stems: dict[str, list[Path]] = {}
        self.cuts: dict[str, list[tuple[float, float, Path]]] = {}  # by id: start, end
        for folder, _, files in os.walk(path):
            for file in map(Path(folder).joinpath, files):
                if file.suffix.lower() in VIDEOS:
                    self.stems.setdefault(file.stem, []).append(file)
                    if match := re.fullmatch(r"(.+)_(\d+(?:\.\d+)?)_(\d+(?:\.\d+)?)", file.stem):
                        times = float(match[2]), float(match[3])
                        self.cuts.setdefault(match[1], []).append((*times, file))

    def find(self, entry: Entry) -> Found | str:
        """The file of an entry, or why there is none: "missing" or "ambiguous".

        `<id>_<start>_<end>.mp4` with times to a hundredth of a second is the clip alone,
        `<id>.mp4` the whole video; else the one file whose name begins with the id.
        """
        if entry.file is not None:
            path = self.path / entry.file
            return Found(path, None if entry.end is None else True) if path.is_file() else "missing"
        if entry.start is not None and entry.end is not None:
            near = lambda a, b: abs(a - b) <= 0.011
            cut = [
                file for start, end, file in self.cuts.get(entry.id, ())
                if near(start, entry.start) and near(end, entry.end)
            ]  # fmt: skip
            if cut:
                return Found(cut[0], False) if len(cut) == 1 else "ambiguous"
        if whole := self.stems.get(entry.id):
            return Found(whole[0], True) if len(whole) == 1 else "ambiguous"
        begins = re.compile(re.escape(entry.id) + r"(?![A-Za-z0-9])")
        other = {file for _, _, file in self.cuts.get(entry.id, ())}  # cuts of other times
        loose = [f for stem in self.stems if begins.match(stem) for f in self.stems[stem]]
        loose = [file for file in loose if file not in other]
        if not loose:
            return "missing"
        return Found(loose[0], None) if len(loose) == 1 else "ambiguous"


@dataclasses.dataclass(frozen=True)
class Demand:
    """What a score must be, such as sync>=3."""

    score: str
    sign: str
    value: float

    @classmethod
    def parse(cls, text: str) -> "Demand":
        match = re.fullmatch(r"\s*([\w.-]+)\s*(>=|<=|>|<)\s*([-+\d.eE]+)\s*", text)
        try:
            assert match is not None
            return cls(match[1], match[2], float(match[3]))
        except (AssertionError, ValueError):
            raise LiveAvatarError(f"{text!r} is no demand on a score; write sync>=3") from None

    def met(self, scores: Mapping[str, float]) -> bool:
        return self.score in scores and COMPARE[self.sign](scores[self.score], self.value)

    def __str__(self) -> str:
        return f"{self.score}{self.sign}{self.value:g}"


class Scores:
    """Numbers about clips by their name (`<id>_<start>_<end>`) or id, from csv or json.

    A csv has a header with `id`; a json is {id: {score: number}}. Raises LiveAvatarError.
    """

    def __init__(self, path: Path):
        try:
            text = path.read_text(encoding="utf-8-sig")
            by_id = json.loads(text) if path.suffix.lower() == ".json" else self._csv(text)
            self.by_id = {
                str(name): {str(score): float(value) for score, value in scores.items()}
                for name, scores in by_id.items()
            }
        except OSError as error:
            raise LiveAvatarError(f"cannot read {path}: {str(error.strerror).lower()}") from None
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise LiveAvatarError(
                f"{path} has no scores ({error}); give a csv with the header id,sync,... or a json "
                'of {"id": {"sync": 3.5}}'
            ) from None

    @staticmethod
    def _csv(text: str) -> dict[str, dict[str, Any]]:
        rows = csv.DictReader(text.splitlines(), strict=True)
        if "id" not in (rows.fieldnames or ()):
            raise ValueError("it has no column id")
        return {row.pop("id"): {k: v for k, v in row.items() if v} for row in rows}

    def of(self, entry: Entry) -> dict[str, float]:
        return self.by_id.get(entry.name) or self.by_id.get(entry.id) or {}
