"""Callers measure what they should, and the next one is refused before others stall."""

import asyncio
import dataclasses
import json
import random
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

from liveavatar_jax.data.audio import load_audio
from liveavatar_jax.types import LiveAvatarError
from serve import caller as module
from serve import headroom, load
from serve.caller import PIECE, Caller, Speech, Turn, summary
from serve.load import Server, main, measure, table
from serve.session import Problem
from serve.socket import FRAME
from serve.wire import FPS, PER_FRAME, RATE, Block, Ready
from tests import test_session_life as life
from tests.processes import ROOT, free_port
from tests.serving import LONG, Near, in_loop, serving, tone
from tests.test_session_life import Blank, in_no_time, opened

READY = Ready("m", 8, 8, 9, 12, 1920, 0)
TOLD = {"id": "x", "client_token": "t", "urls": {"events": "/e", "session": "/s"}}


@pytest.fixture(scope="module")
def speech() -> Speech:
    return Speech(load_audio(load.SPEECH))


# ---- what a caller notes


def test_a_turn_begins_aloud_and_has_no_sample_that_is_zero(speech):
    draw = random.Random(0)
    for _ in range(50):
        turn = speech.turn(draw)
        assert turn.shape[1] == PIECE and 2.0 <= len(turn) * PIECE / RATE <= 6.0
        assert np.all(turn != 0)
        assert np.sqrt(np.mean(turn[0].astype(float) ** 2)) > 0.9 * module.LOUD * 32768
    for quiet in (np.zeros(RATE), np.zeros(0), np.full(99 * RATE, 0.001)):
        with pytest.raises(LiveAvatarError, match="begin aloud"):
            Speech(quiet)


class Played:
    """What a server would send to a caller who spoke a turn: 25 frames a second."""

    def __init__(self, speech: Speech, sent: float, pieces: int):
        self.caller = Caller("ws://x", TOLD, speech, 0)
        self.caller.turns.append(Turn("pause", [sent + 0.02 * n for n in range(pieces)]))

    def event(self, kind: str, **fields: Any) -> None:
        self.caller.hear(json.dumps({"type": kind, **fields}), 0.0)

    def frame(self, number: int, now: float, samples: np.ndarray | None = None) -> None:
        sound = np.zeros(PER_FRAME, "<i2") if samples is None else samples.astype("<i2")
        head = FRAME.pack(0, number * PER_FRAME, 4)
        self.caller.hear(head + b"jpeg" + sound.tobytes(), now)


def test_a_turn_is_from_its_first_sample_sent_to_the_frame_that_holds_it(speech):
    """Speech from sample 1000 on, sent from second 10 on; frame n comes at second 10 + n/25."""
    played, sound = Played(speech, 10.0, 100), np.zeros(80 * PER_FRAME, np.int16)
    sound[1000:25_000] = sound[29_000:37_000] = 7  # and a gap of silence within
    for n in range(80):
        if n == 1:
            played.event("speech.started", at_sample=1000, turn_ms=30, fill_ms=10, make_ms=15,
                         clock_ms=5)  # fmt: skip
        played.frame(n, 10.0 + n / 25, sound[n * PER_FRAME : (n + 1) * PER_FRAME])
    (turn,) = played.caller.turns
    assert turn.took == pytest.approx(0.04)
    # In the middle of speech, each frame tells; a gap has made it 0.25 s later.
    # Of a frame the first sample counts, which in the first one was within it.
    assert 0.06 < turn.middle[0] < 0.085 and 0.31 < turn.middle[-1] < 0.335
    row = summary([played.caller], 13.2)
    assert row["parts"] == pytest.approx({"fill": 0.01, "make": 0.015, "clock": 0.005,
                                          "line": 0.01})  # fmt: skip
    assert (row["stalls"], row["missed"], row["lost"], row["turns"]) == (0, 0, {}, 1)
    assert row["fps_min"] == row["fps_median"] == pytest.approx(25.0)
    assert row["turn"]["pause"]["count"] == 1 and row["turn"]["silence"] is None


