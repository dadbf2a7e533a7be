"""One who calls: speaks in turns over the public WebSocket, and notes what comes back, and when.

Speech is sent in real time, in pieces of 20 ms, and has no sample that is 0; so what of it a frame
holds can be counted, and each frame tells how long ago its first sample was sent.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import statistics
import time
from typing import Any

import numpy as np
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from liveavatar_jax.types import LiveAvatarError
from serve.socket import FRAME, SOUND
from serve.wire import FPS, PER_FRAME, RATE

PIECE = RATE // 50
LOUD = 0.03  # RMS of a piece with which a turn may begin; full scale is 1
TURN = (2.0, 6.0)  # seconds that one speaks
PAUSES = {"pause": (0.3, 1.5), "silence": (5.0, 8.0)}  # seconds before a turn
GAP = 3 / FPS  # seconds between two frames; what is longer is a stall
STEADY = 1.0  # seconds of a turn after which it is the middle of speech
STAGES = ("fill", "make", "clock")  # parts of a turn that the server knows


class Speech:
    """A recording, from which turns are cut. Raises LiveAvatarError where it is quiet or short."""

    def __init__(self, sound: np.ndarray):
        """sound: float, 16 kHz, full scale 1."""
        pieces = sound[: len(sound) // PIECE * PIECE].reshape(-1, PIECE)
        self.pieces = np.clip(np.round(32767 * pieces), -32767, 32767).astype("<i2")
        self.pieces[self.pieces == 0] = 1
        loud = np.flatnonzero(np.sqrt(np.mean(pieces**2, axis=1)) > LOUD)
        self._starts = [int(at) for at in loud if at + TURN[0] * 50 <= len(pieces)]
        if not self._starts:
            raise LiveAvatarError(f"the recording holds no {TURN[0]:.0f} s that begin aloud")

    def turn(self, draw: random.Random) -> np.ndarray:
        """Pieces [n, 320], int16, the first of them loud."""
        at = draw.choice(self._starts)
        return self.pieces[at : at + round(50 * draw.uniform(*TURN))]


@dataclasses.dataclass
class Turn:
    """What one turn took, in seconds. after: a name of `PAUSES`, or "" for the first one. sent:
    when each of its pieces was; parts: what the server says of it, by stage."""

    after: str
    sent: list[float] = dataclasses.field(default_factory=list)
    took: float | None = None
    parts: dict[str, float] = dataclasses.field(default_factory=dict)
    middle: list[float] = dataclasses.field(default_factory=list)  # latencies in mid-speech


class Caller:
    """A session of a server, `told` by it as `POST /v1/sessions` does, at `url` (ws://...)."""

    def __init__(self, url: str, told: dict[str, Any], speech: Speech, seed: int):
        self.told, self._speech, self._draw = told, speech, random.Random(seed)
        self._url = f"{url}{told['urls']['events']}?media=jpeg"
        self.turns: list[Turn] = []
        self.frames = self.stalls = self.missed = 0
        self.longest = self.late = 0.0  # seconds: between two frames; of what was sent
        self.begun = self.last = 0.0  # when the first frame came, and the last one
        self.server: dict[str, Any] = {}  # the last `stats`
        self.lost = ""  # why it ended before its time
        self._started: list[tuple[int, Turn]] = []  # turns by their first sample, not yet seen
        self._known = 0  # turns that the server has begun
        self._turn: Turn | None = None  # whose samples come
        self._heard = self._next = 0  # samples of it; first sample of the frame to come

    async def run(self) -> None:
        """Until it is cancelled, or the session ends; then `lost` says why."""
        offered: Any = ["avatar.v1", f"token.{self.told['client_token']}"]
        try:
            async with connect(self._url, subprotocols=offered, compression=None, max_size=None,
                               proxy=None, ping_interval=None) as ws:  # fmt: skip
                speaking = asyncio.create_task(self._speak(ws))
                try:
                    async for message in ws:
                        self.hear(message, time.monotonic())
                finally:
                    speaking.cancel()
                    with contextlib.suppress(asyncio.CancelledError, ConnectionClosed):
                        await speaking
            self.lost = self.lost or "closed"
        except (WebSocketException, OSError) as error:
            self.lost = self.lost or str(error) or type(error).__name__

    async def _speak(self, ws: ClientConnection) -> None:
        await asyncio.sleep(self._draw.uniform(0.0, 3.0))
        turn, number = Turn(""), 0
        while True:
            self.turns.append(turn)
            due = time.monotonic()
            for piece in self._speech.turn(self._draw):
                now = time.monotonic()
                self.late = max(self.late, now - due)
                turn.sent.append(now)
                await ws.send(SOUND.pack(0, number) + piece.tobytes())
                number, due = number + 1, due + PIECE / RATE
                await asyncio.sleep(max(0.0, due - time.monotonic()))
            await ws.send('{"type": "audio.end"}')
            turn = Turn("silence" if self._draw.random() < 0.3 else "pause")
            await asyncio.sleep(self._draw.uniform(*PAUSES[turn.after]))

    def hear(self, message: str | bytes, now: float) -> None:
        if isinstance(message, bytes):
            _, first, size = FRAME.unpack_from(message)
            self._see(first, np.frombuffer(message, "<i2", offset=FRAME.size + size), now)
            return
        said = json.loads(message)
        match said["type"]:
            case "speech.started" if self._known < len(self.turns):
                turn = self.turns[self._known]
                self._known += 1
                self._started.append((said["at_sample"], turn))
                turn.parts = {name: said[f"{name}_ms"] / 1000 for name in ("turn", *STAGES)
                              if f"{name}_ms" in said}  # fmt: skip
            case "stats":
                self.server = said
            case "session.closed":
                self.lost = said["reason"]

    def wait(self, now: float) -> None:
        """No frame came between the last one and now."""
        if self.frames and now - self.last > GAP:
            self.stalls += 1
            self.longest = max(self.longest, now - self.last)

    def _see(self, first: int, samples: np.ndarray, now: float) -> None:
        """A frame came, with its samples."""
        if not self.frames:
            self.begun = self.last = now
            self._next = first
        self.wait(now)
        self.frames, self.last = self.frames + 1, now
        if first != self._next:  # what is not there cannot be counted, until the next turn
            self.missed += (first - self._next) // PER_FRAME
            self._turn = None
        self._next = first + PER_FRAME
        while self._started and self._started[0][0] < self._next:
            at, self._turn = self._started.pop(0)
            if at >= first:
                self._turn.took = now - self._turn.sent[0]
                samples = samples[at - first :]
                self._heard = 0
            else:
                self._turn = None
        if self._turn is None or not (count := np.count_nonzero(samples)):
            return
        piece, self._heard = self._heard // PIECE, self._heard + count
        if STEADY * 50 < piece < len(self._turn.sent):
            self._turn.middle.append(now - self._turn.sent[piece])


# ---- what many of them saw


def summary(callers: list[Caller], now: float) -> dict[str, Any]:
    """Of those who were admitted, until `now`. Seconds, but for counts and frames a second; None
    where nothing was seen."""
    ends = {id(caller): caller.last if caller.lost else now for caller in callers}
    rates = [x.frames / (ends[id(x)] - x.begun) for x in callers if ends[id(x)] - x.begun > 1]
    turns = [turn for caller in callers for turn in caller.turns if turn.took is not None]
    took = {"all": turns} | {name: [x for x in turns if x.after == name] for name in PAUSES}
    parts = {name: _median([x.parts[name] for x in turns if name in x.parts]) for name in STAGES}
    told = [x.took - x.parts["turn"] for x in turns if "turn" in x.parts and x.took is not None]
    return {
        "lost": collected([caller.lost for caller in callers]),
        "fps_min": min(rates, default=None),
        "fps_median": _median(rates),
        "missed": sum(caller.missed for caller in callers),
        "stalls": sum(caller.stalls for caller in callers),
        "longest": max((caller.longest for caller in callers), default=0.0),
        "server_stall": sum(x.server.get("stall_ms", 0) for x in callers) / 1000,
        "server_gap": sum(x.server.get("gap_ms", 0) for x in callers) / 1000,
        "turns": len(turns),
        "turn": {name: _spread([x.took for x in some]) for name, some in took.items()},
        "middle": _spread([_median(x.middle) for x in turns if x.middle]),
        "parts": parts | {"line": _median(told)},
        "own_late": max((caller.late for caller in callers), default=0.0),
    }


def collected(words: list[str]) -> dict[str, int]:
    """How often each word was said, without empty ones."""
    return {word: words.count(word) for word in sorted(set(words)) if word}


def _median(values: list[Any]) -> float | None:
    return statistics.median(values) if values else None


def _spread(values: list[Any]) -> dict[str, float] | None:
    if not values:
        return None
    p50, p95 = np.percentile(values, [50, 95])
    return {"p50": float(p50), "p95": float(p95), "max": max(values), "count": len(values)}
