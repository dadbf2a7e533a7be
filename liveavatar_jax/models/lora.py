"""LoRA (arXiv 2106.09685): low-rank deltas over any module's weights, as a pytree of their own.

The module itself never knows: `apply` returns a module of the same kind whose adapted kernels
are W + scale · a b. Kernels are [..., in, out]; whatever leads (stacked layers, taps of a
convolution) has its own pair of factors.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from liveavatar_jax.models.layers import Linear
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.types import Array, Float, Key, LiveAvatarError, struct


@struct
class Factors:
    """One low-rank delta: `a` leads into the rank, `b` out of it."""

    a: Float[Array, "*l i rank"]
    b: Float[Array, "*l rank o"]

    def delta(self, scale: float | Float[Array, ""]) -> Float[Array, "*l i o"]:
        """scale · a b, in float32."""
        a, b = self.a.astype(jnp.float32), self.b.astype(jnp.float32)
        return jnp.matmul(a, b, precision="highest") * scale


def init(
    module: Any,
    targets: str | tuple[str, ...],
    rank: int,
    *,
    key: Key[Array, ""],
    dtype: str = "float32",
) -> dict[str, Factors]:
    """Factors for every kernel under a targeted path: `a` uniform in ±1/√in, `b` zero.

    targets: last parts of the paths of layers, such as ("q", "v", "ffn_in"), or one regex for
    their whole paths. The result is keyed by kernel path, "blocks.self_attn.q.kernel".
    Raises LiveAvatarError for a target that matches no layer.
    """
    kernels = {path: leaf for path, leaf in leaves(module).items() if path.endswith(".kernel")}
    chosen = _choose(tuple(kernels), targets)
    lora = {}
    for path, subkey in zip(chosen, jax.random.split(key, len(chosen)), strict=True):
        *lead, i, o = kernels[path].shape
        bound = i**-0.5
        a = jax.random.uniform(subkey, (*lead, i, rank), dtype, -bound, bound)
        lora[path] = Factors(a=a, b=jnp.zeros((*lead, rank, o), dtype))
    return lora


def apply(module: Any, lora: Mapping[str, Factors], scale: float | Float[Array, ""]) -> Any:
    """The module with W + scale · a b for each adapted W; gradients flow into the factors.

    The sum is taken in float32 and rounded once to the dtype of W. Raises LiveAvatarError when
    the module has no kernel at a path of `lora`.
    """
    kernels = leaves(module)
    _require_paths(lora, kernels)
    return replace(module, {path: _add(kernels[path], f, scale) for path, f in lora.items()})


def attach(module: Any, lora: Mapping[str, Factors], scale: float) -> Any:
    """What `apply` gives, for training: the adapted `Linear`s compute x W + scale · (x a) b.

    So no dense delta is ever made, nor a dense gradient of W. Raises LiveAvatarError when the
    module has no `Linear` at a path of `lora`.
    """
    left = dict(lora)

    def swap(keys: tuple[Any, ...], part: Any) -> Any:
        path = jax.tree_util.keystr(keys, simple=True, separator=".") + ".kernel"
        if not isinstance(part, Linear) or path not in left:
            return part
        return Adapted(part, left.pop(path), scale)

    is_linear = lambda part: isinstance(part, Linear)
    adapted = jax.tree_util.tree_map_with_path(swap, module, is_leaf=is_linear)
    _require_paths(left, {})
    return adapted


class Adapted(nnx.Module):
    """A frozen `Linear` beside the factors that train."""

    def __init__(self, linear: Linear, factors: Factors, scale: float):
        self.linear, self.scale = linear, scale
        self.a, self.b = nnx.Param(factors.a), nnx.Param(factors.b)

    def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
        a, b = (f[...].astype(x.dtype) for f in (self.a, self.b))
        return self.linear(x) + self.scale * jnp.dot(jnp.dot(x, a), b)


def merge(module: Any, lora: Mapping[str, Factors], scale: float) -> Any:
    """What `apply` gives, once and for all, before inference: layer after layer of a stack, so
    that only one layer's delta is ever held in float32."""
    kernels = leaves(module)
    _require_paths(lora, kernels)
    return replace(module, {path: _merged(kernels[path], f, scale) for path, f in lora.items()})


@jax.jit  # once for all kernels of a shape
def _merged(kernel: Array, factors: Factors, scale: float | Array) -> Array:
    if kernel.ndim == 2:
        return _add(kernel, factors, scale)
    return jax.lax.map(lambda layer: _merged(*layer, scale), (kernel, factors))


def _add(kernel: Array, factors: Factors, scale: float | Array) -> Array:
    return (kernel.astype(jnp.float32) + factors.delta(scale)).astype(kernel.dtype)


def _choose(kernels: tuple[str, ...], targets: str | tuple[str, ...]) -> list[str]:
    if isinstance(targets, str):
        patterns = {targets: targets}
    else:
        patterns = {target: rf"(.*\.)?{re.escape(target)}" for target in targets}
    layers = {path.removesuffix(".kernel"): path for path in kernels}
    chosen = set()
    for target, pattern in patterns.items():
        found = {path for layer, path in layers.items() if re.fullmatch(pattern, layer)}
        if not found:
            raise LiveAvatarError(
                f"LoRA target {target!r} matches no layer; name some of {', '.join(layers)}"
            )
        chosen |= found
    return sorted(chosen)


def _require_paths(lora: Mapping[str, Factors], kernels: Mapping[str, Any]) -> None:
    if astray := [path for path in lora if path not in kernels]:
        raise LiveAvatarError(
            f"the LoRA adapts {', '.join(astray)}, which this module lacks; take the module it was "
            "made for"
        )
