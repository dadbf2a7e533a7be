"""Resume equals never stopping: to the bit, after a kill at any moment, on any mesh."""

import contextlib
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from liveavatar_jax.paths import leaves
from liveavatar_jax.types import LiveAvatarError
from tests import processes, toy
from train.checkpoints import Checkpoints
from train.description import describe, fields

MOMENTS = 7  # at which a run is killed, all but two of them in the slow tests


def numbers(state) -> dict[str, np.ndarray]:
    """The leaves as they are, bit for bit, with the dtype in the name."""
    plain = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    found = {f"{path} {x.dtype}": np.asarray(plain(x)) for path, x in leaves(state).items()}
    return {name: np.ascontiguousarray(x).view(np.uint8) for name, x in found.items() if x.ndim} | {
        name: x for name, x in found.items() if not x.ndim
    }


def assert_same(a, b) -> None:
    a, b = numbers(a), numbers(b)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def saved(run, steps, size=16) -> None:
    with opened(run) as there:
        for step in steps:
            there.save(step, toy.after(step, size=size), {"position": step})


def opened(run) -> Checkpoints:
    return Checkpoints(run, toy.CONFIG, may_differ=toy.FREE)


@pytest.mark.parametrize("mesh", ["8", "1", "2x4"])
def test_resume_equals_never_stopping_on_any_mesh(tmp_path, mesh):
    saved(tmp_path, [2])
    with opened(tmp_path) as there:
        state, data = there.restore(toy.abstract(mesh))
    assert data == {"position": 2}
    assert_same(state, toy.after(2))
    want = toy.abstract(mesh)
    jax.tree.map(lambda x, w: x.sharding.is_equivalent_to(w.sharding, x.ndim) or 1 / 0, state, want)
    assert_same(toy.after(2, state=state), toy.after(4))


def test_a_state_may_be_donated_while_it_is_written(tmp_path):
    with opened(tmp_path) as there:
        state = toy.started("8", 4096)
        for step in (1, 2, 3):
            state, _ = toy.ADVANCE(state)
            there.save(step, state, {"position": step})  # which the next step overwrites
        there.wait()
        for step in (1, 2, 3):
            found, _ = there.restore(toy.abstract("8", 4096), step)
            assert_same(found, toy.after(step, size=4096))


