"""The engine process: sessions as the rows of one model, driven through the pipe.

    python -m serve.engine --fd 5 --weights avatar --slots 2

Every session has a seat, a row of the model's batch. Whatever seats have heard enough make their
next block together. A session that cannot be opened fails alone. What makes the frames is a
`Maker`: `avatar.py`, `stages.py` or `mock.py`.
"""

import argparse
import collections
import dataclasses
import queue
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from liveavatar_jax.types import LiveAvatarError
from serve.wire import (
    PER_FRAME,
    Block,
    Change,
    Changed,
    Clear,
    Close,
    Closed,
    Failed,
    Hear,
    Open,
    Opened,
    Ping,
    Pipe,
    Pong,
    Progress,
    Ready,
    WireError,
)


class Maker(Protocol):
    """What makes frames. `left` samples before a block and `ready.ahead` after it are heard."""

    ready: Ready
    left: int
    took: dict[str, float]  # seconds of the last `make`, by stage

    def open(self, slot: int, picture: np.ndarray, prompt: str, seed: int) -> None:
        """A new stream takes a slot. Raises Refused when it cannot."""
        ...

    def change(self, slot: int, prompt: str) -> None: ...

    def make(self, windows: Mapping[int, "Window"]) -> Mapping[int, np.ndarray]:
        """The next block of each of these slots; frames [F, H, W, 3] of those that came out. With
        a delay these are earlier blocks, in their order; without windows, what is in flight."""
        ...

    def close(self, slot: int) -> None: ...

    def memory(self) -> dict[str, float]:
        """Bytes in use, by device."""
        ...


class Refused(Exception):
    """A session that cannot be opened, in one sentence."""


@dataclasses.dataclass(frozen=True)
class Window:
    """What a block is made from: int16 samples, `left` before it and `ahead` after it."""

    session: str
    epoch: int
    first: int
    samples: np.ndarray


class Seat:
    """A session in its slot, and what it has heard that is in no block yet."""

    def __init__(self, session: str, slot: int, left: int, block: int, ahead: int):
        self.session, self.slot = session, slot
        self.left, self.block, self.ahead = left, block, ahead
        self.epoch = self.first = 0
        self.samples = np.zeros(left, np.int16)
        self.flight: collections.deque[tuple[int, int]] = collections.deque()

    def hear(self, epoch: int, samples: np.ndarray) -> None:
        if epoch == self.epoch:
            self.samples = np.concatenate([self.samples, samples])

    def clear(self, epoch: int) -> None:
        """What blocks were made from stays before the next one, whose stream goes on from them."""
        self.epoch, self.first, self.samples = epoch, 0, self.samples[: self.left]

    def window(self) -> Window | None:
        """The next block's, once there is enough."""
        size = self.left + self.block + self.ahead
        if len(self.samples) < size:
            return None
        window = Window(self.session, self.epoch, self.first, self.samples[:size])
        self.flight.append((self.epoch, self.first))
        self.samples, self.first = self.samples[self.block :], self.first + self.block
        return window


class Engine:
    """Seats around a maker. `say` takes the messages to the front."""

    def __init__(self, maker: Maker, say: Any):
        self.maker, self.say = maker, say
        self.seats: dict[str, Seat] = {}
        self.free = list(range(maker.ready.slots))
        self._sent = 0.0  # seconds that the pipe took for the last block

    def hear(self, message: Any) -> None:
        """One message of the front. What names no session that is there is late, and ignored."""
        match message:
            case Open():
                self._open(message)
            case Ping(number):
                self.say(Pong(number, self.maker.memory()))
            case Close(session):
                if (seat := self.seats.pop(session, None)) is not None:
                    self.maker.close(seat.slot)
                    self.free.append(seat.slot)
                self.say(Closed(session))
            case Hear(session, epoch, samples) if session in self.seats:
                self.seats[session].hear(epoch, samples)
            case Clear(session, epoch) if session in self.seats:
                self.seats[session].clear(epoch)
            case Change(session, prompt) if session in self.seats:
                seat = self.seats[session]
                self.maker.change(seat.slot, prompt)
                self.say(Changed(session, seat.epoch, seat.first))

    def tick(self) -> bool:
        """A block for each seat that has heard enough; whether there was anything to do."""
        windows = {seat.slot: window for seat in self.seats.values()
                   if (window := seat.window()) is not None}  # fmt: skip
        if not windows and not any(seat.flight for seat in self.seats.values()):
            return False
        begun = time.monotonic()
        made = self.maker.make(windows)
        took = {"make": time.monotonic() - begun, **self.maker.took}
        if made and not self.maker.ready.together:
            took = {stage: seconds / len(made) for stage, seconds in took.items()}
        for seat in self.seats.values():
            if seat.slot in made and seat.flight:
                epoch, first = seat.flight.popleft()
                seconds, begun = took | {"send": self._sent}, time.monotonic()
                self.say(Block(seat.session, epoch, first, made[seat.slot], seconds))
                self._sent = time.monotonic() - begun
        return True

    def _open(self, message: Open) -> None:
        ready = self.maker.ready
        try:
            if message.session in self.seats:
                raise Refused("there is a session of that name")
            if message.picture.shape != (ready.height, ready.width, 3):
                raise Refused(f"the picture has shape {message.picture.shape}; the model takes "
                              f"({ready.height}, {ready.width}, 3)")  # fmt: skip
            if not self.free:
                raise Refused(f"all {ready.slots} slots are taken")
            self.maker.open(self.free[0], message.picture, message.prompt, message.seed)
        except Refused as error:
            self.say(Failed(message.session, str(error)))
            return
        seat = Seat(message.session, self.free.pop(0), self.maker.left,
                    ready.frames * PER_FRAME, ready.ahead)  # fmt: skip
        self.seats[message.session] = seat
        self.say(Opened(message.session))


def run(pipe: Pipe, make: Any) -> None:
    """Serves until the front is gone. make: (report progress) -> Maker."""
    maker = make(lambda stage, done: pipe.send(Progress(stage, done)))
    engine = Engine(maker, pipe.send)
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                inbox.put(pipe.receive())
        except WireError as error:
            inbox.put(error)

    threading.Thread(target=read, daemon=True).start()
    pipe.send(maker.ready)
    busy = False
    while True:
        wait = not busy
        while wait or not inbox.empty():
            message = inbox.get()
            if isinstance(message, WireError):
                return
            engine.hear(message)
            wait = False
            if isinstance(message, Open | Change):
                break  # those who are there get their blocks before more of what takes its time
        busy = engine.tick()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The engine behind `python -m serve`.")
    parser.add_argument("--fd", type=int, required=True, help="its end of the socket pair")
    parser.add_argument("--mock", action="store_true", help="drawn frames instead of a model")
    parser.add_argument("--weights", type=Path, help="converted checkpoint; the built-in puppet")
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--size", help="720*400; what the model knows, where it knows but one")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--mesh", help="stage=4,vae=1; one device")
    parser.add_argument("--fake-devices", type=int, help="of a CPU, to try a mesh on")
    parser.add_argument("--quantise", choices=("int8", "fp8"))
    args = parser.parse_args(argv)
    pipe = Pipe(socket.socket(fileno=args.fd))
    try:
        if args.mock:
            from serve.mock import Mock

            run(pipe, lambda report: Mock(args.slots))
        else:
            from serve.avatar import make

            run(pipe, lambda report: make(args, report))
        return 0
    except LiveAvatarError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    except WireError:
        return 0  # the front is gone, and nobody is left to serve
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
