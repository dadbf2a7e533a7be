"""Processes that decode and filter clips, some ahead of who takes them, in order."""

import collections
import dataclasses
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from liveavatar_jax.data.filters import Dropped, Kept, WindowConfig, examine
from liveavatar_jax.data.listing import Entry


@dataclasses.dataclass(frozen=True)
class Job:
    """A clip of the list with its file, or with the reason why it is not to be opened."""

    entry: Entry
    path: Path | None
    whole: bool | None = True  # see listing.Found
    scores: dict[str, float] = dataclasses.field(default_factory=dict)
    dropped: Dropped | None = None


def examined(
    jobs: Iterable[Job], cfg: WindowConfig, workers: int
) -> Generator[tuple[Job, Kept | Dropped], None, None]:
    """What becomes of each job, in their order; at most `workers` + 2 are decoded ahead.

    A process that dies, be it by a decoder that crashes or for want of memory, costs the clip it
    was at: those in progress are tried again, the first of them alone.
    """
    jobs, ahead, pool = iter(jobs), collections.deque(), _pool(workers)
    try:
        while True:
            for job in itertools.islice(jobs, workers + 2 - len(ahead)):
                ahead.append((job, _submit(pool, job, cfg)))
            if not ahead:
                return
            job, future = ahead.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                pool.shutdown(wait=False, cancel_futures=True)
                result = _alone(job, cfg)
                pool = _pool(workers)
                again = [job for job, _ in ahead]
                ahead = collections.deque((job, _submit(pool, job, cfg)) for job in again)
            yield job, result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def run(job: Job, cfg: WindowConfig) -> Kept | Dropped:
    """In a process of its own: one clip."""
    if job.dropped is not None or job.path is None:
        return job.dropped or Dropped("missing")
    entry = job.entry
    return examine(
        job.path,
        cfg,
        start=entry.start or 0.0,
        end=entry.end,
        whole=job.whole,
        x=entry.x,
        y=entry.y,
    )


def _submit(pool: ProcessPoolExecutor, job: Job, cfg: WindowConfig) -> Future:
    if job.dropped is None:
        try:
            return pool.submit(run, job, cfg)
        except BrokenProcessPool as error:
            broken = Future()
            broken.set_exception(error)
            return broken
    future = Future()
    future.set_result(job.dropped)
    return future


def _alone(job: Job, cfg: WindowConfig) -> Kept | Dropped:
    with _pool(1) as pool:
        try:
            return pool.submit(run, job, cfg).result()
        except BrokenProcessPool:
            return Dropped("crash", "the process that decoded it died")


def _pool(workers: int) -> ProcessPoolExecutor:
    # Not forked: a copy of a process with a device and its threads may hang.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, context, _begin)


def _begin() -> None:
    """Interrupts are for the main process, and no worker outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
