"""An avatar in LiveKit rooms, for the voice agents of livekit-agents.

The agent's speech comes as byte streams (`lk.audio_stream`), one a segment; it interrupts by the
call `lk.clear_buffer`, and is told `lk.playback_started` and `lk.playback_finished`. Its side of it
is `AvatarSession`, of `serve.agent`.
"""

import asyncio
import collections
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import soxr

from liveavatar_jax.types import LiveAvatarError
from serve.agent import BEHALF, AvatarSession
from serve.clock import Shown
from serve.pictures import enlarged
from serve.session import Problem, Session
from serve.wire import FPS, PER_FRAME, RATE

try:
    from livekit import rtc
    from livekit.agents.voice import avatar
except ImportError:
    raise LiveAvatarError("rooms need livekit-agents; install the extra livekit") from None

__all__ = ["AvatarGenerator", "AvatarSession", "Runner", "join"]

log = logging.getLogger("serve.livekit")

LAG = 2  # pairs that wait, above which those in which nobody speaks are dropped
WAITS = FPS  # pairs that wait at most; of older ones only the count goes on
QUEUE = 200  # milliseconds of sound that the track takes ahead
SLACK = 0.08  # seconds of it, above which silence is dropped
JOINS = 15.0  # seconds that joining a room may take
FAREWELL = 0.5  # seconds for the last messages to the agent
NOTHING = np.zeros(0, np.int16)

leaving: set[asyncio.Task[None]] = set()  # rooms that were given up


class Sound(rtc.AudioFrame):
    """Sound of a frame. Its `duration` is that of the speech in it, without the silence: runners
    add durations up to the position which they report."""

    def __init__(self, samples: np.ndarray, spoken: int):
        super().__init__(samples.tobytes(), RATE, 1, len(samples))
        self.spoken = spoken

    @property
    def duration(self) -> float:
        return self.spoken / RATE


class Ended(avatar.AudioSegmentEnd):
    """A segment is over, with so many seconds of it shown."""

    def __init__(self, position: float, interrupted: bool):
        self.position, self.interrupted = position, interrupted


