"""One program over several processes: joining them, and what happens when one is lost.

    initialise(args.coordinator, args.processes, args.process_id)  # before any device is touched
    with guard():
        pixels = broadcast(load() if is_first() else blank)

JAX's coordination service notices a process that was killed, frozen or cut off, and then ends
this one from a C++ thread (`LOG(FATAL)`: a page of text, a stack trace, SIGABRT), for a wait on
a device cannot be interrupted. `_Watch` makes one sentence and exit code 2 of it. Where the loss
arrives as an exception instead (gloo's closed connection), `guard` does.
"""

import argparse
import atexit
import contextlib
import ctypes
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from liveavatar_jax.types import LiveAvatarError

T = TypeVar("T")

JOIN = 120.0  # seconds to wait for all processes to come
HEARTBEAT = 30.0  # seconds without a sign of life after which a process is lost
GRACE = 10.0  # seconds for `finally` blocks, once it is known that a process was lost

LATE = "; start all of them within that time, with equal --coordinator and --processes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a run over several processes, and of one on fake devices."""
    group = parser.add_argument_group("several processes", "start the command once a process")
    group.add_argument("--coordinator", metavar="HOST:PORT",
                       help="where process 0 listens, as all can reach it")  # fmt: skip
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument("--cluster", action="store_true",
                       help="take these three from Slurm, Open MPI, Cloud TPU, ...")  # fmt: skip
    group.add_argument("--join-timeout", type=float, default=JOIN, metavar="SECONDS",
                       help="wait for all to come, or to go (default: %(default)g)")  # fmt: skip
    group.add_argument("--heartbeat", type=float, default=HEARTBEAT, metavar="SECONDS",
                       help="silence that means a lost process (default: %(default)g)")  # fmt: skip
    parser.add_argument("--fake-devices", type=int, metavar="N",
                        help="show the CPU as N devices in this process")  # fmt: skip


def fake_devices(count: int) -> None:
    """Shows the CPU as `count` devices; to be called before any device is touched.

    Raises LiveAvatarError where another platform is chosen, or devices were touched.
    """
    if count < 1:
        raise LiveAvatarError(f"--fake-devices {count} must be at least 1")
    platform = jax.config.jax_platforms  # type: ignore[attr-defined]
    if platform not in (None, "", "cpu"):
        raise LiveAvatarError(
            f"--fake-devices {count} is for the CPU, and {platform} was chosen; "
            "use --device cpu, or leave --fake-devices out"
        )
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:
        raise LiveAvatarError(
            f"--fake-devices {count} comes too late: devices were used before in this process"
        ) from None
    jax.config.update("jax_platforms", "cpu")


