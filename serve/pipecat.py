"""An avatar in a pipeline of Pipecat: after the speech synthesis, before the transport.

    face = AvatarService("https://avatar.example.org", key, avatar_id="ada")
    Pipeline([transport.input(), ..., tts, face, transport.output(), ...])

It takes speech, and gives back pictures with exactly their sound, silence too. The transport has
`video_out_enabled`, the avatar's size, and 25 frames a second; without `video_out_is_live`, for a
live transport shows pictures when they come, and not with their sound (then `synced=False`).
"""

# pyright: reportMissingImports=false

import asyncio
import base64
import contextlib
import io
import json
import time
from typing import Any

import numpy as np
import soxr
from PIL import Image

from liveavatar_jax.types import LiveAvatarError
from serve.socket import FRAME, RATES, SOUND
from serve.wire import RATE

try:
    import aiohttp
    from pipecat.frames.frames import (
        BotStartedSpeakingFrame,
        CancelFrame,
        EndFrame,
        Frame,
        InterruptionFrame,
        OutputImageRawFrame,
        OutputTransportReadyFrame,
        SpeechOutputAudioRawFrame,
        TTSAudioRawFrame,
        TTSStartedFrame,
        TTSStoppedFrame,
    )
    from pipecat.processors.frame_processor import FrameDirection, FrameProcessorSetup
    from pipecat.services.ai_service import AIService
    from pipecat.services.settings import ServiceSettings
    from pipecat.utils.errors import ErrorCategory, classify_http_status_code
except ImportError:
    raise LiveAvatarError("pipelines need pipecat-ai; install the extra pipecat") from None

AHEAD = 30.0  # seconds of speech that are sent ahead of what is played
PIECE = 0.5  # seconds of it in a message
PATIENCE = 5.0  # seconds, beyond its length, in which the last speech is shown
ROUNDED = 0.05  # seconds by which what is shown may fall short of what was said
OPENING = 30.0  # seconds that the beginning of a session may take
FAREWELL = 5.0  # and the end of it
NOTHING = np.zeros(0, np.int16)


