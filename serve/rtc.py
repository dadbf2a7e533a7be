"""A session over WebRTC: a browser's microphone in, the avatar out. Signalling has the shape of
WHIP (RFC 9725): the offer is posted, the answer comes back, the call has an address of its own.

Sound that comes in is placed by its time stamps, and what the network lost is silence: counting
packets would put lips off by seconds. What goes out has stamps from the one count of samples, so
picture and sound cannot drift apart.
"""

import asyncio
import collections
import contextlib
import dataclasses
import logging
import secrets
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import av
import numpy as np
from aiortc import (
    MediaStreamError,
    MediaStreamTrack,
    RTCConfiguration,
    RTCIceServer,
    RTCPeerConnection,
    RTCSessionDescription,
)
from aiortc.jitterbuffer import MAX_MISORDER, JitterFrame
from aiortc.sdp import SessionDescription, candidate_from_sdp
from fastapi import Depends, FastAPI, Request, Response

from liveavatar_jax.types import LiveAvatarError
from serve import ice
from serve.auth import Grant
from serve.clock import Shown
from serve.pictures import enlarged
from serve.session import Problem, Session
from serve.sessions import Sessions
from serve.wire import FPS, PER_FRAME, RATE

if TYPE_CHECKING:
    from serve.settings import Settings

log = logging.getLogger("serve.rtc")

SDP = "application/sdp"
WAITS = 8  # pairs that may wait for the encoder
PACKET = RATE // 50  # samples of a packet of sound; of a longer frame all would have one stamp
STILL = 6  # frames by which stamps may be behind the clock; more is a picture that stood still
CONNECTS = 20.0  # seconds that a call may take until it is connected
HOLE = 2.0  # seconds of lost sound that are filled with silence, at most
LOOKS = 5.0  # seconds between two looks at how calls fare
PARTS, MANY = 4, 200  # of an offer: its media, each of which may open sockets; and candidates


