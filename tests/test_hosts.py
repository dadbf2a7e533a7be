"""Several processes are one program; a lost one ends the others with one sentence, in time."""

import argparse
import signal
import socket
import subprocess
import sys

import jax
import pytest

from liveavatar_jax.parallel import hosts
from liveavatar_jax.types import LiveAvatarError
from tests import processes

HEARTBEAT = 3  # seconds
STATED = HEARTBEAT + 5  # seconds from the loss of a process to the end of the others

# What cli.py does, around a loop of permutes over all devices.
SCRIPT = """
import argparse, itertools, os, sys, time
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from liveavatar_jax.parallel import hosts
from liveavatar_jax.types import LiveAvatarError

parser = argparse.ArgumentParser()
hosts.add_arguments(parser)
parser.add_argument("--ticks", type=int, default=20)
parser.add_argument("--fail", type=int)
parser.add_argument("--leave", type=int)
args = parser.parse_args()

def main():
    hosts.fake_devices(args.fake_devices)
    hosts.initialise(args.coordinator, args.processes, args.process_id, cluster=args.cluster,
                     join_timeout=args.join_timeout, heartbeat=args.heartbeat)
    with hosts.guard():
        read = np.arange(16.0) if hosts.is_first() else np.zeros(16)
        start = hosts.broadcast({"x": read.astype(np.float32), "n": np.int32(hosts.is_first())})
        n = jax.device_count()
        mesh = jax.make_mesh((n,), ("stage",), axis_types=(jax.sharding.AxisType.Auto,))
        place = NamedSharding(mesh, P("stage"))
        round = [(i, (i + 1) % n) for i in range(n)]
        tick = jax.jit(jax.shard_map(
            lambda x: jnp.sin(jax.lax.ppermute(x, "stage", round)) + jax.lax.axis_index("stage"),
            mesh=mesh, in_specs=P("stage"), out_specs=P("stage")))
        x = jax.make_array_from_callback(
            (n, 16), place, lambda i: np.stack([start["x"] * (k + 1) for k in range(n)])[i])
        for k in range(args.ticks) if args.ticks else itertools.count():
            x = jax.block_until_ready(tick(x))
            if k == 5:
                print("under way", flush=True)
            if k == 10 and args.fail == jax.process_index():
                raise LiveAvatarError("the file is broken")
            if k == 10 and args.leave == jax.process_index():
                return
        whole = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(x)
        print(jax.process_index() * bool(args.processes), start["n"],
              np.asarray(whole.addressable_data(0)).tobytes().hex(), flush=True)

try:
    main()
except LiveAvatarError as error:
    print(f"liveavatar-jax: {error}", file=sys.stderr)
    sys.exit(2)
"""


def flags(*more: object):
    return lambda *where: [*processes.join_flags(*where), *map(str, more)]


def sentence(process: processes.Process) -> str:
    """The one line a process ended with, and nothing else."""
    lines = process.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("liveavatar-jax: "), process.err
    return lines[0]


def test_two_processes_equal_one():
    (alone,) = processes.run(SCRIPT, 1, devices=8)
    first, second = processes.run(SCRIPT, 2, devices=4)
    value = alone.split()[-1]
    assert first.split()[-3:] == ["0", "1", value]
    assert second.split()[-3:] == ["1", "1", value]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_with_one_sentence(lost: int, how: signal.Signals):
    more = flags("--ticks", 0, "--heartbeat", HEARTBEAT)
    with processes.started(SCRIPT, flags=more) as found:
        for process in found:
            process.wait_for("under way")
        found[lost].send(how)
        other = found[1 - lost]
        assert other.wait(STATED) == 2
        assert f"process {lost} of 2 was lost" in sentence(other)
        if how == signal.SIGSTOP:  # and when it wakes up, it does not go on alone
            found[lost].send(signal.SIGCONT)
            assert found[lost].wait(STATED) == 2
            sentence(found[lost])


def test_a_process_that_fails_says_why_and_ends_the_other():
    more = flags("--ticks", 0, "--heartbeat", HEARTBEAT, "--fail", 1)
    with processes.started(SCRIPT, flags=more) as found:
        assert [found[i].wait(25) for i in (1, 0)] == [2, 2]
        assert "the file is broken" in sentence(found[1])
        assert "process 1 of 2 was lost" in sentence(found[0])


