"""The front: HTTP, WebSockets and the page. It holds no model and never imports JAX."""

import asyncio
import base64
import binascii
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import ipaddress
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import (
    Depends,
    FastAPI,
    Header,
    Query,
    Request,
    Response,
    WebSocket,
    WebSocketDisconnect,
)
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import Headers

from liveavatar_jax.data import marks
from serve import jobs, lite, rtc
from serve.answers import Limited, handle
from serve.asked import Consent, Create, Ends, Face, Wanted
from serve.auth import Auth, Bucket, Denied, Grant, bearer
from serve.link import Link, engine
from serve.metrics import Metrics
from serve.pictures import portrait
from serve.session import Limits, Problem, Session
from serve.sessions import Sessions, lasting
from serve.settings import Settings
from serve.socket import MEDIA, RATES, Socket
from serve.wire import FPS, RATE

log = logging.getLogger("serve.front")

PAGE = Path(__file__).parent / "page"
PORTRAITS = PAGE / "portraits"
LEAVES = 5.0  # seconds that rooms have to be left
SMALL = 20_000  # bytes of a request of the LITE kind
BACKEND = Grant()
AUTHENTICATING = 10.0  # seconds that a socket may stay without a token
PROTOCOL = "avatar.v1"


class Front:
    """What the routes share."""

    def __init__(self, settings: Settings):
        self.settings, self.metrics = settings, Metrics()
        self.auth = Auth(settings.keys, settings.secret or None)
        command = engine(settings.command())
        workers = [functools.partial(Link, command, sees=settings.sees(number))
                   for number in range(settings.workers)]  # fmt: skip
        mark = marks.badge if settings.badge else None
        self.sessions = Sessions(workers, settings.limits, self.metrics, mark=mark)
        self.rtc, self.jobs = rtc.Calls(settings), jobs.Jobs(settings)
        self.rooms: set[asyncio.Task] = set()
        self.dispatch = None
        if settings.livekit_url:  # the import takes seconds, and an extra
            self.dispatch = importlib.import_module("serve.dispatch").Dispatch(self)
        self.asked = Bucket(settings.rate, max(5.0, 5 * settings.rate))
        self.beat = time.monotonic()

    async def run(self) -> None:
        """For ever. If a part of it fails, the rest ends with it, and `/livez` says so."""
        try:
            async with asyncio.TaskGroup() as group:
                parts = (self.sessions, self.jobs, self.rtc)
                for job in (*(part.run() for part in parts), self._beat()):
                    group.create_task(job)
                if self.dispatch is not None:
                    group.create_task(self.dispatch.run())
        except Exception:
            log.exception("the server cannot go on")
            raise

    async def _beat(self) -> None:
        """So that a hung event loop shows."""
        while True:
            self.beat = time.monotonic()
            await asyncio.sleep(0.5)

    def calm(self, request: Request, what: str) -> None:
        """Raises Problem where an address asks for more of something than `rate` a second."""
        address = request.client.host if request.client else ""
        if (wait := self.asked.take(f"{what} {address}", time.monotonic())) > 0:
            raise Problem(429, "too-many-requests", f"fewer {what} a second, please", wait)

    def may(self, method: str, path: str, headers: Headers) -> None:
        """Raises Denied, or Problem, for requests of which not even the body is read. A server
        without keys is this machine's alone, but pages from anywhere run in its browsers."""
        settings, host = self.settings, headers.get("host", "")
        if settings.keys:
            if method == "POST" and path in ("/v1/sessions", "/v1/videos"):
                self.auth.backend(headers.get("authorization"))
            claimed = headers.get("content-length", "0")
            if path.startswith(lite.PATH) and claimed.isdigit() and int(claimed) > SMALL:
                raise Problem(413, "too-large", f"a request has at most {SMALL} bytes here")
            return
        known = {place(origin) for origin in settings.origins}
        name = place(f"//{host}", port=False)
        if host not in known and name != settings.host and not local(name):
            detail = (f"this server has no keys and answers to this machine alone; to let "
                      f"{name[:64]!r} in, name it in origins")  # fmt: skip
            raise Problem(403, "foreign-host", detail)
        origin = headers.get("origin")
        if (
            origin
            and method not in ("GET", "HEAD", "OPTIONS")
            and (place(origin) not in known | {host})
        ):
            detail = f"pages of {origin[:64]!r} may not call; name them in origins"
            raise Problem(403, "foreign-origin", detail)

    async def create(self, wanted: Create) -> dict[str, Any]:
        """A session: what its caller is told. Raises Problem."""
        if (wanted.transport == "livekit") != (wanted.livekit is not None):
            detail = "transport livekit and livekit {url, token} go together"
            raise Problem(422, "bad-input", detail)
        if wanted.livekit is not None and (wanted.live or wanted.idle != "generate"):
            raise Problem(422, "bad-input", "in a room, live is false and idle is generate")
        if wanted.size is not None and (ready := self.sessions.ready) is not None:
            only = f"{ready.width}*{ready.height}"
            if wanted.size != only:
                detail = f"size {wanted.size}: this server is compiled for {only} alone"
                raise Problem(422, "no-such-size", detail)
        session = await self.open(
            wanted, live=wanted.live, idle=wanted.idle, limits=self._limits(wanted.limits),
            rate=wanted.input.sample_rate, metadata=wanted.metadata,
        )  # fmt: skip
        if wanted.livekit is not None:
            await self.join(session, wanted.livekit.url, wanted.livekit.token)
        return self.told(session) | self._tokens(session)

    async def open(self, wanted: Wanted, **more: Any) -> Session:
        """A session that is open; more: as `Sessions.create` has it. Raises Problem, or
        LiveAvatarError for what is no portrait."""
        face = self._face(wanted.avatar)
        make = functools.partial(portrait, face)
        session = await self.sessions.create(make, wanted.prompt, seed=wanted.seed, **more)
        if wanted.avatar.consent is not None:
            agreed(wanted.avatar.consent, face, session=session.id)
        return session

    async def join(
        self, session: Session, url: str, token: str, elsewhere: bool = False
    ) -> asyncio.Task[None]:
        """Takes a session into a room of LiveKit; the task ends when it is out of it. `elsewhere`
        as there. Raises Problem, or LiveAvatarError without the extra; then there is no session."""
        session.roomed = True
        try:
            # In a thread: the import takes seconds, and other sessions go on.
            livekit = await asyncio.to_thread(importlib.import_module, "serve.livekit")
            joined = await livekit.join(session, url, token, elsewhere=elsewhere)
        except BaseException as error:
            self.sessions.close(session, "refused", str(error))
            raise
        self.rooms.add(joined)
        joined.add_done_callback(self.rooms.discard)
        return joined

    def told(self, session: Session, grant: Grant = BACKEND) -> dict[str, Any]:
        """What a caller is told; who only watches is told less."""
        ready, limits = session.ready, session.limits
        frame_ms = 1000 / FPS
        return {
            "id": session.id,
            "state": session.state,
            "model": ready.model,
            "fps": FPS,
            "size": [ready.width, ready.height],
            "sample_rate": RATE,
            "block_ms": round(ready.frames * frame_ms),
            "ahead_ms": round(1000 * ready.ahead / RATE),
            "input": {"sample_rate": session.rate},
            **(
                {}
                if grant.role == "viewer"
                else {"metadata": session.metadata, "prompt": session.prompt}
            ),
            "idle": session.timeline.idle,
            "lookahead_blocks": session.lookahead,
            "limits": {"max_s": limits.longest, "idle_s": limits.idle, "grace_s": limits.grace},
            "marks": {"badge": self.settings.badge, "c2pa": False},  # of files alone
            "urls": {
                "session": f"/v1/sessions/{session.id}",
                "events": f"/v1/sessions/{session.id}/events",
                "rtc": f"/v1/sessions/{session.id}/rtc",
                "whip": f"/v1/sessions/{session.id}/rtc",
                "whep": f"/v1/sessions/{session.id}/whep",
            },
            "ice_servers": self.rtc.servers(session),
        }

    def _tokens(self, session: Session) -> dict[str, Any]:
        seconds = lasting(session.limits)
        return {
            "client_token": self.auth.token(session.id, seconds),
            "viewer_token": self.auth.token(session.id, seconds, "viewer"),
            "expires_at": round(time.time() + session.limits.longest),
        }

    def _limits(self, wanted: Ends) -> Limits:
        """Raises Problem for more than the server gives."""
        given, ours = wanted.model_dump(exclude_none=True), self.settings.limits
        for name, most in (("max_s", ours.longest), ("idle_s", ours.idle)):
            if given.get(name, most) > most:
                detail = f"limits.{name} is at most {most:g} here"
                raise Problem(422, "bad-input", detail)
        return dataclasses.replace(
            ours, longest=given.get("max_s", ours.longest), idle=given.get("idle_s", ours.idle)
        )

    def portrait(self, name: str | None) -> bytes:
        """The file of a portrait that is offered, the first one by default. Raises Problem."""
        known = portraits()
        name = name or next(iter(known))
        if name not in known:
            raise Problem(404, "no-such-portrait",
                          f"there is no portrait {name[:64]!r}; see /v1/presets")  # fmt: skip
        return known[name].read_bytes()

    def takes_uploads(self, consent: Consent | None = None) -> None:
        """Raises Problem where callers may not bring portraits, or not without consent."""
        if not self.settings.takes_uploads:
            raise Problem(403, "no-uploads", "this server takes no portraits of its callers")
        if self.settings.consent and consent is None:
            raise Problem(403, "no-consent", "say in `consent` who agreed to this portrait")

    def consented(self, said: str) -> Consent | None:
        """The consent in a form's field, as JSON. Raises Problem as `takes_uploads` does."""
        try:
            consent = Consent.model_validate_json(said) if said else None
        except ValueError:
            detail = 'consent is {"who": …, "when": …, "proof": …} in JSON'
            raise Problem(400, "bad-input", detail) from None
        self.takes_uploads(consent)
        return consent

    def _face(self, face: Face) -> bytes:
        """The file of a portrait. Raises Problem."""
        if face.image is None:
            return self.portrait(face.id)
        self.takes_uploads(face.consent)
        try:
            return base64.b64decode(face.image.partition("base64,")[2] or face.image, validate=True)
        except (binascii.Error, ValueError):
            raise Problem(400, "bad-input", "avatar.image is a picture file in base64") from None