def test_gaps_between_frames_are_stalls_and_frames_that_are_not_there_are_missed(speech):
    played, now = Played(speech, 0.0, 1), 5.0
    for number, wait in [(0, 0.0), (1, 0.04), (2, 0.11), (3, 0.3), (4, 0.04), (8, 0.5)]:
        now += wait
        played.frame(number, now)
    caller = played.caller
    assert (caller.stalls, caller.missed, caller.frames) == (2, 3, 6)
    assert caller.longest == pytest.approx(0.5)
    caller.wait(now + 2.0)  # nor did one come until the end
    assert caller.stalls == 3 and caller.longest == pytest.approx(2.0)
    played.event("session.closed", reason="engine")
    row = summary([caller, caller, Caller("ws://x", TOLD, speech, 1)], now + 2.0)
    assert row["lost"] == {"engine": 2} and row["turn"]["all"] is None
    assert table([{"sessions": 3, "admitted": 3, "refused": {"busy": 2}, **row}]).count("\n") == 1


# ---- against a server


@in_loop
async def test_a_row_against_a_server(speech, monkeypatch):
    monkeypatch.setattr(module, "TURN", (1.5, 2.0))
    monkeypatch.setattr(module, "PAUSES", {"pause": (0.3, 0.5), "silence": (0.3, 0.5)})
    async with serving(slots=2, keys=("k",)) as served:
        server = Server(f"http://{served.address}", "k")
        row = await measure(server, 3, 6.0, speech, asyncio.Event())
        assert not served.front.sessions.all  # nobody stays
        with pytest.raises(LiveAvatarError, match="opens no session: this key is not"):
            await measure(Server(server.url, "wrong"), 1, 1.0, speech, asyncio.Event())
    assert (row["admitted"], row["refused"], row["lost"]) == (2, {"no-free-slot": 1}, {})
    assert 20 < row["fps_min"] <= row["fps_median"] < 27 and row["turns"] >= 2
    turn, parts = row["turn"]["all"], row["parts"]
    assert 0.4 < turn["p50"] <= turn["p95"] <= turn["max"] < 5.0
    assert parts["fill"] > 0.4 and all(part >= 0 for part in parts.values())
    assert abs(sum(parts.values()) - turn["p50"]) < 0.5
    assert row["middle"] is not None and 0.2 < row["middle"]["p50"] < 5.0


def command(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "serve.load", *words], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_the_command_has_a_server_of_its_own(tmp_path):
    file = tmp_path / "rows.json"
    ran = command("--minutes", "0.04", "--json", str(file), "--", "--engine", "mock")
    out, err = ran.communicate(timeout=3 * LONG)
    assert ran.returncode == 0, err
    assert [line.split()[0] for line in out.splitlines()[:2]] == ["sessions", "1"]
    said = json.loads(file.read_text())
    assert said["server"] == ["--engine", "mock"]
    assert [row["admitted"] for row in said["rows"]] == [1]
    if sys.platform == "linux":
        assert said["rows"][0]["cpu"]["front"] > 0


def test_who_interrupts_gets_what_was_measured():
    ran = command("--minutes", "99", "--", "--engine", "mock")
    try:
        seen = ""
        while "sessions=1" not in seen:
            more = ran.stderr.read(1)
            assert more, seen
            seen += more
        ran.send_signal(signal.SIGINT)
        out, err = ran.communicate(timeout=LONG)
    finally:
        ran.kill()
    assert ran.returncode == 130 and "Traceback" not in err
    assert out.splitlines()[1].split()[:2] == ["1", "1"]


