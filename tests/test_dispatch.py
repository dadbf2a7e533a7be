"""Servers that are workers of a LiveKit server, which is played here, word by word of its wire."""

import asyncio
import contextlib
import importlib
import json
import logging
import os
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("livekit.agents", reason="needs the extra livekit")

import httpx
import jwt
from aiohttp import ClientWebSocketResponse, WSMsgType, web
from livekit import agents, api, rtc
from livekit.protocol import agent, models
from livekit.protocol.agent_dispatch import AgentDispatch

from liveavatar_jax.types import LiveAvatarError
from serve import agent as plugin
from serve import asked, dispatch, front, livekit
from serve.link import Health
from serve.livekit import BEHALF, AvatarSession
from serve.mock import Mock
from serve.settings import Settings
from serve.wire import RATE
from tests import rooms
from tests.rooms import Room
from tests.serving import LONG, Near, in_loop, tone, until

KEY, SECRET = "APIkey", "of-livekit-" + 32 * "s"
Status, State = agent.JobStatus, agent.WorkerStatus


# ---- LiveKit


class Member:
    """A worker as LiveKit sees it. Until LiveKit hears of it, a worker has room."""

    def __init__(self, number: int, ws: web.WebSocketResponse, registered):
        self.id, self.ws, self.registered = f"AW_{number}", ws, registered
        self.status, self.answers, self.moved = None, {}, []

    async def send(self, **message) -> None:
        await self.ws.send_bytes(agent.ServerMessage(**message).SerializeToString())

    @property
    def full(self) -> bool:
        return self.status is not None and self.status.status == State.WS_FULL

    @property
    def load(self) -> float:
        return 0.0 if self.status is None else self.status.load