class AvatarService(AIService):
    """One session of the server at `base_url`, as long as the pipeline. Its face is one that the
    server offers, or a picture file of one's own (with a consent, where the server wants one).
    Without a session, as when the server is full or the session has ended, an ErrorFrame says why,
    and speech goes through: it is heard, without a face."""

    def __init__(
        self, base_url: str, api_key: str = "", *, avatar_id: str | None = None,
        image: bytes | None = None, consent: dict[str, str] | None = None,
        prompt: str | None = None, seed: int = 0, synced: bool = True, **more: Any,
    ):  # fmt: skip
        super().__init__(settings=ServiceSettings(model=None), **more)
        picture = None if image is None else base64.b64encode(image).decode()
        face = _given(id=avatar_id, image=picture, consent=consent)
        self._wanted = _given(avatar=face, prompt=prompt, seed=seed)
        self._url, self._key, self._synced = base_url.rstrip("/"), api_key, synced
        self._http: aiohttp.ClientSession | None = None
        self._line: aiohttp.ClientWebSocketResponse | None = None  # while there is a session
        self._listening: asyncio.Task | None = None
        self._path, self._rate = "", RATE  # of our session; of what is sent
        self._ready = False  # whether the transport is
        self._early: list[TTSAudioRawFrame | None] = []  # speech from before that, and its ends
        self._reason = ""  # why the session has ended
        self._forget(0)

    def _forget(self, epoch: int) -> None:
        """Of the epoch: nothing is said in it yet."""
        self._epoch = epoch  # what is older is not wanted
        self._said = False  # anything at all
        self._number, self._owed = 0, 0.0  # messages; seconds that are not shown
        self._resample: Any = None  # to the rate of the line, from another one
        self._from = 0
        self._until = 0.0  # when what was said would be over, if it were shown at once

    # ---- a service

    def can_generate_metrics(self) -> bool:
        return True

    async def setup(self, setup: FrameProcessorSetup) -> None:
        await super().setup(setup)
        wanted = setup.audio_out_sample_rate
        self._rate = wanted if wanted in RATES else max(RATES)
        headers = {"authorization": f"Bearer {self._key}"} if self._key else {}
        self._http = aiohttp.ClientSession(headers=headers)
        try:
            await self._join(self._http)
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError) as error:
            why = str(error) or type(error).__name__
            said = f"no avatar server answers at {self._url}: {why}"
            await self._lost(said, ErrorCategory.CONNECTIVITY)

    async def stop(self, frame: EndFrame) -> None:
        """After the last words."""
        await super().stop(frame)
        await self._end()
        late = max(self._until, time.monotonic()) + PATIENCE
        while self._line is not None and self._owed > ROUNDED and time.monotonic() < late:
            await asyncio.sleep(0.02)
        await self._leave()

    async def cancel(self, frame: CancelFrame) -> None:
        await super().cancel(frame)
        await self._leave()

    async def cleanup(self) -> None:
        await super().cleanup()
        await self._leave()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        interrupts = isinstance(frame, InterruptionFrame) and self._said
        if interrupts:  # before anything waits: what comes meanwhile is old
            self._forget(self._epoch + 1)
            self._early.clear()
        await super().process_frame(frame, direction)
        if interrupts:
            await self._tell("audio.clear")
        match frame:
            case TTSAudioRawFrame() if self._line is not None:
                await self._say(frame)
                return
            case TTSStoppedFrame() if self._line is not None:
                await self._end()
                return  # the transport would fill its last piece up with silence
            case TTSStartedFrame():
                await self.start_ttfb_metrics()
            case BotStartedSpeakingFrame():
                await self.stop_ttfb_metrics()
            case OutputTransportReadyFrame():
                await self._begin()
        await self.push_frame(frame, direction)

    # ---- a session

    async def _join(self, http: aiohttp.ClientSession) -> None:
        limit = aiohttp.ClientTimeout(OPENING)
        where = f"{self._url}/v1/sessions"
        async with http.post(where, json=self._wanted, timeout=limit) as answer:
            said, status = json.loads(await answer.text()), answer.status
        if status >= 400:
            detail = f"the avatar server refuses ({status}): {said['detail']}"
            await self._lost(detail, classify_http_status_code(status))
            return
        self._path = said["urls"]["session"]
        self._line = await http.ws_connect(
            f"{self._url}{said['urls']['events']}?media=jpeg&rate={self._rate}", max_msg_size=0,
            headers={"authorization": f"Bearer {said['client_token']}"},
        )  # fmt: skip
        self._listening = self.create_task(self._listen(self._line))

    async def _lost(self, why: str, category: ErrorCategory) -> None:
        await self.push_error(why, category=category, force_treat_as_permanent=True)

    async def _leave(self) -> None:
        """From wherever, and as often as one likes."""
        listening, self._listening = self._listening, None
        line, self._line = self._line, None
        path, self._path = self._path, ""
        http, self._http = self._http, None
        if listening is not None:
            await self.cancel_task(listening)
        if http is None:
            return
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            async with asyncio.timeout(FAREWELL):
                if path:
                    await http.delete(self._url + path)
                if line is not None:
                    await line.close()
        await http.close()

    # ---- out: speech

    async def _begin(self) -> None:
        self._ready = True
        early, self._early = self._early, []
        for frame in early:
            await (self._end() if frame is None else self._say(frame))

    async def _say(self, frame: TTSAudioRawFrame) -> None:
        """Waits while much of what was said is not shown yet."""
        self._said = True
        if not self._ready:
            self._early.append(frame)
            return
        samples = np.frombuffer(frame.audio, "<i2")
        if frame.num_channels > 1:
            samples = samples.reshape(-1, frame.num_channels).mean(1).round().astype("<i2")
        if frame.sample_rate != self._rate:
            if frame.sample_rate != self._from:
                self._from = frame.sample_rate
                self._resample = soxr.ResampleStream(self._from, self._rate, 1, "int16")
            samples = self._resample.resample_chunk(samples)
        size = int(PIECE * self._rate)
        for at in range(0, len(samples), size):
            while self._line is not None and self._until - time.monotonic() > AHEAD:
                await asyncio.sleep(0.1)
            await self._send(samples[at : at + size])

    async def _send(self, samples: np.ndarray) -> None:
        if self._line is None:
            return
        head = SOUND.pack(self._epoch & 0xFFFFFFFF, self._number & 0xFFFFFFFF)
        seconds = len(samples) / self._rate
        self._number, self._owed = self._number + 1, self._owed + seconds
        self._until = max(self._until, time.monotonic()) + seconds
        with contextlib.suppress(ConnectionError):  # then `_listen` says so
            await self._line.send_bytes(head + samples.astype("<i2").tobytes())

    async def _end(self) -> None:
        if not self._ready:
            self._early.append(None)
        elif self._said:
            if self._resample is not None:
                await self._send(self._resample.resample_chunk(NOTHING, last=True))
                self._resample, self._from = None, 0
            await self._tell("audio.end")

    async def _tell(self, kind: str) -> None:
        if self._line is not None:
            with contextlib.suppress(ConnectionError):
                await self._line.send_str(json.dumps({"type": kind}))

    # ---- in: pictures and their sound

    async def _listen(self, line: aiohttp.ClientWebSocketResponse) -> None:
        async for message in line:
            if message.type is aiohttp.WSMsgType.BINARY:
                await self._show(message.data)
            else:
                await self._hear(json.loads(message.data))
        self._line = None
        why = self._reason or f"the line is gone ({line.close_code})"
        await self._lost(f"the avatar's session has ended: {why}", ErrorCategory.SERVER)

    async def _show(self, message: bytes) -> None:
        """A picture and its sound, unless nobody wants them any more."""
        epoch, _, size = FRAME.unpack_from(message)
        if not self._ready:
            return
        picture = await asyncio.to_thread(_picture, message[FRAME.size : FRAME.size + size])
        picture.sync_with_audio = self._synced
        sound = SpeechOutputAudioRawFrame(message[FRAME.size + size :], RATE, 1)
        for frame in (picture, sound):
            if epoch >= self._epoch:
                await self.push_frame(frame)

    async def _hear(self, event: dict[str, Any]) -> None:
        match event:
            case {"type": "session.ready" | "audio.cleared", "epoch": epoch}:
                if epoch > self._epoch:  # another one interrupts
                    self._forget(epoch)
            case {"type": "speech.ended", "epoch": self._epoch, "interrupted": False}:
                self._owed -= event["played_ms"] / 1000
            case {"type": "session.closed", "reason": reason, "detail": detail}:
                self._reason = f"{reason}: {detail}" if detail else reason
            case {"type": "error", "detail": detail}:
                await self.push_error(f"the avatar server: {detail}", category=ErrorCategory.SERVER)


def _picture(jpeg: bytes) -> OutputImageRawFrame:
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    return OutputImageRawFrame(image.tobytes(), image.size, "RGB")


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
