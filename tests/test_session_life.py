"""How sessions go and why they end, in a loop whose time costs nothing."""

import asyncio
import dataclasses
import functools
import selectors
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from serve import sessions as module
from serve.metrics import Metrics
from serve.mock import Mock
from serve.session import REASONS, Limits, Problem, Session
from serve.sessions import Sessions
from serve.wire import FPS, PER_FRAME, RATE, Block, Change, Opened
from tests.serving import Near, in_loop, serving, tone, until

PICTURE = np.zeros((256, 256, 3), np.uint8)


class Virtual(asyncio.SelectorEventLoop):
    """Its clock jumps to whatever comes next."""

    def __init__(self) -> None:
        class Selector(selectors.DefaultSelector):
            def select(_, timeout: float | None = None) -> Any:
                found = super().select(0)
                if not found:
                    assert timeout is not None, "nothing would ever happen again"
                    self.now += timeout
                return found

        self.now = 0.0
        super().__init__(Selector())

    def time(self) -> float:
        return self.now


class LoopClock:
    sleep = staticmethod(asyncio.sleep)

    def now(self) -> float:
        return asyncio.get_running_loop().time()


class Blank(Mock):
    def make(self, windows):
        return {slot: np.full((12, 2), window.epoch) for slot, window in windows.items()}


class Slow(Near):
    """Takes so many seconds for a block."""

    seconds = 0.0

    def start(self) -> None:
        super().start()
        self._free = 0.0

    def _say(self, message: Any) -> None:
        loop = asyncio.get_running_loop()
        takes = {Block: self.seconds, Opened: self.maker.ready.opening}
        wait = takes.get(type(message), 0.0)
        self._free = max(self._free, loop.time()) + wait
        loop.call_at(self._free, self.hear, message)


class Piped(Slow):
    """A pipeline: a block may go in each so many seconds, and comes out `delay` ticks later."""

    def _say(self, message: Any) -> None:
        loop, ready = asyncio.get_running_loop(), self.maker.ready
        if isinstance(message, Block):
            self._free = max(self._free, loop.time()) + self.seconds
            loop.call_at(self._free + ready.delay * self.seconds, self.hear, message)
        else:
            loop.call_soon(self.hear, message)


class Watcher:
    """A viewer that keeps what it is told, and when."""

    watching = True
    speaks = True

    def __init__(self) -> None:
        self.shown: list[tuple[float, Any]] = []
        self.told: list[tuple[float, dict]] = []
        self.ends: list[str] = []

    def show(self, shown: Any) -> None:
        self.shown.append((asyncio.get_running_loop().time(), shown))

    def tell(self, event: dict) -> None:
        self.told.append((asyncio.get_running_loop().time(), event))

    def clear(self, epoch: int) -> None:
        pass

    def close(self, reason: str) -> None:
        self.ends.append(reason)

    def named(self, kind: str) -> list[tuple[float, dict]]:
        return [(time, event) for time, event in self.told if event["type"] == kind]


