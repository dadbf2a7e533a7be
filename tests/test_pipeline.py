"""The pipeline over a mesh is the sequential stream, for every row by itself."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax import stream
from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig
from liveavatar_jax.parallel import stages
from liveavatar_jax.parallel.collectives import collectives
from liveavatar_jax.parallel.mesh import MeshSpec
from liveavatar_jax.parallel.pipeline import Pipeline, last
from liveavatar_jax.types import LiveAvatarError

from .networks import random

SEVERAL_DEVICES = True  # for conftest

HEIGHT, WIDTH = 6, 10  # latents: 15 patches a frame, which nothing divides
DIT = DiTConfig.tiny(dim=64, ffn_dim=48, heads=8, layers=2, inject_layers=(1,), audio_layers=3)
NET = ModelConfig.tiny(dit=DIT, stream=StreamConfig(dtype="float32", audio_past="true"))
SHORT = dataclasses.replace(NET, stream=dataclasses.replace(NET.stream, steps=2, sink_after=1))
THREE = dataclasses.replace(NET, stream=dataclasses.replace(NET.stream, steps=3))
BLOCKS = 24
COMPILED: list[str] = []  # what XLA was asked for, in order
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **about: (
        COMPILED.append(about["fun_name"]) if event.endswith("backend_compile_duration") else None
    )
)


def programs() -> Counter:
    """How often each of the pipeline's programs has been compiled so far."""
    names = (name[4:-1].removesuffix("_apart") for name in COMPILED)
    return Counter(name for name in names if name in ("start", "insert", "tick", "warm"))


@functools.cache
def avatar(cfg: ModelConfig = NET) -> stream.Avatar:
    made = jax.eval_shape(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0)))
    weights = random(lambda: stream.Avatar(NET, rngs=nnx.Rngs(0)))
    return jax.tree.unflatten(jax.tree.structure(made), jax.tree.leaves(weights))


@functools.cache
def normal(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(seed), shape))


def chunk(session: int, block: int, **labels) -> stream.Chunk:
    """Speech that changes with every block."""
    heard = normal(1000 * session + block, 1, 1, 12, DIT.audio_layers, DIT.audio_dim)
    return stream.Chunk(audio=heard, **labels)


def context(session: int) -> np.ndarray:
    return normal(70 + session, 1, 4, DIT.text_dim)


@functools.cache
def portrait(session: int) -> stream.Portrait:
    picture = np.tanh(normal(50 + session, 1, 8 * HEIGHT, 8 * WIDTH, 3))
    return jax.jit(stream.encode_portrait)(avatar(), picture)


@functools.cache
def sequential(cfg: ModelConfig):
    start = jax.jit(lambda *given: stream.start(*given))
    return start, jax.jit(stream.denoise, donate_argnums=1)


@functools.cache
def alone(session: int, blocks: int = BLOCKS, cfg: ModelConfig = NET) -> list[np.ndarray]:
    """Latents of one session on one device."""
    start, denoise = sequential(cfg)
    given = jax.tree.map(jnp.copy, portrait(session))
    state, out = start(avatar(cfg), given, context(session), jax.random.key(session)), []
    for block in range(blocks):
        drawn = stream.draw(avatar(cfg), state)
        state, flight = denoise(avatar(cfg), state, drawn, chunk(session, block))
        out.append(np.asarray(flight.x)[0])
    return out


def same(ours, want) -> None:
    """To the tolerance of the DiT's parity, 2e-5 of the peak."""
    ours, want = np.stack(ours), np.stack(want)
    assert ours.shape == want.shape and np.isfinite(ours).all()
    assert np.abs(ours - want).max() <= 2e-5 * np.abs(want).max()


