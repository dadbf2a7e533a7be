"""A session over a WebSocket: sound in, events both ways, and frames with their sound out.

In    binary: u32 epoch, u32 sequence number, little-endian PCM16 at the agreed rate
      text:   audio.append {audio: base64}, audio.end, audio.clear, ping,
              session.update {prompt, idle}
Out   text:   events, see README
      binary: u32 epoch, u32 first sample, u32 bytes of the picture, JPEG, PCM16 at 16 kHz; a frame
              and its samples are one message. With media=mp4: pieces of a fragmented MP4, which
              begins again with each epoch, its times going on.
"""

import asyncio
import base64
import binascii
import collections
import contextlib
import itertools
import json
import struct
import time
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import soxr
from fastapi import WebSocket, WebSocketDisconnect

from serve.clock import Idle, Shown
from serve.pictures import Movie, jpeg
from serve.session import REASONS, Problem, Session
from serve.wire import FPS, RATE

SOUND = struct.Struct("<II")  # before sound that comes in
FRAME = struct.Struct("<III")  # before a frame that goes out
RATES = (8000, 16000, 22050, 24000, 32000, 44100, 48000)
MEDIA = ("none", "jpeg", "mp4")
SLOW = 2 * FPS  # frames that may wait for a reader, before the oldest are dropped
EVENTS = 1000  # messages that may; a reader who is that far behind is cut
STUCK = 15.0  # seconds that one message may take to be sent
OTHERS = 16  # messages after which others have their turn
MISTAKES = 20  # messages that are none, before the line is cut
CHARACTERS = 2000  # of a prompt


class Mistake(Exception):
    """A message that cannot be understood; in one sentence."""


