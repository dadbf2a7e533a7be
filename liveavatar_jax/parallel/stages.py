"""What the devices of a pipeline run: one stage of a tick, and the programs around it.

Functions of arrays only; `pipeline.py` says where they lie.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.models.attention import KV, KVCache, Layout
from liveavatar_jax.models.condition import MOTION_FRAMES
from liveavatar_jax.models.vae import FeatureCache
from liveavatar_jax.parallel.mesh import STAGE
from liveavatar_jax.stream import Avatar, Chunk, InFlight, Portrait, StreamState
from liveavatar_jax.types import Array, Bool, Float, UInt8


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
    # On all stages, though the first alone needs it: a tick lasts as long as its longest stage.
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
    every = lead(dataclasses.replace(state, cache=rest, levels=None), stages)
    cache = KVCache(ring=ring, sink=every.cache.sink)
    return dataclasses.replace(every, cache=cache, levels=levels)


# Where the batch stands in the leaves of a `StreamState` with the stages leading.
_ROWS = dict.fromkeys((field.name for field in dataclasses.fields(StreamState)), 1)
ROWS: Any = StreamState(**cast(Any, _ROWS | {"cache": 2, "text": 2}))


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


def text(model: Avatar, context: Array) -> KV:
    return model.dit.text(context.astype(model.cfg.dtype))


def retell(old: KV, new: KV, row: Array, stage: Array) -> KV:
    """`old` leads with the stages and has the rows third; `new` is of one row."""

    def put(old: Array, new: Array) -> Array:
        every = jnp.broadcast_to(new[None], (len(old), *new.shape))
        told = jax.lax.dynamic_update_slice_in_dim(old, every, row, 2)
        here = (jnp.arange(len(old)) == stage).reshape(-1, *(1,) * (old.ndim - 1))
        return jnp.where(here, told, old)

    return jax.tree.map(put, old, new)


def split(avatar: Avatar) -> tuple[Avatar, Avatar]:
    """The denoiser by itself and the decoder by itself."""
    stages, decoder = (jax.tree.map(lambda leaf: leaf, avatar) for _ in range(2))
    stages.vae, decoder.dit = None, None
    return stages, decoder


def decoded(
    model: Avatar, cache: FeatureCache, x: Float[Array, "1 b f h w c"], live: Bool[Array, "1 b"]
) -> tuple[FeatureCache, UInt8[Array, "b F H W 3"]]:
    """The frames of what left the last stage, whose axis still leads."""
    cache, frames = stream.decode(model.vae, cache, x[0], live[0])
    return cache, stream.pixels(frames)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the programs carry, as shapes."""

    session: StreamState
    stages: StreamState
    flight: InFlight
    chunk: Chunk
    decoder: dict[int, FeatureCache]  # by number of streams: one, and all

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

        session, _, own = jax.eval_shape(lambda: begun(1))
        state, flight, decoder = jax.eval_shape(lambda: begun(rows))
        stages = cfg.stream.steps
        flight = jax.eval_shape(lambda: lead(zeros(flight), stages))
        state = jax.eval_shape(lambda: spread(zeros(state), stages))
        said = jax.eval_shape(lambda: chunk(rows))
        return cls(session, state, flight, said, {1: own, rows: decoder})


def zeros(shapes: Any) -> Any:
    def zero(leaf: jax.ShapeDtypeStruct) -> Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.broadcast_to(jax.random.key(0), leaf.shape)
        return jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(zero, shapes)


def lead(tree: Any, stages: int) -> Any:
    return jax.tree.map(lambda a: jnp.broadcast_to(a[None], (stages, *a.shape)), tree)


def start(
    model: Avatar,
    portrait: Portrait,
    context: Array,
    key: Array,
    speakers: Array | None,
    layout: Layout,
) -> StreamState:
    return stream.start(model, portrait, context, key, speakers=speakers, layout=layout)


def start_apart(*given: Any, **options: Any) -> StreamState:
    """`start` for `shard_map`: every stage by itself, with the ring of its own step alone."""
    session = start(*given, **options)
    ring = jax.tree.map(lambda a: a[:1], session.cache.ring)
    return dataclasses.replace(session, cache=dataclasses.replace(session.cache, ring=ring))


def warm(
    model: Avatar, session: StreamState, chunk: Chunk, layout: Layout
) -> tuple[StreamState, InFlight]:
    drawn = stream.draw(model, session)
    session, flight = stream.denoise(model, session, drawn, chunk, layout)
    return session, lead(flight, 1)


def insert_decoder(old: FeatureCache, new: FeatureCache, row: Array) -> FeatureCache:
    put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, 0)
    return jax.tree.map(put, old, new)
