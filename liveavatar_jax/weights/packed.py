"""Small models as files that are easy to ship: config.json and one safetensors file a network.

    FOLDER/config.json           ModelConfig
    FOLDER/dit.safetensors       the leaves of a network by path, in float16 or float32
    FOLDER/vae.safetensors       and so on: text, speech, readers
    FOLDER/spiece.model          the tokenizer of the text encoder
    FOLDER/portrait.png          what `liveavatar-jax generate` takes when nothing else is given
    FOLDER/speech.wav

`checkpoint.restore` reads such a folder like any other; the dtype in memory is the config's.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding
from safetensors.numpy import save

from liveavatar_jax.config import ModelConfig, to_dict
from liveavatar_jax.paths import leaves, replace
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import files

PRESETS = Path(__file__).parents[1] / "presets"  # built-in ones, which the wheel carries
PRESET = "puppet"
PORTRAIT, SPEECH = "portrait.png", "speech.wav"
DTYPES = ("float16", "float32")


def file_of(folder: Path, which: str) -> Path:
    """Where a network lies in a packed folder."""
    return folder / f"{which}.safetensors"


def preset(name: str = PRESET) -> Path:
    """The folder of a built-in model. Raises LiveAvatarError when there is none of that name."""
    if not (PRESETS / name / "config.json").is_file():
        have = sorted(path.parent.name for path in PRESETS.glob("*/config.json"))
        raise LiveAvatarError(
            f"there is no built-in model {name!r}"
            + (f"; there is {', '.join(have)}" if have else "")
            + "; name a converted checkpoint with --weights DIR (`liveavatar-jax convert` makes "
            "one from the published files)"
        )
    return PRESETS / name


def own(folder: Path, name: str, instead: str) -> Path:
    """A file that a model brings along. Raises LiveAvatarError when it has none: name `instead`."""
    if not (folder / name).is_file():
        raise LiveAvatarError(f"{folder} has no {name} of its own; name a {instead}")
    return folder / name


def pack(
    folder: Path,
    cfg: ModelConfig,
    networks: Mapping[str, Any],
    dtype: str | Callable[[str], str] = "float16",
) -> None:
    """Writes networks ("dit", "vae", "text", ...) and the config; other files stay as they are.

    dtype: "float16" or "float32", or a function of a leaf's path, as "dit.head.out.kernel".
    Raises LiveAvatarError when a weight does not fit into its dtype or a file cannot be written.
    """
    for which, module in networks.items():
        of = dtype if isinstance(dtype, str) else lambda path, which=which: dtype(f"{which}.{path}")
        write(file_of(folder, which), module, of)
    text = json.dumps(to_dict(cfg), indent=1)
    _replace(folder / "config.json", lambda partial: partial.write_text(text))


def write(path: Path, module: Any, dtype: str | Callable[[str], str] = "float16") -> None:
    """One network as one file, whole or not at all; `dtype` as in `pack`, without the network.

    Raises LiveAvatarError when a weight does not fit into its dtype or the file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in leaves(module).items():
        wanted = dtype if isinstance(dtype, str) else dtype(name)
        if wanted not in DTYPES:
            raise LiveAvatarError(f"{name}: dtype {wanted!r} must be one of {', '.join(DTYPES)}")
        with np.errstate(over="ignore"):
            arrays[name] = np.ascontiguousarray(np.asarray(leaf).astype(np.float32).astype(wanted))
        if not np.isfinite(arrays[name]).all():
            raise LiveAvatarError(f"{path}: {name} has values that {wanted} cannot hold")
    _replace(path, lambda partial: partial.write_bytes(save(arrays)))


def read(path: Path, module: Any, sharding: Callable[[str], Sharding] | None = None) -> Any:
    """The network of a file, in the shapes and dtypes of `module`, which may be abstract.

    Raises LiveAvatarError when the file is missing, damaged or of another network.
    """
    first = SingleDeviceSharding(jax.devices()[0])
    return replace(module, dict(pieces(path, leaves(module), sharding or (lambda path: first))))


def pieces(
    path: Path, shapes: Mapping[str, Any], sharding: Callable[[str], Sharding]
) -> Iterator[tuple[str, jax.Array]]:
    """The leaves of a file one after another, each on its devices, in the dtypes of `shapes`."""
    if not path.is_file():
        raise LiveAvatarError(f"{path} is missing; copy the folder anew")
    stored = files.read(path)
    foreign, absent = stored.keys() - shapes.keys(), shapes.keys() - stored.keys()
    for name in sorted(foreign):
        raise LiveAvatarError(f"{path}: {name} is no weight of this network; pack it anew")
    for name in sorted(absent):
        raise LiveAvatarError(f"{path} has no {name}; pack the network anew")
    for name, leaf in shapes.items():
        array = stored[name]
        if array.shape != leaf.shape:
            raise LiveAvatarError(
                f"{path}: {name} has shape {list(array.shape)}, and the config wants "
                f"{list(leaf.shape)}; pack both anew"
            )
        # A copy: nothing in memory may hang on the file.
        cut = lambda index, array=array, leaf=leaf: np.array(array[index], leaf.dtype)
        yield name, jax.make_array_from_callback(leaf.shape, sharding(name), cut)


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise LiveAvatarError(f"cannot write {path}: {str(error.strerror).lower()}") from None
