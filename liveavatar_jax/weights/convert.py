"""From the published folders to one converted checkpoint, a layer at a time.

Reads the folder of Wan2.2-S2V-14B as it was downloaded (DiT shards, Wan2.1_VAE.pth,
models_t5_umt5-xxl-enc-bf16.pth, the wav2vec2 folder, the tokenizer), merges the LoRA of Live
Avatar into the DiT on the way, and writes the format of `checkpoint.py`. At most one item (a
layer, or 256 MiB of it) is in memory at a time.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from tqdm import tqdm

from liveavatar_jax.config import ModelConfig
from liveavatar_jax.paths import leaves
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import checkpoint
from liveavatar_jax.weights.checkpoint import NETWORKS, Rows
from liveavatar_jax.weights.encoders import speech_config, text_config
from liveavatar_jax.weights.files import Tensors, read
from liveavatar_jax.weights.rules import Place, match
from liveavatar_jax.weights.vae import vae_config
from liveavatar_jax.weights.wan import LORA_RULES, abstract_lora, dit_config

FOLDER = "Wan2.2-S2V-14B"
VAE_FILE = "Wan2.1_VAE.pth"
TEXT_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
SPEECH_FOLDER = "wav2vec2-large-xlsr-53-english"
TOKENIZER = "spiece.model"


@dataclass(frozen=True)
class Delta:
    """A LoRA file, matched: where the factors of each adapted kernel lie, and how they count."""

    tensors: Tensors
    factors: Mapping[tuple[str, tuple[int, ...]], tuple[str, Place]]
    scale: float

    def added(self, kernel: np.ndarray, leaf: str, index: tuple[int, ...]) -> np.ndarray:
        """The kernel [in, out] plus scale · a b in float32; as it is where nothing is adapted."""
        if (leaf + ".a", index) not in self.factors:
            return kernel
        a, b = (
            np.asarray(place.rule.ours(self.tensors[name]), np.float32)
            for name, place in (self.factors[leaf + f, index] for f in (".a", ".b"))
        )
        delta = (b.T @ a.T).T  # in the memory order of the published kernel, which adds faster
        delta *= np.float32(self.scale)
        delta += kernel.astype(np.float32)
        return delta


@dataclass(frozen=True)
class Source:
    """One published network, matched: which tensor fills which leaf or slice."""

    module: Any
    tensors: Tensors
    names: Mapping[tuple[str, tuple[int, ...]], tuple[str, Place]]
    delta: Delta | None = None

    def rows(self, part: Rows) -> np.ndarray:
        """Our values of some rows of a leaf, in the leaf's dtype."""
        leaf = leaves(self.module)[part.leaf]
        whole = (part.leaf, ()) in self.names
        index = () if whole else (part.start,)
        name, place = self.names[part.leaf, index]
        ours = place.rule.ours(self.tensors[name])
        if self.delta:
            ours = self.delta.added(ours, part.leaf, index)
        ours = ours[part.start : part.stop] if whole else ours[None]
        return np.ascontiguousarray(ours.astype(leaf.dtype))


def convert(
    base: Path,
    lora: Path | None,
    out: Path,
    *,
    alpha: float | None = None,
    progress: bool = True,
) -> ModelConfig:
    """Converts the published folder `base` (or its parent), with `lora` merged in, to `out`.

    lora: a PEFT-style file, or a folder with one and perhaps its adapter_config.json. alpha: the
    LoRA's, default as `lora_alpha` finds it, else half its rank as released (64 for 128).
    Does nothing when `out` was made from the same files; goes on where an interrupted run
    stopped. Raises LiveAvatarError, with everything that is wrong with the tensors at once, and
    for a full disk or an `out` that is taken or cannot be written.
    """
    base, out = _base_folder(base), out.absolute()
    published = {
        "dit": read(base),
        "vae": read(base / VAE_FILE),
        "text": read(base / TEXT_FILE),
        "speech": read(base / SPEECH_FOLDER),
    }
    adapter = None if lora is None else read(lora)
    alpha = lora_alpha(lora) if alpha is None else alpha
    cfg = _config(base, published)
    sources = _match(cfg, published, adapter, lora, alpha)
    files = [path for tensors in published.values() for path in tensors.files]
    note = _fingerprint(files + (adapter.files if adapter else []), alpha)
    if (out / "source.json").is_file() and json.loads((out / "source.json").read_text()) == note:
        return checkpoint.load_config(out)
    partial = checkpoint.begin(out, note)
    _write(partial, sources, progress)
    if tokenizer := next(base.rglob(TOKENIZER), None):
        shutil.copyfile(tokenizer, partial / TOKENIZER)
    checkpoint.finish(partial, out, cfg)
    if (cfg.speech.layers + 1, cfg.speech.dim) != (cfg.dit.audio_layers, cfg.dit.audio_dim):
        print(
            f"This speech encoder ({cfg.speech.layers + 1} states of {cfg.speech.dim}) does not "
            f"fit the DiT ({cfg.dit.audio_layers} of {cfg.dit.audio_dim}); the avatar will be "
            "driven by log-mel features instead.",
            file=sys.stderr,
        )
    return cfg


