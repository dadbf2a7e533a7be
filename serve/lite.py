"""Routes and a WebSocket as agents of the LITE kind know them, for clients that speak it already.

A backend takes a token (`/token`, X-API-KEY) for an avatar and a room of LiveKit, and starts the
session with it (`/start`): the avatar enters the room. Speech comes over the WebSocket that the
answer names, as `agent.speak`; picture and sound are in the room. `/keep-alive` and `/stop` go on.
"""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import hmac
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Header, Request, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from liveavatar_jax.data.prompt import PROMPT
from serve.auth import Denied, Grant, bearer
from serve.pictures import portrait
from serve.session import Problem, Session
from serve.sessions import lasting
from serve.socket import Socket

if TYPE_CHECKING:
    from serve.front import Front

PATH = "/compat/lite"
RATE = 24_000  # of speech
ROUNDED = 0.02  # seconds by which what was shown may fall short of what was said
OK = 100  # `code` of an answer; that of an error is its status


class Place(BaseModel):
    """A room of LiveKit, and the token that lets the avatar in."""

    livekit_url: str = Field(max_length=500, pattern="^wss?://")
    livekit_client_token: str = Field(max_length=8000)


class Wanted(BaseModel):
    """Of `/token`; what is not here makes no difference."""

    mode: str = "LITE"
    avatar_id: str = Field(max_length=64)
    livekit_config: Place


class Which(BaseModel):
    session_id: str | None = None


@dataclasses.dataclass
class Booked:
    """A session that has a token. ticket: opens its WebSocket once, for its address is in logs."""

    place: Place
    entering: asyncio.Task | None = None
    ticket: str = ""

    def opens(self, ticket: str) -> bool:
        return hmac.compare_digest(self.ticket.encode(), ticket.encode("utf-8", "replace"))


class Line(Socket):
    """The WebSocket of a session. A speech is what comes up to `agent.speak_end`; it is started
    once and ended once, also where it came so late that there was silence in it."""

    def __init__(self, ws: WebSocket, session: Session):
        super().__init__(ws, session, "none", RATE, True)
        self._forget()
        self._state("connecting")

    def _forget(self) -> None:
        self._said: collections.deque[float] = collections.deque()  # seconds of speeches, in order
        self._open = False  # whether the last of them goes on
        self._started, self._played = False, 0.0  # the first of them; seconds of it

    async def connect(self) -> None:
        """Says so when somebody is there in the room."""
        while not any(viewer.watching for viewer in self._session.viewers):
            await asyncio.sleep(0.05)
        self._state("connected")

    # ---- in

    def _does(self) -> dict[str, Callable[[dict[str, Any]], None]]:
        return {
            "agent.speak": self._append,
            "agent.speak_end": lambda said: self._over(),
            "agent.interrupt": lambda said: self._interrupt(),
            "agent.start_listening": lambda said: None,
            "agent.stop_listening": lambda said: None,
            "session.keep_alive": lambda said: self._session.keep(),
        }

    def _heard(self, samples: np.ndarray, epoch: int | None = None) -> None:
        super()._heard(samples, epoch)
        if not self._open:
            self._said.append(0.0)
            self._open = True
        self._said[-1] += len(samples) / RATE

    def _over(self) -> None:
        self._open = False
        super()._over()  # which says the resampler's rest: so the end of a speech is still to come

    # ---- out

    def tell(self, event: dict[str, Any]) -> None:
        match event:
            case {"type": "speech.started"} if not self._started:
                self._started = True
                super().tell({"type": "agent.speak_started"})
            case {"type": "speech.ended", "interrupted": False, "played_ms": played}:
                self._played += played / 1000
                self._shown()
            case {"type": "audio.cleared"}:
                super().tell({"type": "agent.speak_interrupted"})
                if self._started:  # else clients take the next speech for the rest of this one
                    super().tell({"type": "agent.speak_ended"})
                self._forget()
            case {"type": "session.closed"}:
                self._state("closing")
                self._state("closed")

    def _shown(self) -> None:
        """Ends the first speech, if all of it was said and shown."""
        if self._open and len(self._said) == 1:
            return
        left = self._said[0] - self._played if self._said else 0.0
        if self._started and left < ROUNDED:
            if self._said:
                self._said.popleft()
            self._started, self._played = False, 0.0
            super().tell({"type": "agent.speak_ended"})

    def _state(self, state: str) -> None:
        super().tell({"type": "session.state_updated", "state": state})

    def _error(self, kind: str, detail: str, retryable: bool = False) -> None:
        super().tell({"type": "error", "error": _said(kind, detail)})


