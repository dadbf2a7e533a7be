"""A list of clips and a folder of files → shards of encoded windows for training.

    OUT/encode.json                    how it was made; a second run must ask for the same
    OUT/clips-00000.array_record       the windows of the first clips of the list, in its order
    OUT/clips-00000.json               written after it: what of these clips was dropped, and why
    OUT/report.json, OUT/dropped.csv   the sum of those, at the end

Processes decode and filter while the networks run here. A shard stands for a fixed part of the
list and is whole or absent, so a run that was stopped anyhow goes on at the first part whose
json is missing and leaves the records of a run that was not.
"""

import contextlib
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tqdm import tqdm

from liveavatar_jax.config import ModelConfig, from_dict
from liveavatar_jax.data import speech
from liveavatar_jax.data.filters import PAST, Dropped, Kept, Window, WindowConfig
from liveavatar_jax.data.listing import Demand, Entry, Folder, Scores, read_list
from liveavatar_jax.data.prompt import PROMPT, Tokenizer
from liveavatar_jax.data.records import FPS, SUFFIX, About, BrokenRecord, Clip, pack, write_shard
from liveavatar_jax.data.workers import Job, examined
from liveavatar_jax.generate import ear
from liveavatar_jax.models.vae import VAE
from liveavatar_jax.player import load
from liveavatar_jax.types import Array, Float, LiveAvatarError, UInt8
from liveavatar_jax.weights import checkpoint
from liveavatar_jax.weights.convert import TOKENIZER

