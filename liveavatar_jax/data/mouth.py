"""Phonemes and their times to the shape of a mouth, frame by frame.

Every phoneme asks for an opening, a width and a rounding, with a weight: a `p` insists on shut
lips and cares little for their width, a `k` takes the shape of its neighbours. What is asked for
is averaged by these weights under a Gaussian of 28 ms (a dominance model of co-articulation,
after Cohen and Massaro 1993). Lips that must touch then do so for a frame at least.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from liveavatar_jax.types import Float

FPS = 25
GRID = 200  # targets a second, before they are averaged
SPREAD = 0.028  # seconds, deviation of the Gaussian
REST = (0.0, 0.5, 0.0)
BEFORE = {"p": 0.05, "t": 0.05, "k": 0.05, "b": 0.03, "d": 0.03, "g": 0.03}  # seconds of shut
LEFT = 0.01  # lips or tongue before a stop is heard, where its time begins, and after it
PART = 0.025  # seconds in which lips part that had to touch
SILENCE = ""

# name: opening, width, rounding; weight of the opening, and of the other two
CONSONANTS = {
    "p": (0.00, 0.50, 0.0, 3.0, 0.2), "f": (0.08, 0.55, 0.0, 3.0, 0.5),
    "t": (0.18, 0.60, 0.0, 0.6, 0.3), "k": (0.25, 0.55, 0.0, 0.3, 0.2),
    "T": (0.20, 0.60, 0.0, 0.9, 0.4), "s": (0.12, 0.75, 0.0, 1.3, 0.8),
    "S": (0.20, 0.25, 0.7, 1.2, 1.4), "h": (0.35, 0.50, 0.0, 0.2, 0.1),
    "l": (0.30, 0.60, 0.0, 0.6, 0.3), "r": (0.25, 0.35, 0.4, 0.6, 0.7),
    "w": (0.15, 0.05, 1.0, 1.4, 1.6), "j": (0.25, 0.85, 0.0, 0.6, 0.7),
    SILENCE: (*REST, 1.3, 0.6),
}  # fmt: skip
SAME = {
    "b": "p", "m": "p", "v": "f", "d": "t", "n": "t", "g": "k", "N": "k", "D": "T", "z": "s",
    "Z": "S", "tS": "S", "dZ": "S", "x": "h", "C": "h", "?": "h", "L": "l", "R": "r", "W": "w",
    ";": "j",
}  # fmt: skip
VOWELS = {  # opening, width, rounding, at the beginning and, where it differs, at the end
    "a": (0.85, 0.75, 0.0), "A": (0.95, 0.50, 0.0), "0": (0.85, 0.40, 0.2), "V": (0.65, 0.5, 0.0),
    "E": (0.62, 0.72, 0.0), "e": (0.55, 0.78, 0.0), "i": (0.30, 0.95, 0.0), "I": (0.40, 0.75, 0.0),
    "O": (0.65, 0.25, 0.7), "o": (0.55, 0.25, 0.7), "U": (0.35, 0.25, 0.7), "u": (0.25, 0.05, 1.0),
    "3": (0.45, 0.40, 0.3), "@": (0.42, 0.50, 0.1), "y": (0.28, 0.20, 0.9),
}  # fmt: skip
GLIDES = {"aI": "AI", "eI": "eI", "OI": "OI", "aU": "Au", "oU": "ou", "i@": "i@", "e@": "E@",
          "U@": "U@", "O@": "O@", "o@": "O@", "A@": "A@", "VI": "VI", "@L": "@l"}  # fmt: skip
LIPS = {"p": 1.0, "b": 1.0, "m": 1.0, "f": 0.5, "v": 0.5}  # how much of an opening they take


@dataclasses.dataclass(frozen=True)
class Phoneme:
    """A sound and when it is heard; espeak's name for it, or SILENCE."""

    name: str
    start: float  # seconds
    end: float


def mouth_shapes(phonemes: Sequence[Phoneme], frames: int) -> Float[np.ndarray, "F 3"]:
    """(open, width, round) in 0..1 at the middle of each frame of 40 ms. Silence is shut."""
    steps = round(frames * GRID / FPS)
    target = np.tile(np.array(REST), (steps, 1))
    weight = np.tile(np.array(CONSONANTS[SILENCE][3:]), (steps, 1))
    open_at_most = np.ones(steps)

    def fill(start: float, end: float, name: str) -> None:
        first, last = (int(np.clip(round(t * GRID), 0, steps)) for t in (start, end))
        asked = _asked(name)
        part = np.linspace(0, 1, last - first)[:, None]
        part = np.clip(1.5 * part - 0.25, 0, 1)  # a glide stays a while at both ends
        target[first:last] = (1 - part) * asked[0, :3] + part * asked[1, :3]
        weight[first:last] = asked[0, 3:]

    time = (np.arange(steps) + 0.5) / GRID
    for phoneme in phonemes:
        start = phoneme.start - BEFORE.get(phoneme.name, 0.0)
        end = phoneme.end if phoneme.name not in BEFORE else phoneme.start + LEFT
        if phoneme.name in BEFORE:  # its breath leaves the mouth to the neighbours
            fill(phoneme.start, phoneme.end, "h")
        fill(start, end, phoneme.name)
        if share := LIPS.get(phoneme.name):
            middle = (np.floor((start + end) / 2 * FPS) + 0.5) / FPS  # of the nearest frame
            away = np.maximum(min(start, middle) - time, time - max(end, middle))
            most = 1 - share * np.clip(1 - away / PART, 0, 1)
            open_at_most = np.minimum(open_at_most, most)
    reach = round(4 * SPREAD * GRID)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / (SPREAD * GRID)) ** 2)
    weight = weight[:, [0, 1, 1]]
    blur = lambda x: np.stack([np.convolve(np.pad(c, reach, "edge"), bell, "valid") for c in x.T])
    shape = (blur(target * weight) / blur(weight)).T
    shape[:, 0] *= open_at_most
    shape[shape[:, 0] < 0.02, 0] = 0
    middle = ((np.arange(frames) + 0.5) * GRID / FPS).astype(int)
    return shape[middle].astype(np.float32)


def _asked(name: str) -> np.ndarray:
    """Two rows, for the beginning and the end: opening, width, rounding and their weights."""
    if name in SAME or name in CONSONANTS:
        row = CONSONANTS[SAME.get(name, name)]
        return np.array([row, row])
    ends = GLIDES.get(name[:2], name[:1] * 2)
    rows = [VOWELS.get(end, VOWELS["@"]) for end in ends]
    return np.array([(*row, 1.0, 1.0) for row in rows])
