"""One session: what it is doing, who watches, and when it is over.

Whatever happens in a session is said to that session alone.
"""

import asyncio
import collections
import dataclasses
import logging
import secrets
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from serve.auth import Bucket
from serve.clock import Clock, Idle, Overflow, Shown, Timeline, publish
from serve.headroom import Work
from serve.link import Link
from serve.metrics import Metrics
from serve.wire import (
    RATE,
    Block,
    Change,
    Changed,
    Clear,
    Hear,
    Opened,
    Ready,
)

log = logging.getLogger("serve.session")

PAUSE = 1.0  # seconds after which what came is all of a speech, where less than a block of it did
LINES = 6  # of who speaks: events, a call, and those of before that are not gone yet
WARNING = 30.0  # seconds before the end that `session.expiring` comes
CLEARS = 2.0  # interrupts a second; ten times as many at once
MARGIN = (0.16, 0.8)  # seconds before the picture runs out that silence is asked for, within

Mark = Callable[[np.ndarray], np.ndarray]  # what is drawn into each frame

# reason: (WebSocket close code, whether to try again)
REASONS = {
    "done": (1000, False),
    "left": (1000, False),
    "refused": (1000, False),
    "slow": (1013, True),
    "idle": (1000, False),
    "too_long": (1000, False),
    "draining": (1001, True),
    "engine": (1011, True),
}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Seconds, but for `lookahead`, blocks, `viewers`, and `busy`, a share of real time."""

    longest: float = 3600.0
    idle: float = 300.0  # nobody speaks
    grace: float = 30.0  # nobody is there
    speech: float = 120.0  # of sound that may wait
    lookahead: int = 2
    viewers: int = 4
    busy: float = 0.6  # that an engine, and the front, may need with one session more


class Problem(Exception):
    """What a caller is told, as RFC 9457 has it. kind: the stable last part of `type`."""

    def __init__(self, status: int, kind: str, detail: str, after: float | None = None):
        super().__init__(detail)
        self.status, self.kind, self.detail, self.after = status, kind, detail, after


class Viewer(Protocol):
    """Somebody who watches or speaks. No call waits: who is slow loses frames, or leaves."""

    watching: bool  # whether frames are wanted, or events alone
    speaks: bool  # or may only watch

    def show(self, shown: Shown) -> None: ...
    def tell(self, event: dict[str, Any]) -> None: ...
    def clear(self, epoch: int) -> None: ...
    def close(self, reason: str) -> None: ...


@dataclasses.dataclass
class Worker:
    """An engine, and the ids of the sessions it holds: its slots are free when it says so."""

    link: Link
    held: set[str] = dataclasses.field(default_factory=set)
    work: Work = dataclasses.field(default_factory=Work)
    opening: asyncio.Lock = dataclasses.field(default_factory=asyncio.Lock)  # one at a time

    @property
    def ready(self) -> Ready | None:
        return self.link.health.ready

    @property
    def free(self) -> int:
        return 0 if self.ready is None else self.ready.slots - len(self.held)

    @property
    def load(self) -> float:
        """The share of real time that it would need with one session more."""
        return self.share(len(self.held) + 1)

    def share(self, sessions: int) -> float:
        return 0.0 if self.ready is None else self.work.share(sessions, self.ready)


class Session:
    """One stream. Its methods are called in the event loop's thread and never wait."""

    def __init__(
        self, worker: Worker, ready: Ready, limits: Limits, metrics: Metrics, clock: Clock,
        *, live: bool, idle: Idle, prompt: str = "", rate: int = RATE,
        metadata: dict[str, str] | None = None, mark: Mark | None = None,
    ):  # fmt: skip
        self._mark = mark
        self.prompt, self.rate, self.metadata = prompt, rate, metadata or {}
        self.skew: float | None = None  # seconds by which a call sends pictures after their sound
        self.roomed = False  # shown in a room, which wants each frame made for its samples
        self.id = secrets.token_urlsafe(9)
        self.worker, self.ready, self.limits, self.metrics = worker, ready, limits, metrics
        self.timeline = Timeline(
            ready.frames, ready.ahead, lookahead=self.lookahead, live=live, idle=idle,
            limit=limits.speech,
        )  # fmt: skip
        if ready.delay:  # as long as a block may take; it becomes less once that is known
            self.timeline.margin = self._most
        self.state, self.reason = "opening", ""
        self.viewers: list[Viewer] = []
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Created; opened; last speech; last viewer.
        self.begun = self.since = self.heard = self.seen = clock.now()
        self.stalls = 0.0
        self.turns: collections.deque[float] = collections.deque(maxlen=100)
        self._warned: set[str] = set()  # of which ends
        self.turned = 0  # turns
        self._clock = clock
        self._asked: collections.deque[float] = collections.deque()
        self._arrived = 0.0  # when the last block did
        self._changing: str | None = None  # the prompt that the engine is told
        self._wanted: str | None = None  # the one after it
        self._clears = Bucket(CLEARS, 10 * CLEARS)
        # Of the last blocks: their first sample, when they were asked for, and when they came.
        self._blocks: collections.deque[tuple[int, float, float]]
        self._blocks = collections.deque(maxlen=self.lookahead + 4)
        # The first of the samples that came in at once, and when.
        self._came: collections.deque[tuple[int, float]] = collections.deque(maxlen=10_000)
        self._shown = 0
        self._rate = (clock.now(), 0, 0.0)  # when frames were counted last; how many; a second
        self._task: asyncio.Task | None = None

    @property
    def lookahead(self) -> int:
        """Blocks that may be ahead of what is shown; those in the stages of a pipeline beside."""
        return self.limits.lookahead + self.ready.delay

    @property
    def _most(self) -> float:
        """Seconds before the picture runs out that silence is asked for, at most."""
        return MARGIN[1] + self.ready.delay * self.timeline.block / RATE

    # ---- what a caller does

    def speak(self, samples: np.ndarray, epoch: int | None = None) -> None:
        """Sound, int16 at 16 kHz. That of an older epoch is dropped. Raises Problem when too much
        waits."""
        if self.state == "closed" or epoch not in (None, self.timeline.epoch):
            return
        first, now = self.timeline.came, self._clock.now()
        try:
            self.timeline.push(samples)
        except Overflow as error:
            raise Problem(429, "too-far-ahead", str(error), 1.0) from None
        if self.timeline.came > first:
            self._came.append((first, now))
        if not self.timeline.live:
            self.heard = now

    def end(self) -> None:
        """What was sent is all of this speech. Raises Problem when too many wait."""
        try:
            self.timeline.end()
        except Overflow as error:
            raise Problem(429, "too-far-ahead", str(error), 1.0) from None

    def keep(self) -> None:
        """Nobody speaks, but somebody will."""
        self.heard = self._clock.now()

    def settle(self) -> None:
        """A pause is an end, where nobody said so: less than a block would wait for ever."""
        if self.timeline.short and self._clock.now() - self._came[-1][1] > PAUSE:
            self.end()

    def interrupt(self) -> None:
        """Nothing of what was said before is shown after this. Raises Problem when it comes too
        often: each makes the engine begin a block anew, and its other sessions wait for that."""
        if (wait := self._clears.take("", self._clock.now())) > 0:
            raise Problem(429, "too-fast", "fewer interrupts a second, please", wait)
        begun, played = self._clock.now(), self.timeline.clear()
        self.worker.link.send(Clear(self.id, self.timeline.epoch))
        self._asked.clear()
        self._blocks.clear()
        self._came.clear()
        played_ms = round(1000 * played)
        for viewer in list(self.viewers):
            viewer.clear(self.timeline.epoch)
        if self.state == "speaking":
            self.tell("speech.ended", played_ms=played_ms, interrupted=True)
            self._become("ready")
        self.tell("audio.cleared", played_ms=played_ms)
        self.metrics.clear.observe(self._clock.now() - begun)

    def change(self, prompt: str | None = None, idle: Idle | None = None) -> None:
        """From the next block on; `session.updated` says from which sample. Raises Problem for a
        session that cannot rest."""
        if idle is not None and idle != "generate" and self.roomed:
            raise Problem(409, "bad-input", "in a room, idle is generate")
        self.timeline.idle = idle or self.timeline.idle
        if prompt is not None:
            self._wanted = prompt  # one is on its way at a time, for each keeps the engine busy
            if self._changing is None:
                self._change()
        elif idle is not None:
            self._updated(self.timeline.made)

    def _change(self) -> None:
        self._changing, self._wanted = self._wanted, None
        if self._changing is not None:
            self.worker.link.send(Change(self.id, self._changing))

    def _updated(self, at_sample: int) -> None:
        self.tell("session.updated", prompt=self.prompt, idle=self.timeline.idle,
                  at_sample=at_sample)  # fmt: skip

    def join(self, viewer: Viewer) -> None:
        """Raises Problem when too many watch; they take no place of who speaks."""
        if self.state == "closed":
            raise Problem(410, "session-closed", f"the session has ended: {self.reason}")
        alike = sum(x.speaks == viewer.speaks for x in self.viewers)
        if alike >= (LINES if viewer.speaks else self.limits.viewers):
            raise Problem(429, "too-many-viewers", "as many watch as may", 5.0)
        self.viewers.append(viewer)
        self.seen = self._clock.now()

    def leave(self, viewer: Viewer) -> None:
        if viewer in self.viewers:
            self.viewers.remove(viewer)
            self.seen = self._clock.now()

    def tell(self, kind: str, **fields: Any) -> None:
        event = {"type": kind, "epoch": self.timeline.epoch, **fields}
        for viewer in list(self.viewers):
            viewer.tell(event)

    # ---- what the engine says

    def hear(self, message: Opened | Changed | Block) -> None:
        if isinstance(message, Changed):
            self.prompt = self._changing or self.prompt
            self._change()
            current = message.epoch == self.timeline.epoch
            self._updated(message.first + self.timeline.again if current else 0)
            return
        if isinstance(message, Opened):
            self.since = self.heard = self.seen = self._clock.now()
            self._become("ready")
            if not self.opened.done():
                self.opened.set_result(None)
            ask = lambda samples: self._ask(samples)
            job = publish(self.timeline, ask, self._show, self._clock, self._stalled)
            self._task = asyncio.create_task(job)
            self._task.add_done_callback(self._published)
            return
        now = self._clock.now()
        if message.epoch == self.timeline.epoch and self._asked:
            asked = self._asked.popleft()
            self._blocks.append((message.first + self.timeline.again, asked, now))
            low = MARGIN[0]
            if self.ready.delay:  # its way through the stages, on which others are before it
                wanted = min(self._most, 0.08 + 1.2 * (now - asked))
            else:  # without its wait in a queue
                took = now - max(asked, self._arrived)
                wanted = min(self._most, max(low, 0.08 + 1.5 * took))
            # Up at once, down slowly: an engine that was late once may be so again.
            self.timeline.margin = max(wanted, 0.95 * self.timeline.margin)
        self._arrived = now
        for stage, seconds in message.seconds.items():
            self.metrics.block.labels(stage).observe(seconds)
        self.timeline.arrive(message)

    def _published(self, task: asyncio.Task) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("publisher of a session failed", exc_info=task.exception())

    def _ask(self, samples: np.ndarray) -> None:
        self._asked.append(self._clock.now())
        self.worker.link.send(Hear(self.id, self.timeline.epoch, samples))

    def _show(self, shown: Shown) -> None:
        if self._mark is not None:
            shown = dataclasses.replace(shown, frame=self._mark(shown.frame))
        if not self._shown:
            self.metrics.first_frame.observe(self._clock.now() - self.begun)
        self._shown += 1
        self.metrics.frames.inc()
        for first, _, came in self._blocks:
            if first == shown.first:
                self.metrics.block.labels("publish").observe(self._clock.now() - came)
        for kind, fields in shown.events:
            if kind == "speech.started":
                self._become("speaking")
                fields = self._turn(**fields)
            else:
                self._become("ready")
            self.tell(kind, **fields)
        for viewer in list(self.viewers):
            if viewer.watching:
                viewer.show(shown)

    def _turn(self, at_sample: int, source: int) -> dict[str, Any]:
        """How long speech took from its first sample in to its frame out, and where."""
        began, now = self._since(source), self._clock.now()
        _, asked, came = next(block for block in reversed(self._blocks) if block[0] <= at_sample)
        self.turns.append(now - began)
        self.turned += 1
        self.metrics.turn.observe(now - began)
        spent = {"turn": now - began, "fill": asked - began, "make": came - asked,
                 "clock": now - came}  # fmt: skip
        return {"at_sample": at_sample} | {
            f"{name}_ms": round(1000 * seconds) for name, seconds in spent.items()
        }

    def _since(self, source: int) -> float:
        """When a sample came in."""
        while len(self._came) > 1 and self._came[1][0] <= source:
            self._came.popleft()
        return self._came[0][1]

    def _stalled(self, seconds: float) -> None:
        self.stalls += seconds
        self.metrics.stalls.inc(seconds)

    def _become(self, state: str) -> None:
        if self.state not in (state, "closed"):
            self.state = state
            self.tell("session.state", state=state)

    # ---- how it goes, and how it ends

    def stats(self) -> dict[str, Any]:
        now, (when, count, rate) = self._clock.now(), self._rate
        if now - when >= 0.9:
            rate = (self._shown - count) / (now - when)
            self._rate = (now, self._shown, rate)
        return {
            "state": self.state,
            "fps": round(rate, 1),
            "frames": self._shown,
            "turn_ms": round(1000 * self.turns[-1]) if self.turns else None,
            "buffer_ms": round(1000 * self.timeline.buffered),
            "waiting_ms": round(1000 * self.timeline.waiting / RATE),
            "stall_ms": round(1000 * self.stalls),
            "gap_ms": round(1000 * self.timeline.gaps / RATE),
            "skew_ms": None if self.skew is None else round(1000 * self.skew),
            "viewers": sum(viewer.watching for viewer in self.viewers),
        }

    def overdue(self) -> str | None:
        """The reason for which it is over, if it is; warns before."""
        now, limits = self._clock.now(), self.limits
        if self.state == "opening":
            return None
        if self._task is not None and self._task.done():
            return "engine"
        if self.timeline.speaking:
            self.heard = now
        left = {
            "too_long": self.since + limits.longest - now,
            "idle": self.heard + limits.idle - now,
            "left": limits.grace if self.viewers else self.seen + limits.grace - now,
        }
        reason, soonest = min(left.items(), key=lambda item: item[1])
        if soonest <= 0:
            return reason
        for why, limit in (("too_long", limits.longest), ("idle", limits.idle)):
            if left[why] >= min(WARNING, max(2.0, limit / 2)):
                self._warned.discard(why)
            elif self.viewers and why not in self._warned:
                self._warned.add(why)
                self.tell("session.expiring", in_s=round(left[why]), why=why)
        return None

    def finish(self, reason: str, detail: str = "") -> None:
        """Once; whoever is there is told why."""
        if self.state == "closed":
            return
        self.tell("session.closed", reason=reason, detail=detail)
        self.state, self.reason = "closed", reason
        if self._task is not None:
            self._task.cancel()
        if not self.opened.done():
            kind = "engine-fault" if reason == "engine" else reason.replace("_", "-")
            self.opened.set_exception(Problem(503, kind, detail or reason, 5.0))
            self.opened.exception()  # it may be that nobody waits for it any more
        for viewer in list(self.viewers):
            viewer.close(reason)
        self.viewers.clear()
        timeline = self.timeline
        self.metrics.gaps.inc(timeline.gaps / RATE)
        self.metrics.dropped.labels("stale").inc(timeline.stale)
        self.metrics.ended.labels(reason).inc()
        seconds = self._clock.now() - self.begun
        self.metrics.length.observe(seconds)
        log.info("session ended", extra={"about": {
            "reason": reason, "seconds": round(seconds, 1), "frames": self._shown,
            "stall_s": round(self.stalls, 3), "gap_s": round(timeline.gaps / RATE, 3),
            "turns": self.turned,
        }})  # fmt: skip