STORED = "bfloat16"  # what records hold


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of `liveavatar-jax encode`."""

    list: Path
    folder: Path
    out: Path
    weights: Path
    windows: WindowConfig = dataclasses.field(default_factory=WindowConfig)
    caption: str | None = None  # of clips whose list has none
    scores: Path | None = None
    demands: tuple[str, ...] = ()  # on scores, such as sync>=3
    part: tuple[int, int] = (1, 1)  # of the list: this one, of so many
    per_shard: int = 64  # clips that a shard stands for
    workers: int | None = None  # processes that decode
    dtype: str | None = None  # of the VAE; float32 on a CPU, bfloat16 elsewhere
    negative: str | None = None  # a text, whose rows go to OUT/negative.safetensors


@dataclasses.dataclass
class Report:
    """What became of the clips; `str` is the table that closes the command."""

    out: Path
    clips: int = 0
    windows: int = 0
    seconds: float = 0.0  # of video in all windows
    lost: int = 0  # windows of used clips that a change of scene cost
    dropped: list[dict[str, str]] = dataclasses.field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        return dict(Counter(drop["reason"] for drop in self.dropped).most_common())

    def __str__(self) -> str:
        rows = [("clips", self.clips, ""), ("used", self.clips - len(self.dropped), "")]
        hours = f"{self.seconds / 3600:.2f} h" if self.seconds > 3600 else f"{self.seconds:.1f} s"
        rows += [("windows", self.windows, hours), ("dropped", len(self.dropped), "")]
        rows += [(f"  {reason}", count, "") for reason, count in self.reasons.items()]
        lines = [f"{name:20}{count:8}  {more}".rstrip() for name, count, more in rows]
        return "\n".join([f"{self.out}:", *lines])


def parse_windows(size: str, changes: Sequence[str]) -> WindowConfig:
    """The windows of the command line: "720*400", and changes such as "stride=42"."""
    values: dict[str, Any] = {}
    for change in changes:
        field, _, value = change.partition("=")
        try:
            values[field.strip()] = json.loads(value)
        except ValueError:
            raise LiveAvatarError(
                f"--set {change!r} is not understood; write FIELD=NUMBER, as in stride=42"
            ) from None
    match = re.fullmatch(r"\s*(\d{1,5})\s*[*xX×]\s*(\d{1,5})\s*", size)
    if match is None:
        raise LiveAvatarError(f"size {size!r} must be two whole numbers, for example 720*400")
    return from_dict(WindowConfig, {"width": int(match[1]), "height": int(match[2]), **values})


def parse_part(text: str) -> tuple[int, int]:
    """Such as "2/8"."""
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise LiveAvatarError(f"--part {text!r} must be I/N with I from 1 to N, as in 2/8")
    return int(match[1]), int(match[2])


def encode(request: Request) -> Report:
    """Runs the whole command, or what an earlier run left of it.

    Raises LiveAvatarError for any input that cannot be used as a whole; a clip that cannot be
    used is dropped and in the report.
    """
    entries = read_list(request.list)
    folder = Folder(request.folder)
    scores = Scores(request.scores) if request.scores else None
    demands = [Demand.parse(text) for text in request.demands]
    if demands and scores is None:
        raise LiveAvatarError(f"{demands[0]} needs the file of scores; name it with --scores")
    part, parts = request.part
    _settle(request)
    mine = _jobs(entries, folder, scores, demands)[part - 1 :: parts]
    shards = [mine[i : i + request.per_shard] for i in range(0, len(mine), request.per_shard)]
    left = [i for i in range(len(shards)) if not _note(request, i).is_file()]
    if left:
        _encode_shards(request, shards, left)
    return _report(request, shards)


def _encode_shards(request: Request, shards: list[list[Job]], left: list[int]) -> None:
    jobs = [job for i in left for job in shards[i]]
    workers = request.workers or min(8, max(1, (os.cpu_count() or 1) - 1))
    done = sum(map(len, shards)) - len(jobs)
    networks = Networks(request, jobs)
    if request.negative is not None:
        plain = [dataclasses.replace(jobs[0].entry, caption=None)]
        rows = Captions(request.weights, networks.cfg, request.negative, plain)(None)
        save_file({"text": rows.astype(np.float32)}, request.out / "negative.safetensors")
    with (
        jax.default_matmul_precision("highest" if networks.dtype == "float32" else None),
        contextlib.closing(examined(jobs, request.windows, workers)) as results,
        tqdm(total=done + len(jobs), initial=done, unit="clip") as bar,
    ):
        for i in left:
            mine = itertools.islice(results, len(shards[i]))
            _encode_shard(request, i, mine, networks, bar)


def _encode_shard(
    request: Request, number: int, results: Iterator, networks: "Networks", bar: tqdm
) -> None:
    """One shard, and then the note that says it is done."""
    note: dict[str, Any] = {"clips": 0, "lost": 0, "dropped": []}

    def drop(job: Job, why: Dropped) -> None:
        row = {"name": job.entry.name, "id": job.entry.id, "file": str(job.path or "")}
        note["dropped"].append({**row, "reason": why.reason, "detail": why.detail})

    def records() -> Iterator[bytes]:
        for job, result in results:
            if isinstance(result, Kept):
                note["lost"] += result.lost
                try:
                    yield from [pack(clip) for clip in networks.encode(job, result)]
                except BrokenRecord as error:
                    drop(job, Dropped("not finite", str(error)))
            else:
                drop(job, result)
            note["clips"] += 1
            bar.update()
            bar.set_postfix(dropped=len(note["dropped"]), shard=number)

    path = request.out / f"{_stem(request, number)}{SUFFIX}"
    note["windows"] = write_shard(path, records())
    note["seconds"] = note["windows"] * request.windows.frames / FPS
    _write(_note(request, number), note)


class Networks:
    """The encoders of a converted checkpoint, compiled for windows of one size."""

    def __init__(self, request: Request, jobs: Sequence[Job]):
        self.cfg: ModelConfig = checkpoint.load_config(request.weights)
        self.windows, folder = request.windows, request.weights
        self.dtype = request.dtype or ("float32" if jax.default_backend() == "cpu" else STORED)
        self.vae: VAE = load(folder, "vae", self.dtype)
        self.ear = ear(folder, self.cfg)
        self.text = Captions(folder, self.cfg, request.caption, [job.entry for job in jobs])
        dtype = self.dtype
        self.see = jax.jit(lambda vae, frames: see(vae, frames, dtype))
        self.stand = jax.jit(lambda vae, frame: see(vae, jnp.repeat(frame, PAST, axis=1), dtype))

    def encode(self, job: Job, clip: Kept) -> Iterator[Clip]:
        """The records of a clip. References that windows share are encoded once."""
        heard, text = self.hear(clip.samples), self.text(job.entry.caption)
        frames, past = self.windows.frames, 1 + (PAST - 1) // 4
        stills: dict[int, Array] = {}
        for number in {k for window in clip.windows for k in window.references}:
            stills[number] = self.stand(self.vae, clip.frames[None, number : number + 1])
        seen = [self.see(self.vae, clip.frames[None, w.with_past(frames)]) for w in clip.windows]
        for window, latents in zip(clip.windows, seen, strict=True):
            latents = np.asarray(latents[0], STORED)
            still = np.stack([np.asarray(stills[k][0], STORED) for k in window.references])
            yield Clip(
                latents=latents[past:],
                motion=latents[:past],
                references=still[:, 0],  # the first latent of a video is that of its first frame
                stills=still,
                text=text,
                audio=heard[window.start : window.start + frames].astype(STORED),
                about=self.about(job, window),
            )

    def hear(self, samples: Float[np.ndarray, " samples"]) -> Float[np.ndarray, "F layers k"]:
        """The features of a clip's frames; all of the clip is the encoder's context."""
        encode, window, _ = self.ear
        moments = speech.Moments.of([samples])
        return np.concatenate(list(speech.file_features(encode, [samples], moments, window)))

    def about(self, job: Job, window: Window) -> About:
        return About(
            id=f"{job.entry.name}/{window.start}",
            start=window.start / FPS,
            frames=self.windows.frames,
            past=window.past,
            caption=job.entry.caption or self.text.default,
            scores=job.scores,
        )


def see(vae: VAE, frames: UInt8[Array, "b F H W 3"], dtype: str) -> Float[Array, "b f h w c"]:
    """Latents of a whole video of bytes."""
    pixels = frames.astype(jnp.float32) / 255 * 2 - 1
    latents, _ = vae.encode(pixels.astype(dtype))
    return latents


class Captions:
    """Rows of the text encoder. It is kept only where there is more than one caption to read.

    Without any caption the plain one of `generate` is used, or none if there is no tokenizer.
    """

    def __init__(
        self, folder: Path, cfg: ModelConfig, default: str | None, entries: Sequence[Entry]
    ):
        known = default is not None or (folder / TOKENIZER).is_file()
        self.default = (default or PROMPT) if known else ""
        self.folder, self.cfg = folder, cfg
        captions = {entry.caption or self.default for entry in entries}
        self.many = len(captions) > 1
        self.tokenizer = Tokenizer(folder) if captions - {""} else None
        self.encoder: Any = None
        self.run = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))
        self.rows = functools.lru_cache(maxsize=64)(self._rows)

    def __call__(self, caption: str | None) -> Float[np.ndarray, "t k"]:
        return self.rows(caption or self.default)

    def _rows(self, caption: str) -> np.ndarray:
        if self.tokenizer is None:
            return np.zeros((1, self.cfg.dit.text_dim), STORED)
        ids, mask = self.tokenizer(caption, self.cfg.dit.text_len)
        encoder = self.encoder or load(self.folder, "text")
        self.encoder = encoder if self.many else None
        return np.asarray(self.run(encoder, ids, mask)[0], STORED)[: int(mask.sum())]


def _jobs(
    entries: Sequence[Entry], folder: Folder, scores: Scores | None, demands: Sequence[Demand]
) -> list[Job]:
    """What is to be done for each clip; some are dropped before their file is opened."""
    seen: set[str] = set()
    jobs = []
    for entry in entries:
        known = scores.of(entry) if scores else {}
        unmet = [demand for demand in demands if not demand.met(known)]
        found = folder.find(entry)
        path, whole = (None, None) if isinstance(found, str) else (found.path, found.whole)
        dropped = None
        if entry.name in seen:
            dropped = Dropped("listed twice")
        elif unmet:
            have = known.get(unmet[0].score)
            dropped = Dropped(f"score {unmet[0].score}", f"{have} is not {unmet[0]}")
        elif isinstance(found, str):
            dropped = Dropped(found)
        seen.add(entry.name)
        jobs.append(Job(entry, path, whole, known, dropped))
    return jobs


# Files


def _stem(request: Request, number: int | None = None) -> str:
    part, parts = request.part
    of = "" if parts == 1 else f"-{part}of{parts}"
    return f"report{of}" if number is None else f"clips{of}-{number:05d}"


def _note(request: Request, number: int) -> Path:
    return request.out / f"{_stem(request, number)}.json"


def _write(path: Path, value: Any) -> None:
    """A text as it is, or a value as json; whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
        partial.replace(path)
    except OSError as error:
        raise LiveAvatarError(
            f"cannot write {path}: {str(error.strerror).lower()}; free some space or name another "
            "--out folder"
        ) from None


