"""The stream: `start` once, then `step(model, state, chunk) -> (state, frames)` for ever.

One block (12 video frames as published) per step. Everything that lasts from block to block is in
`StreamState`; everything that does not change is in the `Avatar`. A step is `draw` (noise and
sink distances), `enter` (a block of noise that has heard its audio), `advance` once for each
denoising step, and `decode` (the frames). Here they follow each other; in a pipeline they run at
once, on different devices and different blocks.

Each row of the batch is a stream of its own, at its own block; it may rest while others go on.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from liveavatar_jax.config import ModelConfig, StreamConfig
from liveavatar_jax.diffusion.flow import add_noise, euler, sampling_levels
from liveavatar_jax.models.attention import KV, ONE_DEVICE, KVCache, Layout
from liveavatar_jax.models.audio import PAST, AudioTokens
from liveavatar_jax.models.dit import CausalDiT, Level
from liveavatar_jax.models.vae import VAE, FeatureCache
from liveavatar_jax.types import Array, Bool, Float, Int, Key, LiveAvatarError, UInt8, struct

LEAD_FRAMES = 3  # of the first block: they blend the still portrait in, and are not shown
MOTION_VIDEO_FRAMES = 73  # of the standing portrait, packed as motion
_PRIMING_LATENTS = 7  # motion latents that warm the decoder up


class Avatar(nnx.Module):
    """The networks that a stream runs."""

    def __init__(self, cfg: ModelConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg.stream
        self.dit = CausalDiT(cfg.dit, rngs=rngs)
        self.vae = VAE(cfg.vae, rngs=rngs)


@struct
class Chunk:
    """What a block is to say: features of its video frames, one stream a speaker."""

    audio: Float[Array, "b a F layers c"]
    pose: Float[Array, "b f h w c"] | None = None  # latents of a pose video
    live: Bool[Array, " b"] | None = None  # rows with something to say (all, if None)
    epoch: Int[Array, " b"] | None = None  # a label that comes out with the frames


@struct
class Draw:
    """The random part of a step."""

    noise: Float[Array, "b f h w c"]
    renoise: Float[Array, "b f h w c"]  # for a history at a fixed level
    distance: Int[Array, "b step"]  # sink distance of each forward


@struct
class InFlight:
    """A block on its way through the denoising steps, with all that travels along."""

    x: Float[Array, "b f h w c"]
    audio: AudioTokens
    pose: Float[Array, "b f h w c"] | None
    first: Float[Array, "b 1 h w c"]  # what the sink is made of when it becomes our own frame
    distance: Int[Array, "b step"]
    position: Int[Array, " b"]  # of the first latent frame in the whole video
    block: Int[Array, " b"]  # blocks of this row before it
    epoch: Int[Array, " b"]
    live: Bool[Array, " b"]  # or a bubble


@struct
class StreamState:
    """Streams between two blocks, one a row."""

    cache: KVCache  # its ring leads with the denoising step, of size 1 at a fixed history level
    levels: Level  # leading axis: denoising step
    text: KV  # "l b n t d", keys and values of the prompt
    motion: Float[Array, "b m h w c"] | None  # for the prefill with the adaptive sink
    first: Float[Array, "b 1 h w c"]  # our own first latent frame, the adaptive sink
    portrait: Float[Array, "b 1 h w c"] | None  # where it stands in for a pose
    past: Float[Array, "b a F layers c"] | None  # speech features before the next block
    speakers: Float[Array, "b a 1 p"]  # where each speaker is heard
    decoder: FeatureCache | None  # None where another device decodes
    position: Int[Array, " b"]  # latent frames before the next block, in the whole video
    block: Int[Array, " b"]  # blocks since the start
    key: Key[Array, " b"]


@struct
class Portrait:
    """The portrait as the networks see it; made once, good for any number of streams.

    Compile `start`: run eagerly it hands the arrays in here on to its state, and a step that
    donates its state would take them away from the next stream.
    """

    reference: Float[Array, "b 1 h w c"]  # encoded as a video of one frame
    motion: Float[Array, "b m h w c"]  # and as one of 73 equal frames
    decoder: FeatureCache  # warmed up with the still portrait


def encode_portrait(model: Avatar, picture: Float[Array, "b H W 3"]) -> Portrait:
    """The latents of a picture in [-1, 1], in the dtype of the stream.

    Raises LiveAvatarError when the sides are no multiples of 16 pixels.
    """
    picture = picture.astype(model.cfg.dtype)
    reference, _ = model.vae.encode(picture[:, None])
    motion = model.vae.still(picture, MOTION_VIDEO_FRAMES)
    return from_latents(model, reference, motion, picture)


def from_latents(
    model: Avatar,
    reference: Float[Array, "b 1 h w c"],
    motion: Float[Array, "b m h w c"],
    picture: Float[Array, "b H W 3"] | None = None,
) -> Portrait:
    """`encode_portrait` for what is encoded already."""
    _, _, h, w, _ = reference.shape
    if h % 2 or w % 2:
        raise LiveAvatarError(
            f"latents of {h} x {w} do not divide into patches of 2 x 2; give a picture whose sides "
            "are multiples of 16 pixels"
        )
    reference, motion = (x.astype(model.cfg.dtype) for x in (reference, motion))
    decoder = model.vae.primed(motion[:, :_PRIMING_LATENTS], picture)
    return Portrait(reference=reference, motion=motion, decoder=decoder)


def start(
    model: Avatar,
    portrait: Portrait,
    context: Float[Array, "b t k"],
    key: Key[Array, ""],
    *,
    speakers: Float[Array, "b a p"] | None = None,
    position: int | Int[Array, "*b"] = 0,
    layout: Layout = ONE_DEVICE,
) -> StreamState:
    """The state before the first block.

    `context` are the rows of the text encoder; `speakers` masks patches (2 x 2 latents) by
    speaker, everything for one speaker by default; `position` is the place of the first latent
    frame in the whole video, of all rows or of each.

    Raises LiveAvatarError when `context` or `speakers` do not fit.
    """
    cfg, dit = model.cfg, model.dit
    dtype = jnp.dtype(cfg.dtype)
    reference, motion = portrait.reference.astype(dtype), portrait.motion.astype(dtype)
    b, _, h, w, _ = reference.shape
    motion = motion if cfg.motion else None
    text = dit.text(context.astype(dtype))
    sink = dit.prefill(reference, motion, text, layout)
    patches = (h // 2) * (w // 2)
    slots = cfg.ring_blocks * cfg.block_frames * patches
    l, _, n, _, d = sink.k.shape
    ring = jnp.zeros((cfg.rings, l, b, n, slots, d), dtype)
    if speakers is None:
        speakers = jnp.ones((b, 1, patches))
    if (speakers.shape[0], speakers.shape[2]) != (b, patches):
        raise LiveAvatarError(
            f"speakers has shape {speakers.shape}; give a mask of ({b}, speakers, {patches}): "
            f"the {h // 2} x {w // 2} patches of the picture, row by row"
        )
    return StreamState(
        cache=KVCache(ring=KV(k=ring, v=ring), sink=sink),
        levels=levels_of(cfg, dit, b),
        text=text,
        motion=motion,
        first=reference,
        portrait=reference if cfg.pose == "portrait" else None,
        past=_no_past(dit, speakers, dtype) if cfg.audio_past == "true" else None,
        speakers=speakers[:, :, None].astype(dtype),
        decoder=portrait.decoder,
        position=jnp.broadcast_to(jnp.asarray(position, jnp.int32), b),
        block=jnp.zeros(b, jnp.int32),
        key=jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(b)),
    )


def step(
    model: Avatar, state: StreamState, chunk: Chunk, layout: Layout = ONE_DEVICE
) -> tuple[StreamState, Float[Array, "b F H W 3"]]:
    """One block of video frames in [-1, 1]. Of the first block, `LEAD_FRAMES` are not shown.

    Raises LiveAvatarError when the chunk does not fit the stream.
    """
    state, flight = denoise(model, state, draw(model, state), chunk, layout)
    assert state.decoder is not None
    decoder, frames = decode(model.vae, state.decoder, flight.x, flight.live)
    return dataclasses.replace(state, decoder=decoder), frames


def draw(model: Avatar, state: StreamState) -> Draw:
    """Noise and sink distances of the next block; a function of each row's key and block number."""
    cfg = model.cfg
    shape = (cfg.block_frames, *state.first.shape[2:])
    near, far = cfg.distance_range
    forwards = cfg.steps + (cfg.history is not None)

    def row(key: Array, block: Array) -> Draw:
        keys = jax.random.split(jax.random.fold_in(key, block), 3)
        return Draw(
            noise=jax.random.normal(keys[0], shape),
            renoise=jax.random.normal(keys[1], shape),
            distance=jax.random.randint(keys[2], (forwards,), near, far + 1),
        )

    return jax.vmap(row)(state.key, state.block)


