import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from liveavatar_jax.config import DiTConfig
from liveavatar_jax.models import lora
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.types import LiveAvatarError

from .networks import random

SUFFIXES = ("q", "out")


class Layer(nnx.Module):
    def __init__(self, dtype="float32", *, rngs: nnx.Rngs):
        self.q = nnx.Linear(4, 6, param_dtype=dtype, rngs=rngs)
        self.qq = nnx.Linear(4, 6, param_dtype=dtype, rngs=rngs)


class Net(nnx.Module):
    def __init__(self, dtype="float32", *, rngs: nnx.Rngs):
        self.layers = jax.vmap(lambda key: Layer(dtype, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs.params(), 3)
        )
        self.out = nnx.Linear(6, 5, param_dtype=dtype, rngs=rngs)
        self.conv = nnx.Conv(2, 3, (3,), param_dtype=dtype, rngs=rngs)


@pytest.fixture
def net():
    return Net(rngs=nnx.Rngs(0))


def random_lora(net, targets=SUFFIXES, rank=2):
    factors = lora.init(net, targets, rank, key=jax.random.key(1))
    noise = lambda x: jax.random.normal(jax.random.key(x.size), x.shape, x.dtype)
    return jax.tree.map(noise, factors)


def test_a_fresh_lora_changes_nothing(net):
    fresh = lora.init(net, SUFFIXES, 2, key=jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, lora.apply(net, fresh, 0.5), net)
    assert all(float(jnp.abs(f.a).max()) > 0 for f in fresh.values())


def test_every_layer_of_a_stack_has_its_own_factors(net):
    factors = random_lora(net)
    adapted = lora.apply(net, factors, 0.5)
    f = factors["layers.q.kernel"]
    for i in range(3):
        want = net.layers.q.kernel[i] + 0.5 * f.a[i] @ f.b[i]
        np.testing.assert_allclose(adapted.layers.q.kernel[i], want, rtol=1e-6)
    np.testing.assert_array_equal(adapted.layers.qq.kernel[...], net.layers.qq.kernel[...])
    np.testing.assert_array_equal(adapted.out.bias[...], net.out.bias[...])


def test_merging_gives_what_applying_gives(net):
    factors = random_lora(net)
    same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    jax.tree.map(same, lora.merge(net, factors, 0.5), lora.apply(net, factors, 0.5))


def test_merge_rounds_once_to_the_dtype_of_the_weight():
    net = Net("bfloat16", rngs=nnx.Rngs(0))
    factors = random_lora(net)
    merged = lora.merge(net, factors, 0.5)
    wide = lambda x: x.astype(jnp.float32)
    f = factors["out.kernel"]
    want = (wide(net.out.kernel[...]) + 0.5 * (f.a @ f.b)).astype(jnp.bfloat16)
    assert merged.out.kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide(merged.out.kernel[...]), wide(want))


def test_gradient_flows_into_the_factors_only(net):
    fresh = lora.init(net, SUFFIXES, 2, key=jax.random.key(1))
    loss = lambda factors, net: jnp.sum(lora.apply(net, factors, 0.5).out(jnp.ones((1, 6))) ** 2)
    grads = jax.jit(jax.grad(loss))(fresh, net)
    assert float(jnp.abs(grads["out.kernel"].b).max()) > 0
    assert float(jnp.abs(grads["out.kernel"].a).max()) == 0  # b is zero at first
    assert float(jnp.abs(grads["layers.q.kernel"].b).max()) == 0  # not on this path


def test_suffixes_match_whole_path_parts(net):
    assert set(random_lora(net)) == {"layers.q.kernel", "out.kernel"}
    assert set(random_lora(net, r"layers\..*")) == {"layers.q.kernel", "layers.qq.kernel"}
    assert random_lora(net, ("conv",))["conv.kernel"].a.shape == (3, 2, 2)


def test_a_target_that_matches_nothing_is_refused(net):
    with pytest.raises(LiveAvatarError, match=r"target 'ffn' matches no layer; name some of .*out"):
        lora.init(net, ("q", "ffn"), 2, key=jax.random.key(0))
    with pytest.raises(LiveAvatarError, match=r"target 'blocks\.\*' matches no layer"):
        lora.init(net, "blocks.*", 2, key=jax.random.key(0))


def test_a_lora_of_another_module_is_refused(net):
    factors = random_lora(net)
    factors["layers.k.kernel"] = factors["out.kernel"]
    for use in (lora.apply, lora.merge):
        with pytest.raises(LiveAvatarError, match=r"adapts layers\.k\.kernel, which"):
            use(net, factors, 0.5)


def test_attached_factors_compute_what_applied_ones_do():
    """And the gradient into the factors is the same, without one of the kernels."""
    dit = random(lambda: CausalDiT(DiTConfig.tiny(), rngs=nnx.Rngs(0)))
    factors = random_lora(dit, ("q", "ffn_in"))
    sigma = jnp.full((1, 2), 0.4)

    def level(adapted):  # cheap, and through stacked and through scanned layers
        heads = jax.vmap(lambda block, e: block.self_attn.q(e[0, 0, :1]))(
            adapted.blocks, jnp.repeat(dit.level(sigma).blocks[None], dit.cfg.layers, 0)
        )
        return jnp.sum(heads**2)

    want, grads = jax.value_and_grad(lambda f: level(lora.apply(dit, f, 0.5)))(factors)
    got, ours = jax.value_and_grad(lambda f: level(lora.attach(dit, f, 0.5)))(factors)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-3), ours, grads)
    with pytest.raises(LiveAvatarError, match=r"adapts nowhere\.kernel"):
        lora.attach(dit, {"nowhere.kernel": factors["blocks.ffn_in.kernel"]}, 0.5)
