"""The LiveKit worker against the classes of livekit-agents, all in one process.

Time runs `FAST` times as fast. The engine is in this process too; its pictures say which they are.
What needs a server stands in: the two ends of a room, and the sources that tracks take from.
"""

import asyncio
import contextlib
import importlib
import json
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("livekit.agents", reason="needs the extra livekit")

import jwt
from aiohttp import web
from livekit import rtc
from livekit.agents.voice import avatar

from liveavatar_jax.types import LiveAvatarError
from serve import livekit
from serve.engine import Engine
from serve.link import Health
from serve.metrics import Metrics
from serve.session import Limits, Problem
from serve.sessions import Sessions
from serve.wire import FPS, PER_FRAME, RATE, Ready
from tests import rooms
from tests.rooms import LOUD, Room

FAST = 4


class Clock:
    def now(self) -> float:
        return FAST * time.monotonic()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / FAST)


class Numbers:
    """A `Maker` of pictures that say their epoch and number."""

    left, took = 0, {}
    ready = Ready("numbers", 8, 256, 1, 12, 2000, 0)  # speech begins within a frame

    def open(self, slot, picture, prompt, seed):
        pass

    def close(self, slot):
        pass

    def memory(self):
        return {}

    def make(self, windows):
        return {slot: np.stack([self._draw(window, i) for i in range(12)])
                for slot, window in windows.items()}  # fmt: skip

    def _draw(self, window, i):
        number = window.first // PER_FRAME + i
        says = np.array([window.epoch, number // 256, number % 256], np.uint8)
        return np.broadcast_to(says, (256, 8, 3))


class Inside:
    """A `Link` to an engine of this process."""

    def __init__(self, hear, lost):
        self.health = Health("ready", ready=Numbers.ready)
        say = lambda message: asyncio.get_running_loop().call_soon(hear, message)
        self._engine = Engine(Numbers(), say)

    def send(self, message) -> bool:
        self._engine.hear(message)
        while self._engine.tick():
            pass
        return True


class Watcher:
    """A viewer that keeps all."""

    watching = True
    speaks = True

    def __init__(self):
        self.shown, self.told = [], []

    def show(self, shown):
        self.shown.append(shown)

    def tell(self, event):
        self.told.append(event)

    def clear(self, epoch):
        pass

    def close(self, reason):
        pass


@contextlib.asynccontextmanager
async def session(**more):
    sessions = Sessions([Inside], Limits(), Metrics(), Clock())
    made = await sessions.create(lambda ready: np.zeros((256, 8, 3), np.uint8), "", **more)
    made.end_it = lambda: sessions.close(made, "done")
    yield made
    sessions.close(made, "done")
    await asyncio.sleep(0.05)


def run(job) -> None:
    asyncio.run(asyncio.wait_for(job, 60))


def speech(seconds: float, rate: int = RATE, sign: int = 1) -> np.ndarray:
    """Never below `LOUD`, so that it can be told from silence, and its sign from the other's."""
    wave = 3000 + 1500 * np.sin(np.arange(round(seconds * rate)) * 440 * 2 * np.pi / rate)
    return (sign * wave).astype(np.int16)


def framed(samples: np.ndarray, rate: int = RATE):
    for at in range(0, len(samples), rate // 50):
        piece = samples[at : at + rate // 50]
        yield rtc.AudioFrame(piece.tobytes(), rate, 1, len(piece))


async def until(happened, seconds: float = 20.0):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it does not happen"
        await asyncio.sleep(0.002)


# ---- what stands in for a server


@pytest.fixture
def went(monkeypatch):
    return rooms.sources(monkeypatch)


@contextlib.asynccontextmanager
async def queue(made, rate, monkeypatch):
    """The agent in the worker's process: its output, with livekit-agents' own runner."""
    out = avatar.QueueAudioOutput(sample_rate=rate, wait_playback_start=True)
    options = avatar.AvatarOptions(8, 256, FAST * FPS, RATE, 1)
    room = Room("avatar").meet(Room("agent"))
    generator = livekit.AvatarGenerator(made)
    runner = avatar.AvatarRunner(room, audio_recv=out, video_gen=generator, options=options)
    await runner.start()
    yield out
    await runner.aclose()
    generator.leave()


@contextlib.asynccontextmanager
async def wire(made, rate, monkeypatch):
    """The agent in another place: byte streams and calls through a room, and our runner."""
    ours, theirs = Room("avatar", **{livekit.BEHALF: "agent"}), Room("agent")
    monkeypatch.setattr(rtc, "Room", lambda: ours.meet(theirs))
    task = await livekit.join(made, "wss://room", "token")
    kind = rtc.TrackKind.KIND_VIDEO
    out = avatar.DataStreamAudioOutput(
        theirs, destination_identity="avatar", sample_rate=rate, wait_remote_track=kind,
        wait_playback_start=True,
    )  # fmt: skip
    out.rooms, out.task = (ours, theirs), task
    yield out
    await theirs.disconnect()
    theirs.other.emit("participant_disconnected", theirs.local_participant)
    await task


WAYS = pytest.mark.parametrize("way", [queue, wire])


def ends(out, went) -> list:
    """What the agent is told, and how much speech had gone out by then."""
    told = []
    out.on("playback_started", lambda event: told.append(("started", went.spoken)))
    out.on("playback_finished", lambda event: told.append((event, went.spoken)))
    return told


async def say(out, samples, rate=RATE, ends=True):
    for frame in framed(samples, rate):
        await out.capture_frame(frame)
    if ends:
        out.flush()


# ---- speech


@WAYS
def test_each_speech_goes_out_whole_and_its_length_is_reported(way, went, monkeypatch):
    async def body():
        async with session() as made, way(made, RATE, monkeypatch) as out:
            told = ends(out, went)
            for seconds in (1.0, 0.43):
                said, before = speech(seconds), went.spoken
                await say(out, said)
                event = await out.wait_for_playout()
                assert not event.interrupted
                assert event.playback_position == pytest.approx(seconds, abs=1e-6)
                sound = went.sound
                np.testing.assert_array_equal(sound[np.abs(sound) > LOUD][before:], said)
                assert told[-2] == ("started", pytest.approx(before, abs=PER_FRAME))
            assert len(told) == 4

    run(body())


@pytest.mark.parametrize("rate", [24_000, 48_000])
@WAYS
def test_speech_of_other_rates_is_converted(way, rate, went, monkeypatch):
    async def body():
        async with session() as made, way(made, rate, monkeypatch) as out:
            await say(out, speech(0.8, rate), rate)
            event = await out.wait_for_playout()
            assert event.playback_position == pytest.approx(0.8, abs=1e-3)
            sound = went.sound
            heard = sound[np.abs(sound) > LOUD]
            wanted = speech(0.8)[: len(heard)]
            assert len(heard) == pytest.approx(0.8 * RATE, abs=100)  # the edges ring
            assert np.corrcoef(heard[400:-400], wanted[400 : len(heard) - 400])[0, 1] > 0.98

    run(body())


@pytest.mark.parametrize("flushed", [True, False])
@WAYS
def test_an_interrupt_reports_what_was_shown_and_nothing_old_follows(
    way, flushed, went, monkeypatch
):
    async def body():
        async with session() as made, way(made, RATE, monkeypatch) as out:
            told = ends(out, went)
            await say(out, speech(5.0), ends=flushed)
            await until(lambda: went.spoken > RATE)
            out.clear_buffer()
            if not flushed:
                out.flush()
            event = await out.wait_for_playout()
            finished, spoken = told[-1]
            assert event.interrupted and finished is event
            assert RATE < spoken < 3 * RATE
            assert abs(RATE * event.playback_position - spoken) <= PER_FRAME
            mark = len(went.sound)
            await say(out, speech(0.5, sign=-1))
            event = await out.wait_for_playout()
            assert (event.interrupted, event.playback_position) == (False, pytest.approx(0.5))
            after = went.sound[mark:]
            assert after.max() == 0 and np.sum(after < -LOUD) == RATE // 2
            assert [what for what, _ in told if what != "started"] == [finished, event]

    run(body())


def test_sound_that_the_track_still_holds_is_not_reported_as_played(went, monkeypatch):
    async def body():
        async with session() as made, wire(made, RATE, monkeypatch) as out:
            went.queued = 0.07
            told = ends(out, went)
            await say(out, speech(3.0))
            await until(lambda: went.spoken > RATE)
            out.clear_buffer()
            event = await out.wait_for_playout()
            played = told[-1][1] / RATE - 0.07
            assert event.playback_position == pytest.approx(played, abs=1 / FPS)

    run(body())


def test_picture_and_sound_go_out_in_pairs_and_silence_too(went, monkeypatch):
    async def body():
        watcher = Watcher()
        async with session() as made, wire(made, RATE, monkeypatch) as out:
            made.join(watcher)
            await say(out, speech(0.7))
            await out.wait_for_playout()
            made.interrupt()
            mark = len(watcher.shown)
            await until(lambda: len(watcher.shown) > mark + 30)
        pictures, sounds = went.items[::2], went.items[1::2]
        assert all(isinstance(x, tuple) for x in pictures)
        assert all(len(x) == PER_FRAME for x in sounds)
        known = {(x.epoch, x.first // PER_FRAME): x.samples for x in watcher.shown}
        both = [(x, y) for x, y in zip(pictures, sounds, strict=False) if x in known]
        assert len(both) > 40
        for picture, sound in both:
            np.testing.assert_array_equal(sound, known[picture])
        assert pictures == sorted(pictures)  # no older epoch after a newer one

    run(body())


def test_segments_that_wait_end_one_by_one(went, monkeypatch):
    async def body():
        async with session() as made, wire(made, RATE, monkeypatch) as out:
            told = ends(out, went)
            await say(out, speech(0.51))
            await say(out, speech(0.3, sign=-1))
            await out.wait_for_playout()
            told = [what for what, _ in told if what != "started"]
            assert [x.playback_position for x in told] == pytest.approx([0.51, 0.3])
            assert not any(x.interrupted for x in told)
            await say(out, speech(4.0))
            await say(out, speech(1.0))
            before = went.spoken
            await until(lambda: went.spoken > before + RATE // 2)
            out.clear_buffer()
            last = await out.wait_for_playout()
            assert last.interrupted and last.playback_position == 0.0

    run(body())


def test_another_who_interrupts_ends_the_segment_for_the_agent(went, monkeypatch):
    async def body():
        async with session() as made, wire(made, RATE, monkeypatch) as out:
            told = ends(out, went)
            await say(out, speech(3.0), ends=False)
            await until(lambda: went.spoken > RATE // 2)
            made.interrupt()
            mark = len(went.sound)
            await until(lambda: len(told) > 1)
            finished, spoken = told[-1]
            assert finished.interrupted
            assert abs(RATE * finished.playback_position - spoken) <= PER_FRAME
            await say(out, speech(0.5))  # the rest of what was interrupted
            await say(out, speech(0.5, sign=-1))
            event = await out.wait_for_playout()
            assert (event.interrupted, event.playback_position) == (False, pytest.approx(0.5))
            assert went.sound[mark:].max() == 0

    run(body())


def test_silence_in_speech_that_comes_late_is_not_counted():
    async def body():
        async with session() as made:
            generator = livekit.AvatarGenerator(made)
            said, sound = speech(1.0), []

            async def push():
                for frame in framed(said[: RATE * 6 // 10]):
                    await generator.push_audio(frame)
                await until(lambda: made.timeline.gaps > 0 or sum(map(np.size, sound)) > 2 * RATE)
                for frame in framed(said[RATE * 6 // 10 :]):
                    await generator.push_audio(frame)
                    await asyncio.sleep(0.02)
                await generator.push_audio(avatar.AudioSegmentEnd())

            pushing = asyncio.create_task(push())
            position = 0.0
            async for item in generator:
                if isinstance(item, rtc.AudioFrame):
                    sound.append(np.array(item.data))
                    position += item.duration
                elif isinstance(item, avatar.AudioSegmentEnd):
                    break
            await pushing
            assert position == pytest.approx(1.0) and item.position == pytest.approx(1.0)
            heard = np.concatenate(sound)
            np.testing.assert_array_equal(heard[heard > LOUD], said)
            first, last = np.flatnonzero(heard)[[0, -1]]
            assert last - first > RATE  # there was silence in it

    run(body())


def test_who_takes_nothing_loses_pictures_but_no_count():
    async def body():
        async with session() as made:
            generator = livekit.AvatarGenerator(made)
            items = aiter(generator)
            await anext(items)
            for frame in framed(speech(3.0)):
                await generator.push_audio(frame)
            await generator.push_audio(avatar.AudioSegmentEnd())
            await until(lambda: made.state == "speaking")
            await until(lambda: made.state == "ready")
            pictures, position = 0, 0.0
            async for item in items:
                if isinstance(item, avatar.AudioSegmentEnd):
                    break
                pictures += isinstance(item, rtc.VideoFrame)
                position += item.duration if isinstance(item, rtc.AudioFrame) else 0.0
            assert pictures <= livekit.WAITS
            assert position == pytest.approx(3.0) and item.position == pytest.approx(3.0)

    run(body())


def test_sound_of_two_channels_becomes_one_and_an_empty_segment_is_none():
    async def body():
        async with session() as made:
            generator = livekit.AvatarGenerator(made)
            await generator.push_audio(avatar.AudioSegmentEnd())
            both = np.stack([speech(0.3), speech(0.3) + 100], -1)
            await generator.push_audio(rtc.AudioFrame(both.tobytes(), RATE, 2, len(both)))
            await generator.push_audio(avatar.AudioSegmentEnd())
            sound = []
            async for item in generator:
                if isinstance(item, avatar.AudioSegmentEnd):
                    break
                if isinstance(item, rtc.AudioFrame):
                    sound.append(np.array(item.data))
            heard = np.concatenate(sound)
            np.testing.assert_array_equal(heard[heard > 0], speech(0.3) + 50)
            assert item.position == pytest.approx(0.3)

    run(body())


# ---- sessions and rooms


def test_a_session_that_ends_tells_the_agent_and_leaves_the_room(went, monkeypatch):
    async def body():
        async with session() as made, wire(made, RATE, monkeypatch) as out:
            await say(out, speech(3.0))
            await until(lambda: went.spoken > RATE // 2)
            made.end_it()
            event = await out.wait_for_playout()
            assert event.interrupted and 0.5 <= event.playback_position < 3.0
            await until(lambda: not out.rooms[0].there)
            calls = out.rooms[0].local_participant.called
            assert [method for method, _ in calls] == [
                "lk.playback_started", "lk.playback_finished"
            ]  # fmt: skip
            assert json.loads(calls[1][1])["interrupted"] is True

    run(body())


def test_an_agent_that_is_gone_leaves_the_session_to_its_grace(went, monkeypatch):
    async def body():
        async with session() as made:
            async with wire(made, RATE, monkeypatch) as out:
                await until(lambda: went.items)
                assert made.stats()["viewers"] == 1
            assert out.task.done() and not made.viewers and not out.rooms[0].there

    run(body())


def test_rooms_and_sessions_that_do_not_fit_are_refused(went, monkeypatch, caplog):
    """Why is not for the caller, who may name any address; nor is the token for the log."""

    async def body():
        async def connect(self, url, token, options):
            if token != "token":
                raise rtc.ConnectError(f"{url}?access_token={token} has an answer")

        monkeypatch.setattr(Room, "connect", connect)
        monkeypatch.setattr(rtc, "Room", lambda: Room("avatar").meet(Room("agent")))
        async with session() as made:
            with pytest.raises(Problem, match=r"^the room cannot be joined$"):
                await livekit.join(made, "wss://room", "bad")
            about = caplog.records[-1].__dict__["about"]
            assert about == {
                "url": "wss://room",
                "why": "wss://room?access_token=(the token) has an answer",
            }
            assert not made.viewers
        async with session(live=True) as made:
            with pytest.raises(Problem, match="live is false"):
                await livekit.join(made, "wss://room", "token")

    run(body())


@pytest.mark.parametrize("how", ["late", "cancelled"])
def test_a_connection_that_comes_about_after_all_is_ended(how, went, monkeypatch):
    async def body():
        room, slow, asked = Room("avatar").meet(Room("agent")), asyncio.Event(), asyncio.Event()

        async def connect(*_):
            asked.set()
            await slow.wait()

        monkeypatch.setattr(room, "connect", connect)
        monkeypatch.setattr(rtc, "Room", lambda: room)
        monkeypatch.setattr(livekit, "JOINS", 0.1 if how == "late" else 60.0)
        async with session() as made:
            joining = asyncio.create_task(livekit.join(made, "wss://room", "token"))
            await asked.wait()
            if how == "cancelled":
                joining.cancel()
            await asyncio.wait([joining], timeout=20)
            assert joining.cancelled() == (how == "cancelled") and room.there
            if how == "late":
                assert str(joining.exception()) == "the room cannot be joined"
            slow.set()
            await until(lambda: not room.there and not livekit.leaving)
            assert not made.viewers

    run(body())


def test_small_pictures_are_enlarged():
    frame = livekit._picture(np.full((64, 96, 3), 7, np.uint8))
    assert (frame.width, frame.height, len(frame.data)) == (384, 256, 384 * 256 * 3)


def test_real_sources_take_what_is_sent():
    async def body():
        video, audio = rtc.VideoSource(8, 256), rtc.AudioSource(RATE, 1, 200)
        video.capture_frame(livekit._picture(np.zeros((256, 8, 3), np.uint8)))
        await audio.capture_frame(livekit.Sound(speech(0.04), 100))
        await audio.capture_frame(livekit.Sound(livekit.NOTHING, 100))
        assert 0 < audio.queued_duration <= 0.04
        audio.clear_queue()
        assert audio.queued_duration == 0
        await video.aclose()
        await audio.aclose()

    run(body())


# ---- the agent's side


def test_a_plugin_asks_for_an_avatar_that_publishes_on_behalf_of_the_agent():
    asked = []

    async def answer(request):
        body = await request.json() if request.can_read_body else None
        asked.append((request.method, request.path, request.headers["authorization"], body))
        if request.method == "POST" and (id := body["avatar"].get("id")) is not None:
            if id == "nobody":
                return web.json_response({"detail": "there is no portrait"}, status=404)
            page = web.Response(text="<p>Bad Gateway", status=int(id), content_type="text/html")
            return page if id != "201" else web.json_response([], status=201)
        return web.json_response({"id": "s1", "urls": {"session": "/v1/sessions/s1"}})

    async def body():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        room = Room("agent-7").meet(Room("ada"))
        tails = []
        output = SimpleNamespace(replace_audio_tail=tails.append)
        agent = SimpleNamespace(output=output, on=lambda *_: None, off=lambda *_: None)
        keys = {
            "livekit_url": "wss://room", "livekit_api_key": "key", "livekit_api_secret": "s" * 32
        }  # fmt: skip
        ours = livekit.AvatarSession(url, "sesame", image=b"png", identity="ada", prompt="smiles")
        await ours.start(agent, room, **keys)
        method, path, key, wanted = asked[0]
        assert (method, path, key) == ("POST", "/v1/sessions", "Bearer sesame")
        assert wanted["avatar"] == {"image": "cG5n"} and wanted["prompt"] == "smiles"
        assert wanted["transport"] == "livekit" and wanted["livekit"]["url"] == "wss://room"
        token = jwt.decode(wanted["livekit"]["token"], "s" * 32, ["HS256"])
        assert token["sub"] == "ada" and token["kind"] == "agent" and token["iss"] == "key"
        assert token["attributes"] == {"lk.publish_on_behalf": "agent-7"}
        assert token["video"]["roomJoin"] and token["video"]["room"] == "room"
        assert isinstance(tails[0], avatar.DataStreamAudioOutput) and tails[0].sample_rate == RATE
        await ours.aclose()
        assert asked[1][:2] == ("DELETE", "/v1/sessions/s1")
        with pytest.raises(LiveAvatarError, match=r"refuses \(404\): there is no portrait"):
            await livekit.AvatarSession(url, "x", avatar_id="nobody").start(agent, room, **keys)
        for status, says in (
            ("502", r"refuses \(502\): Bad Gateway"),
            ("200", "is no avatar server"),
            ("201", "is no avatar server"),
        ):
            with pytest.raises(LiveAvatarError, match=says):
                await livekit.AvatarSession(url, "x", avatar_id=status).start(agent, room, **keys)
        with pytest.raises(LiveAvatarError, match="LIVEKIT_URL"):
            await livekit.AvatarSession(url, "x").start(agent, room)
        await runner.cleanup()
        with pytest.raises(LiveAvatarError, match=f"no avatar server answers at {url}"):
            await livekit.AvatarSession(url, "x").start(agent, room, **keys)

    run(body())


def test_without_the_extra_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "livekit.agents", None)
    for name in ("serve.livekit", "serve.agent"):
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(LiveAvatarError, match="install the extra livekit"):
        importlib.import_module("serve.livekit")