def initialise(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    cluster: bool = False,
    join_timeout: float = JOIN,
    heartbeat: float = HEARTBEAT,
) -> bool:
    """Joins the processes of a run; with no argument given there is one, and nothing happens.

    coordinator: HOST:PORT where process 0 listens.
    cluster: let JAX find the three in the environment of the cluster instead.
    join_timeout: seconds to wait for all to come (JAX takes 5 more to give up), and to go.
    heartbeat: seconds of silence after which a process is lost; the others end at most 5 later.

    Returns whether there are several. Raises LiveAvatarError for flags that make no sense, an
    address that cannot be used or reached, and a call after devices were touched. Peers that do
    not come in time end the process: one sentence, exit code 2.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    if not cluster and all(value is None for value in given.values()):
        return False
    if not (math.isfinite(join_timeout) and join_timeout >= 1):
        raise LiveAvatarError(f"--join-timeout {join_timeout:g} must be at least 1 second")
    if not (math.isfinite(heartbeat) and heartbeat >= 2):
        raise LiveAvatarError(f"--heartbeat {heartbeat:g} must be at least 2 seconds")
    deadline = time.monotonic() + join_timeout
    where = {}
    if cluster:
        if any(value is not None for value in given.values()):
            raise LiveAvatarError(f"--cluster replaces {', '.join(given)}: give one or the other")
    else:
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise LiveAvatarError(
                f"{' and '.join(missing)} missing: {', '.join(given)} go together"
            )
        _check(str(coordinator), processes or 0, process_id or 0, deadline, join_timeout)
        where = {"coordinator_address": coordinator, "num_processes": processes,
                 "process_id": process_id, "cluster_detection_method": "deactivate"}  # fmt: skip
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # read by CPUs alone
    _join(where, _Watch(processes, process_id, join_timeout, heartbeat), deadline)
    return True


def is_first() -> bool:
    """Whether this process is the one that reads the files."""
    return jax.process_index() == 0


def is_last() -> bool:
    """Whether this process is the one at which frames come out."""
    return jax.process_index() == jax.process_count() - 1


def broadcast(tree: T, source: int = 0) -> T:
    """What process `source` has, on all processes, as numpy arrays.

    tree: arrays and numbers; the other processes pass anything of equal shapes and dtypes.
    Where they cannot know the shape, broadcast the shape first. 64-bit values lose their upper
    half, as everywhere in JAX.
    """
    return multihost_utils.broadcast_one_to_all(tree, is_source=jax.process_index() == source)


def everywhere() -> Callable[[str], Sharding] | None:
    """For `checkpoint.restore`: a whole copy on a device of every process. With one process there
    is nothing to say."""
    if jax.process_count() == 1:
        return None
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[i] for i in sorted(firsts)]), ("process",))
    return lambda path: NamedSharding(mesh, PartitionSpec())


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Turns the loss of a process into one sentence; an error here ends the others, too.

    A process that leaves with an error does not wait for the others when it exits: they hear
    of it as of any lost process, and end.

    Raises LiveAvatarError where the loss arrives as an exception. Where JAX would abort the
    process, it prints that sentence and exits with 2.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _watch is None or not LOSS.search(str(error)):
            raise
        _watch.leave(2)
        said = str(error).splitlines()[0]
        raise LiveAvatarError(f"{_watch.loss('')} (JAX: {said})") from None
    except BaseException as error:
        if _watch is not None and not _finished(error):
            code = 2 if isinstance(error, LiveAvatarError) else 1
            _watch.leave(130 if isinstance(error, KeyboardInterrupt) else code)
        raise


# What a broken collective says (gloo, NCCL, the coordination service).
LOSS = re.compile(r"gloo|nccl|coordination service|socket closed|connection (reset|closed)", re.I)
# The head of a C++ log line, and what such a line says if it is about the processes.
HEAD = re.compile(r"^[IWEF]\d{4} \d\d:\d\d:")
PEERS = re.compile(r"coordination_service|preemption_sync|distributed service detected|grpc")
FATAL = "distributed service detected fatal errors"
SILENT = re.compile(r"stopped sending heartbeats\):\s*((?:\d+[\s,]+)+)")


def _check(address: str, processes: int, index: int, deadline: float, timeout: float) -> None:
    """Raises LiveAvatarError for what would otherwise end in a timeout or a crash of JAX."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise LiveAvatarError(f"--coordinator {address} is not HOST:PORT, as in 10.0.0.1:8476")
    if processes < 1:
        raise LiveAvatarError(f"--processes {processes} must be at least 1")
    if not 0 <= index < processes:
        raise LiveAvatarError(f"--process-id {index} must lie within 0..{processes - 1}, "
                              f"for --processes is {processes}")  # fmt: skip
    if index == 0:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            raise LiveAvatarError(
                f"--coordinator {address}: cannot listen on port {port} ({error.strerror}); "
                "take another one"
            ) from None
        return
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LiveAvatarError(
                    f"--coordinator {address}: process 0 cannot be reached within "
                    f"{timeout:g} s ({error.strerror or error}){LATE}"
                ) from None
        time.sleep(0.2)


def _join(where: dict, watch: "_Watch", deadline: float) -> None:
    global _watch
    if _watch is not None:
        raise LiveAvatarError("the processes were joined before; initialise() is called once")
    watch.begin()
    try:
        jax.distributed.initialize(
            **where,
            initialization_timeout=max(1, round(deadline - time.monotonic())),
            heartbeat_timeout_seconds=math.ceil(watch.heartbeat),
            shutdown_timeout_seconds=math.ceil(watch.join_timeout),
        )
    except (RuntimeError, ValueError, OSError) as error:
        watch.end()
        text = str(error)
        if "must be called before" in text:
            text = "devices were used before the processes were joined; call initialise() first"
        elif "should be defined" in text or "must be defined" in text:
            text = ("--cluster: nothing in the environment names the processes (Slurm, Open MPI, "
                    "Cloud TPU, ...); use --coordinator, --processes and --process-id")  # fmt: skip
        else:
            text = f"the processes could not be joined: {text.splitlines()[0]}"
        raise LiveAvatarError(text) from None
    watch.joined = True
    watch.processes, watch.index = jax.process_count(), jax.process_index()
    _watch = watch
    atexit.register(watch.exit)  # before JAX's own, which was registered earlier