def denoise(
    model: Avatar, state: StreamState, drawn: Draw, chunk: Chunk, layout: Layout = ONE_DEVICE
) -> tuple[StreamState, InFlight]:
    """The next block, clean, and the state with the block remembered."""
    cfg = model.cfg
    state, flight = enter(model, state, drawn, chunk)
    own_level = cfg.history is None
    sink = refreshed(model, state, flight, layout)
    ring = state.cache.ring

    def one_step(carry: tuple[InFlight, KV], at: tuple) -> tuple[tuple[InFlight, KV], None]:
        flight, ring = carry
        step, level = at
        cache = KVCache(ring=ring, sink=sink)
        slot = step if own_level else 0
        flight, fresh = advance(model, cache, state, flight, level, step, slot, layout)
        if own_level:
            ring = cache.append(fresh, slot, flight.block, flight.live).ring
        return (flight, ring), None

    levels = jax.tree.map(lambda leaf: leaf[: cfg.steps], state.levels)
    (flight, ring), _ = jax.lax.scan(one_step, (flight, ring), (jnp.arange(cfg.steps), levels))
    cache = KVCache(ring=ring, sink=sink)
    if not own_level:  # then the block is remembered as it is at the level of the history
        x = add_noise(
            flight.x, drawn.renoise.astype(cfg.dtype), jnp.asarray(cfg.history, cfg.dtype)
        )
        again = dataclasses.replace(flight, x=x)
        level = jax.tree.map(lambda leaf: leaf[-1], state.levels)
        _, fresh = forward(model, cache, state, again, level, cfg.steps, 0, layout)
        cache = cache.append(fresh, 0, flight.block, flight.live)
    return dataclasses.replace(state, cache=cache, first=own_first(state.first, flight)), flight


