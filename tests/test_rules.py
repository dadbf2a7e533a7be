import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights.rules import Rule, export, load, match, places

RULES = (
    Rule(r"blocks\.(\d+)\.attn\.([qk])\.weight", r"blocks[\1].\2.kernel", "o i -> i o"),
    Rule(r"blocks\.(\d+)\.attn\.([qk])\.bias", r"blocks[\1].\2.bias"),
    Rule(r"blocks\.(\d+)\.gain", r"blocks[\1].gain", "1 d -> d"),
    Rule(
        r"(?:model\.)?patch\.(?:weight|w)",
        "patch.kernel",
        "o c t p q -> (t p q c) o",
        {"t": 1, "p": 2, "q": 2},
    ),
    Rule(r"heads\.(\d+)\.weight", r"heads.\1.kernel", "o i -> i o"),
)


class Block(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.q = nnx.Linear(4, 6, param_dtype=jnp.bfloat16, rngs=rngs)
        self.k = nnx.Linear(4, 6, rngs=rngs)
        self.gain = nnx.Param(jnp.ones(4))


class Net(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.blocks = jax.vmap(lambda key: Block(rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), 3)
        )
        self.patch = nnx.Linear(8, 4, use_bias=False, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(4, 2, use_bias=False, rngs=rngs) for _ in range(2)])


def abstract():
    return jax.eval_shape(lambda: Net(rngs=nnx.Rngs(0)))


def published(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"patch.weight": (4, 2, 1, 2, 2), "heads.0.weight": (2, 4), "heads.1.weight": (2, 4)}
    for i in range(3):
        shapes[f"blocks.{i}.gain"] = (1, 4)
        for name in "qk":
            shapes[f"blocks.{i}.attn.{name}.weight"] = (6, 4)
            shapes[f"blocks.{i}.attn.{name}.bias"] = (6,)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def test_each_slice_of_a_stack_holds_its_own_layer():
    tensors = published()
    net = load(abstract(), tensors, RULES, where="net")
    for i in range(3):
        np.testing.assert_array_equal(
            net.blocks.k.kernel[i], tensors[f"blocks.{i}.attn.k.weight"].T
        )
    np.testing.assert_array_equal(net.heads[1].kernel[...], tensors["heads.1.weight"].T)


def test_export_of_an_import_is_the_identity():
    tensors = published(jnp.bfloat16)
    back = export(load(abstract(), tensors, RULES, where="net"), RULES)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name].astype(np.float32), tensor.astype(np.float32))


def test_import_of_an_export_is_the_identity():
    net = Net(rngs=nnx.Rngs(3))
    back = load(abstract(), export(net, RULES), RULES, where="net")
    assert jax.tree.structure(back) == jax.tree.structure(net)
    jax.tree.map(np.testing.assert_array_equal, back, net)


def test_leaves_keep_the_dtypes_of_the_module():
    net = load(abstract(), published(jnp.bfloat16), RULES, where="net")
    assert net.blocks.q.kernel.dtype == jnp.bfloat16
    assert net.blocks.k.kernel.dtype == jnp.float32


def test_bfloat16_is_widened_exactly():
    tensors = published(jnp.bfloat16)
    net = load(abstract(), tensors, RULES, where="net")
    wide = tensors["patch.weight"].astype(np.float32)
    np.testing.assert_array_equal(
        net.patch.kernel[...].reshape(2, 2, 2, 4), wide[:, :, 0].transpose(2, 3, 1, 0)
    )


def test_shapes_alone_are_enough_to_check():
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in published().items()}
    net = load(abstract(), shapes, RULES, where="net")
    assert isinstance(jax.tree.leaves(net)[0], jax.ShapeDtypeStruct)
    del shapes["patch.weight"]
    with pytest.raises(LiveAvatarError, match=r"missing: patch\.weight"):
        load(abstract(), shapes, RULES, where="net")


def test_both_spellings_are_read_and_the_first_is_written():
    tensors = published()
    tensors["model.patch.w"] = tensors.pop("patch.weight")
    assert "patch.weight" in export(load(abstract(), tensors, RULES, where="net"), RULES)


def test_all_faults_are_listed_at_once():
    tensors = published()
    tensors["blocks.0.attn.qq.weight"] = tensors.pop("blocks.0.attn.q.weight")
    tensors["blocks.3.gain"] = tensors["blocks.2.gain"]
    tensors["blocks.1.attn.k.weight"] = np.zeros((6, 5), np.float32)
    tensors["blocks.2.attn.k.weight"] = np.zeros((6, 4, 1), np.float32)
    tensors["patch.weight"] = np.zeros((4, 2, 1, 4, 2), np.float32)
    tensors["model.patch.weight"] = np.zeros((4, 2, 1, 2, 2), np.float32)
    tensors["heads.1.weight"] = np.zeros((2, 4), np.int64)
    with pytest.raises(LiveAvatarError) as error:
        load(abstract(), tensors, RULES, where="shard.safetensors")
    said = str(error.value)
    assert said.startswith("shard.safetensors does not fit Net in 8 place(s)")
    assert "missing: blocks.0.attn.q.weight\n" in said
    assert "unknown: blocks.0.attn.qq.weight (nearest name: blocks.0.attn.q.weight)" in said
    assert "unknown: blocks.3.gain" in said
    assert "misshapen: blocks.1.attn.k.weight has shape (6, 5), not (6, 4)" in said
    assert "misshapen: blocks.2.attn.k.weight has shape (6, 4, 1), not (6, 4)" in said
    assert "misshapen: patch.weight has shape (4, 2, 1, 4, 2), not (4, 2, 1, 2, 2)" in said
    assert "double: model.patch.weight and patch.weight are the same weight" in said
    assert "not a float: heads.1.weight holds int64" in said


def test_a_tensor_that_two_rules_fit_is_refused():
    rules = (*RULES, Rule(r"heads\.0\.weight", "heads.0.kernel", "o i -> i o"))
    with pytest.raises(LiveAvatarError, match=r"ambiguous: heads\.0\.weight fits heads"):
        match(abstract(), published(), rules, where="net")


def test_a_leaf_without_a_rule_is_refused():
    with pytest.raises(LiveAvatarError, match=r"missing: a rule for our patch\.kernel"):
        match(abstract(), {}, RULES[:3], where="net")


def test_ignored_tensors_are_left_out():
    tensors = published() | {"lm_head.weight": np.zeros(3, np.float32)}
    assert "lm_head.weight" not in match(
        abstract(), tensors, RULES, where="net", ignore=[r"lm_head\..*"]
    )
    with pytest.raises(LiveAvatarError, match=r"unknown: lm_head"):
        match(abstract(), tensors, RULES, where="net")


def test_places_name_every_leaf_and_slice():
    assert set(places(abstract(), RULES)) == set(published())


@pytest.mark.parametrize("rule", [Rule(r"a\d", "a"), Rule(r"a+", "a"), Rule(r"(\d)", "a")])
def test_a_rule_that_cannot_be_inverted_is_refused(rule):
    with pytest.raises(ValueError, match=r"invert|drops"):
        places(abstract(), [rule])
