"""The stream: `start` once, then `step(model, state, chunk) -> (state, frames)` for ever.

One block of 12 video frames per step. Everything that lasts from block to block is in
`StreamState`; everything that does not change is in the `Avatar`. A step is `draw` (noise and
sink distance), `denoise` (the block's latents) and `decode` (its frames), which a pipeline may
run on different devices.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from liveavatar_jax.config import ModelConfig, StreamConfig
from liveavatar_jax.diffusion.flow import add_noise, euler, sampling_levels
from liveavatar_jax.models.attention import KV, KVCache
from liveavatar_jax.models.audio import PAST, AudioTokens
from liveavatar_jax.models.dit import CausalDiT, Level
from liveavatar_jax.models.vae import VAE, FeatureCache
from liveavatar_jax.types import Array, Float, Int, Key, LiveAvatarError, struct

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
    """What a block is to say: features of its 12 video frames, one stream a speaker."""

    audio: Float[Array, "b a F layers c"]
    pose: Float[Array, "b f h w c"] | None = None  # latents of a pose video


@struct
class Draw:
    """The random part of a step."""

    noise: Float[Array, "b f h w c"]
    renoise: Float[Array, "b f h w c"]  # for a history at a fixed level
    distance: Int[Array, " step"]  # sink distance of each forward


@struct
class StreamState:
    """One stream between two blocks."""

    caches: KVCache  # leading axis: denoising step; a single one if history has a fixed level
    levels: Level  # leading axis: denoising step
    text: KV  # "l b t n d", keys and values of the prompt
    motion: Float[Array, "b m h w c"] | None  # for the prefill with the adaptive sink
    first: Float[Array, "b 1 h w c"]  # our own first latent frame, the adaptive sink
    past: Float[Array, "b a F layers c"] | None  # speech features before the next block
    speakers: Float[Array, "b a 1 p"]  # where each speaker is heard
    decoder: FeatureCache
    position: Int[Array, ""]  # latent frames before the next block, in the whole video
    block: Int[Array, ""]  # blocks since the start
    key: Key[Array, ""]


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
    motion, _ = model.vae.encode(jnp.repeat(picture[:, None], MOTION_VIDEO_FRAMES, axis=1))
    return from_latents(model, reference, motion)


def from_latents(
    model: Avatar, reference: Float[Array, "b 1 h w c"], motion: Float[Array, "b m h w c"]
) -> Portrait:
    """`encode_portrait` for what is encoded already."""
    _, _, h, w, _ = reference.shape
    if h % 2 or w % 2:
        raise LiveAvatarError(
            f"latents of {h} x {w} do not divide into patches of 2 x 2; give a picture whose sides "
            "are multiples of 16 pixels"
        )
    reference, motion = (x.astype(model.cfg.dtype) for x in (reference, motion))
    _, decoder = model.vae.decode(motion[:, :_PRIMING_LATENTS])
    return Portrait(reference=reference, motion=motion, decoder=decoder)


def start(
    model: Avatar,
    portrait: Portrait,
    context: Float[Array, "b t k"],
    key: Key[Array, ""],
    *,
    speakers: Float[Array, "b a p"] | None = None,
    position: int | Int[Array, ""] = 0,
) -> StreamState:
    """The state before the first block.

    `context` are the rows of the text encoder; `speakers` masks patches (2 x 2 latents) by
    speaker, everything for one speaker by default; `position` is the place of the first latent
    frame in the whole video.

    Raises LiveAvatarError when `context` or `speakers` do not fit.
    """
    cfg, dit = model.cfg, model.dit
    dtype = jnp.dtype(cfg.dtype)
    reference, motion = portrait.reference.astype(dtype), portrait.motion.astype(dtype)
    b, _, h, w, _ = reference.shape
    motion = motion if cfg.motion else None
    text = dit.text(context.astype(dtype))
    sink = dit.prefill(reference, motion, text)
    patches = (h // 2) * (w // 2)
    slots = cfg.ring_blocks * cfg.block_frames * patches
    ring = jnp.zeros((*sink.k.shape[:2], slots, *sink.k.shape[3:]), dtype)
    cache = KVCache(ring=KV(k=ring, v=ring), sink=sink)
    if speakers is None:
        speakers = jnp.ones((b, 1, patches))
    if (speakers.shape[0], speakers.shape[2]) != (b, patches):
        raise LiveAvatarError(
            f"speakers has shape {speakers.shape}; give a mask of ({b}, speakers, {patches}): "
            f"the {h // 2} x {w // 2} patches of the picture, row by row"
        )
    return StreamState(
        caches=_repeat(cache, _caches(cfg)),
        levels=_levels(cfg, dit, b),
        text=text,
        motion=motion,
        first=reference,
        past=_no_past(dit, speakers, dtype) if cfg.audio_past == "true" else None,
        speakers=speakers[:, :, None].astype(dtype),
        decoder=portrait.decoder,
        position=jnp.int32(position),
        block=jnp.int32(0),
        key=key,
    )


def step(
    model: Avatar, state: StreamState, chunk: Chunk
) -> tuple[StreamState, Float[Array, "b F H W 3"]]:
    """One block: 12 video frames in [-1, 1]. Of the first block, `LEAD_FRAMES` are not shown.

    Raises LiveAvatarError when the chunk does not fit the stream.
    """
    state, latents = denoise(model, state, draw(model, state), chunk)
    return decode(model, state, latents)


def draw(model: Avatar, state: StreamState) -> Draw:
    """Noise and sink distances of the next block; a function of the key and the block number."""
    cfg = model.cfg
    keys = jax.random.split(jax.random.fold_in(state.key, state.block), 3)
    b, _, h, w, c = state.first.shape
    shape = (b, cfg.block_frames, h, w, c)
    near, far = cfg.distance_range
    forwards = cfg.steps + (cfg.history is not None)
    return Draw(
        noise=jax.random.normal(keys[0], shape),
        renoise=jax.random.normal(keys[1], shape),
        distance=jax.random.randint(keys[2], (forwards,), near, far + 1),
    )


def denoise(
    model: Avatar, state: StreamState, drawn: Draw, chunk: Chunk
) -> tuple[StreamState, Float[Array, "b f h w c"]]:
    """The next block's clean latents, and the state with the block remembered."""
    cfg = model.cfg
    _check(model, state, chunk)
    state = _refresh_sink(model, state)
    audio, past = _hear(model, state, chunk)
    pose = None if chunk.pose is None else chunk.pose.astype(cfg.dtype)
    own_level = cfg.history is None

    def forward(x: Array, level: Level, cache: KVCache, distance: Array) -> tuple[Array, KV]:
        return model.dit.denoise(
            x,
            level,
            cache,
            state.text,
            audio,
            block=state.block,
            position=state.position,
            distance=distance,
            speakers=state.speakers,
            pose=pose,
        )

    def one_step(x: Array, at: tuple) -> tuple[Array, KV | None]:
        level, sigma, to, distance, cache = at
        cache = cache if own_level else _first(state.caches)
        velocity, fresh = forward(x, level, cache, distance)
        return euler(x, velocity, sigma, to), fresh if own_level else None

    sigma = jnp.asarray(sampling_levels(cfg.steps, cfg.shift))
    levels = jax.tree.map(lambda leaf: leaf[: cfg.steps], state.levels)
    rings = state.caches if own_level else None
    steps = (levels, sigma[:-1], sigma[1:], drawn.distance[: cfg.steps], rings)
    x, fresh = jax.lax.scan(one_step, drawn.noise.astype(cfg.dtype), steps)
    if fresh is None:  # then the block is remembered as it is at the level of the history
        again = add_noise(x, drawn.renoise.astype(x.dtype), jnp.asarray(cfg.history, x.dtype))
        level = jax.tree.map(lambda leaf: leaf[-1], state.levels)
        _, fresh = forward(again, level, _first(state.caches), drawn.distance[-1])
        fresh = jax.tree.map(lambda leaf: leaf[None], fresh)
    state = dataclasses.replace(
        state,
        caches=state.caches.append(fresh, state.block),
        first=jnp.where(state.block == 0, x[:, :1], state.first),
        past=past,
        position=state.position + cfg.block_frames,
        block=state.block + 1,
    )
    return state, x


