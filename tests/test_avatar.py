"""The model behind the engine: rows of one batch, each of which is the stream it would be alone."""

import argparse
import collections
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import monitoring

from liveavatar_jax import stream
from liveavatar_jax.config import (
    DiTConfig,
    ModelConfig,
    SpeechConfig,
    StreamConfig,
    TextConfig,
    VAEConfig,
)
from liveavatar_jax.data import speech
from liveavatar_jax.data.image import to_pixels
from liveavatar_jax.generate import ear, encode_prompt
from liveavatar_jax.models.speech import SpeechEncoder
from liveavatar_jax.models.text import TextEncoder
from liveavatar_jax.player import OneDevice
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import packed
from serve.avatar import Rows, make
from serve.engine import Engine, Seat, Window
from serve.wire import Block, Change, Clear, Hear, Open, Opened, Ready

from .networks import random

HEIGHT, WIDTH = 64, 96
BLOCK, AHEAD = speech.BLOCK_SAMPLES, speech.SpeechWindow().ahead
# Every leaf of a state is there, and the sink becomes the stream's own frame on the way.
CONFIG = ModelConfig.tiny(
    dit=DiTConfig.tiny(dim=32, ffn_dim=48, heads=2, layers=1, inject_layers=(0,), audio_layers=3),
    vae=VAEConfig.tiny(cells=1, grid=(HEIGHT // 8, WIDTH // 8)),
    text=TextConfig.tiny(vocab=1200),
    speech=SpeechConfig.tiny(layers=2),
    stream=StreamConfig(
        dtype="float32", steps=2, ring_blocks=3, sink_after=2, audio_past="true", pose="portrait"
    ),
)


def weights(folder: Path, cfg: ModelConfig = CONFIG) -> Path:
    """A checkpoint of random weights."""
    avatar = random(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0)))
    networks = {
        "dit": avatar.dit,
        "vae": avatar.vae,
        "text": random(lambda: TextEncoder(cfg.text, rngs=nnx.Rngs(0))),
        "speech": random(lambda: SpeechEncoder(cfg.speech, rngs=nnx.Rngs(0))),
    }
    packed.pack(folder, cfg, networks, "float32")
    shutil.copy(packed.preset() / "spiece.model", folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return weights(tmp_path_factory.mktemp("weights") / "tiny")


def flags(weights: Path, slots: int = 1, size: str = f"{WIDTH}*{HEIGHT}") -> argparse.Namespace:
    return argparse.Namespace(
        weights=weights, slots=slots, size=size, device=None, dtype=None, mesh=None, quantise=None
    )


@pytest.fixture(scope="module", autouse=True)
def precision() -> Iterator[None]:
    """An engine sets it for its process."""
    mine = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", mine)


@dataclasses.dataclass(frozen=True)
class Talk:
    """Who a session shows, and what is said in it."""

    number: int
    prompt: str = "A woman smiles."
    blocks: int = 8

    @property
    def picture(self) -> np.ndarray:
        rng = np.random.default_rng(self.number)
        coarse = rng.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), np.uint8)
        return coarse.repeat(16, axis=0).repeat(16, axis=1)

    @property
    def sound(self) -> np.ndarray:
        """Noise, now louder, now softer."""
        rng = np.random.default_rng(1000 + self.number)
        count = self.blocks * BLOCK + AHEAD
        loud = 1500 * (1.1 + np.sin(np.arange(count) / 2000))
        return (loud * rng.standard_normal(count)).astype(np.int16)

    def open(self, rows: Rows, slot: int) -> Seat:
        rows.open(slot, self.picture, self.prompt, self.number)
        seat = Seat(str(self.number), slot, rows.left, BLOCK, rows.ready.ahead)
        seat.hear(0, self.sound)
        return seat

    def alone(self, rows: Rows, slot: int) -> np.ndarray:
        """All its frames, [blocks, 12, H, W, 3], while the other rows rest."""
        seat, blocks = self.open(rows, slot), []
        while (window := seat.window()) is not None:
            blocks.append(rows.make({slot: window})[slot])
        return np.stack(blocks)


TALK = Talk(1)


