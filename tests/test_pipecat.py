"""The avatar in real pipelines of Pipecat, against a server of drawn frames in the same process."""

import asyncio
import contextlib
import importlib
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("pipecat", reason="needs the extra pipecat")

with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of audioop
    from pipecat.frames.frames import (
        BotStartedSpeakingFrame,
        BotStoppedSpeakingFrame,
        EndFrame,
        ErrorFrame,
        InterruptionFrame,
        OutputAudioRawFrame,
        OutputImageRawFrame,
        OutputTransportReadyFrame,
        SpeechOutputAudioRawFrame,
        StartFrame,
        TextFrame,
        TTSAudioRawFrame,
        TTSStartedFrame,
        TTSStoppedFrame,
        UserStartedSpeakingFrame,
    )
    from pipecat.pipeline.pipeline import Pipeline
    from pipecat.pipeline.worker import PipelineParams, PipelineWorker
    from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
    from pipecat.transports.base_output import BaseOutputTransport
    from pipecat.transports.base_transport import TransportParams
    from pipecat.workers.runner import WorkerRunner

    from serve import pipecat

from liveavatar_jax.types import LiveAvatarError
from serve.mock import SIZE, opening, read, tag
from serve.wire import FPS, PER_FRAME, RATE
from tests.serving import in_loop, serving, tone, until


class Sink(FrameProcessor):
    """Stands where a transport does, and keeps what comes, in order; pictures as what is drawn
    into them. late: it is not ready by itself."""

    def __init__(self, late: bool = False):
        super().__init__()
        self.came, self.late = [], late

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        self.came.append(frame)
        await self.push_frame(frame, direction)
        if isinstance(frame, StartFrame) and not self.late:
            await self.ready()

    async def ready(self):
        await self.push_frame(OutputTransportReadyFrame(), FrameDirection.UPSTREAM)

    def of(self, kind):
        return [frame for frame in self.came if isinstance(frame, kind)]

    @property
    def pictures(self):
        return [_pixels(frame) for frame in self.of(OutputImageRawFrame)]

    @property
    def sound(self):
        return _joined(self.of(SpeechOutputAudioRawFrame))

    @property
    def speech(self):
        return self.sound[self.sound != 0]


class Transport(BaseOutputTransport):
    """A real one, whose line is a list."""

    def __init__(self):
        super().__init__(TransportParams(
            audio_out_enabled=True, video_out_enabled=True, video_out_width=SIZE,
            video_out_height=SIZE, video_out_framerate=FPS, audio_out_end_silence_secs=0,
        ))  # fmt: skip
        self.sound, self.pictures = [], []

    async def start(self, frame):
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_audio_frame(self, frame):
        self.sound.append(frame)
        await asyncio.sleep(0.9 * len(frame.audio) / 2 / frame.sample_rate)
        return True

    async def write_video_frame(self, frame):
        self.pictures.append((len(self.sound), _pixels(frame)))
        return True


def _pixels(frame) -> np.ndarray:
    assert frame.format == "RGB"
    return np.frombuffer(frame.image, np.uint8).reshape(frame.size[1], frame.size[0], 3)


def _joined(frames) -> np.ndarray:
    return np.concatenate([np.frombuffer(x.audio, "<i2") for x in frames] or [np.zeros(0, "<i2")])


class Top(FrameProcessor):
    """Where the pipeline begins: what comes up to it."""

    def __init__(self):
        super().__init__()
        self.came = []

    async def process_frame(self, frame, direction):
        await super().process_frame(frame, direction)
        if direction is FrameDirection.UPSTREAM:
            self.came.append(frame)
        await self.push_frame(frame, direction)

    @property
    def errors(self):
        return [frame.error for frame in self.came if isinstance(frame, ErrorFrame)]


@contextlib.asynccontextmanager
async def running(served, last, rate=RATE, key="", url="", **options):
    """A pipeline of three, until the block ends."""
    service = pipecat.AvatarService(url or f"http://{served.address}", key, **options)
    top = Top()
    worker = PipelineWorker(
        Pipeline([top, service, last]), params=PipelineParams(audio_out_sample_rate=rate),
        cancel_on_idle_timeout=False, enable_rtvi=False,
    )  # fmt: skip
    started = asyncio.Event()
    worker.add_event_handler("on_pipeline_started", lambda *_: started.set())
    runner = WorkerRunner(handle_sigint=False)
    await runner.add_workers(worker)
    task = asyncio.create_task(runner.run())

    async def push(*frames):
        await worker.queue_frames(list(frames))

    try:
        await until(started.is_set)
        yield SimpleNamespace(push=push, top=top, task=task, worker=worker, service=service)
    finally:
        if not task.done():
            await worker.cancel()
        await task
    for call in (service.cleanup, service.cleanup):  # once more does nothing
        await call()
    assert not served.front.sessions.all
    await until(lambda: served.free == served.front.sessions.ready.slots)


def spoken(samples: np.ndarray, rate: int = RATE, piece: float = 0.02):
    """As a speech synthesis says it."""
    size = int(piece * rate)
    yield TTSStartedFrame()
    for at in range(0, len(samples), size):
        yield TTSAudioRawFrame(samples[at : at + size].tobytes(), rate, 1)
    yield TTSStoppedFrame()


