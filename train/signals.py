"""Ending a run when asked: SIGTERM and SIGINT finish the step, save it, and leave.

with stopping() as stop:
    for step in ...:
        state, metrics = train_step(state, batch)
        watch(step, metrics)
        if stop.agreed():
            break
...save...
return stop.code
"""

import contextlib
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Stop:
    """What was asked of this process, and what all processes agreed on."""

    def __init__(self) -> None:
        self.asked = 0  # the number of the signal that came here
        self._agreed = 0
        self._sent: jax.Array | None = None

    def agreed(self) -> bool:
        """Whether to stop after this step. Called once a step by every process, says the same to
        all: with several, what one was asked before its last call is known to all at this one, so
        that nobody waits for an answer."""
        if jax.process_count() == 1:
            self._agreed = self.asked
        else:
            before, self._sent = self._sent, _largest(self.asked)
            if before is not None:
                self._agreed = int(before)
        return self._agreed != 0

    @property
    def code(self) -> int:
        """The exit code: 0 after SIGTERM, for all was saved; 130 after SIGINT, as is usual."""
        return 130 if self._agreed == signal.SIGINT else 0


@contextlib.contextmanager
def stopping() -> Iterator[Stop]:
    """Takes SIGTERM and SIGINT for the time of the block; a second one ends the process at once.

    What another part of the program had set is set again afterwards.
    """
    stop = Stop()

    def ask(number: int, _: FrameType | None) -> None:
        name = signal.Signals(number).name
        if stop.asked:
            os.write(2, f"\n{name} again: ended at once, the newest saved step stays\n".encode())
            os._exit(128 + number)
        stop.asked = number
        os.write(
            2, f"\n{name}: ends after this step, which is saved; again ends at once\n".encode()
        )

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {n: signal.signal(n, ask) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _largest(value: int) -> jax.Array:
    """The largest value that any process has, on its way."""
    sharding, reduce = _over_processes()
    mine = np.array([value], np.int32)
    with jax.set_mesh(sharding.mesh):  # type: ignore[arg-type]  # instead of the loop's own
        return reduce(jax.make_array_from_process_local_data(sharding, mine))


@functools.cache
def _over_processes() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    firsts = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([firsts[i] for i in sorted(firsts)]), ("process",))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return NamedSharding(mesh, PartitionSpec("process")), jax.jit(jnp.max, out_shardings=everywhere)
