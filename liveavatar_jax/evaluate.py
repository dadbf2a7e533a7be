"""`liveavatar-jax evaluate`: how good is a model, or a folder of videos? GenBench's protocol over
any list of clips (Live Avatar, arXiv 2512.04677, section 5.1 and appendix).

    short      every clip once, as long as its sound, about 10 s
    long       every clip for 5 minutes; a shorter sound is repeated
    horizon    seconds 0-10, 100-110, 1000-1010 and 10000-10010 of one stream, sound repeated

A clip is streamed block by block and looked at as it comes, several clips at once as the rows of
a batch. What was seen of a clip is one file of OUT/seen, and a clip that has its files is not
made again; the table, OUT/metrics.json and OUT/report.html are made of these files.
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig, change
from liveavatar_jax.data import speech
from liveavatar_jax.data.image import fit_portrait, read_picture, to_pixels
from liveavatar_jax.data.prompt import PROMPT, Tokenizer
from liveavatar_jax.data.takes import FPS, Take, read_takes
from liveavatar_jax.generate import SAMPLES, ear, generate, with_lead
from liveavatar_jax.generate import Request as Generate
from liveavatar_jax.metrics import embeddings, page, verdict
from liveavatar_jax.metrics.face import Faces
from liveavatar_jax.metrics.frechet import Statistics
from liveavatar_jax.metrics.observe import Embed, Eyes
from liveavatar_jax.metrics.readers import READERS, Readers
from liveavatar_jax.player import load, load_avatar
from liveavatar_jax.protocol import Job, Request, Seer, frames_of
from liveavatar_jax.rows import Rows
from liveavatar_jax.types import Float, LiveAvatarError
from liveavatar_jax.weights import checkpoint
from liveavatar_jax.weights.convert import TOKENIZER

CHUNK = 48  # frames of a finished video that are looked at together


@dataclasses.dataclass(frozen=True)
class Report:
    """What came out; `str` closes the command."""

    out: Path
    lines: list[verdict.Line]
    warnings: list[str]
    clips: int
    wanted: int

    @property
    def finished(self) -> bool:
        return self.clips == self.wanted

    def __str__(self) -> str:
        state = "" if self.finished else f", interrupted: {self.clips} of {self.wanted}"
        head = f"{self.out / 'report.html'}: {self.clips} clips{state}"
        said = [f"note: {warning}" for warning in self.warnings]
        return "\n".join([verdict.as_text(self.lines), *said, head])


def evaluate(request: Request, embed: Mapping[str, Embed] | None = None) -> Report:
    """Runs the whole command, or what an earlier run left of it; an interrupt leaves a report of
    the clips that are done.

    embed: other networks by name, bytes "F H W 3" to features "F k", for cosines and Fréchet.
    Raises LiveAvatarError for any input that cannot be used.
    """
    _check(request)
    takes = read_takes(request.clips, request.limit)
    real = {name: Statistics.load(path) for name, path in request.real.items()}
    eyes = _eyes(request, embed or {})
    _settle(request, takes)
    cfg = ModelConfig() if request.weights is None else _config(request)
    jobs = [Job.of(request, i, take, cfg) for i, take in enumerate(takes)]
    if not jobs[0].windows:
        raise LiveAvatarError(f"--seconds {request.seconds:g} leaves no window; give at least 10")
    left = [job for job in jobs if not all(path.is_file() for path in job.files(request.out))]
    try:
        if left and request.videos is not None:
            _see_videos(request, left, eyes)
        elif left:
            _see_model(request, left, eyes)
        if request.timing and request.weights is not None and not request.changes:
            _report(request, jobs, real)  # compiling once more takes a while
            _time(request, takes[0])
    except KeyboardInterrupt:
        pass
    return _report(request, jobs, real)


def _check(request: Request) -> None:
    if (request.weights is None) == (request.videos is None):
        raise LiveAvatarError("give either --weights, a model, or --videos, a folder of its videos")
    if request.changes and request.weights is None:
        raise LiveAvatarError("--set changes a model, which finished --videos are not")
    if request.protocol not in ("short", "long", "horizon"):
        raise LiveAvatarError(f"--protocol {request.protocol} must be short, long or horizon")
    for name in ("videos", "embeddings"):
        folder = getattr(request, name)
        if folder is not None and not folder.is_dir():
            raise LiveAvatarError(f"--{name} {folder} is not a folder")
    for name, least in (("limit", 1), ("rows", 1), ("steps", 1), ("seconds", 0.2)):
        value = getattr(request, name)
        if value is not None and value < least:
            raise LiveAvatarError(f"--{name} {value} must be at least {least}")


def _eyes(request: Request, embed: Mapping[str, Embed]) -> Eyes:
    path = request.readers
    if path is None and request.weights is not None and (request.weights / READERS).is_file():
        path = request.weights / READERS
    return Eyes(
        None if path is None else Readers(path), Faces() if request.faces else None, dict(embed)
    )


# A model


def _config(request: Request) -> ModelConfig:
    assert request.weights is not None
    return change(checkpoint.load_config(request.weights), request.changes)


def _see_model(request: Request, jobs: Sequence[Job], eyes: Eyes) -> None:
    """Streams all jobs, those of one picture size together, long ones with long ones."""
    folder = request.weights
    assert folder is not None
    cfg = _config(request)
    dtype = request.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    policy = dataclasses.replace(cfg.stream, dtype=dtype, steps=request.steps or cfg.stream.steps)
    cfg = dataclasses.replace(cfg, stream=policy)
    with jax.default_matmul_precision("highest" if dtype == "float32" else None):
        prompts = encode_prompts(folder, cfg, [job.take.caption for job in jobs])
        contexts = {job.take.id: rows for job, rows in zip(jobs, prompts, strict=True)}
        avatar, hearing = load_avatar(folder, cfg), ear(folder, cfg)
        total = cfg.block * sum(job.blocks for job in jobs)
        with tqdm(total=total, unit="frame") as bar:
            bar.set_description("compiling")
            for size in sorted({job.picture.shape for job in jobs}):
                alike = [job for job in jobs if job.picture.shape == size]
                alike.sort(key=lambda job: job.blocks)
                small = size[0] * size[1] <= 256 * 256
                count = min(request.rows or (8 if small else 1), len(alike))
                rows = None
                for at in range(0, len(alike), count):
                    group = alike[at : at + count]
                    rows = _see_group(
                        request, avatar, hearing, contexts, group, count, rows, eyes, bar
                    )


def _see_group(
    request: Request, avatar: stream.Avatar, hearing: tuple, contexts: Mapping[str, np.ndarray],
    group: Sequence[Job], count: int, rows: Rows | None, eyes: Eyes, bar: tqdm,
) -> Rows:  # fmt: skip
    """Streams some jobs as the rows of a batch; rows that are too many rest."""
    padded = [*group, *[group[0]] * (count - len(group))]
    heard = [_heard(hearing, job) for job in padded]
    ends = np.array([job.blocks for job in group] + [0] * (count - len(group)))
    blocks = int(ends.max())

    def chunks() -> Iterator[stream.Chunk]:
        for block in range(blocks):
            audio = np.stack([next(features) for features in heard])[:, None]
            yield stream.Chunk(audio=audio, live=block < ends)  # type: ignore[arg-type]
            bar.update(group[0].block * int((block < ends).sum()))

    coming = chunks()
    first = next(coming)
    opening = (
        np.stack([to_pixels(job.picture) for job in padded]),
        np.stack([contexts[job.take.id] for job in padded]),
        request.seed,
        np.array([job.number for job in padded], np.int32),
    )
    if rows is None:
        rows = Rows(avatar, *opening, first)
    else:
        rows.reopen(*opening)
    wanted = {b for job in group for w in job.windows for b in job.blocks_of(w)}
    seers = [[Seer(request, job, window, eyes) for window in job.windows] for job in group]
    bar.set_description(group[0].take.id)
    for block, pixels in rows.play(itertools.chain([first], coming), wanted.__contains__):
        for row, windows in zip(pixels, seers, strict=False):
            for seer in windows:
                seer.see(block * group[0].block - stream.LEAD_FRAMES, row)
    return rows


def _heard(hearing: tuple, job: Job) -> Iterator[Float[np.ndarray, "frames layers c"]]:
    """Features of a take's sound, over and over for as long as it is streamed, then silence."""
    encode, window, silence = hearing
    samples, times = job.samples, -(-job.windows[-1].stop // job.sound)
    if times > 1:  # whole frames, so that truth comes round with the sound
        samples = np.pad(samples, (0, job.sound * SAMPLES - len(samples)))
    once = speech.Moments.of([samples])
    moments = speech.Moments(times * once.count, once.mean, times * once.deviation)

    def blocks() -> Iterator[np.ndarray]:
        for block in speech.file_features(encode, itertools.repeat(samples), moments, window):
            yield block
        yield from itertools.repeat(np.full_like(block, silence))

    return with_lead(blocks(), job.block)


def encode_prompts(
    folder: Path, cfg: ModelConfig, prompts: Sequence[str | None]
) -> list[Float[np.ndarray, "t k"]]:
    """Rows of the text encoder for each prompt, up to `text_len` with zeros, as the DiT takes
    them anyway. Without a prompt a plain one, or none if the folder has no tokenizer."""
    plain = PROMPT if (folder / TOKENIZER).is_file() else None
    texts = [prompt or plain for prompt in prompts]
    blank = np.zeros((cfg.dit.text_len, cfg.dit.text_dim), np.float32)
    rows: dict[str | None, np.ndarray] = {None: blank}
    if any(texts):
        tokenizer, encoder = Tokenizer(folder), load(folder, "text")
        run = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))
        for text in dict.fromkeys(text for text in texts if text is not None):
            ids, mask = tokenizer(text, cfg.dit.text_len)
            known = np.asarray(run(encoder, ids, mask)[0], np.float32)
            rows[text] = known * (np.arange(len(known)) < mask.sum())[:, None]
    return [rows[text] for text in texts]


