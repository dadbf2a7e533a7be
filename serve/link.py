"""The front's end of the pipe: starts the engine, watches it, and starts it again when it dies
or hangs. What it says goes to one listener; a death ends the sessions it had, not the front."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from serve import wire
from serve.wire import Message, Ping, Pong, Progress, Ready, WireError

log = logging.getLogger("serve.engine")

BEAT = 0.5  # seconds between two pings
HANGS = 10.0  # seconds without an answer, once ready
STARTS = 1800.0  # and before: the published model compiles for minutes
REST = 1.0  # before another start, doubled each time up to `MOST`
MOST = 30.0


@dataclasses.dataclass
class Health:
    """What is known of an engine. state: starting, ready or lost."""

    state: str = "starting"
    stage: str = "start"
    done: float = 0.0
    restarts: int = -1
    ready: Ready | None = None
    heard: float = 0.0  # when it last said something
    memory: dict[str, float] = dataclasses.field(default_factory=dict)


class Link:
    """One engine process. hear: (message) of the engine; lost: (reason) when it is gone; sees:
    variables of its own."""

    def __init__(
        self,
        command: Sequence[str],
        hear: Callable[[Any], None],
        lost: Callable[[str], None],
        *,
        sees: Mapping[str, str] | None = None,
        hangs: float = HANGS,
        starts: float = STARTS,
    ):
        self.command, self.hear, self.lost = command, hear, lost
        self.hangs, self.starts = hangs, starts
        self.environment = os.environ | (sees or {})
        self.health = Health()
        self.process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None

    def send(self, message: Message) -> bool:
        """Whether there is an engine to hear it."""
        if self._writer is None or self._writer.is_closing():
            return False
        self._writer.write(wire.pack(message))
        return True

    async def run(self) -> None:
        """Keeps an engine running until it is cancelled; then ends it."""
        rest = REST
        while True:
            begun = time.monotonic()
            self.health = Health(restarts=self.health.restarts + 1)
            try:
                reason = await self._once()
            except Exception as error:  # whatever it was, there is another engine after it
                log.exception("engine failed")
                reason = type(error).__name__
            finally:
                await self._end()
            log.error("engine lost: %s", reason)
            self.health.state, self.health.ready = "lost", None
            self.lost(reason)
            rest = REST if time.monotonic() - begun > MOST else min(MOST, 2 * rest)
            await asyncio.sleep(rest)

    async def _once(self) -> str:
        """One life of the engine; why it ended."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 22)
            self.process = await asyncio.create_subprocess_exec(
                *self.command, "--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()],
                start_new_session=True, env=self.environment,
            )  # fmt: skip
        self.health.heard = time.monotonic()
        tasks = [asyncio.create_task(job) for job in (self._read(reader), self._watch())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader) -> str:
        try:
            while True:
                head, body = wire.sizes(await reader.readexactly(wire.PREFIX))
                message: Any = wire.unpack(
                    await reader.readexactly(head), await reader.readexactly(body)
                )
                self.health.heard = time.monotonic()
                match message:
                    case Progress(stage, done):
                        self.health.stage, self.health.done = stage, done
                    case Ready():
                        self.health.state, self.health.ready = "ready", message
                        self.health.stage, self.health.done = "ready", 1.0
                        self.hear(message)
                    case Pong(memory=memory):
                        self.health.memory = memory
                    case _:
                        self.hear(message)
        except WireError as error:
            return str(error)
        except (asyncio.IncompleteReadError, ConnectionError):
            assert self.process is not None
            with contextlib.suppress(TimeoutError):
                code = await asyncio.wait_for(self.process.wait(), 2.0)
                return f"it ended with {code}" if code >= 0 else signal.Signals(-code).name
            return "it closed its pipe"

    async def _watch(self) -> str:
        number = 0
        while True:
            begun = time.monotonic()
            await asyncio.sleep(BEAT)
            if time.monotonic() - begun > self.hangs / 2:  # it was the front that stood still
                self.health.heard = time.monotonic()
            ready = self.health.state == "ready"
            silent = time.monotonic() - self.health.heard
            opening = 0.0 if self.health.ready is None else self.health.ready.opening
            if silent > (max(self.hangs, 3 * opening) if ready else self.starts):
                return f"it has not answered for {silent:.0f} s"
            if ready:
                number += 1
                self.send(Ping(number))

    async def _end(self) -> None:
        """Its pipe is closed, and whatever is left of it is killed: a stopped one hears no less."""
        writer, process = self._writer, self.process
        self._writer = self.process = None
        if writer is not None:
            writer.close()
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def engine(words: Sequence[str]) -> list[str]:
    """The command of an engine, to which `Link` adds its end of the pipe."""
    return [sys.executable, "-m", "serve.engine", *words]
