"""The LITE-compatible routes: over HTTP and WebSockets, and with the plugin that speaks them.

The engine draws its frames. Rooms and what tracks take from stand in, as in `test_livekit.py`.
"""

import asyncio
import base64
import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("livekit.agents", reason="needs the extra livekit")

import websockets
from livekit import rtc

from serve.lite import RATE as SPEECH
from serve.mock import SIZE, opening, read
from serve.wire import RATE
from tests.rooms import Room
from tests.serving import LONG, in_loop, serving, tone, until

LITE = "/compat/lite"
PLACE = {"livekit_url": "ws://room", "livekit_room": "room", "livekit_client_token": "token"}


class Went:
    """What the tracks of a room took, in order: pictures, and samples."""

    def __init__(self):
        self.items = []

    @property
    def pictures(self):
        return [x for x in self.items if x.ndim == 3]

    @property
    def sound(self):
        return np.concatenate([x for x in self.items if x.ndim == 1] or [np.zeros(0, np.int16)])


class Source:
    """Of a track, as rtc.AudioSource and rtc.VideoSource. It holds sound for a while."""

    queued_duration = 0.1

    def __init__(self, went):
        self._went = went

    def clear_queue(self):
        pass

    def capture_frame(self, frame):
        if isinstance(frame, rtc.VideoFrame):
            self._went.items.append(np.array(frame.data).reshape(SIZE, SIZE, 3))
            return None
        self._went.items.append(np.array(frame.data))
        return asyncio.sleep(0)

    async def aclose(self):
        pass


class Entered(list):
    listened = True  # whether somebody there subscribes to what is published


@pytest.fixture
def rooms(monkeypatch):
    """Rooms of two, as they are entered: ours, theirs, and what went into it."""
    made = Entered()

    def enter():
        ours = Room("avatar", **{"lk.publish_on_behalf": "agent"})
        if not made.listened:
            ours.local_participant.publish_track = lambda *_: asyncio.Event().wait()
        made.append(SimpleNamespace(ours=ours, theirs=Room("agent"), went=Went()))
        for name in ("AudioSource", "VideoSource"):
            monkeypatch.setattr(rtc, name, lambda *_, went=made[-1].went, **__: Source(went))
        return ours.meet(made[-1].theirs)

    monkeypatch.setattr(rtc, "Room", enter)
    for name, kind in (("Audio", "AUDIO"), ("Video", "VIDEO")):
        track = {
            f"create_{name.lower()}_track": lambda *_, k=kind: getattr(rtc.TrackKind, f"KIND_{k}")
        }
        monkeypatch.setattr(rtc, f"Local{name}Track", SimpleNamespace(**track))
    return made


class Line:
    """The WebSocket of a client, and what came over it."""

    def __init__(self, ws):
        self.ws, self.came, self.code = ws, [], None
        self.task = asyncio.create_task(self._read())

    async def _read(self):
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in self.ws:
                self.came.append(json.loads(message))
        self.code = self.ws.close_code

    @property
    def kinds(self):
        states = [x.get("state") or x["type"] for x in self.came]
        return [kind.removeprefix("agent.speak_") for kind in states]

    async def until(self, *kinds):
        """All that came, once that is all of it."""
        await until(lambda: len(self.came) >= len(kinds))
        assert self.kinds == list(kinds)
        self.came.clear()

    async def tell(self, kind, **fields):
        await self.ws.send(json.dumps({"type": kind, "event_id": "e", **fields}))

    async def speak(self, *pieces, ends=True):
        for piece in pieces:
            sound = piece.astype("<i2").tobytes()
            await self.tell("agent.speak", audio=base64.b64encode(sound).decode())
        if ends:
            await self.tell("agent.speak_end")
            await self.tell("agent.start_listening")


async def call(served, path, token=None, key=None, **body):
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    headers |= {} if key is None else {"x-api-key": key}
    return await served.http.post(LITE + path, json=body, headers=headers)


