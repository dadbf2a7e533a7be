"""Offline videos, in the shape of OpenAI's `/v1/videos`: a portrait and a recording in, a file
out. One job runs at a time, beside the live sessions and at lower priority; each is a folder, so
a server that starts again goes on with what was queued or cut off.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import av
import numpy as np
from fastapi import Depends, FastAPI, File, Form, Request, Response, UploadFile
from fastapi.responses import FileResponse
from PIL import Image

from liveavatar_jax.data.audio import read_audio
from liveavatar_jax.data.prompt import PROMPT
from liveavatar_jax.types import LiveAvatarError
from serve.pictures import checked
from serve.session import Problem
from serve.wire import RATE

if TYPE_CHECKING:
    from serve.settings import Settings

log = logging.getLogger("serve.jobs")

LONGEST = 600  # seconds of a recording
KEPT = 24 * 3600.0  # seconds that a finished job stays
WAITING = 32  # jobs
GUESSED = ("mp3", "aac")  # formats whose length may be a guess, from the bytes of a second
# What a command says around what went wrong, and which is not so of a job.
KEEPS = re.compile(r"^[\w-]+: |; its beginning is kept and plays$|; nothing is kept$|"
                   r"; [^;]*draft\.mp4 is there, but not signed$")  # fmt: skip
NAME = re.compile(r"video_[A-Za-z0-9_-]{12}")


@dataclasses.dataclass
class Job:
    """As callers see it; kept as job.json beside the job's files."""

    id: str
    prompt: str
    seconds: str
    created_at: int
    status: str = "queued"  # in_progress, completed, failed
    progress: int = 0
    completed_at: int | None = None
    expires_at: int | None = None
    error: dict[str, str] | None = None
    size: str = ""
    model: str = ""
    seed: int = 0
    object: str = "video"


