"""The server as a worker of LiveKit, whose dispatch spreads sessions over machines.

Each machine tells LiveKit how full it is. LiveKit asks one with room whether it takes a job, by the
wire of livekit-agents (`livekit.protocol.agent`, over a WebSocket). The session is opened for the
answer: who says yes has a place for it, and another machine is asked where there is none. The
classes of livekit-agents would run a job in a process or a thread of its own, away from the
engines; here it is a session of the front like any other.
"""

import asyncio
import collections
import contextlib
import logging
import random
from typing import Any

from pydantic import Field, ValidationError

from liveavatar_jax.types import LiveAvatarError
from serve.asked import Wanted
from serve.front import Front
from serve.livekit import BEHALF
from serve.session import REASONS, Problem, Session

try:
    import aiohttp
    from google.protobuf.message import DecodeError
    from livekit import agents, api
    from livekit.protocol import agent, models
except ImportError:
    raise LiveAvatarError("rooms need livekit-agents; install the extra livekit") from None

log = logging.getLogger("serve.dispatch")

EVERY = 2.5  # seconds between two words on how full we are
ALIVE = 30.0  # seconds between two looks whether the line is alive
ANSWER = 8.0  # seconds that opening a session may take; LiveKit waits 10 for an answer
ASSIGNED = 7.5  # seconds from a yes to the job
WAIT, DOUBLED = 0.5, 6  # seconds before LiveKit is called again; doubled so many times
FAREWELL = 2.0  # seconds for the last messages


class Job(Wanted):
    """A job's metadata. LiveKit decides who may dispatch, so that who does may say who it is."""

    agent: str | None = Field(None, max_length=200)  # on whose behalf the avatar is in the room
    identity: str = Field("avatar", min_length=1, max_length=200)  # of the avatar