async def taken(served, **more):
    """The data of a token."""
    given = {"mode": "LITE", "avatar_id": "ada", "is_sandbox": False, "livekit_config": PLACE}
    answer = await call(served, "/token", **(given | more))
    assert answer.status_code == 200 and answer.json()["code"] <= 200, answer.text
    return answer.json()["data"]


@contextlib.asynccontextmanager
async def speaking(served, rooms):
    """A client that is connected, as the plugin does it."""
    got = await taken(served)
    answer = await call(served, "/start", got["session_token"], session_id=got["session_id"])
    started = answer.json()["data"]
    assert started["ws_url"].startswith(f"ws://{served.address}{LITE}/ws/")
    assert started["session_id"] == got["session_id"] and started["livekit_url"] == "ws://room"
    assert started["max_session_duration"] == 3600
    async with websockets.connect(started["ws_url"], proxy=None) as ws:
        line = Line(ws)
        await line.until("connecting", "connected")
        line.room, line.token = rooms[-1], got["session_token"]
        line.session = served.front.sessions.all[got["session_id"]]
        yield line
        await call(served, "/stop", line.token)
        await line.task
    await until(lambda: not line.room.ours.there)


def heard(samples: np.ndarray) -> np.ndarray:
    """From the first loud sample to the last one."""
    first, last = np.flatnonzero(np.abs(samples) > 300)[[0, -1]]
    return samples[first : last + 1]


@in_loop
async def test_a_client_speaks_and_the_avatar_is_in_the_room(rooms):
    async with serving() as served, speaking(served, rooms) as line:
        await line.speak(tone(0.6, rate=SPEECH), tone(1.0, rate=SPEECH))
        await line.until("started", "ended")
        went = line.room.went
        sound = heard(went.sound)
        assert len(sound) == pytest.approx(1.6 * RATE, abs=0.01 * RATE)
        assert np.argmax(np.abs(np.fft.rfft(sound))) / 1.6 == pytest.approx(440, abs=2)
        # What is not speech may be left out, but for that each picture has its own sound.
        pairs = [(x, y) for x, y in zip(went.items, went.items[1:], strict=False)
                 if x.ndim == 3 and y.ndim == 1]  # fmt: skip
        loud = [np.sqrt(np.mean(y.astype(float) ** 2)) / 6000 for _, y in pairs]
        assert sum(x > 0.5 for x in loud) > 35
        for (picture, _), level in zip(pairs, loud, strict=True):
            assert opening(picture) == pytest.approx(min(1.0, level), abs=0.06)

        # Two in a row, the first of which is only known to be over when it was shown.
        await line.speak(tone(0.6, rate=SPEECH), ends=False)
        await until(lambda: line.kinds == ["started"])
        await until(lambda: line.session.state == "ready")  # a second of silence is an end
        await line.speak(tone(0.3, rate=SPEECH), ends=False)
        await until(lambda: line.session.state == "speaking")
        await until(lambda: line.session.state == "ready")
        assert line.kinds == ["started"]
        await line.speak()
        await line.until("started", "ended")
        await until(lambda: not line.session.timeline.speaking)
        await line.speak(tone(0.3, rate=SPEECH))
        await line.speak(tone(0.3, rate=SPEECH))
        await line.until("started", "ended", "started", "ended")
        await until(lambda: not line.session.timeline.speaking)
        await asyncio.sleep(0.2)
        assert not line.came