class Jobs:
    """The queue and its worker."""

    def __init__(self, settings: "Settings"):
        self._settings = settings
        self.folder = Path(settings.jobs or tempfile.mkdtemp(prefix="avatar-jobs-"))
        self._passing = not settings.jobs
        self._all: dict[str, Job] = {}  # changed in the loop alone
        self._looked_at = 0  # not in it yet
        self._thread = ThreadPoolExecutor(1, "jobs")  # others encode what is shown live
        self._more = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._running: str | None = None

    # ---- what callers do

    async def add(self, portrait: bytes, recording: bytes, prompt: str, seed: int) -> Job:
        """Raises LiveAvatarError for what is no portrait or no recording, Problem when full."""
        waiting = [job for job in self.list() if job.status in ("queued", "in_progress")]
        if len(waiting) + self._looked_at >= WAITING:
            raise Problem(429, "queue-full", f"{WAITING} videos are waiting already", 60.0)
        if "\0" in prompt:  # no command can be told that
            raise LiveAvatarError("prompt has a character that is no text (U+0000); leave it out")
        name, loop = f"video_{secrets.token_urlsafe(9)}", asyncio.get_running_loop()
        self._looked_at += 1
        try:
            job = await loop.run_in_executor(
                self._thread, self._take, name, portrait, recording, prompt, seed
            )
        except asyncio.CancelledError:  # the one thread does it after what it is at
            self._thread.submit(shutil.rmtree, self.folder / name, ignore_errors=True)
            raise
        finally:
            self._looked_at -= 1
        self._all[name] = job
        self._more.set()
        return dataclasses.replace(job)  # as it is now: the queue may take it at once

    def _take(self, name: str, portrait: bytes, recording: bytes, prompt: str, seed: int) -> Job:
        """Looks at what was sent, and keeps it."""
        picture, at = checked(portrait), self.folder / name
        try:
            at.mkdir(parents=True, mode=0o700)
            Image.fromarray(picture).save(at / "portrait.png")
            (at / "recording").write_bytes(recording)
            job = Job(name, prompt, f"{_seconds(at / 'recording'):.2f}", round(time.time()),
                      seed=seed, model=Path(self._settings.weights or "puppet").name)  # fmt: skip
            self._keep(job)
            return job
        except OSError as error:
            shutil.rmtree(at, ignore_errors=True)
            detail = f"jobs cannot be kept: {str(error.strerror).lower()}"
            raise Problem(507, "no-space", detail, 60.0) from None
        except LiveAvatarError as error:
            shutil.rmtree(at, ignore_errors=True)
            raise LiveAvatarError(_said(str(error))) from None

    def list(self) -> list[Job]:
        return sorted(list(self._all.values()), key=lambda job: -job.created_at)

    def get(self, name: str) -> Job:
        """Raises Problem when there is none of that id."""
        if (job := self._all.get(name)) is None:
            raise Problem(404, "no-such-video", "there is no video of this id")
        return job

    def file(self, name: str) -> Path:
        """Raises Problem until it is complete."""
        job = self.get(name)
        if job.status != "completed":
            raise Problem(
                409, "not-completed", f"this video is {job.status.replace('_', ' ')}", 2.0
            )
        return self.folder / name / "video.mp4"

    async def remove(self, name: str) -> None:
        self.get(name)
        if self._running == name and self._process is not None:
            _kill(self._process)
        del self._all[name]
        await asyncio.to_thread(shutil.rmtree, self.folder / name, ignore_errors=True)

    # ---- the worker

    async def run(self) -> None:
        """One job after another, until cancelled."""
        self._all = await asyncio.to_thread(self._find) | self._all
        try:
            while True:
                self._forget()
                queued = [job for job in self.list() if job.status == "queued"]
                if queued:
                    job = min(queued, key=lambda job: job.created_at)
                    try:
                        await self._make(job)
                    except Exception:  # as of a full disk: the next may fare better
                        log.exception("video failed")
                        said = "something went wrong here; it is in the server's log"
                        job.status, job.error = "failed", {"code": "failed", "message": said}
                        job.expires_at = round(time.time() + KEPT)
                        self._process = self._running = None
                        shutil.rmtree(self.folder / job.id, ignore_errors=True)
                    continue
                self._more.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(60.0):
                        await self._more.wait()
        finally:
            if self._process is not None:
                _kill(self._process)
            if self._passing:
                shutil.rmtree(self.folder, ignore_errors=True)

    async def _make(self, job: Job) -> None:
        job.status, self._running, at = "in_progress", job.id, self.folder / job.id
        settings = self._settings
        words = ["generate", "--image", at / "portrait.png", "--audio", at / "recording",
                 f"--prompt={job.prompt}", "--seed", job.seed,
                 "--out", at / "draft.mp4", *_sized(settings)]  # fmt: skip
        for name in ("weights", "device", "mesh", "fake_devices", "quantise", "certificate",
                     "certificate_key"):  # fmt: skip
            if value := getattr(settings, name):
                words += [f"--{name.replace('_', '-')}", value]
        words += ["--badge"] if settings.badge else []
        command = [sys.executable, "-m", "liveavatar_jax.cli", *map(str, words)]
        starting = asyncio.ensure_future(asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
            start_new_session=True, env=os.environ | settings.sees(0),
        ))  # fmt: skip
        try:
            await asyncio.shield(starting)
        finally:  # cancelled while a process starts, Python 3.11 waits for ever
            self._process = process = await starting
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, 10)  # live sessions go first
        assert process.stderr is not None
        tail = b""
        while piece := await process.stderr.read(4096):
            tail = (tail + piece)[-4000:]
            if shares := re.findall(rb"(\d+)%\|", tail):
                job.progress = min(99, int(shares[-1]))
        code = await process.wait()
        self._process = self._running = None
        if job.id not in self._all:
            return  # removed meanwhile
        try:
            if code:
                last = tail.decode("utf-8", "replace").strip().splitlines()
                raise LiveAvatarError(_said(last[-1]) if last else f"it ended with {code}")
            os.replace(at / "draft.mp4", at / "video.mp4")
            job.status, job.progress, job.size = "completed", 100, _size(at / "video.mp4")
        except LiveAvatarError as error:
            job.status, job.error = "failed", {"code": "failed", "message": str(error)[:500]}
        job.completed_at, job.expires_at = round(time.time()), round(time.time() + KEPT)
        for name in ("portrait.png", "recording", "draft.mp4"):  # no face and no voice is kept
            (at / name).unlink(missing_ok=True)
        try:
            self._keep(job)
        except OSError:  # as it was kept before, a server that starts again would make it again
            (at / "job.json").unlink(missing_ok=True)
        log.info("video", extra={"about": {"status": job.status, "seconds": job.seconds}})

    def _keep(self, job: Job) -> None:
        at = self.folder / job.id / "job.json"
        draft = at.with_suffix(".part")
        try:
            draft.write_text(json.dumps(dataclasses.asdict(job)))
            os.replace(draft, at)
        except OSError:
            draft.unlink(missing_ok=True)
            raise

    def _find(self) -> dict[str, Job]:
        """Jobs of a server before this one; what was cut off begins anew."""
        found = {}
        for path in self.folder.glob("video_*/job.json"):
            try:
                job = Job(**json.loads(path.read_text()))
            except (OSError, ValueError, TypeError):
                continue
            if NAME.fullmatch(job.id) and job.id == path.parent.name:
                if job.status == "in_progress":
                    job.status, job.progress = "queued", 0
                found[job.id] = job
        return found

    def _forget(self) -> None:
        for job in self.list():
            if job.expires_at is not None and job.expires_at < time.time():
                del self._all[job.id]
                shutil.rmtree(self.folder / job.id, ignore_errors=True)