class Show:
    """A pipeline with its networks and its state, and what has come out of each row."""

    def __init__(self, spec: str, cfg: ModelConfig = NET, rows: int = 1):
        self.pipe = Pipeline(cfg, MeshSpec.parse(spec), HEIGHT, WIDTH, rows=rows)
        self.model = self.pipe.place(avatar(cfg))
        self.state = self.pipe.empty()
        self.out: list[list[tuple[int, int, np.ndarray]]] = [[] for _ in range(rows)]

    def open(self, session: int) -> stream.StreamState:
        given, key = portrait(session), jax.random.key(session)
        return self.pipe.start(self.model, given, context(session), key)

    def warm(self, state: stream.StreamState, session: int, block: int):
        given = self.pipe._everywhere(self.pipe.filled(chunk(session, block), 1))
        bare = dataclasses.replace(state, decoder=None)
        with jax.set_mesh(self.pipe.meshes.stages):
            bare, leaving = self.pipe._warm(self.model.stages, bare, given)
        x = np.asarray(leaving.x)[0, 0]
        return dataclasses.replace(bare, decoder=state.decoder), x

    def insert(self, session: stream.StreamState, row: int = 0) -> None:
        self.state = self.pipe.insert(self.state, session, row)

    def tick(self, *rows: stream.Chunk | None) -> None:
        """A chunk for every row, None for one that rests."""
        zeros = chunk(0, 0, live=[False], epoch=[0])
        each = [zeros if row is None else row for row in rows or [None] * self.pipe.rows]
        whole = stream.Chunk(
            audio=np.concatenate([row.audio for row in each]),
            live=np.concatenate([[True] if row.live is None else row.live for row in each]),
            epoch=np.concatenate([[0] if row.epoch is None else row.epoch for row in each]),
        )
        self.state, leaving = self.pipe.tick(self.model, self.state, whole)
        x, live, block, epoch = (
            np.asarray(last(a))[0] for a in (leaving.x, leaving.live, leaving.block, leaving.epoch)
        )
        for row in np.flatnonzero(live):
            self.out[row].append((int(block[row]), int(epoch[row]), x[row]))

    def latents(self, row: int = 0) -> list[np.ndarray]:
        return [x for _, _, x in self.out[row]]

    def blocks(self, row: int = 0) -> list[int]:
        return [block for block, _, _ in self.out[row]]


@pytest.mark.parametrize(
    "spec, warm, cfg",
    [
        ("stage=4,vae=1", 0, NET),
        ("stage=4", 5, NET),
        ("stage=4,tensor=2", 1, NET),
        pytest.param("stage=4,sequence=2", 0, NET, marks=pytest.mark.slow),
        # which does not divide the heads
        pytest.param("stage=3", 0, THREE, marks=pytest.mark.slow),
    ],
)
def test_the_pipeline_is_the_sequential_stream(spec, warm, cfg):
    """Over 24 blocks: the ring rolls over five times and the sink is replaced, by the pipeline or
    while the first blocks are made on all stages at once."""
    before = programs()
    show = Show(spec, cfg)
    session, first = show.open(0), []
    for block in range(warm):
        session, x = show.warm(session, 0, block)
        first.append(x)
    show.insert(session)
    for block in range(warm, BLOCKS):
        show.tick(chunk(0, block))
    for _ in range(show.pipe.delay):
        show.tick(None)
    assert show.blocks() == list(range(warm, BLOCKS))
    same(first + show.latents(), alone(0, cfg=cfg))
    assert programs() - before == Counter(start=1, insert=1, tick=1) + Counter(warm=min(warm, 1))