@in_loop
async def test_a_transport_gets_pictures_with_exactly_what_was_said():
    async with serving() as served:
        last = Transport()
        async with running(served, last) as pipeline:
            said = tone(1.2)
            name = next(iter(served.front.sessions.all))
            await pipeline.push(*spoken(said))
            up = lambda kind: [x for x in pipeline.top.came if isinstance(x, kind)]
            await until(lambda: up(BotStoppedSpeakingFrame))
            assert len(up(BotStartedSpeakingFrame)) == len(up(BotStoppedSpeakingFrame)) == 1
        sound = _joined(last.sound)
        np.testing.assert_array_equal(sound[sound != 0], said)
        loud = [i + 1 for i, x in enumerate(last.sound) if np.any(np.frombuffer(x.audio, "<i2"))]
        for at, picture in last.pictures:
            assert read(picture)["session"] == tag(name)
            # Drawn by a clock of its own: up to a frame earlier or later than its sound.
            if loud[0] + 1 < at < loud[-1] - 1:
                assert opening(picture) > 0.5
            elif not loud[0] - 2 <= at <= loud[-1] + 2:
                assert opening(picture) == 0
        assert any(opening(picture) > 0.5 for _, picture in last.pictures)
        assert not pipeline.top.errors


@pytest.mark.parametrize(("rate", "comes"), [(RATE, RATE), (24_000, 24_000), (12_000, 22_050)])
@in_loop
async def test_pairs_follow_the_speech_at_other_rates_too(rate, comes):
    async with serving() as served:
        last = Sink()
        async with running(served, last, rate) as pipeline:
            await pipeline.push(*spoken(tone(0.8, rate=comes), comes))
            await until(lambda: len(last.speech) > 0.7 * RATE)
            await until(lambda: not last.sound[-2 * PER_FRAME :].any())
            pairs = [
                x for x in last.came if isinstance(x, OutputImageRawFrame | OutputAudioRawFrame)
            ]
            pictures, sounds = pairs[::2], pairs[1::2]
            assert all(type(x) is OutputImageRawFrame and x.sync_with_audio for x in pictures)
            assert all(type(x) is SpeechOutputAudioRawFrame for x in sounds)
            numbers = [read(_pixels(x))["frame"] for x in pictures]
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
            for picture, sound in zip(pictures, sounds, strict=False):
                samples = np.frombuffer(sound.audio, "<i2").astype(float)
                assert len(samples) == PER_FRAME and sound.sample_rate == RATE
                loud = min(1.0, np.sqrt(np.mean(samples**2)) / 6000)
                assert opening(_pixels(picture)) == pytest.approx(loud, abs=0.08)
            first, last_one = np.flatnonzero(np.abs(last.sound) > 300)[[0, -1]]
            heard = last.sound[first : last_one + 1].astype(float)
            assert len(heard) == pytest.approx(0.8 * RATE, abs=0.01 * RATE)
            spectrum = np.abs(np.fft.rfft(heard))
            assert np.argmax(spectrum) * RATE / len(heard) == pytest.approx(440, abs=2)
            assert not last.of(TTSAudioRawFrame)