def _time(request: Request, take: Take) -> None:
    """What `generate` says of the first take, alone: frames a second, and until the first."""
    file = request.out / "timing.json"
    if file.is_file() or request.weights is None:
        return
    out = request.out / "timing.mp4"
    report = generate(
        Generate(take.image, take.audio, out, request.weights, take.caption, request.area,
                 steps=request.steps, seed=request.seed, dtype=request.dtype)
    )  # fmt: skip
    out.unlink(missing_ok=True)
    if not report.finished:
        raise KeyboardInterrupt
    _write(file, {"fps": report.fps, "first_frame": report.first_frame,
                  "compiling": report.compiling, "frames": report.frames})  # fmt: skip


# Finished videos


def _see_videos(request: Request, jobs: Sequence[Job], eyes: Eyes) -> None:
    assert request.videos is not None
    with tqdm(total=len(jobs), unit="clip") as bar:
        for job in jobs:
            path = request.videos / f"{job.take.id}.mp4"
            frames = frames_of(path)
            first = next(frames, None)
            if first is None:
                raise LiveAvatarError(f"{path} holds no frame; make it again")
            # The portrait at the size of the video, whatever that is.
            job = dataclasses.replace(job, picture=_portrait(job, first.shape))
            seers = [Seer(request, job, window, eyes) for window in job.windows]
            number, most = 0, job.windows[-1].stop
            frames = itertools.islice(itertools.chain([first], frames), most)
            while some := list(itertools.islice(frames, CHUNK)):
                for seer in seers:
                    seer.see(number, np.stack(some))
                number += len(some)
            for seer in seers:
                if seer.observer.seen and not seer.path.is_file():
                    short = dataclasses.replace(
                        seer.window, stop=seer.window.start + seer.observer.seen)  # fmt: skip
                    seer.window = short  # a video may be some frames shorter than its sound
                    seer.done()
            if not all(path.is_file() for path in job.files(request.out)):
                raise LiveAvatarError(
                    f"{path} ends after {number / FPS:.1f} s, before the last window of the "
                    f"protocol begins; take another --protocol or --seconds"
                )
            bar.update()


