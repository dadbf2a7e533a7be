"""The causal DiT of Live Avatar: one block, one trunk, and the two uses of a stream.

`prefill` runs the condition tokens and keeps their keys; `denoise` runs one block of the stream
against a cache. Whole clips, as training sees them, are in `clip.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from liveavatar_jax.config import DiTConfig
from liveavatar_jax.models.attention import (
    KV,
    ONE_DEVICE,
    Attention,
    KVCache,
    Layout,
    overwrite,
)
from liveavatar_jax.models.audio import AudioAdapter, AudioTokens, Injector
from liveavatar_jax.models.condition import (
    REFERENCE_POSITION,
    FramePacker,
    condition_phase,
    patchify,
)
from liveavatar_jax.models.layers import (
    LayerNorm,
    Linear,
    Phase,
    along_last,
    grid_phase,
    modulate,
    remat,
    rotate,
    timestep_sinusoid,
)
from liveavatar_jax.types import Array, Float, Int, LiveAvatarError, struct

PATCH = (1, 2, 2)
LEAST = 0.05  # noise level that a clean prediction is divided by, at least (arXiv 2511.13720)
NOISE, REFERENCE, MOTION = range(3)  # rows of the type embedding

# (memory of the layer, q, k, v: "b n t d") -> (y, what to keep)
Attend = Callable[..., tuple[Array, Any]]


@struct
class Level:
    """What the network needs to know of the noise level of each frame, float32."""

    head: Float[Array, "b f dim"]
    blocks: Float[Array, "b f 6 dim"]
    sigma: Float[Array, "b f"] | None  # where a velocity is made of it


class Block(nnx.Module):
    """Self-attention, text cross-attention and feed-forward, modulated by the noise level."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        dim, dtype = cfg.dim, cfg.param_dtype
        make = (dim, cfg.heads, cfg.attention, dtype)
        self.modulation = nnx.Param(jnp.zeros((6, dim), dtype))
        self.self_attn = Attention(*make, rngs=rngs)
        self.cross_norm = LayerNorm(dim, dtype, rngs=rngs)
        self.cross_attn = Attention(*make, rngs=rngs)
        self.ffn_in = Linear(dim, cfg.ffn_dim, dtype, rngs=rngs)
        self.ffn_out = Linear(cfg.ffn_dim, dim, dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b f p dim"],
        level: Float[Array, "b f 6 dim"],
        attend: Callable[[Array, Array, Array], tuple[Array, Any]],
        cross: Callable[[Array], Array],
    ) -> tuple[Float[Array, "b f p dim"], Any]:
        """`attend(q, k, v) -> (y, kept)` gets unrotated heads "b f p n d"; it knows positions and
        memory. `cross(q) -> y` looks at the prompt."""
        level = level + self.modulation[...].astype(jnp.float32)[None, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(level, 6, axis=2)

        h = modulate(x, shift1, scale1)
        own = self.self_attn
        y, kept = attend(own.query(h), own.keys(h), own.values(h))
        x = gated(x, gate1, own.out(y))

        y = cross(self.cross_attn.query(self.cross_norm(x)))
        x = x + self.cross_attn.out(y)

        h = jax.nn.gelu(self.ffn_in(modulate(x, shift2, scale2)), approximate=True)
        return gated(x, gate2, self.ffn_out(h)), kept


def gated(
    x: Float[Array, "b f p dim"], gate: Float[Array, "b f 1 dim"], y: Float[Array, "b f p dim"]
) -> Float[Array, "b f p dim"]:
    """Residual addition in float32, as published."""
    return (x.astype(jnp.float32) + gate * y.astype(jnp.float32)).astype(x.dtype)


class Head(nnx.Module):
    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        self.modulation = nnx.Param(jnp.zeros((2, cfg.dim), cfg.param_dtype))
        self.out = Linear(cfg.dim, 4 * cfg.latent_channels, cfg.param_dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b f p dim"], level: Float[Array, "b f dim"]
    ) -> Float[Array, "b f p k"]:
        level = level[:, :, None] + self.modulation[...].astype(jnp.float32)[None, None]
        shift, scale = jnp.split(level, 2, axis=2)
        return self.out(modulate(x, shift, scale))


class CausalDiT(nnx.Module):
    """The denoiser. Latents have even height and width; `sigma` is the noise level, 1 = noise."""

    def __init__(self, cfg: DiTConfig, *, rngs: nnx.Rngs):
        dim, dtype = cfg.dim, cfg.param_dtype
        self.cfg = cfg

        def linear(inputs: int, outputs: int = dim) -> Linear:
            return Linear(inputs, outputs, dtype, rngs=rngs)

        def stack(make: Callable[..., nnx.Module], depth: int) -> Any:
            keys = jax.random.split(rngs.params(), depth)
            return jax.vmap(lambda key: make(cfg, rngs=nnx.Rngs(key)))(keys)

        self.patch, self.pose = linear(4 * cfg.latent_channels), linear(4 * cfg.latent_channels)
        self.text_in, self.text_out = linear(cfg.text_dim), linear(dim)
        self.time_in, self.time_out = linear(cfg.freq_dim), linear(dim)
        self.time_proj = linear(dim, 6 * dim)
        self.type_embedding = nnx.Param(jnp.zeros((3, dim), dtype))
        if cfg.places is not None:
            rows, columns = cfg.places
            self.place = nnx.Param(jnp.zeros((rows * columns, dim), dtype))
            grid = (rows * PATCH[1], columns * PATCH[2], cfg.latent_channels)
            self.spread = nnx.Param(jnp.ones(grid, dtype))
        self.packer = FramePacker(cfg, rngs=rngs)
        self.audio = AudioAdapter(cfg, rngs=rngs)
        self.blocks = stack(Block, cfg.layers)
        self.injectors = stack(Injector, len(cfg.inject_layers))
        self.head = Head(cfg, rngs=rngs)

    # ---- what a session or a noise level needs once

    def text(self, context: Float[Array, "b t k"]) -> KV:
        """Keys and values of every layer ("l b n t d") for the rows of the text encoder.

        Rows up to `text_len` are zeros, and attended to, as published. Raises LiveAvatarError
        when there are more rows than that, or of another width.
        """
        missing = self.cfg.text_len - context.shape[1]
        if missing < 0 or context.shape[2] != self.cfg.text_dim:
            raise LiveAvatarError(
                f"text of {context.shape[1]} rows of width {context.shape[2]} does not fit; give "
                f"at most {self.cfg.text_len} rows of {self.cfg.text_dim}"
            )
        x = jnp.pad(context, ((0, 0), (0, missing), (0, 0)))
        x = self.text_out(jax.nn.gelu(self.text_in(x), approximate=True))
        # Layer by layer: of weights that lie apart, no more than one layer's are together.
        return jax.lax.map(lambda block: block.cross_attn.context(x), self.blocks)

    def level(self, sigma: Float[Array, "b f"]) -> Level:
        """Time embedding and modulation of each frame's noise level, in float32 throughout."""
        t = timestep_sinusoid(1000.0 * sigma.astype(jnp.float32), self.cfg.freq_dim)
        e = self.time_out(jax.nn.silu(self.time_in(t)))
        blocks = self.time_proj(jax.nn.silu(e))
        blocks = rearrange(blocks, "b f (m dim) -> b f m dim", m=6)
        kept = sigma.astype(jnp.float32) if self.cfg.predicts == "offset" else None
        return Level(head=e, blocks=blocks, sigma=kept)

    # ---- the two uses

    def prefill(
        self,
        reference: Float[Array, "b 1 h w c"],
        motion: Float[Array, "b f h w c"] | None,
        text: KV,
        layout: Layout = ONE_DEVICE,
    ) -> KV:
        """The condition sink: unrotated keys and values ("l b n t d") of reference and motion."""
        x, turn = self.conditions(reference, motion)

        def attend(_: None, q: Array, k: Array, v: Array) -> tuple[Array, KV]:
            q, turned = rotate(q, turn), rotate(k, turn)
            return layout.attention(q, turned, v, None, self.cfg.attention), KV(k=k, v=v)

        clean = layout.by_row(self.level(jnp.zeros((len(x), 1))).blocks)
        _, sink = self.trunk(x[:, None], clean, text, attend, layout=layout)
        return sink

    def denoise(
        self,
        x: Float[Array, "b f h w c"],
        level: Level,
        cache: KVCache,
        text: KV,
        audio: AudioTokens,
        *,
        step: int | Int[Array, ""],
        block: Int[Array, " b"],
        position: Int[Array, " b"],
        distance: Int[Array, " b"],
        speakers: Float[Array, "b a #f p"],
        pose: Float[Array, "b #f h w c"] | None = None,
        layout: Layout = ONE_DEVICE,
    ) -> tuple[Float[Array, "b f h w c"], KV]:
        """Velocity of one block of a stream, and its keys and values for `cache.append`.

        `step` names the ring. `block` counts the blocks that the ring has seen, `position` is
        the first latent frame's place in the video, `distance` how far ahead of it the reference
        is shown; each row of the batch is a stream of its own.
        """
        _, f, h, w, _ = x.shape
        turn = self.turn(position, f, h, w)
        roll = jnp.maximum(0, position - (REFERENCE_POSITION - distance))
        sink_turn = condition_phase(h, w, roll=roll, head_dim=self.cfg.head_dim)
        sink_turn = jax.tree.map(lambda a: a[:, : cache.sink.tokens], sink_turn)
        level, noisy = layout.by_row(level), x
        x = self.embed(x, pose)
        p = x.shape[2]
        tokens = f * p
        # Blocks are compared, not tokens: tokens would overflow after four days of video.
        seen = cache.sink.tokens + jnp.minimum(block + 1, cache.ring.tokens // tokens) * tokens

        def attend(memory: tuple[Array, KV], q: Array, k: Array, v: Array) -> tuple[Array, KV]:
            layer, sink = memory
            # By index from all rings: to hand the scan one step's would copy that ring.
            ring = jax.tree.map(lambda a: a[step, layer], cache.ring)
            fresh = KV(k=rotate(k, turn), v=v)
            ring = overwrite(ring, fresh, block)
            keys = jnp.concatenate([rotate(sink.k, sink_turn), ring.k], axis=2)
            values = jnp.concatenate([sink.v, ring.v], axis=2)
            q = rotate(q, turn)
            return layout.attention(q, keys, values, seen, self.cfg.attention), fresh

        memory = (jnp.arange(self.cfg.layers), cache.sink)
        x, fresh = self.trunk(x, level.blocks, text, attend, memory, audio, speakers, layout)
        y = layout.join(self.head(x, level.head), p)
        return self.velocity(self.unpatchify(y, h, w), noisy, pose, level.sigma), fresh

    # ---- what they share

    def trunk(
        self,
        x: Float[Array, "b f p dim"],
        level: Float[Array, "b f 6 dim"],
        text: KV,
        attend: Attend,
        memory: Any = None,
        audio: AudioTokens | None = None,
        speakers: Float[Array, "b a #f p"] | None = None,
        layout: Layout = ONE_DEVICE,
    ) -> tuple[Float[Array, "b f pp dim"], Any]:
        """All blocks, on tokens as `layout` splits them; `memory` leads with the layer axis, and so
        does what `attend` keeps.

        Twelve of forty layers hear audio: each layer carries the row of its injector, or -1, and
        takes that row from the one stack of injectors inside a branch, so nothing is copied. Where
        there are more frames than audio, the first ones hear it.
        """
        rows = np.full(self.cfg.layers, -1, np.int32)
        rows[list(self.cfg.inject_layers)] = np.arange(len(self.cfg.inject_layers))
        frames, tokens = x.shape[1:3]
        x = layout.split(x)
        padded = x.shape[2]
        if speakers is not None:
            speakers = jnp.pad(speakers, ((0, 0), (0, 0), (0, 0), (0, padded - tokens)))

        @remat(self.cfg.remat)
        def body(x: Array, layer: Any) -> tuple[Array, Any]:
            block, row, text, memory = layer

            def own(*qkv: Array) -> tuple[Array, Any]:
                y, kept = attend(memory, *(layout.gather(a, tokens) for a in qkv))
                return layout.scatter(y, frames, padded), kept

            def prompt(q: Array) -> Array:
                return layout.cross(q, text.k, text.v, self.cfg.attention)

            x, kept = block(x, level, own, prompt)
            if audio is None:
                return x, kept

            heard = audio.global_.shape[2]

            def inject(x: Array) -> Array:
                injector = jax.tree.map(lambda leaf: leaf[row], self.injectors)
                y = injector(x[:, :heard], audio, speakers)
                return y if heard == frames else jnp.concatenate([y, x[:, heard:]], axis=1)

            return jax.lax.cond(row >= 0, inject, lambda x: x, x), kept

        return jax.lax.scan(body, x, (self.blocks, jnp.asarray(rows), text, memory))

    def conditions(
        self, reference: Float[Array, "b 1 h w c"], motion: Float[Array, "b f h w c"] | None
    ) -> tuple[Float[Array, "b t dim"], Phase]:
        """Reference and packed motion as tokens, and their phases before the reference rolls."""
        kinds = self.type_embedding[...].astype(reference.dtype)[:, None, None]
        x = self.placed(self.patch(patchify(reference, PATCH))) + kinds[REFERENCE]
        if motion is not None:
            x = jnp.concatenate([x, self.packer(motion) + kinds[MOTION]], axis=1)
        turn = condition_phase(
            *reference.shape[2:4], roll=jnp.zeros(1, jnp.int32), head_dim=self.cfg.head_dim
        )
        return x, jax.tree.map(lambda a: a[:, : x.shape[1]], turn)

    def turn(self, position: Int[Array, " b"], f: int, h: int, w: int):
        frames = position[:, None] + jnp.arange(f)[None]
        return grid_phase(frames, jnp.arange(h // 2), jnp.arange(w // 2), self.cfg.head_dim)

    def embed(
        self, x: Float[Array, "b f h w c"], pose: Float[Array, "b #f h w c"] | None
    ) -> Float[Array, "b f p dim"]:
        """Noise tokens. No pose is a pose of zeros, of which the bias remains, as published; one
        frame of it is that of all."""
        by_frame = lambda tokens, f: rearrange(tokens, "b (f p) dim -> b f p dim", f=f)
        tokens = by_frame(self.patch(patchify(x, PATCH)), x.shape[1])
        if pose is None:
            tokens = tokens + along_last(self.pose.bias[...], tokens)
        else:
            tokens = tokens + by_frame(self.pose(patchify(pose, PATCH)), pose.shape[1])
        return self.placed(tokens) + along_last(self.type_embedding[...][NOISE], tokens)

    def placed(self, tokens: Float[Array, "*b p dim"]) -> Float[Array, "*b p dim"]:
        """With where in the picture they are, for small networks: rotary phases tell attention
        alone, and heads that are drawn are nearly aligned."""
        if self.cfg.places is None:
            return tokens
        place = self.place[...].astype(tokens.dtype)
        return tokens + place.reshape((1,) * (tokens.ndim - 2) + place.shape)

    def velocity(
        self,
        said: Float[Array, "b f h w c"],
        x: Float[Array, "b f h w c"],
        pose: Float[Array, "b #f h w c"] | None,
        sigma: Float[Array, "b f"] | None,
    ) -> Float[Array, "b f h w c"]:
        """Of what the head says. A small network does better by the clean latents: these it can
        say, while noise has more dimensions than it has width (arXiv 2511.13720); and best by
        how they differ from a picture of the same person, which is little where nothing moves.
        Where that is, `spread` says: a head after a norm says as much of all places."""
        if sigma is None:
            return said
        wide = lambda a: a.astype(jnp.float32)
        offset = wide(said)
        if self.cfg.places is not None:
            offset = offset * wide(self.spread[...])[None, None]
        apart = wide(x) - offset - (0.0 if pose is None else wide(pose))
        return (apart / jnp.maximum(sigma, LEAST)[..., None, None, None]).astype(said.dtype)

    def unpatchify(self, x: Float[Array, "b f p k"], h: int, w: int) -> Float[Array, "b f h w c"]:
        return rearrange(
            x, "b f (h w) (p q c) -> b f (h p) (w q) c", h=h // 2, w=w // 2, p=PATCH[1], q=PATCH[2]
        )
