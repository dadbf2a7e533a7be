"""All sessions: who is admitted to which engine, and why each ends.

A slot of an engine is a lease. It is given back on every way out: asked for, nobody there, too
long, nobody speaks, the engine fails, the server goes.
"""

import asyncio
import collections
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from serve.clock import Clock, Idle, RealClock
from serve.headroom import Pulse, Work
from serve.link import Link
from serve.metrics import Metrics
from serve.session import Limits, Mark, Problem, Session, Worker
from serve.wire import FPS, RATE, Block, Changed, Close, Closed, Failed, Open, Opened, Ready

OPENING = 20.0  # seconds that an engine may take to open a session
PATIENCE = 2.0  # seconds to wait for a moment at which to open one
SPARE = 0.1  # seconds of picture beyond those that it takes


class Sessions:
    """All sessions, over some workers."""

    def __init__(
        self, workers: Sequence[Callable[[Any, Any], Link]], limits: Limits, metrics: Metrics,
        clock: Clock | None = None, mark: Mark | None = None,
    ):  # fmt: skip
        self.limits, self.metrics, self._mark = limits, metrics, mark
        self.clock: Clock = clock or RealClock()
        self.pulse = Pulse(self.clock)
        self.all: dict[str, Session] = {}
        self.draining = False
        self.workers: list[Worker] = []
        for make in workers:
            worker = Worker(None)  # type: ignore[arg-type]
            worker.link = make(functools.partial(self._hear, worker),
                               functools.partial(self._lost, worker))  # fmt: skip
            self.workers.append(worker)

    async def run(self) -> None:
        """Engines and the watch over sessions, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                jobs = (self._watch(), self.pulse.run(lambda: len(self.all)))
                for job in (*(worker.link.run() for worker in self.workers), *jobs):
                    group.create_task(job)
        finally:
            for session in list(self.all.values()):
                self.close(session, "draining")

    @property
    def ready(self) -> Ready | None:
        """What a warm engine can do; all workers run the same model."""
        return next((worker.ready for worker in self.workers if worker.ready is not None), None)

    @property
    def free(self) -> int:
        return sum(worker.free for worker in self.workers)

    async def create(
        self, picture: Callable[[Ready], np.ndarray], prompt: str, *, seed: int = 0,
        live: bool = False, idle: Idle = "generate", limits: Limits | None = None, **more: Any,
    ) -> Session:  # fmt: skip
        """A session that is open. picture: makes the portrait for the model's size; limits: its
        own, more: of `Session`. Raises Problem when there is no place, before those that run would
        notice."""
        worker = self._next()
        if (problem := self.refusal()) is not None:
            self._refuse(problem)
        assert worker.ready is not None
        session = Session(
            worker, worker.ready, limits or self.limits, self.metrics, self.clock, live=live,
            idle=idle, prompt=prompt, mark=self._mark, **more,
        )  # fmt: skip
        self.all[session.id] = session
        worker.held.add(session.id)  # before anything waits: nobody else gets this place
        try:
            shown = await asyncio.to_thread(picture, session.ready)
            async with worker.opening, self._moment(worker, session.ready):
                if not session.opened.done():  # else it has ended meanwhile, as with its engine
                    worker.link.send(Open(session.id, shown, prompt, seed))
                wait = max(OPENING, 3 * session.ready.opening)
                await asyncio.wait_for(asyncio.shield(session.opened), wait)
        except TimeoutError:
            detail = "the engine did not open the session in time"
            self.close(session, "engine", detail)
            self._refuse(Problem(503, "engine-fault", detail, 5.0))
        except BaseException as error:
            self.close(session, "engine" if isinstance(error, Problem) else "refused", str(error))
            result = error.kind if isinstance(error, Problem) else "refused"
            self.metrics.admissions.labels(result).inc()
            raise
        self.metrics.admissions.labels("admitted").inc()
        return session

    def get(self, name: str) -> Session:
        """Raises Problem when there is none of that id."""
        if name not in self.all:
            raise Problem(404, "no-such-session", "there is no session of this id any more")
        return self.all[name]

    def close(self, session: Session, reason: str, detail: str = "") -> None:
        """Ends a session, if it has not ended, and gives its slot back."""
        if self.all.pop(session.id, None) is not None:
            session.finish(reason, detail)
            session.worker.link.send(Close(session.id))

    async def drain(self, seconds: float) -> None:
        """Takes nobody new; who is there may finish for so long."""
        self.draining = True
        for session in self.all.values():
            session.tell("session.state", state="draining")
        until = time.monotonic() + seconds
        while self.all and time.monotonic() < until:
            await asyncio.sleep(0.1)
        for session in list(self.all.values()):
            self.close(session, "draining")

    @property
    def load(self) -> float:
        """The share of real time that the front would need with one session more."""
        return self.pulse.share(len(self.all) + 1)

    def refusal(self) -> Problem | None:
        """Why one session more would not be taken now, if so."""
        worker = self._next()
        if self.draining:
            return Problem(503, "draining", "this server is going down", 30.0)
        if worker.ready is None:
            health = worker.link.health
            detail = f"the model is not ready: {health.stage}, {health.done:.0%}"
            return Problem(503, "not-ready", detail, 5.0)
        if worker.free < 1:
            return Problem(429, "no-free-slot", "all places are taken; try again later", 10.0)
        if not self._room(worker) or (self.all and self.load > self.limits.busy):
            return Problem(429, "busy", "no time is left for one more; try again later", 5.0)
        return None

    @property
    def fullness(self) -> float:
        """0 with nobody there, 1 when nobody more is taken: of the slots, or of the time that one
        session more may need, whichever is scarcer."""
        if self.refusal() is not None:
            return 1.0
        worker, busy = self._next(), self.limits.busy
        slots = sum(each.ready.slots for each in self.workers if each.ready is not None)
        engine = worker.load / busy if worker.held else 0.0
        return min(1.0, max(1 - self.free / slots, engine, self.load / busy if self.all else 0.0))

    def _next(self) -> Worker:
        """The one that would have the next session."""
        return max(self.workers, key=lambda worker: (self._room(worker), worker.free))

    def _room(self, worker: Worker) -> bool:
        """Whether those whom it has would not notice another one."""
        return worker.free > 0 and (not worker.held or worker.load <= self.limits.busy)

    @contextlib.asynccontextmanager
    async def _moment(self, worker: Worker, ready: Ready) -> AsyncIterator[None]:
        """Begins when the others have so much picture that they will not notice, if they can have;
        or after `PATIENCE`."""
        others = [self.all[name] for name in worker.held & self.all.keys()]
        lines = [(x.timeline, x.timeline.margin) for x in others if x.state != "opening"]
        most = (self.limits.lookahead + ready.delay) * ready.frames / FPS
        seconds = ready.opening if ready.opening + SPARE < most else 0.0
        try:
            for line, margin in lines:  # silence is made so much sooner
                line.margin = max(margin, seconds + SPARE) if seconds else margin
            end = self.clock.now() + PATIENCE
            while self.clock.now() < end and any(
                line.asked > line.played and line.buffered < seconds for line, _ in lines
            ):
                await self.clock.sleep(1 / FPS)
            yield
        finally:
            for line, margin in lines:
                line.margin = min(line.margin, margin)

    def _refuse(self, problem: Problem) -> NoReturn:
        self.metrics.admissions.labels(problem.kind).inc()
        raise problem

    def _hear(self, worker: Worker, message: Any) -> None:
        match message:
            case Ready():
                self.metrics.ready.set(1)
                self.metrics.compiling.set(message.compiling)
                self.metrics.cached.inc(message.cached)
            case Opened(name) | Changed(name) | Block(session=name) if name in self.all:
                if isinstance(message, Block):
                    worker.work.add(self.clock.now(), message)
                try:
                    self.all[name].hear(message)
                except ValueError as error:
                    self.close(self.all[name], "engine", str(error))
            case Closed(name):
                worker.held.discard(name)
            case Failed(name, reason):
                worker.held.discard(name)
                if name in self.all:
                    self.close(self.all[name], "engine", reason)

    def _lost(self, worker: Worker, reason: str) -> None:
        self.metrics.ready.set(float(self.ready is not None))
        self.metrics.restarts.inc()
        for session in list(self.all.values()):
            if session.worker is worker:
                self.close(session, "engine", f"the engine was lost ({reason})")
        worker.held.clear()
        worker.work = Work()
        number = str(self.workers.index(worker))
        for device in worker.link.health.memory:
            self.metrics.memory.remove(number, device)
        worker.link.health.memory = {}

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            rates = []
            for session in list(self.all.values()):
                session.settle()
                if (reason := session.overdue()) is not None:
                    self.close(session, reason)
                else:
                    session.tell("stats", **(stats := session.stats()))
                    rests = session.timeline.idle != "generate" and not session.timeline.speaking
                    rates += [stats["fps"]] if stats["frames"] and not rests else []
            self.metrics.fps.set(min(rates, default=0.0))
            self._gauge()

    def _gauge(self) -> None:
        """What is so now, for the metrics."""
        metrics = self.metrics
        states = collections.Counter(session.state for session in self.all.values())
        for state in ("opening", "ready", "speaking"):
            metrics.sessions.labels(state).set(states[state])
        lines = [session.timeline for session in self.all.values()]
        waits = {
            "input": max((line.waiting / RATE for line in lines), default=0.0),
            "engine": max(((line.asked - line.made) / RATE for line in lines), default=0.0),
            "picture": min((line.buffered for line in lines), default=0.0),
        }
        for where, seconds in waits.items():
            metrics.buffer.labels(where).set(seconds)
        metrics.load.labels("front").set(self.load)
        metrics.load.labels("engine").set(max(worker.load for worker in self.workers))
        slowest = max(worker.share(len(worker.held)) for worker in self.workers)
        metrics.realtime.set(1 / slowest if slowest else 0.0)
        for number, worker in enumerate(self.workers):
            for device, used in worker.link.health.memory.items():
                metrics.memory.labels(str(number), device).set(used)


def lasting(limits: Limits) -> float:
    """Seconds that a token must be good for."""
    return limits.longest + limits.grace
