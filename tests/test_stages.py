"""The pipeline behind the engine: its sessions have the frames that they have on one device."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from liveavatar_jax.config import DiTConfig
from serve.engine import Engine
from serve.stages import Stages
from serve.wire import Block, Change, Changed, Clear, Close, Hear, Open

from .test_avatar import AHEAD, BLOCK, CONFIG, Talk, flags, make, weights

SEVERAL_DEVICES = True  # for conftest

DIT = {"ffn_dim": 48, "layers": 2, "inject_layers": (1,), "audio_layers": 3}
# Its three heads cannot be parted over two stages, so streams begin within the pipeline, and wait
# there before their sink is renewed.
APART = dataclasses.replace(
    CONFIG, dit=DiTConfig.tiny(dim=48, heads=3, **DIT),
    stream=dataclasses.replace(CONFIG.stream, sink_after=1),
)  # fmt: skip


class Show:
    """An engine, and what it says of its sessions."""

    def __init__(self, maker):
        self.said: list = []
        self.engine, self.heard = Engine(maker, self.said.append), {}

    def open(self, name: str, talk: Talk) -> None:
        self.engine.hear(Open(name, talk.picture, talk.prompt, talk.number))
        self.heard[name] = talk.sound, 0

    def hear(self, name: str, epoch: int = 0) -> None:
        """What the next block is made from."""
        sound, at = self.heard[name]
        end = at + BLOCK + (0 if at else AHEAD)
        self.engine.hear(Hear(name, epoch, sound[at:end]))
        self.heard[name] = sound, end

    def blocks(self, name: str) -> list[tuple[int, int, np.ndarray]]:
        return [(x.epoch, x.first, x.frames) for x in self.said
                if isinstance(x, Block) and x.session == name]  # fmt: skip


def talks(maker) -> Show:
    """Three sessions in two rows, which come, go, interrupt and change."""
    show = Show(maker)
    show.open("a", Talk(1))
    for tick in range(12):
        if tick == 2:
            show.open("b", Talk(2, "A man is sad."))
        if tick == 5:
            show.engine.hear(Change("a", "A man is sad."))
        if tick == 7:  # with blocks on their way; another takes its row
            show.engine.hear(Close("b"))
            show.open("c", Talk(3))
        if tick == 9:
            show.engine.hear(Clear("a", 1))
            show.heard["a"] = Talk(4).sound, 0
        for name in {"b", "c"} & show.engine.seats.keys():
            show.hear(name)
        if tick != 4:  # it says nothing there
            show.hear("a", int(tick >= 9))
        show.engine.tick()
    while show.engine.tick():
        pass
    return show


@pytest.fixture(scope="module", autouse=True)
def precision():
    """An engine sets it for its process."""
    mine = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", mine)


@pytest.mark.parametrize(
    "cfg", [APART, pytest.param(CONFIG, marks=pytest.mark.slow)], ids=["apart", "warm"]
)
def test_sessions_of_a_pipeline_have_the_frames_of_one_device(cfg, tmp_path: Path):
    args = flags(weights(tmp_path / "tiny", cfg), slots=2)
    want = talks(make(args, lambda stage, done: None))
    args.mesh = "stage=2,vae=1"
    told: list[tuple[str, float]] = []
    maker = make(args, lambda *news: told.append(news))
    assert isinstance(maker, Stages) and maker.pipe.can_warm == (cfg is CONFIG)
    assert (maker.ready.delay, maker.ready.slots, told[-1]) == (2, 2, ("warm", 1.0))
    ours = talks(maker)
    for name, count in {"a": 11, "c": 5}.items():
        made, right = ours.blocks(name), want.blocks(name)
        assert [x[:2] for x in made] == [x[:2] for x in right] and len(made) == count
        apart = np.abs(np.stack([x[2] for x in made]).astype(int) - [x[2] for x in right])
        assert apart.max() <= 1 and np.mean(apart > 0) < 1e-3  # bytes, rounded
    came = ours.blocks("b")  # the rest was on its way
    assert 0 < len(came) < len(want.blocks("b"))
    for (*_, made), (*_, right) in zip(came, want.blocks("b"), strict=False):
        assert np.abs(made.astype(int) - right).max() <= 1
    changed = [[x for x in show.said if isinstance(x, Changed)] for show in (ours, want)]
    assert changed[0] == changed[1] == [Changed("a", 0, 4 * BLOCK)]
