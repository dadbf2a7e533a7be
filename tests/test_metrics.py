"""What a run reports, what it keeps, and what stops it."""

import json
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from liveavatar_jax.models.lora import Factors
from liveavatar_jax.types import LiveAvatarError
from train import metrics
from train.metrics import Watch, finite, parse_profile, peak_flops


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run):
    """The events of all files in the order in which TensorBoard reads them."""
    found = []
    for path in sorted((run / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            assert metrics._masked(data[:8]) == data[8:12]
            body = data[12 : 12 + length]
            assert metrics._masked(body) == data[12 + length : 16 + length]
            found.append(Event.FromString(body))
            data = data[16 + length :]
    return found


def tree():
    return {"blocks.q.kernel": Factors(jnp.ones((2, 3)), jnp.ones((3, 2))), "n": jnp.int32(3)}


def test_a_step_is_reported_when_the_next_one_was_started(tmp_path):
    with Watch(tmp_path, 3) as watch:
        for step in (1, 2, 3):
            watch(step, {"loss": jnp.float32(step)})
            watch._files.flush()
            assert [r["step"] for r in records(tmp_path)] == list(range(1, step))
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_what_files_hold_is_what_was_reported(tmp_path):
    with Watch(tmp_path, 4, every=2) as watch:
        for step in range(1, 5):
            watch(step, {"loss": jnp.float32(step), "norm/student": jnp.float32(2 * step)})
    assert [r["step"] for r in records(tmp_path)] == [2, 4]
    scalars = {(e.step, v.tag): v.simple_value for e in events(tmp_path) for v in e.summary.value}
    assert scalars[4, "loss"] == 4.0 and scalars[2, "norm/student"] == 4.0
    assert (2, "time/step") in scalars


def test_a_resumed_run_reports_no_step_twice(tmp_path):
    with Watch(tmp_path, 10) as watch:
        for step in range(1, 6):
            watch(step, {"loss": jnp.float32(0)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    with Watch(tmp_path, 10, start=3) as watch:
        for step in range(4, 8):
            watch(step, {"loss": jnp.float32(1)})
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [
        (1, 0.0), (2, 0.0), (3, 0.0), (4, 1.0), (5, 1.0), (6, 1.0), (7, 1.0)
    ]  # fmt: skip
    starts = [e.step for e in events(tmp_path) if e.HasField("session_log")]
    assert starts == [1, 4]  # from 4 on TensorBoard forgets what the first file said


def test_the_leaf_that_is_not_finite_is_named_and_nothing_after_it_is_kept(tmp_path):
    @jax.jit
    def step(x, bad):
        grads = tree()
        bad = jnp.where(bad, jnp.float32(jnp.nan), jnp.float32(0))
        grads["blocks.q.kernel"] = Factors(x * jnp.ones((2, 3)), bad + jnp.ones((3, 2)))
        return {"grads": finite(grads), "loss": bad}

    saved = []
    with pytest.raises(LiveAvatarError) as error, Watch(tmp_path, 9, last_good=lambda: 2) as watch:
        for i in range(1, 10):
            watch(i, step(1.0, i >= 4))
            if i % 2 == 0:
                with watch.aside():
                    saved.append(i)
    said = str(error.value)
    assert said.startswith(
        "step 4: grads: blocks.q.kernel.b is not finite (1 of 2 leaves); the last good step saved "
        "is 2, and going on"
    )
    assert saved == [2] and [r["step"] for r in records(tmp_path)] == [1, 2, 3]


def test_a_loss_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(LiveAvatarError, match="step 1: critic_loss is inf; no step was saved yet"):
        with Watch(tmp_path, 9) as watch:
            watch(1, {"loss": jnp.float32(1), "critic_loss": jnp.float32(jnp.inf)})
            watch(2, {"loss": jnp.float32(1)})


def test_utilisation_is_model_flops_over_time_and_peak(tmp_path, monkeypatch):
    clock = iter(np.arange(100) * 0.5)
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: float(next(clock)))
    flops = {"rollout": 1e12, "score": 3e12}
    with Watch(tmp_path, 4, flops=flops, peak=1e12) as watch:
        watch(1, {"loss": jnp.float32(0)})
        watch(2, {"loss": jnp.float32(0)}, {"critic": 2e12})
        watch(3, {"loss": jnp.float32(0)})
    first, second, third = records(tmp_path)
    assert "mfu/all" not in first  # it was compiling
    devices = jax.device_count()
    assert second["time/step"] == 0.5 and second["mfu/critic"] == 2 / 0.5 / devices
    assert third["mfu/rollout"] == 1 / 0.5 / devices and third["mfu/all"] == 4 / 0.5 / devices


def test_an_unknown_device_has_achieved_flops_and_no_share(tmp_path):
    assert peak_flops() is None  # a CPU
    with Watch(tmp_path, 2, flops={"rollout": 1e9}) as watch:
        watch(1, {})
        watch(2, {})
    assert records(tmp_path)[1]["flops/rollout"] == records(tmp_path)[1]["flops/all"] > 0


@pytest.mark.parametrize(
    "kind, chip",
    [("NVIDIA H100 80GB HBM3", 989.4e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12),
     ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("NVIDIA H200", 989.4e12),
     ("NVIDIA H100 PCIe", None), ("NVIDIA GB200", None), ("cpu", None)],
)  # fmt: skip
def test_known_devices_have_the_peak_of_the_table(kind, chip):
    assert peak_flops(kind=kind) == chip


def test_time_spent_aside_counts_for_no_step(tmp_path):
    with Watch(tmp_path, 3) as watch:
        watch(1, {})
        watch(2, {})
        with watch.aside():
            time.sleep(0.5)
        watch(3, {})
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3]
    assert records(tmp_path)[2]["time/step"] < 0.4


def test_the_line_says_what_there_is_to_know(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "QUIET", 0.0)
    with Watch(tmp_path, 2, flops={"rollout": 1e9}, peak=1e15) as watch:
        watch(1, {"loss": jnp.float32(0.25), "grad_norm": jnp.float32(3)})
        watch(2, {"loss": jnp.float32(0.125)})
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("step 1/2 · grad_norm 3 · loss 0.25 · ")
    assert second.startswith("step 2/2 · grad_norm 3 · loss 0.125 · ")
    for word in (" ms · ", "steps/s", "mfu ", "mfu rollout", "0:00:00 left"):
        assert word in second


def test_without_a_terminal_a_line_is_rare(tmp_path, capsys):
    with Watch(tmp_path, 50) as watch:
        for step in range(1, 51):
            watch(step, {"loss": jnp.float32(step)})
    assert [line.split(" · ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "step 1/50", "step 50/50"
    ]  # fmt: skip


def test_samples_are_kept_as_videos_and_in_tensorboard(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (8, 32, 48, 3), np.uint8)
    with Watch(tmp_path, 2) as watch:
        watch.sample(1, frames, name="ema")
    assert (tmp_path / "samples" / "0000001-ema.mp4").stat().st_size > 500
    (value,) = [v for e in events(tmp_path) for v in e.summary.value]
    assert value.tag == "ema" and value.image.encoded_image_string[:4] == b"GIF8"
    assert (value.image.height, value.image.width) == (32, 48)


def test_a_profile_is_taken_of_the_steps_asked_for(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: said.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: said.append("stop"))
    with Watch(tmp_path, 5, profile=parse_profile("2:3")) as watch:
        for step in range(1, 6):
            said.append(step)
            watch(step, {})
    assert said == [1, str(tmp_path / "profile"), 2, 3, "stop", 4, 5]


@pytest.mark.parametrize("text", ["", "3", "4:3", "0:2", "a:b", "1:2:3"])
def test_a_profile_of_no_steps_is_refused(text):
    with pytest.raises(LiveAvatarError, match=r"--profile .* is not FIRST:LAST"):
        parse_profile(text)


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(LiveAvatarError, match=r"run cannot be written \(File exists\)"):
        Watch(tmp_path / "run", 3)


def test_watching_costs_little(tmp_path):
    """A step of 20 ms may lose 5 % to all of this; typically it is a tenth of that."""
    numbers = {f"loss{i}": jnp.float32(i) for i in range(8)}
    report = numbers | {"grads": jax.jit(finite)(tree())}
    flops = {"rollout": 1e9, "score": 1e9, "critic": 1e9}
    spent = []
    with Watch(tmp_path, 200, flops=flops, peak=1e15) as watch:
        for step in range(1, 201):
            start = time.perf_counter()
            watch(step, report)
            spent.append(time.perf_counter() - start)
    print(f"watching: {1e3 * np.median(spent):.3f} ms a step")
    assert np.median(spent) < 0.05 * 0.020