class Out(MediaStreamTrack):
    """Pictures or sound of a call."""

    def __init__(self, kind: str):
        self.kind = kind
        super().__init__()
        self._waiting: collections.deque[tuple[Shown, int]] = collections.deque()
        self._more = asyncio.Event()
        self.dropped = 0
        self.taken: tuple[int, float] = 0, 0.0  # the place of what was sent last, and when

    def put(self, shown: Shown, at: int) -> None:
        """`at`: samples since the call began."""
        if len(self._waiting) >= WAITS:
            self._waiting.popleft()
            self.dropped += 1
        self._waiting.append((shown, at))
        self._more.set()

    def clear(self) -> None:
        self._waiting.clear()

    async def recv(self) -> Any:
        while not self._waiting:
            if self.readyState != "live":
                raise MediaStreamError
            self._more.clear()
            await self._more.wait()
        shown, at = self._waiting.popleft()
        self.taken = at, asyncio.get_running_loop().time()
        if self.kind == "audio":
            if len(shown.samples) > PACKET:
                rest = dataclasses.replace(shown, samples=shown.samples[PACKET:])
                self._waiting.appendleft((rest, at + PACKET))
            both = np.repeat(shown.samples[:PACKET], 2)  # of mono, aiortc takes 3 dB
            frame = av.AudioFrame.from_ndarray(both[None], "s16", "stereo")
            frame.sample_rate, frame.pts, frame.time_base = RATE, at, Fraction(1, RATE)
            return frame
        frame = av.VideoFrame.from_ndarray(enlarged(shown.frame), "rgb24")
        frame.pts, frame.time_base = at * (90_000 // FPS) // PER_FRAME, Fraction(1, 90_000)
        return frame

    def stop(self) -> None:
        super().stop()
        self._more.set()


class Onward:
    """Packets of sound as they come, but for those that come twice or were overtaken. It stands in
    for aiortc's buffer, which waits for four in a row and, once one was lost, stays 0.3 s behind
    and throws away several with each; `Placed` needs no order but this."""

    def __init__(self) -> None:
        self._last: int | None = None

    def add(self, packet: Any) -> tuple[bool, JitterFrame | None]:
        number = packet.sequence_number
        if self._last is not None and (self._last - number) % 65536 < MAX_MISORDER:
            return False, None
        self._last = number
        return False, JitterFrame(packet._data, packet.timestamp)


class Placed:
    """Sound by its time stamps, as 16 kHz mono without holes."""

    def __init__(self) -> None:
        self._resample = av.AudioResampler("s16", "mono", RATE)
        self._next: int | None = None  # the stamp that should come, in its own rate
        self.filled = 0  # samples of silence

    def add(self, frame: Any) -> np.ndarray:
        hole = 0
        if self._next is not None and frame.pts > self._next:
            missing = (frame.pts - self._next) / frame.sample_rate
            hole = round(min(missing, HOLE) * RATE)
        late = self._next is not None and frame.pts < self._next
        if late:  # it came twice, or after its place was filled
            return np.zeros(0, np.int16)
        self._next = frame.pts + frame.samples
        pieces = [np.asarray(x.to_ndarray()).reshape(-1) for x in self._resample.resample(frame)]
        self.filled += hole
        return np.concatenate([np.zeros(hole, np.int16), *pieces])


class Call:
    """A `Viewer` behind a peer connection."""

    watching = True

    def __init__(self, session: Session, speaks: bool, servers: RTCConfiguration):
        self.id, self._session, self.speaks = secrets.token_urlsafe(9), session, speaks
        self.peer = RTCPeerConnection(servers)
        self._video, self._audio = Out("video"), Out("audio")
        self._at, self._begun = 0, 0.0
        self._candidates = 0  # that came
        self._listening: asyncio.Task | None = None
        self._connecting: asyncio.TimerHandle | None = None
        self._gone = False
        self.peer.on("connectionstatechange", self._changed)
        self.peer.on("track", self._track)

    # ---- a Viewer

    def show(self, shown: Shown) -> None:
        """Its place is the next one, or later by as much as the picture stood still."""
        now = asyncio.get_running_loop().time()
        if not self._begun:
            self._begun = now
        else:
            behind = int((now - self._begun) * FPS) - self._at // PER_FRAME - 1
            self._at += (1 + (behind if behind > STILL else 0)) * PER_FRAME
        for track in (self._video, self._audio):
            track.put(shown, self._at)
        self._session.skew = self.skew

    @property
    def skew(self) -> float:
        """Seconds by which pictures go to the encoder after their sound."""
        (seen, then), (heard, when) = self._video.taken, self._audio.taken
        return (then - when) - (seen - heard) / RATE

    def tell(self, event: dict[str, Any]) -> None:
        pass  # events come over the WebSocket

    def clear(self, epoch: int) -> None:
        self._video.clear()
        self._audio.clear()

    def close(self, reason: str) -> None:
        self._later = asyncio.ensure_future(self.hang_up())

    # ---- the call

    async def answer(self, offer: str) -> str:
        """Raises Problem for what is no offer, or wants nothing that is here."""
        try:
            self._count(offer)
            _check(offer)
            async with asyncio.timeout(CONNECTS):
                await self._negotiate(offer)
        except Exception as error:  # aiortc raises anything on what it cannot parse
            await self.hang_up()
            detail = f"this is no offer of a call that can be had here ({type(error).__name__})"
            raise Problem(400, "bad-offer", detail) from None
        try:
            self._session.join(self)
        except Problem:
            await self.hang_up()
            raise
        self._connecting = asyncio.get_running_loop().call_later(CONNECTS, self._connected)
        return self.peer.localDescription.sdp

    async def _negotiate(self, offer: str) -> None:
        await self.peer.setRemoteDescription(RTCSessionDescription(offer, "offer"))
        if not self.peer.getTransceivers():
            raise ValueError("neither picture nor sound")
        ice.hurry(self.peer)
        for transceiver in self.peer.getTransceivers():
            if transceiver.kind == "video":
                transceiver.sender.replaceTrack(self._video)
                transceiver.direction = "sendonly"
            else:
                transceiver.sender.replaceTrack(self._audio)
                transceiver.direction = "sendrecv" if self.speaks else "sendonly"
                vars(transceiver.receiver)["_RTCRtpReceiver__jitter_buffer"] = Onward()
        await self.peer.setLocalDescription(await self.peer.createAnswer())

    async def candidates(self, fragment: str) -> None:
        """Trickled candidates (application/trickle-ice-sdpfrag). Raises Problem."""
        mid = "0"
        try:
            self._count(fragment)
            async with asyncio.timeout(CONNECTS):  # names of machines are asked for, one by one
                for line in fragment.splitlines():
                    if line.startswith("a=mid:"):
                        mid = line[6:].strip()
                    elif line.startswith("a=candidate:"):
                        candidate = candidate_from_sdp(line[12:].strip())
                        candidate.sdpMid = mid
                        await self.peer.addIceCandidate(candidate)
        except Exception as error:  # as with an offer
            detail = f"this is no candidate that can be had here ({type(error).__name__})"
            raise Problem(400, "bad-candidate", detail) from None

    def _count(self, text: str) -> None:
        """All that ever come are kept, and tried one after another."""
        self._candidates += text.count("a=candidate:")
        if self._candidates > MANY:
            raise ValueError(f"more than {MANY} candidates")

    async def hang_up(self) -> None:
        """However it ends: nothing of it is left."""
        if self._gone:
            return
        self._gone = True
        self._session.leave(self)
        self._session.metrics.dropped.labels("slow").inc(self._video.dropped)
        for track in (self._video, self._audio):
            track.stop()
        for waits in (self._listening, self._connecting):
            if waits is not None:
                waits.cancel()
        await self.peer.close()

    def _connected(self) -> None:
        """By now, or never: who does not answer must not hold a place."""
        if self.peer.connectionState != "connected":
            self.close("left")

    async def look(self) -> None:
        """How it fares, for the metrics."""
        if self.peer.connectionState != "connected":
            return
        metrics = self._session.metrics
        metrics.skew.observe(self.skew)
        for told in (await self.peer.getStats()).values():
            if told.type == "remote-inbound-rtp" and told.kind == "video":
                metrics.loss.labels("out").observe(told.fractionLost)
                if told.roundTripTime is not None:
                    metrics.rtt.observe(told.roundTripTime)
            elif told.type == "inbound-rtp" and (sent := told.packetsReceived + told.packetsLost):
                metrics.loss.labels("in").observe(max(0, told.packetsLost) / sent)

    async def _changed(self) -> None:
        if self.peer.connectionState in ("failed", "closed", "disconnected"):
            await self.hang_up()

    def _track(self, track: MediaStreamTrack) -> None:
        if track.kind == "audio" and self.speaks:
            self._listening = asyncio.ensure_future(self._listen(track))

    async def _listen(self, track: MediaStreamTrack) -> None:
        placed = Placed()
        with contextlib.suppress(MediaStreamError):
            while True:
                filled, samples = placed.filled, placed.add(await track.recv())
                self._session.metrics.gaps.inc((placed.filled - filled) / RATE)
                if len(samples):
                    with contextlib.suppress(Problem):  # too much waits: the oldest of it matters
                        self._session.speak(samples)


def _check(offer: str) -> None:
    """Raises anything, before aiortc has begun what it could not take back."""
    said = SessionDescription.parse(offer)
    if len(said.media) > PARTS:
        raise ValueError("too many media")
    known = [media.rtp.muxId for media in said.media]
    for group in said.group:
        if group.semantic == "BUNDLE" and group.items and group.items[0] not in known:
            raise ValueError("a bundle of nothing")


class Calls:
    """All calls of a server."""

    def __init__(self, settings: "Settings"):
        self._settings = settings
        self._calls: dict[str, Call] = {}
        self._ports = _range(settings.udp)
        self._bound = False

    def servers(self, session: Session) -> list[dict[str, Any]]:
        """As a browser wants them."""
        return ice.servers(self._settings, session.id)

    async def call(self, session: Session, offer: str, speaks: bool) -> tuple[Call, str]:
        if self._ports and not self._bound:
            _keep_to(asyncio.get_running_loop(), self._ports)
            self._bound = True
        servers = [RTCIceServer(**server) for server in self.servers(session)]
        call = Call(session, speaks, RTCConfiguration(servers))
        answer = await call.answer(offer)
        self._calls = {name: one for name, one in self._calls.items() if not one._gone}
        self._calls[call.id] = call
        return call, answer

    def get(self, name: str, session: str) -> Call:
        call = self._calls.get(name)
        if call is None or call._gone or call._session.id != session:
            raise Problem(404, "no-such-call", "there is no call of this id any more")
        return call

    async def run(self) -> None:
        """Looks at all of them, for ever."""
        while True:
            await asyncio.sleep(LOOKS)
            for call in list(self._calls.values()):
                try:
                    await call.look()
                except Exception:  # as of a call that ends meanwhile; no look is worth a server
                    log.debug("a call could not be looked at", exc_info=True)

    async def close(self) -> None:
        await asyncio.gather(*(call.hang_up() for call in self._calls.values()))


def routes(
    app: FastAPI, calls: Calls, sessions: Sessions, caller: Callable[..., Grant],
    calm: Callable[[Request, str], None],
) -> None:  # fmt: skip
    """calm: raises Problem where an address asks too often."""
    Caller = Annotated[Grant, Depends(caller)]
    at = "/v1/sessions/{session}/rtc"

    async def ring(session: str, request: Request, speaks: bool) -> Response:
        calm(request, "calls")
        if request.headers.get("content-type", "").split(";")[0] != SDP:
            raise Problem(415, "bad-type", f"send the offer as {SDP}")
        offer = (await request.body())[:200_000].decode("utf-8", "replace")
        found = sessions.get(session)
        call, answer = await calls.call(found, offer, speaks)
        headers = {"location": f"/v1/sessions/{session}/rtc/{call.id}", "etag": f'"{call.id}"'}
        if links := ice.links(calls.servers(found)):
            headers["link"] = links
        return Response(answer, 201, headers, media_type=SDP)

    @app.post(at, status_code=201)
    async def whip(session: str, request: Request, grant: Caller) -> Response:
        """Speaks and watches; an offer in, an answer out."""
        return await ring(session, request, grant.role != "viewer")

    @app.post("/v1/sessions/{session}/whep", status_code=201)
    async def whep(session: str, request: Request, grant: Caller) -> Response:
        """Watches only."""
        return await ring(session, request, False)

    @app.patch(at + "/{call}", status_code=204)
    async def trickle(session: str, call: str, request: Request, grant: Caller) -> None:
        fragment = (await request.body())[:20_000].decode("utf-8", "replace")
        await calls.get(call, session).candidates(fragment)

    @app.delete(at + "/{call}", status_code=204)
    async def hang_up(session: str, call: str, grant: Caller) -> None:
        await calls.get(call, session).hang_up()


# ---- ports


def _range(text: str) -> range | None:
    if not text:
        return None
    first, _, last = text.partition("-")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) < 65536):
        raise LiveAvatarError(f"udp = {text!r} must be a range of ports, as 50000-50099")
    return range(int(first), int(last) + 1)


def _keep_to(loop: Any, ports: range) -> None:
    """Datagram sockets that ask for any port get one of these: aioice has no setting for it."""
    make, turn = loop.create_datagram_endpoint, [0]

    async def endpoint(factory: Any, local_addr: Any = None, **more: Any) -> Any:
        if local_addr is None or local_addr[1] != 0:
            return await make(factory, local_addr=local_addr, **more)
        for _ in ports:
            port = ports[turn[0] % len(ports)]
            turn[0] += 1
            with contextlib.suppress(OSError):
                return await make(factory, local_addr=(local_addr[0], port), **more)
        raise OSError(f"all UDP ports of {ports.start}-{ports.stop - 1} are taken")

    loop.create_datagram_endpoint = endpoint
