"""A real server in the test's own event loop, whose engine draws its frames; and who uses it."""

import asyncio
import contextlib
import dataclasses
import functools
import io
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import websockets
from PIL import Image

from serve.__main__ import Server
from serve.engine import Engine
from serve.link import Health
from serve.mock import Mock, read
from serve.session import Session
from serve.settings import Settings
from serve.socket import FRAME, SOUND
from serve.wire import RATE
from tests.processes import free_port

LONG = 40.0  # seconds, on a machine that has other things to do


def in_loop(test: Callable) -> Callable:
    """An async test, in a loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **more: Any) -> None:
        async def limited() -> None:
            async with asyncio.timeout(3 * LONG):
                await test(*args, **more)

        asyncio.run(limited())

    return run


async def until(ready: Callable[[], Any], seconds: float = LONG) -> Any:
    """What it returns, once that is true."""
    end = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < end, f"not in {seconds:.0f} s: {ready}"
        await asyncio.sleep(0.02)
    return found


def tone(seconds: float, hertz: float = 440.0, loud: int = 9000, rate: int = RATE) -> np.ndarray:
    """Without a sample that is 0."""
    wave = loud * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.where(np.abs(wave) < 1, 1, wave).astype(np.int16)


# ---- the server


class _Server(Server):
    @contextlib.contextmanager
    def capture_signals(self):
        yield


@dataclasses.dataclass
class Served:
    server: Server
    http: httpx.AsyncClient
    address: str  # host:port

    @property
    def front(self) -> Any:
        return self.server._front

    @property
    def free(self) -> int:
        return self.front.sessions.free

    async def create(self, key: str | None = None, **body: Any) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = await self.http.post("/v1/sessions", json=body, headers=headers)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def session(self, told: dict[str, Any]) -> Session:
        return self.front.sessions.all[told["id"]]

    def counted(self, name: str, **labels: str) -> float:
        return self.front.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.asynccontextmanager
async def serving(warm: bool = True, **options: Any) -> AsyncIterator[Served]:
    """Nothing of it is left at the end: no session, no task, no engine."""
    before = asyncio.all_tasks()
    # As busy as it likes: who calls takes time of the same loop.
    chosen = {"engine": "mock", "port": free_port(), "rate": 1000.0, "drain": 0.01,
              "busy": 100.0} | options  # fmt: skip
    server = _Server(Settings(**chosen))
    running = asyncio.create_task(server.serve())
    address = f"127.0.0.1:{chosen['port']}"
    try:
        async with httpx.AsyncClient(
            base_url=f"http://{address}", trust_env=False, timeout=LONG
        ) as http:
            served = Served(server, http, address)
            await until(lambda: server.started or running.done())
            workers = served.front.sessions.workers
            if warm:
                await until(lambda: all(worker.ready for worker in workers))
            yield served
    finally:
        server.should_exit = True
        await running
    assert not served.front.sessions.all
    assert all(worker.link.process is None for worker in workers)
    await until(lambda: not asyncio.all_tasks() - before)


# ---- a client


@dataclasses.dataclass(frozen=True)
class Frame:
    epoch: int
    first: int
    jpeg: bytes
    samples: np.ndarray

    @functools.cached_property
    def picture(self) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(self.jpeg)))

    @functools.cached_property
    def tag(self) -> dict[str, int]:
        """What is drawn into it."""
        return read(self.picture)


def parsed(message: str | bytes) -> dict[str, Any] | Frame | bytes:
    if isinstance(message, str):
        return json.loads(message)
    epoch, first, size = FRAME.unpack_from(message)
    jpeg, sound = message[FRAME.size : FRAME.size + size], message[FRAME.size + size :]
    return Frame(epoch, first, jpeg, np.frombuffer(sound, "<i2"))


class Line:
    """A WebSocket of a session, and all that came over it, in order."""

    def __init__(self, ws: Any, media: str):
        self.ws, self.media = ws, media
        self.came: list[Any] = []
        self.code: int | None = None  # once it is closed
        self.reason = ""
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(websockets.ConnectionClosed):
            async for message in self.ws:
                raw = self.media == "mp4" and isinstance(message, bytes)
                self.came.append(message if raw else parsed(message))
                self._news.set()
        self.code, self.reason = self.ws.close_code, self.ws.close_reason
        self._news.set()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [x for x in self.came if isinstance(x, dict)]

    @property
    def frames(self) -> list[Frame]:
        return [x for x in self.came if isinstance(x, Frame)]

    def named(self, kind: str) -> list[dict[str, Any]]:
        return [x for x in self.events if x["type"] == kind]

    async def until(self, ready: Callable[[], Any], seconds: float = LONG) -> Any:
        async with asyncio.timeout(seconds):
            while not (found := ready()):
                if self.code is not None:
                    raise AssertionError(f"closed with {self.code} {self.reason}: {self.events}")
                self._news.clear()
                await self._news.wait()
            return found

    async def event(self, kind: str, count: int = 1) -> dict[str, Any]:
        """The `count`th one of its kind, as soon as it is there."""
        await self.until(lambda: len(self.named(kind)) >= count)
        return self.named(kind)[count - 1]

    async def more(self, frames: int) -> list[Frame]:
        """The next frames."""
        have = len(self.frames)
        await self.until(lambda: len(self.frames) >= have + frames)
        return self.frames[have:]

    async def closed(self, seconds: float = LONG) -> int:
        async with asyncio.timeout(seconds):
            await self._task
        assert self.code is not None
        return self.code

    async def tell(self, kind: str, **fields: Any) -> None:
        await self.ws.send(json.dumps({"type": kind, **fields}))

    async def say(self, samples: np.ndarray, epoch: int = 0, piece: int = 8000) -> None:
        for number, at in enumerate(range(0, len(samples), piece)):
            sound = samples[at : at + piece].astype("<i2").tobytes()
            await self.ws.send(SOUND.pack(epoch, number) + sound)


@contextlib.asynccontextmanager
async def joined(
    served: Served, told: dict[str, Any], media: str = "jpeg", token: str | None = None,
    query: str = "", **more: Any,
) -> AsyncIterator[Line]:  # fmt: skip
    url = f"ws://{served.address}{told['urls']['events']}?media={media}{query}"
    offered = ["avatar.v1", f"token.{token or told['client_token']}"]
    more = {"subprotocols": offered, "proxy": None, "max_size": None, "ping_interval": None} | more
    async with websockets.connect(url, **more) as ws:
        line = Line(ws, media)
        try:
            yield line
        finally:
            await ws.close()
            await line._task


# ---- an engine in this process


class Near:
    """Stands for a `Link`: the engine answers at once."""

    def __init__(self, hear: Any, lost: Any, maker: Mock):
        self.hear, self.lost, self.maker = hear, lost, maker
        self.said: list[Any] = []
        self.start()

    def start(self) -> None:
        """With a new engine."""
        self.engine = Engine(self.maker, self._say)
        self.health = Health(state="ready", ready=self.maker.ready)

    def send(self, message: Any) -> bool:
        self.said.append(message)
        del self.said[:-100]
        asyncio.get_running_loop().call_soon(self._take, message)
        return True

    def _take(self, message: Any) -> None:
        self.engine.hear(message)
        while self.engine.tick():
            pass

    def _say(self, message: Any) -> None:
        asyncio.get_running_loop().call_soon(self.hear, message)

    async def run(self) -> None:
        await asyncio.Event().wait()
