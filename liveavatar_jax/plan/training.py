"""What a training step costs, counted from the experiment: operations of each of its phases.

Two numbers a phase. `model` is what the mathematics asks for: products with the keys that a block
may see, forwards once, backwards for what a gradient needs. `again` is computed a second time:
layers under `remat`, a flash kernel's scores, and the forward of the block-wise replay, whose
result the rollout had already. Model-FLOP utilisation is model / (seconds · devices · peak).

A product costs once more for the gradient of its input, and once more for that of its weights.
With adapters the weights are frozen, so their products cost that of the input alone.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from liveavatar_jax.config import DiTConfig, ModelConfig
from liveavatar_jax.data.records import Shapes
from liveavatar_jax.diffusion.losses import TeacherForcing
from liveavatar_jax.plan import cost
from liveavatar_jax.plan.cost import Cost, Size
from train.experiment import Distill, Forcing


@dataclasses.dataclass(frozen=True)
class Phase:
    """Of one row of the batch."""

    model: Cost
    again: Cost = dataclasses.field(default_factory=Cost)

    @property
    def run(self) -> Cost:
        """All that devices do."""
        return self.model + self.again

    def __add__(self, other: "Phase") -> "Phase":
        return Phase(self.model + other.model, self.again + other.again)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What of an experiment its cost depends on.

    frames: latent frames of a clip; blocks: of a rollout, of which the last `window` are scored
    (default: all); passes: forwards of the teacher; rank: of the adapters, None for whole
    networks; clean: teacher forcing, whose sequence is twice as long.
    """

    frames: int
    rank: int | None = 128
    remat: str = "full"
    passes: int = 2
    blocks: int | None = None
    window: int | None = None
    clean: bool = False
    one_ring: bool = False  # all steps share one, as in the paper's algorithm 1


def recipe(exp: Forcing, shapes: Shapes) -> Recipe:
    """That of an experiment on records of these shapes. Variants with a discriminator, a reward
    or a gradient through the teacher cost more than is counted here."""
    found = Recipe(
        frames=shapes.f,
        rank=None if exp.adapters is None else exp.adapters.rank,
        remat=exp.model.dit.remat,
        clean=isinstance(exp.objective, TeacherForcing),
    )
    if not isinstance(exp, Distill):
        return found
    objective: Any = exp.objective
    while hasattr(objective, "objective"):  # Rewarded, Adversarial
        objective = objective.objective
    guidance = getattr(objective, "guidance", None)
    return dataclasses.replace(
        found,
        passes=1 if guidance is None else guidance.passes,
        blocks=exp.blocks,
        window=exp.window,
        one_ring=exp.policy.history == "exit",
    )


def model_flops(exp: Forcing, shapes: Shapes) -> dict[str, dict[str, float]]:
    """Of each step of an experiment, the model FLOPs of its phases on all devices together."""
    counts = (
        {"student": student, "critic": critic} if isinstance(exp, Distill) else {"step": forcing}
    )
    size, of = Size(shapes.h, shapes.w), recipe(exp, shapes)
    return {
        name: {phase: each.model.flops * exp.data.batch
               for phase, each in count(exp.model, size, of).items()}
        for name, count in counts.items()
    }  # fmt: skip


def forcing(cfg: ModelConfig, size: Size, recipe: Recipe) -> dict[str, Phase]:
    """The step of stage 1: a clip block-causally, forwards and backwards."""
    forward, adapters = causal(cfg, size, recipe)
    return {"clip": trained(forward, adapters, recipe)}


def student(cfg: ModelConfig, size: Size, recipe: Recipe) -> dict[str, Phase]:
    """The student's step of stage 2. Of the denoising steps, half of the later ones are run."""
    window = recipe.window or _blocks(cfg, recipe)
    scored = dataclasses.replace(recipe, frames=window * cfg.stream.block_frames)
    forward, adapters = _sum(block(cfg, size, recipe, j) for j in _last(cfg, recipe, window))
    learning = trained(forward, adapters, recipe)
    once, extra = forward + adapters, cost.prefill(cfg, size) * _renewals(cfg, recipe)
    replay = Phase(learning.model + once * -1.0, learning.again + once + extra)
    score, score_adapters = bidirectional(cfg, size, scored)
    return {
        "rollout": Phase(rollout(cfg, size, recipe)),
        "teacher": Phase(score * recipe.passes),
        "critic": Phase(score + score_adapters),
        "replay": replay,
    }


def critic(cfg: ModelConfig, size: Size, recipe: Recipe) -> dict[str, Phase]:
    """The critic's step of stage 2: a rollout, and one forward and backward of the critic."""
    window = recipe.window or _blocks(cfg, recipe)
    scored = dataclasses.replace(recipe, frames=window * cfg.stream.block_frames)
    return {
        "rollout": Phase(rollout(cfg, size, recipe)),
        "critic": trained(*bidirectional(cfg, size, scored), recipe),
    }


def total(phases: Mapping[str, Phase]) -> Phase:
    return sum(phases.values(), Phase(Cost()))


# ---- forwards: what the network costs, and what its adapters add


def rollout(cfg: ModelConfig, size: Size, recipe: Recipe) -> Cost:
    """Without a gradient; adapters included. Steps until the exit, which is drawn uniformly."""
    steps = (cfg.stream.steps + 1) / 2 + (cfg.stream.history is not None and not recipe.one_ring)
    forward, adapters = _sum(block(cfg, size, recipe, j) for j in range(_blocks(cfg, recipe)))
    sinks = cost.prefill(cfg, size) * (1 + _renewals(cfg, recipe))
    return (forward + adapters) * steps + sinks + cost.text(cfg, size)


