"""Lines that go dead, callers who dawdle, full disks and lost engines: whoever is beside them
notices nothing, every end has its reason, and nothing is left behind."""

import asyncio
import contextlib
import dataclasses
import functools
import io
import os
import random
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("aiortc", reason="needs the extra serve")

from aiortc import MediaStreamError, RTCConfiguration

from liveavatar_jax import cli
from liveavatar_jax.types import LiveAvatarError
from serve import __main__ as command
from serve import answers, jobs, mock
from serve import session as session_of
from serve import socket as line_of
from serve.clock import Shown, Timeline
from serve.jobs import Jobs
from serve.metrics import Metrics
from serve.pictures import jpeg
from serve.rtc import Call, Out
from serve.settings import Settings
from serve.socket import Socket
from serve.wire import PER_FRAME, RATE
from tests.serving import LONG, Line, Served, in_loop, joined, serving, tone, until
from tests.test_jobs import client, finished, picture, sound
from tests.test_rtc import (
    BROWSER,
    Browser,
    Microphone,
    browsing,
    connected,
    heard,
    peers,
)
from tests.test_sessions import problem, soon_noticed


@contextlib.asynccontextmanager
async def undisturbed(served: Served) -> AsyncIterator[Line]:
    """A session beside the faulty one: it misses no frame."""
    async with joined(served, await served.create()) as line:
        await line.more(3)
        yield line
        await line.more(3)
        assert np.all(np.diff([x.first for x in line.frames]) == PER_FRAME)


# ---- lines that go dead


class Between:
    """A line to the server that may go dead: neither data nor its end comes through any more."""

    def __init__(self) -> None:
        self.alive = asyncio.Event()
        self.alive.set()
        self._writers: list[asyncio.StreamWriter] = []

    @contextlib.asynccontextmanager
    async def to(self, served: Served) -> AsyncIterator[Served]:
        """The server, as it is reached over this line."""
        self._server = served.address.split(":")
        gate = await asyncio.start_server(self._begin, "127.0.0.1", 0)
        async with gate:
            port = gate.sockets[0].getsockname()[1]
            yield dataclasses.replace(served, address=f"127.0.0.1:{port}")
            self.cut()

    async def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        one = socket.socket()
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)  # little is on its way
        one.setblocking(False)
        host, port = self._server
        await asyncio.get_running_loop().sock_connect(one, (host, int(port)))
        there, onward = await asyncio.open_connection(sock=one)
        self._writers += [writer, onward]
        await asyncio.gather(self._pass(reader, onward), self._pass(there, writer))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                await self.alive.wait()
                writer.write(data)
                await writer.drain()
            writer.close()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self.alive.set()


@pytest.mark.parametrize("media, padding", [("none", 0), ("jpeg", 100_000)])
@in_loop
async def test_a_line_that_goes_dead_is_noticed_and_its_session_ends(monkeypatch, media, padding):
    """Also one that is full of what nobody reads, so that not even its end can be sent."""
    monkeypatch.setattr(command, "PING", 0.5)
    monkeypatch.setattr(command, "PONG", 2.5)
    monkeypatch.setattr(command, "UNREAD", 1.0)
    monkeypatch.setattr(line_of, "jpeg", lambda frame: jpeg(frame) + bytes(padding))
    async with serving(slots=2) as served, undisturbed(served) as beside:
        lines = served.server.server_state.connections
        sockets = lambda: sum(not hasattr(x, "cycle") for x in lines)
        told, between = await served.create(), Between()
        session = served.session(told)
        async with between.to(served) as far, joined(far, told, media=media) as line:
            await line.event("session.ready")
            await line.event("stats", 2)  # it lasts, while somebody answers
            assert len(session.viewers) == 1 and sockets() == 2
            session.limits = dataclasses.replace(session.limits, grace=0.5)
            between.alive.clear()
            await until(lambda: not session.viewers)
            await until(lambda: served.free == 1)
            await until(lambda: sockets() == 1)
            between.cut()
        assert session.reason == "left"
        assert served.counted("la_session_ends_total", reason="left") == 1
        assert beside.code is None


