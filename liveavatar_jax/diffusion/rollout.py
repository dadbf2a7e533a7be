"""Self-forcing: the student makes a clip from its own history, and learns block by block.

Of the denoising steps, one is drawn as the exit, for all blocks, rows and hosts alike; what it
predicts is the clip, and only it carries a gradient (arXiv 2506.08009; Live Avatar's algorithm 1).
Noise that goes in, and keys and values that are remembered, carry none. So the gradient is a sum
over blocks, and `replay` takes it one block at a time: the memory of one block, the same numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.lax import stop_gradient

from liveavatar_jax.diffusion.flow import add_noise, clean_from, euler
from liveavatar_jax.types import Array, Float, Int, Key, LiveAvatarError, struct

Memory = Any  # of the student between two blocks: caches, positions, its sink
Flight = Any  # a block on its way, whose noisy latents are `x`


@dataclasses.dataclass(frozen=True)
class Policy:
    """How a training rollout goes; the defaults are what the stream does at inference.

    transition: "ode", the solver's step, or "renoise", the clean prediction with new noise.
    history: "stream", as `StreamConfig.history` has it (each step's own level, or a fixed one
    after a further run, 0 being clean), or "exit", one ring for all steps at the level of the
    exit (the paper's algorithm 1).
    anchor: how often a rollout starts from real latents, noised to the level of one of the steps
    from the second on, which `anchor_steps` weights (DynaForcing, against motion that dies out).
    positions: the first block stands at a random latent frame up to here, as in a longer video.
    exits: how likely each step is to be the exit, all alike by default, as published. A critic
    knows the clips of all exits as one law, so only together do they come to match the teacher's:
    what early exits cannot make, late ones make up for. (0, 0, 0, 1) matches what streams make.
    """

    transition: str = "ode"
    history: str = "stream"
    anchor: float = 0.0
    anchor_steps: tuple[float, ...] = (0.15, 0.70, 0.15)
    positions: int = 0
    exits: tuple[float, ...] | None = None

    def __post_init__(self):
        for field, known in (("transition", ("ode", "renoise")), ("history", ("stream", "exit"))):
            if getattr(self, field) not in known:
                raise LiveAvatarError(
                    f"Policy.{field} = {getattr(self, field)!r} must be one of {', '.join(known)}"
                )
        if not 0 <= self.anchor <= 1:
            raise LiveAvatarError(f"Policy.anchor = {self.anchor} must be a probability")
        if self.positions < 0:
            raise LiveAvatarError(f"Policy.positions = {self.positions} must be at least 0")
        if self.exits is not None and (min(self.exits) < 0 or self.exits[-1] <= 0):
            raise LiveAvatarError(f"Policy.exits = {self.exits} must be weights, the last above 0")


@struct
class Given:
    """What a block is made from. Stacked over the blocks of a rollout."""

    chunk: Any  # what it is to say
    key: Key[Array, ""]  # of the noise between the steps
    clean: Float[Array, "b f h w c"] | None = None  # real latents, for an anchored rollout


@struct
class Steps:
    """Which denoising steps a rollout runs: those from `first`, the last of them is the exit."""

    first: Int[Array, ""]
    exit: Int[Array, ""]


@struct
class Rollout:
    """A clip that a student made, and what `replay` needs of it."""

    x: Float[Array, "b f h w c"]  # the last blocks: those that are scored, and learn
    inputs: Float[Array, "blocks b f h w c"]  # what their exit steps were given
    memory: Memory  # before them, with the ring of the exit step alone
    steps: Steps


@runtime_checkable
class Student(Protocol):
    """A causal generator, one block at a time; every method is a pure function.

    sigma: levels of the steps, and 0 at last.
    own_rings: whether each step has a ring of its own, numbered like the step; else ring 0 holds
    the block as it is after a further run at level `again`, which has the step number `len(sigma)
    - 1`, or, where that is None, as the exit step saw it.
    """

    @property
    def sigma(self) -> Float[Array, " levels"]: ...
    @property
    def own_rings(self) -> bool: ...
    @property
    def again(self) -> float | None: ...

    def enter(self, model: Any, memory: Memory, given: Given) -> tuple[Memory, Flight]:
        """The next block as noise, and the memory with whatever its coming changes."""
        ...

    def live(self, model: Any, memory: Memory, flight: Flight, given: Given) -> Any:
        """Memory and flight with what carries a gradient made anew: text, audio, levels."""
        ...

    def velocity(
        self, model: Any, memory: Memory, flight: Flight, step: Int[Array, ""], ring: Any
    ) -> tuple[Float[Array, "b f h w c"], Any]:
        """Of the block, and the keys and values that it may be remembered by."""
        ...

    def remember(self, memory: Memory, flight: Flight, fresh: Any, ring: Any) -> Memory:
        """The memory with the block in that ring."""
        ...

    def leave(self, memory: Memory, flight: Flight) -> Memory:
        """The memory after a block that is clean now."""
        ...

    def alone(self, memory: Memory, ring: Int[Array, ""]) -> Memory:
        """The memory with that ring alone, as number 0."""
        ...


def draw_steps(policy: Policy, steps: int, key: Key[Array, ""]) -> Steps:
    """The same on all hosts, for the key is: one exit of the steps that run."""
    keys = jax.random.split(key, 3)
    first = jnp.zeros((), jnp.int32)
    if policy.anchor:
        _require_weights("anchor_steps", policy.anchor_steps, steps - 1, "step after the first")
        weights = jnp.log(jnp.asarray(policy.anchor_steps))
        later = 1 + jax.random.categorical(keys[0], weights).astype(jnp.int32)
        first = jnp.where(jax.random.bernoulli(keys[1], policy.anchor), later, first)
    if policy.exits is None:
        return Steps(first=first, exit=jax.random.randint(keys[2], (), first, steps))
    _require_weights("exits", policy.exits, steps, "step")
    likely = jnp.where(jnp.arange(steps) >= first, jnp.log(jnp.asarray(policy.exits)), -jnp.inf)
    return Steps(first=first, exit=jax.random.categorical(keys[2], likely).astype(jnp.int32))


def _require_weights(field: str, weights: tuple[float, ...], count: int, each: str) -> None:
    if len(weights) != count:
        raise LiveAvatarError(
            f"Policy.{field} has {len(weights)} weights and must have {count}, one for each {each}"
        )


def rollout(
    student: Student,
    model: Any,
    memory: Memory,
    given: Given,
    steps: Steps,
    policy: Policy = Policy(),
    *,
    window: int | None = None,
    skip: int | Int[Array, ""] = 0,
) -> Rollout:
    """A clip, block after block.

    given: leads with the blocks. window: how many of the last ones are kept, all by default.
    skip: blocks that are left out at the beginning, for rollouts of a length that varies.

    A gradient into `model` flows through the exit step of the kept blocks and nothing else.
    """
    blocks = given.key.shape[0]
    early = blocks - (blocks if window is None else window)
    frozen = stop_gradient(model)

    def before(j: Int[Array, ""], memory: Memory) -> Memory:
        some = jax.tree.map(lambda a: a[j], given)
        return _block(student, frozen, memory, some, steps, policy)[0]

    if early:
        memory = jax.lax.fori_loop(skip, early, before, memory)
    start = student.alone(memory, steps.exit) if student.own_rings else memory

    def kept(memory: Memory, given: Given) -> tuple[Memory, tuple[Array, Array]]:
        return _block(student, model, memory, given, steps, policy)

    rest = jax.tree.map(lambda a: a[early:], given)
    _, (inputs, x) = jax.lax.scan(kept, memory, rest)
    return Rollout(x=_clip(x), inputs=inputs, memory=start, steps=steps)


def replay(
    student: Student,
    make: Callable[[Any], Any],
    trainable: Any,
    made: Rollout,
    given: Given,
    gradient: Float[Array, "b f h w c"],
    policy: Policy = Policy(),
) -> Any:
    """dL/dtrainable from dL/dx: each block once more, forwards and backwards, before the next.

    make: trainable -> the student's network. given: of the kept blocks. What a block remembers is
    made again on the way, as it was, so nothing but the inputs has to be kept of the rollout.
    """
    frozen = make(stop_gradient(trainable))

    def one(carry: tuple[Memory, Any], at: tuple) -> tuple[tuple[Memory, Any], None]:
        memory, grads = carry
        given, x, cotangent = at
        memory, flight = student.enter(frozen, memory, given)
        flight = dataclasses.replace(flight, x=x)

        def predict(trainable: Any) -> tuple[Array, Any]:
            model = make(trainable)
            return _predict(student, model, memory, flight, given, made.steps.exit, ring=0)

        clean, pull, fresh = jax.vjp(predict, trainable, has_aux=True)
        (more,) = pull(cotangent.astype(clean.dtype))
        grads = jax.tree.map(lambda a, b: a + b.astype(a.dtype), grads, more)
        flight = dataclasses.replace(flight, x=clean)
        memory = _remember(student, frozen, memory, flight, fresh, given, 0)
        return (student.leave(memory, flight), grads), None

    cotangents = _blocks(gradient, len(made.inputs))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), trainable)
    (_, grads), _ = jax.lax.scan(one, (made.memory, zeros), (given, made.inputs, cotangents))
    return grads


def _block(
    student: Student, model: Any, memory: Memory, given: Given, steps: Steps, policy: Policy
) -> tuple[Memory, tuple[Array, Array]]:
    """One block to its exit: the memory after it, what the exit step was given, and its clip."""
    frozen, sigma = stop_gradient(model), student.sigma
    memory, flight = student.enter(frozen, memory, given)
    if given.clean is not None:
        real, level = (a.astype(flight.x.dtype) for a in (given.clean, sigma[steps.first]))
        x = jnp.where(steps.first > 0, add_noise(real, flight.x, level), flight.x)
        flight = dataclasses.replace(flight, x=x)

    def advance(i: Int[Array, ""], carry: tuple[Memory, Flight]) -> tuple[Memory, Flight]:
        memory, flight = carry
        ring = i if student.own_rings else 0
        velocity, fresh = student.velocity(frozen, memory, flight, i, ring)
        if student.own_rings:
            memory = student.remember(memory, flight, fresh, ring)
        if policy.transition == "ode":
            x = euler(flight.x, velocity, sigma[i], sigma[i + 1])
        else:
            noise = jax.random.normal(jax.random.fold_in(given.key, i), flight.x.shape)
            clean = clean_from(flight.x, velocity, sigma[i])
            x = add_noise(clean, noise, sigma[i + 1]).astype(flight.x.dtype)
        return memory, dataclasses.replace(flight, x=x)

    memory, flight = jax.lax.fori_loop(steps.first, steps.exit, advance, (memory, flight))
    ring = steps.exit if student.own_rings else 0
    clean, fresh = _predict(student, model, memory, flight, given, steps.exit, ring)
    inputs, done = flight.x, dataclasses.replace(flight, x=stop_gradient(clean))
    memory = _remember(student, frozen, memory, done, fresh, given, ring)
    return student.leave(memory, done), (inputs, clean)


def _predict(
    student: Student,
    model: Any,
    memory: Memory,
    flight: Flight,
    given: Given,
    step: Int[Array, ""],
    ring: Any,
) -> tuple[Float[Array, "b f h w c"], Any]:
    """The clean block as the exit step sees it, with a gradient into the model alone."""
    memory, flight = student.live(model, stop_gradient(memory), stop_gradient(flight), given)
    velocity, fresh = student.velocity(model, memory, flight, step, ring)
    clean = clean_from(flight.x, velocity, student.sigma[step])
    return clean.astype(flight.x.dtype), stop_gradient(fresh)


def _remember(
    student: Student, frozen: Any, memory: Memory, flight: Flight, fresh: Any, given: Given, ring
) -> Memory:
    """After the exit: its own keys and values, or those of a further run at a fixed level."""
    if student.again is not None:
        noise = jax.random.normal(jax.random.fold_in(given.key, len(student.sigma)), flight.x.shape)
        level = jnp.asarray(student.again, flight.x.dtype)
        again = add_noise(flight.x, noise.astype(flight.x.dtype), level)
        again = dataclasses.replace(flight, x=again)
        last = jnp.asarray(len(student.sigma) - 1)
        _, fresh = student.velocity(frozen, memory, again, last, 0)
    return student.remember(memory, flight, fresh, ring)


def _clip(blocks: Float[Array, "blocks b f h w c"]) -> Float[Array, "b frames h w c"]:
    return rearrange(blocks, "j b f h w c -> b (j f) h w c")


def _blocks(clip: Float[Array, "b frames h w c"], blocks: int) -> Float[Array, "blocks b f h w c"]:
    return rearrange(clip, "b (j f) h w c -> j b f h w c", j=blocks)
