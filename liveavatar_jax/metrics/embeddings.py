"""Metrics of features that other networks made elsewhere, one .npz a clip:

sync_video [n, k], sync_audio [n, k]     SyncNet's, or those of any two towers: Sync-C, Sync-D
NAME [F, k], NAME_reference [k]          DINO's, ArcFace's: the cosine to the portrait
NAME [n, k]                              Inception's, I3D's: Fréchet distance to real features
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from liveavatar_jax.metrics.frechet import Statistics, frechet, small_sample
from liveavatar_jax.metrics.identity import cosine
from liveavatar_jax.metrics.intervals import bootstrap
from liveavatar_jax.metrics.sync import sync_score
from liveavatar_jax.metrics.verdict import METRICS, Line
from liveavatar_jax.types import LiveAvatarError

SYNC = ("sync_video", "sync_audio")


def read(path: Path) -> dict[str, np.ndarray]:
    """The features of a clip. Raises LiveAvatarError for a file that is missing or ill-shaped."""
    try:
        with np.load(path) as file:
            found = {name: np.asarray(file[name], np.float64) for name in file.files}
    except (OSError, ValueError) as error:
        raise LiveAvatarError(f"{path} cannot be read as .npz of features ({error})") from None
    for name, values in found.items():
        rank = 1 if name.endswith("_reference") else 2
        if values.ndim != rank or not np.isfinite(values).all():
            raise LiveAvatarError(
                f"{path}: {name} has shape {values.shape}; it must have {rank} axes and finite "
                "numbers"
            )
    return found


def lines(
    clips: Sequence[Mapping[str, np.ndarray]], real: Mapping[str, Statistics]
) -> tuple[list[Line], list[str]]:
    """Lines of the table, and warnings."""
    found, warnings = [], []
    both = [(clip[SYNC[0]], clip[SYNC[1]]) for clip in clips if set(SYNC) <= clip.keys()]
    scores = [sync_score(video, audio) for video, audio in both]
    if scores:
        for key, field in (("sync_c", "confidence"), ("sync_d", "distance")):
            sure = bootstrap([getattr(score, field) for score in scores])
            found.append(Line(key, *METRICS[key], sure.value, sure.low, sure.high, len(scores)))
    names = dict.fromkeys(name for clip in clips for name in clip)
    for name in names:
        other = f"{name}_reference"
        values = [cosine(c[name], c[other]).mean() for c in clips if {name, other} <= c.keys()]
        if values:
            sure, label = bootstrap(values), f"cosine to the portrait, {name}"
            found.append(Line(f"cosine/{name}", label, "high", "mean over frames", sure.value,
                              sure.low, sure.high, len(values)))  # fmt: skip
        if name in real:
            made = Statistics.of(np.concatenate([clip[name] for clip in clips if name in clip]))
            label = f"Fréchet distance, {name}"
            found.append(Line(f"frechet/{name}", label, "low", "of features as given",
                              frechet(made, real[name]), clips=made.count))  # fmt: skip
            if said := small_sample(made, real[name]):
                warnings.append(f"{label}: {said}")
    return found, warnings
