"""Batches of encoded clips: who reads what, where it goes on, and what is broken."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from liveavatar_jax.data import records, throughput
from liveavatar_jax.data.clips import DataConfig, Shards, Source, open_clips, open_synthetic
from liveavatar_jax.data.records import About, BrokenRecord, Clip, Shapes, pack, unpack, write_shard
from liveavatar_jax.types import LiveAvatarError

from .test_video import disk

SHAPES = Shapes(f=2, m=3, h=4, w=6, c=5, layers=2, audio_dim=3, text_dim=7)
TEXT_LEN = 9
REFERENCES = 3


def clip(number: int, **changes) -> Clip:
    """A clip whose every value is unlike another clip's, and whose latents tell its number."""
    s, rng = SHAPES, np.random.default_rng(number)
    grid = (s.h, s.w, s.c)
    sizes = {
        "latents": (s.f, *grid),
        "motion": (s.m, *grid),
        "references": (REFERENCES, *grid),
        "stills": (REFERENCES, s.m, *grid),
        "text": (1 + number % 5, s.text_dim),
        "audio": (4 * s.f, s.layers, s.audio_dim),
    }
    arrays = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
    arrays = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    arrays["latents"][:] = number
    arrays["references"][:] = 10 * number + np.arange(REFERENCES)[:, None, None, None]
    arrays["stills"][:] = 10 * number + np.arange(REFERENCES)[:, None, None, None, None]
    about = About(id=f"clip{number}", start=1.5, frames=8, caption="hm", scores={"sync": 3.5})
    return dataclasses.replace(Clip(**arrays, about=about), **changes)


def folder(path: Path, numbers, per_shard: int = 4) -> Path:
    path.mkdir(parents=True)
    blobs = [pack(clip(number)) for number in numbers]
    for i in range(0, len(blobs), per_shard):
        write_shard(path / f"clips-{i // per_shard:05d}.array_record", blobs[i : i + per_shard])
    return path


def config(*folders, weights=None, **changes) -> DataConfig:
    weights = weights or [1.0] * len(folders)
    sources = tuple(Source((str(f),), w) for f, w in zip(folders, weights, strict=True))
    cfg = DataConfig(sources, batch=4, text_len=TEXT_LEN, threads=2, ahead=2)
    return dataclasses.replace(cfg, **changes)


def numbers(batch) -> list[int]:
    return [int(x) for x in batch["latents"][:, 0, 0, 0, 0]]


def same(a, b) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def take(data, count: int) -> list:
    taken = [next(data) for _ in range(count)]
    data.close()
    return taken


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "ten", range(10))


# The record


def test_a_record_gives_back_what_was_packed():
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        given = clip(3, audio=clip(3).audio.astype(dtype))
        back = unpack(pack(given))
        assert back.about == given.about
        for name in records.AXES:
            kept, array = getattr(given, name), getattr(back, name)
            assert array.dtype == kept.dtype
            np.testing.assert_array_equal(array, kept)


