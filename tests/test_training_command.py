"""Training from the command line: what was killed goes on as if it had not been, on any mesh."""

import contextlib
import dataclasses
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load, save

from liveavatar_jax.data.records import Clip, Shapes, pack, unpack, write_shard
from liveavatar_jax.data.throughput import noise
from tests import processes
from tests.processes import ROOT, Process, started
from train import checkpoints, distill, forcing, throughput

SHAPES = Shapes(f=2, m=19, h=4, w=4, c=16, layers=2, audio_dim=8, text_dim=8, dtype="float32")
STAGES = {"forcing": "Forcing", "distill": "Distill"}

CONFIG = """
import os
import optax
from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig
from liveavatar_jax.data.clips import DataConfig, Source
from liveavatar_jax.data.records import Shapes
from train.experiment import Adapters, Distill, Forcing, Schedule, adam

def config():
    dit = DiTConfig.tiny(
        dim=32, ffn_dim=32, heads=2, layers=1, inject_layers=(0,), freq_dim=8,
        audio_layers=2, audio_dim=8, text_dim=8, text_len=4,
    )
    stream = StreamConfig(steps=2, block_frames=1, ring_blocks=2, dtype="float32")
    folders = os.environ.get("SHARDS")
    return {kind}(
        model=ModelConfig.tiny(dit=dit, stream=stream), adapters=Adapters(rank=4, alpha=4.0),
        optimiser=optax.sgd(1e-2, momentum=0.9), average_from=1, {more}
        data=DataConfig(
            (Source((folders,)),) if folders else (), batch=2, text_len=4, threads=2,
            drop_audio=0.2, drop_text=0.2,
        ),
        synthetic=None if folders else {shapes},
        steps=4, save_every=2,
    )
"""
MORE = {
    "forcing": "positions=3,",
    "distill": "critic_optimiser=optax.sgd(1e-2, momentum=0.9), schedule=Schedule(ratio=2),",
}

# The command, and something that happens to it at a moment.
KILLED = """
import importlib, os, signal, sys
from train import run
from train.metrics import Watch

stage, at = importlib.import_module("train." + sys.argv[1]), sys.argv[2]
save, watch = run.Run.save, Watch.__call__

def saving(self, step, state):
    save(self, step, state)
    if at == "saving":
        os.kill(os.getpid(), signal.SIGKILL)
    self._save.wait()
    if at == "saved":
        os.kill(os.getpid(), signal.SIGKILL)

def watching(self, step, *metrics):
    watch(self, step, *metrics)
    if at == "in step 3" and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

run.Run.save, Watch.__call__ = saving, watching
sys.exit(stage.main(sys.argv[3:]))
"""
# A disk that is full after the first save is to a program a write that fails.
FULL = """
import importlib, resource, sys
from train import run

stage, save = importlib.import_module("train." + sys.argv[1]), run.Run.save

def saving(self, step, state):
    save(self, step, state)
    self._save.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

run.Run.save = saving
sys.exit(stage.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("shards"), clips(10))


def clips(count: int, shapes: Shapes = SHAPES) -> list[bytes]:
    return list(noise(shapes, count, references=2, text=3))


def written(folder: Path, blobs: Sequence[bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for i in range(0, len(blobs), 4):
        write_shard(folder / f"clips-{i // 4:05d}.array_record", blobs[i : i + 4])
    return folder


@pytest.fixture(autouse=True, scope="module")
def private_cache(tmp_path_factory) -> Iterator[None]:
    """What one process compiled serves the next; away from the user's folder."""
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "commands"))
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield
    jax.config.update("jax_compilation_cache_dir", before)


