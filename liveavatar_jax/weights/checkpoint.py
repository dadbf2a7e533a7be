"""Converted checkpoints: a folder with config.json and, per network, small Orbax items.

    OUT/config.json                ModelConfig, written last
    OUT/files.json                 the size of every file, to notice a damaged copy
    OUT/source.json                which published files it was made from
    OUT/spiece.model               the tokenizer of the text encoder, when it was found
    OUT/dit/blocks.003.0/          one layer of a stack (Orbax, {leaf path: rows of the leaf})
    OUT/dit/rest.0/                what is not stacked; both in pieces of at most 256 MiB

A folder of weights/packed.py, with whole networks as safetensors files, is read like this one.
Every item is whole or absent. While a folder is being made it is called OUT.partial, so one
that looks finished is finished, and a run that was interrupted goes on at the missing item.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from liveavatar_jax.config import ModelConfig, from_dict, to_dict
from liveavatar_jax.models.dit import CausalDiT
from liveavatar_jax.models.quantise import quantise, quantise_leaf
from liveavatar_jax.models.speech import SpeechEncoder
from liveavatar_jax.models.text import TextEncoder
from liveavatar_jax.models.vae import VAE
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import packed
from liveavatar_jax.weights.encoders import SPEECH_IGNORE, SPEECH_RULES, TEXT_RULES
from liveavatar_jax.weights.rules import Rule
from liveavatar_jax.weights.vae import VAE_RULES
from liveavatar_jax.weights.wan import DIT_RULES

PIECE = 2**28  # bytes; of an item at most, unless a single row is larger


class Network(NamedTuple):
    """A network of ModelConfig and its weight table."""

    make: Callable[..., Any]
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()


NETWORKS = {
    "dit": Network(CausalDiT, DIT_RULES),
    "vae": Network(VAE, VAE_RULES),
    "text": Network(TextEncoder, TEXT_RULES),
    "speech": Network(SpeechEncoder, SPEECH_RULES, SPEECH_IGNORE),
}


class Rows(NamedTuple):
    """Rows start..stop of a leaf's leading axis: one layer of a stack, a piece, or all."""

    leaf: str
    start: int
    stop: int

    def shape(self, leaf: Any) -> tuple[int, ...]:
        return (self.stop - self.start, *leaf.shape[1:])

    def nbytes(self, leaf: Any) -> int:
        return math.prod(self.shape(leaf)) * leaf.dtype.itemsize


def abstract(cfg: ModelConfig, which: str, dtype: str | None = None) -> Any:
    """The shapes of one network ("dit", "vae", "text" or "speech"), in another dtype if given."""
    part = getattr(cfg, which)
    part = part if dtype is None else dataclasses.replace(part, param_dtype=dtype)
    return jax.eval_shape(lambda: NETWORKS[which].make(part, rngs=nnx.Rngs(0)))


def plan(module: Any, which: str) -> dict[str, list[Rows]]:
    """The items of a network, in the order in which they are written and read."""
    stacks = {rule.target.split("[")[0] for rule in NETWORKS[which].rules if "[" in rule.target}
    groups: dict[str, list[Rows]] = {"rest": []}
    shapes = leaves(module)
    for path, leaf in shapes.items():
        stack = next((stack for stack in stacks if path.startswith(stack + ".")), None)
        for rows in _cut(path, leaf) if stack is None else _layers(path, leaf):
            groups.setdefault(f"{stack}.{rows.start:03d}" if stack else "rest", []).append(rows)
    return {
        f"{group}.{i}": parts
        for group, rows in groups.items()
        for i, parts in enumerate(_pack(rows, shapes))
    }


def _layers(path: str, leaf: Any) -> list[Rows]:
    return [Rows(path, i, i + 1) for i in range(leaf.shape[0])]


