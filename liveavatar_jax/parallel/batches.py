"""Batches of training on a mesh: which rows a process loads, and global arrays made of them."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import P
from jax.sharding import Mesh, NamedSharding

from liveavatar_jax.parallel.mesh import ROWS
from liveavatar_jax.types import Array, LiveAvatarError


def rows_of(mesh: Mesh, rows: int, process: int | None = None) -> tuple[int, ...]:
    """Which of a batch's rows a process (default: this one) loads, in order.

    Those of its devices' places along `data` and `fsdp`: processes that share a sequence or
    tensor group load the same ones. Raises LiveAvatarError when the mesh does not divide the
    rows.
    """
    parts = mesh.shape[ROWS[0]] * mesh.shape[ROWS[1]]
    if rows % parts:
        raise LiveAvatarError(
            f"a batch of {rows} rows does not divide over data x fsdp = {parts}; use a multiple"
        )
    process = jax.process_index() if process is None else process
    places = NamedSharding(mesh, P(ROWS)).devices_indices_map((rows,))
    own = (at[0] for device, at in places.items() if device.process_index == process)
    return tuple(sorted({row for some in own for row in range(*some.indices(rows))}))


def place(batch: Mapping[str, np.ndarray], mesh: Mesh, rows: int) -> dict[str, Array]:
    """The arrays of a batch over the devices, from the rows that this process has loaded.

    rows: of the whole batch; the arrays here have those of `rows_of`, in that order. Raises
    LiveAvatarError for an array with another number.
    """
    own = rows_of(mesh, rows)
    return {name: _place(name, array, mesh, rows, own) for name, array in batch.items()}


def _place(name: str, array: np.ndarray, mesh: Mesh, rows: int, own: tuple[int, ...]) -> Array:
    array = np.asarray(array)
    if len(array) != len(own):
        raise LiveAvatarError(
            f"{name} has {len(array)} rows, but this process loads {len(own)} of a batch of "
            f"{rows}: rows {', '.join(map(str, own))}"
        )
    at = {row: i for i, row in enumerate(own)}

    def part(index: Any) -> np.ndarray:
        wanted = [at[row] for row in range(*index[0].indices(rows))]
        return array[wanted[0] : wanted[-1] + 1]  # rows of one device lie side by side

    shape = (rows, *array.shape[1:])
    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(ROWS)), part)
