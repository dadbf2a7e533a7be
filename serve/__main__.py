"""`python -m serve`: the server, from flags to the last session."""

import asyncio
import json
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Sequence
from typing import Any

import uvicorn

from liveavatar_jax.types import LiveAvatarError
from serve import front, settings
from serve.lines import Paced

MESSAGE = 1 << 20  # bytes of a WebSocket message
GOODBYE = 2.0  # seconds in which those whose session ends are told why
PING, PONG = 10.0, 10.0  # seconds between two pings of a WebSocket, and until who is silent is cut
MUTE = 30.0  # seconds that a line may be open without a whole request
LINES = 1000  # connections, and requests under way
UNREAD = 30.0  # seconds that what was sent may go unread, before the kernel cuts the line


class Lines(logging.Formatter):
    """One JSON object a line; no faces, no sound."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": self.formatTime(record), "level": record.levelname.lower(),
            "what": record.name, "says": record.getMessage(),
        }  # fmt: skip
        said |= getattr(record, "about", {})
        if record.exc_info:
            said["error"] = self.formatException(record.exc_info)
        return json.dumps(said)


class Server(uvicorn.Server):
    """One that lets sessions finish: the first signal drains, the second one ends them. Lines on
    which nothing comes any more are cut, whether the other side says that it goes or not.

    Raises LiveAvatarError for settings that cannot be had.
    """

    def __init__(self, chosen: settings.Settings):
        app = front.make(chosen)
        secured = _secured(chosen)
        super().__init__(uvicorn.Config(
            app, chosen.host, chosen.port, log_config=None, ws_max_size=MESSAGE,
            ws_per_message_deflate=False, ws_ping_interval=PING, ws_ping_timeout=PONG,
            timeout_graceful_shutdown=5, http="h11",  # the other parser takes headers without end
            ws=Paced, limit_concurrency=LINES, loop="asyncio",  # which `Paced` and `--udp` need
            **secured,
        ))  # fmt: skip
        self._drain, self._front = chosen.drain, app.state.front
        self._hurried = False
        self._mute: dict[Any, tuple[Any, float]] = {}  # line: its last request, and since when

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        option = getattr(socket, "TCP_USER_TIMEOUT", None)
        if option is None:
            return
        for one in (one for server in self.servers for one in server.sockets):
            with socket.socket(fileno=os.dup(one.fileno())) as same:  # lines inherit it
                same.setsockopt(socket.IPPROTO_TCP, option, round(1000 * UNREAD))

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # ticks are 0.1 s
            self._cut()
        return await super().on_tick(counter)

    def _cut(self) -> None:
        """Whose request is not whole, or never begins: uvicorn alone waits for ever."""
        now, before, self._mute = time.monotonic(), self._mute, {}
        for line in list(self.server_state.connections):
            asked = getattr(line, "cycle", ...)
            if asked is ... or (asked is not None and not asked.response_complete):
                continue  # a WebSocket, which has pings; or an answer is under way
            last, since = before.get(line, (asked, now))
            self._mute[line] = asked, since if last is asked else now
            if now - self._mute[line][1] > MUTE:
                line.transport.close()

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.should_exit and not self._hurried:
            self._hurried = True
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: Any = None) -> None:
        sessions = self._front.sessions
        drain = asyncio.create_task(sessions.drain(self._drain if sessions.all else 0.0))
        while not (drain.done() or self._hurried):
            await asyncio.wait((drain,), timeout=0.1)
        await sessions.drain(0.0)
        end = time.monotonic() + GOODBYE
        while self.server_state.tasks and time.monotonic() < end:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)


def _secured(chosen: settings.Settings) -> dict[str, Any]:
    """Options of uvicorn for https://. Raises LiveAvatarError for files that are no such pair."""
    if not chosen.tls_certificate:
        return {}
    chain, key = chosen.tls_certificate, chosen.tls_key
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(chain, key)
    except OSError as error:  # SSLError is one
        said = str(error.strerror or error).lower()
        raise LiveAvatarError(f"tls_certificate {chain} with tls_key {key}: {said}") from None
    return {"ssl_certfile": chain, "ssl_keyfile": key}


def main(argv: Sequence[str] | None = None) -> int:
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("aioice", "aiortc", "livekit", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        chosen = settings.read(argv)
        server = Server(chosen)
    except LiveAvatarError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    scheme = "https" if chosen.tls_certificate else "http"
    print(f"{scheme}://{chosen.host}:{chosen.port} (engine: {chosen.engine})", file=sys.stderr)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again at its end
        signal.signal(number, server.handle_exit)
    server.run()
    return 0 if server.started else 2


if __name__ == "__main__":
    sys.exit(main())