def in_no_time(test: Callable) -> Callable:
    @functools.wraps(test)
    def run(*args: Any, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
        async def at_once(does: Callable, *args: Any) -> Any:
            return does(*args)

        monkeypatch.setattr(module.asyncio, "to_thread", at_once)
        with asyncio.Runner(loop_factory=Virtual) as runner:
            runner.run(test(*args, monkeypatch=monkeypatch, **more))

    return run


@asynccontextmanager
async def opened(
    seconds: float = 0.0, slots: int = 1, delay: int = 0, opening: float = 0.0, **limits: Any
) -> AsyncIterator[tuple[Sessions, Callable]]:
    near = type("Near", (Piped if delay else Slow,), {"seconds": seconds})
    maker = Blank(slots)
    maker.ready = dataclasses.replace(maker.ready, delay=delay, opening=opening)
    workers = [functools.partial(near, maker=maker)]
    sessions = Sessions(workers, Limits(**limits), Metrics(), LoopClock())
    running = asyncio.create_task(sessions.run())

    async def create(**more: Any) -> tuple[Session, Watcher]:
        session = await sessions.create(lambda ready: PICTURE, "x", **more)
        session.join(watcher := Watcher())
        return session, watcher

    yield sessions, create
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert not sessions.all
    await asyncio.sleep(1)
    assert sessions.free == slots


def microphone(session: Session, loud: Callable[[float], bool], seconds: float) -> asyncio.Task:
    """Never stops, whether somebody speaks or not."""

    async def run() -> None:
        for n in range(round(50 * seconds)):
            await asyncio.sleep(0.02)
            samples = tone(0.02) if loud(n / 50) else np.full(RATE // 50, 3, np.int16)
            session.speak(samples)

    return asyncio.create_task(run())


# ---- why sessions end


@in_no_time
async def test_nobody_speaks(monkeypatch):
    async with opened(idle=60.0) as (sessions, create):
        session, watcher = await create()
        await asyncio.sleep(20)
        session.speak(tone(90.0))  # which is longer than one may be idle
        session.end()
        await asyncio.sleep(85)
        assert session.state == "speaking" and not watcher.named("session.expiring")
        await asyncio.sleep(60)
        assert session.state == "ready"
        (warned,) = watcher.named("session.expiring")
        assert warned[1]["why"] == "idle" and 28 <= warned[1]["in_s"] <= 30
        await asyncio.sleep(40)
        (closed,) = watcher.named("session.closed")
        assert closed[1]["reason"] == "idle" and watcher.ends == ["idle"]
        assert abs(closed[0] - (20 + 90 + 60)) < 3
        assert sessions.free == 1


@in_no_time
async def test_a_microphone_that_is_open_is_nobody_who_speaks(monkeypatch):
    async with opened(idle=60.0) as (_, create):
        session, watcher = await create(live=True)
        task = microphone(session, lambda at: 50 < at < 55, 200)
        await asyncio.sleep(100)
        assert session.state == "ready"
        await asyncio.sleep(30)
        assert watcher.ends == ["idle"]
        await task  # sound to a session that has ended is no error


@in_no_time
async def test_nobody_is_there(monkeypatch):
    async with opened(grace=10.0, idle=1e6) as (sessions, create):
        session, watcher = await create()
        await asyncio.sleep(100)
        session.leave(watcher)
        await asyncio.sleep(8)
        session.join(watcher)  # in time
        await asyncio.sleep(100)
        session.leave(watcher)
        for _ in range(20):  # strangers keep nothing alive
            session.leave(Watcher())
            await asyncio.sleep(1)
        assert session.reason == "left" and not sessions.all
        with pytest.raises(Problem, match="ended: left") as caught:
            session.join(watcher)
        assert caught.value.status == 410


@in_no_time
async def test_nothing_lasts_for_ever(monkeypatch):
    async with opened(longest=900.0, idle=1e6) as (_, create):
        session, watcher = await create()
        await asyncio.sleep(800)
        assert session.state == "ready"
        await asyncio.sleep(110)
        assert watcher.ends == ["too_long"]
        assert [x["why"] for _, x in watcher.named("session.expiring")] == ["too_long"]
        shown = [x.first for _, x in watcher.shown]
        assert shown == list(range(0, len(shown) * PER_FRAME, PER_FRAME))
        assert abs(len(shown) / FPS - watcher.named("session.closed")[0][0]) < 0.2


@in_no_time
async def test_a_session_ends_once(monkeypatch):
    async with opened() as (sessions, create):
        session, watcher = await create()
        for reason in ("done", "engine", "idle"):
            sessions.close(session, reason)
        assert watcher.ends == ["done"] and len(watcher.named("session.closed")) == 1
        told = len(watcher.told)
        session.speak(tone(1.0))
        session.interrupt()
        session.change("x")
        await asyncio.sleep(5)
        assert len(watcher.told) == told and session.state == "closed"
        ended = sessions.metrics.registry.get_sample_value
        assert ended("la_session_ends_total", {"reason": "done"}) == 1
        assert ended("la_session_ends_total", {"reason": "idle"}) is None


def test_each_reason_has_a_close_code_of_the_protocol():
    assert {code for code, _ in REASONS.values()} <= {1000, 1001, 1008, 1009, 1011, 1013}
    assert all(again == (code not in (1000, 1008)) for code, again in REASONS.values())


@in_no_time
async def test_a_session_that_cannot_be_shown_ends_with_a_reason(monkeypatch):
    """Whatever goes wrong in it, and in it alone."""
    async with opened(slots=2) as (_, create):
        (session, watcher), (other, beside) = await create(), await create()
        await asyncio.sleep(3)
        watcher.show = lambda shown: 1 / 0
        await asyncio.sleep(3)
        assert session.reason == "engine" and watcher.ends == ["engine"]
        assert other.state == "ready" and len(beside.shown) > 5 * FPS


@in_no_time
async def test_an_engine_that_mixes_up_blocks_loses_that_session_alone(monkeypatch):
    async with opened(slots=2) as (sessions, create):
        (session, watcher), (other, beside) = await create(), await create()
        await asyncio.sleep(3)
        frames = np.zeros((12, 1))
        sessions.workers[0].link.hear(Block(session.id, 0, 7, frames, {}))
        assert watcher.ends == ["engine"]
        assert "comes next" in watcher.named("session.closed")[0][1]["detail"]
        sessions.workers[0].link.hear(Block("nobody", 0, 7, frames, {}))
        await asyncio.sleep(3)
        assert other.state == "ready" and len(beside.shown) > 5 * FPS


@in_loop
async def test_a_front_that_cannot_go_on_is_not_alive(monkeypatch):
    async def broken(self) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Sessions, "_watch", broken)
    async with serving(warm=False) as served:
        await until(lambda: served.front.sessions.workers[0].link.process is None)
        served.front.beat -= 10
        answer = await served.http.get("/livez")
        assert answer.status_code == 503 and not answer.json()["ok"]


# ---- how long speech takes


BLOCK, AHEAD = 0.48, 0.12


@in_no_time
async def test_a_turn_is_from_the_first_loud_sample_to_its_frame(monkeypatch):
    """A microphone is open all the time: silence before speech is no part of the turn."""
    async with opened(seconds=0.05) as (_, create):
        session, watcher = await create(live=True)
        task = microphone(session, lambda at: at % 10 > 8, 60)
        await task
        started = watcher.named("speech.started")
        assert len(started) == 6
        for (time, event), begun in zip(started, range(8, 60, 10), strict=True):
            true = 1000 * (time - begun)
            assert abs(event["turn_ms"] - true) <= 60
            most = 2 * BLOCK + AHEAD + session.timeline.margin + 0.1
            assert 0 < event["turn_ms"] <= 1000 * most


@in_no_time
async def test_turns_of_an_agent_are_as_short_after_long_silence(monkeypatch):
    async with opened(seconds=0.1, idle=1e6, longest=1e6) as (_, create):
        session, watcher = await create()
        turns = []
        for pause in (5, 5, 900, 5, 200):
            await asyncio.sleep(pause)
            session.speak(tone(3.0))
            session.end()
            await asyncio.sleep(6)
            turns.append(session.turns[-1])
        assert max(turns) <= BLOCK + AHEAD + session.timeline.margin + 2 / FPS
        assert len(watcher.named("speech.ended")) == 5 and session.stalls == 0


@in_no_time
async def test_a_word_without_an_end_is_said_after_a_pause(monkeypatch):
    async with opened() as (_, create):
        session, watcher = await create()
        await asyncio.sleep(5)
        session.speak(tone(0.2))
        await asyncio.sleep(4)
        (started,) = watcher.named("speech.started")
        assert started[1]["turn_ms"] < 3000
        assert watcher.named("speech.ended")[0][1]["played_ms"] == 200


@in_no_time
async def test_the_margin_is_what_a_block_takes_and_not_its_wait_in_the_queue(monkeypatch):
    async with opened(seconds=0.1) as (_, create):
        session, _watcher = await create()
        session.speak(tone(20.0))
        session.end()
        await asyncio.sleep(10)
        assert 0.16 <= session.timeline.margin < 0.3 and session.stalls == 0


@pytest.mark.parametrize("seconds", [0.3, 0.45])
@in_no_time
async def test_a_slow_engine_is_asked_sooner(monkeypatch, seconds):
    async with opened(seconds=seconds) as (_, create):
        session, watcher = await create()
        await asyncio.sleep(30)
        assert 0.08 + 1.5 * seconds == pytest.approx(session.timeline.margin, abs=0.05)
        times = [time for time, _ in watcher.shown if time > 10]
        np.testing.assert_allclose(np.diff(times), 1 / FPS, atol=1e-6)


@in_no_time
async def test_a_pipeline_is_asked_so_soon_that_nothing_stalls(monkeypatch):
    """Four stages of 0.3 s, and the frames of a tick are fetched in the next one."""
    async with opened(seconds=0.3, delay=4) as (_, create):
        session, watcher = await create()
        turns = []
        for pause in (10, 5, 20):
            await asyncio.sleep(pause)
            session.speak(tone(3.0))
            session.end()
            await asyncio.sleep(8)
            turns.append(session.turns[-1])
            assert session.stalls == 0
        times = [time for time, _ in watcher.shown if time > 10]
        np.testing.assert_allclose(np.diff(times), 1 / FPS, atol=1e-6)
        through = 5 * 0.3
        assert session.timeline.margin == pytest.approx(0.08 + 1.2 * through, abs=0.4)
        assert max(turns) <= through + session.timeline.margin + BLOCK


@pytest.mark.parametrize("speaks", [True, False])
@in_no_time
async def test_who_is_there_does_not_notice_that_others_are_opened(monkeypatch, speaks):
    """Two at once: each takes the engine 0.3 s, and the margin of a fast engine is half of that."""

    async def stalls() -> float:
        async with opened(seconds=0.03, slots=3, opening=0.3) as (sessions, create):
            session, watcher = await create()
            await asyncio.sleep(3)
            talking = asyncio.create_task(talk(session)) if speaks else None
            for n in range(12):  # wherever the first one is in its block
                await asyncio.sleep(3 + 0.04 * n)
                others = await asyncio.gather(create(), create())
                await asyncio.sleep(2)
                for other, _ in others:
                    sessions.close(other, "done")
            if talking is not None:
                talking.cancel()
            assert len(watcher.shown) > 300
            return session.stalls

    assert await stalls() == 0
    monkeypatch.setattr(module.Sessions, "_moment", lambda *given: nullcontext())
    assert speaks or await stalls() > 0.1  # but for that, somebody who is silent would


async def talk(session: Session) -> None:
    """As an agent does: it comes as it is said."""
    while True:
        session.speak(tone(0.1))
        await asyncio.sleep(0.1)


@in_no_time
async def test_an_engine_late_for_one_session_is_a_stall_and_no_end(monkeypatch):
    async with opened(seconds=0.1) as (sessions, create):
        session, watcher = await create()
        await asyncio.sleep(10)
        sessions.workers[0].link._free += 3.0
        await asyncio.sleep(10)
        assert 2.0 < session.stalls < 3.5 and session.state == "ready"
        assert session.stats()["stall_ms"] == round(1000 * session.stalls)
        firsts = [x.first for _, x in watcher.shown]
        assert firsts == list(range(0, len(firsts) * PER_FRAME, PER_FRAME))
        assert 24 < session.stats()["fps"] <= 26


# ---- what one session asks of the engine


@in_no_time
async def test_prompts_that_come_fast_are_told_one_at_a_time_and_the_last_one_counts(monkeypatch):
    async with opened() as (sessions, create):
        session, watcher = await create()
        link = sessions.workers[0].link
        for n in range(500):
            session.change(f"Prompt {n}.")
        await asyncio.sleep(1)
        two = ["Prompt 0.", "Prompt 499."]
        assert [x.prompt for x in link.said if isinstance(x, Change)] == two
        assert [event["prompt"] for _, event in watcher.named("session.updated")] == two
        session.change("Another one.")
        await asyncio.sleep(1)
        assert session.prompt == "Another one."


@in_no_time
async def test_interrupts_that_come_too_fast_are_refused(monkeypatch):
    async with opened() as (_, create):
        session, watcher = await create()
        taken = 0
        for _ in range(100):
            await asyncio.sleep(0.02)
            try:
                session.interrupt()
                taken += 1
            except Problem as error:
                assert (error.status, error.kind) == (429, "too-fast") and error.after < 1
        assert taken == len(watcher.named("audio.cleared")) and 20 <= taken <= 25
        await asyncio.sleep(1)
        session.interrupt()


@in_no_time
async def test_speeches_of_nothing_wait_in_no_endless_queue(monkeypatch):
    async with opened() as (_, create):
        session, _watcher = await create()
        with pytest.raises(Problem, match="speeches wait"):
            for _ in range(1000):
                session.speak(tone(1 / RATE))
                session.end()
        assert session.timeline.waiting <= 101


@in_no_time
async def test_an_end_is_said_before_it_comes_with_its_own_time(monkeypatch):
    """However short sessions are, and whatever the grace."""
    async with opened(idle=40.0, longest=100.0, grace=5.0) as (_, create):
        session, watcher = await create()
        await asyncio.sleep(15)
        session.speak(tone(1.0))
        session.end()
        await asyncio.sleep(37)
        session.speak(tone(1.0))
        session.end()
        await asyncio.sleep(60)
        said = [(event["why"], event["in_s"]) for _, event in watcher.named("session.expiring")]
        assert [why for why, _ in said] == ["idle", "too_long", "idle"]
        assert all(19 <= seconds <= 20 for why, seconds in said if why == "idle")
        assert 29 <= said[1][1] <= 30
    async with opened(idle=4.0, longest=1000.0) as (_, create):
        session, watcher = await create()
        await asyncio.sleep(10)
        ((_, event),) = watcher.named("session.expiring")
        assert (event["why"], watcher.ends) == ("idle", ["idle"]) and 1 <= event["in_s"] <= 2


@in_no_time
async def test_who_watches_takes_no_place_of_who_speaks(monkeypatch):
    async with opened(viewers=2) as (_, create):
        session, _watcher = await create()
        guests = [Watcher() for _ in range(3)]
        for guest in guests:
            guest.speaks = False
        for guest in guests[:2]:
            session.join(guest)
        with pytest.raises(Problem, match="as many watch as may"):
            session.join(guests[2])
        session.join(Watcher())
