"""Linear maps in 8 bits: weights are kept, and products taken, in int8 or in fp8 (E4M3).

The module around them never knows: `quantise` returns a module of the same kind in which the
targeted `Linear`s are `QuantisedLinear`s. Weights have a scale per output channel, kept from
then on; activations get one per token at every call. The released code scales a whole tensor of
activations at once, in fp8. For fp8 a scale per token is no more exact (3.7 % either way, for a
floating point needs no fine scale), for int8 it is needed; and with it what becomes of a token
depends on no other, so that neither the sessions of a batch nor the devices that share out the
tokens have to know of each other.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from liveavatar_jax.models.layers import Linear, along_last
from liveavatar_jax.types import Array, Float, LiveAvatarError

# As published, all of the trunk; embeddings, head and the audio adapter stay as they are.
TARGETS = (
    r"(.*\.)?(blocks\.((self|cross)_attn\.[qkvo]|ffn_in|ffn_out)|injectors\.(attn\.[qkvo]|adain))"
)


class Format(NamedTuple):
    dtype: str
    largest: float  # the scale is the peak over this
    sum_dtype: str


FORMATS = {
    "int8": Format("int8", 127.0, "int32"),
    "fp8": Format("float8_e4m3fn", 448.0, "float32"),
}


class QuantisedLinear(nnx.Module):
    """A `Linear` in 8 bits; as everywhere, the layers of a stack lead.

    Its weight is "out in", not "in out" as a kernel is, and is called otherwise for that reason:
    the 8-bit units of NVIDIA want what they sum over side by side, and XLA would make a transposed
    copy of all layers at every call, which costs the memory that 8 bits save.
    """

    def __init__(self, weight: Array, scale: Array, bias: Array):
        self.weight = nnx.Param(weight)  # "out in", 8 bits
        self.scale = nnx.Param(scale)  # "out", float32
        self.bias = nnx.Param(bias)  # "out", as it was

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        """The product is summed in int32 or float32, and rounded once to the dtype of x."""
        weight = self.weight[...]
        form = next(form for form in FORMATS.values() if form.dtype == weight.dtype)
        # The barrier keeps transpositions before x out of XLA's fused product, which on a GPU
        # cannot always be tiled then (0.10.2 fails to compile); it does not move x between devices.
        values, scale = _rounded(jax.lax.optimization_barrier(x), form)
        inputs = (((x.ndim - 1,), (1,)), ((), ()))
        y = jax.lax.dot_general(values, weight, inputs, preferred_element_type=form.sum_dtype)
        y = y.astype(jnp.float32) * scale
        y = y * along_last(self.scale[...], y) + along_last(self.bias[...], y)
        return y.astype(x.dtype)


def quantise(module: Any, kind: str, targets: str = TARGETS) -> Any:
    """The module with its targeted `Linear`s in "int8" or "fp8", a layer of a stack at a time.

    targets: regex for the whole paths of layers, "blocks.self_attn.q".
    Raises LiveAvatarError for another kind, and when nothing matches.
    """
    form, found = _format(kind), []

    def swap(keys: tuple[Any, ...], part: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator=".")
        if not isinstance(part, Linear) or not re.fullmatch(targets, path):
            return part
        found.append(path)
        weight, scale = _quantised(part.kernel[...], form)
        return QuantisedLinear(weight, scale, part.bias[...])

    is_linear = lambda part: isinstance(part, Linear)
    module = jax.tree_util.tree_map_with_path(swap, module, is_leaf=is_linear)
    if not found:
        raise LiveAvatarError(
            f"quantise: no linear map at {targets!r}; a module is quantised once, and only a DiT "
            "has the usual targets"
        )
    return module


def quantise_leaf(path: str, leaf: Array, kind: str) -> dict[str, Array]:
    """What becomes of one leaf, or of some layers of it, by path: a weight and its scale, if it
    is a targeted kernel, else itself. For a module that comes piece by piece."""
    layer, _, name = path.rpartition(".")
    if name != "kernel" or not re.fullmatch(TARGETS, layer):
        return {path: leaf}
    weight, scale = _quantised(leaf, _format(kind))
    return {f"{layer}.weight": weight, f"{layer}.scale": scale}


def _format(kind: str) -> Format:
    if kind not in FORMATS:
        raise LiveAvatarError(f"quantise = {kind!r} must be one of {', '.join(FORMATS)}")
    return FORMATS[kind]


@jax.jit(static_argnums=1)  # once for all kernels of a shape
def _quantised(kernel: Array, form: Format) -> tuple[Array, Array]:
    """Weights "*l out in" and scales "*l out"; only one layer is ever held in float32."""
    if kernel.ndim > 2:
        return jax.lax.map(lambda layer: _quantised(layer, form), kernel)
    weight, scale = _rounded(kernel.T, form)
    return weight, scale[:, 0]


def _rounded(x: Array, form: Format) -> tuple[Array, Array]:
    """Values, and scales ("*b 1") that bring the peak of each row to the largest of the format.

    The floor keeps zeros zero, instead of NaN; a value that is not finite spoils the scale, and
    so is not hidden by integers, which have no NaN.
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / form.largest
    x = x / scale
    return (jnp.round(x) if form.dtype == "int8" else x).astype(form.dtype), scale
