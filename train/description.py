"""An experiment in plain JSON values, and whether two of them are the same."""

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx

from liveavatar_jax.types import LiveAvatarError


def describe(config: Any) -> Any:
    """Plain JSON values of an experiment: what two starts of a run are compared by.

    Dataclasses, mappings, sequences and numbers are taken apart, objects into their settings
    (not their weights), and functions into what they close over, such as the rates within an
    optimiser of optax; of anything else its name stands in.
    """
    return _describe(config, ())


def _describe(value: Any, above: tuple[int, ...]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else str(value)
    if isinstance(value, Path | np.dtype | np.number):
        return str(value)
    name = getattr(value, "__qualname__", type(value).__qualname__)
    if id(value) in above or isinstance(value, type | ModuleType):
        return name
    inner = lambda part: _describe(part, (*above, id(value)))
    if isinstance(value, Mapping):
        return {str(key): inner(part) for key, part in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not hasattr(value, "_asdict"):
        return [inner(part) for part in value]
    parts = {key: inner(part) for key, part in sorted(_parts(value).items())}
    return {"kind": name, **parts} if parts else name


def _parts(value: Any) -> dict[str, Any]:
    """What makes an object what it is, but for its arrays and the books of Flax."""
    if inspect.ismethod(value):
        return {"of": value.__self__}
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, **value.keywords}
    if inspect.isfunction(value):
        return dict(inspect.getclosurevars(value).nonlocals)
    fields = value._asdict() if hasattr(value, "_asdict") else getattr(value, "__dict__", {})
    arrays = (nnx.Variable, jax.Array, np.ndarray)
    return {k: v for k, v in fields.items() if "__" not in k and not isinstance(v, arrays)}


def require_same(before: Any, now: Any, may_differ: Sequence[str], where: str) -> None:
    """Raises LiveAvatarError for the first field of two descriptions that differs, but for those
    in `may_differ`, dotted, and what is in them. `where`: what the one before belongs to."""
    old, new = dict(fields(before)), dict(fields(now))
    for name in sorted(old.keys() | new.keys()):
        if any(name == free or name.startswith(free + ".") for free in may_differ):
            continue
        was, is_ = old.get(name, "absent"), new.get(name, "absent")
        if was != is_:
            raise LiveAvatarError(
                f"{name} is {is_!r}, but the run was started with {was!r} ({where}); set it back, "
                "or start a new run in another folder"
            )


def fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The numbers and words of a description by dotted name."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from fields(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(v, Mapping | list) for v in value):
        for i, inner in enumerate(value):
            yield from fields(inner, f"{name}.{i}")
    else:
        yield name, value