def place(address: str, port: bool = True) -> str:
    """Host and port of an address; empty where it is none."""
    try:
        found = urlsplit(address)
        return (found.netloc if port else found.hostname) or ""
    except ValueError:
        return ""


def local(name: str) -> bool:
    """Whether a host's name is this machine's own."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def agreed(consent: Consent, face: bytes, **of: str) -> None:
    """Keeps the record of a consent: in the log, with the portrait's hash and what it is for."""
    record = consent.model_dump() | {"face": hashlib.sha256(face).hexdigest()} | of
    log.info("consent", extra={"about": record})


def portraits() -> dict[str, Path]:
    """Those that the page offers, by name."""
    return {path.stem: path for path in sorted(PORTRAITS.glob("*.png"))}


def make(settings: Settings) -> FastAPI:
    """The application. Its engines start and end with it."""
    front = Front(settings)

    @contextlib.asynccontextmanager
    async def living(app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(front.run())
        yield
        await front.sessions.drain(0.0)
        await front.rtc.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVES):
                await asyncio.gather(*front.rooms)
        if front.dispatch is not None:
            await front.dispatch.leave()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    app = FastAPI(title="liveavatar-jax serve", version="1", lifespan=living, redoc_url=None)
    app.state.front = front
    app.add_middleware(Limited, most=settings.max_body, may=front.may)
    if settings.origins:
        from starlette.middleware.cors import CORSMiddleware

        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["*"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["location", "link", "etag", "retry-after"],
        )  # fmt: skip
    handle(app)
    _operations(app, front)
    _sessions(app, front)
    _page(app, front)
    compatible = lite.make(front)
    handle(compatible, lite.problem)
    app.mount(lite.PATH, compatible)
    return app