class AvatarGenerator(avatar.VideoGenerator):
    """A session as livekit-agents has it, and a `Viewer` of the session. Each picture is followed
    by its sound, silence too. drop: forgets what was taken and is not played, and says how many
    seconds of sound that was. elsewhere: speech comes to the session another way."""

    speaks = True

    def __init__(
        self, session: Session, drop: Callable[[], float] = lambda: 0.0, elsewhere: bool = False
    ):
        if session.timeline.live or session.timeline.idle != "generate":
            raise Problem(400, "bad-input", "in a room, live is false and idle is generate")
        self.watching = False  # until somebody takes what is shown
        self._session, self._drop, self._elsewhere = session, drop, elsewhere
        self._rate, self._resample = 0, None
        self._open = False  # whether there is a segment that has not come to its end
        self._deaf = False  # whether the rest of it is not wanted
        self._said: collections.deque[np.ndarray | None] = collections.deque()  # and not shown;
        # None is the end of a segment
        self._speaking = False
        # Pairs, with the count of speech in each; None where a segment ends, more counts after it.
        self._out: collections.deque[tuple[Shown | None, list[Any]]] = collections.deque()
        self._more, self.closed = asyncio.Event(), asyncio.Event()
        self._position = 0  # samples of the segment under way that were taken
        session.join(self)

    # ---- a VideoGenerator

    async def push_audio(self, frame: rtc.AudioFrame | avatar.AudioSegmentEnd) -> None:
        """Waits while much of what was said is not shown yet."""
        timeline = self._session.timeline
        epoch = timeline.epoch
        while timeline.waiting > timeline.limit // 2 and not self.closed.is_set():
            await asyncio.sleep(0.1)
        if isinstance(frame, avatar.AudioSegmentEnd):
            ends, self._open, self._deaf = self._open, False, False
            if ends and not self.closed.is_set():
                self._convert(0)
                self._session.end()
                if self._said:
                    self._said.append(None)
                else:  # all of it was shown before the end was known
                    self._put(None, [None])
        elif not self._deaf and not self.closed.is_set() and epoch == timeline.epoch:
            self._open = True
            if frame.sample_rate != self._rate:
                self._convert(frame.sample_rate)
            size = frame.num_channels * frame.samples_per_channel
            samples = np.frombuffer(frame.data, np.int16, size).reshape(-1, frame.num_channels)
            mono = samples[:, 0].copy() if samples.shape[1] == 1 else samples.mean(1)
            mono = mono.round().astype(np.int16)
            self._say(mono if self._resample is None else self._resample.resample_chunk(mono))

    def clear_buffer(self) -> None:
        """An interrupt by a runner that reports the position itself."""
        self._open = False
        self._said.clear()
        for _, marks in self._out:
            marks.clear()
        self.interrupt()

    def __aiter__(self) -> AsyncIterator[rtc.VideoFrame | rtc.AudioFrame | avatar.AudioSegmentEnd]:
        return self._items()

    async def _items(self) -> AsyncIterator[Any]:
        self.watching = True
        while True:
            while not self._out:
                if self.closed.is_set():
                    return
                self._more.clear()
                await self._more.wait()
            shown, marks = pair = self._out[0]  # it stays there: who clears it clears its marks
            samples = NOTHING if shown is None else shown.samples
            if shown is not None:
                yield _picture(shown.frame)
            while marks:
                mark = marks.pop(0)
                if not isinstance(mark, int):
                    position, self._position = self._position / RATE, 0
                    yield mark or Ended(position, False)
                elif mark or len(samples):
                    self._position += mark
                    yield Sound(samples, mark)
                    samples = NOTHING
            if self._out and self._out[0] is pair:
                self._out.popleft()

    # ---- a Viewer

    def show(self, shown: Shown) -> None:
        begun = 0 if self._speaking else PER_FRAME
        for kind, fields in shown.events:
            self._speaking = kind == "speech.started"
            if self._speaking:
                begun = min(begun, max(0, fields["at_sample"] - shown.first))
        elsewhere: list[Any] = [PER_FRAME - begun]
        marks = elsewhere if self._elsewhere else self._spoken(shown.samples, begun)
        if len(self._out) < LAG or marks != [0]:
            self._put(shown, marks)

    def tell(self, event: dict[str, Any]) -> None:
        pass  # what there is to tell comes with the frames

    def clear(self, epoch: int) -> None:
        """Whoever interrupted, each segment that was heard is over. The rest of the last one is
        still to come, and not wanted."""
        unheard = self._drop()
        pending = [mark for _, marks in self._out for mark in marks] + list(self._said)
        marks: list[Any] = [mark for mark in pending if isinstance(mark, Ended)]
        for _ in range(sum(mark is None for mark in pending) + self._open):
            position, self._position = self._position / RATE - unheard, 0
            marks.append(Ended(max(0.0, position), True))
        for _, old in self._out:
            old.clear()
        self._out.clear()
        self._said.clear()
        self._deaf, self._open, self._speaking, self._position = self._open, False, False, 0
        self._rate, self._resample = 0, None
        if marks:
            self._put(None, marks)

    def close(self, reason: str) -> None:
        self.clear(self._session.timeline.epoch)
        self.closed.set()
        self._more.set()

    # ---- of its own

    def interrupt(self) -> None:
        """By the agent, which sends nothing more of what it interrupts. Iteration says what became
        of each segment."""
        with contextlib.suppress(Problem):  # so many that one more would change nothing
            self._session.interrupt()
        self._deaf = False

    def leave(self) -> None:
        self._session.leave(self)
        self.close("left")

    def _say(self, samples: np.ndarray) -> None:
        if len(samples):
            self._session.speak(samples)
            self._said.append(samples)

    def _convert(self, rate: int) -> None:
        """From another rate on, after what is left of the old one."""
        if self._resample is not None:
            self._say(self._resample.resample_chunk(NOTHING, last=True))
        convert = rate not in (0, RATE)
        self._resample = soxr.ResampleStream(rate, RATE, 1, "int16") if convert else None
        self._rate = rate

    def _spoken(self, samples: np.ndarray, at: int) -> list[int | None]:
        """How much of what was said is in the samples from `at` on, and None at each end. It comes
        in its order, but silence may be between, where it came late."""
        marks: list[int | None] = [0]
        while self._said:
            piece = self._said.popleft()
            if piece is None:
                marks += [None, 0]
                continue
            run = min(len(piece), len(samples) - at)
            same = piece[:run] == samples[at : at + run]
            run = run if same.all() else int(same.argmin())
            marks[-1] += run  # type: ignore[operator]
            at += run
            if run < len(piece):
                self._said.appendleft(piece[run:])
                there = np.flatnonzero(samples[at:] == piece[run])
                if not len(there):
                    break
                at += int(there[0])
        return marks

    def _put(self, shown: Shown | None, marks: list[Any]) -> None:
        self._out.append((shown, marks))
        if len(self._out) > WAITS:
            _, late = self._out.popleft()
            self._out[0][1][:0] = [mark for mark in late if mark != 0]
            late.clear()
        self._more.set()


def _picture(frame: np.ndarray) -> rtc.VideoFrame:
    frame = enlarged(frame)
    rows, columns, _ = frame.shape
    return rtc.VideoFrame(columns, rows, rtc.VideoBufferType.RGB24, frame.tobytes())


# ---- in a room


class Elsewhere(avatar.AudioReceiver):
    """Of a session whose speech comes another way: there is nothing to hear, and nobody to tell."""

    def notify_playback_started(self) -> None:
        pass

    def notify_playback_finished(self, playback_position: float, interrupted: bool) -> None:
        pass

    async def __aiter__(self) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield


class Runner:
    """A session in a room. AvatarRunner of livekit-agents would pace the pictures, which have a
    clock already, by a second one, and leave the sound to a third."""

    def __init__(self, session: Session, room: rtc.Room, receiver: avatar.AudioReceiver):
        self._room, self._receiver = room, receiver
        elsewhere = isinstance(receiver, Elsewhere)
        self._generator = AvatarGenerator(session, self._drop, elsewhere)
        self._audio = rtc.AudioSource(RATE, 1, queue_size_ms=QUEUE)
        self._video = rtc.VideoSource(session.ready.width, session.ready.height)
        self._begun, self._gone = asyncio.Event(), asyncio.Event()
        room.on("disconnected", self._gone.set)
        room.on("participant_disconnected", self._left)

    async def run(self) -> None:
        """Until the session ends, or the agent or the room is gone."""
        ends = (self._gone.wait(), self._generator.closed.wait())  # also before anybody listens
        jobs = [asyncio.create_task(x) for x in (self._show(), self._hear(), *ends)]
        try:
            done, _ = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            for job in done if not self._gone.is_set() else ():
                job.result()
        except Exception:
            log.exception("a room failed")
        finally:
            self._generator.leave()
            for job in jobs[1:]:
                job.cancel()
            await asyncio.wait(jobs, timeout=FAREWELL)  # what ended is told
            jobs[0].cancel()
            await asyncio.gather(*jobs, return_exceptions=True)
            for part in (self._receiver.aclose(), self._audio.aclose(), self._video.aclose(),
                         self._room.disconnect()):  # fmt: skip
                with contextlib.suppress(Exception):
                    await part

    async def _show(self) -> None:
        await self._receiver.start()
        self._receiver.on("clear_buffer", self._generator.interrupt)
        await self._publish()
        self._begun.set()
        started = False
        async for item in self._generator:
            match item:
                case rtc.VideoFrame():
                    self._video.capture_frame(item)
                case Ended(position=position, interrupted=interrupted):
                    started = False
                    self._receiver.notify_playback_finished(position, interrupted)
                case Sound(spoken=0) if self._audio.queued_duration > SLACK:
                    pass
                case Sound():
                    if item.spoken and not started:
                        started = True
                        self._receiver.notify_playback_started()
                    await self._audio.capture_frame(item)
        await asyncio.sleep(FAREWELL)

    async def _hear(self) -> None:
        await self._begun.wait()
        async for frame in self._receiver:
            await self._generator.push_audio(frame)

    async def _publish(self) -> None:
        """The picture comes once somebody listens: agents take it for the sign to speak."""
        ours = self._room.local_participant
        track = rtc.LocalAudioTrack.create_audio_track("avatar_audio", self._audio)
        options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_MICROPHONE)
        await (await ours.publish_track(track, options)).wait_for_subscription()
        track = rtc.LocalVideoTrack.create_video_track("avatar_video", self._video)
        options = rtc.TrackPublishOptions(source=rtc.TrackSource.SOURCE_CAMERA)
        await ours.publish_track(track, options)

    def _drop(self) -> float:
        seconds = self._audio.queued_duration
        self._audio.clear_queue()
        return seconds

    def _left(self, participant: rtc.RemoteParticipant) -> None:
        if participant.identity == self._room.local_participant.attributes.get(BEHALF):
            self._gone.set()


async def join(
    session: Session, url: str, token: str, *, elsewhere: bool = False
) -> asyncio.Task[None]:
    """Takes a session into a room; the task ends when it is out of it. elsewhere: its speech does
    not come from there. Raises Problem, which does not say why: it would tell callers what answers
    at addresses that they cannot reach."""
    room = rtc.Room()
    options = rtc.RoomOptions(auto_subscribe=False, connect_timeout=JOINS)
    connecting = asyncio.create_task(room.connect(url, token, options))
    try:
        await asyncio.wait_for(asyncio.shield(connecting), JOINS)
    except BaseException as error:
        task = asyncio.create_task(_leave(room, connecting))
        leaving.add(task)
        task.add_done_callback(leaving.discard)
        if not isinstance(error, (rtc.ConnectError, TimeoutError)):
            raise
        why = (str(error) or f"not within {JOINS:.0f} s").replace(token, "(the token)")[:300]
        log.warning("a room cannot be joined", extra={"about": {"url": url, "why": why}})
        raise Problem(502, "no-room", "the room cannot be joined", 5.0) from None
    agent = room.local_participant.attributes.get(BEHALF)
    try:
        heard = functools.partial(avatar.DataStreamAudioReceiver, room, sender_identity=agent)
        receiver = Elsewhere() if elsewhere else heard()
        return asyncio.create_task(Runner(session, room, receiver).run())
    except BaseException:
        await room.disconnect()
        raise


async def _leave(room: rtc.Room, connecting: asyncio.Task[None]) -> None:
    """A connection that was cancelled would come about all the same, and nobody would end it."""
    with contextlib.suppress(Exception):
        await connecting
        await room.disconnect()
