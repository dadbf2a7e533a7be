"""Watching a run: the progress line, metrics.jsonl, TensorBoard, samples, and what must stop it.

    watch = Watch(run, steps, start=start, flops={"rollout": ..., "critic": ...})
    for step in range(start + 1, steps + 1):
        state, metrics = train_step(state, batch)      # metrics["grads"] = finite(grads)
        watch(step, metrics)                           # reports step - 1: the device never waits
        if step % every == 0:
            with watch.aside():                        # step is finite, and its time is over
                checkpoints.save(step, state, data)

Model-FLOP utilisation, of each phase and in all: the FLOPs that the network's mathematics asks
for in a step (recomputation not counted; given by the caller, over all devices), divided by the
time of the step and by devices · peak of a device.
"""

import contextlib
import io
import json
import os
import shutil
import socket
import struct as bytes_of
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tensorboardX.crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]
from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[attr-defined]

from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax.paths import leaves
from liveavatar_jax.plan.chips import CHIPS
from liveavatar_jax.types import Array, Bool, LiveAvatarError, UInt8, struct

WINDOW = 20  # steps over which the line's time and utilisation are taken
QUIET = 10.0  # seconds between lines where there is no terminal

# What JAX calls the devices of the table of chips; a longer name comes before a shorter one.
_KINDS = {
    "H100": "h100", "H800": "h800", "H200": "h200", "B200": "b200", "TPU v5 lite": "v5e",
    "TPU v5e": "v5e", "TPU v5p": "v5p", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e",
}  # fmt: skip


@struct
class Finite:
    """Which leaves of a tree hold nothing but finite numbers."""

    ok: Bool[Array, " leaf"]
    paths: tuple[str, ...] = field(metadata={"static": True})