@in_loop
async def test_who_is_cut_after_a_long_wait_ends_no_session(monkeypatch):
    """Until the line is closed it is still shown frames, and all of its places were taken."""
    monkeypatch.setattr(line_of, "STUCK", 0.1)

    class Stuck:
        async def send_bytes(self, data: bytes) -> None:
            await asyncio.Event().wait()

        async def close(self, code: int, reason: str) -> None:
            await asyncio.Event().wait()

    class Here:
        timeline, metrics = Timeline(12, 0), Metrics()

    viewer = Socket(Stuck(), Here, "jpeg", RATE, True)
    shown = Shown(0, 0, np.zeros((8, 8, 3), np.uint8), np.zeros(PER_FRAME, np.int16))
    for _ in range(2 * line_of.SLOW):
        viewer.show(shown)
    sending = asyncio.create_task(viewer._send())
    while not sending.done():
        viewer.show(shown)
        await asyncio.sleep(0.01)
    assert viewer._end == "slow" and not viewer._out


class Raw:
    """A caller of few words."""

    def __init__(self, served: Served, *pieces: bytes, every: float = 0.0):
        self.served, self.pieces, self.every = served, pieces, every

    async def answer(self) -> bytes:
        """All that comes until the server hangs up."""
        host, port = self.served.address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        speaking = asyncio.create_task(self._speak(writer))
        try:
            async with asyncio.timeout(LONG):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            speaking.cancel()
            await asyncio.gather(speaking, return_exceptions=True)
            writer.close()

    async def _speak(self, writer: asyncio.StreamWriter) -> None:
        """The last piece again and again, if `every` says how often."""
        for piece in self.pieces:
            writer.write(piece)
            await writer.drain()
        while self.every:
            await asyncio.sleep(self.every)
            writer.write(self.pieces[-1])
            await writer.drain()


POST = b"POST /v1/sessions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
GET = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n"


@in_loop
async def test_who_says_half_of_a_request_holds_nothing_for_long(monkeypatch):
    monkeypatch.setattr(command, "MUTE", 1.5)
    monkeypatch.setattr(answers, "BODY", 1.0)
    async with serving(slots=2) as served, undisturbed(served):
        lines = served.server.server_state.connections
        length = POST + b"content-length: 5000\r\n\r\n"
        silent = [
            Raw(served),
            Raw(served, b"POST /v1/ses"),
            Raw(served, POST),
            Raw(served, POST, b"x: y\r\n", every=0.3),
            Raw(served, GET, GET[:20]),
        ]
        slow = [
            Raw(served, length),
            Raw(served, length, b'{"prompt": "'),
            Raw(served, length, b" ", every=0.2),
            Raw(served, POST + b"transfer-encoding: chunked\r\n\r\n", b"2\r\n{ \r\n"),
        ]
        begun = time.monotonic()
        said = await asyncio.gather(*(one.answer() for one in (*silent, *slow)))
        assert time.monotonic() - begun < LONG / 2
        assert [len(x) for x in said[:4]] == [0] * 4
        assert said[4].count(b"HTTP/1.1 200") == 1
        for one, answer in zip(slow, said[5:], strict=True):
            if answer or not one.every:  # what comes after the end may cut the answer off
                assert answer.startswith(b"HTTP/1.1 408") and b"problems/too-slow" in answer
        await until(lambda: all(not hasattr(x, "cycle") or x.cycle for x in lines))
        assert served.front.sessions.free == 1


@in_loop
async def test_headers_have_an_end():
    async with serving() as served:
        answer = await Raw(served, GET[:-2], b"x: " + b"y" * 10_000 + b"\r\n", every=0.001).answer()
        assert not answer or answer.startswith(b"HTTP/1.1 400")
        assert (await served.http.get("/livez")).status_code == 200


@in_loop
async def test_who_is_slow_but_goes_on_is_heard(monkeypatch):
    monkeypatch.setattr(command, "MUTE", 1.0)
    monkeypatch.setattr(answers, "BODY", 1.0)
    monkeypatch.setattr(answers, "SLOWEST", 2000)
    async with serving() as served:

        async def drops() -> AsyncIterator[bytes]:
            for _ in range(8):
                yield b" " * 4000
                await asyncio.sleep(0.3)

        async def asks() -> bytes:
            host, port = served.address.split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            for _ in range(9):  # over one line
                writer.write(GET)
                assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
                await asyncio.sleep(0.3)
            writer.close()

        kind = {"content-type": "application/json"}
        slow = served.http.post("/v1/sessions", content=drops(), headers=kind)
        answer, _ = await asyncio.gather(slow, asks())
        problem(answer, 422, "bad-input")  # heard to its end: it is no JSON


# ---- who asks too much


