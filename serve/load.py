"""How many sessions a server holds, and how they fare: callers over the public interface.

    python -m serve.load --sessions 1 4 8 --minutes 10 -- --engine mock
    python -m serve.load --url https://avatar.example --key KEY --sessions 8

Each number is a row: so many are asked for, one after another, and those who are admitted speak in
turns, in real time, for the minutes given. Without --url each row has a server of its own, with as
many slots, and what stands after `--` are its settings. Run it on another machine where you can:
callers need time, too, and `own_late` says when they had too little.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import liveavatar_jax
from liveavatar_jax.data.audio import load_audio
from liveavatar_jax.types import LiveAvatarError
from serve.caller import STAGES, Caller, Speech, collected, summary

# `weights.packed` knows it, but brings JAX along, which callers do without.
SPEECH = Path(liveavatar_jax.__path__[0]) / "presets" / "puppet" / "speech.wav"
BETWEEN = 0.5  # seconds between two who come, as `rate` lets one address
ANSWER = 30.0  # seconds that a request may take
ENDS = 15.0  # seconds that a server of ours has to end
PATIENCE = 5.0  # seconds to wait at least for an answer that it is too often asked


@dataclasses.dataclass
class Server:
    """A server at an address, http://host:port, with the key that it asks for; and the id of its
    process, where it is ours."""

    url: str
    key: str
    pid: int | None = None

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any, float]:
        """Status, what it says, and after how many seconds to try again. Raises LiveAvatarError
        when nobody is there."""
        return await asyncio.to_thread(self._ask, method, path, body)

    def _ask(self, method: str, path: str, body: Any) -> tuple[int, Any, float]:
        headers = {"content-type": "application/json"}
        headers |= {"authorization": f"Bearer {self.key}"} if self.key else {}
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + path, data, headers, method=method)
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(request, timeout=ANSWER) as answer:
                return answer.status, json.load(answer), 0.0
        except urllib.error.HTTPError as error:
            with error, contextlib.suppress(ValueError):
                said = json.load(error)
                return error.code, said, float(error.headers.get("retry-after") or 0)
            raise LiveAvatarError(f"{self.url} answers {error.code}; is it `serve`?") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise LiveAvatarError(f"cannot ask {self.url}: {reason}") from None

    def seconds(self) -> dict[str, float] | None:
        """Of CPU, that front and engines have used; None where that cannot be told."""
        if self.pid is None:
            return None
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            return {"front": _cpu(self.pid), "engines": sum(map(_cpu, children))}
        except (OSError, ValueError):
            return None


def _cpu(pid: int | str) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.asynccontextmanager
async def ours(
    flags: Sequence[str], slots: int, key: str, stop: asyncio.Event
) -> AsyncIterator[Server]:
    """A warm server on a free port, for as long as one needs it. Raises LiveAvatarError when it
    does not start."""
    with socket.socket() as free, tempfile.TemporaryFile("w+") as log:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        words = ["--slots", str(slots), "--rate", "1000", "--drain", "1", *flags]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "serve", *words, "--host", "127.0.0.1", "--port", str(port),
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        server = Server(f"http://127.0.0.1:{port}", key, process.pid)
        try:
            with tqdm(total=100, leave=False, unit="%", desc="server") as bar:
                while not stop.is_set():
                    if process.returncode is not None:
                        log.seek(0)
                        said = log.read().strip().splitlines() or ["it said nothing"]
                        raise LiveAvatarError(f"the server does not start: {said[-1]}")
                    with contextlib.suppress(LiveAvatarError):
                        status, said, _ = await server.ask("GET", "/readyz")
                        if status == 200:
                            break
                        health = said["engines"][0]
                        bar.set_description(f"server: {health['stage']}")
                        bar.update(100 * health["done"] - bar.n)
                    await _pause(stop, 0.2)
            yield server
        finally:
            if process.returncode is None:
                process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), ENDS)
            if process.returncode is None:
                process.kill()
                await process.wait()


async def measure(
    server: Server, count: int, seconds: float, speech: Speech, stop: asyncio.Event
) -> dict[str, Any]:
    """A row: so many ask, and speak for so long. Raises LiveAvatarError for a server that takes
    nobody."""
    callers: list[Caller] = []
    tasks: list[asyncio.Task] = []
    refused: list[str] = []
    line = "ws" + server.url.removeprefix("http")
    try:
        with tqdm(total=count, leave=False, unit="session") as bar:
            while len(callers) + len(refused) < count and not stop.is_set():
                told = await _create(server, stop)
                if isinstance(told, str):
                    refused.append(told)
                else:
                    callers.append(Caller(line, told, speech, len(callers)))
                    tasks.append(asyncio.create_task(callers[-1].run()))
                bar.update()
                await _pause(stop, BETWEEN)
        begun, used = time.monotonic(), server.seconds()
        with tqdm(total=round(seconds), leave=False, unit="s") as bar:
            while not stop.is_set() and (left := begun + seconds - time.monotonic()) > 0:
                await _pause(stop, min(1.0, left))
                stalls = sum(caller.stalls for caller in callers)
                bar.set_postfix(sessions=len(callers), stalls=stalls)
                bar.update(round(time.monotonic() - begun) - bar.n)
        now, spent = time.monotonic(), server.seconds()
        for caller in callers:
            if not caller.lost:
                caller.wait(now)
        row = {"sessions": count, "admitted": len(callers), "refused": collected(refused),
               "seconds": now - begun, **summary(callers, now)}  # fmt: skip
        if used and spent:
            row["cpu"] = {name: (spent[name] - used[name]) / (now - begun) for name in used}
        return row
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for caller in callers:
            with contextlib.suppress(LiveAvatarError):
                await server.ask("DELETE", caller.told["urls"]["session"])


async def _create(server: Server, stop: asyncio.Event) -> dict[str, Any] | str:
    """A session, or the kind of problem for which there is none."""
    while True:
        status, said, after = await server.ask("POST", "/v1/sessions", {})
        if status == 201:
            return said
        kind = str(said.get("type", "")).rpartition("/")[2] if isinstance(said, dict) else ""
        if kind == "too-many-requests" and not stop.is_set():
            await _pause(stop, max(PATIENCE, after))  # one address asks for all of them
        elif status == 429:
            return kind
        else:
            detail = said.get("detail", said) if isinstance(said, dict) else said
            raise LiveAvatarError(f"{server.url} opens no session: {detail}")


async def _pause(stop: asyncio.Event, seconds: float) -> None:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


# ---- the command

HEADS = ("sessions", "admitted", "refused", "lost", "fps min", "median", "stalls", "longest",
         "server", "turn p50", "p95", "max", *STAGES, "line", "silence", "pause", "middle",
         "front", "engines")  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line a row; times in ms, CPU in cores."""
    lines = [HEADS, *(_cells(row) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ms = lambda seconds: "-" if seconds is None else f"{1000 * seconds:.0f}"
    at = lambda spread, name="p50": ms(spread and spread[name])
    plain = lambda value, digits=1: "-" if value is None else f"{value:.{digits}f}"
    turn, cpu = row["turn"], row.get("cpu", {})
    return (
        str(row["sessions"]), str(row["admitted"]), str(sum(row["refused"].values())),
        str(sum(row["lost"].values())), plain(row["fps_min"]), plain(row["fps_median"]),
        str(row["stalls"]), ms(row["longest"]), ms(row["server_stall"]),
        *(at(turn["all"], name) for name in ("p50", "p95", "max")),
        *(ms(part) for part in row["parts"].values()),
        at(turn["silence"]), at(turn["pause"]), at(row["middle"]),
        plain(cpu.get("front"), 2), plain(cpu.get("engines"), 2),
    )  # fmt: skip


async def run(args: argparse.Namespace, flags: Sequence[str]) -> tuple[list[dict], bool]:
    """The rows, and whether it was asked to end early. Raises LiveAvatarError."""
    speech, stop = Speech(load_audio(args.speech)), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, stop.set)
    rows: list[dict] = []
    for count in args.sessions:
        async with contextlib.AsyncExitStack() as stack:
            if args.url:
                server = Server(args.url.rstrip("/"), args.key)
            else:
                server = await stack.enter_async_context(ours(flags, count, args.key, stop))
            if not stop.is_set():
                rows.append(await measure(server, count, 60 * args.minutes, speech, stop))
    return rows, stop.is_set()


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(
        prog="python -m serve.load", allow_abbrev=False,
        description="Callers who speak to a server in turns, and what they saw. What stands after "
        "-- are settings of the server, where it is not that of --url.",
    )  # fmt: skip
    parser.add_argument("--url", default="", help="http://host:port; a server of its own if empty")
    parser.add_argument("--key", default="", help="that the server asks of backends")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1], metavar="N")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="X")
    parser.add_argument("--speech", type=Path, default=SPEECH, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where all figures go")
    args, flags = parser.parse_args(words[:cut]), words[cut + 1 :]
    try:
        _check(args, flags)
        rows, stopped = asyncio.run(run(args, flags))
        if args.json is not None:
            args.json.write_text(json.dumps({"server": args.url or flags, "rows": rows}, indent=1))
    except LiveAvatarError as error:
        print(f"load: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"load: {args.json} cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    print(table(rows))
    for row in rows:
        for name in ("refused", "lost"):
            if row[name]:
                said = ", ".join(f"{kind} {times}" for kind, times in row[name].items())
                print(f"{row['sessions']} sessions, {name}: {said}")
        if row["own_late"] > 0.1:
            print(f"{row['sessions']} sessions: callers were {1000 * row['own_late']:.0f} ms late "
                  "themselves; give them a machine of their own")  # fmt: skip
    return 130 if stopped else 0


def _check(args: argparse.Namespace, flags: Sequence[str]) -> None:
    if args.url and not args.url.startswith(("http://", "https://")):
        raise LiveAvatarError(f"--url {args.url} must begin with http:// or https://")
    if args.url and flags:
        raise LiveAvatarError(f"{' '.join(flags)}: the server of --url has its own settings")
    if min(args.sessions) < 1:
        raise LiveAvatarError(f"--sessions {min(args.sessions)} must be at least 1")
    if not 0 < args.minutes < math.inf:
        raise LiveAvatarError(f"--minutes {args.minutes} must be above 0, and finite")
    if args.json is not None and not args.json.parent.is_dir():
        raise LiveAvatarError(f"--json {args.json}: there is no such folder")


if __name__ == "__main__":
    sys.exit(main())