def test_a_record_that_is_wrong_says_where():
    fine = {name: getattr(clip(1), name) for name in records.AXES}
    about = {"about": json.dumps({"id": "a", "start": 0.0, "frames": 8})}
    holes = fine["motion"].copy()
    holes[1, 2, 3, 4] = np.inf
    short = pack(clip(1))
    cases = [
        (save({k: v for k, v in fine.items() if k != "stills"}, about), "stills"),
        (save({**fine, "text": fine["text"].astype(np.int32)}, about), "text is I32"),
        (save({**fine, "text": fine["text"][0]}, about), r"text has shape"),
        (save({**fine, "audio": fine["audio"][:-1]}, about), "audio has 7 frames"),
        (save({**fine, "motion": fine["motion"][:-1]}, about), "motion and stills differ in m"),
        (save({**fine, "motion": holes}, about), "motion holds values that are not finite"),
        (save(fine), "metadata"),
        (save(fine, {"about": "[]"}), "metadata"),
        (short[: len(short) // 2], "cut off"),
        (b"\x00" * 30, "safetensors"),
        (b"", "safetensors"),
    ]
    for blob, said in cases:
        with pytest.raises(BrokenRecord, match=said):
            unpack(blob)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_kind_of_number_is_judged_rightly(dtype):
    for value in (0, -0.0, 1, -1, 6e-5, -6e4, 6e4, np.inf, -np.inf, np.nan, -np.nan):
        array = np.ones((3, 5), dtype)
        array[1, 2] = value
        assert records._finite(array) == bool(np.isfinite(value)), value


# The order


def test_an_epoch_visits_every_record_once(shards):
    taken = take(open_clips(config(shards, batch=2)), 15)
    seen = [n for batch in taken for n in numbers(batch)]
    epochs = [seen[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_one_row_is_a_batch(shards):
    data = open_clips(config(shards, batch=1))
    assert sorted(n for batch in take(data, 10) for n in numbers(batch)) == list(range(10))


def test_the_rates_are_printed(shards, capsys):
    assert throughput.main([str(shards), "--batch", "2", "--seconds", "0.1"]) == 0
    said = capsys.readouterr().out
    assert "f=2" in said and "shards" in said and "synthetic" in said and "MB/s" in said
    assert throughput.main([str(shards / "missing")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_seed_decides(shards):
    a, b, c = (take(open_clips(config(shards, seed=s)), 5) for s in (1, 1, 2))
    for left, right in zip(a, b, strict=True):
        same(left, right)
    assert [numbers(x) for x in a] != [numbers(x) for x in c]


def test_the_global_batch_does_not_know_who_reads_it(shards):
    """One process, two, four, or two that read the same rows."""
    cfg = config(shards, drop_audio=0.3, drop_text=0.3, drop_motion=0.3)
    whole = take(open_clips(cfg), 6)
    for split in ([[0, 1], [2, 3]], [[0], [1], [2], [3]], [[1, 2], [1, 2]], [[3, 0]]):
        for rows in split:
            parts = take(open_clips(cfg, rows=rows), 6)
            for batch, part in zip(whole, parts, strict=True):
                same({name: array[rows] for name, array in batch.items()}, part)


def test_resuming_is_never_stopping(shards):
    cfg = config(shards, drop_text=0.5)
    whole = take(open_clips(cfg), 9)
    first = open_clips(cfg, rows=[0, 1])
    for _ in range(4):
        next(first)
    state = json.loads(json.dumps(first.state()))
    first.close()
    assert state["position"] == 4
    then = open_clips(cfg, rows=[2])  # another process of another number of processes
    next(then)
    then.restore(state)
    for batch in whole[4:]:
        same({name: array[2:3] for name, array in batch.items()}, next(then))
    assert then.position == 9
    then.position = 1
    same({name: array[2:3] for name, array in whole[1].items()}, next(then))
    then.close()


def test_another_order_is_refused_by_name(shards, tmp_path):
    state = open_clips(config(shards)).state()
    more = folder(tmp_path / "more", range(3))
    for cfg, field in (
        (config(shards, seed=5), "seed"),
        (config(shards, batch=2), "batch"),
        (config(shards, reference="first"), "reference"),
        (config(more), "records"),
        (config(shards, more), "weights"),
    ):
        with pytest.raises(LiveAvatarError, match=field):
            open_clips(cfg).restore(state)


def test_sources_mix_by_weight(shards, tmp_path):
    """Any prefix holds each source's share to within one record; each goes through its epochs."""
    one = folder(tmp_path / "one", [50])  # the smallest source there is
    three = folder(tmp_path / "three", range(60, 63))
    cfg = config(shards, one, three, weights=[50.0, 10.0, 40.0], batch=10)
    seen = [n for batch in take(open_clips(cfg), 30) for n in numbers(batch)]
    for prefix in (7, 40, 133, 300):
        kinds = Counter("one" if n == 50 else "three" if n >= 60 else "ten" for n in seen[:prefix])
        for kind, share in (("ten", 0.5), ("one", 0.1), ("three", 0.4)):
            assert abs(kinds[kind] - share * prefix) <= 2, (prefix, kinds)
    assert sorted(n for n in seen if n < 10)[::15] == list(range(10))  # 150: 15 epochs of ten
    assert Counter(n for n in seen if n >= 60) == {60: 40, 61: 40, 62: 40}


# The batch


def test_a_batch_holds_its_clips(shards):
    data = open_clips(config(shards))
    for position in range(4):
        batch = next(data)
        ids = data.ids(position)
        assert ids == [f"clip{n}" for n in numbers(batch)]
        for row, n in enumerate(numbers(batch)):
            of = clip(n)
            k = int(batch["reference"][row].ravel()[0]) - 10 * n
            np.testing.assert_array_equal(batch["motion"][row], of.motion)
            np.testing.assert_array_equal(batch["audio"][row, 0], of.audio)
            np.testing.assert_array_equal(batch["reference"][row, 0], of.references[k])
            np.testing.assert_array_equal(batch["still"][row], of.stills[k])
            np.testing.assert_array_equal(batch["text"][row, : len(of.text)], of.text)
            assert (batch["text"][row, len(of.text) :] == 0).all()
    data.close()


def test_the_reference_is_the_first_or_any(shards):
    def kinds(how):
        taken = take(open_clips(config(shards, reference=how)), 60)
        return Counter(int(x) % 10 for b in taken for x in b["reference"][:, 0, 0, 0, 0])

    assert set(kinds("first")) == {0}
    drawn = kinds("random")
    assert set(drawn) == {0, 1, 2} and all(abs(n - 80) < 30 for n in drawn.values()), drawn


def test_dropping_zeroes_as_often_as_asked_and_nothing_else(shards):
    plain = take(open_clips(config(shards)), 60)
    some = take(open_clips(config(shards, drop_audio=0.25, drop_text=1.0)), 60)
    gone = 0
    for a, b in zip(plain, some, strict=True):
        assert (b["text"] == 0).all() and (a["text"] != 0).any()
        for name in ("latents", "motion", "reference", "still"):
            np.testing.assert_array_equal(a[name], b[name])
        for x, y in zip(a["audio"], b["audio"], strict=True):
            gone += bool((y == 0).all())
            assert (y == 0).all() or (x == y).all()
    assert abs(gone - 60) < 25


def test_noise_has_the_shapes_of_real_batches(shards):
    cfg = config(shards)
    real = open_clips(cfg)
    noise = open_synthetic(cfg, real.shapes)
    a, b = next(real), next(noise)
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {
        k: (v.shape, v.dtype) for k, v in b.items()
    }
    part = next(open_synthetic(cfg, real.shapes, rows=[2]))
    same(part, {name: array[2:3] for name, array in b.items()})
    assert noise.position == 1 and next(noise)["latents"] is not b["latents"]
    assert next(noise)["latents"] is b["latents"]  # the same arrays again
    state = noise.state()
    noise.position = 0
    noise.restore(state)
    assert noise.position == 3
    real.close()


# What is broken


def break_a_byte(shard: Path, record: int) -> None:
    """One bit inside the latents of a record."""
    data = bytearray(shard.read_bytes())
    blob = pack(clip(record))
    at = data.find(blob[-200:])
    assert at > 0
    data[at] ^= 1
    shard.write_bytes(data)


def test_a_broken_record_is_replaced_and_reported_once(shards, tmp_path, caplog):
    broken = shutil.copytree(shards, tmp_path / "broken")
    break_a_byte(broken / "clips-00001.array_record", 5)
    data = open_clips(config(broken, batch=5))
    seen = [n for _ in range(4) for n in numbers(next(data))]
    data.close()
    for epoch in (seen[:10], seen[10:]):
        assert Counter(epoch) == Counter([*range(5), 6, *range(6, 10)])  # the next good one
    (report,) = data.reports
    ((shard, number),) = report.broken
    assert shard.endswith("clips-00001.array_record") and number == 1
    assert "damaged" in str(report)
    assert len([r for r in caplog.records if "replaced" in r.getMessage()]) == 1
    rows = [take(open_clips(config(broken, batch=5), rows=[r]), 4) for r in range(5)]
    assert [numbers(part[i])[0] for i in range(4) for part in rows] == seen


def test_each_kind_of_broken_record_is_found(tmp_path):
    fine = [pack(clip(n)) for n in range(4)]
    holes = clip(9).audio.copy()
    holes[3] = np.nan
    with pytest.raises(BrokenRecord, match="audio"):
        pack(clip(9, audio=holes))
    fields = {name: getattr(clip(9), name) for name in records.AXES}
    about = {"about": json.dumps({"id": "clip9", "start": 0.0, "frames": 8})}
    other = {**fields, "text": np.zeros((TEXT_LEN + 1, SHAPES.text_dim), np.float32)}
    for i, (blob, said) in enumerate([
        (save({k: v for k, v in fields.items() if k != "motion"}, about), "no field motion"),
        (save({**fields, "audio": holes}, about), "audio holds"),
        (save(other, about), "text_len = 9 (id clip9)"),
        (b"hello", "safetensors"),
    ]):  # fmt: skip
        path = tmp_path / str(i)
        path.mkdir()
        write_shard(path / "clips-00000.array_record", [*fine, blob])
        data = open_clips(config(path, batch=5))
        assert sorted(numbers(next(data))) == [0, 0, 1, 2, 3]
        data.close()
        assert said in str(data.reports[0])


def test_too_many_broken_records_stop_the_run(shards, tmp_path):
    broken = shutil.copytree(shards, tmp_path / "broken")
    break_a_byte(broken / "clips-00000.array_record", 1)
    break_a_byte(broken / "clips-00002.array_record", 9)
    with pytest.raises(LiveAvatarError, match="2 of 10 records"):
        take(open_clips(config(broken)), 5)
    take(open_clips(config(broken, broken_share=0.2)), 5)


def test_a_source_of_broken_records_only_is_refused(tmp_path):
    write_shard(tmp_path / "clips-00000.array_record", [b"nothing"])
    with pytest.raises(LiveAvatarError, match="no good record"):
        open_clips(config(tmp_path))


def test_a_damaged_shard_is_named(shards, tmp_path):
    for size in (0, 1000, 70_000, 100_000):
        broken = shutil.copytree(shards, tmp_path / str(size))
        shard = broken / "clips-00001.array_record"
        shard.write_bytes(shard.read_bytes()[:size])
        with pytest.raises(LiveAvatarError, match=r"clips-00001\.array_record is"):
            open_clips(config(broken))


def test_a_disk_that_fails_is_no_broken_record(shards):
    """Another process may read on, and would then have another batch."""
    source = Shards([shards], TEXT_LEN)

    class Failing:
        def __getitem__(self, number):
            raise RuntimeError("pread() failed: Input/output error; reading clips-00000")

    source.records = Failing()
    with pytest.raises(LiveAvatarError, match=r"clips-00000\.array_record: pread"):
        source[0]
    assert not source.report.broken


def test_shards_of_other_sizes_do_not_mix(shards, tmp_path):
    small = dataclasses.replace(clip(1), text=clip(1).text[:, :3])
    write_shard(tmp_path / "clips-00000.array_record", [pack(small)] * 9)
    with pytest.raises(LiveAvatarError, match=r"text's width \(k\) is 3"):
        take(open_clips(config(shards, tmp_path)), 5)


def test_bad_settings_are_one_sentence(shards, tmp_path):
    cases = [
        (lambda: config(tmp_path), "no .array_record shards"),
        (lambda: config(tmp_path / "missing"), "missing"),
        (lambda: config(), "sources"),
        (lambda: config(shards, drop_audio=1.5), "drop_audio"),
        (lambda: config(shards, reference="last"), "reference"),
        (lambda: config(shards, weights=[0.0]), "weight"),
        (lambda: config(shards, batch=0), "batch"),
    ]
    for make, said in cases:
        with pytest.raises(LiveAvatarError, match=said):
            open_clips(make())
    with pytest.raises(LiveAvatarError, match="rows"):
        open_clips(config(shards), rows=[4])


def test_a_shard_is_written_whole_or_not_at_all(tmp_path):
    """Be it interrupted, without a folder, or on a full disk."""

    def records():
        yield pack(clip(1))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / "a.array_record", records())
    assert write_shard(tmp_path / "b.array_record", []) == 0
    with pytest.raises(LiveAvatarError, match="cannot write"):
        write_shard(tmp_path / "missing" / "c.array_record", [pack(clip(1))])
    with pytest.raises(LiveAvatarError, match=r"cannot write .*too large"), disk(50_000):
        write_shard(tmp_path / "c.array_record", [pack(clip(n)) for n in range(30)])
    assert list(tmp_path.iterdir()) == []
    assert write_shard(tmp_path / "d.array_record", [pack(clip(1))]) == 1
    assert len(Shards([tmp_path], TEXT_LEN)) == 1
