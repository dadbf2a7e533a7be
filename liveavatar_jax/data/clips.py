"""Batches for training: encoded clips, read from ArrayRecord shards by grain.

    data = open_clips(cfg, rows=range(0, 4))     # the rows of the global batch for this process
    batch = next(data)                           # latents, motion, reference, still, text, audio
    data.position                                # global batches taken so far; may be set

The global batch of step s is a function of (config, s) alone: all sources are shuffled anew each
epoch by grain's index shuffle and interleaved by weight, sample s · batch + r is row r, and its
random choices are drawn from its number. Who asks for which rows changes nothing, so processes
that share a sequence-parallel group ask for the same rows, and a run may go on with another
number of processes, on another mesh, at the position where it stopped.
"""

import bisect
import dataclasses
import itertools
import logging
import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from liveavatar_jax.config import insist
from liveavatar_jax.data.records import (
    SUFFIX,
    BrokenRecord,
    Clip,
    Shapes,
    count_records,
    reason,
    require,
    unpack,
)
from liveavatar_jax.types import LiveAvatarError

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """Folders of shards that are drawn from as one, and how often against the other sources."""

    folders: tuple[str, ...]
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a training run reads."""

    sources: tuple[Source, ...] = ()
    batch: int = 1  # rows of the global batch
    seed: int = 0
    text_len: int = 512  # rows of text, filled up with zeros
    reference: str = "random"  # among the references of a record, or its "first"
    drop_audio: float = 0.0  # probability that a sample's audio is zero
    drop_text: float = 0.0
    drop_motion: float = 0.0
    broken_share: float = 0.01  # of a source's records may be broken (and one at least)
    threads: int = 4  # that read and assemble batches
    ahead: int = 4  # batches that are ready or in the making

    def __post_init__(self):
        for name in ("batch", "text_len", "threads", "ahead"):
            insist(getattr(self, name) >= 1, self, name, "be at least 1")
        for name in ("drop_audio", "drop_text", "drop_motion", "broken_share"):
            insist(0 <= getattr(self, name) <= 1, self, name, "lie within 0..1")
        insist(0 <= self.seed < 2**32, self, "seed", f"lie within 0..{2**32 - 1}")
        known = self.reference in ("first", "random")
        insist(known, self, "reference", 'be "first" or "random"')
        for source in self.sources:
            ok = math.isfinite(source.weight) and source.weight > 0
            insist(ok, source, "weight", "be above 0; leave a source out that is not wanted")


class Report:
    """The broken records that were met, each once: (shard, number in it) and the reason."""

    def __init__(self) -> None:
        self.broken: dict[tuple[str, int], str] = {}
        self._lock = threading.Lock()

    def add(self, shard: str, number: int, why: str) -> None:
        with self._lock:
            if (shard, number) in self.broken:
                return
            self.broken[shard, number] = why
        logging.getLogger(__name__).warning(
            "record %d of %s is broken and replaced by the next one: %s", number, shard, why
        )

    def __str__(self) -> str:
        lines = [f"{len(self.broken)} broken records"]
        lines += [
            f"  {shard}, record {n}: {why}" for (shard, n), why in sorted(self.broken.items())
        ]
        return "\n".join(lines)


class Shards:
    """The records of folders of shards, as a random access source of clips; safe for threads.

    A record that is broken gives the next good one of the source instead, and is in the report.
    Raises LiveAvatarError for folders without shards, shards that are damaged as a whole, and
    when more than `broken_share` of the records turn out to be broken.
    """

    def __init__(self, folders: Sequence[str | Path], text_len: int, broken_share: float = 0.01):
        self.paths = _shards(folders)
        with ThreadPoolExecutor(16) as pool:
            counts = list(pool.map(count_records, self.paths))
        self.ends = list(itertools.accumulate(counts))
        parts: list[Any] = [_Whole(str(p), n) for p, n in zip(self.paths, counts, strict=True)]
        self.records = ArrayRecordDataSource(parts)
        self.text_len = text_len
        self.shapes: Shapes | None = None  # that every record must have, once they are known
        self.allowed = max(1, int(broken_share * len(self)))
        self.report = Report()

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index) -> Clip:
        for number in range(int(index), int(index) + len(self)):
            number %= len(self)
            shard, within = self.place(number)
            if (shard, within) in self.report.broken:
                continue
            try:
                return self.read(number)
            except BrokenRecord as error:
                self.report.add(shard, within, str(error))
                self._stop_if_too_many()
        raise LiveAvatarError(f"{self.paths[0].parent} holds no good record; {self.report}")

    def place(self, number: int) -> tuple[str, int]:
        """The shard of a record, and its number there."""
        shard = bisect.bisect_right(self.ends, number)
        return str(self.paths[shard]), number - (self.ends[shard - 1] if shard else 0)

    def read(self, number: int) -> Clip:
        """One record as it is.

        Raises BrokenRecord, with the record's id where that is known, and LiveAvatarError when
        the file cannot be read just now: another process may be able to, and would go on alone.
        """
        try:
            blob = self.records[number]
        except (RuntimeError, ValueError, OSError) as error:
            if isinstance(error, OSError) or "failed: " in str(error):  # of a system call
                shard, _ = self.place(number)
                raise LiveAvatarError(f"cannot read the shard {shard}: {reason(error)}") from None
            raise BrokenRecord(f"its bytes are damaged ({reason(error)})") from None
        clip = unpack(blob)
        if self.shapes is not None:
            try:
                require(clip, self.shapes, self.text_len)
            except BrokenRecord as error:
                raise BrokenRecord(f"{error} (id {clip.about.id})") from None
        return clip

    def _stop_if_too_many(self) -> None:
        if len(self.report.broken) > self.allowed:
            raise LiveAvatarError(
                f"{len(self.report.broken)} of {len(self)} records of {self.paths[0].parent} are "
                f"broken, the last one because {list(self.report.broken.values())[-1]}; encode "
                "them again, or allow more by DataConfig.broken_share"
            )


@dataclasses.dataclass(frozen=True)
class _Whole:
    """A shard whose records are counted already, in the words of ArrayRecord."""

    filename: str
    take: int
    skip: int = 0

    @property
    def examples_in_shard(self) -> int:
        return self.take


def _shards(folders: Sequence[str | Path]) -> list[Path]:
    """In an order that every process agrees on."""
    paths = []
    for folder in map(Path, folders):
        found = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
        if not found:
            raise LiveAvatarError(
                f"{folder} holds no {SUFFIX} shards; `liveavatar-jax encode` makes them"
            )
        paths += found
    return paths


@dataclasses.dataclass(frozen=True)
class _Sample:
    """A clip with its random choices made."""

    clip: Clip
    reference: int
    dropped: tuple[str, ...]


class _Rows(grain.MapDataset):
    """Of an endless row of samples, those which are the given rows of every batch."""

    def __init__(self, parent: grain.MapDataset, batch: int, rows: Sequence[int]):
        super().__init__(parent)
        self.total, self.rows = batch, tuple(rows)  # of a batch

    def __len__(self) -> int:
        return 2**40 * len(self.rows)  # endless, yet a whole number to those who divide it

    def __getitem__(self, index):
        batch, row = divmod(index, len(self.rows))
        return self._parent[batch * self.total + self.rows[row]]


class Batches:
    """Endless batches of the same shapes; `open_clips` and `open_synthetic` make them.

    shapes: the sizes of a record. reports: of broken records, one a source.
    """

    def __init__(
        self, batches: grain.MapDataset, shapes: Shapes, order: dict[str, Any], *,
        threads: int, ahead: int, samples: _Rows | None = None, reports: Sequence[Report] = (),
    ):  # fmt: skip
        self.shapes, self.reports = shapes, list(reports)
        self._order, self._samples = order, samples
        options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
        self._iterator = batches.to_iter_dataset(options).__iter__()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    @property
    def position(self) -> int:
        """Global batches taken so far: the number of the next one."""
        return int(self._iterator.get_state()["next_index"])

    @position.setter
    def position(self, position: int) -> None:
        self._iterator.set_state({"next_index": int(position)})

    def state(self) -> dict[str, Any]:
        """JSON values for a checkpoint: the position, and all that decides about the order."""
        return {"position": self.position, **self._order}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken, with any number of processes.

        Raises LiveAvatarError, naming the field, when the order would not be the same.
        """
        for field, have in self._order.items():
            if state.get(field) != have:
                raise LiveAvatarError(
                    f"the data's {field} is {have} and was {state.get(field)} in the checkpoint; "
                    "give what it was, or set the position by hand to begin another order"
                )
        self.position = state["position"]

    def ids(self, position: int) -> list[str]:
        """The ids of the clips in this process's rows of a batch; they are read once more."""
        if self._samples is None:
            return []
        n = len(self._samples.rows)
        return [self._samples[position * n + row].clip.about.id for row in range(n)]

    def close(self) -> None:
        """Ends the threads that read ahead."""
        self._iterator.close()


