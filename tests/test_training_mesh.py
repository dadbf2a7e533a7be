"""The mesh of training: what divides, where everything lies, and which rows a process loads."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import P
from jax.sharding import NamedSharding

from liveavatar_jax.config import DiTConfig
from liveavatar_jax.models import clip, lora
from liveavatar_jax.models.attention import ONE_DEVICE
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.parallel.batches import place, rows_of
from liveavatar_jax.parallel.mesh import ROWS, TRAIN_AXES, TrainMesh
from liveavatar_jax.parallel.sharding import fit, layout, trained, undivided
from liveavatar_jax.paths import leaves
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.wan import LORA_TARGETS
from tests.networks import random
from tests.processes import run

SEVERAL_DEVICES = True  # for conftest

GIB = 2**30

# ---- sizes


def test_a_mesh_is_what_was_written():
    spec = TrainMesh.parse("data=2, fsdp=16,sequence=2,tensor=2", dcn="data=2")
    assert spec == TrainMesh(data=2, fsdp=16, sequence=2, tensor=2, dcn_data=2)
    assert spec.shape == {"data": 4, "fsdp": 16, "sequence": 2, "tensor": 2}
    assert (spec.devices, spec.slices, spec.rows) == (256, 2, 64)
    assert TrainMesh.parse(str(spec)) == spec
    assert TrainMesh.parse(str(TrainMesh())) == TrainMesh()


@pytest.mark.parametrize(
    "text, words",
    [
        ("stage=4", "'stage=4' is not understood; write each of data, fsdp, sequence, tensor"),
        ("data=2,data=2", "'data=2' is not understood"),
        ("fsdp=x", "'fsdp=x' is not understood"),
        ("fsdp=0", "fsdp must be at least 1"),
        ("fsdp=8,dcn_tensor=2", "dcn_tensor is not possible, for tensor exchanges data"),
        ("fsdp=8,dcn_sequence=2", "dcn_sequence is not possible, for sequence exchanges"),
    ],
)
def test_what_is_not_understood_is_refused(text: str, words: str):
    with pytest.raises(LiveAvatarError, match=words):
        TrainMesh.parse(text)


@pytest.mark.parametrize(
    "text, batch, words",
    [
        ("sequence=4,tensor=4", 1, "tensor x sequence = 4 x 4 does not divide the 40 attention "
         "heads; their product must be one of 1, 2, 4, 5, 8, 10, 20, 40"),
        ("tensor=5", 1, "tensor = 5 does not divide the 13824 of ffn_dim"),
        ("fsdp=48", 48, "fsdp x tensor = 48 x 1 does not divide the 5120 of dim"),
        ("data=2,fsdp=16,sequence=2", 48, "data x fsdp = 2 x 16 does not divide the 48 rows"),
        ("fsdp=8", 0, "every size must be at least 1"),
    ],
)  # fmt: skip
def test_what_does_not_divide_is_refused_by_name(text: str, batch: int, words: str):
    with pytest.raises(LiveAvatarError, match=words):
        TrainMesh.parse(text).check(DiTConfig(), batch)


def test_heads_bound_sequence_and_tensor_together():
    for sequence, tensor in ((4, 2), (8, 1), (2, 4), (5, 8), (10, 4)):
        TrainMesh(sequence=sequence, tensor=tensor).check(DiTConfig(), 1)


# ---- devices


@dataclasses.dataclass(frozen=True)
class Fake:
    id: int
    process_index: int
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "drawn up"


def ids(spec: TrainMesh, devices: list[Fake]) -> np.ndarray:
    sizes = tuple(spec.shape.values())
    made = spec.make(devices)
    assert made.axis_names == TRAIN_AXES
    return np.vectorize(lambda device: device.id)(made.devices).reshape(sizes)


def test_slices_are_the_slow_part_of_their_axis():
    devices = [Fake(i, i // 4, slice_index=i // 8) for i in range(16)][::-1]
    found = ids(TrainMesh.parse("fsdp=4,tensor=2", dcn="data=2"), devices)
    np.testing.assert_array_equal(found[:, :, 0], np.arange(16).reshape(2, 4, 2))
    found = ids(TrainMesh.parse("data=4,tensor=2", dcn="fsdp=2"), devices)
    # tensor stays inside a slice, fsdp is nothing but the slices
    np.testing.assert_array_equal(found[:, 0, 0], np.arange(8).reshape(4, 2))
    np.testing.assert_array_equal(found[:, 1, 0], 8 + np.arange(8).reshape(4, 2))
    found = ids(TrainMesh.parse("fsdp=8", dcn="fsdp=2"), devices)
    np.testing.assert_array_equal(found.ravel(), np.arange(16))


def test_without_slices_processes_are_what_is_near():
    devices = [Fake(i, i // 4) for i in range(16)]
    found = ids(TrainMesh.parse("sequence=4", dcn="data=4"), devices)
    np.testing.assert_array_equal(found[:, 0, :, 0], np.arange(16).reshape(4, 4))


def test_devices_that_do_not_fit_are_refused():
    slices = [Fake(i, i // 4, slice_index=i // 4) for i in range(8)]
    with pytest.raises(LiveAvatarError, match="has 1 slices of 8 devices, and there are 2 of 4, 4"):
        TrainMesh(fsdp=8).make(slices)
    with pytest.raises(LiveAvatarError, match="mesh fsdp=16 has 16 devices, and there are 8"):
        TrainMesh(fsdp=16).make()
    with pytest.raises(LiveAvatarError, match="mesh fsdp=4 has 4 devices, and there are 8"):
        TrainMesh(fsdp=4).make(slices)  # a process would have none
    assert TrainMesh(fsdp=4).make().size == 4  # in one process there may be others


# ---- where everything lies, at 14B


@pytest.fixture(scope="module")
def published():
    """Shapes of the network, of its adapters, and of what AdamW keeps of either."""
    model = jax.eval_shape(lambda: CausalDiT(DiTConfig(param_dtype="float32"), rngs=nnx.Rngs(0)))
    adapters = jax.eval_shape(lambda: lora.init(model, LORA_TARGETS, 128, key=jax.random.key(0)))
    adamw = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))
    states = {name: jax.eval_shape(adamw.init, tree)
              for name, tree in (("adapters'", adapters), ("network's", model))}  # fmt: skip
    bare = jax.eval_shape(lambda m: jax.tree.map(lambda a: a.astype(jnp.bfloat16), m), model)
    attached = jax.eval_shape(lambda m, f: lora.attach(m, f, 0.5), bare, adapters)
    return {"network": model, "adapters": adapters, "base with adapters": attached,
            **{f"the {name} moments": state for name, state in states.items()}}  # fmt: skip


def per_device(tree, mesh) -> int:
    places = leaves(trained(tree, mesh))
    sizes = (math.prod(places[path].shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for path, leaf in leaves(tree).items())  # fmt: skip
    return sum(sizes)


def abstract(text: str) -> jax.sharding.Mesh:
    """A mesh of devices that are not there."""
    spec = TrainMesh.parse(text)
    return spec.make([Fake(i, 0) for i in range(spec.devices)])


@pytest.mark.parametrize(
    "text", ["fsdp=64", "fsdp=16,sequence=2,tensor=2", "data=4,fsdp=8,tensor=2"]
)
def test_nothing_large_is_whole(published, text: str):
    mesh = abstract(text)
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for name, tree in published.items():
        assert undivided(tree, mesh) == []
        total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves(tree).values())
        own = per_device(tree, mesh)
        print(f"{text}: {name} {total / GIB:.2f} GiB, a device has {own / GIB:.3f}")
        assert own < 1.06 * total / parts + 64 * 2**20, name


def test_the_adapters_are_those_of_the_published_file(published):
    assert sum(leaf.size for leaf in leaves(published["adapters"]).values()) == 676_331_520


def test_what_does_not_divide_lies_whole_along_the_axis_and_is_named():
    sizes = {"fsdp": 48, "tensor": 2, "data": 1, "sequence": 1}
    assert fit(P("fsdp", "tensor"), (5120, 5120), sizes) == P(None, "tensor")
    assert fit(P(("tensor", "fsdp")), (5120,), sizes) == P(("tensor",))
    assert fit(P(None, "fsdp"), (3, 96), sizes) == P(None, "fsdp")
    mesh = abstract("fsdp=48,tensor=2")
    tree = {"blocks.q.kernel": jax.ShapeDtypeStruct((5120, 5120), jnp.float32),
            "mystery": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}  # fmt: skip
    kernel, mystery = undivided(tree, mesh)
    assert "blocks.q.kernel (5120, 5120) does not divide over" in kernel
    assert "mystery (4096, 4096) is not in the table" in mystery


# ---- the same numbers


@pytest.fixture(scope="module")
def small():
    cfg = DiTConfig.tiny(layers=1, inject_layers=(0,), remat="full", audio_layers=3)
    model = random(lambda: CausalDiT(cfg, rngs=nnx.Rngs(0)))
    factors = lora.init(model, LORA_TARGETS, 4, key=jax.random.key(1))
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    factors = jax.tree.map(lambda a: a + 0.1 * draw(*a.shape), factors)
    batch = {"latents": draw(4, 2, 4, 6, 16), "motion": draw(4, 19, 4, 6, 16),
             "reference": draw(4, 1, 4, 6, 16), "text": draw(4, 16, 48),
             "audio": draw(4, 1, 8, 3, 32), "sigma": rng.random((4, 2), np.float32)}  # fmt: skip
    exact = {kind: jax.jit(functools.partial(gradients, kind, ONE_DEVICE))(model, factors, batch)
             for kind in ("causal", "bidirectional")}  # fmt: skip
    return model, factors, batch, exact


def gradients(kind: str, layout, model, factors, batch):
    """Of the adapters."""

    def loss(factors):
        net = lora.attach(model, factors, 0.5)
        given = clip.condition(net, batch["reference"], batch["motion"], batch["text"],
                               batch["audio"], blocks=2)  # fmt: skip
        x, sigma = batch["latents"], batch["sigma"]
        if kind == "causal":
            y = clip.causal(net, x, sigma, given, block_frames=1, window=2, layout=layout)
        else:
            y = clip.bidirectional(net, x, sigma[:, 0], given, layout=layout)
        return jnp.mean(jnp.square(y - x))

    return jax.value_and_grad(loss)(factors)


ALL = [("data=4", "causal"), ("fsdp=4", "bidirectional"), ("sequence=4", "causal"),
       ("tensor=4", "bidirectional"), ("data=2,fsdp=2,sequence=2", "bidirectional"),
       ("fsdp=2,sequence=2,tensor=2", "causal")]  # fmt: skip


@pytest.mark.slow  # tests/test_training.py has whole steps on meshes
@pytest.mark.parametrize("text, kind", ALL)
def test_every_axis_gives_the_same_gradient(small, text: str, kind: str):
    model, factors, batch, exact = small
    spec = TrainMesh.parse(text)
    spec.check(model.cfg, 4)
    mesh = spec.make()
    assert undivided((model, factors), mesh, above=2**15) == []
    given = jax.device_put((model, factors), (trained(model, mesh), trained(factors, mesh)))
    with jax.set_mesh(mesh):
        step = jax.jit(functools.partial(gradients, kind, layout(mesh)))
        loss, grads = step(*given, place(batch, mesh, 4))
    np.testing.assert_allclose(loss, exact[kind][0], rtol=1e-5)
    for path, grad in leaves(exact[kind][1]).items():
        peak = np.abs(grad).max()
        np.testing.assert_allclose(leaves(grads)[path], grad, atol=2e-5 * peak, err_msg=path)


def test_one_device_is_one_device():
    assert layout(TrainMesh().make()) is ONE_DEVICE


# ---- rows


def test_a_process_loads_the_rows_of_its_place_along_the_data():
    devices = [Fake(i, i // 4) for i in range(16)]  # four processes
    mesh = TrainMesh.parse("data=2,fsdp=2,sequence=4").make(devices)
    assert [rows_of(mesh, 8, process) for process in range(4)] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    mesh = TrainMesh.parse("fsdp=2,sequence=8").make(devices)
    # a sequence group of two processes: both load the same rows
    assert [rows_of(mesh, 2, process) for process in range(4)] == [(0,), (0,), (1,), (1,)]
    mesh = TrainMesh.parse("fsdp=16").make(devices)
    assert rows_of(mesh, 32, 1) == tuple(range(8, 16))
    with pytest.raises(LiveAvatarError, match="a batch of 24 rows does not divide over data x fs"):
        rows_of(mesh, 24, 1)


def test_a_batch_is_what_was_loaded():
    mesh = TrainMesh.parse("data=2,fsdp=2,sequence=2").make()
    batch = {"x": np.arange(24.0).reshape(8, 3), "sigma": np.arange(8.0)}
    placed = place(batch, mesh, 8)
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding == NamedSharding(mesh, P(ROWS))
    with pytest.raises(LiveAvatarError, match="x has 7 rows, but this process loads 8 of a batch"):
        place({"x": batch["x"][:7]}, mesh, 8)


SCRIPT = """
import argparse, jax, numpy as np
from liveavatar_jax.parallel import hosts
from liveavatar_jax.parallel.batches import place, rows_of
from liveavatar_jax.parallel.mesh import TrainMesh
parser = argparse.ArgumentParser()
hosts.add_arguments(parser)
args = parser.parse_args()
hosts.fake_devices(args.fake_devices)
hosts.initialise(args.coordinator, args.processes, args.process_id)
whole = np.arange(4)[:, None] * np.ones((1, 3))
for text in ("data=2,fsdp=2", "fsdp=1,sequence=4", "fsdp=2,dcn_data=2"):
    mesh = TrainMesh.parse(text).make()
    own = rows_of(mesh, 4)
    batch = place({"x": whole[list(own)]}, mesh, 4)
    total = jax.jit(lambda x: (x * x).sum())(batch["x"])
    print(text, own, float(total))
"""


def test_two_processes_make_one_batch_of_their_rows():
    first, second = ("\n".join(line for line in out.splitlines() if "Gloo" not in line)
                     for out in run(SCRIPT, devices=2))  # fmt: skip
    assert first.splitlines() == [
        "data=2,fsdp=2 (0, 1) 42.0",
        "fsdp=1,sequence=4 (0, 1, 2, 3) 42.0",
        "fsdp=2,dcn_data=2 (0, 1) 42.0",
    ]
    assert second.splitlines()[0] == "data=2,fsdp=2 (2, 3) 42.0"
    assert second.splitlines()[1:] == [first.splitlines()[1], "fsdp=2,dcn_data=2 (2, 3) 42.0"]
