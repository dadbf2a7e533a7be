"""What `plan` counts, reads and prints."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from liveavatar_jax import stream
from liveavatar_jax.cli import main
from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig, VAEConfig, to_dict
from liveavatar_jax.models import attention
from liveavatar_jax.parallel.collectives import bytes_by_axes, collectives
from liveavatar_jax.plan import aot, cost
from liveavatar_jax.plan.chips import CHIPS, Chip, chip, gpu_target
from liveavatar_jax.plan.projection import efficiency, project, roofline
from liveavatar_jax.plan.report import Request, plan
from liveavatar_jax.plan.table import to_json, to_text
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


# Small presets' coder, wide enough for products to outweigh motion, which is not counted.
CELLS = dataclasses.replace(
    one_layer(dim=512, heads=8), vae=VAEConfig(dim=256, cells=3, grid=(48, 48))
)


@pytest.mark.parametrize("cfg, rows", [
    (one_layer(), 1), (one_layer(dim=512, heads=8), 2), (CELLS, 1)
])  # fmt: skip
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
    assert bytes_by_axes([sent, exchanged]) == {("stage",): 270.0}  # no loop, so a sink's refresh
    exchanged = dataclasses.replace(exchanged, in_loop=True)
    half = bytes_by_axes([sent, sent, exchanged], taken=0.5)
    assert half == {("stage",): 540.0 + 0.5 * 32 * 3 / 4}


def test_groups_are_read_in_every_notation_and_never_guessed():
    def groups(text: str):
        line = f"  %a = f32[4]{{0}} all-reduce(%x), replica_groups={text}, to_apply=%sum\n"
        return collectives("ENTRY %m (a: f32[4]) -> f32[4] {\n" + line, MESH)[0].groups

    stages, pairs = ((0, 2, 4, 6), (1, 3, 5, 7)), ((0, 1), (2, 3), (4, 5), (6, 7))
    assert groups("mesh['a'=4,'b'=1,'c'=2] {'c'}") == groups("[4,2]<=[8]") == pairs
    assert groups("mesh['a'=4,'b'=1,'c'=2] {'a'}") == groups("{{0,2,4,6},{1,3,5,7}}") == stages
    turned = groups("mesh['a'=4,'c'=2], device_ids=([2,4]T(1,0)) {'c'}")
    assert turned == ((0, 4), (1, 5), (2, 6), (3, 7))
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


# ---- the programs, ahead of time


def compiled(name: str, program: str) -> aot.Compiled:
    """Of a tiny pipeline of two stages."""
    target = chip(name)
    if not aot.installed(target):
        pytest.skip(f"the compiler for {name} is not installed; it comes with the extra `plan`")
    small, kernel = ModelConfig.tiny(), "pallas" if target.platform == "tpu" else "chunked"
    dit = dataclasses.replace(small.dit, attention=kernel, layers=1, inject_layers=(0,))
    cfg = dataclasses.replace(small, dit=dit, stream=StreamConfig(steps=2))
    asked = {"mesh": "stage=2,vae=1", "size": [8, 8], "rows": 1, "weights": "int8"}
    builder = f"liveavatar_jax.plan.programs:{program}"
    return aot.compile_ahead(builder, target, 3, config=to_dict(cfg), **asked)


@pytest.mark.parametrize("name", ["h100", "v5e"])
def test_a_tick_compiles_for_chips_that_are_not_there(name: str):
    tick = compiled(name, "stage")
    memory = tick.memory
    assert memory is not None
    assert memory.parts["ring"] == 2 * (4 * 3 * 16) * 128 * 2  # of one stage, in bfloat16
    assert sum(memory.parts.values()) <= memory.arguments < memory.peak
    assert {(each.kind, each.axes) for each in tick.collectives} == {
        ("collective-permute", ("stage",))
    }


def test_what_does_not_compile_is_one_sentence():
    with pytest.raises(LiveAvatarError, match="does not compile for h100"):
        compiled("h100", "no_such_program")


def test_a_missing_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setattr(aot, "installed", lambda target: False)
    with pytest.raises(LiveAvatarError, match=r"libtpu is not installed.*liveavatar-jax\[plan\]"):
        plan(Request(chip="v5p"))


def test_a_compiler_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(aot, "installed", lambda target: True)
    with pytest.raises(LiveAvatarError, match=r"for h100 took longer than 0 s; .* more time"):
        plan(Request(chip="h100", timeout=0.01))


# ---- the command


def test_what_is_counted_is_what_a_stage_holds():
    sizes = cost.held(ModelConfig(), PUBLISHED, tensor=2)
    assert sizes["ring"] == 4 * 40 * 13_500 * 5120 / 2
    assert sizes["weights"] * 2 == pytest.approx(32e9, rel=0.02)


def test_the_command_counts_without_a_device(tmp_path):
    """In a process of its own, which would fail if it started a backend."""
    file = tmp_path / "plan.json"
    line = f"plan --no-compile --sessions 1 2 --mesh stage=3,tensor=2 --json {file}".split()
    line += ["--set", "dit.layers=60", "stream.block_frames=2"]
    asked = f"import sys; from liveavatar_jax.cli import main; sys.exit(main({line}))"
    alone = os.environ | {"JAX_PLATFORMS": "no_such_platform"}
    done = subprocess.run([sys.executable, "-c", asked], env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    values = json.loads(file.read_text())
    rows = [(p["steps"], p["sessions"]) for p in values["projections"]]
    assert rows == [(steps, n) for steps in (2, 3, 4) for n in (1, 2)]
    assert values["held"]["ring"] == 4 * 60 * 9_000 * 5120 / 2
    assert values["projections"][0]["frames"] == 8
    assert "h800, stage=3,tensor=2, 720x400, bf16 weights" in done.stdout
    assert f"{values['projections'][1]['projected']['fps']:.1f}" in done.stdout


@pytest.mark.parametrize(
    "line, words",
    [
        ("--chip h900", "no chip is called 'h900'; choose of h100"),
        ("--mesh stage=4,tensor=3", "tensor x sequence = 3 x 1 does not divide the 40"),
        ("--mesh stage=4,vae=7", "vae = 7 does not divide the 90 latent columns"),
        ("--set dit.layer=60", "ModelConfig.dit has no field 'layer', did you mean 'layers'?"),
        ("--set ditt.layers=60", "--set 'ditt.layers=60' is not understood"),
        ("--set dit.layers=many", "ModelConfig.dit.layers = 'many' must be int"),
        ("--set stream.steps=2", "stage = 4 does not match the 2 denoising steps"),
        ("--size 700*400", "--size '700*400' must be WIDTH*HEIGHT in multiples of 16"),
        ("--sessions 0", "--sessions must be at least 1"),
        ("--json /", "/: cannot be written"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(line: str, words: str, capsys):
    assert main(["plan", "--no-compile", *line.split()]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_program_too_large_for_the_chip_is_a_verdict(monkeypatch):
    refused = aot.Compiled(None, 99 * 2**30, (), 1.0)
    monkeypatch.setattr("liveavatar_jax.plan.report.compile_ahead", lambda *a, **k: refused)
    found = plan(Request(chip="v6e", mesh="stage=4,tensor=2"))
    assert not found.fits(1)
    assert "99.00  does not fit" in to_text(found)


def test_table_and_json_say_the_same(monkeypatch):
    memory = aot.Memory(50 * 2**30, 0, 2**30, {"weights": 30 * 2**30, "ring": 10 * 2**30})
    stage = aot.Compiled(memory, None, tuple(collectives(GPU, MESH)), 1.0)
    monkeypatch.setattr("liveavatar_jax.plan.report.compile_ahead", lambda *a, **k: stage)
    found = plan(Request(sessions=[1, 2], steps=[4]))
    text, values = to_text(found), json.loads(json.dumps(to_json(found)))
    for words in ("fits 79.1", "collective-permute", "85.0", "36.0"):
        assert words in text
    one, two = values["projections"]
    assert values["compiled"]["stage"]["fits"] and one["fits"]
    # The session that is being opened (20 GiB) and the others; the largest temporaries.
    assert (one["memory"], two["memory"]) == (71 * 2**30, 92 * 2**30)
    assert not two["fits"]
    assert one["projected"]["fps"] == pytest.approx(36.0, rel=0.02)


# ---- the first frame


def test_enough_warm_blocks_and_playback_never_waits():
    """Against a clock that counts every frame: one block fewer would stall."""
    p = project(ModelConfig(), PUBLISHED, chip("h800"), steps=4)
    share = p.efficiency
    enough = p.warm_blocks(share)
    assert enough is not None and enough > 1

    def stalls(warm: int) -> bool:
        assert p.opening is not None
        tick, opening = p.tick(share), p.steps * p.opening.at(share)
        late, clock = False, opening
        for k in range(60):
            ready = (k + 1) * opening if k < warm else warm * opening + (k - warm + p.steps) * tick
            renewed = p.refresh.at(share)
            if warm <= 4:  # of the ticks until then, at most one a stage renews its sink
                ready += renewed * min(max(k + p.steps - 4, 0), p.steps) * (k >= warm)
            elif k >= 4:
                ready += renewed / p.steps
            late |= k >= warm and ready > clock + 1e-9
            clock = max(clock, ready) + (9 if k == 0 else 12) / 25
        return late

    assert not stalls(enough) and stalls(enough - 1)
    assert project(ModelConfig(), PUBLISHED, chip("v5e"), steps=4).warm_blocks(share) is None
    three = project(ModelConfig(), PUBLISHED, chip("h800"), steps=3)
    assert three.first_frame_warm(share) is None  # 40 heads do not part over 3 stages
