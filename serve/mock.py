"""Frames without a model: a face in the session's colour, whose mouth is as open as the sound is
loud, and a strip of bits that says whose frame it is and of when. For tests, load and demos.
"""

import functools
import time
import zlib
from collections.abc import Mapping

import numpy as np

from serve.engine import Window
from serve.wire import PER_FRAME, Ready

SIZE, CELL = 256, 16  # pixels of a frame's side, and of a bit's: as large as a codec's blocks
BITS = {"session": 16, "epoch": 16, "frame": 32}
OPEN = 6000.0  # RMS of int16 at which the mouth is as open as it gets


def tag(session: str) -> int:
    """16 bits that stand for a session."""
    return zlib.crc32(session.encode()) & 0xFFFF


def colour(session: str) -> np.ndarray:
    """Of the face, [3] bytes: bright, and another for each session."""
    return 96 + np.frombuffer(zlib.crc32(session.encode()).to_bytes(4, "big"), np.uint8)[:3] // 2


def read(frame: np.ndarray) -> dict[str, int]:
    """What the strip of a frame says, also after a lossy codec."""
    rows = sum(BITS.values()) * CELL // SIZE
    cells = frame[: rows * CELL, :, :].astype(np.float32).mean(-1)
    cells = cells.reshape(rows, CELL, SIZE // CELL, CELL).mean((1, 3)).reshape(-1) > 127
    said, at = {}, 0
    for name, count in BITS.items():
        bits = cells[at : at + count]
        said[name], at = int("".join("1" if bit else "0" for bit in bits), 2), at + count
    return said


def opening(frame: np.ndarray) -> float:
    """How open the mouth of a frame is, 0 to 1."""
    middle = frame[SIZE // 2 + 20 : SIZE // 2 + 80, SIZE // 2 - 2 : SIZE // 2 + 2]
    mouth = middle.astype(np.float32).mean((1, 2))
    return float(np.sum(mouth < 60) / 60)


@functools.lru_cache(64)
def face(session: str) -> np.ndarray:
    """Without a mouth, [256, 256, 3]."""
    picture = np.full((SIZE, SIZE, 3), 32, np.uint8)
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE // 2
    picture[(x / 90.0) ** 2 + (y / 105.0) ** 2 < 1] = colour(session)
    return picture


def draw(session: str, epoch: int, frame: int, samples: np.ndarray) -> np.ndarray:
    """The frame, [256, 256, 3], that goes with 640 samples."""
    picture = face(session).copy()
    loud = np.sqrt(np.mean(samples.astype(np.float32) ** 2)) if len(samples) else 0.0
    height = 60 * min(1.0, float(loud) / OPEN)
    if height > 0:
        y, x = np.mgrid[-30:31, -30:31]
        mouth = picture[SIZE // 2 + 20 : SIZE // 2 + 81, SIZE // 2 - 30 : SIZE // 2 + 31]
        mouth[(x / 30.0) ** 2 + (y / (height / 2)) ** 2 < 1] = 16
    values = {"session": tag(session), "epoch": epoch & 0xFFFF, "frame": frame & 0xFFFFFFFF}
    said = "".join(f"{values[name]:0{count}b}" for name, count in BITS.items())
    bits = np.array([bit == "1" for bit in said]).reshape(-1, SIZE // CELL)
    strip = np.kron(bits, np.ones((CELL, CELL)))[..., None] * np.uint8(255)
    picture[: len(strip)] = strip
    return picture


class Mock:
    """A `Maker` of drawn frames. seconds: what a block takes."""

    left = 0

    def __init__(self, slots: int, frames: int = 12, ahead: int = 1920, seconds: float = 0.0):
        self.ready = Ready("mock", SIZE, SIZE, slots, frames, ahead, 0)
        self.seconds = seconds
        self.took: dict[str, float] = {}

    def open(self, slot: int, picture: np.ndarray, prompt: str, seed: int) -> None:
        pass

    def change(self, slot: int, prompt: str) -> None:
        pass

    def close(self, slot: int) -> None:
        pass

    def memory(self) -> dict[str, float]:
        return {}

    def make(self, windows: Mapping[int, Window]) -> Mapping[int, np.ndarray]:
        if self.seconds:
            time.sleep(self.seconds)
        return {slot: self._block(window) for slot, window in windows.items()}

    def _block(self, window: Window) -> np.ndarray:
        cut = [window.samples[PER_FRAME * i : PER_FRAME * (i + 1)]
               for i in range(self.ready.frames)]  # fmt: skip
        first = window.first // PER_FRAME
        return np.stack([draw(window.session, window.epoch, first + i, said)
                         for i, said in enumerate(cut)])  # fmt: skip