async def _interrupted(pipeline, last, epoch: int) -> None:
    """In the middle of a speech; what comes then is of this epoch, and silent."""
    mark, seen = len(last.sound), len(last.of(InterruptionFrame))
    await pipeline.push(*spoken(tone(5.0)))
    await until(lambda: np.count_nonzero(last.sound[mark:]) > RATE // 2)
    await pipeline.push(UserStartedSpeakingFrame(), InterruptionFrame())
    await until(lambda: len(last.of(InterruptionFrame)) > seen)
    at = max(i for i, frame in enumerate(last.came) if isinstance(frame, InterruptionFrame))
    after = lambda kind: [frame for frame in last.came[at:] if isinstance(frame, kind)]
    await until(lambda: len(after(OutputImageRawFrame)) > 5)
    tags = [read(_pixels(frame)) for frame in after(OutputImageRawFrame)]
    assert {said["epoch"] for said in tags} == {epoch}
    assert not _joined(after(SpeechOutputAudioRawFrame)).any()


def _late(service, monkeypatch) -> None:
    """Interrupts reach the server late, and pictures are read slowly: old ones go on coming."""
    tell, picture, tasks = service._tell, pipecat._picture, []

    async def later(kind):
        await asyncio.sleep(0.2)
        await tell(kind)

    async def told(kind):
        await tell(kind) if kind != "audio.clear" else tasks.append(
            asyncio.create_task(later(kind))
        )

    def read_slowly(jpeg):
        time.sleep(0.03)
        return picture(jpeg)

    monkeypatch.setattr(service, "_tell", told)
    monkeypatch.setattr(pipecat, "_picture", read_slowly)


@in_loop
async def test_nothing_older_comes_after_an_interrupt(monkeypatch):
    async with serving() as served:
        last = Sink()
        async with running(served, last) as pipeline:
            await pipeline.push(UserStartedSpeakingFrame(), InterruptionFrame())  # of silence: none
            await until(lambda: last.of(InterruptionFrame))
            for epoch in range(1, 4):
                await _interrupted(pipeline, last, epoch)
                if epoch == 1:
                    _late(pipeline.service, monkeypatch)
            monkeypatch.undo()
            said, mark = tone(0.5, hertz=700), len(last.sound)
            await pipeline.push(*spoken(said))
            await until(lambda: np.count_nonzero(last.sound[mark:]) == len(said))
            heard = last.sound[mark:]
            np.testing.assert_array_equal(heard[heard != 0], said)
            # Another one, over a line of its own.
            next(iter(served.front.sessions.all.values())).interrupt()
            await until(lambda: read(last.pictures[-1])["epoch"] == 4)
            mark = len(last.sound)
            await pipeline.push(*spoken(said))
            await until(lambda: np.count_nonzero(last.sound[mark:]) == len(said))
            assert not pipeline.top.errors


@in_loop
async def test_the_end_comes_after_the_last_words():
    async with serving() as served:
        last = Sink()
        async with running(served, last) as pipeline:
            said = tone(1.5)
            await pipeline.push(*spoken(said), EndFrame())
            await until(pipeline.task.done)
            np.testing.assert_array_equal(last.speech, said)
            assert isinstance(last.came[-1], EndFrame)
            assert not served.front.sessions.all and not pipeline.top.errors


@in_loop
async def test_a_long_speech_is_sent_little_ahead_of_what_is_shown(monkeypatch):
    monkeypatch.setattr(pipecat, "AHEAD", 0.4)
    async with serving() as served:
        last = Sink()
        async with running(served, last) as pipeline:
            session = next(iter(served.front.sessions.all.values()))
            said, begun = tone(3.0), time.monotonic()
            await pipeline.push(*spoken(said))
            while len(last.speech) < len(said):
                came, since = session.timeline.came, time.monotonic() - begun
                assert came / RATE <= since + 0.45
                await asyncio.sleep(0.05)
                assert since < 60
            np.testing.assert_array_equal(last.speech, said)
            assert session.timeline.gaps == 0


@in_loop
async def test_what_is_said_before_the_transport_is_ready_waits_for_it():
    async with serving() as served:
        last = Sink(late=True)
        async with running(served, last) as pipeline:
            await pipeline.push(*spoken(tone(0.3)), TextFrame("over"))
            await until(lambda: last.of(TextFrame))
            await pipeline.push(InterruptionFrame())
            said = tone(0.5, hertz=700)
            await until(lambda: last.of(InterruptionFrame))
            await pipeline.push(*spoken(said))
            session = next(iter(served.front.sessions.all.values()))
            await until(lambda: session.stats()["frames"] > 20)
            assert not last.of(OutputImageRawFrame) and not last.of(OutputAudioRawFrame)
            await last.ready()
            await until(lambda: len(last.speech) == len(said))
            np.testing.assert_array_equal(last.speech, said)


@in_loop
async def test_the_end_of_a_session_is_told_and_the_voice_goes_on():
    async with serving() as served:
        last = Sink()
        async with running(served, last) as pipeline:
            sessions = served.front.sessions
            session = next(iter(sessions.all.values()))
            sessions.close(session, "engine", "the engine was lost (test)")
            await until(lambda: pipeline.top.errors)
            assert pipeline.top.errors == [
                "the avatar's session has ended: engine: the engine was lost (test)"
            ]
            assert not pipeline.service.is_usable
            await pipeline.push(*spoken(tone(0.1)))
            await until(lambda: last.of(TTSStoppedFrame))
            np.testing.assert_array_equal(_joined(last.of(TTSAudioRawFrame)), tone(0.1))


@in_loop
async def test_a_server_that_refuses_says_why():
    async with serving(keys=("sesame",)) as served:
        cases = [
            ({"key": "open"}, r"refuses \(401\): this key is not known"),
            ({"key": "sesame", "avatar_id": "nobody"}, r"refuses \(404\): there is no portrait"),
            ({"key": "sesame", "image": b"text"}, r"refuses \(400\): the portrait is no JPEG"),
            ({"key": "sesame", "url": "http://127.0.0.1:1"}, "no avatar server answers at http"),
        ]
        for options, says in cases:
            last = Sink()
            async with running(served, last, **options) as pipeline:
                await until(lambda top=pipeline.top: top.errors)
                with pytest.raises(AssertionError, match=says):
                    raise AssertionError(pipeline.top.errors[0])
                await pipeline.push(*spoken(tone(0.1)))
                await until(lambda sink=last: sink.of(TTSStoppedFrame))
        await served.create("sesame")
        async with running(served, Sink(), key="sesame") as pipeline:
            await until(lambda: pipeline.top.errors)
            assert "refuses (429): all places are taken" in pipeline.top.errors[0]
            for session in list(served.front.sessions.all.values()):
                served.front.sessions.close(session, "done")


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pipecat.frames.frames", None)
    monkeypatch.delitem(sys.modules, "serve.pipecat")
    with pytest.raises(LiveAvatarError, match="install the extra pipecat"):
        importlib.import_module("serve.pipecat")