class Socket:
    """A `Viewer` at the other end of a WebSocket."""

    def __init__(self, ws: WebSocket, session: Session, media: str, rate: int, speaks: bool):
        self.watching = media != "none"
        self._ws, self._session, self._media, self.speaks = ws, session, media, speaks
        self._movie = None if media != "mp4" else Movie(session.ready.height, session.ready.width)
        self._resample = None if rate == RATE else soxr.ResampleStream(rate, RATE, 1, "int16")
        self._out: collections.deque[Shown | str] = collections.deque()
        self._frames = self._mistakes = 0
        self._epoch = self._filmed = session.timeline.epoch
        self._more = asyncio.Event()
        self._end: str | None = None

    # ---- a Viewer

    def show(self, shown: Shown) -> None:
        if self._end is not None:  # it is on its way out
            return
        if self._frames >= SLOW:
            oldest = next(i for i, item in enumerate(self._out) if isinstance(item, Shown))
            del self._out[oldest]
            self._session.metrics.dropped.labels("slow").inc()
        else:
            self._frames += 1
        self._out.append(shown)
        self._more.set()

    def tell(self, event: dict[str, Any]) -> None:
        if len(self._out) >= EVENTS:
            self.clear(self._epoch)
            self._out.clear()
            self._end = "slow"
        if self._end is None:
            self._out.append(json.dumps(event))
        self._more.set()

    def clear(self, epoch: int) -> None:
        self._epoch, self._frames = epoch, 0
        self._out = collections.deque(item for item in self._out if isinstance(item, str))

    def close(self, reason: str) -> None:
        self._end = reason
        self._more.set()

    # ---- the line

    async def run(self) -> None:
        """Until either side ends it; the session goes on, for a while, without."""
        self._session.join(self)
        ready = asyncio.create_task(self._send())
        heard = asyncio.create_task(self._receive())
        try:
            await asyncio.wait((ready, heard), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._session.leave(self)
            for task in (ready, heard):
                task.cancel()
            await asyncio.gather(ready, heard, return_exceptions=True)
            if self._movie is not None:
                await asyncio.to_thread(self._movie.close)

    async def _send(self) -> None:
        while True:
            while self._out:
                item = self._out.popleft()
                if isinstance(item, Shown):
                    self._frames -= 1
                    item = await self._encoded(item)
                if isinstance(item, str):
                    sending = self._ws.send_text(item)
                elif item:
                    sending = self._ws.send_bytes(item)
                else:
                    continue
                try:
                    await asyncio.wait_for(sending, STUCK)
                except TimeoutError:
                    self._end = "slow"
                    self._out.clear()
            if self._end is not None:
                code, _ = REASONS[self._end]
                with contextlib.suppress(TimeoutError):  # it may be that nothing goes out any more
                    await asyncio.wait_for(self._ws.close(code, self._end), 1.0)
                return
            self._more.clear()
            await self._more.wait()

    async def _encoded(self, shown: Shown) -> bytes:
        """Empty where there is nothing to send: of an older epoch by now, or held by the muxer."""
        begun = time.monotonic()
        if self._movie is not None:
            if shown.epoch != self._filmed:  # what the muxer holds is of an older one
                self._movie = await asyncio.to_thread(self._movie.again)
                self._filmed = shown.epoch
            piece = await asyncio.to_thread(self._movie.add, shown.frame, shown.samples)
        else:
            piece = await asyncio.to_thread(jpeg, shown.frame)
            head = FRAME.pack(shown.epoch & 0xFFFFFFFF, shown.first & 0xFFFFFFFF, len(piece))
            piece = head + piece + shown.samples.astype("<i2").tobytes()
        self._session.metrics.block.labels("encode").observe(time.monotonic() - begun)
        return piece if shown.epoch == self._epoch else b""

    async def _receive(self) -> None:
        try:
            for number in itertools.count():
                message = await self._ws.receive()
                if number % OTHERS == 0:  # while messages wait, it does not wait for any
                    await asyncio.sleep(0)
                if message["type"] == "websocket.disconnect":
                    return
                try:
                    if message.get("bytes") is not None:
                        self._binary(message["bytes"])
                    else:
                        self._text(message.get("text") or "")
                except Mistake as error:
                    self._mistakes += 1
                    self._error("bad-message", str(error))
                    if self._mistakes >= MISTAKES:
                        await self._ws.close(1008, "too many messages that are none")
                        return
                except Problem as error:
                    self._error(error.kind, error.detail, retryable=error.after is not None)
        except (WebSocketDisconnect, RuntimeError):
            return

    def _error(self, kind: str, detail: str, retryable: bool = False) -> None:
        self.tell({"type": "error", "error": kind, "detail": detail, "retryable": retryable})

    def _binary(self, message: bytes) -> None:
        if len(message) < SOUND.size or (len(message) - SOUND.size) % 2:
            raise Mistake("sound is 8 bytes of epoch and number, and 16-bit samples after them")
        epoch, _ = SOUND.unpack_from(message)
        self._heard(np.frombuffer(message, "<i2", offset=SOUND.size), epoch)

    def _heard(self, samples: np.ndarray, epoch: int | None = None) -> None:
        if not self.speaks:
            raise Mistake("this token is for watching only")
        if epoch not in (None, self._session.timeline.epoch):
            return
        if self._resample is not None:
            samples = self._resample.resample_chunk(samples)
        self._session.speak(samples.astype(np.int16))

    def _text(self, text: str) -> None:
        try:
            said = json.loads(text)
            kind = said["type"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Mistake("a message is a JSON object with a type") from None
        does = self._does()
        if not isinstance(kind, str) or kind not in does:
            raise Mistake(f"a message's type is one of {', '.join(does)}")
        if not self.speaks and kind != "ping":
            raise Mistake("this token is for watching only")
        does[kind](said)

    def _does(self) -> dict[str, Callable[[dict[str, Any]], None]]:
        return {
            "audio.append": self._append,
            "audio.end": lambda said: self._over(),
            "audio.clear": lambda said: self._interrupt(),
            "session.update": self._update,
            "ping": self._pong,
        }

    def _append(self, said: dict[str, Any]) -> None:
        try:
            samples = np.frombuffer(base64.b64decode(said.get("audio", ""), validate=True), "<i2")
        except (binascii.Error, ValueError, TypeError):
            raise Mistake("audio is 16-bit samples in base64") from None
        self._heard(samples)

    def _over(self) -> None:
        if self._resample is not None:
            rest = self._resample.resample_chunk(np.zeros(0, np.int16), last=True)
            self._resample.clear()
            self._session.speak(rest)
        self._session.end()

    def _interrupt(self) -> None:
        if self._resample is not None:
            self._resample.clear()
        self._session.interrupt()

    def _pong(self, said: dict[str, Any]) -> None:
        name = said.get("id")
        if not isinstance(name, str | int):
            name = None
        self.tell({"type": "pong", "id": name[:64] if isinstance(name, str) else name})

    def _update(self, said: dict[str, Any]) -> None:
        prompt, idle = said.get("prompt"), said.get("idle")
        if prompt is idle is None:
            raise Mistake("session.update has a prompt, or idle, or both")
        if idle is not None and idle not in get_args(Idle):
            raise Mistake(f"idle is one of {', '.join(get_args(Idle))}")
        if prompt is not None and not _readable(prompt):
            raise Mistake(f"prompt is a text of 1 to {CHARACTERS} characters")
        self._session.change(prompt, idle)


def _readable(prompt: Any) -> bool:
    if not isinstance(prompt, str) or not 0 < len(prompt) <= CHARACTERS:
        return False
    try:
        prompt.encode()
    except UnicodeEncodeError:  # half of a pair, which no tokenizer takes
        return False
    return True
