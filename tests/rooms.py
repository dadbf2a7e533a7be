"""What stands in for a LiveKit server: the two ends of a room, and the sources of its tracks."""

import asyncio
from types import SimpleNamespace

import numpy as np
from livekit import rtc

LOUD = 900  # what is louder is speech; all sound here is speech or silence


class Went:
    """What tracks took: pictures as (epoch, number), sound as samples."""

    def __init__(self):
        self.items, self.queued = [], 0.0

    @property
    def sound(self) -> np.ndarray:
        return np.concatenate([x for x in self.items if not isinstance(x, tuple)] or [[]])

    @property
    def spoken(self) -> int:
        return int(np.sum(np.abs(self.sound) > LOUD))


class Source:
    """Of a track, as rtc.AudioSource and rtc.VideoSource."""

    def __init__(self, went: Went):
        self._went = went

    @property
    def queued_duration(self) -> float:
        return self._went.queued

    def clear_queue(self):
        pass

    def capture_frame(self, frame):
        if isinstance(frame, rtc.VideoFrame):
            epoch, high, low = frame.data[:3]
            self._went.items.append((epoch, 256 * high + low))
            return None
        if frame.samples_per_channel:
            self._went.items.append(np.array(frame.data))
        return asyncio.sleep(0)

    async def aclose(self):
        pass


def sources(monkeypatch) -> Went:
    """Sources and tracks that need no server, and what they take."""
    went = Went()
    for name in ("AudioSource", "VideoSource"):
        monkeypatch.setattr(rtc, name, lambda *_, **__: Source(went))
    audio = SimpleNamespace(create_audio_track=lambda *_: rtc.TrackKind.KIND_AUDIO)
    video = SimpleNamespace(create_video_track=lambda *_: rtc.TrackKind.KIND_VIDEO)
    monkeypatch.setattr(rtc, "LocalAudioTrack", audio)
    monkeypatch.setattr(rtc, "LocalVideoTrack", video)
    return went


class Stream:
    """A byte stream, both ends of it."""

    def __init__(self, attributes):
        self.info = SimpleNamespace(attributes=attributes, stream_id="s")
        self._bytes = asyncio.Queue()

    async def write(self, data):
        self._bytes.put_nowait(data)

    async def aclose(self):
        self._bytes.put_nowait(None)

    def __aiter__(self):
        return self

    async def __anext__(self):
        data = await self._bytes.get()
        if data is None:
            raise StopAsyncIteration
        return data


class Participant:
    kind = rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
    state = rtc.ParticipantState.PARTICIPANT_STATE_ACTIVE

    def __init__(self, identity, room, attributes):
        self.identity, self._room, self.attributes = identity, room, attributes
        self.track_publications, self._rpc_handlers, self.called = {}, {}, []

    def register_rpc_method(self, method, handler):
        self._rpc_handlers[method] = handler

    async def perform_rpc(self, *, destination_identity, method, payload):
        await asyncio.sleep(0.005)
        self.called.append((method, payload))
        other = self._room.remote_participants[destination_identity]
        return other._rpc_handlers[method](rtc.RpcInvocationData("1", self.identity, payload, 5.0))

    async def stream_bytes(self, *, name, topic, destination_identities, attributes):
        stream = Stream(attributes)
        self._room.other.handlers[topic](stream, self.identity)
        return stream

    async def publish_track(self, kind, options):
        async def wait_for_subscription():
            pass

        publication = SimpleNamespace(kind=kind, wait_for_subscription=wait_for_subscription)
        self.track_publications[kind] = publication
        self._room.other.emit("track_published", publication, self)
        return publication


class Room(rtc.EventEmitter):
    """One end of a room of two."""

    name = "room"

    def __init__(self, identity, **attributes):
        super().__init__()
        self.local_participant = Participant(identity, self, attributes)
        self.handlers, self.remote_participants, self.there = {}, {}, True

    def meet(self, other):
        self.other, other.other = other, self
        for one, two in ((self, other), (other, self)):
            one.remote_participants = {two.local_participant.identity: two.local_participant}
        return self

    def isconnected(self):
        return self.there

    async def connect(self, url, token, options):
        if token == "bad":
            raise rtc.ConnectError("not with this token")

    async def disconnect(self):
        if self.there:
            self.there = False
            self.emit("disconnected")
            self.other.emit("participant_disconnected", self.local_participant)

    def register_byte_stream_handler(self, topic, handler):
        self.handlers[topic] = handler
