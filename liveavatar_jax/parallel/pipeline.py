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
from jax import P
from jax.sharding import NamedSharding

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.models.attention import KV, ONE_DEVICE, Layout
from liveavatar_jax.models.condition import MOTION_FRAMES
from liveavatar_jax.models.vae import FeatureCache
from liveavatar_jax.parallel import mesh, stages
from liveavatar_jax.parallel.mesh import AXES, SEQUENCE, STAGE, TENSOR, VAE, MeshSpec
from liveavatar_jax.parallel.sharding import (
    HEADS,
    OPENING,
    STATE,
    STEPWISE,
    WEIGHTS,
    Parted,
    of_decoder,
    shardings,
    spec_of,
)
from liveavatar_jax.paths import leaves
from liveavatar_jax.stream import Avatar, Chunk, InFlight, Portrait, StreamState
from liveavatar_jax.types import Array, Bool, Float, Int, Key, LiveAvatarError, UInt8, struct


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
    block: Int[Array, "1 b"]  # which block of its stream each row is
    epoch: Int[Array, "1 b"]  # the label of its chunk
    live: Bool[Array, "1 b"]  # or a bubble


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
        spec.check(cfg, width, rows)
        self.cfg, self.spec, self.rows = cfg, spec, rows
        self.meshes = mesh.make(spec, width, devices)
        self.layout: Layout = ONE_DEVICE
        if spec.inside > 1:
            self.layout = Parted(heads=HEADS, tokens=(SEQUENCE,), parts=spec.sequence)
        self.opening = self.layout
        if self.can_warm:
            heads, parts = (TENSOR, STAGE, SEQUENCE), spec.stage * spec.sequence
            self.opening = Parted(heads=heads, tokens=(STAGE, SEQUENCE), parts=parts)
        self.shapes = stages.Shapes.of(cfg, height, width, rows, speakers, poses)
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
        """The networks on the mesh: the DiT on every stage, the VAE with the decoder. What a
        process has of them already is not copied."""
        dit, vae = stages.split(avatar)
        dit = put(dit, shardings(dit, WEIGHTS, self.meshes.stages))
        if self.decodes:
            vae = jax.device_put(vae, NamedSharding(self.meshes.vae, P()))
        return Placed(stages=dit, decoder=vae)

    def portrait(self, model: Placed, picture: Float[Any, "b H W 3"]) -> Portrait:
        """`stream.encode_portrait` on the decoder's devices."""
        vae, (_, _, height, width, _) = self.meshes.vae, self.shapes.session.first.shape
        if picture.shape != (1, 8 * height, 8 * width, 3):
            raise LiveAvatarError(
                f"picture has shape {picture.shape}; this pipeline takes one of {8 * width} x "
                f"{8 * height} pixels, (1, {8 * height}, {8 * width}, 3)"
            )
        columns = P(None, None, VAE) if width % vae.size == 0 else P()
        given = jax.device_put(picture, NamedSharding(vae, columns))
        return self._portrait(model.decoder, given)

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
        portrait's decoder. `speakers` masks patches, everything for one speaker by default.

        Raises LiveAvatarError when the portrait or the masks are not of this pipeline's size.
        """
        _, many, _, patches = self.shapes.session.speakers.shape
        if speakers is None and many == 1:
            speakers = np.ones((1, 1, patches), np.float32)
        if speakers is None or speakers.shape != (1, many, patches):
            given = "nothing" if speakers is None else speakers.shape
            raise LiveAvatarError(
                f"speakers is {given}; this pipeline takes a mask of (1, {many}, {patches})"
            )
        if portrait.reference.shape != self.shapes.session.first.shape:
            raise LiveAvatarError(
                f"the portrait's reference has shape {portrait.reference.shape}; this pipeline "
                f"takes {self.shapes.session.first.shape}, as its `portrait` makes it"
            )
        bare = dataclasses.replace(portrait, decoder=None)
        given = self._everywhere((bare, self._padded(context), key, speakers))
        with jax.set_mesh(self.meshes.stages):
            session = self._start(model.stages, *given)
        decoder = self._copy(portrait.decoder) if self.decodes else None
        return dataclasses.replace(session, decoder=decoder)

    def warm(
        self, model: Placed, session: StreamState, chunk: Chunk
    ) -> tuple[StreamState, Clip | None]:
        """The next block of a stream, at once: every step of it on all stages.

        Tokens are parted over the stages, and in attention heads, so each device keeps its heads
        of every step's ring, until `insert` hands each ring to the stage that owns the step. All
        processes give equal chunks. The streams in the pipeline wait meanwhile. Donates `session`.
        Raises LiveAvatarError when the heads cannot be parted.
        """
        if not self.can_warm:
            raise LiveAvatarError(
                f"{self.cfg.dit.heads} heads do not divide over {self.spec.stage_devices} devices, "
                "so no block can be made on all of them at once; insert the stream as it is"
            )
        decoder, bare = session.decoder, dataclasses.replace(session, decoder=None)
        chunk = self._everywhere(self.filled(chunk, 1))
        with jax.set_mesh(self.meshes.stages):
            bare, leaving = self._warm(model.stages, bare, chunk)
        decoder, clip = self._decoded(model, decoder, leaving)
        return dataclasses.replace(bare, decoder=decoder), clip

    def empty(self) -> PipelineState:
        """All rows at rest."""
        own, flight = self._empty()
        decoder = self._empty_decoder() if self.decodes else None
        return PipelineState(stages=own, flight=flight, decoder=decoder)

    def insert(self, state: PipelineState, session: StreamState, row: int) -> PipelineState:
        """The stream takes a row, whose blocks in flight are dropped. Donates `state`; let go of
        `session`, whose rings are as large as a row's.

        Raises LiveAvatarError when there is no such row, or the stream is of another size.
        """
        if not 0 <= row < self.rows:
            raise LiveAvatarError(f"row {row} is not one of the pipeline's 0..{self.rows - 1}")
        decoder, bare = state.decoder, dataclasses.replace(session, decoder=None)
        given = leaves(bare)
        for path, wanted in leaves(self.shapes.session).items():
            if given[path].shape != wanted.shape:
                raise LiveAvatarError(
                    f"the session's {path} has shape {given[path].shape}; this pipeline takes "
                    f"{wanted.shape}: start it here, one stream at a time"
                )
        at = np.int32(row)
        own, flight = self._insert(state.stages, state.flight, bare, at)
        if self.decodes:
            decoder = self._insert_decoder(decoder, session.decoder, at)
        return PipelineState(stages=own, flight=flight, decoder=decoder)

    def text(self, model: Placed, context: Float[Any, "1 t k"]) -> KV:
        """Another prompt for `retell`, which belongs to no stream yet."""
        with jax.set_mesh(self.meshes.stages):
            return self._text(model.stages, self._everywhere(self._padded(context)))

    def retell(self, state: PipelineState, text: KV, row: int, stage: int) -> PipelineState:
        """A row has another prompt on one stage. Before the tick at which a block enters: the first
        stage; before the one after it: the second. So each block keeps the prompt that it entered
        with. Donates `state`."""
        told = self._retell(state.stages.text, text, np.int32(row), np.int32(stage))
        return dataclasses.replace(state, stages=dataclasses.replace(state.stages, text=told))

    def step(
        self, model: Placed, state: PipelineState, chunk: Chunk | None
    ) -> tuple[PipelineState, Clip | None]:
        """`tick`, and the frames of what left: None in a process that does not decode.

        Where there are more stages than blocks before the sink is renewed, see `wait`.
        """
        state, leaving = self.tick(model, state, chunk)
        return self.decode(model, state, leaving)

    def tick(
        self, model: Placed, state: PipelineState, chunk: Chunk | None
    ) -> tuple[PipelineState, InFlight]:
        """Every stage once. The chunk (None: all rows rest) enters the first stage, in whose
        process alone it is looked at; the block that leaves the last one is there, the stages
        leading. Donates `state`."""
        feed = self._feed(self.filled(chunk, self.rows))
        with jax.set_mesh(self.meshes.stages):
            own, flight, leaving = self._tick(model.stages, state.stages, state.flight, feed)
        return dataclasses.replace(state, stages=own, flight=flight), leaving

    def decode(
        self, model: Placed, state: PipelineState, leaving: InFlight
    ) -> tuple[PipelineState, Clip | None]:
        """The frames of what left, on the decoder's devices, while the stages go on. Donates the
        decoder's part of `state`."""
        decoder, clip = self._decoded(model, state.decoder, leaving)
        return dataclasses.replace(state, decoder=decoder), clip

    def blank(self) -> Portrait:
        """A portrait of zeros, without a decoder."""
        one = self.shapes.session.first
        motion = np.zeros((1, MOTION_FRAMES, *one.shape[2:]), one.dtype)
        return Portrait(reference=motion[:, :1], motion=motion, decoder=None)  # type: ignore[arg-type]

    def rehearse(self, model: Placed) -> None:
        """Runs every program once, on nothing, so that all are compiled. All processes do so."""
        portrait = self.blank()
        if self.decodes:
            _, _, h, w, _ = portrait.reference.shape
            picture = np.zeros((1, 8 * h, 8 * w, 3), np.float32)
            decoder = self.portrait(model, picture).decoder
            portrait = dataclasses.replace(portrait, decoder=decoder)
        context = np.zeros((1, self.cfg.dit.text_len, self.cfg.dit.text_dim), np.float32)
        _, many, _, patches = self.shapes.session.speakers.shape
        masks = np.ones((1, many, patches), np.float32)
        session = self.start(model, portrait, context, jax.random.key(0), masks)
        if self.can_warm:
            session, _ = self.warm(model, session, self.filled(None, 1))
        state = self.insert(self.empty(), session, 0)
        jax.block_until_ready(self.step(model, state, None))

    # ---- how

    def _compile(self) -> None:
        """One program for each of the calls above; each is compiled at its first use."""
        mesh, vae, shapes = self.meshes.stages, self.meshes.vae, self.shapes
        every, alone = NamedSharding(mesh, P(STAGE)), NamedSharding(mesh, P())
        state = shardings(shapes.stages, STATE, mesh, lead=(STAGE,))
        flight = jax.tree.map(lambda _: every, shapes.flight)
        session = shardings(shapes.session, OPENING if self.can_warm else STEPWISE, mesh)

        def program(function: Callable, out: Any, *donated: int, **options: Any) -> Callable:
            bound = functools.partial(function, **options)
            return jax.jit(bound, donate_argnums=donated, out_shardings=out)

        def by_stage(function: Callable, given: Any, out: Any) -> Callable:
            """What lies inside a stage stays with the compiler; but where nothing is parted inside,
            all axes are ours, for the compiler refuses kernels even on axes of size 1."""
            axes = {STAGE} if self.spec.inside > 1 else set(AXES)
            bound = functools.partial(function, layout=self.layout)
            # Kernels do not pass the check of what varies over the stages.
            return jax.shard_map(bound, mesh=mesh, in_specs=given, out_specs=out, axis_names=axes,
                                 check_vma=False)  # fmt: skip

        tick = by_stage(stages.tick, (P(), P(STAGE), P(STAGE), P(STAGE)), P(STAGE))
        self._tick = program(tick, (state, flight, flight), 1, 2)
        if self.can_warm:
            self._start = program(stages.start, session, layout=self.opening)
        else:
            out = jax.tree.map(lambda _: P(), shapes.session)
            ring = jax.tree.map(lambda _: P(STAGE), shapes.session.cache.ring)
            out = dataclasses.replace(out, cache=dataclasses.replace(out.cache, ring=ring))
            self._start = program(by_stage(stages.start_apart, P(), out), session)
        once = jax.tree.map(lambda _: alone, shapes.flight)
        self._warm = program(stages.warm, (session, once), 1, layout=self.opening)
        self._insert = program(stages.insert, (state, flight), 0, 1)
        self._text = program(stages.text, session.text)
        self._retell = program(stages.retell, state.text, 0)
        empty = lambda: stages.zeros((shapes.stages, shapes.flight))
        self._empty = program(empty, (state, flight))

        width, self._decode, places = shapes.session.first.shape[3], {}, {}
        for rows, features in shapes.decoder.items():
            table = of_decoder(rows, width, vae.size)
            places[rows] = shardings(features, table, vae)
            frames = NamedSharding(vae, spec_of("frames", 5, table) or P())
            self._decode[rows] = program(stages.decoded, (places[rows], frames), 1)
        self._portrait = jax.jit(stream.encode_portrait)
        self._copy = program(lambda cache: jax.tree.map(jnp.copy, cache), places[1])
        self._empty_decoder = program(
            lambda: stages.zeros(shapes.decoder[self.rows]), places[self.rows]
        )
        self._insert_decoder = program(stages.insert_decoder, places[self.rows], 0)

    def _padded(self, context: Float[Any, "1 t k"]) -> np.ndarray:
        """One length and one dtype: else each is a program of its own."""
        missing = max(0, self.cfg.dit.text_len - context.shape[1])
        return np.pad(np.asarray(context, np.float32), ((0, 0), (0, missing), (0, 0)))

    def _everywhere(self, tree: Any) -> Any:
        whole = NamedSharding(self.meshes.stages, P())
        return put(tree, jax.tree.map(lambda _: whole, tree))

    def _feed(self, chunk: Chunk) -> Chunk:
        """The chunk on the first stage, zeros on the others, which do not listen."""
        sharding = NamedSharding(self.meshes.stages, P(STAGE))

        def lead(x: np.ndarray) -> Array:
            def part(index: Any) -> np.ndarray:
                first = index[0].indices(self.spec.stage)[0] == 0
                return (x if first else np.zeros_like(x))[None]

            return jax.make_array_from_callback((self.spec.stage, *x.shape), sharding, part)

        return jax.tree.map(lead, chunk)

    def filled(self, chunk: Chunk | None, rows: int) -> Chunk:
        """The chunk with every field that the programs take, on the host; None is a bubble.

        Raises LiveAvatarError for a field of another shape.
        """
        fields: dict[str, Any] = {}
        for name, shape in vars(self.shapes.chunk).items():
            given = chunk and getattr(chunk, name)
            wanted = shape and (rows, *shape.shape[1:])
            if given is not None and np.shape(given) != wanted:
                raise LiveAvatarError(
                    f"chunk.{name} has shape {np.shape(given)}; this pipeline takes {wanted}"
                )
            if shape is None:
                fields[name] = None
            elif given is not None:
                fields[name] = np.asarray(given, shape.dtype)
            else:
                spoken = name == "live" and chunk is not None
                fields[name] = np.full((rows, *shape.shape[1:]), spoken, shape.dtype)
        return Chunk(**fields)

    def _decoded(
        self, model: Placed, cache: FeatureCache | None, leaving: InFlight
    ) -> tuple[FeatureCache | None, Clip | None]:
        """Hands the block to the decoder; `device_put` does not wait, so the stages go on."""
        if not self.decodes:
            return None, None
        given = [last(a) for a in (leaving.x, leaving.live, leaving.block, leaving.epoch)]
        x, live, block, epoch = jax.device_put(given, NamedSharding(self.meshes.vae, P()))
        cache, frames = self._decode[live.shape[1]](model.decoder, cache, x, live)
        return cache, Clip(frames, block, epoch, live)


def last(leaving: Array) -> Array:
    """The last stage's part of what left, on its device alone."""
    parts = {s.index[0].indices(len(leaving))[0]: s.data for s in leaving.addressable_shards}
    return parts[max(parts)]


def put(tree: Any, places: Any) -> Any:
    """`device_put`, also over several processes, each of which has equal arrays."""

    def one(a: Any, place: NamedSharding) -> Array:
        if place.is_fully_addressable or (isinstance(a, jax.Array) and a.sharding == place):
            return jax.device_put(a, place)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(one(jax.random.key_data(a), place))
        local = np.asarray(a)
        return jax.make_array_from_callback(local.shape, place, lambda index: local[index])

    return jax.tree.map(one, tree, places)