def test_sessions_start_rest_stop_and_are_interrupted_without_touching_the_others():
    before = programs()
    show = Show("stage=4,vae=1", rows=2)
    show.insert(show.open(0), 0)
    for block in range(5):
        show.tick(chunk(0, block), None)
    session, first = show.warm(show.open(1), 1, 0)  # beside the first, which waits meanwhile
    show.insert(session, 1)
    for block in range(5, 9):
        show.tick(chunk(0, block), chunk(1, block - 4))
    # The first is interrupted: what it says from here on carries another label.
    for block in range(9, 12):
        show.tick(chunk(0, block, epoch=[7]), chunk(1, block - 4))
    for block in range(8, 10):
        show.tick(None, chunk(1, block))  # it rests
    for i in range(4):
        show.tick(chunk(0, 12 + i, epoch=[8]), chunk(1, 10 + i))
    # It stops, with three blocks on their way, and a third session takes its row.
    came = len(show.out[0])
    show.insert(show.open(2), 0)
    for i in range(8):
        show.tick(chunk(2, i, epoch=[9]), chunk(1, 14 + i) if i != 3 else None)
    for _ in range(show.pipe.delay):
        show.tick()

    old, new = show.out[0][:came], show.out[0][came:]
    assert [block for block, _, _ in old] == list(range(13))
    assert [epoch for _, epoch, _ in old] == [0] * 9 + [7] * 3 + [8]
    same([x for _, _, x in old], alone(0)[:13])
    assert [(block, epoch) for block, epoch, _ in new] == [(i, 9) for i in range(8)]
    same([x for _, _, x in new], alone(2, 8))
    said = [*range(1, 14), *(14 + i for i in range(8) if i != 3)]
    assert show.blocks(1) == list(range(1, len(said) + 1))
    same([first, *show.latents(1)][:17], alone(1)[:17])
    assert programs() - before == Counter(start=1, insert=1, tick=1, warm=1)


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_second_bubble_and_a_decoder_parted_by_columns_or_streams(rows):
    """With the sink replaced after one block, as in the paper, the next block has to wait until
    the first is out. The frames are those of a decoder on one device."""
    pipe = Pipeline(SHORT, MeshSpec.parse("stage=2,vae=2"), HEIGHT, WIDTH, rows=rows)
    assert (pipe.wait, pipe.delay) == (1, 1)
    model, out = pipe.place(avatar(SHORT)), []
    session = pipe.start(model, portrait(0), context(0), jax.random.key(0))
    state = pipe.insert(pipe.empty(), session, rows - 1)
    for i in (0, None, *range(1, 6), None):
        given = chunk(0, i or 0)
        live = (np.arange(rows) == rows - 1) & (i is not None)  # only the last row speaks
        given = dataclasses.replace(given, audio=np.repeat(given.audio, rows, axis=0), live=live)
        state, clip = pipe.step(model, state, given)
        if np.asarray(clip.live)[0, -1]:
            out.append(np.asarray(clip.frames)[-1])
    decode, cache, want = jax.jit(stream.decode), portrait(0).decoder, []
    for x in alone(0, 6, SHORT):
        cache, frames = decode(avatar().vae, cache, x[None], jnp.ones(1, bool))
        want.append(np.asarray(stream.pixels(frames))[0])
    shard = clip.frames.addressable_shards[0].data.shape
    assert shard == ((1, 12, 48, 40, 3) if rows == 1 else (1, 12, 48, 80, 3))
    off = np.abs(np.stack(out).astype(int) - np.stack(want).astype(int))
    assert off.max() <= 1 and (off > 0).mean() < 1e-3  # bytes, rounded


def test_sinks_of_two_streams_are_renewed_in_the_same_tick():
    show = Show("stage=4", rows=2)
    for row in (0, 1):
        show.insert(show.open(row), row)
    for block in range(7):
        show.tick(chunk(0, block), chunk(1, block))
    for _ in range(show.pipe.delay):
        show.tick()
    for row in (0, 1):
        same(show.latents(row), alone(row)[:7])


def test_a_stage_idles_before_its_first_block():
    """Bubbles leave every ring and sink as they are, bit by bit."""
    show = Show("stage=4,vae=1")
    show.insert(show.open(0))
    show.tick(chunk(0, 0))
    show.tick(chunk(0, 1))
    ring = jax.tree.map(np.asarray, show.state.stages.cache.ring.k)
    assert [bool(np.abs(ring[i]).any()) for i in range(4)] == [True, True, False, False]
    before = jax.tree.map(np.asarray, show.state.stages.cache)
    for _ in range(show.pipe.delay):
        show.tick(None)
    drained = jax.tree.map(np.asarray, show.state.stages.cache)
    for _ in range(3):
        show.tick(None)
    after = jax.tree.map(np.asarray, show.state.stages.cache)
    np.testing.assert_array_equal(before.ring.k[0], drained.ring.k[0])
    jax.tree.map(np.testing.assert_array_equal, drained, after)
    assert show.blocks() == [0, 1]


