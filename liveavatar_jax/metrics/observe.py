"""Looks at a video block by block and keeps numbers about each frame, so that it may be long."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from liveavatar_jax.metrics import picture
from liveavatar_jax.metrics.face import Faces
from liveavatar_jax.metrics.frechet import Statistics
from liveavatar_jax.metrics.identity import attribute_distance, colour_distance, cosine
from liveavatar_jax.types import Float, UInt8

THUMBS = 8  # frames of a video that are kept for its contact sheet
SELDOM = 25  # frames between two that the face network looks at

# Bytes "F H W 3" to features "F k"
Embed = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Eyes:
    """Who looks, apart from plain arithmetic.

    read: the puppet readers, bytes to arrays by the fields of their `Reading`; embed: any other
    networks by name.
    """

    read: Callable[[np.ndarray], Mapping[str, np.ndarray]] | None = None
    faces: Faces | None = None
    embed: Mapping[str, Embed] = dataclasses.field(default_factory=dict)


class Observer:
    """Of one video, or one window of it, with `frames` frames.

    true: the frames of the true video one by one, as far as there are; mouth_box: where the mouth
    is in them.
    """

    def __init__(
        self, eyes: Eyes, reference: UInt8[np.ndarray, "H W 3"], frames: int, *,
        true: Iterator[np.ndarray] | None = None,
        mouth_box: Float[np.ndarray, "F 4"] | None = None,
    ):  # fmt: skip
        self.eyes, self.reference, self.frames = eyes, reference, frames
        self.true, self.mouth_box = true or iter(()), mouth_box
        self.seen = 0
        self._last: dict[str, np.ndarray] = {}  # the last frame, ours and the true one
        self._rows: dict[str, list[np.ndarray]] = {}
        self._spread: dict[str, Statistics] = {}
        self._thumbs = set(np.linspace(0, frames - 1, min(THUMBS, frames)).astype(int).tolist())
        known = eyes.read(reference[None]) if eyes.read else {}
        self._looks: Any = known["attributes"][0] if eyes.read else None
        self._who = eyes.faces.identity(reference[None])[0] if eyes.faces else None
        self._features = {name: embed(reference[None])[0] for name, embed in eyes.embed.items()}

    def see(self, frames: UInt8[np.ndarray, "F H W 3"]) -> None:
        """The next frames; what is beyond the expected number is not looked at."""
        frames = frames[: self.frames - self.seen]
        if not len(frames):
            return
        self._plain("", frames)
        self._keep("colour", colour_distance(frames, self.reference))
        self._people(frames)
        self._compare(frames)
        self.seen += len(frames)

    def result(self) -> dict[str, np.ndarray]:
        """Arrays by name, one row a frame; "reference" and thumbs; spreads of features."""
        rows = {name: np.concatenate(parts) for name, parts in self._rows.items()}
        for name, spread in self._spread.items():
            for field in ("count", "mean", "scatter"):
                rows[f"{field}/{name}"] = np.asarray(getattr(spread, field))
        rows["reference"] = self.reference
        rows["reference_gradient"] = picture.gradient(self.reference[None])
        return rows

    def _plain(self, who: str, frames: np.ndarray) -> None:
        """What needs no one to look: change, gradient, brightness of cells, thumbs."""
        before = self._last.get(who)
        both = frames if before is None else np.concatenate([before, frames])
        self._keep(who + "change", picture.change(both)[len(both) - len(frames) :])
        self._keep(who + "gradient", picture.gradient(frames))
        self._keep(who + "coarse", picture.coarse(frames).astype(np.float16))
        self._last[who] = frames[-1:].copy()
        some = [i for i in range(len(frames)) if self.seen + i in self._thumbs]
        self._keep(who + "thumbs", frames[some])

    def _people(self, frames: np.ndarray) -> None:
        if self.eyes.read is not None:
            read = self.eyes.read(frames)
            self._keep("mouth", read["mouth"])
            self._keep("expression", read["expression"])
            self._keep("looks", attribute_distance(read["attributes"], self._looks))
            self._spread_of("made/reader", read["features"])
        if self.eyes.faces is not None:
            self._keep("face_open", self.eyes.faces.opening(frames))
            some = frames[(-self.seen) % SELDOM :: SELDOM]
            apart = self.eyes.faces.identity(some) - self._who
            self._keep("face_distance", np.sqrt((apart**2).sum(axis=1)))
        for name, embed in self.eyes.embed.items():
            features = np.asarray(embed(frames))
            self._keep(f"cosine/{name}", cosine(features, self._features[name]))
            self._spread_of(f"made/{name}", features)

    def _compare(self, frames: np.ndarray) -> None:
        """With the true video; its end is followed by nothing."""
        true = list(itertools.islice(self.true, len(frames)))
        if not true or true[0].shape != frames[0].shape:
            return
        stack = np.stack(true)
        self._plain("true_", stack)
        self._keep("psnr", picture.psnr(frames[: len(stack)], stack))
        if self.mouth_box is not None:
            boxes = self.mouth_box[self.seen : self.seen + len(stack)]
            mask = picture.box_mask(boxes, *stack.shape[1:3])
            some = slice(0, len(boxes))
            self._keep("psnr_mouth", picture.psnr(frames[some], stack[some], mask))
        if self.eyes.read is not None:
            read = self.eyes.read(stack)
            self._keep("true_mouth", read["mouth"])
            self._spread_of("true/reader", read["features"])
        for name, embed in self.eyes.embed.items():
            self._spread_of(f"true/{name}", np.asarray(embed(stack)))

    def _keep(self, name: str, rows: np.ndarray) -> None:
        rows = np.asarray(rows)
        self._rows.setdefault(name, []).append(
            rows.astype(np.float32) if rows.dtype == np.float64 else rows
        )

    def _spread_of(self, name: str, features: np.ndarray) -> None:
        if not np.isfinite(features).all():
            return
        spread = Statistics.of(features.reshape(len(features), -1))
        with contextlib.suppress(KeyError):
            spread = self._spread[name].add(spread)
        self._spread[name] = spread


def spreads(rows: Mapping[str, Any], name: str) -> Statistics | None:
    """What `Observer.result` holds of features by name, such as "made/reader"."""
    if f"count/{name}" not in rows:
        return None
    count, mean, scatter = (rows[f"{field}/{name}"] for field in ("count", "mean", "scatter"))
    return Statistics(int(count), np.asarray(mean), np.asarray(scatter))