class Dispatch:
    """One front is one worker, of a name that many share."""

    def __init__(self, front: Front):
        self.worker = ""  # our id at LiveKit, while we are registered
        self._front, self._settings = front, front.settings
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._assigned: dict[str, asyncio.Future[agent.JobAssignment]] = {}
        self._out: collections.deque[agent.WorkerMessage] = collections.deque()
        self._news = asyncio.Event()
        self._tries = 0

    async def run(self) -> None:
        """For ever; jobs go on while LiveKit cannot be reached."""
        while True:
            why = "it closed the line"
            try:
                await self._line()
            except (aiohttp.ClientError, OSError, DecodeError) as error:
                why = f"{type(error).__name__}: {error}"[:300]
            finally:
                self.worker = ""
            wait = WAIT * 2**self._tries * random.uniform(0.5, 1.0)  # not all at the same time
            self._tries = min(self._tries + 1, DOUBLED)
            about = {"url": self._settings.livekit_url, "why": why, "again_in_s": round(wait, 1)}
            log.warning("LiveKit is not there", extra={"about": about})
            await asyncio.sleep(wait)

    async def leave(self) -> None:
        """Once no session is left: LiveKit is told what became of each."""
        for waiting in self._assigned.values():
            waiting.cancel()
        await asyncio.gather(*self._jobs.values(), return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                while self.worker and self._out:
                    await asyncio.sleep(0.01)

    # ---- the line

    async def _line(self) -> None:
        """From a registration until LiveKit is gone."""
        chosen = self._settings
        grants = api.VideoGrants(agent=True)
        token = api.AccessToken(chosen.livekit_key, chosen.livekit_secret).with_grants(grants)
        headers = {"authorization": f"Bearer {token.to_jwt()}"}
        url = chosen.livekit_url.rstrip("/") + "/agent"
        async with (
            aiohttp.ClientSession(headers=headers) as http,
            http.ws_connect(
                url,
                heartbeat=ALIVE,
                max_msg_size=chosen.max_body,  # a job's metadata may hold a portrait
                timeout=aiohttp.ClientWSTimeout(ws_close=FAREWELL),  # type: ignore[call-arg]
            ) as ws,
        ):
            await ws.send_bytes(agent.WorkerMessage(register=agent.RegisterWorkerRequest(
                type=agent.JobType.JT_ROOM, agent_name=chosen.livekit_name,
                version=agents.__version__, allowed_permissions=models.ParticipantPermission(
                    can_publish=True, can_subscribe=True, can_publish_data=True,
                    can_update_metadata=True, agent=True,
                ),
            )).SerializeToString())  # fmt: skip
            parts = [asyncio.create_task(part) for part in (self._read(ws), self._send(ws))]
            try:
                done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
                for part in done:
                    part.result()
            finally:
                for part in parts:
                    part.cancel()
                await asyncio.gather(*parts, return_exceptions=True)

    async def _read(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        async for said in ws:
            if said.type is aiohttp.WSMsgType.BINARY:
                self._hear(agent.ServerMessage.FromString(said.data))

    async def _send(self, ws: aiohttp.ClientWebSocketResponse) -> None:
        """What there is to say, and how full we are after it; a message stays until it is out."""
        while True:
            self._news.clear()
            if self.worker:
                while self._out:
                    await ws.send_bytes(self._out[0].SerializeToString())
                    self._out.popleft()
                await ws.send_bytes(self._status().SerializeToString())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), EVERY)

    def _status(self) -> agent.WorkerMessage:
        sessions = self._front.sessions
        full = sessions.refusal() is not None
        status = agent.WorkerStatus.WS_FULL if full else agent.WorkerStatus.WS_AVAILABLE
        return agent.WorkerMessage(update_worker=agent.UpdateWorkerStatus(
            status=status, load=sessions.fullness, job_count=len(self._jobs),
        ))  # fmt: skip

    def _say(self, **message: Any) -> None:
        self._out.append(agent.WorkerMessage(**message))
        self._news.set()

    def _hear(self, message: agent.ServerMessage) -> None:
        match message.WhichOneof("message"):
            case "register":
                self.worker, self._tries = message.register.worker_id, 0
                about = {"worker": self.worker, "name": self._settings.livekit_name}
                log.info("registered at LiveKit", extra={"about": about})
                if self._jobs:  # of an earlier line
                    self._say(migrate_job=agent.MigrateJobRequest(job_ids=list(self._jobs)))
                self._news.set()
            case "availability":
                job = message.availability.job
                if job.id in self._jobs:  # it runs here already
                    self._answer(job)
                    return
                task = self._jobs[job.id] = asyncio.create_task(self._take(job))
                task.add_done_callback(lambda _: (self._jobs.pop(job.id), self._news.set()))
            case "assignment":
                waiting = self._assigned.get(message.assignment.job.id)
                if waiting is not None and not waiting.done():
                    waiting.set_result(message.assignment)
            case "termination":
                if (task := self._jobs.get(message.termination.job_id)) is not None:
                    task.cancel()

    # ---- a job

    def _answer(self, job: agent.Job, wanted: Job | None = None) -> None:
        """Yes, with how the avatar is to appear in the room; or no."""
        answer = agent.AvailabilityResponse(job_id=job.id, available=wanted is not None)
        if wanted is not None:
            answer.participant_identity = wanted.identity
            if wanted.agent:
                answer.participant_attributes[BEHALF] = wanted.agent
        self._say(availability=answer)

    async def _take(self, job: agent.Job) -> None:
        """A job, from the question to its end. Whatever becomes of it, its session ends with it."""
        session, status, wrong = None, agent.JobStatus.JS_FAILED, ""
        waiting = self._assigned[job.id] = asyncio.get_running_loop().create_future()
        try:
            wanted, session, wrong = await self._open(job)
            self._answer(job, wanted)
            if wanted is None or (assigned := await self._assignment(waiting)) is None:
                return
            if session is not None:
                self._tell(job, agent.JobStatus.JS_RUNNING)
                status, wrong = await self._appear(session, assigned)
        except asyncio.CancelledError:
            status = agent.JobStatus.JS_SUCCESS  # LiveKit ends it
        except Exception:
            log.exception("a job failed")
            wrong = "something went wrong here; it is in the server's log"
        finally:
            del self._assigned[job.id]
            if session is not None:
                self._front.sessions.close(session, "done")
        self._tell(job, status, wrong)
        about = {"job": job.id, "status": agent.JobStatus.Name(status), "detail": wrong}
        log.info("a job ended", extra={"about": about})

    async def _open(self, job: agent.Job) -> tuple[Job | None, Session | None, str]:
        """What is wanted, and a session for it or what is wrong with it. No job where another
        machine may have the place that is missing here."""
        wanted = read("")
        try:
            wanted = read(job.metadata)
            async with asyncio.timeout(ANSWER):
                return wanted, await self._front.open(wanted), ""
        except (Problem, LiveAvatarError) as error:
            missing = isinstance(error, Problem) and error.after is not None
            return None if missing else wanted, None, str(error)
        except TimeoutError:
            return None, None, "the session did not open in time"

    async def _assignment(
        self, waiting: asyncio.Future[agent.JobAssignment]
    ) -> agent.JobAssignment | None:
        try:
            return await asyncio.wait_for(waiting, ASSIGNED)
        except TimeoutError:
            log.warning("LiveKit asked for a session, and did not take it")
            return None

    async def _appear(
        self, session: Session, assigned: agent.JobAssignment
    ) -> tuple[agent.JobStatus, str]:
        """In the room, until the session ends or nobody is there for it."""
        url = assigned.url or self._settings.livekit_url
        try:
            await asyncio.shield(await self._front.join(session, url, assigned.token))
        except Problem as error:
            return agent.JobStatus.JS_FAILED, error.detail
        self._front.sessions.close(session, "left")
        if REASONS[session.reason][1]:
            return agent.JobStatus.JS_FAILED, f"the session has ended: {session.reason}"
        return agent.JobStatus.JS_SUCCESS, ""

    def _tell(self, job: agent.Job, status: agent.JobStatus, wrong: str = "") -> None:
        self._say(update_job=agent.UpdateJobStatus(job_id=job.id, status=status, error=wrong))


def read(metadata: str) -> Job:
    """Raises LiveAvatarError, with the field that is wrong."""
    try:
        return Job.model_validate_json(metadata or "{}")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["metadata", *map(str, first["loc"])])
        raise LiveAvatarError(f"{where}: {first['msg'].lower()}"[:300]) from None
