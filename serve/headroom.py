"""Whether there is room for one more session, seen before those that run would notice.

An engine needs some seconds to make one block for each of its sessions. While these are well below
what a block lasts, no ask waits for longer than about twice as long, and the margin of every
session covers that. The front needs its event loop, and that in time. Both are told as shares of
real time, foreseen for a number of sessions from what those cost that were there of late.
"""

import asyncio
import collections
import random
import time
from collections.abc import Callable

from serve.clock import Clock
from serve.wire import FPS, Block, Ready

RECENT = 5.0  # seconds that are looked back
FEW = 10  # blocks that are looked back at least: an engine at rest is as fast as it was
PROBE = 0.1  # seconds between two looks at how late the front is
LATE = 1 / FPS  # seconds; a front as late as this has no time left


class Work:
    """What the blocks of an engine took of late."""

    def __init__(self) -> None:
        self._took: collections.deque[tuple[float, float, float]] = collections.deque()

    def add(self, now: float, block: Block) -> None:
        made, sent = (block.seconds.get(stage, 0.0) for stage in ("make", "send"))
        self._took.append((now, made, sent))
        while len(self._took) > FEW and self._took[0][0] < now - RECENT:
            self._took.popleft()

    def share(self, sessions: int, ready: Ready) -> float:
        """Of real time, for the blocks of so many sessions; 0 while nothing is known."""
        if not self._took:
            return 0.0
        _, made, sent = (sum(each) / len(self._took) for each in zip(*self._took, strict=True))
        steps = 1 if ready.together else sessions
        return (steps * made + sessions * sent) * FPS / ready.frames


class Pulse:
    """How busy the front's loop is, and how late."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self._each: float | None = None  # share of the loop's thread that a session takes
        self._late: collections.deque[float] = collections.deque(maxlen=round(RECENT / PROBE))

    async def run(self, count: Callable[[], int]) -> None:
        """For ever. count: of sessions that are there now."""
        while True:
            begun, spent, sessions = self._clock.now(), time.thread_time(), count()
            for _ in range(round(1 / PROBE)):
                wait = random.uniform(0.5, 1.5) * PROBE  # in step with nothing else
                due = self._clock.now() + wait
                await self._clock.sleep(wait)
                await asyncio.to_thread(lambda: None)  # frames are encoded in threads
                self._late.append(self._clock.now() - due)
            if sessions and (now := count()):
                share = (time.thread_time() - spent) / (self._clock.now() - begun)
                each = 2 * share / (sessions + now)
                self._each = each if self._each is None else 0.7 * self._each + 0.3 * each

    def share(self, sessions: int) -> float:
        """Of real time, for so many sessions; 0 while nothing is known."""
        late = sorted(self._late)[len(self._late) * 9 // 10] if self._late else 0.0
        return max(sessions * (self._each or 0.0), late / LATE)
