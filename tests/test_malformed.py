"""Whatever is sent to the server is accepted, or refused in one sentence: nothing else happens."""

import asyncio
import base64
import contextlib
import functools
import json
import math
import re
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("aiortc", reason="needs the extra serve")

from aioice import mdns
from aiortc import RTCConfiguration
from hypothesis import example, given, settings
from hypothesis import strategies as some

from serve import front, rtc
from serve.metrics import Metrics
from serve.rtc import MANY, PARTS, Call
from serve.session import Limits, Problem, Session
from serve.sessions import Sessions
from serve.settings import Settings
from serve.socket import EVENTS, MISTAKES, RATES, SOUND, Socket
from serve.wire import RATE
from tests.serving import Near, in_loop, until
from tests.test_jobs import picture, sound
from tests.test_rtc import Browser, sockets
from tests.test_sessions import Blank, problem

few = functools.partial(settings, deadline=None, database=None, derandomize=True)


# ---- messages


@contextlib.asynccontextmanager
async def one_session() -> AsyncIterator[Session]:
    sessions = Sessions([functools.partial(Near, maker=Blank(1))], Limits(busy=math.inf), Metrics())
    running = asyncio.create_task(sessions.run())
    try:
        yield await sessions.create(lambda ready: np.zeros((8, 8, 3), np.uint8), "x")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


