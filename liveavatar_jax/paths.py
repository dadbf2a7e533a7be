"""The arrays of a module by attribute path, such as `blocks.self_attn.q.kernel`."""

from collections.abc import Mapping
from typing import Any

import jax


def leaves(module: Any) -> dict[str, Any]:
    """Every array of a module (or its shape, when the module is abstract) by attribute path."""
    paths, _ = jax.tree_util.tree_flatten_with_path(module)
    return {_path(keys): leaf for keys, leaf in paths}


def replace(module: Any, arrays: Mapping[str, Any]) -> Any:
    """The module with the arrays at the paths of `arrays` exchanged for those."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: arrays.get(_path(keys), leaf), module
    )


def _path(keys: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".").removesuffix(".value")