class LiveKit:
    """Registers workers, and gives each job to the one with the least load, where the real one
    draws by 1 - load. Rooms have an agent each, and whoever joined."""

    def __init__(self):
        self.members: list[Member] = []
        self.jobs: dict[str, SimpleNamespace] = {}
        self.rooms: dict[str, Room] = {}  # the avatar's end of each
        self.refuse, self.assigns = 0, True
        self.count, self.made, self.tokens = 0, 0, []
        self.dispatches: dict[str, AgentDispatch] = {}
        self.tasks: set[asyncio.Task] = set()

    @contextlib.asynccontextmanager
    async def running(self):
        app = web.Application()
        app.router.add_get("/agent", self._worker)
        for service in ("AgentDispatchService", "RoomService"):
            app.router.add_post(f"/twirp/livekit.{service}/{{method}}", self._call)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"ws://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            for member in self.members:
                await member.ws.close()
            await asyncio.gather(*self.tasks)
            await runner.cleanup()

    async def _worker(self, request: web.Request) -> web.StreamResponse:
        if self.refuse:
            self.refuse -= 1
            return web.Response(status=503)
        token = jwt.decode(request.headers["authorization"].split()[1], SECRET, ["HS256"])
        self.tokens.append(token)
        if not token["video"].get("agent"):
            return web.Response(status=401)
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        first = agent.WorkerMessage.FromString((await ws.receive()).data)
        self.count += 1
        member = Member(self.count, ws, first.register)
        await member.send(register=agent.RegisterWorkerResponse(worker_id=member.id))
        self.members.append(member)
        async for said in ws:
            if said.type is WSMsgType.BINARY:
                self._hear(member, agent.WorkerMessage.FromString(said.data))
        self.members.remove(member)
        return ws

    def _hear(self, member: Member, message) -> None:
        match message.WhichOneof("message"):
            case "update_worker":
                member.status = message.update_worker
            case "availability":
                member.answers[message.availability.job_id].set_result(message.availability)
            case "update_job":
                self.jobs[message.update_job.job_id].told.append(message.update_job)
            case "migrate_job":
                member.moved += message.migrate_job.job_ids

    async def dispatch(
        self, metadata: str = "", room: str = "hall", of: str = ""
    ) -> SimpleNamespace:
        """A job, once a worker has it, or none does. of: the dispatch that asks for it."""
        name = f"AJ_{len(self.jobs)}"
        job = SimpleNamespace(id=name, of=of, member=None, answer=None, asked=[], told=[])
        self.jobs[name] = job
        wanted = agent.Job(id=name, room=models.Room(name=room), metadata=metadata,
                           type=agent.JobType.JT_ROOM, agent_name="avatar")  # fmt: skip
        while left := [x for x in self.members if x not in job.asked and not x.full]:
            member = min(left, key=lambda x: x.load)
            job.asked.append(member)
            member.answers[name] = asyncio.get_running_loop().create_future()
            await member.send(availability=agent.AvailabilityRequest(job=wanted))
            job.answer = await asyncio.wait_for(member.answers[name], 10)
            if job.answer.available:
                job.member = member
                if self.assigns:
                    token = api.AccessToken(KEY, SECRET).with_kind("agent")
                    token = token.with_identity(job.answer.participant_identity)
                    token = token.with_attributes(dict(job.answer.participant_attributes))
                    token = token.with_grants(api.VideoGrants(room_join=True, room=room))
                    job.token = token.to_jwt()
                    given = agent.JobAssignment(job=wanted, token=job.token)
                    await member.send(assignment=given)
                break
        return job

    async def end(self, job: SimpleNamespace) -> None:
        await job.member.send(termination=agent.JobTermination(job_id=job.id))

    async def _call(self, request: web.Request) -> web.Response:
        """LiveKit's API, of which an agent needs this much."""
        token = jwt.decode(request.headers["authorization"].split()[1], SECRET, ["HS256"])
        assert token["video"]["roomAdmin"] and token["video"]["room"] == "hall"
        body, dispatches = await request.read(), self.dispatches
        match request.match_info["method"]:
            case "CreateDispatch":
                asked = api.CreateAgentDispatchRequest.FromString(body)
                if asked.agent_name == "forbidden":
                    said = {"code": "permission_denied", "msg": "not with this key"}
                    return web.json_response(said, status=403)
                self.made += 1
                name = f"AD_{self.made}"
                answer = dispatches[name] = AgentDispatch(
                    id=name, agent_name=asked.agent_name, room=asked.room, metadata=asked.metadata
                )
                if asked.agent_name == "avatar":
                    job = self.dispatch(asked.metadata, of=name)
                    self.tasks.add(asyncio.create_task(job))
            case "ListDispatch":
                asked = api.ListAgentDispatchRequest.FromString(body)
                found = AgentDispatch(id=asked.dispatch_id)
                for job in self.jobs.values():
                    if job.of == asked.dispatch_id and job.told:
                        state = agent.JobState(status=job.told[-1].status, error=job.told[-1].error)
                        found.state.jobs.append(agent.Job(id=job.id, state=state))
                answer = api.ListAgentDispatchResponse(agent_dispatches=[found])
            case "DeleteDispatch":
                name = api.DeleteAgentDispatchRequest.FromString(body).dispatch_id
                answer = dispatches.pop(name)
                for job in self.jobs.values():
                    if job.of == name and job.member is not None:
                        await self.end(job)
            case "ListParticipants":
                there = [room.local_participant for room in self.rooms.values() if room.there]
                answer = api.ListParticipantsResponse(participants=[
                    models.ParticipantInfo(identity=x.identity, attributes=x.attributes)
                    for x in there
                ])  # fmt: skip
        return web.Response(body=answer.SerializeToString())


class Entered(Room):
    """The avatar's end of a room, once a token let it in."""

    def __init__(self, server: LiveKit):
        super().__init__("")
        self._server = server

    async def connect(self, url, token, options):
        if self._server.url != url:
            raise rtc.ConnectError("there is no such server")
        said = jwt.decode(token, SECRET, ["HS256"])
        self.token, self.name = token, said["video"]["room"]
        ours, theirs = self.local_participant, Room("agent-7")
        ours.identity, ours.attributes = said["sub"], said.get("attributes", {})
        self.meet(theirs)
        self._server.rooms[self.name] = self


@pytest.fixture
def went(monkeypatch):
    """Engines of this process, and tracks that need no server."""
    slots = lambda command: int(command[command.index("--slots") + 1])

    class Inside(Near):
        process = None

        def __init__(self, command, hear, lost, **more):
            super().__init__(hear, lost, Mock(slots(command)))

    monkeypatch.setattr(front, "Link", Inside)
    return rooms.sources(monkeypatch)