@pytest.fixture(scope="module")
def as_shipped(compile_quickly) -> Iterator[None]:
    """What a program sends depends on how it is optimised."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def compiled(spec: str):
    show = Show(spec)
    pipe, model, state = show.pipe, show.model, show.state
    with jax.set_mesh(pipe.meshes.stages):
        given = (model.stages, state.stages, state.flight, pipe._feed(pipe.filled(None, 1)))
        return pipe, state, pipe._tick.lower(*given).compile()


def nbytes(tree) -> int:
    """Of one stage."""
    leaves = [a.addressable_shards[0].data for a in jax.tree.leaves(tree)]
    return sum(
        a.size * (8 if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else a.dtype.itemsize)
        for a in leaves
    )


@pytest.mark.parametrize(
    "spec",
    ["stage=4", pytest.param("stage=4,tensor=2", marks=pytest.mark.slow), "stage=4,sequence=2"],
)
def test_between_stages_only_the_block_in_flight_travels(spec, as_shipped):
    pipe, state, program = compiled(spec)
    found = collectives(program.as_text(), dict(pipe.meshes.stages.shape))
    across = [each for each in found if "stage" in each.axes]
    assert {each.kind for each in across} == {"collective-permute"}
    assert not any(each.in_loop or each.in_branch for each in across)
    sent, flight = sum(each.bytes for each in across), nbytes(state.flight)
    assert sent == flight if pipe.spec.inside == 1 else flight / 2 < sent <= flight
    # A permute in a loop that one stage runs longer than another would wait for ever.
    assert not any(each.kind == "collective-permute" and each.in_loop for each in found)
    # Nor does a ring travel inside a stage.
    slots = str(state.stages.cache.ring.tokens)
    assert not any(slots in re.findall(r"\d+", each.shape) for each in found)
    assert bool([each for each in found if "stage" not in each.axes]) == (pipe.spec.inside > 1)


def test_the_state_is_never_held_twice(as_shipped):
    _, state, program = compiled("stage=4")
    memory, held = program.memory_analysis(), nbytes((state.stages, state.flight))
    assert memory.alias_size_in_bytes == held
    assert memory.output_size_in_bytes <= held + nbytes(state.flight) + 1024  # what leaves
    # A block's keys and values, one layer's keys in view, activations: far from another ring.
    assert memory.temp_size_in_bytes < 2.5 * nbytes(state.stages.cache.ring)


def test_a_sink_that_is_not_due_costs_nothing(as_shipped):
    """The prefill stays in its branch. (In a loop over the rows that are due XLA once moved a
    single row's out of it: the entry ran the loop over layers, too.)"""
    show = Show("stage=4")
    state, flight = show.open(0), jax.tree.map(lambda a: a[0], show.state.flight)
    program = jax.jit(stream.refreshed).lower(avatar(), state, flight).compile()
    _, _, entry = program.as_text().partition("\nENTRY ")
    assert "conditional(" in entry and " while(" not in entry and " dot(" not in entry


def test_weights_of_the_published_size_have_a_place():
    """No leaf above 1 MiB is placed by default."""
    from liveavatar_jax.models.dit import CausalDiT
    from liveavatar_jax.models.quantise import quantise
    from liveavatar_jax.parallel.sharding import WEIGHTS, spec_of
    from liveavatar_jax.paths import leaves

    dit = jax.eval_shape(lambda: CausalDiT(DiTConfig(), rngs=nnx.Rngs(0)))
    for model in (dit, jax.eval_shape(lambda dit: quantise(dit, "int8"), dit)):
        total, whole = 0, 0
        for path, leaf in leaves(model).items():
            size = leaf.size * leaf.dtype.itemsize
            spec = spec_of(f"dit.{path}", len(leaf.shape), WEIGHTS)
            assert spec is not None or size <= 2**20, path
            total += size
            whole += size * ("tensor" not in str(spec))
        assert whole < 0.05 * total


@pytest.mark.parametrize(
    "spec, words",
    [
        ("stage=3", "does not match the 4 denoising steps"),
        ("stage=5", "does not match the 4 denoising steps"),
        ("stage=4,tensor=3", "does not divide the 8 attention heads"),
        ("stage=4,tensor=2,vae=1", "needs 9 devices"),
        ("stage=4,vae=3", "does not divide the 10 latent columns .* nor the streams"),
        ("stage=4,stages=2", "'stages=2' is not understood"),
        ("stage=4,stage=4", "is not understood"),
        ("stage=0", "stage must be at least 1"),
        ("tensor=2", "has no stage axis"),
        ("stage=four", "is not understood"),
    ],
)
def test_meshes_that_do_not_fit_are_refused_by_name(spec, words):
    with pytest.raises(LiveAvatarError, match=words):
        Pipeline(NET, MeshSpec.parse(spec), HEIGHT, WIDTH)


def test_40_heads_say_which_sizes_they_allow():
    big = ModelConfig()
    MeshSpec.parse("stage=4,tensor=8").check(big, 90)
    with pytest.raises(LiveAvatarError, match="one of 1, 2, 4, 5, 8, 10, 20, 40"):
        MeshSpec.parse("stage=4,tensor=4,sequence=4").check(big, 90)


def test_what_cannot_be_pipelined_is_refused():
    clean = dataclasses.replace(NET, stream=dataclasses.replace(NET.stream, history=0.0))
    with pytest.raises(LiveAvatarError, match="cannot be pipelined"):
        Pipeline(clean, MeshSpec.parse("stage=4"), HEIGHT, WIDTH)
    show = Show("stage=4")
    with pytest.raises(LiveAvatarError, match="row 1 is not one"):
        show.insert(show.open(0), 1)
    state = show.open(0)
    two = jax.tree.map(lambda a: jnp.concatenate([a, a]), portrait(0))
    with pytest.raises(LiveAvatarError, match="reference has shape"):
        show.pipe.start(show.model, two, context(0), jax.random.key(0))
    wide = Pipeline(NET, MeshSpec.parse("stage=4"), HEIGHT, 2 * WIDTH)
    with pytest.raises(LiveAvatarError, match=r"the session's .* has shape"):
        wide.insert(wide.empty(), state, 0)
    with pytest.raises(LiveAvatarError, match="takes one of 160 x 48 pixels"):
        wide.portrait(show.model, np.zeros((1, 48, 80, 3), np.float32))
    for field, given in (("live", [True]), ("epoch", [1, 2, 3]), ("pose", np.zeros((2, 3)))):
        bad = dataclasses.replace(chunk(0, 0), **{field: np.asarray(given)})
        with pytest.raises(LiveAvatarError, match=f"chunk.{field} has shape|chunk.audio"):
            Pipeline(NET, MeshSpec.parse("stage=4"), HEIGHT, WIDTH, rows=2).filled(bad, 2)
    with pytest.raises(LiveAvatarError, match="at least 1"):
        Pipeline(NET, MeshSpec(stage=4, tensor=0), HEIGHT, WIDTH)
    pair = Pipeline(NET, MeshSpec.parse("stage=4"), HEIGHT, WIDTH, speakers=2)
    with pytest.raises(LiveAvatarError, match="speakers is nothing"):
        pair.start(show.model, portrait(0), context(0), jax.random.key(0))
    three = Show("stage=3", THREE)
    with pytest.raises(LiveAvatarError, match="8 heads do not divide over 3 devices"):
        three.pipe.warm(three.model, three.open(0), chunk(0, 0))


@pytest.mark.filterwarnings("ignore:Some donated buffers")  # mere shapes lie nowhere
@pytest.mark.parametrize("spec", ["stage=4", "stage=4,tensor=2", "stage=4,sequence=2", "stage=3"])
def test_a_tpu_program_keeps_its_kernels(spec):
    """Where an axis is left to the compiler, even one of size 1, a kernel needs to be in a
    `shard_map` over it: else lowering fails, on TPUs alone."""
    mesh = MeshSpec.parse(spec)
    dit = dataclasses.replace(DIT, dim=1024, heads=8, attention="pallas", param_dtype="bfloat16")
    steps = dataclasses.replace(NET.stream, steps=mesh.stage, dtype="bfloat16")
    cfg = ModelConfig.tiny(dit=dit, stream=steps)
    pipe = Pipeline(cfg, mesh, HEIGHT, WIDTH)
    model, _ = stages.split(jax.eval_shape(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0))))
    shapes = pipe.shapes
    said = jax.eval_shape(lambda: stages.lead(stages.zeros(shapes.chunk), mesh.stage))
    blank = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, pipe.blank()))
    masks = jnp.ones((1, 1, HEIGHT * WIDTH // 4))
    opening = (blank, jnp.zeros((1, 1, DIT.text_dim)), jax.random.key(0), masks)
    programs = [
        (pipe._tick, (shapes.stages, shapes.flight, said)),
        (pipe._start, opening),
    ]
    if pipe.can_warm:
        programs.append((pipe._warm, (shapes.session, shapes.chunk)))
    with (
        jax.set_mesh(pipe.meshes.stages),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        for program, given in programs:
            lowered = program.trace(model, *given).lower(lowering_platforms=("tpu",))
            assert "tpu_custom_call" in lowered.as_text()