def decode(
    model: Avatar, state: StreamState, latents: Float[Array, "b f h w c"]
) -> tuple[StreamState, Float[Array, "b F H W 3"]]:
    """Four frames a latent, in [-1, 1]."""
    frames, decoder = model.vae.decode(latents, state.decoder)
    return dataclasses.replace(state, decoder=decoder), jnp.clip(frames, -1.0, 1.0)


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


def _refresh_sink(model: Avatar, state: StreamState) -> StreamState:
    """From block `sink_after` on, the sink is our own first frame instead of the portrait."""
    if model.cfg.sink_after is None:
        return state

    def prefill() -> KV:
        sink = model.dit.prefill(state.first, state.motion, state.text)
        return _repeat(sink, _caches(model.cfg))

    due = state.block == model.cfg.sink_after
    sink = jax.lax.cond(due, prefill, lambda: state.caches.sink)
    return dataclasses.replace(state, caches=KVCache(ring=state.caches.ring, sink=sink))


def _hear(
    model: Avatar, state: StreamState, chunk: Chunk
) -> tuple[AudioTokens, Float[Array, "b a F layers c"] | None]:
    """The block's audio tokens, once for all denoising steps, and the past of the next block."""
    audio = chunk.audio.astype(model.cfg.dtype)
    past = jnp.repeat(audio[:, :, :1], PAST, axis=2)
    if state.past is None:
        return model.dit.audio(jnp.concatenate([past, audio], axis=2)), None
    past = jnp.where(state.block == 0, past, state.past)
    audio = jnp.concatenate([past, audio], axis=2)
    return model.dit.audio(audio), audio[:, :, -PAST:]


def _caches(cfg: StreamConfig) -> int:
    return cfg.steps if cfg.history is None else 1


def _levels(cfg: StreamConfig, dit: CausalDiT, b: int) -> Level:
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


def _repeat(tree, n: int):
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[None], (n, *leaf.shape)), tree)


def _first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)