@pytest.mark.slow
@pytest.mark.parametrize("leaver", [0, 1])
def test_a_process_that_leaves_early_ends_the_other(leaver: int):
    more = flags("--ticks", 0, "--leave", leaver, "--join-timeout", 8, "--heartbeat", HEARTBEAT)
    with processes.started(SCRIPT, flags=more) as found:
        assert [process.wait(25) for process in found] == [2, 2]
        assert f"process {leaver} of 2 was lost" in sentence(found[1 - leaver])


@pytest.mark.parametrize("present", [0, 1])
def test_a_process_that_never_comes(present: int):
    with processes.started(SCRIPT, only=[present], flags=flags("--join-timeout", 2)) as found:
        assert found[0].wait(25) == 2
        expected = "processes came within 2 s" if present == 0 else "process 0 cannot be reached"
        assert expected in sentence(found[0])


def test_a_port_in_use_is_named():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(LiveAvatarError, match=rf"cannot listen on port {port}"):
            hosts.initialise(f"127.0.0.1:{port}", 2, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("10.0.0.1:80", None, None), "--processes and --process-id missing"),
        ((None, 2, 0), "--coordinator missing"),
        (("10.0.0.1", 2, 0), "not HOST:PORT"),
        (("10.0.0.1:x", 2, 0), "not HOST:PORT"),
        ((":80", 2, 0), "not HOST:PORT"),
        (("10.0.0.1:70000", 2, 0), "not HOST:PORT"),
        (("10.0.0.1:80", 2, 2), r"--process-id 2 must lie within 0\.\.1"),
        (("10.0.0.1:80", 2, -1), r"--process-id -1 must lie within 0\.\.1"),
        (("10.0.0.1:80", 0, 0), "--processes 0"),
    ],
)
def test_bad_flags_are_refused(given: tuple, message: str):
    with pytest.raises(LiveAvatarError, match=message):
        hosts.initialise(*given)


@pytest.mark.parametrize("name", ["join_timeout", "heartbeat"])
@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_times_are_refused(name: str, seconds: float):
    with pytest.raises(LiveAvatarError, match=name.replace("_", "-")):
        hosts.initialise("10.0.0.1:80", 2, 0, **{name: seconds})


def test_cluster_replaces_the_other_flags():
    with pytest.raises(LiveAvatarError, match="give one or the other"):
        hosts.initialise("10.0.0.1:80", 2, 0, cluster=True)


def test_without_flags_there_is_one_process():
    parser = argparse.ArgumentParser()
    hosts.add_arguments(parser)
    args = parser.parse_args([])
    assert not hosts.initialise(args.coordinator, args.processes, args.process_id)
    with hosts.guard(), pytest.raises(jax.errors.JaxRuntimeError), hosts.guard():
        raise jax.errors.JaxRuntimeError("gloo is not in use")
    assert hosts.is_first() and hosts.is_last()


TOO_LATE = """
import sys, jax
from liveavatar_jax.parallel import hosts
from liveavatar_jax.types import LiveAvatarError
jax.config.update("jax_platforms", "cpu")
jax.devices()
for call in (
    lambda: hosts.initialise("127.0.0.1:%d", 2, 0),
    lambda: hosts.fake_devices(4),
    lambda: (jax.config.update("jax_platforms", "cuda"), hosts.fake_devices(4)),
    lambda: hosts.fake_devices(0),
):
    try:
        call()
    except LiveAvatarError as error:
        print(error)
"""


def test_calls_that_come_too_late_are_refused():
    script = TOO_LATE % processes.free_port()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          cwd=processes.ROOT, timeout=30)  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    joined, faked, other, none = done.stdout.splitlines()
    assert "devices were used before the processes were joined" in joined
    assert "comes too late" in faked
    assert "cuda was chosen" in other
    assert "must be at least 1" in none


def test_no_cluster_is_one_sentence():
    script = """
from liveavatar_jax.parallel import hosts
hosts.initialise(cluster=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                          cwd=processes.ROOT, timeout=30)  # fmt: skip
    assert "--cluster: nothing in the environment names the processes" in done.stderr
