"""Timestep-forcing pipeline parallelism (arXiv 2512.04677, section 4.4): the stream over a mesh.

Stage i owns denoising step i for ever, with the ring and the sink of that step. A tick runs every
stage once, each on another block, and hands the blocks on by `ppermute`; a block that enters at
tick k leaves at tick k + stages - 1. Beside it the decoder runs as a program of its own.

    pipeline = Pipeline(cfg, MeshSpec.parse("stage=4,vae=1"), height, width, rows=2)
    model = pipeline.place(avatar)
    state = pipeline.empty()
    session = pipeline.start(model, portrait, context, key)  # a stream, at any time
    session, clip = pipeline.warm(model, session, chunk)     # its first blocks, if wanted
    state = pipeline.insert(state, session, row)             # it goes on beside the others
    state, clip = pipeline.step(model, state, chunk)         # for ever
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.models.attention import ONE_DEVICE, KVCache, Layout
from liveavatar_jax.models.condition import MOTION_FRAMES
from liveavatar_jax.models.vae import FeatureCache
from liveavatar_jax.parallel import mesh
from liveavatar_jax.parallel.mesh import SEQUENCE, STAGE, TENSOR, VAE, MeshSpec
from liveavatar_jax.parallel.sharding import (
    COLUMNS,
    HEADS,
    OPENING,
    STATE,
    STEPWISE,
    WEIGHTS,
    Parted,
    shardings,
)
from liveavatar_jax.stream import Avatar, Chunk, InFlight, Portrait, StreamState
from liveavatar_jax.types import Array, Float, Key, LiveAvatarError, UInt8, struct


@struct
class Placed:
    """The networks on their devices."""

    stages: Avatar  # the DiT, on every stage
    decoder: Avatar  # the VAE


@struct
class PipelineState:
    """The streams on the mesh between two ticks.

    Every leaf of `stages` and `flight` leads with the stage axis, so one spec, `P("stage")`,
    places them. What belongs to the entrance (key, block, position, past, first) counts on the
    first stage only.
    """

    stages: StreamState  # without the decoder
    flight: InFlight  # what each stage works on next; on the first one, what has come out
    decoder: FeatureCache | None  # None in a process that does not decode


@struct
class Clip:
    """What came out: pixels of a block, on the devices that decoded them."""

    frames: UInt8[Array, "b F H W 3"]
    block: Array  # "1 b", which block of its stream each row is
    epoch: Array  # "1 b", the label of its chunk
    live: Array  # "1 b", or a bubble


def tick(
    model: Avatar, stages: StreamState, flight: InFlight, chunk: Chunk, layout: Layout
) -> tuple[StreamState, InFlight, InFlight]:
    """What one stage does in a tick, for `shard_map`: its state, what arrives for the next tick,
    and what leaves it. Leaves lead with a stage axis of size 1; the first stage hears the chunk.
    """
    i, n = jax.lax.axis_index(STAGE), jax.lax.axis_size(STAGE)
    ring = stages.cache.ring  # as it is: a view of it would be a copy
    own, arrived, chunk = jax.tree.map(lambda a: a[0], (stages, flight, chunk))
    own = dataclasses.replace(own, first=stream.own_first(own.first, arrived))
    own, entering = stream.enter(model, own, stream.draw(model, own), chunk)
    flight = jax.tree.map(lambda a, b: jnp.where(i == 0, a, b), entering, arrived)

    cache = KVCache(ring=ring, sink=stream.refreshed(model, own, flight, layout))
    flight, fresh = stream.advance(model, cache, own, flight, own.levels, i, 0, layout)
    cache = cache.append(fresh, 0, flight.block, flight.live)

    own = dataclasses.replace(own, cache=dataclasses.replace(cache, ring=None))
    own, flight = jax.tree.map(lambda a: a[None], (own, flight))
    own = dataclasses.replace(own, cache=dataclasses.replace(own.cache, ring=cache.ring))
    onward = [(a, (a + 1) % n) for a in range(n)]
    return own, jax.tree.map(lambda a: jax.lax.ppermute(a, STAGE, onward), flight), flight


def spread(state: StreamState, stages: int) -> StreamState:
    """A stream with the stages leading: each has its ring and its level, and all of the rest."""
    ring, levels = state.cache.ring, state.levels
    rest = dataclasses.replace(state.cache, ring=None)
    every = _lead(dataclasses.replace(state, cache=rest, levels=None), stages)
    cache = KVCache(ring=ring, sink=every.cache.sink)
    return dataclasses.replace(every, cache=cache, levels=levels)


# Where the batch stands in the leaves of a `StreamState` with the stages leading.
ROWS = StreamState(
    cache=2, levels=1, text=2, motion=1, first=1, past=1, speakers=1, decoder=1, position=1,
    block=1, key=1,
)  # fmt: skip


def insert(
    stages: StreamState, flight: InFlight, session: StreamState, row: Array
) -> tuple[StreamState, InFlight]:
    """`session`, of one row, takes a row of the pipeline; blocks in flight there become bubbles."""
    session = spread(session, len(stages.block))

    def put(axis: int, old: Any, new: Any) -> Any:
        place = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, axis)
        return jax.tree.map(place, old, new)

    others = jnp.arange(flight.live.shape[1]) != row
    flight = dataclasses.replace(flight, live=flight.live & others[None])
    return jax.tree.map(put, ROWS, stages, session), flight


def split(avatar: Avatar) -> Placed:
    """The denoiser by itself and the decoder by itself."""
    stages, decoder = (jax.tree.map(lambda leaf: leaf, avatar) for _ in range(2))
    stages.vae, decoder.dit = None, None
    return Placed(stages=stages, decoder=decoder)


def decoded(
    model: Avatar, cache: FeatureCache, flight: InFlight
) -> tuple[FeatureCache, UInt8[Array, "b F H W 3"]]:
    """The frames of what left the last stage, whose axis still leads."""
    cache, frames = stream.decode(model.vae, cache, flight.x[0], flight.live[0])
    return cache, stream.pixels(frames)


class Pipeline:
    """The compiled programs of some streams of one size on a mesh; it holds no state itself.

    `height` and `width` are those of the latents, `rows` the number of streams that it carries at
    once, each with `speakers`, and with the latents of a pose video if `poses`.

    Raises LiveAvatarError for a mesh that does not fit the model or the devices.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        spec: MeshSpec,
        height: int,
        width: int,
        *,
        rows: int = 1,
        speakers: int = 1,
        poses: bool = False,
        devices: Sequence[jax.Device] | None = None,
    ):
        spec.check(cfg, height, width)
        self.cfg, self.spec, self.rows = cfg, spec, rows
        self.meshes = mesh.make(spec, width, devices)
        self.layout: Layout = ONE_DEVICE
        if spec.inside > 1:
            self.layout = Parted(heads=HEADS, tokens=(SEQUENCE,), parts=spec.sequence)
        self.opening = self.layout
        if self.can_warm:
            heads, parts = (TENSOR, STAGE, SEQUENCE), spec.stage * spec.sequence
            self.opening = Parted(heads=heads, tokens=(STAGE, SEQUENCE), parts=parts)
        self.shapes = Shapes.of(cfg, height, width, rows, speakers, poses)
        self._compile()

    @property
    def can_warm(self) -> bool:
        """Whether heads can be parted over all stages, which `warm` needs."""
        return self.cfg.dit.heads % self.spec.stage_devices == 0

    @property
    def decodes(self) -> bool:
        """Whether this process decodes."""
        return self.meshes.vae.local_devices != []

    @property
    def wait(self) -> int:
        """Ticks for which a stream rests before the block that its sink is refreshed for, so that
        its first block is out by then: the second bubble of the paper. None after `warm`."""
        after = self.cfg.stream.sink_after
        return 0 if after is None else max(0, self.spec.stage - after)

    @property
    def delay(self) -> int:
        """Ticks between a chunk and its clip."""
        return self.spec.stage - 1

    # ---- what runs

    def place(self, avatar: Avatar) -> Placed:
        """The networks on the mesh: the DiT on every stage, the VAE with the decoder."""
        model = split(avatar)
        stages = shardings(model.stages, WEIGHTS, self.meshes.stages)
        decoder = NamedSharding(self.meshes.vae, P())
        return Placed(
            stages=jax.device_put(model.stages, stages),
            decoder=jax.device_put(model.decoder, decoder) if self.decodes else model.decoder,
        )

    def portrait(self, model: Placed, picture: Float[Any, "b H W 3"]) -> Portrait:
        """`stream.encode_portrait` on the decoder's devices."""
        columns = NamedSharding(self.meshes.vae, P(None, None, VAE))
        return self._portrait(model.decoder, jax.device_put(picture, columns))

    def start(
        self,
        model: Placed,
        portrait: Portrait,
        context: Float[Any, "b t k"],
        key: Key[Array, ""],
        speakers: Float[Any, "b a p"] | None = None,
    ) -> StreamState:
        """A stream before its first block, as `stream.start`; its decoder is the portrait's.

        In several processes all give equal arguments, but only the one that decodes needs the
        portrait's decoder.
        """
        bare = dataclasses.replace(portrait, decoder=None)
        given = self._everywhere((bare, context, key, speakers))
        session = self._start(model.stages, *given)
        decoder = self._copy(portrait.decoder) if self.decodes else None
        return dataclasses.replace(session, decoder=decoder)

    def warm(
        self, model: Placed, session: StreamState, chunk: Chunk
    ) -> tuple[StreamState, Clip | None]:
        """The next block of a stream, at once: every step of it on all stages.

        Tokens are parted over the stages, and in attention heads, so each device keeps its heads
        of every step's ring, until `insert` hands each ring to the stage that owns the step. All
        processes give equal chunks. Donates `session`. Raises LiveAvatarError when the heads
        cannot be parted.
        """
        if not self.can_warm:
            raise LiveAvatarError(
                f"{self.cfg.dit.heads} heads do not divide over {self.spec.stage_devices} devices, "
                "so no block can be made on all of them at once; insert the stream as it is"
            )
        decoder, bare = session.decoder, dataclasses.replace(session, decoder=None)
        bare, flight = self._warm(model.stages, bare, self._everywhere(self._filled(chunk, 1)))
        decoder, clip = self._decoded(model, decoder, flight)
        return dataclasses.replace(bare, decoder=decoder), clip

    def empty(self) -> PipelineState:
        """All rows at rest."""
        stages, flight = self._empty()
        decoder = self._empty_decoder() if self.decodes else None
        return PipelineState(stages=stages, flight=flight, decoder=decoder)

    def insert(self, state: PipelineState, session: StreamState, row: int) -> PipelineState:
        """The stream takes a row, whose blocks in flight are dropped. Donates `state`.

        Raises LiveAvatarError when there is no such row.
        """
        if not 0 <= row < self.rows:
            raise LiveAvatarError(f"row {row} is not one of the pipeline's 0..{self.rows - 1}")
        decoder, bare = state.decoder, dataclasses.replace(session, decoder=None)
        at = jnp.int32(row)
        stages, flight = self._insert(state.stages, state.flight, bare, at)
        if self.decodes:
            decoder = self._insert_decoder(decoder, session.decoder, at)
        return PipelineState(stages=stages, flight=flight, decoder=decoder)

    def step(
        self, model: Placed, state: PipelineState, chunk: Chunk | None
    ) -> tuple[PipelineState, Clip | None]:
        """One tick of every stage, and the block that left the last one, decoded.

        The chunk (None: all rows rest) enters the first stage and is looked at in its process
        only; the clip comes out in the last process, None elsewhere. Donates `state`.
        """
        feed = self._feed(self._filled(chunk, self.rows))
        stages, flight, leaving = self._tick(model.stages, state.stages, state.flight, feed)
        decoder, clip = self._decoded(model, state.decoder, leaving)
        return PipelineState(stages=stages, flight=flight, decoder=decoder), clip

    # ---- how

    def _compile(self) -> None:
        """One program for each of the calls above; each is compiled at its first use."""
        stages, vae = self.meshes.stages, self.meshes.vae
        every, alone = NamedSharding(stages, P(STAGE)), NamedSharding(stages, P())
        whole = self.shapes.stages
        state = shardings(whole, STATE, stages, lead=(STAGE,))
        flight = jax.tree.map(lambda _: every, self.shapes.flight)
        opening = OPENING if self.can_warm else STEPWISE
        session = shardings(self.shapes.session, opening, stages)
        features = shardings(self.shapes.decoder, COLUMNS, vae)
        columns = NamedSharding(vae, P(None, None, None, VAE))

        def on_stages(function: Callable, **options: Any) -> Callable:
            run = jax.jit(function, **options)

            @functools.wraps(run)
            def call(*given: Any) -> Any:
                with jax.set_mesh(stages):
                    return run(*given)

            call.program = run  # type: ignore[attr-defined]
            return call

        body = functools.partial(tick, layout=self.layout)
        part = jax.shard_map(
            body,
            mesh=stages,
            in_specs=(P(), P(STAGE), P(STAGE), P(STAGE)),
            out_specs=P(STAGE),
            axis_names={STAGE},  # what lies inside a stage stays with the compiler
            check_vma=False,  # which kernels do not pass
        )
        self._tick = on_stages(part, donate_argnums=(1, 2), out_shardings=(state, flight, flight))
        self._start = on_stages(
            functools.partial(_start, layout=self.opening), out_shardings=session
        )
        self._warm = on_stages(
            functools.partial(_warm, layout=self.opening),
            donate_argnums=1,
            out_shardings=(session, jax.tree.map(lambda _: alone, self.shapes.flight)),
        )
        self._insert = on_stages(insert, donate_argnums=(0, 1), out_shardings=(state, flight))
        self._empty = on_stages(
            lambda: _zeros((whole, self.shapes.flight)), out_shardings=(state, flight)
        )
        self._portrait = jax.jit(stream.encode_portrait)
        self._copy = jax.jit(lambda cache: jax.tree.map(jnp.copy, cache))
        self._empty_decoder = jax.jit(lambda: _zeros(self.shapes.decoder), out_shardings=features)
        self._insert_decoder = jax.jit(_insert_rows, donate_argnums=0, out_shardings=features)
        self._decode = jax.jit(decoded, donate_argnums=1, out_shardings=(features, columns))

    def _everywhere(self, tree: Any) -> Any:
        return jax.device_put(tree, NamedSharding(self.meshes.stages, P()))

    def _feed(self, chunk: Chunk) -> Chunk:
        """The chunk on the first stage, zeros on the others, which do not listen."""
        sharding = NamedSharding(self.meshes.stages, P(STAGE))

        def lead(x: np.ndarray) -> Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                first = index[0].indices(self.spec.stage)[0] == 0
                return (x if first else np.zeros_like(x))[None]

            return jax.make_array_from_callback((self.spec.stage, *x.shape), sharding, part)

        return jax.tree.map(lead, chunk)

    def _filled(self, chunk: Chunk | None, rows: int) -> Chunk:
        """The chunk with every field that the programs take, on the host."""
        shapes = self.shapes.chunk
        zeros = {
            field.name: getattr(shapes, field.name)
            and np.zeros(
                (rows, *getattr(shapes, field.name).shape[1:]), getattr(shapes, field.name).dtype
            )
            for field in dataclasses.fields(Chunk)
        }
        if chunk is None:
            return Chunk(**zeros)
        given = {k: v for k, v in vars(chunk).items() if v is not None}
        zeros["live"] = np.ones(rows, bool)
        return Chunk(**{k: np.asarray(v) for k, v in (zeros | given).items() if v is not None})

    def _decoded(
        self, model: Placed, cache: FeatureCache | None, leaving: InFlight
    ) -> tuple[FeatureCache | None, Clip | None]:
        """Hands the block to the decoder; `device_put` does not wait, so the stages go on."""
        if not self.decodes:
            return None, None

        def last(a: Array) -> Array:
            parts = {s.index[0].indices(len(a))[0]: s.data for s in a.addressable_shards}
            return parts[max(parts)]

        bare = InFlight(
            **{f.name: None for f in dataclasses.fields(InFlight)}
            | {name: last(getattr(leaving, name)) for name in ("x", "block", "epoch", "live")}
        )
        vae = self.meshes.vae
        whole = jax.device_put(bare, NamedSharding(vae, P()))
        cache, frames = self._decode(model.decoder, cache, whole)
        return cache, Clip(frames, whole.block, whole.epoch, whole.live)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the programs carry, as shapes."""

    session: StreamState
    stages: StreamState
    flight: InFlight
    chunk: Chunk
    decoder: FeatureCache

    @classmethod
    def of(
        cls, cfg: ModelConfig, height: int, width: int, rows: int, speakers: int, poses: bool
    ) -> "Shapes":
        dit, size = cfg.dit, (height, width, cfg.dit.latent_channels)

        def chunk(b: int) -> Chunk:
            heard = (b, speakers, 4 * cfg.stream.block_frames, dit.audio_layers, dit.audio_dim)
            pose = jnp.zeros((b, cfg.stream.block_frames, *size)) if poses else None
            live, epoch = jnp.zeros(b, bool), jnp.zeros(b, jnp.int32)
            return Chunk(audio=jnp.zeros(heard), pose=pose, live=live, epoch=epoch)

        def begun(b: int) -> tuple[StreamState, InFlight, FeatureCache]:
            avatar = Avatar(cfg, rngs=nnx.Rngs(0))
            reference = jnp.zeros((b, 1, *size))
            motion = jnp.zeros((b, MOTION_FRAMES, *size))
            portrait = stream.from_latents(avatar, reference, motion)
            masks = jnp.ones((b, speakers, height * width // 4))
            context, key = jnp.zeros((b, 1, dit.text_dim)), jax.random.key(0)
            state = stream.start(avatar, portrait, context, key, speakers=masks)
            state = dataclasses.replace(state, decoder=None)
            _, flight = stream.enter(avatar, state, stream.draw(avatar, state), chunk(b))
            return state, flight, portrait.decoder

        session, _, _ = jax.eval_shape(lambda: begun(1))
        state, flight, decoder = jax.eval_shape(lambda: begun(rows))
        stages = cfg.stream.steps
        flight = jax.eval_shape(lambda: _lead(_zeros(flight), stages))
        state = jax.eval_shape(lambda: spread(_zeros(state), stages))
        return cls(session, state, flight, jax.eval_shape(lambda: chunk(rows)), decoder)


def _zeros(shapes: Any) -> Any:
    def zero(leaf: jax.ShapeDtypeStruct) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(zero, shapes)


def _lead(tree: Any, stages: int) -> Any:
    return jax.tree.map(lambda a: jnp.broadcast_to(a[None], (stages, *a.shape)), tree)


def _start(
    model: Avatar,
    portrait: Portrait,
    context: Array,
    key: Array,
    speakers: Array | None,
    layout: Layout,
) -> StreamState:
    return stream.start(model, portrait, context, key, speakers=speakers, layout=layout)


def _warm(
    model: Avatar, session: StreamState, chunk: Chunk, layout: Layout
) -> tuple[StreamState, InFlight]:
    drawn = stream.draw(model, session)
    session, flight = stream.denoise(model, session, drawn, chunk, layout)
    return session, _lead(flight, 1)


def _insert_rows(old: FeatureCache, new: FeatureCache, row: Array) -> FeatureCache:
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, 0)
    return jax.tree.map(put, old, new)
