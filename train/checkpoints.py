"""The steps of a run on disk: whole or absent, written while training goes on, read on any mesh.

    RUN/checkpoints/120/state     what is trained, the optimisers, keys and counters (Orbax)
                       /sums      a checksum of each leaf, taken on the devices
                       /data      the position of the input pipeline
                       /config    the experiment, to notice that another one goes on

A step is written under another name and renamed when all of it is there, so a run that was killed
at any moment finds only whole ones. The frozen base is not in here: it comes from its own folder.
"""

import contextlib
import errno
import functools
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.types import LiveAvatarError
from train.description import describe, require_same

FOLDER = "checkpoints"
ITEMS = ("state", "sums", "data", "config")


class Checkpoints:
    """The steps of one run; a context manager that waits for the last save when it is left.

    run: the folder of the run, or a bucket such as gs://bucket/run. config: the experiment, as
    `describe` reads it. keep: so many newest steps stay; keep_every: so does every such step, for
    good. may_differ: dotted fields of the config that another start of the run may change.

    With several processes all call everything, in the same order. Raises LiveAvatarError where
    the folder cannot be written.
    """

    def __init__(
        self,
        run: str | Path,
        config: Any,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        may_differ: Sequence[str] = (),
    ):
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise LiveAvatarError(f"keep = {keep} and keep_every = {keep_every} must be at least 1")
        self.folder = _folder(run)
        self.config = describe(config)
        self.may_differ = tuple(may_differ)
        self._later: list[int] = []
        _hush()
        for name in ("absl", "asyncio"):  # pages about a failure, beside its error
            logging.getLogger(name).setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, keep_period=keep_every, cleanup_tmp_directories=True,
            save_root_metadata=False,
        )  # fmt: skip
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=ITEMS)
        except OSError as error:
            raise LiveAvatarError(
                f"{self.folder} cannot be written ({error.strerror}); name another run folder"
            ) from None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        with contextlib.suppress(Exception) if kind else contextlib.nullcontext():
            self.close()

    @property
    def steps(self) -> list[int]:
        """The whole steps on disk, oldest first; one that is being written is not among them."""
        return sorted(self._manager.all_steps(read=True))

    @property
    def latest(self) -> int | None:
        """The newest whole step on disk; None before the first."""
        return max(self.steps, default=None)

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Saves a step; returns once the arrays are copied to the host, and writes on.

        state: any pytree of arrays, typed keys among them; it may be donated right after. data:
        the JSON position of the input pipeline, equal on every process. A save that is still
        being written is waited for. After `restore` of an older step the later ones go first.
        Raises LiveAvatarError for a save that failed, this one or the one before.
        """
        arrays = _arrays(state)
        with self._failing_cleanly(step):
            self._manager.wait_until_finished()
            self._forget_later()
            if step in self.steps:
                return  # this very step was resumed
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(arrays),
                    sums=ocp.args.JsonSave(_sums(arrays)),
                    data=ocp.args.JsonSave(dict(data)),
                    config=ocp.args.JsonSave(self.config),
                ),
                force=True,
            )

    def restore(self, state: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """The state of a step (default: the newest) and the position of its input pipeline.

        state: what `save` was given, as arrays or shapes; its shardings, on whatever mesh, decide
        where the leaves go. A leaf without one goes to the first device.

        Raises LiveAvatarError when there is no such step, when the config differs (by field),
        when the leaves do (by path), and when the step is damaged.
        """
        step = self._require(step)
        stored = _read_json(self.folder, step, "config", self._way_out(step))
        require_same(stored, self.config, self.may_differ, str(self.folder / str(step)))
        _require_leaves(_shapes(self.folder, step, self._way_out(step)), _described(state),
                        self.folder / str(step))  # fmt: skip
        wanted = {path: _data_of(leaf) for path, leaf in leaves(state).items()}
        with _damaged(self.folder / str(step), self._way_out(step)):
            how = ocp.checkpoint_utils.construct_restore_args(_by_name(state, wanted))
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(item=_by_name(state, wanted), restore_args=how),
                    sums=ocp.args.JsonRestore(),
                    data=ocp.args.JsonRestore(),
                ),
            )
            sums = _sums(found["state"])
        if bad := [name for name, value in sums.items() if found["sums"].get(name) != value]:
            raise LiveAvatarError(
                f"{self.folder / str(step)} is damaged, {bad[0]} is not what was saved"
                f"{self._way_out(step)}"
            )
        self._later = [each for each in self.steps if each > step]  # all processes see the same
        return _rebuilt(state, found["state"]), found["data"]

    def wait(self) -> None:
        """Returns when the last save is on disk. Raises LiveAvatarError if it failed."""
        with self._failing_cleanly(None):
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises LiveAvatarError if a save failed in the meantime; costs nothing."""
        with self._failing_cleanly(None):
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits for the last save and ends the writing threads. Raises as `wait` does."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):
                self._manager.close()

    def _require(self, step: int | None) -> int:
        steps = self.steps
        if not steps:
            raise LiveAvatarError(f"{self.folder} holds no whole step to go on from")
        if step is not None and step not in steps:
            raise LiveAvatarError(
                f"--resume-step {step}: {self.folder} holds {', '.join(map(str, steps))}"
            )
        return steps[-1] if step is None else step

    def _way_out(self, step: int) -> str:
        earlier = [each for each in self.steps if each < step]
        if earlier:
            return f"; go on from the step before it with --resume-step {earlier[-1]}"
        return "; there is no earlier step, start anew in another run folder"

    def _forget_later(self) -> None:
        """The steps that the resumed one is about to overtake, should there be any."""
        later, self._later = self._later, []
        if later:
            self._manager.reload()
        for step in later:
            self._manager.delete(step)

    @contextlib.contextmanager
    def _failing_cleanly(self, step: int | None) -> Iterator[None]:
        """One sentence for what stopped a save, and no half-written step left behind."""
        try:
            yield
        except (LiveAvatarError, jax.errors.JaxRuntimeError):
            raise  # the latter of a lost process, which `hosts.guard` knows about
        except Exception as error:  # tensorstore and Orbax raise what they like
            if jax.process_index() == 0:
                for stray in self.folder.glob("*orbax-checkpoint-tmp*"):
                    with contextlib.suppress(OSError):
                        stray.rmtree()
            newest = self.latest
            intact = "no step was saved before" if newest is None else f"step {newest} is intact"
            remedy = "start the same command again, it goes on from there"
            if _is_full(error):
                text = f"the disk is full, a step could not be saved in {self.folder}; {intact}, "
                raise LiveAvatarError(f"{text}free some space and {remedy}") from None
            said = str(error).strip().splitlines()
            raise LiveAvatarError(
                f"a step could not be saved in {self.folder} "
                f"({type(error).__name__}: {said[0] if said else ''}); {intact}, {remedy}"
            ) from error