@dataclasses.dataclass
class Loaded:
    rows: Rows
    told: list[tuple[str, float]]  # on the way to ready
    alone: np.ndarray  # frames of TALK, who speaks first, in slot 0
    compiled: list[str]  # meanwhile


@pytest.fixture(scope="module")
def loaded(folder) -> Loaded:
    told, compiled = [], []
    rows = make(flags(folder, slots=3), lambda *news: told.append(news))

    def listen(event: str, seconds: float, **about: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compiled.append(about["fun_name"])

    monitoring.register_event_duration_secs_listener(listen)
    alone = TALK.alone(rows, 0)
    rows.change(0, "A man is sad.")
    monitoring.unregister_event_duration_listener(listen)
    return Loaded(rows, told, alone, compiled)


@pytest.fixture
def rows(loaded) -> Rows:
    return loaded.rows


@pytest.fixture
def alone(loaded) -> np.ndarray:
    return loaded.alone


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Grey levels from frames to frames."""
    return np.abs(a.astype(np.int32) - b)


def test_what_is_ready_is_what_was_said(loaded):
    rows, ready = loaded.rows, loaded.rows.ready
    bare = dataclasses.replace(ready, opening=0.0, compiling=0.0, cached=0)
    assert bare == Ready("tiny", WIDTH, HEIGHT, 3, 12, AHEAD, 0, together=True)
    assert ready.compiling > 0 and 0 < ready.opening < 60
    assert rows.left == speech.SpeechWindow().left
    assert loaded.alone.shape == (TALK.blocks, ready.frames, ready.height, ready.width, 3)
    assert loaded.alone.dtype == np.uint8
    stages, shares = zip(*loaded.told, strict=True)
    assert list(dict.fromkeys(stages)) == ["load", "compile", "warm"]
    assert list(shares) == sorted(shares) and (shares[0], shares[-1]) == (0.0, 1.0)


def test_nothing_is_compiled_for_who_comes_speaks_and_changes(loaded):
    assert loaded.compiled == []


def test_a_session_alone_has_the_frames_that_a_video_has(folder, loaded):
    """Those of `generate` for the same portrait, prompt, seed and features; which hear what was
    heard so far, after a silent block that is not shown."""
    one = make(flags(folder), lambda stage, done: None)
    made = TALK.alone(one, 0)
    encode, window, _ = ear(folder, CONFIG, speech.SpeechWindow())
    sound = np.concatenate([np.zeros(window.left + BLOCK), TALK.sound / 32768]).astype(np.float32)
    chunks = []
    for hop in range(TALK.blocks + 1):
        # Of what comes the silent block knows nothing.
        samples = sound[hop * BLOCK :][: window.samples] * (hop > 0)
        heard = sound[window.left + BLOCK : hop * BLOCK + window.samples] if hop else sound[:0]
        features = encode(samples[None], window.ask(hop, speech.PRIOR.add(heard)))
        # The same program as that of one row, for it costs as much as the rest of this test.
        chunks.append(stream.Chunk(audio=features[None], live=np.ones(1, bool)))
    context = encode_prompt(folder, CONFIG, TALK.prompt)
    context = jnp.pad(context, ((0, 0), (0, CONFIG.dit.text_len - context.shape[1]), (0, 0)))
    opening = to_pixels(TALK.picture)[None], context, TALK.number
    player = OneDevice(one.avatar, *opening, chunks[0])
    want = np.stack(list(player.play(iter(chunks), len(chunks))))[1:]
    np.testing.assert_array_equal(made, want)
    # A program over three rows may add up in another order: of 100,000 bytes 3 are 1 apart.
    assert apart(loaded.alone, made).max() <= 1
    assert np.mean(loaded.alone != made) < 1e-3


def test_a_row_does_not_notice_the_others(rows, alone):
    """Nor that it has to wait, or who was in its place before. Numbers of a row are added up in
    the same order whatever the other rows are: not a byte differs."""
    rng = np.random.default_rng(0)
    seat, others, blocks = TALK.open(rows, 0), {}, []
    happened = collections.Counter()
    while len(blocks) < TALK.blocks:
        windows = {}
        for slot in (1, 2):
            what = rng.choice(["open", "change", "close", "nothing"], p=[0.3, 0.2, 0.1, 0.4])
            if what == "open":
                other = Talk(int(rng.integers(100)), rng.choice(["sad", "a man", ""]))
                others[slot] = other.open(rows, slot)
            elif what == "change":
                rows.change(slot, rng.choice(["surprised", "A neutral face."]))
            elif what == "close":
                rows.close(slot)
                others.pop(slot, None)
            happened[what] += 1
            if slot in others and rng.random() < 0.8:
                if (window := others[slot].window()) is not None:
                    windows[slot] = window
                    happened["spoke"] += 1
        if rng.random() < 0.8:
            window = seat.window()
            assert window is not None
            windows[0] = window
        else:
            happened["waited"] += 1
        if windows:
            made = rows.make(windows)
            assert made.keys() == windows.keys()
            blocks += [made[0]] if 0 in made else []
    assert len(happened) == 6, happened
    np.testing.assert_array_equal(np.stack(blocks), alone)


def test_a_slot_that_is_taken_again_is_as_new(rows, alone):
    before = Talk(2, "A man is sad.", blocks=3)
    assert apart(before.alone(rows, 0), alone[:3]).mean() > 10
    rows.change(0, "surprised")
    rows.close(0)
    again = dataclasses.replace(TALK, blocks=4)
    np.testing.assert_array_equal(again.alone(rows, 0), alone[:4])


def test_a_prompt_changes_one_stream_from_its_next_block_on(rows, alone):
    said, prompt = [], "A man is sad."
    engine = Engine(rows, said.append)
    for name in ("a", "b"):
        engine.hear(Open(name, TALK.picture, TALK.prompt, TALK.number))
    for block in range(4):
        if block == 2:
            engine.hear(Change("b", prompt))
        for name in ("a", "b"):
            known = 0 if block == 0 else block * BLOCK + AHEAD
            engine.hear(Hear(name, 0, TALK.sound[known : (block + 1) * BLOCK + AHEAD]))
        assert engine.tick()
    made = {name: np.stack([x.frames for x in said if isinstance(x, Block) and x.session == name])
            for name in ("a", "b")}  # fmt: skip
    np.testing.assert_array_equal(made["a"], alone[:4])
    assert apart(made["b"][:2], alone[:2]).max() <= 1  # another row
    assert apart(made["b"][2:], alone[2:4]).mean((1, 2, 3, 4)).min() > 5
    rows.open(2, TALK.picture, prompt, TALK.number)
    texts = [jax.tree.map(np.asarray, rows._state.text)]
    rows.change(2, TALK.prompt)
    texts.append(jax.tree.map(np.asarray, rows._state.text))
    for leaf, later in zip(*map(jax.tree.leaves, texts), strict=True):
        kept, changed, opened = np.moveaxis(leaf, 1, 0)
        np.testing.assert_allclose(changed, opened, rtol=1e-5, atol=1e-6)
        assert np.abs(changed - kept).max() > 0.1
        np.testing.assert_array_equal(later[:, :2], leaf[:, :2])
        np.testing.assert_allclose(later[:, 2], kept, rtol=1e-5, atol=1e-6)


def test_a_stream_is_put_into_its_row_of_every_leaf(rows):
    """Along the one axis where the shapes of three streams and of one differ."""
    given = jnp.asarray(to_pixels(TALK.picture)[None]), rows._prompt(""), jax.random.key(0)
    one = numbered(rows._open(rows.avatar, *given), -1)
    assert all(value is not None for value in vars(one).values())
    for row in range(3):
        before = jax.tree_util.tree_leaves_with_path(numbered(rows._state, 1))
        after = rows._insert(numbered(rows._state, 1), one, np.int32(row))
        leaves = zip(before, jax.tree.leaves(one), jax.tree.leaves(after), strict=True)
        for (path, old), own, new in leaves:
            name = jax.tree_util.keystr(path)
            old, own, new = map(numbers, (old, own, new))
            axes = [i for i, sides in enumerate(zip(old.shape, own.shape, strict=True))
                    if sides == (3, 1)]  # fmt: skip
            assert len(axes) == 1, name
            want = np.moveaxis(old.copy(), axes[0], 0)
            want[row] = own.take(0, axes[0])
            np.testing.assert_array_equal(np.moveaxis(new, axes[0], 0), want, err_msg=name)


def of_keys(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def numbers(leaf: jax.Array) -> np.ndarray:
    return np.asarray(jax.random.key_data(leaf) if of_keys(leaf) else leaf)


def numbered(state: Any, sign: int) -> Any:
    """The same shapes, with another number in every place of a leaf."""

    def leaf(old: jax.Array) -> jax.Array:
        like = numbers(old)
        new = (sign * (1 + np.arange(like.size))).astype(like.dtype).reshape(like.shape)
        return jax.random.wrap_key_data(new) if of_keys(old) else jnp.asarray(new)

    return jax.tree.map(leaf, state)


def test_what_cannot_be_is_one_sentence(folder, tmp_path):
    short = dataclasses.replace(CONFIG.stream, block_frames=2)
    packed.pack(tmp_path / "short", dataclasses.replace(CONFIG, stream=short), {})
    cases = [
        (flags(tmp_path / "short"), "makes 8 frames at once, and a live stream hears 12; set "
                                    "stream.block_frames of its config to 3"),
        (flags(folder, size="big"), "size 'big' must be two whole numbers, for example 720x400"),
        (flags(folder, size="8*8"), "must have an area of at least 64x64 pixels"),
        (flags(folder, size="64*96"), "64×96 pixels; this VAE knows 96×64 alone"),
        (flags(tmp_path / "none"), "none"),
    ]  # fmt: skip
    for args, told in cases:
        with pytest.raises(LiveAvatarError) as error:
            make(args, lambda stage, done: None)
        assert told in str(error.value) and "\n" not in str(error.value)


def test_the_engine_makes_blocks_as_sound_comes(rows, alone):
    said = []
    engine = Engine(rows, said.append)
    engine.hear(Open("a", TALK.picture, TALK.prompt, TALK.number))
    heard = 0
    for piece in np.array_split(TALK.sound[: 3 * BLOCK + AHEAD], 17):
        engine.hear(Hear("a", 0, piece))
        heard += len(piece)
        while engine.tick():
            pass
        assert len(said) - 1 == max(0, heard - AHEAD) // BLOCK
    assert said[0] == Opened("a")
    assert [(x.epoch, x.first) for x in said[1:]] == [(0, k * BLOCK) for k in range(3)]
    np.testing.assert_array_equal(np.stack([x.frames for x in said[1:]]), alone[:3])


def test_an_interrupt_forgets_all_that_is_in_no_block(rows):
    """The stream goes on from the last block that was made, whether it was shown or not: what is
    said next, and nothing else, follows its sound."""
    said, other = [], Talk(3).sound
    engine = Engine(rows, said.append)
    engine.hear(Open("a", TALK.picture, TALK.prompt, TALK.number))
    engine.hear(Hear("a", 0, TALK.sound[: 2 * BLOCK + AHEAD + 5000]))
    while engine.tick():
        pass
    engine.hear(Clear("a", 1))
    engine.hear(Hear("a", 0, TALK.sound))  # it was on its way
    assert not engine.tick()
    engine.hear(Hear("a", 1, other[: 2 * BLOCK + AHEAD]))
    while engine.tick():
        pass
    assert [(x.epoch, x.first) for x in said[1:]] == [(0, 0), (0, BLOCK), (1, 0), (1, BLOCK)]
    TALK.open(rows, 0)
    silence = np.zeros(rows.left, np.int16)
    size = rows.left + BLOCK + AHEAD
    spoken = np.concatenate([silence, TALK.sound])
    follows = np.concatenate([spoken[2 * BLOCK :][: rows.left], other])
    parts = [(0, 0, spoken), (0, BLOCK, spoken), (1, 0, follows), (1, BLOCK, follows)]
    for block, (epoch, first, sound) in zip(said[1:], parts, strict=True):
        window = Window("a", epoch, first, sound[first : first + size])
        np.testing.assert_array_equal(block.frames, rows.make({0: window})[0])
