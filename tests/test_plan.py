"""What `plan` counts, reads and prints."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from liveavatar_jax import stream
from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig, to_dict
from liveavatar_jax.models import attention
from liveavatar_jax.parallel.collectives import bytes_by_axes, collectives
from liveavatar_jax.plan import aot, cost
from liveavatar_jax.plan.chips import CHIPS, Chip, chip, gpu_target
from liveavatar_jax.plan.projection import efficiency, project, roofline
from liveavatar_jax.plan.table import Report, to_json, to_text
from liveavatar_jax.types import LiveAvatarError

PUBLISHED = cost.Size(50, 90)
MESH = {"stage": 4, "tensor": 2}

# ---- costs


def one_layer(**dit) -> ModelConfig:
    """XLA counts the body of a loop once, so there is one layer, and one step."""
    dit = DiTConfig(layers=1, inject_layers=(0,), attention="chunked", **dit)
    return ModelConfig(dit=dit, stream=StreamConfig(steps=1, sink_after=None))


def counted(function, *arguments) -> float:
    """By XLA, before it compiles; for a TPU, whose convolutions are written plainly."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",))
    return lowered.cost_analysis()["flops"]  # type: ignore[index]


@pytest.mark.parametrize("cfg, rows", [(one_layer(), 1), (one_layer(dim=512, heads=8), 2)])
def test_operations_are_those_that_xla_counts(cfg, rows, monkeypatch):
    dense = lambda q, k, v, length: attention._plain(q, k, v, None)
    monkeypatch.setitem(attention._IMPLEMENTATIONS, "chunked", dense)  # no loop over heads
    size = cost.Size(48, 48, rows)
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    model = jax.eval_shape(lambda: stream.Avatar(cfg, rngs=nnx.Rngs(0)))
    reference, motion = shape(rows, 1, 48, 48, 16), shape(rows, 19, 48, 48, 16)
    portrait = jax.eval_shape(stream.from_latents, model, reference, motion)
    context, key = shape(rows, 512, cfg.dit.text_dim), jax.eval_shape(jax.random.key, 0)
    state = jax.eval_shape(stream.start, model, portrait, context, key)
    drawn = jax.eval_shape(stream.draw, model, state)
    chunk = stream.Chunk(audio=shape(rows, 1, 12, 25, 1024))

    def near(function, *arguments, **expected):
        (value,) = expected.values()
        assert counted(function, *arguments) == pytest.approx(value.flops, rel=0.02), expected

    near(stream.denoise, model, state, drawn, chunk, forward=cost.forward(cfg, size))
    prefill = lambda model, state: model.dit.prefill(state.first, state.motion, state.text)
    near(prefill, model, state, prefill=cost.prefill(cfg, size))
    near(lambda model, x: model.dit.text(x), model, context, text=cost.text(cfg, size))
    decode = lambda model, state, x: model.vae.decode(x, state.decoder)
    near(decode, model, state, reference, decode=cost.decode_latent(cfg.vae, size))


def test_the_published_stage_costs_what_the_paper_implies():
    """720 x 400: 45 TFLOP of attention to 16,278 keys, and 2 operations a weight and token."""
    total = cost.forward(ModelConfig(), PUBLISHED)
    assert PUBLISHED.sink(motion=True) == 2778
    assert total.flops_attention == pytest.approx(45e12 + 1.4e12, rel=0.02)
    assert total.flops_matrix == pytest.approx(85e12, rel=0.01)
    once = cost.text(ModelConfig(), PUBLISHED).bytes_weights
    dit = jax.eval_shape(lambda: stream.Avatar(ModelConfig(), rngs=nnx.Rngs(0))).dit
    held = sum(2.0 * leaf.size for leaf in jax.tree.leaves(dit))
    assert total.bytes_weights + once == pytest.approx(held, rel=0.02)


def test_a_split_shares_the_work_and_only_tensors_share_the_weights():
    whole = cost.forward(ModelConfig(), PUBLISHED)
    share = whole.split(tensor=2, sequence=4)
    assert share.flops * 8 == pytest.approx(whole.flops)
    assert share.bytes_weights * 2 == pytest.approx(whole.bytes_weights)


def test_sessions_share_the_weights():
    two = cost.forward(ModelConfig(), dataclasses.replace(PUBLISHED, rows=2))
    one = cost.forward(ModelConfig(), PUBLISHED)
    assert two.flops == pytest.approx(2 * one.flops)
    assert two.bytes_weights == one.bytes_weights
    assert two.bytes_cache == pytest.approx(2 * one.bytes_cache)


# ---- chips and projections


