"""Calls over WebRTC: a real peer on the other side, and an engine that draws its frames."""

import asyncio
import contextlib
import dataclasses
import os
import random
import re
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

pytest.importorskip("aiortc", reason="needs the extra serve")

from aiortc import (
    MediaStreamError,
    MediaStreamTrack,
    RTCConfiguration,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.codecs.opus import OpusDecoder, OpusEncoder
from aiortc.jitterbuffer import JitterFrame
from aiortc.rtp import RtpPacket

from liveavatar_jax.types import LiveAvatarError
from serve import mock, rtc
from serve.clock import LATE, Shown
from serve.rtc import HOLE, PACKET, SDP, STILL, Call, Onward, Out, Placed
from serve.wire import FPS, PER_FRAME, RATE
from tests.processes import free_port
from tests.serving import LONG, Served, in_loop, joined, serving, tone, until

BROWSER = 48_000  # samples a second of a microphone


class Microphone(MediaStreamTrack):
    """A second of silence, a second of tone, by turns; in real time."""

    kind = "audio"

    def __init__(self, hertz: float = 400.0):
        super().__init__()
        self.hertz, self.sent, self._begun = hertz, 0, 0.0

    async def recv(self) -> av.AudioFrame:
        if self.readyState != "live":
            raise MediaStreamError
        self._begun = self._begun or time.monotonic()
        at = self.sent
        self.sent += BROWSER // 50
        await asyncio.sleep(max(0.0, self._begun + self.sent / BROWSER - time.monotonic()))
        samples = self._wave(at + np.arange(BROWSER // 50)).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples[None], "s16", "mono")
        frame.sample_rate, frame.pts, frame.time_base = BROWSER, at, Fraction(1, BROWSER)
        return frame

    def _wave(self, n: np.ndarray) -> np.ndarray:
        loud = (n // BROWSER) % 2
        return loud * 9000 * np.sin(2 * np.pi * self.hertz * n / BROWSER)


class Chirp(Microphone):
    """A tone that tells the time: `FIRST` Hz, and `RISE` more each second."""

    FIRST, RISE = 300.0, 300.0

    def _wave(self, n: np.ndarray) -> np.ndarray:
        at = n / BROWSER
        return 9000 * np.sin(2 * np.pi * (self.FIRST + self.RISE * at / 2) * at)

    @classmethod
    def times(cls, sound: np.ndarray, piece: int = PACKET) -> np.ndarray:
        """When each piece of sound was said, in seconds; NaN where silence is in it."""
        cut = sound[: len(sound) // piece * piece].reshape(-1, piece).astype(float)
        loud = np.abs(np.fft.rfft(cut * np.hanning(piece), RATE // 4))
        hertz = 4.0 * loud.argmax(1)
        return np.where((cut == 0).mean(1) < 0.1, (hertz - cls.FIRST) / cls.RISE, np.nan)


class Browser:
    """Who calls. sound: (stamp, mono samples) of its packets; pictures: (stamp, frame)."""

    def __init__(self, mic: MediaStreamTrack | None):
        self.peer = RTCPeerConnection(RTCConfiguration([]))
        self.sound: list[tuple[int, np.ndarray]] = []
        self.pictures: list[tuple[int, np.ndarray]] = []
        self._tasks: list[asyncio.Task] = []
        self.peer.on("track", lambda track: self._tasks.append(
            asyncio.create_task(self._take(track))))  # fmt: skip
        if mic is not None:
            self.peer.addTrack(mic)
        else:
            self.peer.addTransceiver("audio", direction="recvonly")
        self.peer.addTransceiver("video", direction="recvonly")

    async def _take(self, track: MediaStreamTrack) -> None:
        with contextlib.suppress(MediaStreamError):
            while True:
                frame: Any = await track.recv()
                if track.kind == "audio":
                    both = frame.to_ndarray().reshape(-1, 2)
                    self.sound.append((frame.pts, both[:, 0]))
                else:
                    self.pictures.append((frame.pts, frame.to_ndarray(format="rgb24")))

    async def offer(self) -> str:
        await self.peer.setLocalDescription(await self.peer.createOffer())
        return self.peer.localDescription.sdp

    async def take(self, answer: str) -> None:
        await self.peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))

    async def close(self) -> None:
        await self.peer.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def browsing(
    mic: bool = True, voice: type[Microphone] = Microphone
) -> AsyncIterator[Browser]:
    browser = Browser(voice() if mic else None)
    try:
        yield browser
    finally:
        await browser.close()


async def ring(
    served: Served, told: dict, offer: str | bytes, token: str | None = None, to: str = "rtc"
) -> Any:
    headers = {"content-type": SDP} | ({"authorization": f"Bearer {token}"} if token else {})
    url = told["urls"]["rtc"].replace("/rtc", f"/{to}")
    return await served.http.post(url, content=offer, headers=headers)


async def connected(served: Served, told: dict, browser: Browser, **more: Any) -> str:
    """The address of the call."""
    answer = await ring(served, told, await browser.offer(), **more)
    assert answer.status_code == 201, answer.text
    assert answer.headers["content-type"].startswith(SDP) and answer.headers["etag"]
    await browser.take(answer.text)
    await until(lambda: browser.peer.connectionState == "connected")
    return answer.headers["location"]


class Lossy:
    """A network between a caller and the server, that loses packets both ways; all of them while
    it is `out`. Whoever comes gets a port of their own on the server's side, as with a NAT."""

    def __init__(self, seed: int, share: float):
        self.share, self.out, self.lost, self.passed = share, False, 0, 0
        self._draw, self._loop = random.Random(seed), asyncio.get_running_loop()
        self._server, self._sockets = ("", 0), list[socket.socket]()
        self._fronts: dict[tuple[str, int], socket.socket] = {}

    def between(self, answer: str) -> str:
        """The answer, as if the server were here."""
        mine = r"a=candidate:(\S+ 1 udp \d+) (\d+\.\d+\.\d+\.\d+) (\d+) typ host"
        found = re.search(mine, answer)
        assert found is not None
        kind, host, port = found.groups()
        self._server = (host, int(port))
        here = self._open(self._to_server).getsockname()
        rest = "".join(x for x in answer.splitlines(keepends=True) if "a=candidate" not in x)
        line = f"a=candidate:{kind} {host} {here[1]} typ host\r\n"
        return rest.replace("a=end-of-candidates", line + "a=end-of-candidates", 1)

    def _open(self, hear: Callable[[socket.socket], None]) -> socket.socket:
        one = socket.socket(type=socket.SOCK_DGRAM)
        one.bind((self._server[0], 0))
        one.setblocking(False)
        self._loop.add_reader(one, hear, one)
        self._sockets.append(one)
        return one

    def _to_server(self, front: socket.socket) -> None:
        data, caller = front.recvfrom(65536)
        if caller not in self._fronts:
            back = lambda one: self._pass(front, one.recv(65536), caller)
            self._fronts[caller] = self._open(back)
        self._pass(self._fronts[caller], data, self._server)

    def _pass(self, by: socket.socket, data: bytes, to: tuple[str, int]) -> None:
        if self.out or self._draw.random() < self.share:
            self.lost += 1
            return
        self.passed += 1
        with contextlib.suppress(OSError):  # nobody is there any more: lost, too
            by.sendto(data, to)

    def close(self) -> None:
        for one in self._sockets:
            self._loop.remove_reader(one)
            one.close()


def peers(served: Served) -> list[str]:
    return [call.peer.connectionState for call in served.front.rtc._calls.values()]


# ---- calls


@in_loop
async def test_what_is_said_into_a_call_comes_out_of_the_face():
    async with serving() as served, browsing() as browser:
        told = await served.create(live=True)
        async with joined(served, told, media="none") as line:
            await connected(served, told, browser)
            started = await line.event("speech.started")
            ended = await line.event("speech.ended")
            await until(lambda: len(browser.pictures) > 50 and any(
                mock.opening(x) > 0.5 for _, x in browser.pictures[-5:]))  # fmt: skip
            have = len(browser.pictures)
            await until(lambda: len(browser.pictures) > have + 35)
            (call,) = served.front.rtc._calls.values()
            while not served.counted("la_rtc_rtt_seconds_count"):  # receivers report at times
                await call.look()
                await asyncio.sleep(0.1)
            stats = served.session(told).stats()
        assert served.counted("la_rtc_rtt_seconds_sum") < served.counted("la_rtc_rtt_seconds_count")
        assert served.counted("la_rtc_loss_ratio_count", way="in") > 0
        assert served.counted("la_rtc_loss_ratio_count", way="out") > 0
        assert served.counted("la_av_skew_seconds_count") > 0 and abs(stats["skew_ms"]) < 500
        assert ended["played_ms"] >= 900
        # Whose frames these are; stamps go on as the count in the frames does.
        pictures = [(pts, mock.read(x), mock.opening(x)) for pts, x in browser.pictures]
        assert {tag["session"] for _, tag, _ in pictures} == {mock.tag(told["id"])}
        assert {tag["epoch"] for _, tag, _ in pictures} == {0}
        places = Counter(pts - tag["frame"] * 90_000 // FPS for pts, tag, _ in pictures)
        same = places.most_common(1)[0][1]  # but for pictures that lost a packet
        assert same > 0.9 * len(pictures) or served.session(told).stalls > 0
        # The mouth opens with the frame in which the sound begins.
        frames = {tag["frame"]: opening for _, tag, opening in pictures}
        first = started["at_sample"] // PER_FRAME
        assert all(frames[n] < 0.1 for n in frames if n < first)
        assert any(frames.get(n, 0) > 0.5 for n in (first, first + 1))
        # Sound has no packets of the same time, and is the tone.
        steps = np.diff([pts for pts, _ in browser.sound])
        assert (steps > 0).all() and (steps % 960 == 0).all() and np.median(steps) == 960
        sound = np.concatenate([x for _, x in browser.sound]).astype(float)
        spoken = sound[np.convolve(np.abs(sound), np.ones(480) / 480, "same") > 2000]
        assert len(spoken) / BROWSER > 0.2  # a busy machine loses packets
        piece = spoken[: BROWSER // 2]
        peak = np.argmax(np.abs(np.fft.rfft(piece))) * BROWSER / len(piece)
        assert abs(peak - 400) < 20


@in_loop
async def test_a_call_has_an_address_and_is_over_when_that_is_deleted():
    async with serving() as served, browsing() as browser:
        told = await served.create()
        at = await connected(served, told, browser)
        await until(lambda: len(browser.pictures) > 3)
        session = served.session(told)
        (call,) = session.viewers
        assert at == f"{told['urls']['rtc']}/{call.id}"
        other = await served.http.delete(told["urls"]["rtc"] + "/another")
        assert other.status_code == 404 and other.json()["type"].endswith("no-such-call")
        assert (await served.http.delete(at)).status_code == 204
        assert call.peer.connectionState == "closed" and not session.viewers
        assert (await served.http.delete(at)).status_code == 404
        await until(lambda: browser.peer.connectionState in ("closed", "failed"))
        assert session.state == "ready"  # for a while, so that one may call again
        async with browsing(mic=False) as again:
            await connected(served, told, again)
            await until(lambda: len(again.pictures) > 3)


@in_loop
async def test_who_hangs_up_leaves_the_place_to_others():
    async with serving(grace=0.5) as served:
        async with browsing() as browser:
            told = await served.create()
            await connected(served, told, browser)
            await until(lambda: len(browser.pictures) > 3)
        await until(lambda: served.free == 1)
        assert served.counted("la_session_ends_total", reason="left") == 1
        assert set(peers(served)) <= {"closed"}


@in_loop
async def test_a_call_ends_with_its_session():
    async with serving() as served, browsing() as one, browsing(mic=False) as two:
        told = await served.create()
        await connected(served, told, one)
        await connected(served, told, two, to="whep")
        await until(lambda: len(one.pictures) > 3 and len(two.pictures) > 3)
        deleted = await served.http.delete(told["urls"]["session"])
        assert deleted.status_code == 200 and deleted.json()["stats"]["viewers"] == 2
        await until(lambda: set(peers(served)) == {"closed"})
        await until(lambda: served.free == 1)


@in_loop
async def test_who_watches_a_call_cannot_speak_in_it():
    async with serving(slots=2) as served:
        for to, kind in (("rtc", "viewer_token"), ("whep", "client_token")):
            told = await served.create(live=True)
            async with browsing() as browser:
                await connected(served, told, browser, token=told[kind], to=to)
                await until(lambda browser=browser: len(browser.pictures) > 40)
                assert served.session(told).timeline.came == 0


@in_loop
async def test_candidates_may_come_later():
    async with serving() as served, browsing(mic=False) as browser:
        told = await served.create()
        offer = await browser.offer()
        lines = offer.splitlines(keepends=True)
        late = [x for x in lines if x.startswith(("a=candidate:", "a=end-of-candidates"))]
        early = "".join(x for x in lines if x not in late)
        answer = await ring(served, told, early)
        assert answer.status_code == 201
        await browser.take(answer.text)
        at = answer.headers["location"]
        kind = {"content-type": "application/trickle-ice-sdpfrag"}
        for bad in ("a=candidate:nothing", "a=candidate:", "a=candidate:1 x udp y z w typ host"):
            refused = await served.http.patch(at, content=bad, headers=kind)
            assert refused.status_code == 400
            assert refused.json()["type"].endswith("bad-candidate")
        fragment = "a=mid:0\r\n" + "".join(x for x in late if x.startswith("a=candidate:"))
        sent = await served.http.patch(at, content=fragment, headers=kind)
        assert sent.status_code == 204
        await until(lambda: len(browser.pictures) > 3)


@in_loop
async def test_who_never_connects_holds_no_place(monkeypatch):
    monkeypatch.setattr(rtc, "CONNECTS", 0.5)
    async with serving(grace=1.0) as served, browsing() as browser:
        told = await served.create()
        answer = await ring(served, told, await browser.offer())
        assert answer.status_code == 201
        (call,) = served.session(told).viewers
        await until(lambda: call.peer.connectionState == "closed")
        await until(lambda: served.free == 1)
        assert served.counted("la_session_ends_total", reason="left") == 1


def sockets() -> int:
    """How many this process has open."""
    links = (os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
             if os.path.lexists(f"/proc/self/fd/{name}"))  # fmt: skip
    return sum(link.startswith("socket:") for link in links)


@in_loop
async def test_a_network_that_loses_packets_moves_no_sound_and_ends_no_call():
    """One in twenty both ways, and for a second all of them."""
    before = sockets()
    async with serving(slots=2) as served, browsing(voice=Chirp) as browser:
        told, beside = await served.create(live=True), await served.create()
        session, spared = served.session(told), served.session(beside)
        heard, speak = list[np.ndarray](), session.speak
        session.speak = lambda samples, *more: (heard.append(samples), speak(samples, *more))[1]
        seconds = lambda: sum(map(len, heard)) / RATE
        with contextlib.closing(Lossy(seed=3, share=0.05)) as network:
            offer = [x for x in (await browser.offer()).splitlines(keepends=True)
                     if not x.startswith(("a=candidate", "a=end-of-candidates"))]  # fmt: skip
            answer = await ring(served, told, "".join(offer))
            await browser.take(network.between(answer.text))
            async with joined(served, beside) as line:
                await line.say(tone(30.0))
                await until(lambda: seconds() > 2 and len(browser.pictures) > 20)
                had, stalls = len(line.frames), spared.stalls
                network.out = True
                await asyncio.sleep(1.0)
                network.out = False
                had, stalls = len(line.frames) - had, spared.stalls - stalls
                shown, until_now = session.timeline.played // PER_FRAME, seconds()
                tags = lambda: [mock.read(x) for _, x in browser.pictures[-5:]]
                await until(lambda: any(x["frame"] > shown and x["session"] == mock.tag(told["id"])
                                        for x in tags()))  # fmt: skip
                await until(lambda: seconds() > until_now + 3)
            assert browser.peer.connectionState == "connected" and len(session.viewers) == 1
            assert network.passed > network.lost > 60
            for one in (told, beside):
                await served.http.delete(one["urls"]["session"])
            await until(lambda: set(peers(served)) == {"closed"})
    await until(lambda: sockets() <= before)
    # Sound is where it was said, or silence. Just after a hole decoder and resampler swing in.
    sound = np.concatenate(heard)
    said = Chirp.times(sound)
    lost = np.isnan(said)
    settled = ~(lost | np.roll(lost, 1) | np.roll(lost, 2))
    off = (said - np.arange(len(said)) * PACKET / RATE)[settled]
    assert len(off) > 50 and np.abs(off - np.median(off[:20])).max() < 0.05
    assert np.convolve(lost, np.ones(45), "valid").max() == 45  # when nothing came through
    silent = np.sum(sound == 0) / RATE - 1.0
    assert silent < 0.12 * (len(sound) / RATE - 1.0)
    # Who is beside it notices nothing.
    assert set(np.diff([x.first for x in line.frames])) == {PER_FRAME}
    assert spared.timeline.gaps == 0 and stalls < 0.5 and had > FPS / 2


# ---- what is no call


@in_loop
async def test_what_is_no_offer_is_refused_and_leaves_nothing():
    async with serving() as served, browsing() as browser:
        told = await served.create()
        offer = await browser.offer()
        draw = random.Random(0)
        lines = offer.splitlines(keepends=True)
        bad: list[str | bytes] = [
            "", "v=0", "\r\n" * 99, "{}", draw.randbytes(500), "v=0\r\nm=audio x y z\r\n",
            offer.replace("a=ice-ufrag", "a=nothing"), offer.replace("a=fingerprint", "a=f"),
            "m=video 9 UDP/TLS/RTP/SAVPF 96\r\n" * 50,
        ]  # fmt: skip
        for _ in range(12):  # cut, or with lines lost and doubled
            bad.append(offer[: draw.randrange(len(offer))])
            some = [x for x in lines if draw.random() < 0.8]
            bad.append("".join(x * draw.choice([1, 1, 2]) for x in some))
        tasks, refused = len(asyncio.all_tasks()), 0
        for text in bad:
            answer = await ring(served, told, text)
            if answer.status_code == 201:  # it was an offer still
                assert (await served.http.delete(answer.headers["location"])).status_code == 204
            else:
                assert answer.status_code == 400, answer.text
                assert answer.json()["type"].endswith("bad-offer")
                assert "Traceback" not in answer.text
                refused += 1
        assert refused >= 9
        assert not served.session(told).viewers and set(peers(served)) <= {"closed"}
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        plain = await served.http.post(told["urls"]["rtc"], content=offer)
        assert plain.status_code == 415
        nobody = {"urls": {"rtc": "/v1/sessions/nobody/rtc"}}
        assert (await ring(served, nobody, offer)).status_code == 404
        # after all that it is a session like any other
        await connected(served, told, browser)
        await until(lambda: len(browser.pictures) > 3)


@in_loop
async def test_a_call_without_picture_and_sound_is_refused():
    async with serving() as served:
        told = await served.create()
        peer = RTCPeerConnection(RTCConfiguration([]))
        peer.createDataChannel("chat")
        await peer.setLocalDescription(await peer.createOffer())
        answer = await ring(served, told, peer.localDescription.sdp)
        await peer.close()
        assert answer.status_code == 400 and not served.session(told).viewers


@in_loop
async def test_one_viewer_too_many_is_refused_and_its_call_closed(monkeypatch):
    made: list[Call] = []
    begin = Call.__init__
    monkeypatch.setattr(
        Call, "__init__", lambda self, *args: (made.append(self), begin(self, *args))[1]
    )
    monkeypatch.setattr("serve.session.LINES", 2)
    async with serving() as served:
        told = await served.create()
        answers = []
        for _ in range(3):
            async with browsing(mic=False) as browser:
                answers.append(await ring(served, told, await browser.offer()))
        assert [x.status_code for x in answers] == [201, 201, 429]
        assert answers[2].json()["type"].endswith("too-many-viewers")
        assert made[2].peer.connectionState == "closed"


# ---- servers on the way


@in_loop
async def test_a_server_that_is_silent_holds_up_no_call_and_who_calls_is_told_of_it(monkeypatch):
    known, begin = [], Call.__init__
    monkeypatch.setattr(Call, "__init__", lambda self, *args: (
        known.append(args[2].iceServers), begin(self, *args))[1])  # fmt: skip
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{silent.getsockname()[1]}"
        urls = f"stun:{at}", f"turn:{at}"
        async with serving(ice=urls, turn_secret="north") as served, browsing(mic=False) as browser:
            told, offer = await served.create(), await browser.offer()
            begun = time.monotonic()
            answer = await ring(served, told, offer)
            assert time.monotonic() - begun < 3.5  # aioice alone waits for 5
            await browser.take(answer.text)
            await until(lambda: len(browser.pictures) > 3)
    stun, turn = told["ice_servers"]
    assert [stun, turn["urls"]] == [{"urls": [urls[0]]}, [urls[1]]]
    ((_, ours),) = known
    for text in (turn["username"], ours.username):
        assert re.fullmatch(rf"\d+:{told['id']}", text)
    assert f'<{urls[0]}>; rel="ice-server", <{urls[1]}>;' in answer.headers["link"]
    assert answer.headers["link"].endswith('"; credential-type="password"')
    assert "north" not in answer.headers["link"] + str(told)


# ---- stamps


class Alone:
    """Stands for a session."""

    id = "alone"

    def leave(self, viewer: Any) -> None:
        pass

    class metrics:
        class dropped:
            @staticmethod
            def labels(why: str) -> Any:
                return Alone.metrics.dropped

            @staticmethod
            def inc(count: int) -> None:
                pass


def pair(number: int) -> Shown:
    samples = np.full(PER_FRAME, number + 1, np.int16)
    return Shown(0, number * PER_FRAME, np.zeros((32, 32, 3), np.uint8), samples)


@contextlib.asynccontextmanager
async def alone(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Call, list[float]]]:
    """A call whose clock is a list of one number."""
    clock, loop = [1000.0], asyncio.get_running_loop()
    call = Call(Alone(), True, RTCConfiguration([]))  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "time", lambda: clock[0])
        yield call, clock
    await call.hang_up()


async def taken(call: Call) -> tuple[Any, list[Any]]:
    """The next picture, and its sound."""
    picture, sound = await call._video.recv(), [await call._audio.recv()]
    while sum(x.samples for x in sound) < PER_FRAME:
        sound.append(await call._audio.recv())
    return picture, sound


@pytest.mark.parametrize("seed", range(3))
@in_loop
async def test_stamps_of_picture_and_sound_are_one_count(monkeypatch, seed):
    """However the clock stutters, and wherever the picture stands still."""
    draw = random.Random(seed)
    async with alone(monkeypatch) as (call, clock):
        due, last = clock[0], -1
        for number in range(500):
            late = draw.choice([0] * 15 + [draw.uniform(0, LATE), draw.uniform(0, 3)])
            clock[0] = max(clock[0], due) + late  # as `publish` does it
            due = max(due, clock[0] if clock[0] - due > LATE else due) + 1 / FPS
            call.show(pair(number))
            picture, sound = await taken(call)
            at = picture.pts * picture.time_base
            assert at == sound[0].pts * sound[0].time_base
            assert [x.samples for x in sound] == [PACKET, PACKET]
            assert sound[1].pts == sound[0].pts + PACKET
            assert (sound[0].to_ndarray() == number + 1).all()
            assert at > last and (at * FPS).denominator == 1
            last = at
            begun = clock[0] if not number else begun
            assert -LATE - 2 / FPS < clock[0] - begun - at < (STILL + 2) / FPS


@in_loop
async def test_short_delays_never_add_up(monkeypatch):
    """Each is caught up with; stamps must not run away from the clock."""
    async with alone(monkeypatch) as (call, clock):
        for number in range(500):
            call.show(pair(number))
            picture, _ = await taken(call)
            late = 0.16 if number % 20 == 10 else 0.0  # of its beat
            clock[0] = 1000 + (number + 1) / FPS + late
        assert abs(float(picture.pts * picture.time_base) - 499 / FPS) < 2 / FPS


@in_loop
async def test_after_an_interrupt_nothing_older_waits_for_the_encoder(monkeypatch):
    async with alone(monkeypatch) as (call, clock):
        for number in range(4):
            call.show(pair(number))
            clock[0] += 1 / FPS
        first = await call._audio.recv()  # half of a pair
        call.clear(1)
        call.show(dataclasses.replace(pair(0), epoch=1, samples=np.full(PER_FRAME, 77, np.int16)))
        picture, sound = await taken(call)
        assert all((x.to_ndarray() == 77).all() for x in sound)
        assert picture.pts * picture.time_base == sound[0].pts * sound[0].time_base
        assert sound[0].pts > first.pts


@in_loop
async def test_an_encoder_that_is_late_loses_pairs_and_keeps_their_places(monkeypatch):
    async with alone(monkeypatch) as (call, clock):
        for number in range(50):
            call.show(pair(number))
            clock[0] += 1 / FPS
        picture, sound = await taken(call)
        assert picture.pts == 42 * 90_000 // FPS and sound[0].pts == 42 * PER_FRAME
        assert call._video.dropped == 42


@in_loop
async def test_each_packet_of_sound_has_a_time_of_its_own_and_is_as_loud_as_it_was():
    """As aiortc encodes them: packets of one frame would share their stamp, and mono is quieter."""
    out, encoder, decoder = Out("audio"), OpusEncoder(), OpusDecoder()
    stamps, sound = [], []
    for number in range(25):
        samples = tone(1.0)[number * PER_FRAME :][:PER_FRAME]
        out.put(dataclasses.replace(pair(number), samples=samples), number * PER_FRAME)
        for _ in range(2):
            packets, stamp = encoder.encode(await out.recv())
            assert len(packets) <= 1
            stamps += [stamp] * len(packets)
            for packet in packets:
                for frame in decoder.decode(JitterFrame(packet, stamp)):
                    sound.append(frame.to_ndarray().reshape(-1, 2)[:, 0])
    assert (np.diff(stamps) == 960).all() and len(stamps) >= 48
    loud = np.sqrt(np.mean(np.concatenate(sound)[9600:38_400].astype(float) ** 2))
    assert loud == pytest.approx(9000 / np.sqrt(2), rel=0.1)


# ---- sound by its time


def heard(pts: int, samples: np.ndarray, rate: int = BROWSER) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(np.repeat(samples, 2)[None], "s16", "stereo")
    frame.sample_rate, frame.pts, frame.time_base = rate, pts, Fraction(1, rate)
    return frame


@pytest.mark.parametrize("seed", range(4))
def test_sound_is_put_where_its_time_is_whatever_is_lost_or_comes_twice(seed):
    draw, placed = random.Random(seed), Placed()
    lost, pieces, last = np.zeros(500, bool), [], 0
    begin = draw.choice([0, 12_345, -960])
    samples = np.full(960, 8000, np.int16)
    for number in range(500):
        if number and draw.random() < 0.1:
            lost[number] = True
            continue
        pieces.append(placed.add(heard(begin + 960 * number, samples)))
        last = number
        if draw.random() < 0.1:  # again, or something from before
            again = draw.randrange(max(0, number - 5), number + 1)
            assert not len(placed.add(heard(begin + 960 * again, samples)))
    sound = np.concatenate(pieces)
    assert abs(len(sound) - 320 * (last + 1)) <= 32  # the resampler holds some
    assert placed.filled == 320 * lost[:last].sum()
    middle = 160 + 320 * np.arange(last)
    np.testing.assert_array_equal(np.abs(sound[middle]) < 100, lost[:last])


def test_packets_go_on_at_once_but_for_those_of_before():
    onward, went = Onward(), []
    sent = [65_533, 65_534, 65_534, 65_535, 1, 0, 2, 65_535, 7, 40_000, 40_001, 500, 499]
    for number in sent:  # with a new beginning far from the old one, twice
        packet = RtpPacket(sequence_number=number, timestamp=960 * number)
        packet._data = b"sound"  # type: ignore[attr-defined]
        asks_for_a_picture, frame = onward.add(packet)
        went += [number] if frame else []
        assert not asks_for_a_picture
        assert frame is None or (frame.data, frame.timestamp) == (b"sound", 960 * number)
    assert went == [65_533, 65_534, 65_535, 1, 2, 7, 40_000, 40_001, 500]


def test_a_hole_of_minutes_is_not_filled_with_minutes():
    placed = Placed()
    placed.add(heard(0, np.ones(960, np.int16)))
    sound = placed.add(heard(BROWSER * 600, np.ones(960, np.int16)))
    assert len(sound) <= HOLE * RATE + 400
    assert len(placed.add(heard(BROWSER * 600 + 960, np.ones(960, np.int16)))) <= 400


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100, 48_000])
def test_sound_of_any_rate_comes_out_as_long_as_it_went_in(rate):
    placed, count = Placed(), rate // 50
    pieces = [placed.add(heard(n * count, np.full(count, 500, np.int16), rate)) for n in range(100)]
    assert abs(sum(map(len, pieces)) - 2 * RATE * (100 * count) / (2 * rate)) <= 40


# ---- ports


@in_loop
async def test_calls_keep_to_their_ports():
    first = free_port()
    first = min(first, 65_000)
    ports = range(first, first + 60)
    async with serving(slots=2, udp=f"{ports.start}-{ports.stop - 1}") as served:
        told = await served.create()
        for _ in range(2):
            async with browsing(mic=False) as browser:
                answer = await ring(served, told, await browser.offer())
                found = re.findall(r"a=candidate:\S+ \d+ udp \d+ \S+ (\d+) typ host", answer.text)
                assert found and all(int(port) in ports for port in found)
                await browser.take(answer.text)
                await until(lambda browser=browser: len(browser.pictures) > 3)


@in_loop
async def test_when_all_ports_are_taken_that_is_said():
    loop, first = asyncio.get_running_loop(), min(free_port(), 65_000)
    rtc._keep_to(loop, range(first, first + 3))
    with contextlib.ExitStack() as stack:
        found = []
        with pytest.raises(OSError, match=f"all UDP ports of {first}-{first + 2} are taken"):
            for _ in range(4):
                transport, _ = await loop.create_datagram_endpoint(
                    asyncio.DatagramProtocol, local_addr=("127.0.0.1", 0)
                )
                stack.callback(transport.close)
                found.append(transport.get_extra_info("sockname")[1])
        assert len(set(found)) == len(found) >= 2
    await asyncio.sleep(0)


@pytest.mark.parametrize("text", ["1", "2-1", "a-b", "0-9", "1-65536", "-", "1-2-3"])
def test_ports_that_are_none_are_refused(text):
    with pytest.raises(LiveAvatarError, match="must be a range of ports"):
        rtc._range(text)


def test_the_time_that_a_test_may_take_is_more_than_a_call_may():
    assert rtc.CONNECTS < LONG