def open_clips(
    cfg: DataConfig, *, rows: Sequence[int] | None = None, shapes: Shapes | None = None
) -> Batches:
    """The batches of a run, from its first.

    rows: of the global batch, those which this process loads (default: all); shapes: of every
    record (default: those of the first one).

    Raises LiveAvatarError for sources that cannot be read, and while reading, when a source has
    too many broken records.
    """
    if not cfg.sources:
        raise LiveAvatarError("DataConfig.sources is empty; name a folder of shards")
    sources = [Shards(s.folders, cfg.text_len, cfg.broken_share) for s in cfg.sources]
    shapes = shapes or Shapes.of(sources[0][0])
    for source in sources:
        source.shapes = shapes

    shuffled = [
        grain.MapDataset.source(source).shuffle(seed=_seed(cfg, i)).repeat()
        for i, source in enumerate(sources)
    ]
    weights = [source.weight for source in cfg.sources]
    samples = shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, weights)
    samples = samples.random_map(lambda clip, rng: _choose(cfg, clip, rng), seed=_seed(cfg, -1))
    chosen = _Rows(samples, cfg.batch, _rows(cfg, rows))
    text_len = cfg.text_len
    batches = chosen.batch(
        len(chosen.rows), batch_fn=lambda samples: _assemble(samples, shapes, text_len)
    )
    order = {
        "kind": "clips", "batch": cfg.batch, "seed": cfg.seed, "weights": weights,
        "records": [len(source) for source in sources], "reference": cfg.reference,
        "drop_audio": cfg.drop_audio, "drop_text": cfg.drop_text, "drop_motion": cfg.drop_motion,
    }  # fmt: skip
    reports = [source.report for source in sources]
    return Batches(batches, shapes, order, threads=cfg.threads, ahead=cfg.ahead,
                   samples=chosen, reports=reports)  # fmt: skip


