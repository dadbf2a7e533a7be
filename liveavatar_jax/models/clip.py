"""Whole clips at once: block by block, as the student learns, or both ways, as its teacher sees.

Condition tokens of the causal forward see only each other, so they are a prefill, and each
block's queries meet just the keys that they may see: no mask, and half the products are saved.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from liveavatar_jax.models.attention import KV, ONE_DEVICE, Layout
from liveavatar_jax.models.audio import PAST, AudioTokens
from liveavatar_jax.models.condition import REFERENCE_POSITION, condition_phase
from liveavatar_jax.models.dit import CausalDiT, Level
from liveavatar_jax.models.layers import Phase, rotate
from liveavatar_jax.types import Array, Float, Int, struct


@struct
class Condition:
    """What a clip is made for, as the trunk sees it."""

    reference: Float[Array, "b 1 h w c"]
    motion: Float[Array, "b m h w c"] | None
    text: KV  # "l b n t d"
    audio: AudioTokens
    speakers: Float[Array, "b a #f p"]
    pose: Float[Array, "b #f h w c"] | None = None


def condition(
    dit: CausalDiT,
    reference: Float[Array, "b 1 h w c"],
    motion: Float[Array, "b m h w c"] | None,
    context: Float[Array, "b t k"],
    features: Float[Array, "b a F layers i"],
    *,
    blocks: int = 1,
) -> Condition:
    """From what records hold, everyone heard everywhere, in the dtype of `reference`.

    The first frame's features stand for what was before it. With `blocks` > 1 that goes for each
    of so many equal parts, as in a stream that does not look back (`StreamConfig.audio_past`).
    """
    _, _, h, w, _ = reference.shape
    b, a = features.shape[:2]
    audio = rearrange(features.astype(reference.dtype), "b a (j F) l c -> (b j) a F l c", j=blocks)
    before = jnp.repeat(audio[:, :, :1], PAST, axis=2)
    tokens = dit.audio(jnp.concatenate([before, audio], axis=2))
    whole = lambda x: rearrange(x, "(b j) a f ... -> b a (j f) ...", j=blocks)
    return Condition(
        reference=reference,
        motion=motion,
        text=dit.text(context.astype(reference.dtype)),
        audio=AudioTokens(global_=whole(tokens.global_), local=whole(tokens.local)),
        speakers=jnp.ones((b, a, 1, (h // 2) * (w // 2)), reference.dtype),
    )


def causal(
    dit: CausalDiT,
    x: Float[Array, "b f h w c"],
    sigma: Float[Array, "b f"],
    given: Condition,
    *,
    block_frames: int,
    window: int | None = None,
    position: Int[Array, " b"] | None = None,
    distance: Int[Array, "b blocks"] | None = None,
    past: Float[Array, "b f h w c"] | None = None,
    layout: Layout = ONE_DEVICE,
) -> Float[Array, "b f h w c"]:
    """Velocity of a clip whose frames see their own block, earlier ones, and the condition.

    window: blocks that are seen, the own one included; all earlier ones by default.
    position: the first frame's place in the video, 0 by default; `distance` is how far ahead of
    each block the reference is shown once it rolls, as in `CausalDiT.denoise`.
    past: the clean clip. Given that, earlier blocks are seen as they are in it instead of in `x`
    (teacher forcing): one sequence [clean | noisy], whose clean half sees its own past.
    """
    b, f, h, w, _ = x.shape
    pose, blocks = given.pose, math.ceil(f / block_frames)
    position = jnp.zeros(b, jnp.int32) if position is None else position
    distance = jnp.zeros((b, blocks), jnp.int32) if distance is None else distance
    sink = dit.prefill(given.reference, given.motion, given.text, layout)
    turn = dit.turn(position, f, h, w)
    firsts = position[:, None] + block_frames * jnp.arange(blocks)[None]
    roll = jnp.maximum(0, firsts - (REFERENCE_POSITION - distance))
    sink_turns = [_first(condition_phase(h, w, roll[:, j], dit.cfg.head_dim), sink.tokens)
                  for j in range(blocks)]  # fmt: skip
    if past is not None:
        x, sigma = jnp.concatenate([past, x], 1), jnp.concatenate([jnp.zeros_like(sigma), sigma], 1)
        turn = _join(turn, turn)
        given = _twice(given)
    level, noisy = layout.by_row(dit.level(sigma)), x[:, -f:]
    x = dit.embed(x, given.pose)
    p = x.shape[2]
    size, half = block_frames * p, f * p  # tokens

    def attend(sink: KV, q: Array, k: Array, v: Array) -> tuple[Array, None]:
        q, k, parts = rotate(q, turn), rotate(k, turn), []
        for start in range(0, q.shape[2], half):
            for j in range(blocks):
                since = max(0, j + 1 - (window or blocks)) * size
                own = slice(start + j * size, start + min((j + 1) * size, half))
                seen = [slice(since, j * size), own] if start else [slice(since, own.stop)]
                keys = [rotate(sink.k, sink_turns[j]), *(k[:, :, at] for at in seen)]
                values = [sink.v, *(v[:, :, at] for at in seen)]
                some = (q[:, :, own], jnp.concatenate(keys, 2), jnp.concatenate(values, 2))
                parts.append(layout.attention(*some, None, dit.cfg.attention))
        return jnp.concatenate(parts, axis=2), None

    heard = (given.audio, given.speakers)
    x, _ = dit.trunk(x, level.blocks, given.text, attend, sink, *heard, layout)
    x, level = x[:, -f:], jax.tree.map(lambda a: a[:, -f:], level)
    y = dit.unpatchify(layout.join(dit.head(x, level.head), p), h, w)
    return dit.velocity(y, noisy, pose, level.sigma)


def bidirectional(
    dit: CausalDiT,
    x: Float[Array, "b f h w c"],
    sigma: Float[Array, " b"],
    given: Condition,
    layout: Layout = ONE_DEVICE,
) -> Float[Array, "b f h w c"]:
    """Velocity of a clip as the base model gives it: all tokens see all, the condition's too."""
    _, _, h, w, _ = x.shape
    y, level = hidden(dit, x, sigma, given, layout)
    y = layout.join(dit.head(y, level.head), (h // 2) * (w // 2))
    return dit.velocity(dit.unpatchify(y, h, w), x, given.pose, level.sigma)


def hidden(
    dit: CausalDiT,
    x: Float[Array, "b f h w c"],
    sigma: Float[Array, " b"],
    given: Condition,
    layout: Layout = ONE_DEVICE,
) -> tuple[Float[Array, "b f pp dim"], Level]:
    """Tokens after the last layer of `bidirectional`, as `layout` parts them, and the level."""
    _, f, h, w, _ = x.shape
    conditions, condition_turn = dit.conditions(given.reference, given.motion)
    level = layout.by_row(dit.level(jnp.repeat(sigma[:, None], f, axis=1)))
    x = dit.embed(x, given.pose)
    p, count = x.shape[2], conditions.shape[1]
    # The condition tokens as further frames at level 0, the last one filled up.
    more = math.ceil(count / p)
    conditions = jnp.pad(conditions, ((0, 0), (0, more * p - count), (0, 0)))
    x = jnp.concatenate([x, rearrange(conditions, "b (f p) dim -> b f p dim", p=p)], axis=1)
    clean = layout.by_row(dit.level(jnp.zeros((len(x), 1))).blocks)
    clean = repeat(clean, "b 1 m dim -> b f m dim", f=more)
    blocks = jnp.concatenate([level.blocks, clean], axis=1)
    tokens = f * p + count
    turn = _join(dit.turn(jnp.zeros(1, jnp.int32), f, h, w), condition_turn)
    turn = jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, more * p - count), (0, 0))), turn)
    seen = None if tokens == x.shape[1] * p else jnp.full(len(x), tokens)

    def attend(_: None, q: Array, k: Array, v: Array) -> tuple[Array, None]:
        return layout.attention(rotate(q, turn), rotate(k, turn), v, seen, dit.cfg.attention), None

    heard = (given.audio, given.speakers)
    x, _ = dit.trunk(x, blocks, given.text, attend, None, *heard, layout)
    return x[:, :f], level


def _twice(given: Condition) -> Condition:
    """The same for both halves of the sequence."""
    audio = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=2), given.audio)
    frames = given.speakers.shape[2]
    speakers = given.speakers if frames == 1 else jnp.concatenate([given.speakers] * 2, axis=2)
    pose = given.pose
    if pose is not None and pose.shape[1] > 1:
        pose = jnp.concatenate([pose, pose], axis=1)
    return dataclasses.replace(given, audio=audio, speakers=speakers, pose=pose)


def _join(first: Phase, then: Phase) -> Phase:
    def along_tokens(a: Array, b: Array) -> Array:
        rows = max(len(a), len(b))
        whole = [jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (a, b)]
        return jnp.concatenate(whole, axis=1)

    return jax.tree.map(along_tokens, first, then)


def _first(turn: Phase, tokens: int) -> Phase:
    return jax.tree.map(lambda a: a[:, :tokens], turn)