def test_what_is_offloaded_to_the_host_comes_back_there(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    on_host = NamedSharding(mesh, PartitionSpec("fsdp"), memory_kind="pinned_host")
    state = {"m": jax.device_put(jnp.arange(16.0), on_host), "x": jnp.arange(8)}
    with jax.set_mesh(mesh), opened(tmp_path) as there:
        there.save(1, state, {})
        there.wait()
        found, _ = there.restore(state)
    assert_same(found, state)
    assert found["m"].sharding == on_host


def test_the_newest_steps_and_every_fourth_are_kept(tmp_path):
    with Checkpoints(tmp_path, {}, keep=2, keep_every=4) as there:
        assert there.latest is None
        for step in range(1, 8):
            there.save(step, {"x": jnp.int32(step)}, {})
        there.wait()
        assert there.steps == [4, 6, 7] and there.latest == 7


def test_a_config_that_differs_is_refused_by_field(tmp_path):
    saved(tmp_path, [1])
    with Checkpoints(tmp_path, toy.CONFIG | {"mesh": "4"}, may_differ=toy.FREE) as there:
        there.restore(toy.abstract("8"))
    with pytest.raises(LiveAvatarError, match=r"rate is 0\.5, but the run was started with 0\.01 "):
        with Checkpoints(tmp_path, toy.CONFIG | {"rate": 0.5}, may_differ=toy.FREE) as there:
            there.restore(toy.abstract("8"))
    with pytest.raises(LiveAvatarError, match=r"mesh is '4', but the run was started with '8'"):
        with Checkpoints(tmp_path, toy.CONFIG | {"mesh": "4"}) as there:
            there.restore(toy.abstract("8"))


def test_the_rates_inside_of_an_optimiser_are_seen():
    one, other = (dict(fields(describe(optax.adamw(rate)))) for rate in (1e-4, 2e-4))
    changed = {name for name in one if one[name] != other[name]}
    assert len(changed) == 1 and one.keys() == other.keys()
    assert describe(optax.adamw(1e-4)) == describe(optax.adamw(1e-4))


def test_another_network_is_refused_by_leaf(tmp_path):
    saved(tmp_path, [1])
    with opened(tmp_path) as there:
        with pytest.raises(LiveAvatarError, match=r"adam\.0\.mu\.blocks\.q\.kernel\.a is float32 "
                           r"\(2, 8, 16\) there and float32 \(2, 8, 32\) here"):  # fmt: skip
            there.restore(toy.abstract("8", 32))
        fewer = {"step": jax.ShapeDtypeStruct((), jnp.int32)}
        with pytest.raises(
            LiveAvatarError, match=r"adam\.0\.count is int32 \(\) there and absent here"
        ):
            there.restore(fewer)


def damage(step: Path, how: str) -> None:
    largest = max((step / "state").glob("ocdbt*/d/*"), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    if how == "truncated":
        largest.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[len(data) // 2] ^= 0x10
        largest.write_bytes(data)
    elif how == "missing":
        largest.unlink()
    else:
        shutil.rmtree(step / how)


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "config", "data", "state"])
def test_a_damaged_step_is_named_with_the_way_out(tmp_path, how):
    size = 1024
    saved(tmp_path, [1, 2], size)
    folder = tmp_path / "checkpoints" / "2"
    damage(folder, how)
    with opened(tmp_path) as there:
        with pytest.raises(LiveAvatarError) as error:
            there.restore(toy.abstract("8", size))
        said = str(error.value)
        assert str(folder) in said and "is damaged" in said and "\n" not in said
        assert said.endswith("go on from the step before it with --resume-step 1")
        assert_same(there.restore(toy.abstract("8", size), 1)[0], toy.after(1, size=size))
        assert there.steps == [1, 2]  # nothing goes before something better is there
        there.save(2, toy.after(2, size=size), {"position": 2})
        there.wait()
    with opened(tmp_path) as there:
        assert_same(there.restore(toy.abstract("8", size))[0], toy.after(2, size=size))


def test_steps_after_the_resumed_one_are_overtaken(tmp_path):
    saved(tmp_path, [1, 2, 3])
    with opened(tmp_path) as there:
        there.restore(toy.abstract("8"), 1)
        there.save(2, toy.after(2), {"position": 20})
        there.wait()
        assert there.steps == [1, 2]
        assert there.restore(toy.abstract("8"))[1] == {"position": 20}


def test_a_step_that_is_not_there_is_refused(tmp_path):
    with opened(tmp_path) as there:
        with pytest.raises(LiveAvatarError, match="holds no whole step to go on from"):
            there.restore(toy.abstract("8"))
        there.save(3, toy.after(3), {})
        there.wait()
        with pytest.raises(LiveAvatarError, match=r"--resume-step 5: .* holds 3$"):
            there.restore(toy.abstract("8"), 5)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(LiveAvatarError, match=r"checkpoints cannot be written"):
        opened(tmp_path)


@contextlib.contextmanager
def largest_file(size: int):
    """What a full disk is to a program: a write that fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_step_before_intact(tmp_path):
    with opened(tmp_path) as there:
        there.save(1, toy.after(1, size=4096), {"position": 1})
        there.wait()
        with largest_file(50_000), pytest.raises(LiveAvatarError) as error:
            there.save(2, toy.after(2, size=4096), {"position": 2})
            there.wait()
    folder = tmp_path / "checkpoints"
    assert str(error.value) == (
        f"the disk is full, a step could not be saved in {folder}; step 1 is intact, free some "
        "space and start the same command again, it goes on from there"
    )
    assert [path.name for path in folder.iterdir()] == ["1"]
    with opened(tmp_path) as there:
        assert_same(there.restore(toy.abstract("8", 4096))[0], toy.after(1, size=4096))


def test_a_disk_that_is_really_full_ends_a_run_with_one_sentence(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        args = ["-m", "tests.toy", str(small), "--size", "4096", "--steps", "9"]
        with processes.started(args, 1, devices=8) as (run,):
            assert run.wait(60) == 2
            assert run.err.splitlines()[-1].startswith("toy: the disk is full, a step could not")
            assert "Traceback" not in run.err
            newest = int(run.err.split(" is intact")[0].split()[-1])
        with opened(small) as there:
            state, _ = there.restore(toy.abstract("8", 4096))
        assert_same(state, toy.after(newest, size=4096))
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.fixture(scope="module")
def touches(tmp_path_factory) -> int:
    """How often a run touches files in its third save and its end."""
    args = ["-m", "tests.toy", str(tmp_path_factory.mktemp("whole")), "--steps", "3"]
    (out,) = processes.run([*args, "--kill-at", "1000000", "--kill-from", "2"], 1, devices=8)
    return out.count("touched")


@pytest.mark.parametrize(
    "moment",
    [3, 6, *(pytest.param(i, marks=pytest.mark.slow) for i in (0, 1, 2, 4, 5))],
)
def test_a_run_killed_at_any_moment_goes_on(tmp_path, touches, moment):
    assert touches > MOMENTS
    at = 1 + (touches - 1) * moment // MOMENTS  # not the last, for their number varies a little
    args = ["-m", "tests.toy", str(tmp_path), "--steps", "3", "--kill-at", str(at)]
    with processes.started([*args, "--kill-from", "2"], 1, devices=8) as (run,):
        assert run.wait(60) == -9
    with opened(tmp_path) as there:
        newest = there.latest
        assert newest in (1, 2, 3)  # 2 may be on its way when 3 is asked for
        state, data = there.restore(toy.abstract("2x4"))
        assert data == {"position": newest}
        assert_same(state, toy.after(newest))
        left = {path.name for path in (tmp_path / "checkpoints").iterdir()}
        assert left == set(map(str, there.steps))  # nothing half-written
    assert_same(toy.after(4 - newest, state=state), toy.after(4))


def test_two_processes_go_on_from_one_and_one_from_two(tmp_path):
    saved(tmp_path, [2])
    processes.run(["-m", "tests.toy", str(tmp_path), "--mesh", "4x2", "--steps", "4"], 2, devices=4)
    with opened(tmp_path) as there:
        assert there.latest == 4
        state, data = there.restore(toy.abstract("1"))
    assert data == {"position": 4}
    assert_same(state, toy.after(4))


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_which_then_goes_on(tmp_path):
    args = ["-m", "tests.toy", str(tmp_path), "--mesh", "4x2", "--size", "1024"]
    endless = [*args, "--steps", "100000", "--heartbeat", "3"]
    with processes.started(endless, 2, devices=4) as (first, second):
        first.wait_for("step 9\n", 60)
        second.send(signal.SIGKILL)
        assert first.wait(40) == 2
        assert first.err.splitlines()[-1].endswith("start all of them again")
        assert "Traceback" not in first.err
    with opened(tmp_path) as there:
        newest = there.latest
        assert newest is not None and newest >= 6
        assert_same(there.restore(toy.abstract("8", 1024))[0], toy.after(newest, size=1024))
