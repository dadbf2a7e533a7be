"""Offline videos and what says that they were made."""

import asyncio
import contextlib
import datetime
import hashlib
import io
import json
import os
import resource
import threading
import wave
from pathlib import Path

import av
import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="needs the extra serve")

from liveavatar_jax.data import marks
from liveavatar_jax.types import LiveAvatarError
from serve import front, jobs
from serve.jobs import Jobs
from serve.settings import Settings


def sound(seconds: float, rate: int = 16_000) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        tone = 6000 * np.sin(np.arange(int(seconds * rate)) * 0.1)
        file.writeframes(tone.astype("<i2").tobytes())
    return out.getvalue()


def picture(width: int = 64, height: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (200, 150, 120)).save(out, "PNG")
    return out.getvalue()


@contextlib.asynccontextmanager
async def client(settings: Settings):
    """Against the routes, with the job worker running but no engine."""
    app = front.make(settings)
    task = asyncio.create_task(app.state.front.jobs.run())
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as known:
        yield known
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def finished(known: httpx.AsyncClient, name: str) -> dict:
    for _ in range(3000):
        job = (await known.get(f"/v1/videos/{name}")).json()
        if job["status"] in ("completed", "failed"):
            return job
        await asyncio.sleep(0.1)
    raise AssertionError(f"not finished: {job}")


def test_a_portrait_and_a_recording_become_a_video(tmp_path):
    """Which says that it was made, in its corner and in its file."""
    c2pa = pytest.importorskip("c2pa")
    (operator := tmp_path / "operator").mkdir()
    certificate, key = map(str, chain(operator))
    settings = Settings(engine="mock", jobs=str(tmp_path), badge=True, certificate=certificate,
                        certificate_key=key)  # fmt: skip

    async def run() -> None:
        async with client(settings) as known:
            files = {"audio": ("a.wav", sound(0.6)), "input_reference": ("p.png", picture())}
            asked = await known.post("/v1/videos", files=files, data={"prompt": "Someone smiles."})
            assert asked.status_code == 200, asked.text
            job = asked.json()
            assert (job["object"], job["status"], job["seconds"]) == ("video", "queued", "0.60")
            early = await known.get(f"/v1/videos/{job['id']}/content")
            assert (early.status_code, early.json()["retryable"]) == (409, True)
            done = await finished(known, job["id"])
            assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
            video = await known.get(f"/v1/videos/{job['id']}/content")
            assert video.headers["content-type"] == "video/mp4"
            with av.open(io.BytesIO(video.content)) as file:
                shown = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
            assert len(shown) == 15
            mark = marks.badge(np.full_like(shown[0], 128))
            corner = np.any(mark != 128, axis=-1)
            assert all(np.abs(frame[corner] - mark[corner].astype(int)).mean() < 20
                       for frame in shown)  # fmt: skip
            (at := tmp_path / "got.mp4").write_bytes(video.content)
            with c2pa.Reader(str(at)) as reader:
                assert "trainedAlgorithmicMedia" in reader.json()
            # no face and no voice is kept
            kept = {path.name for path in (tmp_path / job["id"]).iterdir()}
            assert kept == {"job.json", "video.mp4"}
            assert [x["id"] for x in (await known.get("/v1/videos")).json()["data"]] == [job["id"]]
            gone = await known.delete(f"/v1/videos/{job['id']}")
            assert gone.json()["deleted"] and not (tmp_path / job["id"]).exists()
            assert (await known.get(f"/v1/videos/{job['id']}")).status_code == 404

    asyncio.run(run())


def test_what_is_no_portrait_or_no_recording_is_refused_and_leaves_nothing(tmp_path):
    async def run() -> None:
        async with client(Settings(engine="mock", jobs=str(tmp_path))) as known:
            for audio, face, words in [
                (b"noise", picture(), "audio"),
                (sound(0.0), picture(), "the audio file recording holds no sound"),
                (sound(0.5), b"\x89PNG\r\n", "portrait"),
                (sound(0.5), picture(4000, 20), "crop"),
            ]:
                files = {"audio": ("a.wav", audio), "input_reference": ("p.png", face)}
                answer = await known.post("/v1/videos", files=files)
                assert answer.status_code == 400, answer.text
                assert words in answer.json()["detail"]
            missing = await known.post("/v1/videos", files={"audio": ("a", sound(0.5))},
                                       data={"avatar": "nobody"})  # fmt: skip
            assert missing.status_code == 404
            assert list(tmp_path.iterdir()) == []

    asyncio.run(run())