class _Watch:
    """Hears what C++ says about the other processes, and has the last word when it aborts.

    C++ writes to descriptor 2, which is a file from here on: a thread passes on what is not
    about the processes, and the rest is kept. (A pipe would block C++ when full.) Python's own
    `sys.stderr` writes to the terminal as before.
    """

    def __init__(
        self, processes: int | None, index: int | None, join_timeout: float, heartbeat: float
    ) -> None:
        self.processes, self.index = processes, index
        self.join_timeout, self.heartbeat = join_timeout, heartbeat
        self.joined = False
        self.code: int | None = None  # exit code, once the main thread leaves with an error
        self.heard = ""

    def begin(self) -> None:
        sys.stderr.flush()
        self._file = tempfile.TemporaryFile()
        self._terminal = os.dup(2)
        self._python = sys.stderr
        if sys.stderr.isatty() or _is(sys.stderr, 2):
            sys.stderr = open(self._terminal, "w", buffering=1, closefd=False)
        os.dup2(self._file.fileno(), 2)
        self._read, self._rest, self._about_peers = 0, "", False
        self._lock, self._ended = threading.Lock(), threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)
        self._libc = ctypes.CDLL(None)
        self._libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        # Python's signal.signal would run it later, in the main thread: never.
        self._libc.signal(signal.SIGABRT, ctypes.cast(self._handler, ctypes.c_void_p))

    def end(self) -> None:
        self._libc.signal(signal.SIGABRT, None)
        self._ended.set()
        os.dup2(self._terminal, 2)
        self._pass_on(last=True)
        sys.stderr = self._python

    def leave(self, code: int) -> None:
        """The main thread is on its way out: it has `GRACE` seconds."""
        self.code = code
        timer = threading.Timer(GRACE, os._exit, (code,))
        timer.daemon = True
        timer.start()

    def exit(self) -> None:
        """At the end of Python: JAX's own farewell waits for all, which is wrong after an error."""
        if self.code is None:
            with contextlib.suppress(RuntimeError):
                jax.distributed.shutdown()
        self.end()
        sys.stdout.flush()
        if self.code is not None:
            os._exit(self.code)

    def loss(self, heard: str) -> str:
        """The sentence about a lost process, which C++'s words may name."""
        silent = SILENT.search(heard)
        lost = [int(i) for i in re.findall(r"\d+", silent[1])] if silent else []
        if not lost and self.index is not None and self.processes is not None:
            if self.processes == 2:
                lost = [1 - self.index]
            elif self.index and FATAL in heard:
                lost = [0]
        if lost == [self.index]:
            return (f"this process, {self.index} of {self.processes}, was given up by the others "
                    f"after {self.heartbeat:g} s of silence; start all of them again")  # fmt: skip
        who = f"one of the {self.processes} processes"
        if lost:
            who = f"process {' and '.join(map(str, lost))} of {self.processes}"
        return (f"{who} was lost: ended, cut off, or silent for {self.heartbeat:g} s; "
                "start all of them again")  # fmt: skip

    def _listen(self) -> None:
        while not self._ended.wait(0.2):
            self._pass_on()

    def _pass_on(self, last: bool = False) -> None:
        with self._lock:
            while data := os.pread(self._file.fileno(), 1 << 20, self._read):
                self._read += len(data)
                self._rest += data.decode(errors="replace")
            *lines, self._rest = self._rest.split("\n")
            if last and self._rest:
                lines, self._rest = [*lines, self._rest], ""
            for line in lines:
                if HEAD.match(line):
                    self._about_peers = bool(PEERS.search(line))
                if self._about_peers:
                    self.heard += line + "\n"
                else:
                    os.write(self._terminal, f"{line}\n".encode())

    def _abort(self, _: int) -> None:
        """C++ called abort(), in the thread that runs this; returning lets it happen."""
        self._pass_on(last=True)
        if FATAL not in self.heard:
            self._libc.signal(signal.SIGABRT, None)
            return
        if self.joined:
            time.sleep(1)  # the main thread may have met a broken connection
        if self.code is not None:
            time.sleep(2 * GRACE)  # which it is ending with
        text = self.loss(self.heard)
        if not self.joined:
            text = (f"not all of the {self.processes or ''} processes came within "
                    f"{self.join_timeout:g} s{LATE}")  # fmt: skip
        os.write(self._terminal, f"liveavatar-jax: {text}\n".encode())
        os._exit(2)


_watch: _Watch | None = None


def _finished(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code in (None, 0)


def _is(stream, descriptor: int) -> bool:
    try:
        return stream.fileno() == descriptor
    except (OSError, AttributeError, ValueError):
        return False