def _portrait(job: Job, shape: tuple[int, ...]) -> np.ndarray:
    return fit_portrait(read_picture(job.take.image), (shape[0], shape[1]))


# The report


def _report(request: Request, jobs: Sequence[Job], real: Mapping[str, Statistics]) -> Report:
    done = [job for job in jobs if all(path.is_file() for path in job.files(request.out))]
    clips = []
    for job in done:
        windows = []
        for path in job.files(request.out):
            with np.load(path) as file:
                windows.append({name: np.asarray(file[name]) for name in file.files})
        clips.append(windows)
    if not clips:
        raise KeyboardInterrupt
    lines = verdict.table(clips)
    distances, warnings = verdict.distances(clips, real)
    if request.embeddings is not None:
        made = [embeddings.read(request.embeddings / f"{job.take.id}.npz") for job in done]
        more, said = embeddings.lines(made, real)
        distances, warnings = distances + more, warnings + said
    lines += distances + _timed(request)
    by_window = {}
    if len(jobs[0].windows) > 1:
        for i, window in enumerate(jobs[0].windows):
            by_window[window.name] = verdict.table([[windows[i]] for windows in clips])
    about = {
        "model": str(request.weights or request.videos), "list": str(request.clips),
        "protocol": request.protocol, "clips": len(done), "of": len(jobs),
        "seed": request.seed, "steps": request.steps, "changes": list(request.changes),
        "device": jax.devices()[0].device_kind,
    }  # fmt: skip
    each = {
        job.take.id: [verdict.judged(window) for window in windows]
        for job, windows in zip(done, clips, strict=True)
    }
    as_values = lambda lines: {line.key: dataclasses.asdict(line) for line in lines}
    _write(request.out / "metrics.json", {
        "about": about, "metrics": as_values(lines), "warnings": warnings,
        "windows": {name: as_values(some) for name, some in by_window.items()}, "clips": each,
    })  # fmt: skip
    names = {job.take.id: windows for job, windows in zip(done, clips, strict=True)}
    text = page.page(about, lines, by_window, names, warnings)
    _write(request.out / "report.html", text)
    return Report(request.out, lines, warnings, len(done), len(jobs))