def open_synthetic(
    cfg: DataConfig, shapes: Shapes, *, rows: Sequence[int] | None = None, pool: int = 2
) -> Batches:
    """Batches of noise with the same face and the same shapes as `open_clips`, at no cost.

    `pool` of them are made at once and given again and again, the same arrays: do not write into
    them. Row r of batch s depends on the seed, r and s modulo `pool` only.
    """
    numbers, dtype = _rows(cfg, rows), np.dtype(shapes.dtype)

    def noise(batch: int, field: int, shape: tuple[int, ...]) -> np.ndarray:
        array = np.empty(shape, dtype)
        for row, number in enumerate(numbers):
            rng = np.random.default_rng([cfg.seed, batch, field, number])
            array[row] = rng.standard_normal(shape[1:], np.float32)
        return array

    fields = shapes.batch(len(numbers), cfg.text_len)
    made = [
        {name: noise(batch, i, shape) for i, (name, shape) in enumerate(fields.items())}
        for batch in range(pool)
    ]
    batches = grain.MapDataset.source(made).repeat()
    order = {"kind": "synthetic", "batch": cfg.batch, "seed": cfg.seed, "pool": pool}
    return Batches(batches, shapes, order, threads=0, ahead=0)


def _rows(cfg: DataConfig, rows: Sequence[int] | None) -> tuple[int, ...]:
    rows = tuple(range(cfg.batch) if rows is None else (int(row) for row in rows))
    if not rows or min(rows) < 0 or max(rows) >= cfg.batch:
        raise LiveAvatarError(
            f"rows {list(rows)} must be some of the {cfg.batch} of DataConfig.batch"
        )
    return rows


def _seed(cfg: DataConfig, stream: int) -> int:
    """Of one source, or of the samples (-1); far apart for seeds that follow each other."""
    return int(np.random.SeedSequence([cfg.seed, stream + 1]).generate_state(1)[0])


def _choose(cfg: DataConfig, clip: Clip, rng: np.random.Generator) -> _Sample:
    """Draws all there is to draw, used or not: one setting does not change what another gives."""
    reference, drawn = int(rng.integers(len(clip.references))), rng.random(3)
    chances = {"audio": cfg.drop_audio, "text": cfg.drop_text, "motion": cfg.drop_motion}
    pairs = zip(chances.items(), drawn, strict=True)
    dropped = tuple(name for (name, chance), x in pairs if x < chance)
    return _Sample(clip, reference if cfg.reference == "random" else 0, dropped)


def _assemble(samples: Sequence[_Sample], shapes: Shapes, text_len: int) -> Batch:
    """One copy, from the bytes of the records to their rows of the batch."""
    dtype = np.dtype(shapes.dtype)
    fields = shapes.batch(len(samples), text_len)
    batch = {name: np.zeros(shape, dtype) for name, shape in fields.items()}
    for row, sample in enumerate(samples):
        clip, k = sample.clip, sample.reference
        batch["latents"][row] = clip.latents
        batch["reference"][row] = clip.references[k : k + 1]
        batch["still"][row] = clip.stills[k]
        if "motion" not in sample.dropped:
            batch["motion"][row] = clip.motion
        if "text" not in sample.dropped:
            batch["text"][row, : len(clip.text)] = clip.text
        if "audio" not in sample.dropped:
            batch["audio"][row, 0] = clip.audio
    return batch
