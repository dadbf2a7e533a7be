"""The takes that a model is judged by: portraits, recordings, and what is known about them.

A list is a csv in UTF-8 with a header; paths count from its folder. Columns: id, image and audio;
and, where there are, file (the true video), caption (the prompt) and truth, an .npz with some of

    mouth        [F, 3]   opening, width and rounding of the mouth in 0..1, 25 frames a second
    expression   []       index in puppet.EXPRESSIONS
    mouth_box    [F, 4]   top, left, bottom, right in 0..1 of the picture
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from liveavatar_jax.data.listing import read_rows
from liveavatar_jax.types import Float, LiveAvatarError

SHAPES = {"mouth": ("F", 3), "mouth_box": ("F", 4), "expression": ()}
FPS = 25


@dataclasses.dataclass(frozen=True)
class Take:
    """One row of the list; the files exist."""

    id: str
    image: Path
    audio: Path
    caption: str | None = None
    file: Path | None = None
    truth: Path | None = None


def read_takes(path: Path, limit: int | None = None) -> list[Take]:
    """The first takes of a list, or all. Raises LiveAvatarError, naming line and column."""
    rows = read_rows(path)
    columns = [cell.strip().lower() for cell in rows[0][1]]
    absent = [name for name in ("id", "image", "audio") if name not in columns]
    if absent:
        raise LiveAvatarError(
            f"{path} has no column {absent[0]}; its first line must name the columns, as in "
            "id,file,image,audio,caption,truth"
        )
    takes = [_take(path, line, columns, row) for line, row in rows[1:][:limit]]
    if not takes:
        raise LiveAvatarError(f"{path} lists no clips")
    names = [take.id for take in takes]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise LiveAvatarError(f"{path} lists {min(twice)} twice; give each clip an id of its own")
    return takes


def _take(path: Path, line: int, columns: list[str], row: list[str]) -> Take:
    where = f"{path}, line {line}"
    if len(row) != len(columns):
        raise LiveAvatarError(f"{where} has {len(row)} columns instead of {len(columns)}")
    cells = {name: cell.strip() for name, cell in zip(columns, row, strict=True) if cell.strip()}
    files: dict[str, Path] = {}
    for name in ("image", "audio", "file", "truth"):
        if name in cells:
            files[name] = path.parent / cells[name]
            if not files[name].is_file():
                raise LiveAvatarError(f"{where}: the {name} {files[name]} does not exist")
    absent = [name for name in ("id", "image", "audio") if name not in cells]
    if absent:
        raise LiveAvatarError(f"{where}: {absent[0]} is empty; every clip needs one")
    name = cells["id"]
    if not re.fullmatch(r"[\w.-]{1,120}", name) or not name.strip("."):
        raise LiveAvatarError(
            f"{where}: the id {name!r} names files; use letters, digits, '.', '_' and '-' only"
        )
    return Take(
        name,
        files["image"],
        files["audio"],
        cells.get("caption"),
        files.get("file"),
        files.get("truth"),
    )


def read_truth(path: Path | None) -> Mapping[str, Float[np.ndarray, "..."]]:
    """What is known of a take, by the names above; other arrays of the file as they are.

    Raises LiveAvatarError for a file that is damaged or holds arrays of other shapes.
    """
    if path is None:
        return {}
    try:
        with np.load(path) as file:
            truth = {name: np.asarray(file[name]) for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise LiveAvatarError(f"{path} cannot be read as .npz ({error}); make it again") from None
    for name, shape in SHAPES.items():
        if name in truth:
            found = truth[name].shape
            if len(found) != len(shape) or found[1:] != shape[1:]:
                raise LiveAvatarError(
                    f"{path}: {name} has shape {found} instead of {list(shape)}; make it again"
                )
            if not np.isfinite(truth[name]).all():
                raise LiveAvatarError(f"{path}: {name} is not finite; make it again")
    rate = float(truth.get("fps", np.float64(FPS)))
    if rate != FPS:
        raise LiveAvatarError(f"{path} is at {rate:g} frames a second; everything here is at {FPS}")
    return truth