def block(cfg: ModelConfig, size: Size, recipe: Recipe, number: int) -> tuple[Cost, Cost]:
    """One denoising step of block `number` of a rollout."""
    dit, tokens = cfg.dit, cfg.stream.block_frames * size.frame
    seen = min(number + 1, cfg.stream.ring_blocks) * tokens + size.sink(cfg.stream.motion)
    return _forward(dit, size, tokens, [(tokens, seen)], tokens), _adapters(
        dit, size, tokens, recipe
    )


def causal(cfg: ModelConfig, size: Size, recipe: Recipe) -> tuple[Cost, Cost]:
    """A whole clip, each block seeing its window and the condition; the condition by itself."""
    dit, own = cfg.dit, cfg.stream.block_frames * size.frame
    sink, blocks = size.sink(cfg.stream.motion), -(-recipe.frames // cfg.stream.block_frames)
    tokens = recipe.frames * size.frame
    pairs = [(own, min(j + 1, cfg.stream.ring_blocks) * own + sink) for j in range(blocks)]
    if recipe.clean:
        tokens, pairs = 2 * tokens, 2 * pairs
    whole = _forward(dit, size, tokens, pairs, tokens) + cost.prefill(cfg, size)
    whole += cost.text(cfg, size)
    return whole, _adapters(dit, size, tokens, recipe) + _adapters(dit, size, sink, recipe, False)


def bidirectional(cfg: ModelConfig, size: Size, recipe: Recipe) -> tuple[Cost, Cost]:
    """A whole clip and its condition, all tokens seeing all."""
    dit, noisy = cfg.dit, recipe.frames * size.frame
    tokens = noisy + size.sink(cfg.stream.motion)
    whole = _forward(dit, size, tokens, [(tokens, tokens)], noisy) + cost.text(cfg, size)
    return whole, _adapters(dit, size, tokens, recipe, heard=noisy)


def trained(forward: Cost, adapters: Cost, recipe: Recipe) -> Phase:
    """A forward and its gradient: twice the products with weights that learn and those of
    attention (four for two), once those with frozen weights."""
    weights = 1.0 if recipe.rank is not None else 2.0
    back = Cost(
        flops_matrix=weights * forward.flops_matrix + 2 * adapters.flops_matrix,
        flops_attention=2 * forward.flops_attention,
        bytes_weights=weights * forward.bytes_weights,
        bytes_cache=2 * forward.bytes_cache,
        bytes_activations=2 * forward.bytes_activations,
    )
    layers = forward + adapters
    scores = Cost(flops_attention=forward.flops_attention / 2)  # within the kernel's backward
    kept = {"none": Cost(), "dots": Cost(flops_attention=forward.flops_attention)}
    return Phase(forward + adapters + back, kept.get(recipe.remat, layers) + scores)


def _forward(
    dit: DiTConfig, size: Size, tokens: int, pairs: list[tuple[int, int]], heard: int
) -> Cost:
    """All layers over `tokens`, of which `heard` are noise, come from latents and hear audio;
    `pairs` are queries and the keys they see."""
    per = dataclasses.replace(size, rows=1)
    patch, frames = 4 * dit.latent_channels, heard // size.frame
    attend = sum((cost.attend(q, seen, dit.dim, 0) for q, seen in pairs), Cost())
    square = cost.linear(per, tokens, dit.dim, dit.dim)
    layer = (
        square * 6
        + attend
        + cost.attend(tokens, dit.text_len, dit.dim, 0)
        + cost.linear(per, tokens, dit.dim, dit.ffn_dim)
        + cost.linear(per, tokens, dit.ffn_dim, dit.dim)
    )
    local = dit.audio_tokens + 1
    injector = (
        cost.linear(per, heard, dit.dim, dit.dim) * 2
        + cost.linear(per, frames * local, dit.dim, dit.dim) * 2
        + cost.linear(per, frames, dit.dim, 2 * dit.dim)
        + cost.attend(heard, local, dit.dim, 0)
    )
    ends = cost.linear(per, heard, patch, dit.dim) + cost.linear(per, heard, dit.dim, patch)
    return ends + layer * dit.layers + injector * len(dit.inject_layers)


def _adapters(
    dit: DiTConfig, size: Size, tokens: int, recipe: Recipe, heard: int | bool = True
) -> Cost:
    """What adapters add on q, k, v, o of both attentions and of the injectors, and on the
    feed-forward; those of the prompt's keys are left out (512 tokens)."""
    if recipe.rank is None:
        return Cost()
    square = 2.0 * recipe.rank * 2 * dit.dim
    wide = 2.0 * recipe.rank * (dit.dim + dit.ffn_dim)
    hearing = tokens if heard is True else int(heard)
    flops = tokens * dit.layers * (6 * square + 2 * wide)
    return Cost(flops_matrix=flops + hearing * len(dit.inject_layers) * 2 * square)


def _blocks(cfg: ModelConfig, recipe: Recipe) -> int:
    return recipe.blocks or -(-recipe.frames // cfg.stream.block_frames)


def _last(cfg: ModelConfig, recipe: Recipe, window: int) -> range:
    blocks = _blocks(cfg, recipe)
    return range(blocks - window, blocks)


def _renewals(cfg: ModelConfig, recipe: Recipe) -> int:
    """How often the sink is made anew in a rollout."""
    after = cfg.stream.sink_after
    return int(after is not None and after < _blocks(cfg, recipe))


def _sum(pairs) -> tuple[Cost, Cost]:
    both = list(pairs)
    return sum((a for a, _ in both), Cost()), sum((b for _, b in both), Cost())