def _settle(request: Request) -> None:
    """Notes how the shards are made; raises LiveAvatarError where others are there already."""
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path else None
    checkpoint.load_config(request.weights)  # or there is no sense in going on
    settings = {
        "list": digest(request.list),
        "weights": checkpoint.fingerprint(request.weights),
        "scores": digest(request.scores),
        "demands": list(request.demands),
        "caption": request.caption,
        "parts": request.part[1],
        "per_shard": request.per_shard,
        "dtype": request.dtype or ("float32" if jax.default_backend() == "cpu" else STORED),
        "windows": dataclasses.asdict(request.windows),
    }
    path = request.out / "encode.json"
    try:
        request.out.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_text()) if path.is_file() else None
    except OSError as error:
        raise LiveAvatarError(f"cannot write {request.out}: {error.strerror}") from None
    except ValueError:
        raise LiveAvatarError(f"{path} is damaged; remove the folder or name another") from None
    if before is None:
        if any(request.out.glob(f"*{SUFFIX}")):
            raise LiveAvatarError(f"{request.out} holds shards of something else; name another")
        return _write(path, settings)
    changed = [name for name in settings if settings[name] != before.get(name)]
    if "windows" in changed and isinstance(before.get("windows"), dict):
        fields = settings["windows"].items()
        changed += [f"windows.{k}" for k, value in fields if before["windows"].get(k) != value]
        changed.remove("windows")
    if changed:
        raise LiveAvatarError(
            f"{request.out} was begun with another {', '.join(changed)}; ask for the same, or name "
            "another --out folder"
        )


def _report(request: Request, shards: list[list[Job]]) -> Report:
    """Adds up the notes of all shards."""
    report = Report(request.out)
    for number in range(len(shards)):
        note = json.loads(_note(request, number).read_text())
        shard = _note(request, number).with_suffix(SUFFIX)
        if note["windows"] and not shard.is_file():
            raise LiveAvatarError(
                f"{shard} is gone; remove {_note(request, number).name} beside it to make it again"
            )
        report.clips += note["clips"]
        report.windows += note["windows"]
        report.seconds += note["seconds"]
        report.lost += note["lost"]
        report.dropped += note["dropped"]
    about = dataclasses.asdict(report)
    dropped = about.pop("dropped")
    about = {**about, "out": str(report.out), "dropped": report.reasons}
    stem = _stem(request)
    _write(request.out / f"{stem}.json", about)
    table = io.StringIO()
    rows = csv.DictWriter(table, ["name", "id", "file", "reason", "detail"], lineterminator="\n")
    rows.writeheader()
    rows.writerows(dropped)
    _write(request.out / f"{stem.replace('report', 'dropped')}.csv", table.getvalue())
    return report