def make(front: "Front") -> FastAPI:
    """To be mounted at `PATH`; its errors are answered as `problem` says."""
    auth, sessions = front.auth, front.sessions
    booked: dict[str, Booked] = {}

    def backend(x_api_key: Annotated[str | None, Header()] = None) -> Grant:
        if auth.keys and x_api_key is None:
            raise Denied("no key; send X-API-KEY: KEY")
        return auth.backend(f"Bearer {x_api_key}")

    def named(
        which: Which | None = None, authorization: Annotated[str | None, Header()] = None,
        x_api_key: Annotated[str | None, Header()] = None,
    ) -> str:  # fmt: skip
        """The session of the token, or the one that a backend names."""
        token = bearer(authorization)
        by_key = token is None and x_api_key is not None
        grant = backend(x_api_key) if by_key else auth.caller(token)
        name = (which and which.session_id) or grant.session
        if name is None:
            raise Problem(422, "bad-input", "session_id: say which session")
        grant.check(name)
        return name

    Named = Annotated[str, Depends(named)]
    routes = APIRouter()

    @routes.post("/token")
    async def token(
        wanted: Wanted, request: Request, _: Annotated[Grant, Depends(backend)]
    ) -> dict[str, Any]:
        for gone in booked.keys() - sessions.all.keys():
            del booked[gone]
        if wanted.mode != "LITE":
            raise Problem(422, "bad-input", "mode: LITE is the only one here")
        front.calm(request, "sessions")
        face = front.portrait(wanted.avatar_id)
        session = await sessions.create(functools.partial(portrait, face), PROMPT)
        booked[session.id] = Booked(wanted.livekit_config)
        ticket = auth.token(session.id, lasting(session.limits))
        return _done(session_id=session.id, session_token=ticket)

    @routes.post("/start")
    async def start(name: Named, request: Request) -> dict[str, Any]:
        """Asked again, it says where the WebSocket is now."""
        session = sessions.get(name)
        if name not in booked:
            raise Problem(409, "no-room", "this session was not made with /token: it has no room")
        book = booked[name]
        if book.entering is None:
            book.entering = asyncio.create_task(enter(session, book.place))
        await asyncio.shield(book.entering)
        book.ticket = secrets.token_urlsafe(24)
        return _done(
            session_id=name, livekit_url=book.place.livekit_url, livekit_client_token=None,
            livekit_agent_token=None, max_session_duration=round(session.limits.longest),
            ws_url=str(request.url_for("speak", ticket=book.ticket)),
        )  # fmt: skip

    async def enter(session: Session, place: Place) -> None:
        room = await front.join(session, place.livekit_url, place.livekit_client_token,
                                elsewhere=True)  # fmt: skip
        room.add_done_callback(lambda _: sessions.close(session, "left"))

    @routes.post("/keep-alive")
    async def keep_alive(name: Named) -> dict[str, Any]:
        sessions.get(name).keep()
        return _done(session_id=name)

    @routes.post("/stop")
    async def stop(name: Named) -> dict[str, Any]:
        """Also of one that has ended: the answer is the same."""
        if name in sessions.all:
            sessions.close(sessions.all[name], "done")
        return _done(session_id=name)

    @routes.websocket("/ws/{ticket}")
    async def speak(ws: WebSocket, ticket: str) -> None:
        await ws.accept()
        try:
            name = next((name for name, book in booked.items() if book.opens(ticket)), None)
            if name is None:
                raise Problem(401, "denied", "this address was used; ask /start for another one")
            booked[name].ticket = ""
            line = Line(ws, sessions.get(name))
            connecting = asyncio.create_task(line.connect())
            try:
                await line.run()
            finally:
                connecting.cancel()
        except Problem as error:
            with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                await ws.send_json({"type": "error", "error": _said(error.kind, error.detail)})
                await ws.close(1008, error.kind)

    app = FastAPI(title="LITE-compatible", version="1", redoc_url=None)
    for prefix in ("", "/v1/sessions"):  # clients have either in the address that one tells them
        app.include_router(routes, prefix=prefix)
    return app


def _done(**data: Any) -> dict[str, Any]:
    return _said(OK, "success") | {"data": data}


def _said(code: int | str, message: str) -> dict[str, Any]:
    return {"code": code, "message": message}


def problem(status: int, kind: str, detail: str, after: float | None = None) -> JSONResponse:
    """An error, as such clients read it."""
    headers = {} if after is None else {"retry-after": str(max(1, round(after)))}
    return JSONResponse(_said(status, detail) | {"data": None}, status, headers)
