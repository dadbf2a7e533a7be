"""What is judged of which clip: GenBench's protocol, and who looks on while a clip is played."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.data.audio import load_audio
from liveavatar_jax.data.takes import FPS, Take, read_truth
from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax.generate import SAMPLES, portrait
from liveavatar_jax.metrics import sync
from liveavatar_jax.metrics.observe import Eyes, Observer
from liveavatar_jax.types import LiveAvatarError

HORIZON = (0, 100, 1000, 10_000)  # seconds
WINDOW = 10  # seconds of a window
LONG = 300  # seconds


@dataclasses.dataclass(frozen=True)
class Request:
    """What to judge, and by what: the arguments of the command."""

    clips: Path
    out: Path
    weights: Path | None = None
    videos: Path | None = None  # finished videos, ID.mp4 each, instead of a model
    protocol: str = "short"
    limit: int | None = None  # of the list, from its beginning
    seconds: float | None = None  # at most, of each stream; for "long", exactly
    readers: Path | None = None  # of puppets; default: those beside the weights
    faces: bool = False  # look at real faces with the extra `faces`
    embeddings: Path | None = None  # folder of ID.npz, see metrics/embeddings.py
    real: Mapping[str, Path] = dataclasses.field(default_factory=dict)  # features, for Fréchet
    area: int | None = None  # of a picture, in pixels; None: as `generate` has it
    steps: int | None = None
    changes: tuple[str, ...] = ()  # of the model's config, as "stream.history=0.0"
    seed: int = 0
    rows: int | None = None  # streams at once; default: 8 of small pictures, else 1
    dtype: str | None = None
    timing: bool = True  # run `generate` on the first clip, alone
    lead: int | None = None  # of finished videos: frames of the first block that they do not show;
    # None: not known to be made in blocks


@dataclasses.dataclass(frozen=True)
class Window:
    """Video frames that are looked at."""

    name: str  # "" for the only one
    start: int
    stop: int

    @classmethod
    def all(cls, protocol: str, sound: int, seconds: float | None) -> list["Window"]:
        """Those of a protocol, for a sound of so many frames."""
        most = None if seconds is None else int(seconds * FPS)
        if protocol == "short":
            return [cls("", 0, min(sound, most or sound))]
        if protocol == "long":
            return [cls("", 0, most or max(sound, LONG * FPS))]
        found = [cls(f"{s}-{s + WINDOW}", s * FPS, (s + WINDOW) * FPS) for s in HORIZON]
        return [window for window in found if most is None or window.stop <= most]


@dataclasses.dataclass(frozen=True)
class Job:
    """A take with what is known before any of it is made."""

    take: Take
    number: int  # in the list; its noise comes from it
    picture: np.ndarray  # bytes
    samples: np.ndarray
    truth: Mapping[str, np.ndarray]
    windows: list[Window]
    block: int  # frames that are made at once
    latent: int  # frames of a latent
    lead: int | None  # frames of the first block that are not shown; None: no blocks

    @classmethod
    def of(cls, request: Request, number: int, take: Take, cfg: ModelConfig) -> "Job":
        samples, truth = load_audio(take.audio), read_truth(take.truth)
        picture = portrait(take.image, cfg, request.area)
        windows = Window.all(request.protocol, -(-len(samples) // SAMPLES), request.seconds)
        lead = request.lead if request.weights is None else stream.LEAD_FRAMES
        latent = cfg.vae.frames_per_latent
        return cls(take, number, picture, samples, truth, windows, cfg.block, latent, lead)

    @property
    def sound(self) -> int:
        """Frames of the sound; after these it begins again."""
        return -(-len(self.samples) // SAMPLES)

    @property
    def blocks(self) -> int:
        return self.blocks_of(self.windows[-1]).stop

    def blocks_of(self, window: Window) -> range:
        """Those that show something of it."""
        first = (window.start + stream.LEAD_FRAMES) // self.block
        return range(first, -(-(window.stop + stream.LEAD_FRAMES) // self.block))

    def files(self, out: Path) -> list[Path]:
        return [out / "seen" / f"{self.take.id}{_dotted(w)}.npz" for w in self.windows]

    def observer(self, eyes: Eyes, window: Window) -> Observer:
        """Beside the true video where the window lies within it."""
        true = None
        if self.take.file is not None and window.start == 0:
            true = itertools.islice(frames_of(self.take.file), self.sound)
        frames = window.stop - window.start
        box = self.truth.get("mouth_box") if true is not None else None
        return Observer(eyes, self.picture, frames, true=true, mouth_box=box)

    def known(self, window: Window) -> dict[str, np.ndarray]:
        """What the metrics compare with, frame by frame."""
        at = np.arange(window.start, window.stop) % self.sound
        found: dict[str, Any] = {"start": np.asarray(window.start)}
        if self.lead is not None:
            found |= {name: np.asarray(getattr(self, name)) for name in ("lead", "block", "latent")}
        found["level"] = sync.envelope(self.samples)[at].astype(np.float32)
        if (mouth := self.truth.get("mouth")) is not None and len(mouth):
            at = np.minimum(at, len(mouth) - 1)
            found |= {"true_open": mouth[at, 0], "true_width": mouth[at, 1]}
        if "expression" in self.truth:
            found["true_expression"] = self.truth["expression"]
        return found


class Seer:
    """An observer of one window that takes its frames out of a stream, films them, and leaves a
    file when it has seen all."""

    def __init__(self, request: Request, job: Job, window: Window, eyes: Eyes):
        self.window, self.job = window, job
        (self.path,) = [f for f, w in zip(job.files(request.out), job.windows, strict=True)
                        if w == window]  # fmt: skip
        self.observer = job.observer(eyes, window)
        self.film = None
        if request.weights is not None:
            folder = request.out / "videos"
            folder.mkdir(exist_ok=True)
            sound = job.take.audio if window.start == 0 else None
            path = folder / f"{job.take.id}{_dotted(window)}.mp4"
            self.film = VideoWriter(path, job.picture.shape[:2], fps=FPS, audio=sound)

    def see(self, start: int, frames: np.ndarray) -> None:
        """Frames of which the first has number `start`."""
        low = max(self.window.start, start) - start
        mine = frames[low : max(low, self.window.stop - start)]
        if not len(mine):
            return
        self.observer.see(mine)
        if self.film is not None:
            self.film.write(mine)
        if start + low + len(mine) == self.window.stop:
            self.done()

    def done(self) -> None:
        if self.film is not None:
            self.film.close()
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("wb") as file:
            found: dict[str, Any] = self.observer.result() | self.job.known(self.window)
            np.savez(file, **found)
        partial.replace(self.path)


def frames_of(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video, bytes "H W 3" each. Raises LiveAvatarError for what is none."""
    try:
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as file:
            if not file.streams.video:
                raise LiveAvatarError(f"{path} has no picture; give a video such as mp4")
            for frame in file.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (FFmpegError, OSError) as error:
        raise LiveAvatarError(f"cannot read the video {path}: {error.strerror}") from None


def _dotted(window: Window) -> str:
    return f".{window.name}" if window.name else ""