def _base_folder(base: Path) -> Path:
    for folder in (base, base / FOLDER):
        if (folder / VAE_FILE).is_file() or (folder / TEXT_FILE).is_file():
            return folder
    raise LiveAvatarError(
        f"{base} holds neither {VAE_FILE} nor {FOLDER}/{VAE_FILE}; name the folder into which "
        f"{FOLDER} was downloaded"
    )


def _config(base: Path, published: Mapping[str, Tensors]) -> ModelConfig:
    shapes = {which: tensors.stored for which, tensors in published.items()}
    speech = base / SPEECH_FOLDER / "config.json"
    dtypes = {which: _dtype(tensors) for which, tensors in published.items()}
    dit = dit_config(
        _json(base / "config.json"),
        shapes["dit"],
        str(base / "config.json"),
        param_dtype=dtypes["dit"],
    )
    return ModelConfig(
        dit=dit,
        vae=vae_config(shapes["vae"], param_dtype=dtypes["vae"]),
        text=text_config(shapes["text"], param_dtype=dtypes["text"]),
        speech=speech_config(_json(speech), str(speech), param_dtype=dtypes["speech"]),
    )


def _match(
    cfg: ModelConfig,
    published: Mapping[str, Tensors],
    adapter: Tensors | None,
    lora: Path | None,
    alpha: float | None,
) -> dict[str, Source]:
    sources, faults = {}, []
    for which, tensors in published.items():
        module, network = checkpoint.abstract(cfg, which), NETWORKS[which]
        where = str(tensors.files[0])
        try:
            found = match(module, tensors, network.rules, where=where, ignore=network.ignore)
            sources[which] = Source(module, tensors, _by_place(found))
        except LiveAvatarError as error:
            faults.append(str(error))
    if adapter is not None:
        try:
            module = checkpoint.abstract(cfg, "dit")
            delta = _delta(module, adapter, str(lora), alpha)
            if "dit" in sources:
                sources["dit"] = replace(sources["dit"], delta=delta)
        except LiveAvatarError as error:
            faults.append(str(error))
    if faults:
        raise LiveAvatarError("\n".join(faults))
    return sources


def _delta(module: Any, tensors: Tensors, where: str, alpha: float | None) -> Delta:
    shapes = abstract_lora(module, tensors.stored, where=where)
    found = match(shapes, tensors, LORA_RULES, where=where)
    rank = next(iter(shapes.values())).a.shape[-1]
    return Delta(tensors, _by_place(found), (rank / 2 if alpha is None else alpha) / rank)


def _by_place(
    found: Mapping[str, Place],
) -> dict[tuple[str, tuple[int, ...]], tuple[str, Place]]:
    return {(place.leaf, place.index): (name, place) for name, place in found.items()}


def _write(partial: Path, sources: Mapping[str, Source], progress: bool) -> None:
    """Writes the items that are not there yet."""
    todo, done = [], 0
    for which, source in sources.items():
        shapes = leaves(source.module)
        for item, parts in checkpoint.plan(source.module, which).items():
            size = sum(part.nbytes(shapes[part.leaf]) for part in parts)
            if (partial / which / item).is_dir():
                done += size
            else:
                todo.append((which, item, parts, size))
    need, free = sum(size for *_, size in todo), shutil.disk_usage(partial).free
    if need > free:
        raise LiveAvatarError(
            f"{partial} needs {need / 2**30:.1f} GiB more, but its disk has {free / 2**30:.1f} "
            "GiB free; make room, or name an --out folder on another disk"
        )
    with tqdm(
        total=done + need,
        initial=done,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        disable=not progress,
    ) as bar:
        for which, item, parts, size in todo:
            bar.set_description(f"{which} {item}")
            arrays = {part.leaf: sources[which].rows(part) for part in parts}
            checkpoint.write(partial / which / item, arrays)
            bar.update(size)


def _dtype(tensors: Tensors) -> str:
    """The dtype in which most of the numbers are stored."""
    sizes: dict[str, int] = {}
    for stored in tensors.stored.values():
        if jnp.issubdtype(stored.dtype, jnp.floating):
            sizes[stored.dtype.name] = sizes.get(stored.dtype.name, 0) + stored.nbytes
    return max(sizes, key=lambda name: sizes[name], default="float32")


def lora_alpha(lora: Path | None) -> float | None:
    """The alpha of a LoRA, from its file's own header (as `train.export` writes it) or from the
    adapter_config.json of its folder; None where neither says."""
    if lora is None:
        return None
    if lora.suffix == ".safetensors" and lora.is_file():
        with safe_open(lora, "np") as file:
            said = (file.metadata() or {}).get("lora_alpha")
        return None if said is None else float(said)
    if not (lora / "adapter_config.json").is_file():
        return None
    published = _json(lora / "adapter_config.json")
    for field in ("use_rslora", "use_dora"):
        if published.get(field):
            raise LiveAvatarError(f"{lora / 'adapter_config.json'}: {field} is not supported")
    alpha = published.get("lora_alpha")
    return None if alpha is None else float(alpha)


def _fingerprint(files: list[Path], alpha: float | None) -> dict[str, Any]:
    return {"files": {path.name: path.stat().st_size for path in files}, "alpha": alpha}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise LiveAvatarError(f"{path} is missing; download it again") from None
    except ValueError as error:
        raise LiveAvatarError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(values, dict):
        raise LiveAvatarError(f"{path} is not a JSON object; download it again")
    return values
