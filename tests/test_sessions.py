"""Sessions over real HTTP and WebSockets, with an engine that draws its frames."""

import asyncio
import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")

import httpx
import websockets
from websockets.exceptions import InvalidStatus

from serve import front, link, mock
from serve import session as session_of
from serve import socket as line_of
from serve.auth import Auth
from serve.clock import LOOP
from serve.link import Link
from serve.metrics import Metrics
from serve.pictures import jpeg
from serve.session import Limits, Problem
from serve.sessions import Sessions
from serve.socket import SOUND, Socket
from serve.wire import PER_FRAME, RATE
from tests.processes import ROOT, free_port
from tests.serving import (
    LONG,
    Frame,
    Near,
    in_loop,
    joined,
    serving,
    tone,
    until,
)


def problem(answer: httpx.Response, status: int, kind: str) -> dict:
    """What an RFC 9457 answer says; all of them have the same shape."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    said = answer.json()
    assert set(said) == {"type", "title", "status", "detail", "retryable"}
    assert said["type"].endswith(f"/problems/{kind}") and said["status"] == status
    assert said["detail"] and "Traceback" not in said["detail"]
    assert said["retryable"] == ("retry-after" in answer.headers)
    if said["retryable"]:
        assert int(answer.headers["retry-after"]) >= 1
    return said


# ---- a session's life


@in_loop
async def test_a_session_from_its_creation_to_its_end():
    async with serving(slots=2) as served:
        told = await served.create()
        assert told["state"] == "ready" and told["fps"] == 25 and told["sample_rate"] == RATE
        assert (told["size"], told["block_ms"], told["lookahead_blocks"]) == ([256, 256], 480, 2)
        async with joined(served, told) as line:
            assert line.ws.subprotocol == "avatar.v1"
            ready = await line.event("session.ready")
            assert line.came[0] is ready and ready["epoch"] == 0 and ready["id"] == told["id"]
            await line.more(5)

            said = tone(2.0)
            await line.say(said)
            await line.tell("audio.end")
            started, ended = await line.event("speech.started"), await line.event("speech.ended")
            assert started["epoch"] == 0 and started["turn_ms"] > 0
            assert (ended["played_ms"], ended["interrupted"]) == (2000, False)
            states = [x["state"] for x in line.named("session.state")]
            assert states == ["speaking", "ready"]
            await line.more(3)

            # Frames and samples are one count; nothing is missing between them.
            firsts = [x.first for x in line.frames]
            assert np.all(np.diff(firsts) == PER_FRAME)
            for x in line.frames:
                assert x.tag["frame"] * PER_FRAME == x.first and x.tag["epoch"] == 0
                assert x.tag["session"] == mock.tag(told["id"])
            sound = np.concatenate([x.samples for x in line.frames])
            at = started["at_sample"] - firsts[0]
            np.testing.assert_array_equal(sound[at : at + len(said)], said)
            assert not sound[:at].any() and not sound[at + len(said) :].any()
            # The mouth is open where the sound is loud, and nowhere else.
            for x in line.frames:
                loud = np.sqrt(np.mean(x.samples.astype(float) ** 2))
                assert abs(mock.opening(x.picture) - min(1.0, loud / mock.OPEN)) < 0.1

            await line.tell("session.update", prompt="Someone laughs.")
            assert (await line.event("session.updated"))["prompt"] == "Someone laughs."
            await line.tell("ping", id="7")
            assert (await line.event("pong"))["id"] == "7"
            stats = await line.event("stats")
            assert {"fps", "turn_ms", "buffer_ms", "stall_ms"} <= set(stats)

            await line.say(tone(3.0))
            await line.event("speech.started", 2)
            await line.more(5)
            await line.tell("audio.clear")
            cleared = await line.event("audio.cleared")
            assert cleared["epoch"] == 1 and 100 < cleared["played_ms"] < 3000
            assert line.named("speech.ended")[1]["interrupted"]
            await line.say(tone(1.0), epoch=0)  # too late: of the epoch before
            assert not any(x.samples.any() for x in await line.more(10) if x.epoch == 1)

            shown = await served.http.get(told["urls"]["session"])
            assert shown.status_code == 200 and shown.json()["stats"]["frames"] > 50
            gone = await served.http.delete(told["urls"]["session"])
            assert gone.json()["state"] == "closed" and gone.json()["stats"]["frames"] > 50
            assert await line.closed() == 1000
            assert line.named("session.closed")[0]["reason"] == "done"
        again = await served.http.delete(told["urls"]["session"])
        assert again.status_code == 200 and again.json()["state"] == "closed"
        problem(await served.http.get(told["urls"]["session"]), 404, "no-such-session")
        async with joined(served, told) as late:
            assert await late.closed() == 1008
            assert late.events[0]["error"] == "no-such-session"
        await until(lambda: served.free == 2)


@in_loop
async def test_long_silent_then_spoken_to():
    async with serving() as served:
        told = await served.create()
        async with joined(served, told) as line:
            for count in (1, 2):
                await line.more(35)
                await line.say(tone(0.3))
                await line.tell("audio.end")
                ended = await line.event("speech.ended", count)
                assert ended["played_ms"] == 300
            turns = [x["turn_ms"] for x in line.named("speech.started")]
            assert turns[1] < turns[0] + 2000


@in_loop
async def test_any_agreed_rate_is_heard_whole():
    async def heard_at(served, rate: int) -> None:
        told = await served.create()
        async with joined(served, told, query=f"&rate={rate}") as line:
            await line.event("session.ready")
            for piece in np.split(tone(1.0, rate=rate), 50):
                await line.say(piece)
            await line.tell("audio.end")
            assert abs((await line.event("speech.ended"))["played_ms"] - 1000) <= 1
            sound = np.concatenate([x.samples for x in line.frames]).astype(float)
            heard = sound[sound != 0]
            peak = np.argmax(np.abs(np.fft.rfft(heard[:RATE])))
            assert abs(peak * RATE / len(heard[:RATE]) - 440) < 3

    async with serving(slots=3) as served:
        await asyncio.gather(*(heard_at(served, rate) for rate in (8000, 44_100, 48_000)))


@in_loop
async def test_a_session_is_as_it_was_asked_for():
    async with serving(longest=100.0) as served:
        told = await served.create(
            size="256*256", input={"sample_rate": 24_000}, limits={"max_s": 50, "idle_s": 20},
            metadata={"order": "7"}, transport="ws",
        )  # fmt: skip
        assert (told["input"], told["metadata"]) == ({"sample_rate": 24_000}, {"order": "7"})
        assert (told["limits"]["max_s"], told["limits"]["idle_s"]) == (50, 20)
        assert told["expires_at"] <= time.time() + 51
        assert told["urls"]["whip"] == told["urls"]["rtc"] and "whep" in told["urls"]
        async with joined(served, told) as line:
            await line.say(tone(1.0, rate=24_000))
            await line.tell("audio.end")
            ended = await line.event("speech.ended")
            assert abs(ended["played_ms"] - 1000) <= 40
            assert line.events[0]["metadata"] == {"order": "7"}
        for wrong, words in (
            ({"size": "64*64"}, "size 64*64: this server is compiled for 256*256 alone"),
            ({"limits": {"max_s": 101}}, "limits.max_s is at most 100 here"),
            ({"input": {"sample_rate": 12_345}}, "input.sample_rate"),
            ({"metadata": {"a": "b" * 513}}, "metadata.a"),
        ):
            refused = await served.http.post("/v1/sessions", json=wrong)
            assert refused.status_code == 422 and words in refused.json()["detail"], refused.text


@in_loop
async def test_prompt_and_idle_change_at_the_edge_of_a_block():
    async with serving() as served:
        told = await served.create(prompt="One.")
        async with joined(served, told) as line:
            await line.say(tone(2.0))
            await line.event("speech.started")
            await line.tell("session.update", prompt="Two.")
            now = await line.event("session.updated")
            assert (now["prompt"], now["idle"]) == ("Two.", "generate")
            block = told["block_ms"] * RATE // 1000
            shown = line.frames[-1].first
            assert now["at_sample"] % block == 0 and shown < now["at_sample"]
            assert now["at_sample"] - shown <= (told["lookahead_blocks"] + 1) * block
            await line.tell("audio.end")
            await line.event("speech.ended")
            await line.tell("session.update", idle="freeze")
            now = await line.event("session.updated", 2)
            assert (now["prompt"], now["idle"]) == ("Two.", "freeze")
            have = len(line.frames)
            await asyncio.sleep(2.0)
            assert len(line.frames) - have <= 40  # what was made by then
            await line.tell("session.update", prompt="Three.", idle="generate")
            now = await line.event("session.updated", 3)
            assert (now["prompt"], now["idle"]) == ("Three.", "generate")
            await line.more(50)
            for wrong in ({}, {"idle": "sleep"}, {"prompt": ""}, {"prompt": 7, "idle": "loop"}):
                await line.tell("session.update", **wrong)
            await line.event("error", 4)
            shown = (await served.http.get(told["urls"]["session"])).json()
            assert shown["prompt"] == "Three."


@in_loop
async def test_sound_in_base64_is_heard_as_well():
    import base64

    async with serving() as served:
        async with joined(served, await served.create()) as line:
            said = tone(0.7)
            sound = base64.b64encode(said.astype("<i2").tobytes()).decode()
            await line.tell("audio.append", audio=sound)
            await line.tell("audio.end")
            assert (await line.event("speech.ended"))["played_ms"] == 700


@in_loop
async def test_frozen_a_session_shows_one_block_until_somebody_speaks():
    async with serving() as served:
        async with joined(served, await served.create(idle="freeze")) as line:
            await line.until(lambda: len(line.frames) >= 6)
            await line.event("stats", 2)
            assert len(line.frames) <= 12
            await line.say(tone(1.0))
            await line.tell("audio.end")
            assert (await line.event("speech.ended"))["played_ms"] == 1000
            assert line.named("stats")[-1]["stall_ms"] < 500


@in_loop
async def test_in_a_loop_a_session_goes_on_and_turns_are_timed():
    """The engine's counts and the session's differ by what was shown again."""
    async with serving() as served:
        async with joined(served, await served.create(idle="loop")) as line:
            await line.until(lambda: len(line.frames) >= LOOP + 20)
            await line.say(tone(1.0))
            await line.tell("audio.end")
            started = await line.event("speech.started")
            assert started["make_ms"] < 500 and 0 < started["turn_ms"] < 2000
            assert (await line.event("speech.ended"))["played_ms"] == 1000
            assert line.named("stats")[-1]["stall_ms"] < 500


@in_loop
async def test_a_fragmented_mp4_plays_while_it_comes(tmp_path):
    async with serving() as served:
        async with joined(served, await served.create(), media="mp4") as line:
            await line.say(tone(3.0))
            await line.tell("audio.end")
            await line.event("speech.ended")
            await line.event("stats", len(line.named("stats")) + 2)  # with what the muxer holds
            pieces = [x for x in line.came if isinstance(x, bytes)]
    assert len(pieces) > 5  # it did not wait for the end
    with av.open(io.BytesIO(b"".join(pieces))) as file:
        frames, sound = [], []
        for frame in file.decode():
            if isinstance(frame, av.VideoFrame):
                frames.append(frame)
            else:
                sound.append(frame)
        rate = file.streams.audio[0].rate
    times = np.array([float(x.time) for x in frames])
    np.testing.assert_allclose(np.diff(times)[1:], 0.04, atol=1e-4)  # the first stands for longer
    seconds = sum(x.samples for x in sound) / rate
    assert len(frames) > 75 and abs(seconds - len(frames) / 25) < 0.3
    loud = np.concatenate([x.to_ndarray().reshape(-1) for x in sound])
    loudness = np.sqrt(np.mean(loud[: len(loud) // 160 * 160].reshape(-1, 160) ** 2, axis=1))
    opened = np.array([mock.opening(x.to_ndarray(format="rgb24")) for x in frames])
    for said, step in ((loudness > 0.1, 160 / rate), (opened > 0.5, 1 / 25)):
        assert abs(np.sum(said) * step - 3.0) < 0.1
    heard = float(sound[0].time) + np.argmax(loudness > 0.1) * 160 / rate
    assert abs(heard - times[np.argmax(opened > 0.5)]) <= 0.04


@in_loop
async def test_an_interrupted_mp4_holds_nothing_back_and_goes_on():
    async with serving() as served:
        async with joined(served, await served.create(), media="mp4") as line:
            pieces = lambda: sum(isinstance(x, bytes) for x in line.came)
            await line.say(tone(9.0))
            await line.event("speech.started")
            await line.until(lambda: pieces() >= 6)
            await line.tell("audio.clear")
            cleared = await line.event("audio.cleared")
            had = pieces()
            await line.until(lambda: pieces() >= had + 6)
            at = line.came.index(cleared)
            parts = [[x for x in line.came[cut] if isinstance(x, bytes)]
                     for cut in (slice(at), slice(at, None))]  # fmt: skip
    times = []
    for some, epochs in ((parts[0], {0}), (parts[1], {1}), (parts[0] + parts[1], {0, 1})):
        with av.open(io.BytesIO(b"".join(some))) as file:
            frames = list(file.decode(video=0))
        tags = [mock.read(frame.to_ndarray(format="rgb24"))["epoch"] for frame in frames]
        assert len(frames) > 20 and set(tags) == epochs and tags == sorted(tags)
        times.append([float(frame.time) for frame in frames])
    assert times[1][0] > times[0][-1] and times[2] == sorted(times[2])
    assert len(times[2]) == len(times[0]) + len(times[1])


# ---- what is refused, and how


@in_loop
async def test_every_refusal_has_the_same_shape():
    async with serving(max_body=4000) as served:
        http = served.http
        problem(await http.get("/nowhere"), 404, "http")
        problem(await http.put("/v1/sessions"), 405, "http")
        problem(await http.get("/v1/sessions/none"), 404, "no-such-session")
        problem(await http.post("/v1/sessions", content=b"{"), 422, "bad-input")
        for body in ({"seed": -1}, {"seed": "x"}, {"prompt": ""}, {"prompt": "x" * 2001}, [],
                     {"idle": "never"}, {"what": 1}, {"prompt": 7}, {"prompt": None}):  # fmt: skip
            problem(await http.post("/v1/sessions", json=body), 422, "bad-input")
        halves = rb'{"prompt": "\ud800"}'
        kept = {"content-type": "application/json"}
        problem(await http.post("/v1/sessions", content=halves, headers=kept), 422, "bad-input")
        problem(await http.post("/v1/sessions", json={"avatar": {"id": "nobody"}}), 404,
                "no-such-portrait")  # fmt: skip
        for image in ("no base64!", "bm8gcGljdHVyZQ=="):
            answer = await http.post("/v1/sessions", json={"avatar": {"image": image}})
            problem(answer, 400, "bad-input")
        # too large, whether it says so or not
        problem(await http.post("/v1/sessions", content=b"x" * 4001), 413, "too-large")

        async def drops(first: bytes):
            yield first
            for _ in range(5):
                yield b"x" * 1000

        answer = await http.post("/v1/sessions", content=drops(b""), headers=kept)
        problem(answer, 413, "too-large")
        form = {"content-type": "multipart/form-data; boundary=cut"}
        part = b'--cut\r\nContent-Disposition: form-data; name="audio"; filename="a"\r\n\r\n'
        problem(await http.post("/v1/videos", content=drops(part), headers=form), 413, "too-large")
        assert served.free == 1 and not served.front.sessions.all
        assert served.counted("la_session_ends_total", reason="engine") == 0
        assert (await served.create())["state"] == "ready"


@in_loop
async def test_when_all_places_are_taken_the_next_is_told_when_to_come_again():
    async with serving(slots=2) as served:
        first, _ = await served.create(), await served.create()
        said = problem(await served.http.post("/v1/sessions", json={}), 429, "no-free-slot")
        assert said["retryable"]
        await served.http.delete(first["urls"]["session"])
        await until(lambda: served.free == 1)
        await served.create()
        counted = functools.partial(served.counted, "la_session_admissions_total")
        assert counted(result="admitted") == 3 and counted(result="no-free-slot") == 1


@in_loop
async def test_many_at_once_get_the_places_that_there_are():
    async with serving(slots=3) as served:
        asked = [served.http.post("/v1/sessions", json={}) for _ in range(12)]
        answers = await asyncio.gather(*asked)
        assert sorted(x.status_code for x in answers) == [201] * 3 + [429] * 9


@in_loop
async def test_fewer_sessions_a_second_please():
    async with serving(slots=9, rate=0.01) as served:
        answers = [await served.http.post("/v1/sessions", json={}) for _ in range(7)]
        assert [x.status_code for x in answers] == [201] * 5 + [429] * 2
        problem(answers[-1], 429, "too-many-requests")
        assert int(answers[-1].headers["retry-after"]) > 50


@in_loop
async def test_ready_is_warm():
    async with serving(warm=False) as served:
        answer = await served.http.get("/readyz")
        if answer.status_code == 503:  # it was asked soon enough
            assert not answer.json()["ready"]
            created = await served.http.post("/v1/sessions", json={})
            if created.status_code != 201:
                problem(created, 503, "not-ready")
        await until(lambda: served.front.sessions.ready)
        answer = await served.http.get("/readyz")
        assert answer.status_code == 200 and answer.json()["engines"][0]["state"] == "ready"
        models = (await served.http.get("/v1/models")).json()["data"]
        assert [(x["id"], x["slots"]) for x in models] == [("mock", 1)]
        assert (await served.http.get("/livez")).json()["ok"]


@in_loop
async def test_an_engine_on_its_way_is_not_ready(monkeypatch):
    waits = [sys.executable, "-c", "import sys, time; time.sleep(1e6)"]
    monkeypatch.setattr(front, "engine", lambda words: waits)
    async with serving(warm=False) as served:
        answer = await served.http.get("/readyz")
        assert answer.status_code == 503 and answer.json()["engines"][0]["state"] == "starting"
        problem(await served.http.post("/v1/sessions", json={}), 503, "not-ready")
        assert (await served.http.get("/v1/models")).json()["data"] == []
        assert (await served.http.get("/livez")).status_code == 200


# ---- who may do what

KEY, SECRET = "a-key-of-a-backend", "a secret that is long enough for HS256"


@in_loop
async def test_keys_and_tokens_are_good_for_what_they_are_for(monkeypatch):
    monkeypatch.setattr(front, "AUTHENTICATING", 0.3)
    async with serving(slots=2, keys=(KEY,), secret=SECRET) as served:
        http, forger = served.http, Auth((), "another secret, as long as that one is")

        def bearer(token: str) -> dict[str, str]:
            return {"authorization": f"Bearer {token}"} if token else {}

        for headers in ({}, bearer("wrong"), bearer("schlüssel"), {"authorization": "Bearer"},
                        {"authorization": f"Basic {KEY}"}, {"authorization": KEY}):  # fmt: skip
            sent = {name: value.encode("latin-1") for name, value in headers.items()}
            for path in ("/metrics", "/v1/status", "/v1/videos"):
                problem(await http.get(path, headers=sent), 401, "denied")
            answer = await http.post("/v1/sessions", json={}, headers=sent)
            problem(answer, 401, "denied")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in ("/livez", "/readyz", "/v1/presets"):
            assert (await http.get(path)).status_code == 200

        mine, other = await served.create(KEY), await served.create(KEY)
        url = mine["urls"]["session"]
        auth = served.front.auth
        bad = {
            "no token": "",
            "not good here": forger.token(mine["id"], 100),
            "expired": auth.token(mine["id"], -1),
            "another session's": other["client_token"],
            "is not good": mine["client_token"][:-3] + "abc",
        }
        for words, token in bad.items():
            status = 403 if token == other["client_token"] else 401  # who it is, is known
            answer = await http.get(url, headers=bearer(token))
            assert words in problem(answer, status, "denied")["detail"]
            answer = await http.delete(url, headers=bearer(token))
            problem(answer, status, "denied")
            if not token:
                continue
            async with joined(served, mine, token=token) as line:
                assert await line.closed() == 1008
                assert line.reason == "denied" and words in line.events[0]["detail"]
        problem(await http.delete(url, headers=bearer(mine["viewer_token"])), 403, "denied")
        for token in (KEY, mine["client_token"], mine["viewer_token"]):
            assert (await http.get(url, headers=bearer(token))).status_code == 200

        # by header, and by a first message; never by address
        at = f"ws://{served.address}{mine['urls']['events']}"
        plain = {"proxy": None, "subprotocols": None}
        async with websockets.connect(
            at, additional_headers=bearer(mine["client_token"]), proxy=None
        ) as ws:
            assert '"session.ready"' in await ws.recv()
        for first, good in [
            (f'{{"type": "auth", "token": "{mine["client_token"]}"}}', True),
            ('{"type": "auth", "token": "x"}', False),
            (r'{"type": "auth", "token": "\ud800"}', False),
            ('{"type": "auth", "token": 7}', False),
            ("[]", False), ("{", False), (b"\xff", False), (None, False),
        ]:  # fmt: skip
            query = f"?token={mine['client_token']}"
            async with websockets.connect(at + query, **plain) as ws:
                if first is not None:
                    await ws.send(first)
                assert ('"session.ready"' in await ws.recv()) == good
                if not good:
                    await ws.wait_closed()
                    assert ws.close_code == 1008
        async with websockets.connect(at, **plain):
            pass  # gone before it said who it was
        assert served.session(mine).state == "ready" and not served.session(mine).viewers


@in_loop
async def test_who_watches_cannot_speak():
    async with serving() as served:
        told = await served.create()
        async with joined(served, told, token=told["viewer_token"]) as line:
            await line.more(3)
            await line.say(tone(1.0))
            for kind in ("audio.end", "audio.clear", "session.update"):
                await line.tell(kind, prompt="x")
            await line.tell("ping")
            await line.event("pong")
            errors = line.named("error")
            assert len(errors) == 5 and all("watching only" in x["detail"] for x in errors)
            timeline = served.session(told).timeline
            assert (timeline.epoch, timeline.came) == (0, 0)


@in_loop
async def test_as_many_watch_as_may():
    """And who speaks comes in whoever watches; what is said of it to others is less."""
    async with serving(viewers=1) as served:
        told = await served.create(metadata={"order": "7"})
        guest = told["viewer_token"]
        async with joined(served, told, token=guest) as one:
            ready = await one.event("session.ready")
            assert "metadata" not in ready and "prompt" not in ready
            async with joined(served, told, token=guest) as two:
                assert await two.closed() == 1013
                assert two.events[-1]["error"] == "too-many-viewers"
            async with joined(served, told) as speaker:
                assert (await speaker.event("session.ready"))["metadata"] == {"order": "7"}
                await speaker.more(3)
            await one.more(3)
        async with joined(served, told, token=guest) as three:
            await three.more(3)


@in_loop
async def test_pages_from_elsewhere_do_not_reach_a_server_without_keys():
    async with serving(origins=("http://known.example",)) as served:

        async def asked(method="POST", path="/v1/sessions", **headers: str) -> int:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            body = {"json": {"seed": -1}} if method == "POST" else {}  # refused, where it is read
            return (await served.http.request(method, path, headers=given, **body)).status_code

        assert await asked() == await asked(host="localhost") == await asked(host="[::1]:8") == 422
        assert await asked(host="evil.example") == await asked(host="[bad") == 403
        assert await asked("GET", "/v1/status", host="evil.example") == 403
        assert await asked(origin="http://evil.example") == await asked(origin="null") == 403
        assert await asked(origin=f"http://{served.address}") == 422
        assert await asked(origin="http://known.example") == 422
        assert await asked(host="known.example", origin="http://known.example") == 422
        told = await served.create()
        with pytest.raises(InvalidStatus, match="403"):
            async with joined(served, told, origin="http://evil.example"):
                pass
    keyed = {"authorization": "Bearer k"}
    async with serving(keys=("k",)) as served:
        assert (await served.http.get("/v1/status", headers=keyed)).status_code == 200
        refused = await served.http.post("/v1/sessions", content=b"{" * 100)
        problem(refused, 401, "denied")  # of a body that nobody would read


@pytest.mark.parametrize("kind", ["frames", "messages"])
@in_loop
async def test_a_flood_is_cut_and_others_go_on(kind):
    """Of frames before anybody has said who he is, or of messages that are dropped."""
    async with serving() as served:
        told = await served.create()
        url = f"ws://{served.address}{told['urls']['events']}"
        async with joined(served, told) as line:
            await line.more(5)
            reader, writer = await asyncio.open_connection(*served.address.split(":"))
            token = told["client_token"] if kind == "messages" else ""
            writer.write((
                f"GET {told['urls']['events']} HTTP/1.1\r\nHost: {served.address}\r\n"
                "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
                f"Authorization: Bearer {token}\r\n\r\n"
            ).encode())  # fmt: skip
            await reader.readuntil(b"\r\n\r\n")
            sound = SOUND.pack(9, 0) + bytes(2)  # of an epoch that is none
            frame = b"\x89\x80" + bytes(4) if kind == "frames" else (
                bytes([0x82, 0x80 | len(sound)]) + bytes(4) + sound)  # fmt: skip
            have, begun = len(line.frames), time.monotonic()
            with contextlib.suppress(ConnectionError):
                for _ in range(60):
                    writer.write(1000 * frame)
                    await writer.drain()
                while await reader.read(1 << 16):
                    pass
            took = time.monotonic() - begun
            writer.close()
            assert took < LONG / 2
            await line.more(5)
            assert len(line.frames) - have >= 20 * took
            stats = await line.event("stats", len(line.named("stats")) + 1)
        assert stats["stall_ms"] < 400, url


# ---- how sessions end


@pytest.mark.parametrize(
    "options, watched, reason, code",
    [
        ({"grace": 0.5}, False, "left", None),
        ({"idle": 1.5}, True, "idle", 1000),
        ({"longest": 1.5}, True, "too_long", 1000),
    ],
)
@in_loop
async def test_a_place_is_free_again_however_a_session_ends(options, watched, reason, code):
    async with serving(**options) as served:
        told = await served.create()
        async with joined(served, told) as line:
            await line.more(3)
            if watched:
                assert (await line.event("session.expiring"))["why"] == reason
                assert await line.closed() == code
                assert line.named("session.closed")[0]["reason"] == reason
        await until(lambda: served.free == 1)
        assert served.counted("la_session_ends_total", reason=reason) == 1
        problem(await served.http.get(told["urls"]["session"]), 404, "no-such-session")


@in_loop
async def test_who_comes_back_in_time_finds_the_session():
    async with serving(grace=20.0) as served:
        told = await served.create()
        async with joined(served, told) as line:
            last = (await line.more(5))[-1]
        async with joined(served, told) as line:
            again = (await line.more(5))[0]
            assert again.first > last.first and again.epoch == 0


@contextlib.contextmanager
def soon_noticed(patch: pytest.MonkeyPatch, hangs: float = 3.0):
    """An engine that hangs is noticed soon, and another one started."""
    patch.setattr(link, "REST", 0.05)
    patch.setattr(link, "BEAT", 0.2)
    patch.setattr(front, "Link", functools.partial(Link, hangs=hangs))
    yield


@pytest.mark.parametrize("number, words", [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "not an")])
@in_loop
async def test_an_engine_that_dies_or_hangs_ends_its_own_sessions_alone(monkeypatch, number, words):
    with soon_noticed(monkeypatch):
        async with serving(workers=2, slots=2) as served:
            told = [await served.create() for _ in range(2)]
            one, two = (served.session(x).worker.link for x in told)
            assert one is not two
            async with joined(served, told[0]) as faulty, joined(served, told[1]) as beside:
                await faulty.more(3)
                await beside.more(3)
                os.kill(one.process.pid, number)
                assert await faulty.closed() == 1011
                closed = faulty.named("session.closed")[0]
                assert closed["reason"] == "engine" and words in closed["detail"]
                assert (await served.http.get("/livez")).status_code == 200
                await until(lambda: one.health.state == "ready")
                assert one.health.restarts == 1 and two.health.restarts == 0
                await until(lambda: served.free == 3)
                await beside.more(5)
                assert np.all(np.diff([x.first for x in beside.frames]) == PER_FRAME)
                for _ in range(3):
                    async with joined(served, await served.create()) as line:
                        await line.more(3)
            assert served.counted("la_engine_restarts_total") == 1
            assert served.counted("la_session_ends_total", reason="engine") == 1


@in_loop
async def test_a_front_that_stood_still_itself_blames_no_engine(monkeypatch):
    with soon_noticed(monkeypatch, hangs=1.0):
        async with serving() as served:
            told = await served.create()
            async with joined(served, told) as line:
                await line.more(3)
                time.sleep(1.5)  # the whole loop, and all in it
                await line.more(10)
            health = served.front.sessions.workers[0].link.health
            assert health.restarts == 0 and served.session(told).state == "ready"


@in_loop
async def test_an_engine_that_says_what_is_no_message_is_started_again(monkeypatch):
    noise = "import os, sys; os.write(int(sys.argv[-1]), bytes([5, *bytes(7), *b'noise'])); input()"
    with soon_noticed(monkeypatch):
        monkeypatch.setattr(front, "engine", lambda words: [sys.executable, "-c", noise])
        async with serving(warm=False) as served:
            worker = served.front.sessions.workers[0]
            await until(lambda: worker.link.health.restarts >= 2)
            assert (await served.http.get("/livez")).status_code == 200


@in_loop
async def test_an_engine_that_cannot_be_started_takes_nothing_else_down(monkeypatch):
    with soon_noticed(monkeypatch):
        monkeypatch.setattr(front, "engine", lambda words: ["/nonexistent/engine"])
        async with serving(warm=False) as served:
            worker = served.front.sessions.workers[0]
            await until(lambda: worker.link.health.restarts >= 2)
            assert (await served.http.get("/livez")).json()["ok"]
            problem(await served.http.post("/v1/sessions", json={}), 503, "not-ready")


@in_loop
async def test_on_the_way_down_nobody_new_comes_in_and_who_is_there_may_finish():
    async with serving(slots=2, drain=LONG) as served:
        told = await served.create()
        async with joined(served, told) as line:
            await line.more(2)
            served.server.should_exit = True
            await line.until(lambda: [x for x in line.named("session.state")
                                      if x["state"] == "draining"])  # fmt: skip
            problem(await served.http.post("/v1/sessions", json={}), 503, "draining")
            assert (await served.http.get("/readyz")).status_code == 503
            await line.more(5)
            await served.http.delete(told["urls"]["session"])
            assert await line.closed() == 1000


@in_loop
async def test_who_does_not_finish_in_time_is_told_to_go_elsewhere():
    async with serving(drain=0.5) as served:
        async with joined(served, await served.create()) as line:
            await line.more(2)
            served.server.should_exit = True
            assert await line.closed() == 1001
            assert line.named("session.closed")[0]["reason"] == "draining"


# ---- sessions do not mix


@in_loop
async def test_no_session_ever_sees_or_hears_another(monkeypatch):
    """Four at a time with tones and colours of their own, for a while in which they come and go,
    and engines die."""
    draw, seen = random.Random(3), 0
    tones = [300.0, 500.0, 700.0, 1100.0]

    async def one(served, hertz: float, stop: asyncio.Event) -> None:
        nonlocal seen
        while not stop.is_set():
            answer = await served.http.post("/v1/sessions", json={"live": draw.random() < 0.3})
            if answer.status_code != 201:
                assert answer.status_code in (429, 503), answer.text
                await asyncio.sleep(0.1)
                continue
            told = answer.json()
            async with joined(served, told) as line:
                with contextlib.suppress(websockets.ConnectionClosed, AssertionError):
                    for _ in range(draw.randrange(1, 4)):
                        await line.say(tone(draw.uniform(0.3, 1.5), hertz))
                        await line.tell(draw.choice(["audio.end", "audio.clear", "ping"]))
                        await line.more(draw.randrange(1, 25))
                if draw.random() < 0.5:
                    await served.http.delete(told["urls"]["session"])
            for x in line.frames:
                assert x.tag["session"] == mock.tag(told["id"])
                assert x.tag["epoch"] == x.epoch and x.tag["frame"] * PER_FRAME == x.first
                edge = x.picture[128, 50].astype(int) - mock.colour(told["id"])
                assert np.abs(edge).max() < 12
                if np.abs(x.samples).min() > 0:  # nothing but the tone
                    wave = np.abs(np.fft.rfft(x.samples * np.hanning(PER_FRAME)))
                    assert abs(np.argmax(wave) * RATE / PER_FRAME - hertz) <= 25
                seen += 1

    with soon_noticed(monkeypatch, hangs=LONG):
        async with serving(workers=2, slots=2, grace=0.2) as served:
            stop = asyncio.Event()
            clients = [asyncio.create_task(one(served, hertz, stop)) for hertz in tones]
            for _ in range(3):
                before = seen
                await until(lambda seen_before=before: seen > seen_before + 60)
                engine = draw.choice(served.front.sessions.workers).link.process
                if engine is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(engine.pid, signal.SIGKILL)
            before = seen
            await until(lambda: seen > before + 60)
            stop.set()
            await asyncio.gather(*clients)
            await until(lambda: served.free == 4)


@in_loop
async def test_after_two_hundred_interrupts_nothing_older_came(monkeypatch):
    monkeypatch.setattr(session_of, "CLEARS", 1000.0)
    draw = random.Random(4)
    async with serving() as served:
        async with joined(served, await served.create()) as line:
            await line.event("session.ready")
            for epoch in range(200):
                if draw.random() < 0.8:
                    await line.say(tone(draw.uniform(0.05, 1.0)), epoch=epoch)
                if draw.random() < 0.3:
                    await line.tell("audio.end")
                if epoch % 20 == 10:
                    await line.say(tone(1.0), epoch=epoch)
                    await line.until(lambda epoch=epoch: any(
                        x["epoch"] == epoch for x in line.named("speech.started")))  # fmt: skip
                    await line.more(2)
                else:
                    await asyncio.sleep(0.02 * draw.random())
                await line.tell("audio.clear")
            await line.event("audio.cleared", 200)
            await line.more(3)
            came, cleared = line.came, line.named("audio.cleared")
        assert [x["epoch"] for x in cleared] == list(range(1, 201))
        epoch = heard = 0
        for x in came:
            if isinstance(x, Frame):
                assert x.epoch == epoch and x.tag["epoch"] == epoch
                heard += np.count_nonzero(x.samples)
            elif x["type"] == "speech.started":
                heard = 0
            elif x["type"] == "audio.cleared":
                assert x["played_ms"] >= 0
                if x["played_ms"]:  # speech was under way
                    assert x["played_ms"] >= round(1000 * heard / RATE) - 1000 / 25
                epoch, heard = x["epoch"], 0
        assert sum(x["played_ms"] > 0 for x in cleared) >= 10
        assert served.counted("la_clear_latency_seconds_count") == 200
        assert served.counted("la_clear_latency_seconds_sum") < 200 * 0.1


# ---- bad lines and bad messages


@in_loop
async def test_a_reader_who_stands_still_is_cut_and_disturbs_nobody(monkeypatch):
    monkeypatch.setattr(line_of, "STUCK", 0.5)
    # Pictures that fill the kernel's buffers soon.
    monkeypatch.setattr(line_of, "jpeg", lambda frame: jpeg(frame) + bytes(150_000))
    async with serving(slots=2) as served:
        told, other = await served.create(), await served.create()
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        host, port = served.address.split(":")
        await asyncio.get_running_loop().sock_connect(slow, (host, int(port)))
        head = (
            f"GET {told['urls']['events']}?media=jpeg HTTP/1.1\r\nhost: {served.address}\r\n"
            "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
            "sec-websocket-key: MDEyMzQ1Njc4OTAxMjM0NQ==\r\n"
            f"authorization: Bearer {told['client_token']}\r\n\r\n"
        )
        with slow:
            await asyncio.get_running_loop().sock_sendall(slow, head.encode())
            session = served.session(told)
            await until(lambda: session.viewers)
            (stuck,) = session.viewers
            async with joined(served, told) as beside, joined(served, other) as elsewhere:
                for line in (beside, elsewhere):
                    await line.more(5)
                await until(lambda: stuck not in session.viewers)  # and nothing was ever read
                for line in (beside, elsewhere):
                    await line.more(5)
                    assert np.all(np.diff([x.first for x in line.frames]) == PER_FRAME)
                assert session.state == "ready"


@in_loop
async def test_who_reads_nothing_but_asks_much_is_cut():
    class Ws:
        async def close(self, code: int, reason: str) -> None:
            self.code = code

    class Here:
        class timeline:
            epoch = 0

    ws = Ws()
    viewer = Socket(ws, Here, "none", RATE, True)
    for number in range(5000):
        viewer._text(f'{{"type": "ping", "id": {number}}}')
    assert len(viewer._out) <= line_of.EVENTS
    await viewer._send()
    assert ws.code == 1013


def damaged(draw: random.Random) -> str | bytes:
    """A message that is none, or one that asks for something odd."""
    kinds = ["audio.append", "audio.end", "session.update", "ping", "audio.clear", "nothing", ""]
    values = [None, 0, -1, 1e300, "", "x", "é" * 3000, [], {}, [[[]]], True, "AAA", "====",
              "\ud800", "AAAAAAAA", float("nan")]  # fmt: skip
    match draw.randrange(7):
        case 0:
            return draw.randbytes(draw.randrange(300))
        case 1:
            return SOUND.pack(draw.getrandbits(32), 0) + draw.randbytes(draw.randrange(99))
        case 2:
            return SOUND.pack(draw.randrange(3), 0) + draw.randbytes(2 * draw.randrange(999))
        case 3:
            return "[" * draw.choice([1, 100, 100_000])
        case 4:
            deep = '{"type": "ping", "id": ' + "[" * 500 + "]" * 500 + "}"
            return draw.choice(["", "null", "7", '"ping"', "{}", '{"type": null}', "\0", deep])
        case 5:
            names = ["audio", "prompt", "id", "epoch", "type"]
            said = {name: draw.choice(values) for name in names if draw.random() < 0.5}
            return json.dumps(said | {"type": draw.choice(kinds)})
        case _:
            return "".join(chr(draw.randrange(1, 0xD800)) for _ in range(draw.randrange(99)))


@pytest.mark.parametrize("seed", range(3))
@in_loop
async def test_no_message_harms_anybody_else(seed):
    draw = random.Random(seed)
    async with serving(slots=2) as served:
        told, other = await served.create(), await served.create()
        async with joined(served, other) as beside:
            await beside.more(3)
            codes = []
            for _ in range(15):
                async with joined(served, told, media="none") as line:
                    with contextlib.suppress(websockets.ConnectionClosed, AssertionError):
                        for _ in range(40):
                            await line.ws.send(damaged(draw))
                            await asyncio.sleep(0)
                        await line.tell("ping", id="last")
                        await line.until(
                            lambda line=line: any(x["id"] == "last" for x in line.named("pong"))
                        )
                codes.append(line.code)
            assert set(codes) <= {1000, 1005, 1008} and 1008 in codes
            await beside.more(5)
            assert np.all(np.diff([x.first for x in beside.frames]) == PER_FRAME)
            assert not any(x.samples.any() for x in beside.frames)
            # and the one that was spoken to like that can be spoken to in earnest
            async with joined(served, told) as line:
                await line.tell("audio.clear")
                epoch = (await line.event("audio.cleared"))["epoch"]
                await line.say(tone(0.6), epoch=epoch)
                await line.tell("audio.end")
                assert (await line.event("speech.ended"))["played_ms"] == 600
        assert served.counted("la_engine_restarts_total") == 0


@in_loop
async def test_a_message_too_large_ends_its_line_alone():
    async with serving() as served:
        told = await served.create()
        async with joined(served, told) as line, joined(served, told) as beside:
            await line.event("session.ready")
            await line.ws.send(b"x" * (1 << 20) + b"x")
            assert await line.closed() == 1009
            await beside.more(3)


@in_loop
async def test_lines_that_ask_for_what_is_not_there_are_told_so():
    async with serving() as served:
        told = await served.create()
        for query in ("&rate=7", "&rate=0"):
            async with joined(served, told, query=query) as line:
                assert await line.closed() == 1008 and line.events[0]["error"] == "bad-input"
        async with joined(served, told, media="avi") as line:
            assert await line.closed() == 1008
        with pytest.raises(InvalidStatus):
            async with joined(served, told, query="&rate=fast"):
                pass
        assert served.session(told).state == "ready"


@in_loop
async def test_speech_too_far_ahead_is_refused_and_can_be_sent_again():
    async with serving() as served:
        async with joined(served, await served.create()) as line:
            await line.say(tone(121.0), piece=RATE)
            error = await line.event("error")
            assert error["error"] == "too-far-ahead" and error["retryable"]
            await line.tell("audio.clear")
            assert (await line.event("audio.cleared"))["epoch"] == 1
            await line.say(tone(0.5), epoch=1)
            await line.tell("audio.end")
            await line.until(lambda: any(x["played_ms"] == 500 for x in line.named("speech.ended")))


# ---- nothing is left behind


class Blank(mock.Mock):
    """Draws nothing, at once."""

    def __init__(self, slots: int = 4):
        super().__init__(slots)
        self.ready = dataclasses.replace(self.ready, height=8, width=8)
        self._frames = np.zeros((12, 8, 8, 3), np.uint8)

    def make(self, windows):
        return {slot: self._frames for slot in windows}


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


class Watcher:
    watching = True
    speaks = True

    def __init__(self) -> None:
        self.frames, self.told, self.closed = 0, [], None

    def show(self, shown) -> None:
        self.frames += 1

    def tell(self, event) -> None:
        self.told.append(event)

    def clear(self, epoch) -> None:
        pass

    def close(self, reason) -> None:
        self.closed = reason


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize("times", [200, pytest.param(2000, marks=pytest.mark.slow)])
@in_loop
async def test_sessions_that_come_and_go_leave_nothing(times):
    maker = Blank()
    limits = Limits(busy=math.inf)  # nobody rests here
    sessions = Sessions([functools.partial(Near, maker=maker)], limits, Metrics())
    running = asyncio.create_task(sessions.run())
    near, counts = sessions.workers[0].link, []
    picture = np.zeros((8, 8, 3), np.uint8)

    async def life(number: int) -> None:
        session = await sessions.create(lambda ready: picture, "x", live=number % 2 == 0)
        session.join(watcher := Watcher())
        for epoch in range(3):
            session.speak(tone(0.5), epoch)
            session.end()
            await asyncio.sleep(0.005)
            session.interrupt()
        sessions.close(session, "done")
        assert watcher.closed == "done"

    for number in range(0, times, 4):
        await asyncio.gather(*(life(number + i) for i in range(4)))
        await asyncio.sleep(0.01)
        assert not sessions.all and not near.engine.seats and len(near.engine.free) == 4
        assert sessions.free == 4
        counts.append((resident(), len(asyncio.all_tasks())))
    third = counts[len(counts) // 3]
    assert counts[-1][1] == third[1]
    assert counts[-1][0] - third[0] < 4e6
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


@in_loop
async def test_an_engine_lost_while_a_portrait_is_made_ready_leaves_no_seat_behind():
    """The session is over; the next engine must not hear of it."""
    sessions = Sessions([functools.partial(Near, maker=Blank(1))], Limits(), Metrics())
    near, loop = sessions.workers[0].link, asyncio.get_running_loop()
    made = asyncio.Event()

    def picture(ready) -> np.ndarray:
        loop.call_soon_threadsafe(made.set)
        time.sleep(0.2)
        return np.zeros((8, 8, 3), np.uint8)

    asked = asyncio.create_task(sessions.create(picture, "x"))
    await made.wait()
    near.start()
    near.lost("gone")
    with pytest.raises(Problem, match="gone"):
        await asked
    await asyncio.sleep(0.05)
    assert not near.engine.seats and sessions.free == 1 and not sessions.all


# ---- what operators see


@in_loop
async def test_metrics_say_what_happened():
    async with serving() as served:
        told = await served.create()
        async with joined(served, told) as line:
            await line.say(tone(0.5))
            await line.tell("audio.end")
            await line.event("speech.ended")
            await line.tell("audio.clear")
            await line.event("audio.cleared")
            await line.event("stats", len(line.named("stats")) + 1)
            text = (await served.http.get("/metrics")).text
            status = (await served.http.get("/v1/status")).json()
        assert status["sessions"][told["id"]]["viewers"] == 1 and status["free"] == 0
        for name in (
            'la_sessions{state="ready"} 1.0', 'la_session_admissions_total{result="admitted"} 1.0',
            "la_turn_latency_seconds_count 1.0", "la_first_frame_seconds_count 1.0",
            "la_clear_latency_seconds_count 1.0", 'la_block_seconds_count{stage="make"}',
            "la_frames_total", "la_stall_seconds_total", "la_input_gap_seconds_total",
            'la_buffer_seconds{where="picture"}', 'la_buffer_seconds{where="engine"}',
            "la_engine_restarts_total 0.0", "la_engine_ready 1.0", "la_realtime_factor",
            "la_output_fps", "la_av_skew_seconds_bucket", "la_rtc_rtt_seconds_bucket",
            "la_rtc_loss_ratio", "la_compile_seconds", "la_compile_cache_hits_total",
            "la_device_memory_bytes", 'la_block_seconds_count{stage="encode"}',
            'la_block_seconds_count{stage="publish"}',
            "la_session_seconds_bucket", "la_frames_dropped_total", "la_session_ends_total",
        ):  # fmt: skip
            assert name in text, name
        assert 15 < served.counted("la_output_fps") < 35
        assert told["id"] not in text  # nor who it was


def test_the_front_holds_no_model():
    code = "import serve.front, serve.__main__, sys; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=2 * LONG)


@contextlib.contextmanager
def command(*flags: str):
    """`python -m serve` with flags."""
    port = str(free_port())
    argv = [sys.executable, "-m", "serve", "--engine", "mock", "--port", port, *flags]
    process = subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.communicate()


def warm(base: str) -> httpx.Client:
    http = httpx.Client(base_url=base, trust_env=False, timeout=LONG)
    end = time.monotonic() + 2 * LONG
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if http.get("/readyz").status_code == 200:
                return http
        time.sleep(0.1)
    raise AssertionError("it does not become ready")


def test_the_command_serves_until_it_is_asked_to_end():
    with command("--drain", "1000") as (process, base), contextlib.closing(warm(base)) as http:
        assert http.post("/v1/sessions", json={}).status_code == 201
        process.send_signal(signal.SIGTERM)  # and it waits for who is there
        end = time.monotonic() + LONG
        while http.post("/v1/sessions", json={}).status_code != 503:
            assert time.monotonic() < end
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)  # a second one does not
        assert process.wait(LONG) == 0
        assert "Traceback" not in process.stderr.read()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--udp", "9-1"], "udp = '9-1' must be a range of ports"),
        (["--host", "0.0.0.0"], "set keys (AVATAR_SERVE_KEYS)"),
        (["--slots", "0"], "slots = 0 must be at least 1"),
    ],
)
def test_settings_that_cannot_be_had_are_one_sentence(flags, words, capsys):
    from serve.__main__ import main

    assert main(["--engine", "mock", *flags]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("serve: ") and words in said[0]


def test_an_engine_that_cannot_start_says_so_in_one_sentence(tmp_path):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [sys.executable, "-m", "serve.engine", "--fd", str(theirs.fileno())]
        ran = subprocess.run(
            [*command, "--weights", str(tmp_path / "none")], pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert ran.returncode == 2
    assert re.fullmatch(r"serve: .*none is not a converted checkpoint; .*\n", ran.stderr)