@in_loop
async def test_an_interrupt_is_answered_and_nothing_older_is_in_the_room(rooms):
    async with serving() as served, speaking(served, rooms) as line:
        went = line.room.went
        for epoch in (1, 2):
            mark = len(went.sound)
            await line.speak(tone(2.0, rate=SPEECH), tone(2.0, rate=SPEECH), ends=epoch == 1)
            await until(lambda m=mark: np.count_nonzero(went.sound[m:]) > RATE // 2)
            await line.tell("agent.interrupt")
            await line.until("started", "interrupted", "ended")
            mark = len(went.items)
            await until(lambda m=mark: len(went.items) > m + 10)
            after = went.items[mark:]
            assert {read(x)["epoch"] for x in after if x.ndim == 3} == {epoch}
            assert not any(x.any() for x in after if x.ndim == 1)
        await line.tell("agent.speak_end")  # of what was interrupted
        await line.tell("agent.stop_listening")
        await line.speak(tone(0.5, rate=SPEECH))
        await line.until("started", "ended")
        await line.tell("agent.interrupt")
        await line.until("interrupted")
        await line.tell("agent.sing")
        await line.tell("agent.speak", audio="?")
        await until(lambda: len(line.came) == 2)
        for said, why in zip(line.came, ("type is one of agent.speak", "in base64"), strict=True):
            assert said["type"] == "error" and why in said["error"]["message"]
        assert line.session.timeline.epoch == 3


@in_loop
async def test_a_session_is_kept_and_stopped_and_its_slot_is_free(rooms):
    async with serving(slots=2) as served:
        async with speaking(served, rooms) as line:
            for _ in range(2):
                line.session.heard = 0.0
                assert (await call(served, "/keep-alive", line.token)).json()["code"] <= 200
                assert line.session.heard > 0
            line.session.heard = 0.0
            await line.tell("session.keep_alive")
            await until(lambda: line.session.heard > 0)
            again = await call(served, "/start", line.token)  # says where, and enters no room
            assert len(rooms) == 1
            async with websockets.connect(again.json()["data"]["ws_url"], proxy=None) as ws:
                await Line(ws).until("connecting", "connected")
            async with websockets.connect(again.json()["data"]["ws_url"], proxy=None) as ws:
                used = Line(ws)
                await used.task
                assert used.code == 1008 and "was used" in used.came[0]["error"]["message"]
            for _ in range(2):
                answer = await call(served, "/stop", line.token, reason="USER_DISCONNECTED")
                assert answer.status_code == 200 and answer.json()["code"] <= 200
            await line.until("closing", "closed")
            await line.task
            assert line.code == 1000 and line.session.reason == "done"
            await until(lambda: served.free == 2)
        async with speaking(served, rooms) as line:  # the agent leaves the room
            await line.room.theirs.disconnect()
            await line.until("closing", "closed")
            assert line.session.reason == "left"
            await until(lambda: served.free == 2)
        rooms.listened = False  # so nobody would hear what is said
        got = await taken(served)  # other clients have more of the address
        answer = await call(served, "/v1/sessions/start", got["session_token"])
        async with websockets.connect(answer.json()["data"]["ws_url"], proxy=None) as ws:
            line = Line(ws)
            await until(lambda: rooms[-1].ours.there)
            await asyncio.sleep(0.3)
            await line.until("connecting")
            await call(served, "/v1/sessions/stop", got["session_token"])
            await line.task
            await until(lambda: not rooms[-1].ours.there)


@in_loop
async def test_what_is_refused_is_said_as_such_clients_read_it(rooms):
    async with serving(keys=("sesame",)) as served:
        given = {"avatar_id": "ada", "livekit_config": PLACE}

        async def refused(status, says, path="/token", **how):
            body = how.pop("body", given)
            answer = await call(served, path, **how, **body)
            said = answer.json()
            assert answer.status_code == said["code"] == status, answer.text
            assert says in said["message"] and set(said) == {"code", "message", "data"}
            return answer

        await refused(401, "no key; send X-API-KEY")
        await refused(401, "this key is not known", key="open")
        await refused(
            404, "no portrait 'nobody'", key="sesame", body=given | {"avatar_id": "nobody"}
        )
        await refused(
            422, "livekit_config: field required", key="sesame", body={"avatar_id": "ada"}
        )
        await refused(422, "mode: LITE is", key="sesame", body=given | {"mode": "FULL"})
        await refused(404, "Not Found", path="/none", key="sesame")
        got = await taken(served, key="sesame")
        full = await refused(429, "all places are taken", key="sesame")
        assert int(full.headers["retry-after"]) >= 1
        for path in ("/start", "/stop", "/keep-alive"):
            await refused(401, "no token", path=path)
            await refused(401, "not good here", path=path, token="x")
            other = {"session_id": "another"}
            await refused(
                403, "another session's", path=path, token=got["session_token"], body=other
            )
            await refused(422, "say which session", path=path, key="sesame", body={})
        viewer = served.front.auth.token(got["session_id"], 60, "viewer")
        await refused(403, "for watching only", path="/stop", token=viewer, body={})
        answer = await call(served, "/stop", key="sesame", session_id=got["session_id"])
        assert answer.status_code == 200
        await until(lambda: served.free == 1)
        await refused(404, "no session", path="/start", token=got["session_token"], body={})
        bad = PLACE | {"livekit_client_token": "bad"}
        got = await taken(served, key="sesame", livekit_config=bad)
        no_room = await refused(
            502, "cannot be joined", path="/start", token=got["session_token"], body={}
        )
        assert int(no_room.headers["retry-after"]) >= 1
        await until(lambda: served.free == 1)
        told = await served.create("sesame")
        await refused(409, "has no room", path="/start", token=told["client_token"], body={})


@in_loop
async def test_the_stock_plugin_works_with_our_address(rooms):
    name = "livekit.plugins.liveavatar"
    plugin = pytest.importorskip(name, reason="needs livekit-plugins-liveavatar")
    from livekit.agents import utils

    async with serving(keys=("sesame",)) as served, utils.http_context.open():
        agents_room = Room("agent").meet(Room("other"))
        handlers, tails = {}, []
        output = SimpleNamespace(replace_audio_tail=tails.append)
        on = lambda event, *does: handlers.setdefault(event, *does) if does else (
            lambda handler: handlers.setdefault(event, handler)
        )  # fmt: skip
        agent = SimpleNamespace(output=output, on=on, off=lambda *_: None)
        keys = {"livekit_url": "wss://room", "livekit_api_key": "key",
                "livekit_api_secret": "s" * 32}  # fmt: skip
        ours = plugin.AvatarSession(
            api_url=f"http://{served.address}{LITE}", api_key="sesame", avatar_id="ada",
        )  # fmt: skip
        await ours.start(agent, agents_room, **keys)
        (out,), told = tails, []
        out.on("playback_started", lambda event: told.append("started"))
        out.on("playback_finished", lambda event: told.append(event))
        went = rooms[-1].went

        async def say(seconds):
            samples = tone(seconds, rate=SPEECH)
            for at in range(0, len(samples), 480):
                piece = samples[at : at + 480]
                await out.capture_frame(rtc.AudioFrame(piece.tobytes(), SPEECH, 1, len(piece)))
            out.flush()

        await say(1.2)
        event = await asyncio.wait_for(out.wait_for_playout(), LONG)
        assert (event.interrupted, event.playback_position) == (False, pytest.approx(1.2))
        assert len(heard(went.sound)) == pytest.approx(1.2 * RATE, abs=0.01 * RATE)
        mark = len(went.sound)
        await say(4.0)
        await until(lambda: np.count_nonzero(went.sound[mark:]) > RATE // 2)
        out.clear_buffer()
        event = await asyncio.wait_for(out.wait_for_playout(), LONG)
        assert event.interrupted
        await until(lambda: read(went.pictures[-1])["epoch"] == 1)
        mark = len(went.sound)
        await say(0.6)
        event = await asyncio.wait_for(out.wait_for_playout(), LONG)
        assert (event.interrupted, event.playback_position) == (False, pytest.approx(0.6))
        assert len(heard(went.sound[mark:])) == pytest.approx(0.6 * RATE, abs=0.01 * RATE)
        assert [x if x == "started" else "finished" for x in told] == ["started", "finished"] * 3
        handlers["close"](None)
        await until(lambda: served.free == 1)
        await ours._main_atask
        await ours.aclose()