def test_a_portrait_of_a_caller_needs_the_consent_that_the_operator_asks_for(tmp_path, caplog):
    """Of videos as of sessions; what is agreed to is in the log, without the picture."""

    async def run() -> None:
        settings = Settings(jobs=str(tmp_path), consent=True, uploads="yes")
        async with client(settings) as known:
            files = {"audio": sound(0.5), "input_reference": picture()}
            ask = lambda **data: known.post("/v1/videos", files=files, data=data)
            for said, status in (("", 403), ("yes", 400), ('{"who": "Ada"}', 400)):
                assert (await ask(consent=said)).status_code == status, said
            assert not list(tmp_path.iterdir()) and not caplog.records
            said = '{"who": "Ada", "when": "2026-11-28", "proof": "signed"}'
            job = (await ask(consent=said)).json()
            about = caplog.records[-1].__dict__["about"]
            assert about["who"] == "Ada" and about["video"] == job["id"]
            assert about["face"] == hashlib.sha256(picture()).hexdigest()
        settings = Settings(jobs=str(tmp_path), uploads="no")
        async with client(settings) as known:
            refused = await known.post("/v1/videos", files=files)
            assert refused.status_code == 403 and "no-uploads" in refused.json()["type"]

    caplog.set_level("INFO", logger=front.log.name)
    asyncio.run(run())


def test_bombs_are_refused_before_they_are_decoded(monkeypatch):
    from serve import pictures

    given = picture()
    monkeypatch.setattr(pictures, "PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(LiveAvatarError, match="at most 1000"):
        pictures.checked(given)


def test_a_long_recording_is_noticed_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "LONGEST", 1)
    known = Jobs(Settings(engine="mock", jobs=str(tmp_path)))
    with pytest.raises(LiveAvatarError, match="longer than 1 s"):
        asyncio.run(known.add(picture(), sound(2.0), "x", 0))
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_starts_again_goes_on_with_its_jobs(tmp_path, monkeypatch):
    made = []

    async def make(self, job):
        assert (self.folder / job.id / "recording").is_file() and job.progress == 0
        made.append((job.id, job.prompt, job.seed))
        job.status = "completed"

    async def run() -> None:
        before = Jobs(Settings(engine="mock", jobs=str(tmp_path)))
        job = await before.add(picture(), sound(0.4), "Someone speaks.", 3)
        job.status, job.progress = "in_progress", 40  # and then the power fails
        before._keep(job)
        monkeypatch.setattr(Jobs, "_make", make)
        async with client(Settings(engine="mock", jobs=str(tmp_path))) as known:
            assert (await finished(known, job.id))["status"] == "completed"
        assert made == [(job.id, "Someone speaks.", 3)]

    asyncio.run(run())


def test_a_full_disk_fails_one_job_in_one_sentence(tmp_path, monkeypatch):
    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    known, given = Jobs(Settings(engine="mock", jobs=str(tmp_path))), picture()
    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(jobs.Problem, match="no space left on device") as caught:
        asyncio.run(known.add(given, sound(0.4), "x", 0))
    assert caught.value.status == 507
    assert list(tmp_path.iterdir()) == [] and known.list() == []


def test_what_goes_wrong_with_one_video_ends_neither_the_queue_nor_the_server(
    tmp_path, monkeypatch
):
    async def refused(*_args, **_more):
        raise OSError(11, "Resource temporarily unavailable")

    async def run() -> None:
        async with client(Settings(engine="mock", jobs=str(tmp_path))) as known:
            monkeypatch.setattr(jobs.asyncio, "create_subprocess_exec", refused)
            for _ in range(2):
                asked = await known.post("/v1/videos", files={"audio": ("a.wav", sound(0.4))})
                job = await finished(known, asked.json()["id"])
                assert (job["status"], job["error"]["code"]) == ("failed", "failed")
                assert job["expires_at"] and not list(tmp_path.iterdir())

    asyncio.run(run())