@in_loop
async def test_fewer_calls_and_videos_a_second_please(tmp_path):
    async with client(Settings(engine="mock", jobs=str(tmp_path), rate=0.01)) as known:
        called = [await known.post(f"/v1/sessions/none/{to}") for to in ["rtc", "whep"] * 4]
        assert [x.status_code for x in called] == [415] * 5 + [429] * 3
        made = [await known.post("/v1/videos", files={"audio": b"noise"}) for _ in range(7)]
        assert [x.status_code for x in made] == [400] * 5 + [429] * 2
        for answer in (called[-1], made[-1]):
            problem(answer, 429, "too-many-requests")
            assert int(answer.headers["retry-after"]) > 50
        # Each has a count of its own, and what belongs to a call that is there has none.
        problem(await known.post("/v1/sessions", json={}), 503, "not-ready")
        for _ in range(20):
            at = "/v1/sessions/none/rtc/none"
            problem(await known.patch(at, content=b""), 404, "no-such-call")


# ---- disks


WRITES = """
import resource, sys
import numpy as np
from liveavatar_jax.data.video import VideoWriter
from liveavatar_jax import cli
from liveavatar_jax.types import LiveAvatarError

_, out, most = sys.argv
resource.setrlimit(resource.RLIMIT_FSIZE, (int(most), int(most)))
try:
    with VideoWriter(out, (64, 64), fps=5) as video:
        for number in range(40):
            video.write(np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8))
except LiveAvatarError as error:
    print(f"liveavatar-jax: {error}", file=sys.stderr)
    sys.exit(2)
"""


@in_loop
async def test_a_disk_that_fills_while_a_video_is_made_fails_that_video_alone(
    tmp_path, monkeypatch
):
    begin, left = asyncio.create_subprocess_exec, [50_000, 1 << 30]

    async def small(*words: Any, **more: Any) -> Any:
        if "liveavatar_jax.cli" in words:
            words = sys.executable, "-c", WRITES, words[-1], str(left.pop(0))
        return await begin(*words, **more)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", small)
    monkeypatch.setattr(os, "setpriority", lambda *_: None)  # others are busy here
    async with serving(jobs=str(tmp_path)) as served, undisturbed(served):
        ask = functools.partial(served.http.post, "/v1/videos", files={"audio": sound(0.4)})
        job = await finished(served.http, (await ask()).json()["id"])
        assert job["status"] == "failed" and job["expires_at"]
        said = job["error"]["message"]
        assert re.fullmatch(r"cannot write draft\.mp4 beyond frame \d+: the disk is full", said)
        (kept,) = (tmp_path / job["id"]).iterdir()
        assert kept.name == "job.json"
        job = await finished(served.http, (await ask()).json()["id"])
        assert job["status"] == "completed", job


def full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_what_cannot_be_kept_is_not_made_again(tmp_path, monkeypatch):
    """By a server that starts again; nor is a part of it left."""

    async def run() -> None:
        known = Jobs(Settings(engine="mock", jobs=str(tmp_path)))
        job = await known.add(picture(), sound(0.4), "x", 0)
        monkeypatch.setattr(jobs.os, "replace", full)
        monkeypatch.setattr(jobs, "sys", SimpleNamespace(executable="false"))
        await known._make(job)
        assert job.status == "failed" and not list((tmp_path / job.id).iterdir())
        again = Jobs(Settings(engine="mock", jobs=str(tmp_path)))
        assert again._find() == {}

    asyncio.run(run())


def test_a_prompt_is_a_prompt_whatever_it_begins_with(tmp_path, monkeypatch):
    asked = []

    async def refused(*words: str, **more: Any) -> Any:
        asked.extend(words)
        raise OSError(11, "Resource temporarily unavailable")

    async def run() -> None:
        known = Jobs(Settings(engine="mock", jobs=str(tmp_path)))
        job = await known.add(picture(), sound(0.4), "--help", 7)
        monkeypatch.setattr(asyncio, "create_subprocess_exec", refused)
        with pytest.raises(OSError):
            await known._make(job)

    asyncio.run(run())
    said = cli._parser().parse_args(asked[3:])
    assert (said.prompt, said.seed) == ("--help", 7)


# ---- recordings