def enter(
    model: Avatar, state: StreamState, drawn: Draw, chunk: Chunk
) -> tuple[StreamState, InFlight]:
    """The next block as noise, having heard its audio; resting rows are bubbles.

    Raises LiveAvatarError when the chunk does not fit the stream.
    """
    cfg, b = model.cfg, len(state.block)
    _check(model, state, chunk)
    live = jnp.ones(b, bool) if chunk.live is None else chunk.live
    audio, past = hear(model, state, chunk, live)
    flight = InFlight(
        x=drawn.noise.astype(cfg.dtype),
        audio=audio,
        pose=None if chunk.pose is None else chunk.pose.astype(cfg.dtype),
        first=state.first,
        distance=drawn.distance,
        position=state.position,
        block=state.block,
        epoch=jnp.zeros(b, jnp.int32) if chunk.epoch is None else chunk.epoch,
        live=live,
    )
    state = dataclasses.replace(
        state,
        past=past,
        position=state.position + cfg.block_frames * live.astype(jnp.int32),
        block=state.block + live.astype(jnp.int32),
    )
    return state, flight


def advance(
    model: Avatar,
    cache: KVCache,
    state: StreamState,
    flight: InFlight,
    level: Level,
    step: int | Int[Array, ""],
    slot: int | Int[Array, ""],
    layout: Layout = ONE_DEVICE,
) -> tuple[InFlight, KV]:
    """One denoising step, number `step`, with the ring at `slot`; its keys and values."""
    sigma = jnp.asarray(sampling_levels(model.cfg.steps, model.cfg.shift))
    velocity, fresh = forward(model, cache, state, flight, level, step, slot, layout)
    x = euler(flight.x, velocity, sigma[step], sigma[step + 1])
    return dataclasses.replace(flight, x=x), fresh


def refreshed(
    model: Avatar, state: StreamState, flight: InFlight, layout: Layout = ONE_DEVICE
) -> KV:
    """The sink: with block `sink_after` it becomes our own first frame instead of the portrait.

    Row by row, for they come at different times and a prefill costs most of a denoising step. A
    branch in a counted loop: a loop over the rows that are due crashes the compiler of jax 0.11.2
    inside `shard_map`, and that of 0.10.2 moves a single row's prefill out of it, into every tick.
    But where rows lie on different devices, as in training, all are made in the time of one.
    """
    if model.cfg.sink_after is None:
        return state.cache.sink
    motion, due = state.motion, flight.live & (flight.block == model.cfg.sink_after)

    def renew(row: Array, sink: KV) -> KV:
        def of(tree, axis: int):
            pick = lambda a: jax.lax.dynamic_slice_in_dim(a, row, 1, axis)
            return jax.tree.map(pick, tree)

        fresh = model.dit.prefill(of(flight.first, 0), of(motion, 0), of(state.text, 1), layout)
        put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, row, 1)
        return jax.tree.map(put, sink, fresh)

    def one_row(row: Array, sink: KV) -> KV:
        return jax.lax.cond(due[row], lambda sink: renew(row, sink), lambda sink: sink, sink)

    def every_row(sink: KV) -> KV:
        fresh = model.dit.prefill(flight.first, motion, state.text, layout)
        pick = lambda old, new: jnp.where(due[None, :, None, None, None], new, old)
        return jax.tree.map(pick, sink, fresh)

    if layout.rows:
        return jax.lax.cond(due.any(), every_row, lambda sink: sink, state.cache.sink)
    return jax.lax.fori_loop(0, len(due), one_row, state.cache.sink)