def _timed(request: Request) -> list[verdict.Line]:
    file = request.out / "timing.json"
    if not file.is_file():
        return []
    told = json.loads(file.read_text())
    return [
        verdict.Line("fps", "frames a second, one stream", "high", "as `generate` reports",
                     told["fps"]),
        verdict.Line("first_frame", "seconds to the first frame", "low", "after compiling",
                     told["first_frame"]),
    ]  # fmt: skip


def _settle(request: Request, takes: Sequence[Take]) -> None:
    """Notes what is judged; raises LiveAvatarError where OUT holds the judgement of another."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    model = request.videos or request.weights
    assert model is not None
    marks = [model / name for name in ("files.json", "config.json") if (model / name).is_file()]
    if not (model / "files.json").is_file():  # which tells all weights of a converted model
        marks += sorted(model.glob("*.safetensors"))
    settings = {
        "model": str(model.resolve()),
        "weights": [digest(path) for path in marks],
        "clips": digest(request.clips),
        "protocol": request.protocol,
        "seconds": request.seconds,
        "area": request.area,
        "steps": request.steps,
        "changes": list(request.changes),
        "seed": request.seed,
        "dtype": request.dtype,
        "readers": request.readers and digest(request.readers),
        "faces": request.faces,
    }
    path = request.out / "evaluate.json"
    try:
        (request.out / "seen").mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text()) if path.is_file() else settings
    except OSError as error:
        raise LiveAvatarError(f"cannot write {request.out}: {error.strerror}") from None
    except ValueError:
        raise LiveAvatarError(f"{path} is damaged; remove the folder or name another") from None
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed:
        raise LiveAvatarError(
            f"{request.out} was begun with another {', '.join(changed)}; ask for the same, or name "
            "another --out folder"
        )
    _write(path, settings)


def _write(path: Path, value: Any) -> None:
    """A text as it is, or a value as json; whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
        partial.replace(path)
    except OSError as error:
        raise LiveAvatarError(f"cannot write {path}: {error.strerror}") from None