@pytest.mark.parametrize(
    "words, says",
    [
        (["--url", "localhost:80"], "must begin with http"),
        (["--url", "http://x", "--", "--engine", "mock"], "has its own settings"),
        (["--sessions", "0"], "--sessions 0 must be at least 1"),
        (["--minutes", "nan"], "--minutes nan must be above 0"),
        (["--speech", "/nowhere.wav"], "/nowhere.wav"),
        (["--json", "/nowhere/rows.json"], "there is no such folder"),
        (["--", "--engine", "steam"], "the server does not start: serve: engine = 'steam'"),
        (["--url", "http://127.0.0.1:PORT"], "cannot ask http://127.0.0.1"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(words, says, capsys):
    words = [word.replace("PORT", str(free_port())) for word in words]
    assert main(words) == 2
    said = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert len(said) == 1 and said[0].startswith("load: ") and says in said[0]


# ---- room for one more


def block(make: float, send: float = 0.0) -> Block:
    return Block("x", 0, 0, np.zeros((12, 1, 1, 3), np.uint8), {"make": make, "send": send})


def test_what_sessions_would_need_is_foreseen_from_what_blocks_took():
    work = headroom.Work()
    assert work.share(50, READY) == 0.0  # nothing is known
    for n in range(100):
        work.add(n / 10, block(0.012, 0.012))
    assert work.share(10, READY) == pytest.approx(10 * 0.024 / 0.48)
    together = dataclasses.replace(READY, together=True)
    assert work.share(10, together) == pytest.approx((0.012 + 10 * 0.012) / 0.48)
    for n in range(100):  # what was longer ago than it matters is forgotten
        work.add(20 + n / 10, block(0.24))
    assert work.share(1, READY) == work.share(9, together) == pytest.approx(0.5)


class Ticking(Near):
    """An engine that takes its time: a block of all seats that have heard enough at once."""

    step = each = 0.0  # seconds of a step, and of each block in it

    def start(self) -> None:
        super().start()
        self._inbox: list[Any] = []
        self._said: list[Any] = []
        self._busy = False

    def send(self, message: Any) -> bool:
        self._inbox.append(message)
        if not self._busy:
            self._busy = True
            asyncio.get_running_loop().call_soon(self._tick)
        return True

    def _say(self, message: Any) -> None:
        if isinstance(message, Block):
            message = dataclasses.replace(message, seconds={"make": self.step + self.each})
        self._said.append(message)

    def _tick(self) -> None:
        while self._inbox:
            self.engine.hear(self._inbox.pop(0))
        self._busy = self.engine.tick()
        said, self._said = self._said, []
        blocks = sum(isinstance(message, Block) for message in said)
        took = self.step * (blocks > 0) + self.each * blocks
        asyncio.get_running_loop().call_later(took, self._told, said)

    def _told(self, said: list[Any]) -> None:
        for message in said:
            self.hear(message)
        if self._inbox or self._busy:
            self._tick()


def ticking(patch: pytest.MonkeyPatch, step: float, each: float) -> None:
    """Sessions of `opened` get such an engine."""
    patch.setattr(life, "Slow", type("Ticking", (Ticking,), {"step": step, "each": each}))

    def blank(slots: int) -> Blank:
        maker = Blank(slots)
        maker.ready = dataclasses.replace(maker.ready, together=step > 0)
        return maker

    patch.setattr(life, "Blank", blank)


@pytest.mark.parametrize(
    "step, each, room", [(0, 0.02, 14), (0, 0.1, 2), (0, 0.4, 1), (0.2, 0, 20), (0.3, 0, 1)]
)
@in_no_time
async def test_a_busy_engine_takes_nobody_more_before_anybody_stalls(monkeypatch, step, each, room):
    """As many as need six tenths of its time, though there are more slots; alone, one may need
    all of it."""
    ticking(monkeypatch, step, each)
    async with opened(slots=20, idle=1e6) as (sessions, create):
        there = []
        for _ in range(20):
            try:
                there.append(await create())
            except Problem as problem:
                assert (problem.status, problem.kind) == (429, "busy") and problem.after
            await asyncio.sleep(1.7)
        assert len(there) == room and sessions.free == 20 - room
        counted = sessions.metrics.registry.get_sample_value
        refused = counted("la_session_admissions_total", {"result": "busy"}) or 0
        assert refused == 20 - room
        assert (counted("la_load", {"of": "engine"}) > 0.6) == (room < 20)
        for session, _ in there:
            session.speak(tone(10.0))
            session.end()
            await asyncio.sleep(0.37)
        await asyncio.sleep(20)
        assert max(session.stalls for session, _ in there) <= 1 / FPS
        sessions.close(there[0][0], "done")
        await asyncio.sleep(1)
        await create()  # there is room again


@in_no_time
async def test_a_late_front_takes_nobody_more(monkeypatch):
    async with opened(slots=3, idle=1e6) as (_, create):
        await create()
        await asyncio.sleep(10)
        await create()
        loop, run = asyncio.get_running_loop(), True

        def busy() -> None:  # 100 ms of work, again and again
            loop.now += 0.1
            if run:
                loop.call_later(0.01, busy)

        busy()
        await asyncio.sleep(10)
        with pytest.raises(Problem, match="no time is left") as caught:
            await create()
        assert caught.value.kind == "busy"
        run = False
        await asyncio.sleep(headroom.RECENT + 1)
        await create()
