"""One time base: sound and picture of a session on one count of 16 kHz samples, per epoch.

Frame n of an epoch and its samples [640 n, 640 (n + 1)) belong together from the engine to the
viewer. A `Timeline` decides what the engine hears next, and pairs what it makes with what it
heard; it is plain bookkeeping, knows no clock, and so can be driven through a day in seconds.
`publish` is the one clock: it takes a pair each 40 ms, and never faster.

What the engine is told, ahead of what is shown:
    speech that is there      as soon as it fills a block, while no more than `lookahead` blocks are
                              ahead of what is shown
    silence while nobody      just in time, `margin` before the picture runs out: so a new turn
    speaks                    waits for no queued silence
    speech that comes late    at the last moment what is there, and silence after it: the gap makes
                              the next deadline later, so jitter is met by as much delay as it needs
"""

import asyncio
import collections
import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import numpy as np

from serve.wire import FPS, PER_FRAME, RATE, Block

QUIET = 60  # of int16, RMS: what a live microphone may say without being somebody who speaks
PIECE = RATE // 50  # of live sound that is dropped at once when it lags and is quiet
LAG = RATE // 2  # of live sound that is behind by more than it must, before quiet is dropped
ENDS = 100  # speeches that may wait
LATE = 0.2  # seconds that the clock catches up with; more are a stall
LOOP = 75  # frames of silence that are shown again and again, there and back
FADE = 5  # frames from them to what is new

Idle = Literal["generate", "loop", "freeze"]