def stored(run: str | Path, step: int | None = None) -> tuple[int, dict[str, Any]]:
    """A whole step of a run (default: the newest) and the config it was trained with.

    Raises LiveAvatarError when there is none.
    """
    folder = _folder(run)
    steps = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    if not steps or (step is not None and step not in steps):
        has = f"has the steps {', '.join(map(str, sorted(steps)))}" if steps else "has no step"
        raise LiveAvatarError(f"{folder} {has}; name the folder of a run, and one of its steps")
    step = max(steps) if step is None else step
    return step, _read_json(folder, step, "config", "; take another --step")


def shapes(run: str | Path, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of the state of a step by path; of typed keys, their numbers."""
    found = _shapes(_folder(run), step, "; take another --step")
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in found.items()}


def read(run: str | Path, step: int, paths: Sequence[str]) -> dict[str, np.ndarray]:
    """Some leaves of the state of a step, in host memory. Raises LiveAvatarError if damaged."""
    folder, known = _folder(run), shapes(run, step)
    want = {path: known[path] for path in paths}
    with _damaged(folder / str(step), "; take another --step"):
        how = {path: ocp.RestoreArgs(restore_type=np.ndarray) for path in want}
        args = ocp.args.PyTreeRestore(item=want, restore_args=how, partial_restore=True)
        return _reader(ocp.PyTreeCheckpointHandler).restore(folder / str(step) / "state", args=args)


@functools.cache  # not at import, for it touches the devices
def _reader(kind: type) -> ocp.Checkpointer:
    return ocp.Checkpointer(kind())


def _folder(run: str | Path) -> epath.Path:
    return (
        (epath.Path(run) / FOLDER).absolute() if "://" not in str(run) else epath.Path(run) / FOLDER
    )


def _read_json(folder: epath.Path, step: int, item: str, way_out: str) -> Any:
    with _damaged(folder / str(step), way_out):
        return _reader(ocp.JsonCheckpointHandler).restore(folder / str(step) / item)


@functools.cache
def _hush() -> None:
    """After the first array that fails Orbax leaves those of the others behind, which complain
    when they are swept up, each with a traceback of its own."""
    tell = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        left = "orbax" in getattr(code, "co_filename", "")
        if not left and "Event loop is closed" not in str(unraisable.exc_value):
            tell(unraisable)

    sys.unraisablehook = hook


@contextlib.contextmanager
def _damaged(folder: epath.Path, way_out: str) -> Iterator[None]:
    _hush()
    try:
        yield
    except Exception as error:
        if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
            raise  # a lost process, most likely: not the folder's fault
        said = (str(error).strip().splitlines() or [""])[0][:120]
        raise LiveAvatarError(
            f"{folder} is damaged ({type(error).__name__}: {said}){way_out}"
        ) from None


def _shapes(
    folder: epath.Path, step: int, way_out: str
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    with _damaged(folder / str(step), way_out):
        found = (
            _reader(ocp.PyTreeCheckpointHandler)
            .metadata(folder / str(step) / "state")
            .item_metadata
        )
        if found is None:
            raise ValueError("it does not say what it holds")
        return {name: (tuple(m.shape), np.dtype(m.dtype)) for name, m in found.tree.items()}


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _name(path: str, leaf: Any) -> str:
    """The name in the file: a key says of which kind it is, for its numbers do not."""
    return f"{path}@{leaf.dtype.name}" if _is_key(leaf) else path


def _by_name(state: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    return {_name(path, leaf): values[path] for path, leaf in leaves(state).items()}


def _arrays(state: Any) -> dict[str, jax.Array]:
    """The leaves of a state by name, keys as their numbers."""
    found = leaves(state)
    for path, leaf in found.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{path} is a {type(leaf).__name__}, not an array on a device")
    if len(found) != len(jax.tree.leaves(state)):
        raise TypeError("two leaves of the state have the same path")
    data = {p: jax.random.key_data(x) if _is_key(x) else x for p, x in found.items()}
    return _by_name(state, data)


def _data_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and place of what is read for a leaf."""
    place: Sharding | None = getattr(leaf, "sharding", None)
    place = SingleDeviceSharding(jax.local_devices()[0]) if place is None else place
    if _is_key(leaf):
        plain = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return jax.ShapeDtypeStruct(plain.shape, plain.dtype, sharding=place)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _described(state: Any) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    data = {path: _data_of(leaf) for path, leaf in leaves(state).items()}
    return {n: (tuple(x.shape), np.dtype(x.dtype)) for n, x in _by_name(state, data).items()}


def _rebuilt(state: Any, arrays: Mapping[str, jax.Array]) -> Any:
    made = {}
    for path, leaf in leaves(state).items():
        array = arrays[_name(path, leaf)]
        if _is_key(leaf):
            array = jax.random.wrap_key_data(array, impl=_impl(leaf.dtype))
        made[path] = array
    return replace(state, made)


def _impl(dtype: Any) -> str:
    """The kind of key whose dtype is called key<fry>, key<rbg> or key<urbg>."""
    kinds = {"fry": "threefry2x32", "rbg": "rbg", "urbg": "unsafe_rbg"}
    return kinds[re.fullmatch(r"key<(\w+)>", dtype.name)[1]]  # type: ignore[index]


def _sums(arrays: Mapping[str, jax.Array]) -> dict[str, int]:
    """A checksum of each array: its bits, added up. The same however it is split over devices."""
    groups: dict[Mesh, dict[str, jax.Array]] = {}
    for name, array in arrays.items():
        groups.setdefault(_mesh(array.sharding), {})[name] = array
    found: dict[str, int] = {}
    for mesh, group in groups.items():
        with jax.set_mesh(mesh):
            sums = _added(group)
        found |= {name: int(value) for name, value in jax.device_get(sums).items()}
    return found


def _mesh(sharding: Sharding) -> Mesh:
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
        return sharding.mesh
    return Mesh(np.array(sorted(sharding.device_set, key=lambda device: device.id)), ("device",))


@jax.jit
def _added(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    near = jax.device_put(arrays, jax.memory.Space.Device)  # what is offloaded to the host
    return {name: _bits(x).astype(jnp.uint32).sum(dtype=jnp.uint32) for name, x in near.items()}


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def _require_leaves(
    before: Mapping[str, tuple], now: Mapping[str, tuple], folder: epath.Path
) -> None:
    for name in sorted(before.keys() | now.keys()):
        if name in before and name in now and before[name] == now[name]:
            continue
        was, is_ = ("{1} {0}".format(*where[name]) if name in where else "absent"
                    for where in (before, now))  # fmt: skip
        raise LiveAvatarError(
            f"{folder} fits another network: {name} is {was} there and {is_} here; go on with the "
            "config it was made with"
        )


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        said = str(error)
        if isinstance(error, OSError) and error.errno in full:
            return True
        if any(words in said for words in ("No space left", "Disk quota", "File too large")):
            return True
        error = error.__cause__ or error.__context__
    return False
