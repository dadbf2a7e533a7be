"""The stream as the student of a rollout: what learns is what will run, function by function."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from liveavatar_jax import stream
from liveavatar_jax.config import ModelConfig
from liveavatar_jax.diffusion.flow import sampling_levels
from liveavatar_jax.diffusion.rollout import Given, Policy
from liveavatar_jax.models.attention import KV, ONE_DEVICE, KVCache, Layout
from liveavatar_jax.models.audio import PAST
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.stream import Avatar, InFlight, Portrait, StreamState
from liveavatar_jax.types import Array, Float, Int, Key, struct


@struct
class Memory:
    """A stream, and the text that its prompt's keys are made from."""

    state: StreamState
    context: Float[Array, "b t k"]


@struct
class Said:
    """What a block is to say."""

    audio: Float[Array, "b a F layers c"]
    past: Float[Array, "b a P layers c"]  # what was said just before


def said(features: Float[Array, "b a F layers c"], blocks: int, past: str) -> Said:
    """A clip's features by blocks, which lead; `past` is `StreamConfig.audio_past`."""
    audio = rearrange(features, "b a (j F) l c -> j b a F l c", j=blocks)
    before = jnp.repeat(audio[:, :, :, :1], PAST, axis=3)
    if past == "true":
        heard = jnp.concatenate([before[0], features], axis=2)
        size = audio.shape[3]
        before = jnp.stack([heard[:, :, j * size : j * size + PAST] for j in range(blocks)])
    return Said(audio=audio, past=before)


@dataclasses.dataclass(frozen=True)
class Streamed:
    """A `rollout.Student`: a causal DiT that streams as `cfg.stream` says."""

    cfg: ModelConfig
    policy: Policy
    layout: Layout = ONE_DEVICE

    @property
    def sigma(self) -> Float[Array, " levels"]:
        return jnp.asarray(sampling_levels(self.cfg.stream.steps, self.cfg.stream.shift))

    @property
    def own_rings(self) -> bool:
        return self.cfg.stream.history is None and self.policy.history == "stream"

    @property
    def again(self) -> float | None:
        return self.cfg.stream.history if self.policy.history == "stream" else None

    def start(
        self,
        model: CausalDiT,
        reference: Float[Array, "b 1 h w c"],
        motion: Float[Array, "b m h w c"],
        context: Float[Array, "b t k"],
        key: Key[Array, ""],
    ) -> Memory:
        """The stream before its first block, at a random place in its video if so wanted."""
        dtype = self.cfg.stream.dtype
        model = jax.lax.stop_gradient(model)
        reference, motion, context = (a.astype(dtype) for a in (reference, motion, context))
        keys = jax.random.split(key)
        position = jax.random.randint(keys[0], (len(reference),), 0, self.policy.positions + 1)
        portrait = Portrait(reference=reference, motion=motion, decoder=None)  # type: ignore[arg-type]
        state = stream.start(
            self._avatar(model), portrait, context, keys[1], position=position, layout=self.layout
        )
        ring = state.cache.ring
        if not self.own_rings:  # whatever the stream has at inference
            ring = jax.tree.map(lambda a: a[:1], ring)
        kept = KVCache(ring=self.layout.kept(ring), sink=self.layout.kept(state.cache.sink))
        return Memory(state=dataclasses.replace(state, cache=kept), context=context)

    def enter(self, model: CausalDiT, memory: Memory, given: Given) -> tuple[Memory, InFlight]:
        avatar, state = self._avatar(model), memory.state
        chunk = stream.Chunk(audio=given.chunk.audio)
        state, flight = stream.enter(avatar, state, stream.draw(avatar, state), chunk)
        sink = stream.refreshed(avatar, state, flight, self.layout)
        return _with(memory, state, KVCache(ring=state.cache.ring, sink=sink)), flight

    def live(
        self, model: CausalDiT, memory: Memory, flight: InFlight, given: Given
    ) -> tuple[Memory, InFlight]:
        audio = given.chunk.audio
        before = jnp.repeat(audio[:, :, :1], PAST, axis=2)  # also where early blocks are left out
        first = (flight.block == 0)[:, None, None, None, None]
        heard = jnp.concatenate([jnp.where(first, before, given.chunk.past), audio], axis=2)
        audio = model.audio(heard.astype(self.cfg.stream.dtype))
        levels = stream.levels_of(self.cfg.stream, model, len(heard))
        text = model.text(memory.context)
        state = dataclasses.replace(memory.state, levels=levels, text=text)
        return dataclasses.replace(memory, state=state), dataclasses.replace(flight, audio=audio)

    def velocity(
        self,
        model: CausalDiT,
        memory: Memory,
        flight: InFlight,
        step: Int[Array, ""],
        ring: int | Int[Array, ""],
    ) -> tuple[Float[Array, "b f h w c"], KV]:
        state = memory.state
        level = jax.tree.map(lambda a: a[step], state.levels)
        avatar = self._avatar(model)
        return stream.forward(avatar, state.cache, state, flight, level, step, ring, self.layout)

    def remember(
        self, memory: Memory, flight: InFlight, fresh: KV, ring: int | Int[Array, ""]
    ) -> Memory:
        cache = self.layout.append(memory.state.cache, fresh, ring, flight.block, flight.live)
        return _with(memory, memory.state, cache)

    def leave(self, memory: Memory, flight: InFlight) -> Memory:
        first = stream.own_first(memory.state.first, flight)
        state = dataclasses.replace(memory.state, first=first)
        return dataclasses.replace(memory, state=state)

    def alone(self, memory: Memory, ring: Int[Array, ""]) -> Memory:
        cache = memory.state.cache
        one = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, ring, 0), cache.ring)
        return _with(memory, memory.state, KVCache(ring=one, sink=cache.sink))

    def _avatar(self, dit: CausalDiT) -> Avatar:
        avatar = jax.eval_shape(lambda: Avatar(self.cfg, rngs=nnx.Rngs(0)))
        avatar.dit, avatar.vae = dit, None
        return avatar


def _with(memory: Memory, state: StreamState, cache: KVCache) -> Memory:
    return dataclasses.replace(memory, state=dataclasses.replace(state, cache=cache))
