"""Real processes on this machine: a script is run by several at a time, as over hosts."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Process:
    popen: subprocess.Popen
    folder: Path
    index: int

    @property
    def out(self) -> str:
        return (self.folder / f"out{self.index}").read_text()

    @property
    def err(self) -> str:
        return (self.folder / f"err{self.index}").read_text()

    @property
    def code(self) -> int | None:
        return self.popen.poll()

    def send(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def wait(self, timeout: float) -> int:
        """The exit code; TimeoutError with what was written if there is none in time."""
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"process {self.index} hangs\n{self.out}\n{self.err}") from None

    def wait_for(self, text: str, timeout: float = 25) -> None:
        """Returns when the process has written `text` to its standard output."""
        end = time.monotonic() + timeout
        while text not in self.out:
            if self.code is not None or time.monotonic() > end:
                raise AssertionError(
                    f"no {text!r} from process {self.index}\n{self.out}\n{self.err}"
                )
            time.sleep(0.05)


def free_port() -> int:
    """A port nobody listens on; another program may take it before it is used: rarely."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def started(
    script: str | Sequence[str],
    processes: int = 2,
    *,
    devices: int = 4,
    only: Sequence[int] | None = None,
    flags: Callable[[int, int, int], Sequence[str]] | None = None,
) -> Iterator[list[Process]]:
    """Runs the same program in several processes; all are dead when the block is left.

    script: Python source, or the arguments after `python` (`["-m", "liveavatar_jax.cli", ...]`).
    devices: fake ones in each process (`--fake-devices`).
    only: the ids of the processes that are started (default: all).
    flags: (port, processes, id) -> arguments put last; default: `join_flags`, then --fake-devices.
    """
    port, found = free_port(), []
    args = ["-c", script] if isinstance(script, str) else list(script)
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    env.pop("JAX_NUM_CPU_DEVICES", None)
    with tempfile.TemporaryDirectory() as folder:
        try:
            for i in range(processes) if only is None else only:
                last = (flags or join_flags)(port, processes, i)
                with (
                    open(Path(folder, f"out{i}"), "w") as out,
                    open(Path(folder, f"err{i}"), "w") as err,
                ):
                    popen = subprocess.Popen(
                        [sys.executable, *args, *last, "--fake-devices", str(devices)],
                        stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, cwd=ROOT,
                    )  # fmt: skip
                found.append(Process(popen, Path(folder), i))
            yield found
        finally:
            for process in found:
                process.popen.kill()  # a frozen one, too
                process.popen.wait()


def join_flags(port: int, processes: int, index: int) -> list[str]:
    if processes == 1:
        return []
    return ["--coordinator", f"127.0.0.1:{port}", "--processes", str(processes),
            "--process-id", str(index)]  # fmt: skip


def run(
    script: str | Sequence[str],
    processes: int = 2,
    *,
    devices: int = 4,
    timeout: float = 60,
    **more,
) -> list[str]:
    """Standard outputs of the processes, all of which must succeed."""
    end = time.monotonic() + timeout
    with started(script, processes, devices=devices, **more) as found:
        # The first to fail explains why the others hang.
        while any(process.code is None for process in found) and time.monotonic() < end:
            if any(process.code for process in found):
                break
            time.sleep(0.05)
        states = [(process.index, process.code, process.out, process.err) for process in found]
        assert all(code == 0 for _, code, _, _ in states), states
        return [process.out for process in found]
