"""What callers are told: problems as RFC 9457 has them, and the limits of a request."""

import asyncio
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from liveavatar_jax.types import LiveAvatarError
from serve.auth import Denied
from serve.session import Problem

TYPE = "https://liveavatar-jax.invalid/problems/"  # names, not addresses
BODY, SLOWEST = 30.0, 20_000  # seconds that a body may take, and one more for so many bytes


def told(status: int, kind: str, detail: str, after: float | None = None) -> JSONResponse:
    said = {"type": TYPE + kind, "title": kind.replace("-", " "), "status": status,
            "detail": detail, "retryable": after is not None}  # fmt: skip
    headers = {} if after is None else {"retry-after": str(max(1, round(after)))}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 408:
        headers["connection"] = "close"
    return JSONResponse(said, status, headers, media_type="application/problem+json")


def handle(app: FastAPI, answer: Callable[..., Response] = told) -> None:
    @app.exception_handler(Problem)
    def problem(request: Request, error: Problem) -> Response:
        return answer(error.status, error.kind, error.detail, error.after)

    @app.exception_handler(Denied)
    def denied(request: Request, error: Denied) -> Response:
        return answer(403 if error.known else 401, "denied", str(error))

    @app.exception_handler(LiveAvatarError)
    def bad(request: Request, error: LiveAvatarError) -> Response:
        return answer(400, "bad-input", str(error))

    @app.exception_handler(RequestValidationError)
    def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
        return answer(422, "bad-input", f"{where}: {first['msg'].lower()}"[:300])

    @app.exception_handler(HTTPException)
    def other(request: Request, error: HTTPException) -> Response:
        kind = {408: "too-slow", 413: "too-large"}.get(error.status_code, "http")
        said = answer(error.status_code, kind, str(error.detail))
        said.headers.update(error.headers or {})
        return said

    @app.exception_handler(Exception)
    def broken(request: Request, error: Exception) -> Response:
        return answer(500, "broken", "something went wrong here; it is in the server's log")


class Limited:
    """Refuses who may not ask before anything of a body is read; bodies of more than so many bytes,
    also those that do not say so; and those of which too little comes, which would hold their line
    and their memory for ever. may: raises Problem or Denied for a method, a path and headers."""

    def __init__(self, app: Any, most: int, may: Callable[[str, str, Headers], None]):
        self.app, self.most, self.may = app, most, may

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            self.may(scope.get("method", "WS"), scope["path"], Headers(scope=scope))
        except Denied as error:
            await told(401, "denied", str(error))(scope, receive, send)
            return
        except Problem as error:
            await told(error.status, error.kind, error.detail, error.after)(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await self.app(scope, receive, send)
            return
        detail = f"a request has at most {self.most} bytes"
        claimed = dict(scope["headers"]).get(b"content-length", b"0")
        if not claimed.isdigit() or int(claimed) > self.most:
            await told(413, "too-large", detail)(scope, receive, send)
            return
        seen, more, begun = 0, True, asyncio.get_running_loop().time()

        async def counted() -> Any:
            nonlocal seen, more
            try:
                end = begun + BODY + seen / SLOWEST
                async with asyncio.timeout_at(end if more else None):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the body of this request came too slowly") from None
            seen, more = seen + len(message.get("body", b"")), message.get("more_body", False)
            if seen > self.most:
                raise HTTPException(413, detail)  # no other exception comes through FastAPI
            return message

        await self.app(scope, counted, send)
