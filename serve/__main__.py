"""`python -m serve`: the server, from flags to the last session."""

import json
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

import uvicorn

from liveavatar_jax.types import LiveAvatarError
from serve import front, settings

MESSAGE = 1 << 20  # bytes of a WebSocket message


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
    """One that lets sessions finish: the first signal drains, the second one ends."""

    def __init__(self, config: uvicorn.Config, drain: float):
        super().__init__(config)
        self._drain, self._front = drain, config.app.state.front  # type: ignore[union-attr]

    async def shutdown(self, sockets: Any = None) -> None:
        if not self.force_exit:
            seconds = self._drain if self._front.sessions.all else 0.0
            await self._front.sessions.drain(seconds)
        await super().shutdown(sockets)


def main(argv: Sequence[str] | None = None) -> int:
    handler = logging.StreamHandler()
    handler.setFormatter(Lines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("aioice", "aiortc", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        chosen = settings.read(argv)
    except LiveAvatarError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    config = uvicorn.Config(
        front.make(chosen), chosen.host, chosen.port, log_config=None, ws_max_size=MESSAGE,
        timeout_graceful_shutdown=5,
    )  # fmt: skip
    print(f"http://{chosen.host}:{chosen.port} (engine: {chosen.engine})", file=sys.stderr)
    server = Server(config, chosen.drain)
    signal.signal(signal.SIGTERM, server.handle_exit)
    server.run()
    return 0 if server.started else 2


if __name__ == "__main__":
    sys.exit(main())