@contextlib.asynccontextmanager
async def livekits(monkeypatch):
    """A LiveKit server with rooms; nothing else is left at the end."""
    before = asyncio.all_tasks()
    server = LiveKit()
    monkeypatch.setattr(rtc, "Room", lambda: Entered(server))
    monkeypatch.setattr(dispatch, "EVERY", 0.1)
    monkeypatch.setattr(dispatch, "WAIT", 0.05)
    async with server.running():
        yield server
    await until(lambda: not asyncio.all_tasks() - before)


@contextlib.asynccontextmanager
async def fronts(server: LiveKit | None, *several: dict):
    """Fronts, registered one after the other; one where nothing is said."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for options in several or ({},):
            at = {} if server is None else {
                "livekit_url": server.url, "livekit_key": KEY, "livekit_secret": SECRET
            }  # fmt: skip
            app = front.make(Settings(**{"engine": "mock", "busy": 100.0} | at | options))
            await stack.enter_async_context(app.router.lifespan_context(app))
            made.append(app.state.front)
            app.state.front.app = app
            if server is not None:
                count = len(made)
                await until(lambda count=count: len(server.members) == count)
                await until(lambda: server.members[-1].status is not None)
        yield made
    for each in made:
        assert not each.sessions.all and not each.rooms
        await until(lambda each=each: not any(worker.held for worker in each.sessions.workers))


def asking(app) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost")


def member(server: LiveKit, one: front.Front) -> Member:
    return next(each for each in server.members if each.id == one.dispatch.worker)


def statuses(job) -> list[str]:
    return [Status.Name(x.status)[3:].lower() for x in job.told]


# ---- registration


@in_loop
async def test_a_server_registers_and_says_how_full_it_is(went, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    async with livekits(monkeypatch) as server, fronts(server, {"slots": 2}) as (one,):
        [there] = server.members
        said = there.registered
        assert (said.agent_name, said.type) == ("avatar", agent.JobType.JT_ROOM)
        assert said.version == agents.__version__ and one.dispatch.worker == there.id
        allowed = said.allowed_permissions
        assert allowed.can_publish and allowed.can_publish_data and allowed.agent
        [token] = server.tokens
        assert token["iss"] == KEY and token["video"]["agent"] is True
        assert not there.full and there.load == 0.0
        sessions = []
        for load in (0.5, 1.0):
            sessions.append(await one.open(asked.Wanted()))
            await until(lambda load=load: there.load == load)
            assert there.full == (load == 1.0)
        one.sessions.close(sessions[0], "done")
        await until(lambda: not there.full and there.load == 0.5)
        async with asking(one.app) as http:
            assert (await http.get("/v1/status")).json()["livekit"] == there.id
    assert "registered at LiveKit" in caplog.text and SECRET not in caplog.text


@in_loop
async def test_the_words_are_those_of_the_workers_of_livekit_agents(went, monkeypatch):
    """Their AgentServer and ours, asked by the same server. It gives theirs no job, which would be
    a thread and a room."""
    monkeypatch.setattr(agents.worker, "ASSIGNMENT_TIMEOUT", 0.1)
    monkeypatch.setattr(os, "environ", {**os.environ})  # where it keeps the secret
    async with livekits(monkeypatch) as server:
        theirs = agents.AgentServer(
            job_executor_type=agents.JobExecutorType.THREAD, num_idle_processes=0, port=0,
            host="127.0.0.1", ws_url=server.url, api_key=KEY, api_secret=SECRET,
            load_fnc=lambda: 0.0, http_proxy=None,
        )  # fmt: skip

        async def accept(request: agents.JobRequest) -> None:
            await request.accept(identity="avatar", attributes={BEHALF: "agent-7"})

        async def work(job: agents.JobContext) -> None:
            raise AssertionError("there is no job")

        theirs.rtc_session(work, agent_name="avatar", on_request=accept)
        running = asyncio.create_task(theirs.run())
        await until(lambda: server.members and server.members[0].status)
        [other], server.assigns = server.members, False
        status, theirs_says = other.status, (await server.dispatch()).answer
        await theirs.aclose()
        await running
        await until(lambda: not server.members)
        async with fronts(server) as (one,):
            [there], claims = server.members, ("iss", "sub", "video")
            assert there.registered == other.registered and there.status == status
            known, token = server.tokens
            assert [token[name] for name in claims] == [known[name] for name in claims]
            job = await server.dispatch('{"agent": "agent-7"}')
            del theirs_says.participant_attributes["lk.agent.name"]  # no avatar has one
            theirs_says.job_id = job.id
            assert job.answer == theirs_says and len(one.sessions.all) == 1


@in_loop
async def test_the_busier_of_engine_and_front_counts_as_load(went, monkeypatch):
    async with fronts(None, {"slots": 4, "busy": 0.5}) as (one,):
        await one.open(asked.Wanted())
        [worker] = one.sessions.workers
        assert one.sessions.fullness >= 0.25
        monkeypatch.setattr(worker.work, "share", lambda *_: 0.4)
        assert one.sessions.fullness == pytest.approx(0.8)
        monkeypatch.setattr(one.sessions.pulse, "share", lambda *_: 0.45)
        assert one.sessions.fullness == pytest.approx(0.9) and one.sessions.refusal() is None
        monkeypatch.setattr(one.sessions.pulse, "share", lambda *_: 0.51)
        assert one.sessions.fullness == 1.0 and one.sessions.refusal().kind == "busy"


@in_loop
async def test_a_lost_line_is_taken_up_again_and_jobs_go_on(went, monkeypatch):
    async with livekits(monkeypatch) as server, fronts(server) as (one,):
        job = await server.dispatch('{"agent": "agent-7"}')
        await until(lambda: "hall" in server.rooms)
        [session] = one.sessions.all.values()
        server.refuse = 2
        await server.members[0].ws.close()
        await until(lambda: one.dispatch.worker == "")
        await until(lambda: server.members and server.members[0].moved)
        [there] = server.members
        assert (there.id, there.moved, server.refuse) == ("AW_2", [job.id], 0)
        assert session.state == "ready"
        await until(lambda: there.status is not None and there.full)
        await server.rooms["hall"].other.disconnect()
        server.rooms["hall"].emit(
            "participant_disconnected", server.rooms["hall"].other.local_participant
        )
        await until(lambda: statuses(job) == ["running", "success"])
        await until(lambda: not there.full)


# ---- jobs


@in_loop
async def test_a_job_is_a_session_of_the_machine_with_room(went, monkeypatch):
    async with livekits(monkeypatch) as server, fronts(server, {"slots": 2}, {"slots": 2}) as both:
        one, two = both
        await one.open(asked.Wanted())
        await until(lambda: member(server, one).load == 0.5)
        wanted = {"avatar": {"id": "ada"}, "prompt": "smiles", "seed": 7, "agent": "agent-7",
                  "identity": "ada-1"}  # fmt: skip
        portraits = list(front.portraits())
        wanted["avatar"]["id"] = portraits[-1]
        job = await server.dispatch(json.dumps(wanted))
        assert job.asked == [job.member] == [member(server, two)]
        assert job.answer.participant_identity == "ada-1"
        assert dict(job.answer.participant_attributes) == {BEHALF: "agent-7"}
        await until(lambda: "hall" in server.rooms)
        room = server.rooms["hall"]
        assert room.token == job.token and room.local_participant.attributes[BEHALF] == "agent-7"
        assert len(one.sessions.all) == 1
        [session] = two.sessions.all.values()
        opened = two.sessions.workers[0].link.said[0]
        assert (opened.prompt, opened.seed) == ("smiles", 7)
        face = front.portraits()[portraits[-1]].read_bytes()
        assert (opened.picture == front.portrait(face, session.ready)).all()
        await until(lambda: session.viewers and statuses(job) == ["running"])
        await until(lambda: member(server, two).status.job_count == 1)
        two.sessions.close(session, "too_long")
        await until(lambda: statuses(job) == ["running", "success"])
        await until(lambda: two.sessions.free == 2 and not room.there)
        assert len(one.sessions.all) == 1


@in_loop
async def test_jobs_spread_and_who_is_full_is_passed_over(went, monkeypatch):
    async with livekits(monkeypatch) as server, fronts(server, {"slots": 2}, {"slots": 1}) as both:
        jobs = []
        for number in range(4):
            jobs.append(await server.dispatch(room=f"room-{number}"))
            await until(lambda: sum(x.load for x in server.members) == sum(
                len(each.sessions.all) / each.settings.slots for each in both))  # fmt: skip
        assert [len(each.sessions.all) for each in both] == [2, 1]
        assert [job.member is None for job in jobs] == [False, False, False, True]
        assert jobs[3].asked == [] and all(x.full for x in server.members)


@pytest.mark.parametrize("why", ["full", "not ready", "draining", "slow"])
@in_loop
async def test_who_has_no_place_says_no_and_another_is_asked(why, went, monkeypatch):
    """Also where LiveKit has not heard of it yet."""
    async with livekits(monkeypatch) as server, fronts(server, {}, {}) as (one, two):
        monkeypatch.setattr(dispatch, "EVERY", LONG)
        await asyncio.sleep(0.3)
        near = one.sessions.workers[0].link
        if why == "full":
            await one.open(asked.Wanted())
        elif why == "not ready":
            near.health = Health()
        elif why == "draining":
            one.sessions.draining = True
        else:
            monkeypatch.setattr(dispatch, "ANSWER", 0.3)
            near.send = lambda message: True  # and is not heard of again
        count = len(one.sessions.all)
        job = await server.dispatch()
        assert job.asked == [member(server, one), member(server, two)]
        assert job.member is member(server, two) and len(two.sessions.all) == 1
        assert len(one.sessions.all) == count
        # Its answer brings LiveKit up to date.
        await until(lambda: member(server, one).full or why == "slow")
        one.sessions.workers[0].held.clear()


@pytest.mark.parametrize(
    "metadata, says",
    [
        ("{", "metadata: invalid json"),
        ("[]", "metadata: input should be an object"),
        ('{"avatar": {"name": "ada"}}', "metadata.avatar.name: extra inputs are not permitted"),
        ('{"seed": -1}', "metadata.seed: input should be greater than or equal to 0"),
        ('{"live": true}', "metadata.live: extra inputs"),
        ('{"avatar": {"id": "nobody"}}', "there is no portrait 'nobody'; see /v1/presets"),
        ('{"avatar": {"image": "cG5n"}}', "this server takes no portraits of its callers"),
    ],
)
@in_loop
async def test_a_job_that_cannot_be_fails_with_one_sentence(metadata, says, went, monkeypatch):
    async with livekits(monkeypatch) as server, fronts(server, {}, {}) as both:
        job = await server.dispatch(metadata)
        await until(lambda: job.told)
        [told] = job.told
        assert told.status == Status.JS_FAILED and says in told.error and "\n" not in told.error
        assert job.asked == [job.member]  # nobody else would do better
        assert not any(each.sessions.all for each in both) and not server.rooms
        # What took no place leaves room.
        assert (await server.dispatch()).member is not None


@in_loop
async def test_portraits_of_jobs_follow_the_rules_for_uploads(went, monkeypatch):
    rules = {"uploads": "yes", "consent": True}
    picture = {"image": "data:image/png;base64,bm90aGluZw=="}
    consent = {"who": "Ada", "when": "2026-11-28", "proof": "a letter"}
    async with livekits(monkeypatch) as server, fronts(server, rules) as (one,):
        for avatar, says in (
            (picture, "say in `consent` who agreed"),
            (picture | {"consent": consent}, "the portrait is no JPEG, PNG or WebP"),
        ):
            job = await server.dispatch(json.dumps({"avatar": avatar}))
            await until(lambda job=job: job.told)
            assert says in job.told[0].error and not one.sessions.all


@in_loop
async def test_termination_ends_the_session(went, monkeypatch):
    async with livekits(monkeypatch) as server, fronts(server) as (one,):
        job = await server.dispatch()
        await until(lambda: one.sessions.all and next(iter(one.sessions.all.values())).viewers)
        [session] = one.sessions.all.values()
        await server.end(job)
        await until(lambda: statuses(job) == ["running", "success"])
        assert session.reason == "done" and not one.sessions.all
        await until(lambda: one.sessions.free == 1 and not server.rooms["hall"].there)
        assert (await server.dispatch()).member is not None


@in_loop
async def test_a_room_that_cannot_be_joined_fails_the_job(went, monkeypatch):
    async def connect(self, url, token, options):
        raise rtc.ConnectError("not with this token")

    monkeypatch.setattr(Entered, "connect", connect)
    async with livekits(monkeypatch) as server, fronts(server) as (one,):
        job = await server.dispatch()
        await until(lambda: statuses(job) == ["running", "failed"])
        assert job.told[1].error == "the room cannot be joined"
        assert not one.sessions.all
        await until(lambda: one.sessions.free == 1)


@in_loop
async def test_an_engine_that_is_lost_fails_the_job(went, monkeypatch):
    async with livekits(monkeypatch) as server, fronts(server) as (one,):
        job = await server.dispatch()
        await until(lambda: "hall" in server.rooms)
        near = one.sessions.workers[0].link
        near.start()
        near.lost("killed")
        await until(lambda: statuses(job) == ["running", "failed"])
        assert job.told[1].error == "the session has ended: engine"


@in_loop
async def test_what_went_wrong_inside_fails_the_job_and_leaves_no_session(went, monkeypatch):
    async def join(session, url, token, **more):
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(livekit, "join", join)
    async with livekits(monkeypatch) as server, fronts(server) as (one,):
        job = await server.dispatch()
        await until(lambda: statuses(job) == ["running", "failed"])
        assert "server's log" in job.told[1].error and "secret" not in job.told[1].error
        assert not one.sessions.all


@in_loop
async def test_a_session_that_livekit_does_not_take_is_given_up(went, monkeypatch):
    monkeypatch.setattr(dispatch, "ASSIGNED", 0.2)
    async with livekits(monkeypatch) as server, fronts(server) as (one,):
        server.assigns = False
        job = await server.dispatch()
        assert job.answer.available and len(one.sessions.all) == 1
        await until(lambda: not one.sessions.all and one.sessions.free == 1)
        assert not job.told


@in_loop
async def test_a_server_that_goes_tells_what_became_of_its_jobs(went, monkeypatch):
    send = ClientWebSocketResponse.send_bytes

    async def slowly(self, *words) -> None:
        await asyncio.sleep(0.05)
        await send(self, *words)

    monkeypatch.setattr(ClientWebSocketResponse, "send_bytes", slowly)
    monkeypatch.setattr(dispatch, "ASSIGNED", 1000.0)
    async with livekits(monkeypatch) as server:
        async with fronts(server, {"slots": 2}) as (one,):
            job = await server.dispatch()
            await until(lambda: "hall" in server.rooms)
            server.assigns = False
            await server.dispatch(room="late")  # nothing of it keeps the server from going
        assert statuses(job) == ["running", "failed"]
        assert job.told[1].error == "the session has ended: draining"
        assert not one.sessions.all and not server.rooms["hall"].there
        await until(lambda: not server.members)


def test_without_the_extra_a_server_that_should_register_does_not_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "livekit.agents", None)
    for name in ("serve.dispatch", "serve.livekit", "serve.agent"):
        monkeypatch.delitem(sys.modules, name)
    chosen = Settings(
        engine="mock", livekit_url="wss://x", livekit_key=KEY, livekit_secret=SECRET
    )  # fmt: skip
    with pytest.raises(LiveAvatarError, match="install the extra livekit"):
        front.make(chosen)
    assert importlib.import_module("serve.front") is front


# ---- the agent's side


def talker(tails: list) -> SimpleNamespace:
    """An AgentSession, as far as it matters."""
    output = SimpleNamespace(replace_audio_tail=tails.append)
    return SimpleNamespace(output=output, on=lambda *_: None, off=lambda *_: None)


def keys(server: LiveKit) -> dict[str, str]:
    return {
        "livekit_url": server.url, "livekit_api_key": KEY, "livekit_api_secret": SECRET
    }  # fmt: skip


class Hall(Room):
    """The agent's end, before it knows of the avatar's."""

    name = "hall"


@in_loop
async def test_an_agent_gets_the_avatar_that_livekit_chooses_and_speaks_through_it(
    went, monkeypatch
):
    async with livekits(monkeypatch) as server, fronts(server, {}, {}) as (one, two):
        await one.open(asked.Wanted())
        await until(lambda: member(server, one).full)
        ours, tails = AvatarSession(dispatch="avatar", prompt="smiles"), []
        await ours.start(talker(tails), Hall("agent-7"), **keys(server))
        [session] = two.sessions.all.values()
        assert two.sessions.workers[0].link.said[0].prompt == "smiles"
        room = server.rooms["hall"]
        assert room.local_participant.identity == ours.avatar_identity == "avatar"
        tails[0]._room = room.other  # where its own end is
        out = tails[0]
        sound = tone(0.4)
        await out.capture_frame(rtc.AudioFrame(sound.tobytes(), RATE, 1, len(sound)))
        out.flush()
        played = await asyncio.wait_for(out.wait_for_playout(), 30)
        assert played.playback_position == pytest.approx(0.4) and not played.interrupted
        await ours.aclose()
        await until(lambda: not two.sessions.all and two.sessions.free == 1)
        assert session.reason == "done" and not server.dispatches


@in_loop
async def test_an_agent_is_told_in_one_sentence_why_no_avatar_comes(went, monkeypatch):
    monkeypatch.setattr(plugin, "COMES", 1.0)
    async with livekits(monkeypatch) as server, fronts(server) as (one,):
        for more, says in (
            ({"dispatch": "avatar", "avatar_id": "nobody"}, "refuses: there is no portrait"),
            (
                {"dispatch": "others"},
                "no avatar came within 1 s; are servers registered as 'others'",
            ),
            ({"dispatch": "forbidden"}, r"LiveKit refuses \(403\): not with this key"),
        ):
            ours = AvatarSession(**more)
            with pytest.raises(LiveAvatarError, match=says):
                await ours.start(talker([]), Hall("agent-7"), **keys(server))
            assert not server.dispatches
        nowhere = keys(server) | {"livekit_url": "ws://127.0.0.1:9"}
        with pytest.raises(LiveAvatarError, match="LiveKit cannot be reached"):
            await AvatarSession(dispatch="avatar").start(talker([]), Hall("agent-7"), **nowhere)
        assert not one.sessions.all


@in_loop
async def test_an_agent_says_where_its_avatar_comes_from(monkeypatch):
    for name in ("LIVEKIT_API_KEY", "LIVEKIT_API_SECRET", "LIVEKIT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for more in ({}, {"base_url": "http://x", "dispatch": "avatar"}):
        with pytest.raises(LiveAvatarError, match="base_url, of one server, or dispatch"):
            AvatarSession(**more)
    for ours in (AvatarSession(dispatch="avatar"), AvatarSession("http://x")):
        with pytest.raises(LiveAvatarError, match="LIVEKIT_API_KEY and LIVEKIT_API_SECRET"):
            await ours.start(talker([]), Hall("agent-7"), livekit_url="ws://x")


# ---- by HTTP


@in_loop
async def test_a_session_asked_for_by_http_is_taken_into_its_room(went, monkeypatch):
    server = LiveKit()
    server.url = "wss://room"
    monkeypatch.setattr(rtc, "Room", lambda: Entered(server))
    token = api.AccessToken(KEY, SECRET).with_identity("ada").with_attributes({BEHALF: "agent-7"})
    token = token.with_grants(api.VideoGrants(room_join=True, room="hall")).to_jwt()
    app = front.make(Settings(engine="mock", busy=100.0))
    sessions = app.state.front.sessions
    async with app.router.lifespan_context(app), asking(app) as http:

        async def ask(**place) -> httpx.Response:
            body = {"transport": "livekit", **place}
            return await http.post("/v1/sessions", json=body)

        answer = await ask()
        assert answer.status_code == 422 and "go together" in answer.json()["detail"]
        answer = await ask(livekit={"url": "wss://elsewhere", "token": token})
        said = answer.json()
        assert (answer.status_code, said["retryable"]) == (502, True)
        assert said["detail"] == "the room cannot be joined"
        assert not sessions.all and not server.rooms
        await until(lambda: sessions.free == 1)
        answer = await ask(livekit={"url": "wss://room", "token": token})
        assert answer.status_code == 201
        session, room = sessions.all[answer.json()["id"]], server.rooms["hall"]
        assert room.token == token and len(session.viewers) == 1
        await http.delete(answer.json()["urls"]["session"])
        await until(lambda: not room.there and sessions.free == 1)
        answer = await ask(livekit={"url": "wss://room", "token": token}, live=True)
        assert answer.status_code == 422 and "live is false" in answer.json()["detail"]
        assert not sessions.all