class Overflow(Exception):
    """More speech than may wait."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """What goes out together: a frame [H, W, 3] and its 640 samples, int16. first: its sample in
    the epoch; events: what begins or ends with it, as (name, fields)."""

    epoch: int
    first: int
    frame: np.ndarray
    samples: np.ndarray
    events: tuple[tuple[str, dict[str, Any]], ...] = ()


@dataclasses.dataclass
class Span:
    """Somebody speaks. pieces: where, [first, end) in the epoch, with gaps between; they grow until
    it is over. source: the place of its first sample among all that came in."""

    pieces: list[list[int]]
    source: int
    over: bool = False
    begun: bool = False

    @property
    def first(self) -> int:
        return self.pieces[0][0]

    @property
    def end(self) -> int:
        return self.pieces[-1][1]

    def add(self, first: int, end: int) -> None:
        if first == self.end:
            self.pieces[-1][1] = end
        else:
            self.pieces.append([first, end])

    def seconds(self, played: int) -> float:
        """Of speech, without gaps, that were shown when `played` samples were."""
        return sum(max(0, min(played, end) - first) for first, end in self.pieces) / RATE


class Timeline:
    """All counts are samples of the current epoch.

    live: a microphone, which goes on whether somebody speaks or not: quiet pieces are dropped when
    it lags. idle: while nobody speaks, frames are generated; or, when LOOP of them were shown,
    these again, there and back, and the first ones of what is said fade in; or the last frame
    stands, but for one block of silence, so that there is one. What is shown again counts as any
    other sample, but the engine does not know of it. It may be set at any time.
    """

    def __init__(
        self,
        block: int,
        ahead: int,
        *,
        lookahead: int = 2,
        margin: float = 0.2,
        limit: float = 120.0,
        live: bool = False,
        idle: Idle = "generate",
    ):
        self.block, self.ahead, self.lookahead = block * PER_FRAME, ahead, lookahead
        self.margin, self.limit = margin, int(limit * RATE)
        self.live, self.idle = live, idle
        self.epoch = 0
        self.gaps = self.dropped = self.stale = 0  # samples of silence within speech; of quiet that
        # was dropped; frames of older epochs
        self.total = 0  # samples shown, of all epochs
        self._begin()

    def _begin(self) -> None:
        self.came = self.sent = self.made = self.played = 0
        self._waiting: collections.deque[np.ndarray] = collections.deque()
        self.waiting = 0
        self._ends: collections.deque[int] = collections.deque()  # of speeches that wait: samples
        self._heard: collections.deque[np.ndarray] = collections.deque()  # from `played` to `sent`
        self._frames: collections.deque[np.ndarray] = collections.deque()
        self._spans: collections.deque[Span] = collections.deque()
        self._speaking: Span | None = None
        self._rested = 0  # what was shown when the picture stands still as it should
        self.again = 0  # samples of frames that were shown again
        self._silent: collections.deque[np.ndarray] = collections.deque(maxlen=LOOP)
        self._resting, self._at, self._fade = False, 0, 0

    # ---- in

    def push(self, samples: np.ndarray) -> None:
        """Speech, int16. Raises Overflow when more than `limit` seconds would wait."""
        if self.waiting + len(samples) > self.limit:
            raise Overflow(
                f"{(self.waiting + len(samples)) / RATE:.0f} s of sound would wait; send no more "
                f"than {self.limit / RATE:.0f} s ahead of what is played"
            )
        if self.live and self._behind > LAG:
            pieces = [samples[at : at + PIECE] for at in range(0, len(samples), PIECE)]
            loud = [piece for piece in pieces if _loudness(piece) > QUIET]
            kept = np.concatenate(loud) if loud else samples[:0]
            self.dropped += len(samples) - len(kept)
            samples = kept
        if len(samples):
            self.waiting += len(samples)
            self.came += len(samples)
            if self._waiting and len(self._waiting[-1]) < PER_FRAME:  # crumbs are kept together
                samples = np.concatenate([self._waiting.pop(), samples])
            self._waiting.append(samples)

    def end(self) -> None:
        """What came is all of this speech; it need not wait for more. Raises Overflow when too many
        wait."""
        if len(self._ends) >= ENDS:
            raise Overflow(f"{ENDS} speeches wait already; send no more before some were said")
        if rest := self.waiting - sum(self._ends):
            self._ends.append(rest)
        elif self._speaking is not None and not self._ends:
            self._finish()

    def clear(self) -> float:
        """A new epoch: everything that is not shown is forgotten. Returns the seconds of the
        speech under way that were shown."""
        seconds = next((span.seconds(self.played) for span in self._spans if span.begun), 0.0)
        self.stale += len(self._frames)
        self.epoch += 1
        self._begin()
        return seconds

    def arrive(self, block: Block) -> None:
        """Frames of the engine; those of an older epoch are dropped."""
        if block.epoch != self.epoch:
            self.stale += len(block.frames)
            return
        if (first := block.first + self.again) != self.made:
            raise ValueError(f"a block at sample {first}, but {self.made} comes next")
        self._frames.extend(block.frames)
        self.made += len(block.frames) * PER_FRAME

    # ---- to the engine

    @property
    def asked(self) -> int:
        """Samples that the engine has all it needs for."""
        said = self.sent - self.again
        return max(0, said - self.ahead) // self.block * self.block + self.again

    @property
    def _needed(self) -> int:
        """Samples that are wanting for one more block."""
        return self.asked + self.block + self.ahead - self.sent

    @property
    def _behind(self) -> int:
        """Samples by which live sound is shown later than a block and the margin make it."""
        late = self.waiting + self.asked - self.played
        return late - self.block - int(self.margin * RATE)

    @property
    def speaking(self) -> bool:
        return bool(self._spans) or (self.waiting > 0 and not self.live)

    @property
    def short(self) -> bool:
        """Whether speech waits for more of it, to fill its first block."""
        return 0 < self.waiting < self._needed and not (self.live or self._ends)

    def due(self) -> np.ndarray | None:
        """What the engine is to hear now, if anything: enough for one more block."""
        buffered, needed = self.asked - self.played, self._needed
        if buffered > self.lookahead * self.block:
            return None
        if self.waiting >= needed or self._ends:
            return self._commit(needed)
        if buffered > self.margin * RATE:
            return None
        if self.waiting and self._speaking is not None:
            return self._commit(needed)  # a gap
        if self._may_rest:
            self._resting, self._rested = True, self.asked
            return None
        return self._silence(needed)

    @property
    def _may_rest(self) -> bool:
        if self.idle == "generate" or self._spans or not self.sent:
            return False
        return self.idle == "freeze" or len(self._silent) == LOOP

    def _commit(self, needed: int) -> np.ndarray:
        """Speech, up to its end where that is known, filled up with silence."""
        count = min(needed, self._ends[0] if self._ends else self.waiting)
        source, speech = self.came - self.waiting, self._take(count)
        over = False
        if self._ends:
            self._ends[0] -= count
            if over := self._ends[0] == 0:
                self._ends.popleft()
        onset = _onset(speech) if self.live else 0
        if onset is not None:
            if not over:
                self.gaps += needed - count
            if self._speaking is None:
                first = [self.sent + onset, self.sent + count]
                self._speaking = Span([first], source + onset)
                self._spans.append(self._speaking)
            else:
                self._speaking.add(self.sent, self.sent + count)
        if self._speaking is not None and (over or onset is None):
            self._finish()
        samples = np.zeros(needed, np.int16)
        samples[:count] = speech
        return self._say(samples)

    def _silence(self, needed: int) -> np.ndarray:
        if self._speaking is not None:
            self._finish()
        return self._say(np.zeros(needed, np.int16))

    def _finish(self) -> None:
        assert self._speaking is not None
        self._speaking.over, self._speaking = True, None

    def _say(self, samples: np.ndarray) -> np.ndarray:
        self._heard.append(samples)
        self.sent += len(samples)
        return samples

    # ---- out

    def next(self) -> Shown | None:
        """The next frame and its samples; None while it is not made yet."""
        if not self._frames:
            return self._shown_again()
        first, frame = self.played, self._faded(self._frames.popleft())
        samples = _taken(self._heard, PER_FRAME)
        self.played += PER_FRAME
        self.total += PER_FRAME
        events = []
        for span in list(self._spans):
            if not span.begun and span.first < self.played:
                span.begun = True
                events.append(("speech.started", {"at_sample": span.first, "source": span.source}))
            if span.over and span.end <= self.played:
                self._spans.popleft()
                played_ms = round(1000 * span.seconds(self.played))
                events.append(("speech.ended", {"played_ms": played_ms, "interrupted": False}))
        if not self._fade:
            if self.idle != "loop" or events or self._spans:
                self._silent.clear()
            else:
                self._silent.append(frame)
        return Shown(self.epoch, first, frame, samples, tuple(events))

    def _shown_again(self) -> Shown | None:
        """A frame of the loop, in silence."""
        if self.idle != "loop" or not self._resting or self._spans or len(self._silent) < LOOP:
            return None
        first, self._fade = self.played, FADE
        self.played += PER_FRAME
        self.total += PER_FRAME
        self.sent += PER_FRAME
        self.made += PER_FRAME
        self.again += PER_FRAME
        self._rested = self.played
        return Shown(self.epoch, first, self._round(), np.zeros(PER_FRAME, np.int16))

    def _round(self) -> np.ndarray:
        """The next frame of the loop, which begins at the last one and goes back."""
        self._at += 1
        at = self._at % (2 * LOOP - 2)
        return self._silent[LOOP - 1 - min(at, 2 * LOOP - 2 - at)]

    def _faded(self, frame: np.ndarray) -> np.ndarray:
        """A new frame, which comes in over the loop if that was shown before it."""
        self._resting = False
        if not self._fade:
            self._at = 0
            return frame
        old, part = self._round().astype(np.float32), self._fade / (FADE + 1)
        self._fade -= 1
        return np.round(part * old + (1 - part) * frame).astype(frame.dtype)

    def _take(self, count: int) -> np.ndarray:
        self.waiting -= count
        return _taken(self._waiting, count)

    @property
    def buffered(self) -> float:
        """Seconds of picture that are made and not shown."""
        return len(self._frames) / FPS

    @property
    def starving(self) -> bool:
        """Whether the picture has run out while there should be one; a beginning is no stall."""
        return not self._frames and self.asked > self.played != self._rested


def _taken(pieces: collections.deque[np.ndarray], count: int) -> np.ndarray:
    """The first `count` samples of a queue of pieces."""
    parts = []
    while count:
        piece = pieces.popleft()
        if len(piece) > count:
            pieces.appendleft(piece[count:])
            piece = piece[:count]
        parts.append(piece)
        count -= len(piece)
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, np.int16)])


def _onset(samples: np.ndarray) -> int | None:
    """Where somebody begins to speak in live sound; None if nobody does."""
    if _loudness(samples) <= QUIET:
        return None
    cuts = range(0, len(samples), PIECE)
    return next((at for at in cuts if _loudness(samples[at : at + PIECE]) > QUIET), 0)


def _loudness(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(samples.astype(np.float32) ** 2))) if len(samples) else 0.0


# ---- the clock


class Clock(Protocol):
    def now(self) -> float: ...
    async def sleep(self, seconds: float) -> None: ...


class RealClock:
    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


async def publish(
    timeline: Timeline,
    ask: Callable[[np.ndarray], None],
    show: Callable[[Shown], None],
    clock: Clock,
    stalled: Callable[[float], None] = lambda seconds: None,
) -> None:
    """Shows a pair each 40 ms for ever, and asks for what the pairs after it need. A frame that
    comes late is waited for, its sound with it; all that follows is that much later."""
    beat, due = 1 / FPS, clock.now()
    while True:
        while (samples := timeline.due()) is not None:
            ask(samples)
        starving, shown = timeline.starving, timeline.next()
        if shown is not None:
            show(shown)
        elif starving:
            stalled(beat)
        late = clock.now() - due
        if late > LATE:
            stalled(late)
            due += late
        due += beat
        await clock.sleep(max(0.0, due - clock.now()))