class Fed:
    """A WebSocket over which these messages come, and then its end."""

    def __init__(self, messages: list[str | bytes]):
        self._left, self.code = list(messages), 0

    async def receive(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        if not self._left:
            return {"type": "websocket.disconnect"}
        message = self._left.pop(0)
        kind = "text" if isinstance(message, str) else "bytes"
        return {"type": "websocket.receive", kind: message}

    async def close(self, code: int, reason: str) -> None:
        self.code = code


numbers = some.integers() | some.floats() | some.just(10**4000)
words = some.text(some.characters(), max_size=40)  # halves of pairs, too
plain = some.none() | some.booleans() | numbers | words
sound_in_base64 = some.binary(max_size=300).map(lambda x: base64.b64encode(x).decode())
values = some.recursive(
    plain | sound_in_base64 | some.just("x" * 3000),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
KINDS = ["audio.append", "audio.end", "audio.clear", "session.update", "ping"]
events = some.fixed_dictionaries(
    {"type": some.sampled_from(KINDS) | values},
    optional={name: values for name in ("audio", "prompt", "id", "epoch")},
).map(json.dumps)
texts = some.one_of(
    events, values.map(json.dumps), words, some.just("[" * 100_000),
    events.flatmap(lambda x: some.integers(0, len(x)).map(lambda cut: x[:cut])),
    some.just('{"type": "ping", "id": ' + "9" * 5000 + "}"),
)  # fmt: skip
binaries = some.one_of(
    some.binary(max_size=99),
    some.tuples(some.integers(0, 3) | some.just(2**32 - 1), some.binary(max_size=4000)).map(
        lambda x: SOUND.pack(x[0], 0) + x[1]
    ),
)


@few(max_examples=60)
@given(
    messages=some.lists(texts | binaries, max_size=25),
    rate=some.sampled_from(RATES),
    speaks=some.booleans(),
)
@example(messages=["[" * 100_000, '{"type": "audio.append", "audio": 7}'], rate=RATE, speaks=True)
@in_loop
async def test_any_message_is_understood_or_refused(messages, rate, speaks):
    async with one_session() as session:
        ws, kinds = Fed(messages), set()
        line = Socket(ws, session, "none", rate, speaks)
        session.join(line)
        await line._receive()  # whatever it raises is a fault
        assert len(line._out) <= EVENTS
        told = [json.loads(x) for x in line._out if isinstance(x, str)]
        kinds = {x["error"] for x in told if x["type"] == "error"}
        assert kinds <= {"bad-message", "too-far-ahead"}
        assert all(len(x["detail"]) < 300 for x in told if x["type"] == "error")
        assert ws.code in (0, 1008) and (ws.code == 1008) == (line._mistakes >= MISTAKES)
        assert ws.code or not ws._left  # no line is given up without a word
        assert session.timeline.waiting <= session.limits.speech * RATE
        # and the next one to speak finds a session as any other
        session.interrupt()
        again = Socket(Fed([]), session, "none", RATE, True)
        session.join(again)
        again._binary(SOUND.pack(session.timeline.epoch, 0) + np.full(9600, 7, "<i2").tobytes())
        again._text('{"type": "audio.end"}')
        ended = lambda: any('"speech.ended"' in x for x in again._out if isinstance(x, str))
        assert session.state == "ready" and session.timeline.came == 9600
        if speaks and len(messages) == 25:  # in real time: not each time
            await until(ended)


# ---- calls

# What Chromium says, shortened; its candidates are names that are not asked for here.
CHROMIUM = """v=0
o=- 5683527075683486083 2 IN IP4 127.0.0.1
s=-
t=0 0
a=group:BUNDLE 0 1
a=extmap-allow-mixed
a=msid-semantic: WMS
m=audio 9 UDP/TLS/RTP/SAVPF 111 63 0 13 126
c=IN IP4 0.0.0.0
a=rtcp:9 IN IP4 0.0.0.0
a=candidate:2680164289 1 udp 2113937151 127.0.0.1 58165 typ host generation 0 network-cost 999
a=ice-ufrag:mBE1
a=ice-pwd:zso6fJ6OOjUqkiNSBveRVvlD
a=ice-options:trickle
a=fingerprint:sha-256 26:FB:13:16:76:41:28:A1:C1:46:18:A3:9E:75:96:FE:05:48:A3:EB:51:6E:DD:14:24:82:0C:81:1B:BA:5E:B4
a=setup:actpass
a=mid:0
a=extmap:1 urn:ietf:params:rtp-hdrext:ssrc-audio-level
a=extmap:4 urn:ietf:params:rtp-hdrext:sdes:mid
a=sendrecv
a=msid:- b217aeff-9a55-40a7-9c25-2352d6fa3d9e
a=rtcp-mux
a=rtcp-rsize
a=rtpmap:111 opus/48000/2
a=rtcp-fb:111 transport-cc
a=fmtp:111 minptime=10;useinbandfec=1
a=rtpmap:63 red/48000/2
a=fmtp:63 111/111
a=rtpmap:0 PCMU/8000
a=rtpmap:13 CN/8000
a=rtpmap:126 telephone-event/8000
a=ssrc:625891301 cname:FCoq4Keefd3e1Yfb
a=ssrc:625891301 msid:- b217aeff-9a55-40a7-9c25-2352d6fa3d9e
m=video 9 UDP/TLS/RTP/SAVPF 96 97 102 103
c=IN IP4 0.0.0.0
a=rtcp:9 IN IP4 0.0.0.0
a=ice-ufrag:mBE1
a=ice-pwd:zso6fJ6OOjUqkiNSBveRVvlD
a=ice-options:trickle
a=fingerprint:sha-256 26:FB:13:16:76:41:28:A1:C1:46:18:A3:9E:75:96:FE:05:48:A3:EB:51:6E:DD:14:24:82:0C:81:1B:BA:5E:B4
a=setup:actpass
a=mid:1
a=extmap:14 urn:ietf:params:rtp-hdrext:toffset
a=extmap:13 urn:3gpp:video-orientation
a=recvonly
a=rtcp-mux
a=rtcp-rsize
a=rtpmap:96 VP8/90000
a=rtcp-fb:96 goog-remb
a=rtcp-fb:96 ccm fir
a=rtcp-fb:96 nack pli
a=rtpmap:97 rtx/90000
a=fmtp:97 apt=96
a=rtpmap:102 H264/90000
a=rtcp-fb:102 nack
a=fmtp:102 level-asymmetry-allowed=1;packetization-mode=1;profile-level-id=42001f
a=rtpmap:103 rtx/90000
a=fmtp:103 apt=102
"""  # noqa: E501


@pytest.fixture(scope="module")
def offers() -> tuple[str, str]:
    """Of Chromium, and of aiortc."""

    async def make() -> str:
        browser = Browser(None)
        try:
            return await browser.offer()
        finally:
            await browser.close()

    return CHROMIUM.replace("\n", "\r\n"), asyncio.run(make())


class Room:
    """Stands for a session."""

    id = "room"

    def __init__(self) -> None:
        self.metrics, self.viewers = Metrics(), []

    def join(self, viewer: Any) -> None:
        self.viewers.append(viewer)

    def leave(self, viewer: Any) -> None:
        if viewer in self.viewers:
            self.viewers.remove(viewer)


@contextlib.asynccontextmanager
async def calling() -> AsyncIterator[Call]:
    """A call, of which nothing is left at the end: no task, no socket, and no fault that nobody
    caught."""
    loop, faults, tasks, before = asyncio.get_running_loop(), [], asyncio.all_tasks(), sockets()
    loop.set_exception_handler(lambda loop, context: faults.append(context))
    call = Call(Room(), True, RTCConfiguration([]))  # type: ignore[arg-type]
    try:
        yield call
    finally:
        await call.hang_up()
    assert call.peer.connectionState == "closed" and not call._session.viewers
    await until(lambda: not asyncio.all_tasks() - tasks)
    await until(lambda: sockets() <= before)
    assert not faults


async def refused(doing: Any, kind: str) -> str | None:
    """What it says, if it is refused."""
    try:
        await doing
    except Problem as error:
        assert (error.status, error.kind) == (400, kind) and len(error.detail) < 200
        return error.detail
    return None


noise = some.one_of(
    some.just(""), some.integers(-(2**70), 2**70).map(str), some.text(max_size=12),
    some.binary(max_size=12).map(lambda x: x.decode("utf-8", "replace")),
    some.sampled_from(["0", "-1", "65536", "4294967296", "9" * 5000, "nan", "::1", "a=", "m="]),
)  # fmt: skip
change = some.tuples(
    some.sampled_from(["drop", "double", "swap", "number", "word", "insert", "cut"]),
    some.integers(0, 200), some.integers(0, 200), noise,
)  # fmt: skip


def changed(text: str, changes: list[tuple[str, int, int, str]]) -> str:
    lines = text.splitlines(keepends=True)
    for kind, at, other, noise in changes:
        if not lines:
            break
        at, other = at % len(lines), other % len(lines)
        match kind:
            case "drop":
                del lines[at]
            case "double":
                lines[at] *= 2
            case "swap":
                lines[at], lines[other] = lines[other], lines[at]
            case "number" | "word":
                found = list(
                    re.finditer(r"\d+" if kind == "number" else r"[^ :=/;\r\n]+", lines[at])
                )
                if found:
                    begin, end = found[other % len(found)].span()
                    lines[at] = lines[at][:begin] + noise + lines[at][end:]
            case "insert":
                lines.insert(at, noise + "\r\n")
            case "cut":
                lines[at] = lines[at][: other % (len(lines[at]) + 1)]
    return "".join(lines)


@few(max_examples=80)
@given(which=some.integers(0, 1), changes=some.lists(change, max_size=6))
@example(which=0, changes=[])
@example(which=1, changes=[])
@example(which=0, changes=[("drop", 16, 0, "")])  # of a bundle, the first mid
@in_loop
async def test_any_offer_is_answered_or_refused(offers, which, changes):
    async with calling() as call:
        said = await refused(call.answer(changed(offers[which], changes)), "bad-offer")
        assert changes or said is None
        assert said is not None or "m=" in call.peer.localDescription.sdp
        assert len(call._session.viewers) == (said is None)


CANDIDATES = """a=ice-ufrag:mBE1\r
a=mid:0\r
a=candidate:2680164289 1 udp 2113937151 127.0.0.1 58165 typ host generation 0 network-cost 999\r
a=candidate:1 1 UDP 1677729535 192.0.2.1 50000 typ srflx raddr 10.0.0.1 rport 50000\r
a=candidate:2 1 tcp 1518280447 127.0.0.1 9 typ host tcptype active\r
a=mid:1\r
a=candidate:3 2 udp 2113937150 ::1 58166 typ host\r
a=end-of-candidates\r
"""


@few(max_examples=20)
@given(changes=some.lists(some.lists(change, max_size=4), max_size=10))
@in_loop
async def test_any_candidate_is_taken_or_refused(offers, changes):
    async with calling() as call:
        await call.answer(offers[0])
        for some_changes in [[], *changes]:
            await refused(call.candidates(changed(CANDIDATES, some_changes)), "bad-candidate")
        assert call.peer.signalingState == "stable" and not call._gone


@in_loop
async def test_offers_have_an_end():
    """Each medium opens sockets, and each candidate is kept and tried."""
    part = CHROMIUM[CHROMIUM.index("m=audio") : CHROMIUM.index("m=video")]
    many = re.sub("a=group.*\n", "", CHROMIUM) + "".join(
        part.replace("a=mid:0", f"a=mid:{n}") for n in range(2, PARTS + 1)
    )
    line = "a=candidate:1 1 udp 2113937151 127.0.0.1 {} typ host\n"
    tried = CHROMIUM + "".join(line.format(port) for port in range(1, MANY + 1))
    for offer in (many, tried):
        async with calling() as call:
            assert "ValueError" in (await refused(call.answer(offer), "bad-offer") or "")
    async with calling() as call:
        await call.answer(CHROMIUM)
        lines = "".join(line.format(port) for port in range(1, MANY))
        assert await refused(call.candidates(lines), "bad-candidate") is None
        assert await refused(call.candidates(line.format(MANY)), "bad-candidate")
        assert len(call.peer.getReceivers()[0].transport.transport.getRemoteCandidates()) <= MANY


@in_loop
async def test_names_that_nobody_knows_hold_up_no_call_for_long(monkeypatch):
    """Each is looked for a second long, where the network can be asked at all."""

    async def resolve(self: Any, name: str) -> None:
        await asyncio.sleep(1.0)

    monkeypatch.setattr(mdns.MDnsProtocol, "resolve", resolve)
    names = "".join(
        f"a=candidate:1 1 udp 2113937151 nobody-{n}.local 9 typ host\n" for n in range(100)
    )
    offer = CHROMIUM.replace("a=ice-ufrag", names + "a=ice-ufrag", 1)
    async with calling() as call:
        assert await refused(call.answer(offer), "bad-offer") is None
    monkeypatch.setattr(rtc, "CONNECTS", 0.5)
    async with calling() as call:
        said = await refused(call.answer(offer), "bad-offer")
        assert said is not None and "TimeoutError" in said
    async with calling() as call:
        await call.answer(CHROMIUM)
        said = await refused(call.candidates(names), "bad-candidate")
        assert said is not None and "TimeoutError" in said


# ---- requests


class Here:
    """The routes, an engine at hand that draws nothing, and no worker of jobs; in a loop that
    stands still between two requests."""

    def __init__(self, folder: Path, run: Callable[[Any], Any]):
        self.folder, self.run = folder, run
        app = front.make(Settings(engine="mock", jobs=str(folder), rate=1e6, busy=1e6))
        self.front = app.state.front
        worker = self.front.sessions.workers[0]
        hear = functools.partial(self.front.sessions._hear, worker)
        worker.link = run(made(Near, hear, lambda reason: None, Blank(1)))
        transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
        self._known = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def post(self, to: str, **more: Any) -> httpx.Response:
        return self.run(self._known.post(to, **more))

    def made(self, to: str, status: int, **more: Any) -> None:
        """What is made of it, or why nothing is, in one sentence; it leaves nothing."""
        answer = self.post(to, **more)
        if answer.status_code == status:
            self.run(self._known.delete(f"{to}/{answer.json()['id']}"))
            self.run(asyncio.sleep(0.01))
        else:
            assert 400 <= answer.status_code < 500, answer.text
            kind = answer.json()["type"].rpartition("/")[2]
            assert len(problem(answer, answer.status_code, kind)["detail"]) < 400
        assert not self.front.sessions.all and self.front.sessions.free == 1
        assert not list(self.folder.iterdir())


async def made(kind: Any, *args: Any) -> Any:
    return kind(*args)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Here]:
    with asyncio.Runner() as runner:
        yield Here(tmp_path_factory.mktemp("jobs"), runner.run)


def claims(width: int, height: int) -> bytes:
    """A small PNG that says it is so large."""
    whole = picture()
    head = b"IHDR" + struct.pack(">II", width, height) + whole[24:29]
    return whole[:12] + head + struct.pack(">I", zlib.crc32(head)) + whole[33:]


HUGE = [claims(7000, 7000), claims(30_000, 30_000), claims(2**31 - 1, 2**31 - 1)]


def damaged(whole: bytes) -> Any:
    """A file with some bytes replaced, or cut."""
    spot = some.tuples(some.integers(0, len(whole) - 1), some.integers(0, 255))

    def put(x: tuple[list[tuple[int, int]], int]) -> bytes:
        data = bytearray(whole)
        for at, byte in x[0]:
            data[at] = byte
        return bytes(data[: x[1]])

    return some.tuples(some.lists(spot, max_size=5), some.integers(0, len(whole))).map(put)


faces = damaged(picture()) | some.sampled_from([*HUGE, picture(), b""])
in_base64 = faces.map(lambda x: base64.b64encode(x).decode())
as_json = lambda x: json.dumps(x).encode()
NAMES = ["avatar", "prompt", "seed", "live", "idle", "transport", "livekit", "more"]
bodies = some.one_of(
    some.dictionaries(some.sampled_from(NAMES), values, max_size=2),
    some.fixed_dictionaries({"image": in_base64 | words}).map(lambda x: {"avatar": x}),
    some.dictionaries(some.sampled_from(["id", "image", "consent", "more"]), values, max_size=2)
    .map(lambda x: {"avatar": x}),
)  # fmt: skip


@few(max_examples=80)
@given(
    body=some.one_of(*[bodies.map(as_json)] * 4, values.map(as_json), some.binary(max_size=99)),
    kind=some.sampled_from(
        [*["application/json"] * 5, "text/plain", "", "application/json; charset=x"]
    ),
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_any_body_makes_a_session_or_is_refused(here, body, kind):
    here.made("/v1/sessions", 201, content=body, headers={"content-type": kind})


PART = b'--cut\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
files = some.tuples(
    some.just(b"audio") | some.just(b"input_reference"),
    some.sampled_from([b'; filename="a"', b"", b'; filename="\\"', b"; filename*=utf-8''%ff"]),
    damaged(sound(0.1)) | faces | some.just(sound(0.1)),
)
fields = some.tuples(
    some.sampled_from([b"avatar", b"prompt", b"seed", b"consent", b"more", b"audio", b""]),
    some.just(b""), some.binary(max_size=40) | some.sampled_from([b"7", b"-x", b"\0", b"x" * 3000]),
)  # fmt: skip


@few(max_examples=80)
@given(
    parts=some.lists(files | fields, max_size=5),
    head=some.sampled_from(["; boundary=cut", "; boundary=cut; charset=utf-7", "", "; boundary="]),
    end=some.sampled_from([b"--cut--\r\n", b"", b"--cut"]),
    cut=some.integers(0, 300),
)
@example(parts=[(b"audio", b'; filename="a"', sound(0.1))], head="; boundary=cut",
         end=b"--cut--\r\n", cut=0)  # fmt: skip
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
# Starlette leaves files of a form that it cannot read to the collector, which closes them.
@pytest.mark.filterwarnings("ignore:Unclosed file <tempfile.Spooled:ResourceWarning")
def test_any_form_makes_a_video_or_is_refused(here, parts, head, end, cut):
    body = b"".join(PART % part for part in parts) + end
    body = body[: len(body) - cut] if cut < 100 else body
    kind = {"content-type": f"multipart/form-data{head}"}
    here.made("/v1/videos", 200, content=body, headers=kind)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("face", HUGE, ids=len)
def test_a_picture_that_claims_to_be_huge_is_not_decoded(here, monkeypatch, face):
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    session = {"avatar": {"image": base64.b64encode(face).decode()}}
    video = {"audio": sound(0.1), "input_reference": face}
    for answer in (here.post("/v1/sessions", json=session), here.post("/v1/videos", files=video)):
        assert "portrait" in problem(answer, 400, "bad-input")["detail"]
    assert not here.front.sessions.all and not list(here.folder.iterdir())


def test_a_prompt_is_text(here):
    video = {"audio": sound(0.1)}
    answer = here.post("/v1/videos", files=video, data={"prompt": "Someone\0speaks."})
    assert "prompt has a character" in problem(answer, 400, "bad-input")["detail"]
    assert not list(here.folder.iterdir())