def test_the_projection_reproduces_the_paper_on_its_own_chip():
    for weights, fps in (("bf16", 36.0), ("fp8", 45.2)):
        p = project(ModelConfig(), PUBLISHED, chip("h800"), steps=4, weights=weights)
        assert p.fps(p.efficiency) == pytest.approx(fps)
        assert 0.3 < efficiency(weights) < 0.5
    assert p.first_frame(p.efficiency) == pytest.approx(1.21, rel=0.1)  # measured by the paper


@pytest.mark.parametrize("each", CHIPS.values(), ids=CHIPS.keys())
def test_more_sessions_are_slower_and_more_devices_faster(each: Chip):
    def seconds(rows=1, **given) -> float:
        size = dataclasses.replace(PUBLISHED, rows=rows)
        return project(ModelConfig(), size, each, steps=4, **given).tick(1.0)

    assert seconds(tensor=2, decoders=2) < seconds() < seconds(rows=2) < seconds(2, decoders=0)
    total = cost.forward(ModelConfig(), PUBLISHED)
    assert roofline(total, each, sent=1e15).limit == "link"


def test_an_unknown_chip_and_a_slice_too_large_are_refused_by_name():
    with pytest.raises(LiveAvatarError, match="no chip is called 'h900'; choose of h100"):
        chip("h900")
    with pytest.raises(LiveAvatarError, match="no slice of v5e with 1000 chips"):
        chip("v5e").topology(1000)
    assert chip("v5p").topology(5) == "v5p:2x2x2"
    assert chip("h800").topology(5) == "1x1x5"
    assert "core_count: 132" in gpu_target(chip("h100"))


# ---- collectives

GPU = """HloModule jit_f, is_scheduled=true

%body.1 (p: (s32[], bf16[512,1024])) -> (s32[], bf16[512,1024]) {
  %ar = bf16[512,1024]{1,0} all-reduce-start(%x), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%sum
  %done = bf16[512,1024]{1,0} all-reduce-done(%ar)
  %rs = ((bf16[1024,8]{1,0}), bf16[512,8]{1,0}) reduce-scatter-start(%y), replica_groups=[4,2]<=[8], dimensions={0}
}

%yes (p: bf16[64]) -> bf16[64] {
  %a2a = (f32[4]{0}, f32[4]{0}) all-to-all(%a, %b), replica_groups=[2,4]<=[4,2]T(1,0)
}

%never (p: bf16[64]) -> bf16[64] {
  %ag = f32[8]{0} all-gather(%a), replica_groups={}
}

ENTRY %main (a: bf16[64]) -> bf16[64] {
  %w = (s32[], bf16[512,1024]{1,0}) while(%t), condition=%cond, body=%body.1, backend_config={"known_trip_count":{"n":"40"}}
  %c = bf16[64]{0} conditional(%p, %a, %a), true_computation=%yes, false_computation=%no
  %cp = (f8e4m3fn[3,90]{1,0:T(8,128)S(1)}, f8e4m3fn[3,90]{1,0}, u32[]{:S(2)}, u32[]) collective-permute-start(%a), source_target_pairs={{0,2},{2,4},{4,6},{1,3},{3,5},{5,7}}
}
"""  # noqa: E501


def test_every_spelling_is_read():
    reduced, scattered, exchanged, sent = collectives(GPU, MESH)
    assert (reduced.kind, reduced.axes, reduced.times) == ("all-reduce", ("tensor",), 40)
    assert reduced.bytes == 2 * 512 * 1024 and reduced.sent == reduced.bytes and reduced.in_loop
    assert (scattered.bytes, scattered.axes) == (2 * 1024 * 8, ("tensor",))
    assert scattered.groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert (exchanged.bytes, exchanged.axes, exchanged.in_branch) == (32, ("stage",), True)
    assert exchanged.groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert (sent.kind, sent.axes, sent.bytes) == ("collective-permute", ("stage",), 270)
    assert not sent.in_loop and not sent.in_branch and sent.groups[0] == (0, 2)
    half = bytes_by_axes([sent, sent, exchanged], taken=0.5)
    assert half == {("stage",): 540.0 + 0.5 * 32 * 3 / 4}


def test_groups_are_read_in_every_notation_and_never_guessed():
    def groups(text: str):
        line = f"  %a = f32[4]{{0}} all-reduce(%x), replica_groups={text}, to_apply=%sum\n"
        return collectives("ENTRY %m (a: f32[4]) -> f32[4] {\n" + line, MESH)[0].groups

    stages, pairs = ((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 1), (2, 3), (4, 5), (6, 7))
    assert groups("mesh['a'=4,'b'=1,'c'=2] {'c'}") == groups("[4,2]<=[8]") == pairs
    assert groups("mesh['a'=4,'b'=1,'c'=2] {'a'}") == groups("{{0,2,4,6},{1,3,5,7}}") == stages
    assert groups("mesh['a'=4,'c'=2] {'a','c'}") == groups("{}") == (tuple(range(8)),)
    with pytest.raises(LiveAvatarError, match="groups of this collective are not understood"):
        groups("mesh['a'=8] {'a':(2)2}")