def test_what_comes_while_the_queue_waits_begins_at_once_and_no_more_than_fit(
    tmp_path, monkeypatch
):
    """Also where all of it comes at the same time, and one of them goes."""
    made, slow = [], threading.Event()
    seconds = jobs._seconds

    async def make(self, job):
        made.append(job.id)
        job.status = "completed"

    def slowly(path):
        assert threading.current_thread().name.startswith("jobs")
        slow.wait(30)
        return seconds(path)

    async def run() -> None:
        monkeypatch.setattr(Jobs, "_make", make)
        monkeypatch.setattr(jobs, "WAITING", 3)
        monkeypatch.setattr(jobs, "_seconds", slowly)
        known = Jobs(Settings(engine="mock", jobs=str(tmp_path)))
        queue = asyncio.create_task(known.run())
        await asyncio.sleep(0.3)  # it waits
        asked = [asyncio.create_task(known.add(picture(), sound(0.4), "x", 0)) for _ in range(5)]
        await until(lambda: any(tmp_path.iterdir()))
        assert [task.done() for task in asked] == [False] * 3 + [True] * 2 and not known.list()
        for task in asked[3:]:
            with pytest.raises(jobs.Problem, match="3 videos are waiting already"):
                task.result()
        asked[0].cancel()  # and nothing of it stays
        await asyncio.wait(asked[:1])
        slow.set()
        assert [(await task).status for task in asked[1:3]] == ["queued"] * 2
        await until(lambda: made == [task.result().id for task in asked[1:3]])
        await until(lambda: {path.name for path in tmp_path.iterdir()} == set(made))
        queue.cancel()
        await asyncio.gather(queue, return_exceptions=True)

    asyncio.run(run())