def _cut(path: str, leaf: Any) -> list[Rows]:
    rows = leaf.shape[0]
    step = max(1, rows * PIECE // max(PIECE, Rows(path, 0, rows).nbytes(leaf)))
    return [Rows(path, i, min(i + step, rows)) for i in range(0, rows, step)]


def _pack(rows: list[Rows], shapes: Mapping[str, Any]) -> list[list[Rows]]:
    """In their order, as many together as fit in a piece; never two of the same leaf."""
    packed: list[list[Rows]] = []
    room = 0
    for part in rows:
        size = part.nbytes(shapes[part.leaf])
        if size > room or part.leaf in {other.leaf for other in packed[-1]}:
            packed.append([])
            room = PIECE
        packed[-1].append(part)
        room -= size
    return packed


def load_config(folder: Path) -> ModelConfig:
    """The config of a converted checkpoint.

    Raises LiveAvatarError when the folder is missing, unfinished, or of another kind.
    """
    path = folder / "config.json"
    convert = "`liveavatar-jax convert` makes one"
    if not path.is_file():
        partial = folder.with_name(folder.name.removesuffix(".partial") + ".partial")
        if partial.is_dir():
            raise LiveAvatarError(
                f"the conversion into {partial} was interrupted; run the same "
                "`liveavatar-jax convert` again and it goes on where it stopped"
            )
        raise LiveAvatarError(f"{folder} is not a converted checkpoint; {convert}")
    try:
        return from_dict(ModelConfig, json.loads(path.read_text()))
    except ValueError as error:
        raise LiveAvatarError(
            f"{path} is not the config of a converted checkpoint ({error}); {convert}"
        ) from None


def restore(
    folder: Path,
    which: str,
    sharding: Callable[[str], Sharding] | None = None,
    dtype: str | None = None,
    quantised: str | None = None,
) -> Any:
    """One network of a converted checkpoint, straight onto its devices, item by item.

    which: "dit", "vae", "text" or "speech". sharding: from the path of a leaf to the sharding
    of that whole leaf, default the first device. dtype: of the weights, default as stored.
    quantised: "int8" or "fp8", for a DiT; what it was before is never held as a whole.
    Host memory stays near the largest item. Raises LiveAvatarError for a damaged folder.
    """
    stored = module = abstract(load_config(folder), which, dtype)
    if quantised is not None:
        module = jax.eval_shape(lambda module: quantise(module, quantised), stored)
    shapes, wanted = leaves(stored), leaves(module)
    first = SingleDeviceSharding(jax.devices()[0])
    shardings = {path: sharding(path) if sharding else first for path in shapes | wanted}
    arrays: dict[str, jax.Array] = {}
    for path, start, piece in _pieces(folder, which, stored, shardings):
        rows = {path: piece} if quantised is None else quantise_leaf(path, piece, quantised)
        for path, some in rows.items():
            leaf, place = wanted[path], shardings[path]
            if path in shapes and some.shape == leaf.shape:
                arrays[path] = some  # where it belongs already
                continue
            into = arrays.pop(path, None)
            into = jnp.zeros(leaf.shape, leaf.dtype, device=place) if into is None else into
            arrays[path] = _insert(place)(into, some, start)
    return replace(module, arrays)


def _pieces(
    folder: Path, which: str, stored: Any, shardings: Mapping[str, Sharding]
) -> Iterator[tuple[str, int, jax.Array]]:
    """Leaf, first row, rows: what is stored of a network, piece by piece onto its devices."""
    shapes, file = leaves(stored), packed.file_of(folder, which)
    if file.is_file():
        for path, leaf in packed.pieces(file, shapes, shardings.__getitem__):
            yield path, 0, leaf
        return
    _require_files(folder, which)
    for item, parts in plan(stored, which).items():
        rows = _read(folder / which / item, parts, shapes, shardings)
        for part in parts:
            yield part.leaf, part.start, rows.pop(part.leaf)


def fingerprint(folder: Path) -> str:
    """What tells this checkpoint from others: of its list of files, or of packed networks."""
    listed, digest = folder / "files.json", hashlib.sha256()
    for path in [listed] if listed.is_file() else sorted(folder.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def save(out: Path, cfg: ModelConfig, networks: Mapping[str, Any]) -> None:
    """Writes networks that are in memory ("dit", "vae", "text", "speech") as a new checkpoint.

    Raises LiveAvatarError when `out` is taken or unwritable, and when the disk is full.
    """
    partial = begin(out, {"saved": time.time_ns()})  # never goes on from an older one
    for which, module in networks.items():
        arrays = leaves(module)
        for item, parts in plan(module, which).items():
            rows = {p.leaf: np.asarray(arrays[p.leaf][p.start : p.stop]) for p in parts}
            write(partial / which / item, rows)
    finish(partial, out, cfg)


def begin(out: Path, source: Mapping[str, Any]) -> Path:
    """OUT.partial, ready to be written: what an earlier run left there is kept when it was made
    from the same source, else removed. Raises LiveAvatarError when OUT is taken or unwritable."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LiveAvatarError(f"{out} is there already; remove it or name another --out folder")
    partial = out.with_name(out.name + ".partial")
    note = partial / "source.json"
    try:
        if not note.is_file() or json.loads(note.read_text()) != source:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            note.write_text(json.dumps(source, indent=1))
    except OSError as error:
        raise LiveAvatarError(f"cannot write {partial}: {error.strerror}") from None
    for stray in partial.glob("*/*.orbax-checkpoint-tmp*"):
        shutil.rmtree(stray)
    return partial


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One item, whole or not at all. Raises LiveAvatarError when the disk is full."""
    try:
        with _quiet():
            _checkpointer().save(folder.absolute(), dict(arrays))
    except Exception as error:
        if not _is_full(error):
            raise
        for stray in folder.parent.glob(folder.name + "*"):
            shutil.rmtree(stray, ignore_errors=True)
        raise LiveAvatarError(
            f"the disk is full, {folder} could not be written; free some space and run the same "
            "command again, it goes on from there"
        ) from None


def finish(partial: Path, out: Path, cfg: ModelConfig) -> None:
    """Makes OUT.partial the finished OUT."""
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(partial).as_posix(): _size(path) for path in files}
    (partial / "files.json").write_text(json.dumps(sizes, indent=1))
    (partial / "config.json").write_text(json.dumps(to_dict(cfg), indent=1))
    os.replace(partial, out)


@functools.cache  # not at import, for it touches the devices
def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


def _read(
    item: Path, parts: list[Rows], shapes: Mapping[str, Any], shardings: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
    want = {
        part.leaf: jax.ShapeDtypeStruct(
            part.shape(shapes[part.leaf]),
            shapes[part.leaf].dtype,
            sharding=_of_rows(shardings[part.leaf]),
        )
        for part in parts
    }
    try:
        with _quiet():
            stored = _checkpointer().metadata(item.absolute()).item_metadata
            agree = stored is not None and _shapes(stored.tree) == _shapes(want)
            how = ocp.checkpoint_utils.construct_restore_args(want)
            args = ocp.args.PyTreeRestore(item=want, restore_args=how)
            pieces = _checkpointer().restore(item.absolute(), args=args) if agree else None
    except Exception:  # Orbax raises bare ones, and says nothing but names of its own internals
        raise LiveAvatarError(f"{item} is damaged; convert the checkpoint anew") from None
    if pieces is None:
        raise LiveAvatarError(f"{item} has other shapes than config.json; convert anew")
    return pieces


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {path: tuple(array.shape) for path, array in arrays.items()}


def _require_files(folder: Path, which: str) -> None:
    if not (folder / "files.json").is_file():
        raise LiveAvatarError(
            f"{folder} has no {packed.file_of(folder, which).name}; copy or pack the folder anew"
        )
    listed = json.loads((folder / "files.json").read_text())
    sizes = {path: size for path, size in listed.items() if path.startswith(f"{which}/")}
    bad = [p for p, n in sizes.items() if not (folder / p).is_file() or _size(folder / p) != n]
    if bad or not sizes:
        what = f"{', '.join(bad)} is missing or cut off" if bad else f"it has no {which} network"
        raise LiveAvatarError(f"{folder}: {what}; copy or convert the checkpoint anew")


def _size(path: Path) -> int:
    return path.stat().st_size


def _of_rows(sharding: Sharding) -> Sharding:
    """A single row cannot be split over devices as the whole leading axis may be."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
    return sharding


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs pages about a failure before it raises; the sentence of the error is enough."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


@functools.cache
def _insert(sharding: Sharding) -> Callable[..., jax.Array]:
    return jax.jit(
        lambda into, rows, start: jax.lax.dynamic_update_slice_in_dim(into, rows, start, 0),
        donate_argnums=0,
        out_shardings=sharding,
    )


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or "Disk quota" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