# ---- routes


def _operations(app: FastAPI, front: Front) -> None:
    settings, sessions = front.settings, front.sessions

    def operator(authorization: Annotated[str | None, Header()] = None) -> Grant:
        return front.auth.backend(authorization)

    @app.get("/livez")
    async def livez() -> Response:
        late = time.monotonic() - front.beat
        return JSONResponse({"ok": late < 5, "late_s": round(late, 1)}, 200 if late < 5 else 503)

    @app.get("/readyz")
    async def readyz() -> Response:
        """Ready is warm; on the way there, how far it is."""
        health = [worker.link.health for worker in sessions.workers]
        ready = sessions.ready is not None and not sessions.draining
        said = {"ready": ready, "draining": sessions.draining, "free": sessions.free, "engines": [
            {"state": x.state, "stage": x.stage, "done": x.done, "restarts": x.restarts}
            for x in health
        ]}  # fmt: skip
        return JSONResponse(said, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics(_: Annotated[Grant, Depends(operator)]) -> Response:
        return Response(generate_latest(front.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/status")
    async def status(_: Annotated[Grant, Depends(operator)]) -> dict[str, Any]:
        return {"sessions": {name: session.stats() for name, session in sessions.all.items()},
                "free": sessions.free, "draining": sessions.draining,
                "livekit": front.dispatch and front.dispatch.worker}  # fmt: skip

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        ready = sessions.ready
        data = [] if ready is None else [{
            "id": ready.model, "object": "model", "size": [ready.width, ready.height],
            "block_ms": round(1000 * ready.frames / FPS), "slots": ready.slots * settings.workers,
        }]  # fmt: skip
        return {"object": "list", "data": data}

    @app.get("/v1/presets")
    def presets() -> dict[str, Any]:
        data = [{"id": name, "image": f"/v1/presets/{name}.png"} for name in portraits()]
        return {"object": "list", "data": data, "uploads": settings.takes_uploads,
                "consent": settings.consent, "key": bool(settings.keys)}  # fmt: skip

    @app.get("/v1/presets/{name}.png")
    def preset(name: str) -> Response:
        if name not in portraits():
            raise Problem(404, "no-such-portrait", f"there is no portrait {name[:64]!r}")
        return FileResponse(portraits()[name], media_type="image/png")


def _sessions(app: FastAPI, front: Front) -> None:
    sessions, auth = front.sessions, front.auth

    def caller(request: Request, session: str) -> Grant:
        if not auth.keys and request.headers.get("authorization") is None:
            return Grant()
        grant = auth.caller(bearer(request.headers.get("authorization")))
        grant.check(session, speak=False)
        return grant

    Caller = Annotated[Grant, Depends(caller)]

    @app.post("/v1/sessions", status_code=201)
    async def create(wanted: Create, request: Request, response: Response) -> dict[str, Any]:
        auth.backend(request.headers.get("authorization"))
        front.calm(request, "sessions")
        said = await front.create(wanted)
        response.headers["location"] = said["urls"]["session"]
        return said

    @app.get("/v1/sessions/{session}")
    async def show(session: str, grant: Caller) -> dict[str, Any]:
        found = sessions.get(session)
        return front.told(found, grant) | {"stats": found.stats()}

    @app.delete("/v1/sessions/{session}")
    async def delete(session: str, grant: Caller) -> dict[str, Any]:
        """Also of one that has ended: the answer is the same."""
        grant.check(session)
        found = sessions.all.get(session)
        if found is None:
            return {"id": session, "state": "closed"}
        stats = found.stats()
        sessions.close(found, "done")
        return {"id": session, "state": "closed", "stats": stats}

    @app.websocket("/v1/sessions/{session}/events")
    async def events(
        ws: WebSocket, session: str, media: Annotated[str, Query()] = "none",
        rate: Annotated[int | None, Query()] = None,
    ) -> None:  # fmt: skip
        offered = [name.strip() for name in ws.headers.get("sec-websocket-protocol", "").split(",")]
        await ws.accept(subprotocol=PROTOCOL if PROTOCOL in offered else None)
        try:
            grant = await _admitted(ws, auth, offered)
            grant.check(session, speak=False)
            if media not in MEDIA or rate not in (None, *RATES):
                raise Problem(400, "bad-input", f"media is one of {', '.join(MEDIA)}, rate one of "
                              f"{', '.join(map(str, RATES))}")  # fmt: skip
            found = sessions.get(session)
            socket = Socket(ws, found, media, rate or found.rate, grant.role != "viewer")
            socket.tell({"type": "session.ready", **front.told(found, grant), "epoch":
                         found.timeline.epoch})  # fmt: skip
            await socket.run()
        except Denied as error:
            await _cut(ws, 1008, "denied", str(error))
        except Problem as error:
            code = 1013 if error.after is not None else 1008
            await _cut(ws, code, error.kind, error.detail)

    rtc.routes(app, front.rtc, sessions, caller, front.calm)

    def backend(request: Request) -> Grant:
        return auth.backend(request.headers.get("authorization"))

    jobs.routes(app, front.jobs, front.consented, agreed, front.portrait, backend, front.calm)


async def _admitted(ws: WebSocket, auth: Auth, offered: list[str]) -> Grant:
    """By header, by subprotocol (token.JWT) or by a first message {type: auth, token}; never by
    address, which logs keep. Raises Denied."""
    token = bearer(ws.headers.get("authorization"))
    token = token or next((x[6:] for x in offered if x.startswith("token.")), None)
    if token is None:
        try:
            said = await asyncio.wait_for(ws.receive_text(), AUTHENTICATING)
            token = json.loads(said)["token"]
        except Exception:
            raise Denied("the first message is {type: auth, token: ...}") from None
    return auth.caller(token if isinstance(token, str) else None)


async def _cut(ws: WebSocket, code: int, kind: str, detail: str) -> None:
    with contextlib.suppress(RuntimeError, WebSocketDisconnect):
        await ws.send_json({"type": "error", "error": kind, "detail": detail,
                            "retryable": code == 1013})  # fmt: skip
        await ws.close(code, kind)


def _page(app: FastAPI, front: Front) -> None:
    @app.get("/", include_in_schema=False)
    def index() -> HTMLResponse:
        return HTMLResponse((PAGE / "index.html").read_text(), headers={
            "content-security-policy": "default-src 'self'; img-src 'self' blob: data:; "
            "media-src 'self' blob: mediastream:; style-src 'self' 'unsafe-inline'; "
            "script-src 'self' 'unsafe-inline' blob:; connect-src 'self' ws: wss:; "
            "frame-ancestors 'none'",
            "permissions-policy": "microphone=(self)",
            "referrer-policy": "no-referrer",
        })  # fmt: skip