def encoded(kind: str, codec: str, seconds: float, rate: int = 16_000) -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format=kind) as file:
        stream = file.add_stream(codec, rate=rate)
        stream.layout = "mono"
        samples = av.AudioFrame.from_ndarray(tone(seconds, rate=rate)[None], "s16", "mono")
        samples.sample_rate, samples.pts = rate, 0
        for frame in (samples, None):
            file.mux(stream.encode(frame))
    return out.getvalue()


def test_a_recording_that_claims_hours_is_refused_unheard(tmp_path, monkeypatch):
    long = bytearray(encoded("flac", "flac", 1.0))
    assert long[:4] == b"fLaC" and long[8:10] == long[10:12]  # the sizes of blocks, before it
    rest = int.from_bytes(long[18:26], "big") >> 36 << 36
    long[18:26] = (rest | 5 * 3600 * RATE).to_bytes(8, "big")
    monkeypatch.setattr(jobs, "read_audio", lambda path: pytest.fail("it was decoded"))
    with pytest.raises(LiveAvatarError, match="claims to last 18000 s; at most 600 s"):
        known = Jobs(Settings(engine="mock", jobs=str(tmp_path)))
        asyncio.run(known.add(picture(), bytes(long), "x", 0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "kind, codec, rate",
    [("flac", "flac", RATE), ("mp4", "aac", RATE), ("ogg", "libopus", 48_000),
     ("matroska", "libopus", 48_000), ("wav", "pcm_s16le", RATE)],
)  # fmt: skip
def test_what_a_recording_claims_is_its_length(tmp_path, kind, codec, rate):
    (tmp_path / "a").write_bytes(encoded(kind, codec, 3.0, rate))
    assert jobs._claimed(tmp_path / "a") == pytest.approx(3.0, abs=0.1)


@pytest.mark.parametrize("kind, codec", [("mp3", "libmp3lame"), ("adts", "aac")])
def test_a_length_that_is_a_guess_is_no_claim(tmp_path, kind, codec):
    (tmp_path / "a").write_bytes(encoded(kind, codec, 1.0))
    (tmp_path / "b").write_bytes(b"noise")
    assert [jobs._claimed(tmp_path / name) for name in "ab"] == [0.0, 0.0]


# ---- calls


class Heard:
    """Stands for a session."""

    id = "heard"

    def __init__(self) -> None:
        self.metrics, self.samples = Metrics(), 0

    def speak(self, samples: np.ndarray) -> None:
        self.samples += len(samples)

    def leave(self, viewer: Any) -> None:
        pass


@in_loop
async def test_sound_that_the_network_lost_is_counted_as_it_grows():
    class Track:
        def __init__(self) -> None:
            self.at = iter([0, 1, 2, 5, 6, 5, 7, 12])  # of packets; one comes late

        async def recv(self) -> Any:
            await asyncio.sleep(0)
            counts.append(gaps())
            for at in self.at:
                return heard(960 * at, np.full(960, 99, np.int16))
            raise MediaStreamError

    session, counts = Heard(), []
    gaps = lambda: session.metrics.registry.get_sample_value("la_input_gap_seconds_total")
    call = Call(session, True, RTCConfiguration([]))  # type: ignore[arg-type]
    await call._listen(Track())  # type: ignore[arg-type]
    await call.hang_up()
    assert counts == pytest.approx([0, 0, 0, 0, 0.04, 0.04, 0.04, 0.04, 0.12])
    assert abs(session.samples - 13 * 320) < 32


class Marks:
    """A `Viewer` that notes when the session was interrupted."""

    watching = False
    speaks = True

    def __init__(self, notes: list[tuple[str, int]]):
        self.notes = notes

    def tell(self, event: dict[str, Any]) -> None:
        if event["type"] == "audio.cleared":
            self.notes.append(("cleared", event["epoch"]))

    def clear(self, epoch: int) -> None:
        pass

    def close(self, reason: str) -> None:
        pass


@in_loop
async def test_after_interrupts_of_a_call_nothing_older_is_encoded(monkeypatch):
    """Said in each epoch is another constant, so that each packet of sound tells its own. Pictures
    are encoded slowly, so that some wait."""
    monkeypatch.setattr(session_of, "CLEARS", 1000.0)
    notes, recv, draw = list[tuple[str, int]](), Out.recv, random.Random(5)
    said = lambda epoch: 500 + 100 * epoch

    async def noted(self: Out) -> Any:
        await asyncio.sleep(0.06 if self.kind == "video" else 0.0)
        frame = await recv(self)
        if self.kind == "video":
            notes.append(("picture", mock.read(frame.to_ndarray(format="rgb24"))["epoch"]))
        else:
            notes.append(("sound", int(frame.to_ndarray().max())))
        return frame

    monkeypatch.setattr(Out, "recv", noted)
    async with serving() as served, browsing(mic=False) as browser:
        told = await served.create()
        async with joined(served, told, media="none") as line:
            await connected(served, told, browser)
            served.session(told).join(Marks(notes))
            await until(lambda: len(browser.pictures) > 3)
            for epoch in range(25):
                await line.say(np.full(RATE, said(epoch), np.int16), epoch=epoch)
                if epoch % 5 == 0:
                    await line.until(lambda epoch=epoch: any(
                        x["epoch"] == epoch for x in line.named("speech.started")))  # fmt: skip
                await asyncio.sleep(0.1 * draw.random())
                await line.tell("audio.clear")
                await line.event("audio.cleared", epoch + 1)
            seen, begun = len(browser.pictures), time.monotonic()
            epochs = lambda: [mock.read(x)["epoch"] for _, x in browser.pictures[seen:]]
            await until(lambda: 25 in epochs())
            arrived = time.monotonic() - begun
            await until(lambda: len(browser.pictures) > seen + 20)
            came = epochs()
    now = 0
    for kind, value in notes:
        match kind:
            case "cleared":
                now = value
            case "picture":
                assert value == now
            case "sound":
                assert value in (0, said(now))
    assert now == 25 and sum(kind == "picture" for kind, _ in notes) > 25
    assert sum(kind == "sound" and value > 0 for kind, value in notes) > 10
    # What is encoded by then arrives soon, and never after what is newer.
    assert came == sorted(came) and came[-1] == 25 and arrived < 2.0


class Voice(Microphone):
    """Without a pause."""

    def _wave(self, n: np.ndarray) -> np.ndarray:
        return 9000 * np.sin(2 * np.pi * self.hertz * n / BROWSER)


@in_loop
async def test_calls_see_and_hear_their_own_session_whatever_becomes_of_others(monkeypatch):
    """Three at once: one hangs up without a word, the engine of another one dies."""
    tones = [300.0, 700.0, 1100.0]
    with soon_noticed(monkeypatch, hangs=LONG):
        async with serving(workers=3) as served, contextlib.AsyncExitStack() as stack:
            told = [await served.create(live=True) for _ in tones]
            sessions, browsers = [served.session(x) for x in told], []
            for one, hertz in zip(told, tones, strict=True):
                voice = functools.partial(Voice, hertz)
                browsers.append(await stack.enter_async_context(browsing(voice=voice)))
                await connected(served, one, browsers[-1])
            loud = lambda browser: sum(np.abs(x).max() > 3000 for _, x in browser.sound)
            await until(lambda: all(loud(x) > 20 and len(x.pictures) > 20 for x in browsers))
            stays, leaves, fails = sessions
            leaves.limits = dataclasses.replace(leaves.limits, grace=0.5)
            await browsers[1].close()
            os.kill(fails.worker.link.process.pid, signal.SIGKILL)
            await until(lambda: leaves.reason == "left" and fails.reason == "engine")
            await until(lambda: sorted(peers(served))[:2] == ["closed", "closed"])
            have, said = len(browsers[0].pictures), loud(browsers[0])
            await until(lambda: len(browsers[0].pictures) > have + 20)
            await until(lambda: loud(browsers[0]) > said + 20)
            assert stays.state in ("ready", "speaking") and len(stays.viewers) == 1
            assert stays.worker.link.health.restarts == 0
            await until(lambda: served.free == 2)
    for one, browser, hertz in zip(told, browsers, tones, strict=True):
        seen = {mock.read(x)["session"] for _, x in browser.pictures}
        assert seen == {mock.tag(one["id"])}
        shares = [share(browser, other) for other in tones]
        assert shares.pop(tones.index(hertz)) > 0.8 and max(shares) < 0.02


def share(browser: Browser, hertz: float) -> float:
    """Of the power of what was heard, without silence, that is this tone."""
    spoken = np.concatenate([x for _, x in browser.sound if np.abs(x).max() > 3000])
    power = np.abs(np.fft.rfft(spoken.astype(float) * np.hanning(len(spoken)))) ** 2
    near = np.abs(np.fft.rfftfreq(len(spoken), 1 / BROWSER) - hertz) < 30
    return power[near].sum() / power.sum()
