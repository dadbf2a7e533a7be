"""The pipe between front and engine: typed messages over a socket pair, nothing else.

A message is a frozen dataclass. On the wire it is a JSON head, which names the message and the
shapes of its arrays, and the arrays' bytes after it. No pickle: whoever writes into the pipe can
say these messages, with fields of these kinds, and nothing more.

    front -> engine   Open, Hear, Clear, Change, Close, Ping
    engine -> front   Progress, Ready, Opened, Changed, Block, Failed, Closed, Pong
"""

import dataclasses
import json
import math
import socket
import struct
from typing import Any, get_args, get_type_hints

import numpy as np

RATE = 16_000  # samples a second, everywhere: the one time base
FPS = 25
PER_FRAME = RATE // FPS  # samples of a video frame
LIMIT = 1 << 30  # bytes of a message

_SIZES = struct.Struct("<II")  # of the head, and of all arrays


class WireError(Exception):
    """The other side is gone, or says what is no message."""


# ---- front -> engine


@dataclasses.dataclass(frozen=True)
class Open:
    """A session wants a slot. picture: uint8 [H, W, 3] in the engine's size."""

    session: str
    picture: np.ndarray
    prompt: str
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Hear:
    """The next 16 kHz samples, int16, of a session; as many as there are. A block is made as soon
    as its own samples and those ahead of it are there."""

    session: str
    epoch: int
    samples: np.ndarray


@dataclasses.dataclass(frozen=True)
class Clear:
    """What was heard and is in no block yet is forgotten; sample 0 of a new epoch comes next."""

    session: str
    epoch: int


@dataclasses.dataclass(frozen=True)
class Change:
    """Another prompt, from the next block on."""

    session: str
    prompt: str


@dataclasses.dataclass(frozen=True)
class Close:
    session: str


@dataclasses.dataclass(frozen=True)
class Ping:
    number: int


# ---- engine -> front


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where the engine is on its way to ready: load, compile or warm, and how much of all is
    done, 0 to 1."""

    stage: str
    done: float


@dataclasses.dataclass(frozen=True)
class Ready:
    """Compiled and warm. frames: of a block. ahead: samples after a block that it is made from.
    delay: blocks in flight before the first one comes out. together: whether the blocks of all
    slots take no longer than that of one. opening: seconds in which a session is opened and no
    other has its blocks made. compiling: seconds that it took; cached: programs that came from the
    cache instead."""

    model: str
    width: int
    height: int
    slots: int
    frames: int
    ahead: int
    delay: int
    together: bool = False
    opening: float = 0.0
    compiling: float = 0.0
    cached: int = 0


@dataclasses.dataclass(frozen=True)
class Opened:
    session: str


@dataclasses.dataclass(frozen=True)
class Changed:
    """The prompt is another one from the block on whose first sample in its epoch is `first`."""

    session: str
    epoch: int
    first: int


@dataclasses.dataclass(frozen=True)
class Block:
    """Frames [F, H, W, 3], uint8, of samples first, first + 640, ... of an epoch. seconds: what
    it took, by stage: make (its part of it, if blocks are not made together), of that audio,
    denoise and vae where they are apart, and send, of the block before."""

    session: str
    epoch: int
    first: int
    frames: np.ndarray
    seconds: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Failed:
    """A session could not be opened, or goes no further; its slot is free."""

    session: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Closed:
    session: str


@dataclasses.dataclass(frozen=True)
class Pong:
    """memory: bytes in use, by device."""

    number: int
    memory: dict[str, float] = dataclasses.field(default_factory=dict)


ToEngine = Open | Hear | Clear | Change | Close | Ping
ToFront = Progress | Ready | Opened | Changed | Block | Failed | Closed | Pong
Message = ToEngine | ToFront
KINDS = {kind.__name__: kind for kind in get_args(Message)}
FIELDS = {name: get_type_hints(kind) for name, kind in KINDS.items()}
DTYPES = ("|u1", "<i2")  # of arrays: pictures and sound


# ---- bytes


def pack(message: Message) -> bytes:
    fields = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    arrays = {name: x for name, x in fields.items() if isinstance(x, np.ndarray)}
    plain = {name: x for name, x in fields.items() if name not in arrays}
    shapes = {name: [x.dtype.str, list(x.shape)] for name, x in arrays.items()}
    head = json.dumps([type(message).__name__, plain, shapes]).encode()
    body = b"".join(np.ascontiguousarray(x).tobytes() for x in arrays.values())
    return _SIZES.pack(len(head), len(body)) + head + body


def sizes(prefix: bytes) -> tuple[int, int]:
    """Bytes of head and body. Raises WireError where no message can begin so."""
    head, body = _SIZES.unpack(prefix)
    if head + body > LIMIT:
        raise WireError(f"a message of {head + body} bytes; at most {LIMIT} can be sent")
    return head, body


def unpack(head: bytes, body: bytes) -> Message:
    """Raises WireError for anything that `pack` does not make."""
    try:
        kind, plain, shapes = json.loads(head)
        arrays, at = {}, 0
        for name, (dtype, shape) in shapes.items():
            if dtype not in DTYPES or not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError(f"{name} is {dtype} {shape}")
            x = np.frombuffer(body, dtype, math.prod(shape), at).reshape(shape)
            arrays[name], at = x, at + x.nbytes
        if at != len(body):
            raise ValueError(f"{len(body) - at} bytes too many")
        fields = {**plain, **arrays}
        for name, wanted in FIELDS[kind].items():
            if not _is(fields[name], wanted):
                raise ValueError(f"{name} is {type(fields[name]).__name__}")
        return KINDS[kind](**fields)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError,
            RecursionError) as error:  # fmt: skip
        raise WireError(f"what came through the pipe is no message: {error}") from None


def _is(value: Any, kind: Any) -> bool:
    if kind == dict[str, float]:
        return isinstance(value, dict) and all(_is(x, float) for x in value.values())
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


PREFIX = _SIZES.size


class Pipe:
    """The engine's end: blocking, for threads. The front's end is asyncio's, in `link.py`."""

    def __init__(self, end: socket.socket):
        self._end = end

    def send(self, message: Message) -> None:
        try:
            self._end.sendall(pack(message))
        except OSError as error:
            raise WireError(f"the front is gone: {error}") from None

    def receive(self) -> Any:
        """The next message. Raises WireError when the other side is gone."""
        head, body = sizes(self._read(PREFIX))
        return unpack(self._read(head), self._read(body))

    def _read(self, count: int) -> bytes:
        held = bytearray(count)
        view = memoryview(held)
        while view:
            try:
                got = self._end.recv_into(view)
            except OSError as error:
                raise WireError(f"the front is gone: {error}") from None
            if not got:
                raise WireError("the front is gone")
            view = view[got:]
        return bytes(held)