def finite(tree: Any) -> Finite:
    """For the metrics of a step, inside of it: one pass over the leaves, one bit of each."""
    floats = {p: x for p, x in leaves(tree).items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    return Finite(jnp.stack([jnp.isfinite(x).all() for x in floats.values()]), tuple(floats))


def peak_flops(dtype: str = "bf16", kind: str | None = None) -> float | None:
    """Peak FLOP/s of a kind of device (default: the first device's), None if it is not known."""
    kind = jax.devices()[0].device_kind if kind is None else kind
    if "PCIe" in kind or "NVL" in kind:  # slower than what the table has under that name
        return None
    name = next((chip for word, chip in _KINDS.items() if f" {word} " in f" {kind} "), None)
    return None if name is None else CHIPS[name].rate(dtype)


def parse_profile(text: str) -> tuple[int, int]:
    """ "10:13" → (10, 13), both included. Raises LiveAvatarError for anything else."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise LiveAvatarError(f"--profile {text} is not FIRST:LAST, as in 10:13 for four steps")
    return int(first), int(last)


class Watch:
    """Reports the steps of one run; a context manager that reports the last one when left.

    run: the folder of the run. steps: how many there shall be; start: how many there are, whose
    reports are kept (later ones, of a run that was cut off, are not). flops: by phase, of one
    step on all devices. peak: FLOP/s of a device, default by `peak_flops`; without, the achieved
    FLOP/s are reported instead of a share. every: steps between records in the files. profile:
    first and last step to trace into RUN/profile. last_good: the newest step on disk.

    All processes call everything; process 0 writes. Raises LiveAvatarError when a number is not
    finite, naming the leaf, and when a file cannot be written.
    """

    def __init__(
        self,
        run: str | Path,
        steps: int,
        *,
        start: int = 0,
        flops: Mapping[str, float] | None = None,
        peak: float | None = None,
        every: int = 1,
        profile: tuple[int, int] | None = None,
        last_good: Callable[[], int | None] = lambda: None,
    ):
        self.run, self.steps, self.every = Path(run), steps, every
        self._flops = dict(flops or {})
        peak = peak_flops() if peak is None else peak
        self._peak = None if peak is None else peak * jax.device_count()
        self._profile, self._tracing = profile, False
        self._last_good = last_good
        self._pending: tuple[int, Mapping[str, Any], Mapping[str, float]] | None = None
        self._ready: float | None = None  # when the step before was done; None: not measurable
        self._began, self._first = time.perf_counter(), start
        self._window: deque[tuple[float, Mapping[str, float]]] = deque(maxlen=WINDOW)
        self._latest: dict[str, float] = {}
        self._files = _Files(self.run, start) if jax.process_index() == 0 else None
        self._line = _Line() if jax.process_index() == 0 else None
        self._trace_before(start + 1)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.settle()
        finally:
            self.close()

    def __call__(
        self, step: int, metrics: Mapping[str, Any], flops: Mapping[str, float] | None = None
    ) -> None:
        """Takes the metrics of a step that was just started; reports those of the one before.

        metrics: numbers and `Finite`s, on the devices. flops: of this step, where steps differ.
        """
        for leaf in jax.tree.leaves(dict(metrics)):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        before = self._pending
        self._pending = (step, metrics, self._flops if flops is None else flops)
        if before is not None:
            self._report(*before)
        if self._profile and step + 1 in (self._profile[0], self._profile[1] + 1):
            self.settle()
            self._trace_before(step + 1)

    def settle(self) -> None:
        """Waits for the pending step and reports it: after this it is known to be finite."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._report(*pending)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Saving, sampling and the like: the pending step is settled and on record first, for a
        run that is killed may go on from what is saved; and the time inside counts for no step."""
        self.settle()
        if self._files is not None:
            self._files.flush()
        try:
            yield
        finally:
            self._ready = time.perf_counter() if self._ready is not None else None

    def sample(
        self,
        step: int,
        frames: UInt8[np.ndarray, "F H W 3"],
        *,
        name: str = "sample",
        fps: int = 25,
    ) -> None:
        """Keeps a clip as RUN/samples/STEP-NAME.mp4 and, smaller, in TensorBoard."""
        if self._files is not None:
            self._files.sample(step, np.asarray(frames), name, fps)

    def close(self) -> None:
        """Ends the line, the trace and the files; what is pending is not reported."""
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
        if self._line is not None:
            self._line.end()
        if self._files is not None:
            self._files.close()

    def _report(self, step: int, metrics: Mapping[str, Any], flops: Mapping[str, float]) -> None:
        values = jax.device_get(dict(metrics))
        now = time.perf_counter()
        numbers = {name: float(v) for name, v in values.items() if not isinstance(v, Finite)}
        self._require_finite(step, values, numbers)
        if self._ready is not None:
            seconds = now - self._ready
            self._window.append((seconds, flops))
            numbers |= {"time/step": seconds, **self._utilisation([(seconds, flops)])}
        self._ready = now
        self._latest |= numbers
        if self._files is not None and (step % self.every == 0 or step == self.steps):
            self._files.write(step, numbers)
        if self._line is not None:
            self._line.show(lambda: self._text(step, now), last=step == self.steps)

    def _require_finite(
        self, step: int, values: Mapping[str, Any], numbers: Mapping[str, float]
    ) -> None:
        said = None
        for name, value in values.items():
            if isinstance(value, Finite) and not value.ok.all():
                bad = [path for path, ok in zip(value.paths, value.ok, strict=True) if not ok]
                said = said or (f"{name}: {bad[0]} is not finite "
                                f"({len(bad)} of {len(value.paths)} leaves)")  # fmt: skip
        for name, number in numbers.items():
            if not np.isfinite(number):
                said = said or f"{name} is {number}"
        if said is None:
            return
        good = self._last_good()
        kept = "no step was saved yet" if good is None else f"the last good step saved is {good}"
        raise LiveAvatarError(
            f"step {step}: {said}; {kept}, and going on as before would end here again: lower the "
            "learning rate, clip the gradients, or look at the data of this step"
        )

    def _utilisation(self, steps: Any) -> dict[str, float]:
        """By phase, over (seconds, flops) of steps; shares of the peak, or else FLOP/s."""
        seconds = sum(each for each, _ in steps)
        totals: dict[str, float] = {}
        for _, flops in steps:
            for phase, count in flops.items():
                totals[phase] = totals.get(phase, 0.0) + count
        if not totals or seconds <= 0:
            return {}
        word, unit = ("mfu", self._peak) if self._peak else ("flops", 1.0)
        parts = {f"{word}/{phase}": count / seconds / unit for phase, count in totals.items()}
        return {f"{word}/all": sum(parts.values()), **parts}

    def _text(self, step: int, now: float) -> str:
        ours = ("time/", "mfu/", "flops/")
        plain = [f"{n} {x:.4g}" for n, x in self._latest.items() if not n.startswith(ours)]
        words = [f"step {step}/{self.steps}", *plain]
        if self._window:
            mean = sum(seconds for seconds, _ in self._window) / len(self._window)
            words.append(f"{1e3 * mean:.0f} ms" if mean < 10 else f"{mean:.1f} s")
            words.append(f"{1 / mean:.3g} steps/s")
            for name, value in self._utilisation(self._window).items():
                phase = name.removesuffix("/all").replace("/", " ")
                words.append(f"{phase} {value:.1%}" if self._peak else f"{phase} {value:.3g}/s")
        left = (now - self._began) / max(1, step - self._first) * (self.steps - step)
        words.append(f"{_clock(left)} left")
        return " · ".join(words)

    def _trace_before(self, step: int) -> None:
        if self._profile is None:
            return
        first, last = self._profile
        if step == last + 1 and self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
        if first <= step <= last and not self._tracing:
            jax.profiler.start_trace(str(self.run / "profile"))
            self._tracing = True


class _Line:
    """One line that is written over on a terminal; elsewhere a line every `QUIET` seconds."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._next = 0.0
        self._open = False

    def show(self, text: Callable[[], str], last: bool) -> None:
        now = time.monotonic()
        if now < self._next and not last:
            return
        self._next = now + (0.1 if self._live else QUIET)
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{text()[:width]}\x1b[K", end="", file=sys.stderr, flush=True)
            self._open = True
        else:
            print(text(), file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._open:
            print(file=sys.stderr)
            self._open = False


class _Files:
    """metrics.jsonl, event files and samples below the folder of a run."""

    def __init__(self, run: Path, start: int):
        self._run = run
        with _writing(run):
            run.mkdir(parents=True, exist_ok=True)
            _forget(run / "metrics.jsonl", start)
            self._lines = (run / "metrics.jsonl").open("a")
            self._events = _open_events(run / "tensorboard", start)
        self._flush_at = 0.0

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()]
        with _writing(self._run):
            self._lines.write(json.dumps({"step": step, "at": time.time(), **numbers}) + "\n")
            _append(self._events, Event(summary=Summary(value=values), step=step))
            if time.monotonic() > self._flush_at:
                self.flush()

    def sample(self, step: int, frames: np.ndarray, name: str, fps: int) -> None:
        folder = self._run / "samples"
        with _writing(folder):
            folder.mkdir(exist_ok=True)
            with VideoWriter(folder / f"{step:07d}-{name}.mp4", frames.shape[1:3], fps=fps) as out:
                out.write(frames)
            height, width, gif = _animation(frames, fps)
            image = Summary.Image(height=height, width=width, colorspace=3,
                                  encoded_image_string=gif)  # fmt: skip
            value = Summary.Value(tag=name, image=image)
            _append(self._events, Event(summary=Summary(value=[value]), step=step))
            self.flush()

    def flush(self) -> None:
        with _writing(self._run):
            self._lines.flush()
            self._events.flush()
        self._flush_at = time.monotonic() + 1.0

    def close(self) -> None:
        with _writing(self._run):
            self._lines.close()
            self._events.close()


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LiveAvatarError(
            f"{path} cannot be written ({error.strerror}); make room or name another run folder"
        ) from None


def _forget(path: Path, start: int) -> None:
    """Drops the records after a step, and a last one that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= start:
                kept.append(line + "\n")
    part = path.with_suffix(".part")
    part.write_text("".join(kept))
    os.replace(part, path)


def _open_events(folder: Path, start: int) -> BinaryIO:
    """A new event file; TensorBoard forgets what older ones say of steps after `start`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time_ns() // 1000:017d}.{socket.gethostname()}"
    file = (folder / name).open("wb")
    _append(file, Event(file_version="brain.Event:2"))
    _append(file, Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
    return file


def _append(file: BinaryIO, event: Event) -> None:
    """One TFRecord. (tensorboardX's own writer starts a queue and a thread, and syncs the disk.)"""
    event.wall_time = time.time()
    data = event.SerializeToString()
    length = bytes_of.pack("<Q", len(data))
    file.write(length + _masked(length) + data + _masked(data))


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return bytes_of.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _animation(frames: np.ndarray, fps: int, side: int = 256) -> tuple[int, int, bytes]:
    """Height, width and the GIF of every other frame, its longer side at most `side` pixels."""
    images = [Image.fromarray(frame) for frame in frames[::2]]
    for image in images:
        image.thumbnail((side, side))
    out = io.BytesIO()
    first, *others = [image.quantize(64, Image.Quantize.FASTOCTREE) for image in images]
    first.save(out, "GIF", save_all=True, append_images=others, duration=2000 // fps, loop=0)
    return first.height, first.width, out.getvalue()


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
