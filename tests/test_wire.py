"""The pipe between front and engine says its messages and nothing else."""

import ast
import dataclasses
import inspect
import json
import socket
import threading

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as some

from serve import wire
from serve.wire import PREFIX, Block, Hear, Open, Pipe, Progress, Ready, WireError

quickly = settings(deadline=None, max_examples=100, database=None)
words = some.text('aZ0 é漢😀"\\\n\0{', max_size=20)

sounds = some.binary(max_size=64).map(lambda x: np.frombuffer(x[: len(x) // 2 * 2], "<i2"))
shapes = some.lists(some.integers(0, 3), min_size=1, max_size=4)
pictures = shapes.map(lambda shape: np.arange(np.prod(shape), dtype=np.uint8).reshape(shape))
KINDS = {
    bool: some.booleans(),
    int: some.integers(-(2**63), 2**63),
    float: some.floats(allow_nan=False) | some.integers(0, 9),
    str: words,
    np.ndarray: sounds | pictures,
    dict[str, float]: some.dictionaries(words, some.floats(0, 10), max_size=3),
}
messages = some.one_of(
    some.builds(kind, **{name: KINDS[hint] for name, hint in wire.FIELDS[name].items()})
    for name, kind in wire.KINDS.items()
)


def same(ours, want) -> bool:
    if type(ours) is not type(want):
        return False
    for field in dataclasses.fields(want):
        x, y = getattr(ours, field.name), getattr(want, field.name)
        if isinstance(y, np.ndarray):
            if x.dtype != y.dtype or x.shape != y.shape or not np.array_equal(x, y):
                return False
        elif x != y:
            return False
    return True


def parted(data: bytes) -> tuple[bytes, bytes]:
    head, body = wire.sizes(data[:PREFIX])
    assert len(data) == PREFIX + head + body
    return data[PREFIX : PREFIX + head], data[PREFIX + head :]


@quickly
@given(messages)
def test_every_message_comes_out_as_it_went_in(message):
    assert same(wire.unpack(*parted(wire.pack(message))), message)


def test_what_lies_scattered_in_memory_comes_out_in_order():
    scattered = np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1)[::2]
    message = Open("a", scattered, "someone speaks", 7)
    assert same(wire.unpack(*parted(wire.pack(message))), message)


@quickly
@given(messages, some.data())
def test_what_was_cut_or_altered_is_a_message_or_refused(message, data):
    head, body = parted(wire.pack(message))
    at = data.draw(some.integers(0, len(head) - 1))
    altered = head[:at] + data.draw(some.binary(max_size=3)) + head[at + 1 :]
    for pair in ((head[:at], body), (altered, body), (head, body + b"x"), (head, body[:-1])):
        try:
            got = wire.unpack(*pair)
        except WireError:
            continue
        again = wire.unpack(*parted(wire.pack(got)))  # it is one that `pack` could have made
        assert same(again, got) or "nan" in repr(got)


@quickly
@given(some.binary(max_size=200), some.binary(max_size=50))
def test_noise_is_refused(head, body):
    with pytest.raises(WireError):
        wire.unpack(head, body)


trees = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | words
    | some.sampled_from(["Hear", "Block", "|u1", "<i2", "|O", "<f8", "samples", "session"]),
    lambda inner: some.lists(inner, max_size=4) | some.dictionaries(
        some.sampled_from(["session", "epoch", "samples", "frames", "number"]), inner, max_size=4
    ),
    max_leaves=12,
)  # fmt: skip


@quickly
@given(trees, some.binary(max_size=16))
@example(["Hear", {}, "abc"], b"")
@example(["Hear", {"session": "a", "epoch": 0}, {"samples": ["<i2", [-1]]}], b"1234")
@example(["Hear", {"session": "a", "epoch": 0}, {"samples": ["<i2", [10**30]]}], b"12")
@example(["Hear", {"session": "a", "epoch": 0}, {"samples": ["<i2", [0, 10**30]]}], b"")
@example(["Hear", {"session": "a", "epoch": 0}, {"samples": ["|O", [1]]}], b"12345678")
@example(["Hear", {"session": "a", "epoch": 0}, {"samples": [None, [1]]}], b"12345678")
@example(["Hear", {"session": 1, "epoch": 0, "samples": []}, {}], b"")
@example(["Ping", {"number": True}, {}], b"")
@example([["Ping"], {"number": 1}, {}], b"")
@example(["Block", {"session": "a", "epoch": 0, "first": 0, "seconds": {"make": "x"}},
          {"frames": ["|u1", [1]]}], b"1")  # fmt: skip
def test_json_that_is_no_message_is_refused(tree, body):
    with pytest.raises(WireError):
        wire.unpack(json.dumps(tree).encode(), body)


def test_json_as_deep_as_it_gets_is_refused():
    with pytest.raises(WireError):
        wire.unpack(b"[" * 100_000 + b"]" * 100_000, b"")


@given(some.binary(min_size=PREFIX, max_size=PREFIX))
@quickly
def test_a_message_too_large_is_refused_before_it_is_read(prefix):
    try:
        assert sum(wire.sizes(prefix)) <= wire.LIMIT
    except WireError as error:
        assert str(wire.LIMIT) in str(error)


def test_nothing_is_unpickled():
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(ast.parse(inspect.getsource(wire)))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not imported & {"pickle", "marshal", "shelve", "dill"}
    thing = np.array([{"a": 1}], object)
    with pytest.raises(WireError):
        wire.unpack(*parted(wire.pack(Hear("a", 0, thing))))


# ---- the engine's end


def test_messages_pass_a_pipe_in_order_whatever_their_size():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frames = np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), np.uint8)
        silence = np.zeros(0, np.int16)
        sent = [Progress("load", 0.5), Ready("m", 64, 64, 2, 12, 1920, 0),
                Block("a", 3, 7680, frames, {"make": 0.1}), Hear("a", 0, silence)]  # fmt: skip
        writer = threading.Thread(target=lambda: [Pipe(ours).send(x) for x in sent])
        writer.start()
        pipe = Pipe(theirs)
        assert all(same(pipe.receive(), message) for message in sent)
        writer.join()


@pytest.mark.parametrize("cut", [0, 3, PREFIX, PREFIX + 5, -1])
def test_a_side_that_goes_within_a_message_is_gone(cut):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(wire.pack(Hear("a", 0, np.ones(5, np.int16)))[:cut])
        ours.close()
        with pytest.raises(WireError, match="gone"):
            Pipe(theirs).receive()
        with pytest.raises(WireError, match="gone"):
            for _ in range(100):
                Pipe(theirs).send(Progress("load", 0.0))