def test_a_loop_is_counted_by_its_condition_where_that_tells():
    stated = ', backend_config={"known_trip_count":{"n":"40"}}'
    condition = "%cond (p: s32[]) -> pred[] {\n  %c = s32[]{:T(128)} constant(7)\n}\n"
    assert collectives(GPU.replace(stated, "") + condition, MESH)[0].times == 7
    unknown = collectives(GPU.replace(stated, ""), MESH)[0]
    assert unknown.times is None and unknown.in_loop
    assert bytes_by_axes([unknown]) == {("tensor",): 0.0}


def test_collectives_of_a_compiled_program():
    mesh = jax.make_mesh((4, 2), ("stage", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def tick(x, w):
        x = jax.lax.fori_loop(0, 5, lambda i, x: jax.lax.psum(x @ w, "tensor") / 2, x)
        return jax.lax.ppermute(jax.lax.all_gather(x, "tensor", tiled=True), "stage", ring)

    specs = {"in_specs": (P("stage"), P()), "out_specs": P("stage"), "check_vma": False}
    mapped = jax.jit(jax.shard_map(tick, mesh=mesh, **specs))
    found = collectives(mapped.lower(jnp.ones((8, 3)), jnp.ones((3, 3))).compile().as_text(), MESH)
    assert sorted((c.kind, c.axes, c.bytes, c.times) for c in found) == [
        ("all-gather", ("tensor",), 2 * 24, 1),
        ("all-reduce", ("tensor",), 24, 5),
        ("collective-permute", ("stage",), 48, 1),
    ]
    assert all(np.array_equal(np.unique(c.groups), np.arange(8)) for c in found)


# ---- ahead of time, and the table


def compiled(name: str, program: str, **request) -> aot.Compiled:
    target = chip(name)
    if not aot.installed(target):
        pytest.skip(f"the compiler for {name} is not installed; it comes with the extra `plan`")
    small = ModelConfig.tiny()
    dit = dataclasses.replace(small.dit, attention="chunked")
    config = to_dict(dataclasses.replace(small, dit=dit))
    builder = f"liveavatar_jax.plan.programs:{program}"
    return aot.compile_ahead(builder, target, 1, config=config, height=8, width=8, **request)


@pytest.mark.parametrize("name", ["h100", "v5e"])
def test_a_tick_compiles_for_a_chip_that_is_not_there(name: str):
    memory = compiled(name, "denoise").memory
    assert memory is not None
    assert memory.parts["ring"] == 2 * 3 * (4 * 3 * 16) * 128 * 4  # keys, values; 3 layers; float32
    assert sum(memory.parts.values()) <= memory.arguments < memory.peak


def test_what_does_not_compile_is_one_sentence():
    with pytest.raises(LiveAvatarError, match="does not compile for h100"):
        compiled("h100", "no_such_program")


def test_a_missing_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setattr(aot, "installed", lambda target: False)
    with pytest.raises(LiveAvatarError, match=r"libtpu is not installed.*liveavatar-jax\[plan\]"):
        aot.compile_ahead("liveavatar_jax.plan.programs:denoise", chip("v5p"), 1)


def test_table_and_json_say_the_same():
    memory = aot.Memory(50 * 2**30, 0, 2**30, {"weights": 30 * 2**30, "ring": 10 * 2**30})
    stage = aot.Compiled(memory, None, tuple(collectives(GPU, MESH)), 1.0)
    refused = aot.Compiled(None, 99 * 2**30, (), 1.0)
    total = cost.forward(ModelConfig(), PUBLISHED)
    p = project(ModelConfig(), PUBLISHED, chip("h800"), steps=4)
    report = Report(
        chip("h800"), MESH, (720, 400), "bf16", {"stage": stage, "decoder": refused},
        {"stage": total}, [p],
    )  # fmt: skip
    text, values = to_text(report), json.loads(json.dumps(to_json(report)))
    for words in ("fits 79.1", "99.0  does not fit", "collective-permute", "85.0", "36.0"):
        assert words in text
    assert values["compiled"]["stage"]["fits"] and not values["compiled"]["decoder"]["fits"]
    assert values["projections"][0]["projected"]["fps"] == pytest.approx(36.0)
