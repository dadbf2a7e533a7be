"""What a training step costs and needs, counted and compiled, and the command that says it."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from liveavatar_jax.cli import main
from liveavatar_jax.config import DiTConfig, ModelConfig, StreamConfig
from liveavatar_jax.models import attention, clip, lora
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.parallel.collectives import collectives
from liveavatar_jax.parallel.mesh import TrainMesh
from liveavatar_jax.plan import aot, pod, steps, training
from liveavatar_jax.plan.chips import chip
from liveavatar_jax.plan.cost import Cost, Size
from liveavatar_jax.plan.podtable import to_json, to_text
from liveavatar_jax.plan.training import Recipe, total
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.wan import LORA_TARGETS
from tests.test_plan import counted

ROOT = Path(__file__).resolve().parents[1]
DISTILL, FORCING = (str(ROOT / "configs" / f"{stage}_pod.py") for stage in ("distill", "forcing"))
PUBLISHED, PETA = Size(50, 90), 1e15

# ---- costs


class Filled(Size):
    """Condition tokens as the bidirectional forward runs them: in whole frames."""

    def sink(self, motion: bool) -> int:
        return -(-super().sink(motion) // self.frame) * self.frame


@pytest.mark.parametrize("kind", ["causal", "bidirectional"])
def test_operations_are_those_that_xla_counts(kind: str, monkeypatch):
    """With one layer, for XLA counts the body of a loop once. Of the gradient: with respect to the
    inputs, too, for the only layer would else be the one whose inputs need none."""
    dense = lambda q, k, v, length: attention._plain(q, k, v, None)
    monkeypatch.setitem(attention._IMPLEMENTATIONS, "chunked", dense)
    dit = DiTConfig(dim=512, heads=8, layers=1, inject_layers=(0,), attention="chunked")
    cfg = ModelConfig(dit=dit, stream=StreamConfig(ring_blocks=1))
    size = Size(32, 32) if kind == "causal" else Filled(32, 32)
    shapes = Recipe(frames=6, rank=32, remat="none")
    model = jax.eval_shape(lambda: CausalDiT(dit, rngs=nnx.Rngs(0)))
    factors = jax.eval_shape(lambda: lora.init(model, LORA_TARGETS, 32, key=jax.random.key(0)))
    shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    x, reference, motion = (
        shape(1, 6, 32, 32, 16),
        shape(1, 1, 32, 32, 16),
        shape(1, 19, 32, 32, 16),
    )
    text, audio = shape(1, 512, dit.text_dim), shape(1, 1, 24, 25, 1024)

    def forward(factors, x, reference, motion, text):
        net = lora.attach(model, factors, 0.5)
        given = clip.condition(net, reference, motion, text, jnp.zeros(audio.shape, audio.dtype))
        if kind == "causal":
            sigma = jnp.ones((1, 6))
            y = clip.causal(net, x, sigma, given, block_frames=3, window=1)
        else:
            y = clip.bidirectional(net, x, jnp.ones(1), given)
        return y.astype(jnp.float32).sum()

    model = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), model)
    given = (factors, x, reference, motion, text)
    whole, adapters = getattr(training, kind)(cfg, size, shapes)
    assert counted(forward, *given) == pytest.approx((whole + adapters).flops, rel=0.02)
    if kind == "bidirectional":
        every = tuple(range(len(given)))
        both = lambda *given: jax.value_and_grad(forward, argnums=every)(*given)
        expected = training.trained(whole, adapters, shapes).model.flops
        assert counted(both, *given) == pytest.approx(expected, rel=0.03)


def test_the_published_size_costs_what_was_derived_for_it():
    """720 x 400, 21 latents: 1.20 PFLOP both ways, 0.136 a block, 8.8 and 6.0 a step of whole
    networks (the forward of the replay included, kernels' own recomputation not)."""
    cfg, whole = ModelConfig(), Recipe(frames=21, rank=None, remat="none")
    both_ways, _ = training.bidirectional(cfg, PUBLISHED, whole)
    assert both_ways.flops == pytest.approx(1.20 * PETA, rel=0.05)
    block, _ = training.block(cfg, PUBLISHED, whole, 6)
    assert block.flops == pytest.approx(0.136 * PETA, rel=0.05)
    student, critic = (total(count(cfg, PUBLISHED, whole)).model.flops
                       for count in (training.student, training.critic))  # fmt: skip
    again = 7 * block.flops
    assert student + again == pytest.approx(8.8 * PETA, rel=0.05)
    assert critic == pytest.approx(6.0 * PETA, rel=0.05)


def test_frozen_weights_halve_the_backward_of_their_products():
    forward = Cost(flops_matrix=10.0, flops_attention=4.0)
    adapters = Cost(flops_matrix=1.0)
    frozen = training.trained(forward, adapters, Recipe(frames=3, rank=8, remat="none"))
    assert frozen.model.flops == (10 + 4 + 1) + (10 + 8 + 2)
    assert frozen.again.flops == 2  # scores
    whole = training.trained(forward, Cost(), Recipe(frames=3, rank=None, remat="full"))
    assert whole.model.flops == 3 * 14
    assert whole.again.flops == 14 + 2


def test_a_window_is_scored_and_learns_alone():
    cfg = ModelConfig()
    long = Recipe(frames=60, blocks=20, window=7)
    scored = training.student(cfg, PUBLISHED, long)
    short = training.student(cfg, PUBLISHED, Recipe(frames=21))
    assert scored["teacher"].model.flops == short["teacher"].model.flops
    assert scored["rollout"].model.flops > 2.8 * short["rollout"].model.flops


def test_the_utilisation_counts_all_devices():
    exp = steps.experiment(DISTILL, None, ())
    shapes = steps.shapes(exp, (50, 90))
    counts = training.model_flops(exp, shapes)
    once = total(training.student(exp.model, PUBLISHED, training.recipe(exp, shapes))).model.flops
    assert sum(counts["student"].values()) == pytest.approx(64 * once)
    assert set(counts) == {"student", "critic"}


# ---- pods


def test_a_pod_is_what_was_written():
    assert pod.parse("v5p:4x4x8", 1) == pod.Pod(chip("v5p"), 128)
    assert pod.parse("v6e:8x8", 2) == pod.Pod(chip("v6e"), 128, slices=2)
    assert pod.parse("h100:8x8", 1) == pod.parse("h100:64", 1) == pod.Pod(chip("h100"), 64)


def test_links_are_as_fast_as_what_they_join():
    hosts, slices = pod.parse("h100:64", 1), pod.parse("v5p:4x4x4", 2)
    assert hosts.rate([(0, 1, 2, 3)]) == 450e9
    assert hosts.rate([(0, 8, 16)]) == 50e9  # one of each host: one network card
    assert hosts.rate([range(16)]) == 400e9  # eight side by side
    assert slices.rate([range(64)]) == 200e9
    assert slices.rate([(0, 64)]) == 6.2e9


@pytest.mark.parametrize(
    "line, words",
    [
        ("--topology v5p:64", "--topology 'v5p:64': v5p is listed as 2x2x1, 2x2x2"),
        ("--topology v5p", "--topology 'v5p' is not understood; write v5p:4x4x4"),
        ("--topology v7:2x2", "no chip is called 'v7'"),
        ("--topology v6e:16x16", "mesh fsdp=64 has 64 devices, and v6e:16x16 has 256"),
        ("--mesh fsdp=16,sequence=4", "data x fsdp = 1 x 16 does not divide the 24 rows"),
        ("--mesh stage=4", "'stage=4' is not understood; write each of data, fsdp"),
        ("--set data.batches=4", "'batches', did you mean 'batch'?"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(line: str, words: str, capsys):
    more = ["--set", "data.batch=24"] if "sequence" in line else []
    assert main(["plan", "--no-compile", "--train", DISTILL, *line.split(), *more]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_config_that_is_not_there_is_refused(capsys):
    assert main(["plan", "--no-compile", "--train", "configs/none.py"]) == 2
    assert "configs/none.py is not there" in capsys.readouterr().err


# ---- the command

TEXT = """ENTRY %main (a: bf16[64]) -> bf16[64] {
  %w = (s32[], bf16[512,1024]{1,0}) while(%t), condition=%cond, body=%body.1
}

%body.1 (p: (s32[], bf16[512,1024])) -> (s32[], bf16[512,1024]) {
  %ag = bf16[40,5120,5120]{2,1,0} all-gather(%x), replica_groups=[1,64]<=[64], dimensions={0}
}
"""


def test_table_and_json_say_the_same(monkeypatch, tmp_path, capsys):
    """And loops whose count depends on data run as often as a rollout does on average."""
    asked = []

    def compiled(*given, **request) -> aot.Compiled:
        asked.append(request)
        memory = aot.Memory(2 * 2**30, 0, 50 * 2**30, {"base": 2**30}, host=3 * 2**30)
        found = collectives(TEXT, TrainMesh(fsdp=64).shape, request["loops"])
        return aot.Compiled(memory, None, tuple(found), 1.0)

    monkeypatch.setattr(pod, "compile_ahead", compiled)
    file = tmp_path / "plan.json"
    line = f"plan --train {DISTILL} --topology v5p:4x4x4 --json {file}".split()
    assert main(line) == 0
    said, values = capsys.readouterr().out, json.loads(file.read_text())
    assert [each["step"] for each in asked] == ["student", "critic"]
    assert {each["kernel"] for each in asked} == {"pallas"}
    for name, step in values["steps"].items():
        assert step["fits"] and step["peak"] == 52 * 2**30, name
        sent = 1.5 * 2 * 40 * 5120**2 * 63 / 64
        assert step["sent"] == {"fsdp": pytest.approx(sent)}
        assert step["links"] == pytest.approx(sent / 200e9)
        assert f"{step['utilisation'][0]:.1%}" in said
    assert "fits 95.7" in said and "fsdp  all-gather" in said
    assert "in the host's memory" in said
    assert "One update of the student with 5 of the critic" in said


def test_what_is_too_large_is_a_verdict(monkeypatch):
    refused = aot.Compiled(None, 99 * 2**30, (), 1.0)
    monkeypatch.setattr(pod, "compile_ahead", lambda *a, **k: refused)
    found = pod.plan(pod.Request(config=FORCING))
    assert not found.steps["step"].fits
    assert "99.00  does not fit" in to_text(found)
    assert to_json(found)["steps"]["step"]["fits"] is False


def test_a_step_compiles_for_gpus_that_are_not_there():
    if not aot.installed(chip("h100")):
        pytest.skip("the compiler for h100 is not installed; it comes with the extra `plan`")
    config = str(ROOT / "configs" / "distill_tiny.py")
    changes = ("model.dit.layers=1", "model.dit.inject_layers=[0]", "model.dit.remat=offload")
    request = pod.Request(config, "h100:4", "fsdp=2,sequence=2", changes)
    exp = steps.experiment(config, request.mesh, changes)
    critic = pod._step(request, exp, pod.parse("h100:4", 1), steps.shapes(exp, (8, 8)), "critic")
    assert critic.fits and critic.compiled is not None
    axes = {each.axes for each in critic.compiled.collectives}
    assert ("fsdp",) in axes and ("sequence",) in axes
    rows = dataclasses.replace(exp.data, batch=3)
    with pytest.raises(LiveAvatarError, match="does not divide the 3 rows"):
        exp.mesh.check(exp.model.dit, rows.batch)