def config(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.py"
    path.write_text(CONFIG.format(kind=STAGES[kind], more=MORE[kind], shapes=SHAPES))
    return path


@contextlib.contextmanager
def begun(
    kind: str, run: Path, *more: str, shards: Path | None, count: int = 1, devices: int = 1,
    script: str = "", at: Sequence[str] = (),
) -> Iterator[list[Process]]:  # fmt: skip
    """The command under way in so many processes."""
    run.parent.mkdir(exist_ok=True)
    given = [str(config(run.parent, kind)), "--out", str(run), *more]
    args = ["-c", script, kind, *at] if script else ["-m", f"train.{kind}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDS", "" if shards is None else str(shards))
        with started([*args, *given], count, devices=devices) as found:
            yield found


def done(kind: str, run: Path, *more: str, code: int = 0, **how) -> str:
    """Waits for the command, and gives what it wrote to its standard error."""
    with begun(kind, run, *more, **how) as found:
        codes = [process.wait(300) for process in found]
        assert set(codes) == {code}, [process.err for process in found]
        assert "Traceback" not in found[0].err
        return found[0].err


# ---- what a run leaves


def numbers(run: Path, step: int = 4) -> dict[str, np.ndarray]:
    paths = list(checkpoints.shapes(run, step))
    return checkpoints.read(run, step, paths)


def position(run: Path, step: int = 4) -> dict:
    return json.loads((run / "checkpoints" / str(step) / "data" / "metadata").read_text())


def reports(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("at", "time/", "flops/", "mfu/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def assert_same(run: Path, other: Path) -> None:
    """Every bit of the states, the positions of the data, and all reports."""
    ours, theirs = numbers(run), numbers(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert position(run) == position(other)
    assert reports(run) == reports(other)


def assert_near(run: Path, other: Path) -> None:
    """The same but for what the order of a sum changes."""
    ours, theirs, first = numbers(run), numbers(other), numbers(other, 2)
    assert ours.keys() == theirs.keys()
    assert any((theirs[name] != first[name]).any() for name in theirs)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)
    assert position(run) == position(other)
    for ours_, theirs_ in zip(reports(run), reports(other), strict=True):
        assert ours_ == pytest.approx(theirs_, rel=1e-5)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, shards) -> dict[str, Path]:
    """Runs of four steps that nothing stopped, made when they are asked for."""

    class Runs(dict):
        def __missing__(self, kind: str) -> Path:
            self[kind] = tmp_path_factory.mktemp("straight") / kind
            done(kind, self[kind], shards=shards)
            return self[kind]

    return Runs()


# ---- going on


@pytest.mark.parametrize("kind, at", [
    ("forcing", "in step 3"),
    pytest.param("distill", "saved", marks=pytest.mark.slow),
    pytest.param("forcing", "saving", marks=pytest.mark.slow),
    pytest.param("forcing", "saved", marks=pytest.mark.slow),
    pytest.param("distill", "saving", marks=pytest.mark.slow),
    pytest.param("distill", "in step 3", marks=pytest.mark.slow),
])  # fmt: skip
def test_killed_and_resumed_equals_never_stopped(kind, at, straight, shards, tmp_path):
    run = tmp_path / "run"
    done(kind, run, shards=shards, script=KILLED, at=[at], code=-signal.SIGKILL)
    last = 2 if (run / "checkpoints" / "2").is_dir() else None
    assert last == 2 or at == "saving"
    said = done(kind, run, shards=shards)
    assert (f"{run}: goes on after step 2" in said) == (last == 2)
    assert_same(run, straight[kind])


def test_the_student_learns_in_every_other_step(straight):
    """As the schedule of this config has it; each update takes a batch of its own."""
    lines = reports(straight["distill"])
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [any(name.startswith("student/") for name in line) for line in lines] == [1, 0, 1, 0]
    assert all("critic/critic_loss" in line for line in lines)
    assert position(straight["distill"])["position"] == 6
    assert position(straight["distill"], 2)["position"] == 3
    assert int(numbers(straight["distill"])["student.updates"]) == 2
    assert int(numbers(straight["distill"])["critic.updates"]) == 4
    assert position(straight["forcing"])["position"] == 4


@pytest.mark.slow
def test_a_run_of_two_steps_is_the_first_half(straight, shards, tmp_path):
    """And it goes on when it is asked for more."""
    run = tmp_path / "run"
    done("forcing", run, "--set", "steps=2", shards=shards)
    for name, value in numbers(run, 2).items():
        np.testing.assert_array_equal(value, numbers(straight["forcing"], 2)[name])
    assert position(run, 2) == position(straight["forcing"], 2)
    done("forcing", run, shards=shards)
    assert_same(run, straight["forcing"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forcing", "distill"])
def test_it_goes_on_on_another_mesh(kind, straight, shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight[kind], run)
    more = ["--mesh", "data=2", "--resume-step", "2"]
    assert "goes on after step 2" in done(kind, run, *more, shards=shards, devices=2)
    assert_near(run, straight[kind])


def steps_of(run: Path) -> int:
    with contextlib.suppress(OSError):
        return len((run / "metrics.jsonl").read_text().splitlines())
    return 0


def wait_for_steps(process: Process, run: Path, count: int) -> None:
    end = time.monotonic() + 240
    while steps_of(run) < count:
        assert process.code is None and time.monotonic() < end, process.err
        time.sleep(0.1)


@pytest.mark.slow
def test_asked_to_end_it_saves_and_goes_on_later(tmp_path):
    run = tmp_path / "run"
    endless = ["--set", "steps=1000000", "save_every=1000000"]
    with begun("forcing", run, *endless, shards=None) as (process,):
        wait_for_steps(process, run, 3)
        process.send(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "SIGTERM: ends after this step, which is saved" in process.err
        assert "Traceback" not in process.err
    (last,) = (int(path.name) for path in (run / "checkpoints").iterdir())
    assert [line["step"] for line in reports(run)] == [*range(1, last + 1)]
    said = done("forcing", run, "--set", f"steps={last + 2}", shards=None)
    assert f"goes on after step {last}" in said
    assert [line["step"] for line in reports(run)] == [*range(1, last + 3)]
    assert position(run, last + 2)["position"] == last + 2


# ---- several processes


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forcing", "distill"])
def test_two_processes_make_what_one_makes(kind, straight, shards, tmp_path):
    run = tmp_path / "run"
    done(kind, run, "--mesh", "data=2", shards=shards, count=2)
    assert_near(run, straight[kind])


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_with_a_sentence(lost, shards, tmp_path):
    run = tmp_path / "run"
    endless = ["--set", "steps=1000000", "save_every=2", "--mesh", "data=2", "--heartbeat", "5"]
    with begun("forcing", run, *endless, shards=shards, count=2) as found:
        wait_for_steps(found[0], run, 5)
        found[lost].send(signal.SIGKILL)
        other = found[1 - lost]
        assert other.wait(20) == 2
        said = [line for line in other.err.splitlines() if "lost" in line]
        assert len(said) == 1 and f"process {lost} of 2 was lost" in said[0], other.err
        assert "Traceback" not in other.err
    newest = max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdecimal())
    said = done("forcing", run, "--set", f"steps={newest + 1}", shards=shards)
    assert f"goes on after step {newest}" in said


# ---- bad input


def refused(capfd, kind: str, *argv: str) -> str:
    """The one sentence that the command ends with."""
    stage = {"forcing": forcing, "distill": distill}[kind]
    assert stage.main(list(argv)) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if line.startswith(f"{kind}: ")]
    assert said.rstrip().endswith(line)
    return line


@pytest.mark.parametrize("text, words", [
    (None, "is not there; name a config file"),
    ("def config(: pass", r"fails: SyntaxError"),
    ("def config(): return 1 / 0", r"fails: ZeroDivisionError: division by zero"),
    ("x = 1", r"fails: AttributeError"),
    ("from train.experiment import Distill\nconfig = Distill",
     "config() returns a Distill, this stage takes a Forcing"),
    ("def config(): pass", "config() returns a NoneType, this stage takes a Forcing"),
    ("from train.experiment import Forcing\ndef config(): return Forcing(step=3)",
     "fails: TypeError"),
    ("from train.experiment import Forcing\ndef config(): return Forcing(steps=0)",
     "Forcing.steps = 0 must be at least 1"),
])  # fmt: skip
def test_a_config_that_cannot_be_used_is_refused(text, words, tmp_path, capfd):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    assert words in refused(capfd, "forcing", str(path), "--out", str(tmp_path / "run"))


@pytest.mark.parametrize("more, words", [
    (["--set", "data.bach=4"], "--set data.bach: DataConfig has no field 'bach', did you mean "
     "'batch'?"),
    (["--set", "stepz=4"], "Distill has no field 'stepz', did you mean 'steps'?"),
    (["--set", "steps=many"], "--set steps = 'many' must be int"),
    (["--set", "steps"], "--set 'steps' is not understood; write FIELD.FIELD=VALUE"),
    (["--set", "accumulate=3"], "Distill.accumulate = 3 must divide data.batch = 2"),
    (["--set", "window=3", "blocks=2"], "Distill.window = 3 must be at most 2"),
    (["--mesh", "tensor=3"], "tensor x sequence = 3 x 1 does not divide the 2 attention heads"),
    (["--mesh", "stage=2"], "'stage=2' is not understood"),
    (["--mesh", "data=4"], "data x fsdp = 4 x 1 does not divide the 2 rows"),
    (["--set", "sample_every=2"], "sample_every needs the decoder of `weights`"),
    (["--profile", "3"], "--profile 3 is not FIRST:LAST"),
    (["--resume-step", "3"], "has no step to go on from"),
    (["--set", "synthetic=null"], "DataConfig.sources is empty; name a folder of shards"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(more, words, tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("SHARDS", raising=False)
    path = str(config(tmp_path, "distill"))
    assert words in refused(capfd, "distill", path, "--out", str(tmp_path / "run"), *more)


def test_another_experiment_is_not_mixed_in(straight, shards, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("SHARDS", str(shards))
    run = tmp_path / "run"
    shutil.copytree(straight["forcing"], run)
    path = str(config(tmp_path, "forcing"))
    for change, words in {
        "seed=1": "seed is 1, but the run was started with 0",
        "data.batch=4": "data.batch is 4, but the run was started with 2",
        "model.stream.shift=4": "model.stream.shift is 4.0, but the run was started with 3.0",
    }.items():
        said = refused(capfd, "forcing", path, "--out", str(run), "--set", change)
        assert words in said
    assert "holds 2, 4" in refused(capfd, "forcing", path, "--out", str(run), "--resume-step", "3")


def without(blob: bytes, field: str) -> bytes:
    about = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]
    return save({name: x for name, x in load(blob).items() if name != field}, about)


def half(blob: bytes) -> bytes:
    clip = unpack(blob)
    arrays = {
        field.name: getattr(clip, field.name).astype(ml_dtypes.bfloat16)
        for field in dataclasses.fields(Clip)
        if field.name != "about"
    }
    return pack(Clip(**arrays, about=clip.about))


@pytest.mark.parametrize("what", ["cut off", "no folder", "field", "width", "one field", "length"])
def test_records_that_cannot_be_used_are_refused(what, tmp_path, capfd, monkeypatch):
    folder, blobs = tmp_path / "shards", clips(10)
    wide = lambda **changes: dataclasses.replace(SHAPES, **changes)
    words = {
        "cut off": "clips-00001.array_record is ",
        "no folder": "holds no .array_record shards",
        "field": "it has no field audio",
        "width": "the records have audio_dim = 12, and the model takes 8",
        "one field": "it has no field audio",
        "length": "latents' length (f) is 3, while that of others is 2",
    }[what]
    if what == "field":
        blobs = [without(blob, "audio") for blob in blobs]
    elif what == "one field":
        blobs[1:] = [without(blob, "audio") for blob in blobs[1:]]
    elif what == "width":
        blobs = clips(10, wide(audio_dim=12))
    elif what == "length":
        blobs[1:] = clips(9, wide(f=3))
    if what != "no folder":
        written(folder, blobs)
    if what == "cut off":
        shard = folder / "clips-00001.array_record"
        shard.write_bytes(shard.read_bytes()[:-100])
    monkeypatch.setenv("SHARDS", str(folder))
    path = str(config(tmp_path, "forcing"))
    said = refused(capfd, "forcing", path, "--out", str(tmp_path / "run"))
    assert words in said
    assert str(folder) in said or what == "width"


@pytest.mark.slow
def test_one_broken_record_is_passed_over_and_named(tmp_path):
    blobs = clips(10)
    blobs[3] = without(blobs[3], "audio")
    folder = written(tmp_path / "shards", [half(blob) if i == 5 else blob for i, blob in
                                           enumerate(blobs)])  # fmt: skip
    said = done("forcing", tmp_path / "run", "--set", "steps=8", shards=folder)
    assert "1 broken records" in said and "record 3: it has no field audio" in said


@pytest.mark.slow
def test_a_full_disk_leaves_the_step_before_intact(straight, shards, tmp_path):
    run = tmp_path / "run"
    how = {"shards": shards, "script": FULL, "code": 2}
    said = done("forcing", run, **how).strip().splitlines()
    assert said[-1].startswith("forcing: the disk is full, a step could not be saved in ")
    assert "step 2 is intact" in said[-1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["2"]
    done("forcing", run, shards=shards)
    assert_same(run, straight["forcing"])


def test_a_command_says_one_sentence_and_no_more(tmp_path):
    """In a process of its own, whose standard error is all there is."""
    path = config(tmp_path, "forcing")
    args = ["-m", "train.forcing", str(path), "--out", str(tmp_path / "run"), "--set", "stepz=1"]
    with processes.started(args, 1, devices=1) as (process,):
        assert process.wait(120) == 2
        assert process.err == (
            "forcing: --set stepz: Forcing has no field 'stepz', did you mean 'steps'?\n"
        )
        assert not process.out
    assert not (tmp_path / "run").exists()


# ---- what the loop costs


@pytest.mark.slow
def test_the_loop_costs_little_beside_its_steps(capfd, monkeypatch, tmp_path):
    """By what its own thread works between two of them; the clock tells as much of whatever else
    this machine is doing."""
    monkeypatch.delenv("SHARDS", raising=False)
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS")
    jax.config.update("jax_disable_most_optimizations", False)
    assert throughput.main([str(ROOT / "configs" / "forcing_tiny.py"), "--pairs", "30"]) == 0
    said = capfd.readouterr().out
    own = [float(x) for x in re.findall(r"between two calls, ([.\d]+)% of one", said)]
    waits = [float(x) for x in re.findall(r"([.\d]+)% of a call", said)]
    assert len(own) == len(waits) == 2, said  # synthetic data, and ArrayRecord
    assert max(own) < 5 and max(waits) < 5, said