def own_first(first: Float[Array, "b 1 h w c"], flight: InFlight) -> Float[Array, "b 1 h w c"]:
    """Our own first latent frame, once the clean first block brings it."""
    fresh = flight.live & (flight.block == 0)
    return jnp.where(fresh[:, None, None, None, None], flight.x[:, :1], first)


def decode(
    vae: VAE, cache: FeatureCache, x: Float[Array, "b f h w c"], live: Bool[Array, " b"]
) -> tuple[FeatureCache, Float[Array, "b F H W 3"]]:
    """Four frames a latent of a clean block, in [-1, 1]; resting rows keep their cache."""
    frames, fresh = vae.decode(x, cache)

    def keep(new: Array, old: Array) -> Array:
        return jnp.where(live.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(keep, fresh, cache), jnp.clip(frames, -1.0, 1.0)


def pixels(frames: Float[Array, "b F H W 3"]) -> UInt8[Array, "b F H W 3"]:
    """Bytes of frames in [-1, 1]."""
    return jnp.round((frames.astype(jnp.float32) + 1.0) * 127.5).astype(jnp.uint8)


def forward(
    model: Avatar,
    cache: KVCache,
    state: StreamState,
    flight: InFlight,
    level: Level,
    step: int | Int[Array, ""],
    slot: int | Int[Array, ""],
    layout: Layout,
) -> tuple[Float[Array, "b f h w c"], KV]:
    pose = state.portrait if flight.pose is None else flight.pose
    return model.dit.denoise(
        flight.x,
        level,
        cache,
        state.text,
        flight.audio,
        step=slot,
        block=flight.block,
        position=flight.position,
        distance=flight.distance[:, step],
        speakers=state.speakers,
        pose=pose,
        layout=layout,
    )


def _check(model: Avatar, state: StreamState, chunk: Chunk) -> None:
    b, _, h, w, c = state.first.shape
    dit, frames = model.dit.cfg, model.cfg.block_frames
    heard = (b, state.speakers.shape[1], 4 * frames, dit.audio_layers, dit.audio_dim)
    if chunk.audio.shape != heard:
        raise LiveAvatarError(
            f"chunk.audio has shape {chunk.audio.shape}; this stream takes {heard}: batch, "
            "speakers (masks given to start), video frames, layers and width of the features"
        )
    if chunk.pose is not None and chunk.pose.shape != (b, frames, h, w, c):
        raise LiveAvatarError(
            f"chunk.pose has shape {chunk.pose.shape}; this stream takes {(b, frames, h, w, c)}"
        )


def hear(
    model: Avatar, state: StreamState, chunk: Chunk, live: Bool[Array, " b"]
) -> tuple[AudioTokens, Float[Array, "b a F layers c"] | None]:
    """The block's audio tokens, once for all denoising steps, and the past of the next block."""
    audio = chunk.audio.astype(model.cfg.dtype)
    past = jnp.repeat(audio[:, :, :1], PAST, axis=2)
    if state.past is None:
        return model.dit.audio(jnp.concatenate([past, audio], axis=2)), None
    each = (-1, *(1,) * (past.ndim - 1))
    past = jnp.where((state.block == 0).reshape(each), past, state.past)
    audio = jnp.concatenate([past, audio], axis=2)
    kept = jnp.where(live.reshape(each), audio[:, :, -PAST:], state.past)
    return model.dit.audio(audio), kept


def levels_of(cfg: StreamConfig, dit: CausalDiT, b: int) -> Level:
    """Every forward's level: time embedding and modulation are made once for all blocks."""
    sigmas = [*sampling_levels(cfg.steps, cfg.shift)[:-1]]
    if cfg.history is not None:
        sigmas.append(cfg.history)
    per_step = jnp.asarray(sigmas, jnp.float32)[:, None, None]
    return jax.vmap(dit.level)(jnp.broadcast_to(per_step, (len(sigmas), b, cfg.block_frames)))


def _no_past(
    dit: CausalDiT, speakers: Float[Array, "b a p"], dtype: jnp.dtype
) -> Float[Array, "b a F layers c"]:
    shape = (*speakers.shape[:2], PAST, dit.cfg.audio_layers, dit.cfg.audio_dim)
    return jnp.zeros(shape, dtype)