async def until(happened, seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not happened():
            await asyncio.sleep(0.02)


def test_jobs_have_the_devices_and_the_size_of_the_engines(tmp_path, monkeypatch):
    """A model that knows one size is not asked for another, as in an engine."""
    asked = []

    async def refused(*words, env, **_more):
        asked.append((words, env))
        raise OSError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(jobs.asyncio, "create_subprocess_exec", refused)
    for size in (None, 64):
        (folder := tmp_path / str(size)).mkdir()
        (folder / "config.json").write_text(json.dumps({"size": size}))
    for weights, given in (("", []), ("64", []), ("None", ["480*480"]), ("nowhere", [])):
        chosen = Settings(size="480*480", devices=("4", "5"), workers=2, jobs=str(tmp_path),
                          weights=str(tmp_path / weights) if weights else "")  # fmt: skip
        job = jobs.Job("video_123456789012", "x", "1.00", 0)
        with pytest.raises(OSError):
            asyncio.run(Jobs(chosen)._make(job))
        words, env = asked.pop()
        said = [words[at + 1] for at, word in enumerate(words) if word == "--size"]
        assert said == given, weights
        assert env["CUDA_VISIBLE_DEVICES"] == "4" and env["PATH"] == os.environ["PATH"]


# ---- marks


def chain(folder: Path) -> tuple[Path, Path]:
    """A certificate that may sign content, of an authority of its own, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([
        x509.NameAttribute(NameOID.COMMON_NAME, name),
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"),
    ]) for name in ("Test authority", "Test operator")]  # fmt: skip
    now = datetime.datetime.now(datetime.UTC)
    made = []
    for own, authority in ((0, True), (1, False)):
        usage = x509.KeyUsage(not authority, False, False, False, False, authority, authority,
                              False, False)  # fmt: skip
        building = (
            x509.CertificateBuilder()
            .subject_name(names[own])
            .issuer_name(names[0])
            .public_key(keys[own].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=30))
            .add_extension(x509.BasicConstraints(authority, None), True)
            .add_extension(usage, True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(keys[own].public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), False
            )
        )
        if not authority:
            emails = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            building = building.add_extension(emails, True)
        made.append(building.sign(keys[0], hashes.SHA256()))
    pem = serialization.Encoding.PEM
    certificate, key = folder / "chain.pem", folder / "key.pem"
    certificate.write_bytes(made[1].public_bytes(pem) + made[0].public_bytes(pem))
    key.write_bytes(keys[1].private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ))  # fmt: skip
    return certificate, key


def test_a_file_says_that_a_model_made_it(tmp_path):
    c2pa = pytest.importorskip("c2pa")
    from liveavatar_jax.data.video import VideoWriter

    path, certificate = tmp_path / "a.mp4", chain(tmp_path)
    with VideoWriter(path, (64, 64)) as video:
        video.write(np.zeros((5, 64, 64, 3), np.uint8))
    marks.sign(path, *certificate)
    with c2pa.Reader(str(path)) as reader:
        said = reader.json()
    assert "trainedAlgorithmicMedia" in said and "c2pa.created" in said
    assert "mismatch" not in said.lower()
    with av.open(str(path)) as file:
        assert sum(1 for _ in file.decode(video=0)) == 5
    changed = bytearray(path.read_bytes())
    changed[-20] ^= 0xFF
    path.write_bytes(changed)
    with c2pa.Reader(str(path)) as reader:
        assert "mismatch" in reader.json().lower()


def test_a_bad_certificate_is_named_and_leaves_the_file(tmp_path):
    pytest.importorskip("c2pa")
    path = tmp_path / "a.mp4"
    path.write_bytes(b"film")
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    with pytest.raises(LiveAvatarError, match=r"bad\.pem"):
        marks.sign(path, bad, bad)
    assert path.read_bytes() == b"film"


@pytest.mark.parametrize("size", [2_000, 3_000_000])
def test_a_disk_that_fills_while_a_file_is_signed_is_told_as_such(tmp_path, size):
    """Whether c2pa-python gets to know of it, or the last of it waits in a buffer."""
    pytest.importorskip("c2pa")
    from liveavatar_jax.data.video import VideoWriter

    path, certificate = tmp_path / "a.mp4", chain(tmp_path)
    with VideoWriter(path, (64, 64)) as video:
        video.write(np.zeros((5, 64, 64, 3), np.uint8))
    film = path.read_bytes() + size.to_bytes(4, "big") + b"free" + bytes(size - 8)
    path.write_bytes(film)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(film) // 2, before[1]))
    try:
        with pytest.raises(LiveAvatarError) as caught:
            marks.sign(path, *certificate)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = f"cannot sign: the disk is full; {path} is there, but not signed"
    assert str(caught.value) == said and path.read_bytes() == film
    assert {x.name for x in tmp_path.iterdir()} == {"a.mp4", "chain.pem", "key.pem"}
    said = said.replace(str(path), str(tmp_path / "draft.mp4"))
    assert jobs._said(f"liveavatar-jax: {said}") == "cannot sign: the disk is full"


def test_what_c2pa_python_does_not_say_of_a_full_disk_is_told(tmp_path, monkeypatch):
    c2pa = pytest.importorskip("c2pa")

    class Builder(contextlib.nullcontext):
        def __enter__(self):
            return self

        def sign(self, signing, kind, film, out):
            with contextlib.suppress(OSError):  # as its callbacks do
                out.raw.write(b"much")
            raise c2pa.C2paError("Io: it could not be written")

    monkeypatch.setattr(c2pa, "Builder", Builder)
    (path := tmp_path / "a.mp4").write_bytes(b"film")
    with pytest.raises(LiveAvatarError, match=r"^cannot sign: the disk is full$"):
        marks._write(path, Path("/dev/full"), "", None)


@pytest.mark.parametrize("side", [64, 256, 720])
def test_a_badge_is_in_the_corner_and_the_frame_is_left_alone(side):
    frame = np.full((side, side, 3), 99, np.uint8)
    marked = marks.badge(frame)
    assert (frame == 99).all() and marked.shape == frame.shape
    changed = np.any(marked != frame, axis=-1)
    assert changed[side * 9 // 10 :, side * 3 // 4 :].any()
    assert not changed[: side * 3 // 4].any() and not changed[:, : side * 3 // 4].any()
    assert marked.max() > 180 and marked.min() < 60