def _seconds(recording: Path) -> float:
    """Of a recording; a bomb is noticed before it is read, or while it is. Raises
    LiveAvatarError."""
    if (claimed := _claimed(recording)) > LONGEST + 1:
        raise LiveAvatarError(
            f"the recording claims to last {claimed:.0f} s; at most {LONGEST} s are taken"
        )
    samples = 0
    for piece in read_audio(recording):
        samples += len(piece)
        if samples > LONGEST * RATE:
            raise LiveAvatarError(f"the recording is longer than {LONGEST} s")
        if not np.isfinite(piece).all():
            raise LiveAvatarError("the recording has samples that are no numbers")
    return samples / RATE


def _claimed(recording: Path) -> float:
    """Seconds that a file says it lasts; 0 where it does not say."""
    with contextlib.suppress(Exception):  # what cannot be opened is refused when it is read
        # As where it is read: a playlist must not reach for the network.
        with av.open(f"file:{recording}", options={"protocol_whitelist": "file"}) as file:
            sound = file.streams.audio[0]
            if file.format.name in GUESSED:
                return 0.0
            if sound.duration is not None and sound.time_base is not None:
                return float(sound.duration * sound.time_base)
            return (file.duration or 0) / av.time_base
    return 0.0


def _said(line: str) -> str:
    """The sentence of a command that refuses, without the paths of this machine, and without what
    it keeps: a job that fails keeps nothing."""
    line = KEEPS.sub("", line)
    return re.sub(r"/\S+/(portrait\.png|recording|draft\.mp4)", r"\1", line)


def _sized(settings: "Settings") -> list[str]:
    """As engines have it, which make nothing of a size where the model knows but one."""
    known = True  # of the puppet
    if settings.weights:
        with contextlib.suppress(OSError, ValueError):  # the command says what is wrong there
            known = json.loads((Path(settings.weights) / "config.json").read_text()).get("size")
    return [] if known else ["--size", settings.size]


def _size(video: Path) -> str:
    with av.open(str(video)) as file:
        stream = file.streams.video[0]
        return f"{stream.width}x{stream.height}"


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def routes(
    app: FastAPI, jobs: Jobs, takes: Callable[[str], Any], agreed: Callable[..., None],
    face: Callable[[str], bytes], backend: Callable[..., Any],
    calm: Callable[[Request, str], None],
) -> None:  # fmt: skip
    """takes: the consent that a form has, if any; raises Problem where callers may not bring
    portraits. agreed: keeps it. face: a portrait by name. calm: raises Problem where an address
    asks too often."""
    key = [Depends(backend)]

    @app.post("/v1/videos", status_code=200, dependencies=key)
    async def create(
        request: Request,
        audio: Annotated[UploadFile, File()],
        input_reference: Annotated[UploadFile | None, File()] = None,
        avatar: Annotated[str, Form(max_length=64)] = "",
        prompt: Annotated[str, Form(min_length=1, max_length=2000)] = PROMPT,
        seed: Annotated[int, Form(ge=0, lt=2**31)] = 0,
        consent: Annotated[str, Form(max_length=4000)] = "",
    ) -> Job:
        calm(request, "videos")
        record = None
        if input_reference is not None:
            record = takes(consent)
            portrait = await input_reference.read()
        else:
            portrait = face(avatar)
        job = await jobs.add(portrait, await audio.read(), prompt, seed)
        if record is not None:
            agreed(record, portrait, video=job.id)
        return job

    @app.get("/v1/videos", dependencies=key)
    def show_all() -> dict[str, Any]:
        return {"object": "list", "data": jobs.list()}

    @app.get("/v1/videos/{name}", dependencies=key)
    def show(name: str) -> Job:
        return jobs.get(name)

    @app.get("/v1/videos/{name}/content", dependencies=key)
    def content(name: str) -> Response:
        return FileResponse(jobs.file(name), media_type="video/mp4", filename=f"{name}.mp4")

    @app.delete("/v1/videos/{name}", dependencies=key)
    async def delete(name: str) -> dict[str, Any]:
        await jobs.remove(name)
        return {"id": name, "object": "video.deleted", "deleted": True}
