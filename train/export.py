"""From a run to the published form, and back: a LoRA as one file, or the whole DiT as shards.

    python -m train.export RUN --out lora.safetensors --ema
    liveavatar-jax convert --base Wan2.2-S2V-14B --lora lora.safetensors --out WEIGHTS

Names and shapes are those of the released files. The alpha of a LoRA is kept in the file's header,
where `convert` and `read_lora` look for it. The shards of a DiT take the place of the published
ones in their folder.
"""

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from liveavatar_jax.models.lora import Factors
from liveavatar_jax.types import LiveAvatarError
from liveavatar_jax.weights import rules
from liveavatar_jax.weights.convert import lora_alpha
from liveavatar_jax.weights.files import read
from liveavatar_jax.weights.rules import Rule
from liveavatar_jax.weights.wan import DIT_RULES, LORA_RULES, abstract_lora
from train import checkpoints

SHARD = 4 * 2**30  # bytes; of a file at most, unless a single leaf is larger
NAME = "diffusion_pytorch_model"


def export(
    run: str | Path,
    out: Path,
    *,
    step: int | None = None,
    part: str = "student",
    alpha: float | None = None,
    dtype: str | None = None,
) -> int:
    """Writes a part of a step's state in the published form; returns the step.

    run: the folder of the run. out: a .safetensors file for a LoRA, a new folder for a DiT. step:
    default the newest. part: "student", "average" or "critic", or a longer path within the state.
    alpha: of the LoRA, default by the config of the run. dtype: default as trained.

    Raises LiveAvatarError when there is no such step or part, when a weight has no published
    name, and when `out` is taken or cannot be written.
    """
    step, config = checkpoints.stored(run, step)
    known = checkpoints.shapes(run, step)
    part = _within(known, part, f"step {step} of {run}")
    ours = {path.removeprefix(part): x for path, x in known.items() if path.startswith(part)}
    if all(path.endswith((".kernel.a", ".kernel.b")) for path in ours):
        if out.suffix != ".safetensors":
            raise LiveAvatarError(f"--out {out} must be a .safetensors file, for this is a LoRA")
        alpha = _alpha(config, run) if alpha is None else alpha
        rank = next(x.shape[-1] for path, x in ours.items() if path.endswith(".a"))
        _require_rules(ours, LORA_RULES)
        tensors = rules.export(_read(run, step, part, ours, dtype), LORA_RULES)
        about = {"lora_alpha": repr(float(alpha)), "r": str(rank), "step": str(step)}
        _write(out, tensors, about)
    else:
        if out.suffix:
            raise LiveAvatarError(f"--out {out} must be a folder, for these are whole networks")
        _require_rules(ours, DIT_RULES)
        _export_shards(run, step, part, ours, out, dtype)
    return step


def weights(
    run: str | Path, part: str = "student", step: int | None = None
) -> tuple[int, dict[str, np.ndarray]]:
    """The step, and a part of its state under our own names. Raises as `export` does."""
    step, _ = checkpoints.stored(run, step)
    known = checkpoints.shapes(run, step)
    part = _within(known, part, f"step {step} of {run}")
    ours = {path.removeprefix(part): x for path, x in known.items() if path.startswith(part)}
    return step, _read(run, step, part, ours, None)


def read_lora(
    lora: Path, module: Any, *, alpha: float | None = None, dtype: str | None = None
) -> tuple[dict[str, Factors], float]:
    """The factors of a LoRA file or folder for a module (or its shapes), and their scale.

    alpha: default as the file or its folder says, else half the rank, as released. dtype: default
    as stored. Raises LiveAvatarError with everything that does not fit.
    """
    tensors = read(lora)
    shapes = abstract_lora(module, tensors.stored, where=str(lora))
    first = next(iter(tensors.stored.values())).dtype if dtype is None else np.dtype(dtype)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, first), shapes)
    factors = rules.load(shapes, tensors, LORA_RULES, where=str(lora))
    rank = next(iter(shapes.values())).a.shape[-1]
    alpha = lora_alpha(lora) if alpha is None else alpha
    return factors, (rank / 2 if alpha is None else alpha) / rank


def _within(known: Mapping[str, Any], part: str, where: str) -> str:
    """What the paths of a part's weights begin with; a learner has its optimiser beside them."""
    for prefix in (f"{part}.params.network.", f"{part}.params.", f"{part}."):
        if any(path.startswith(prefix) for path in known):
            return prefix
    parts = sorted({path.split(".")[0] for path in known})
    raise LiveAvatarError(f"{where} has no {part!r}, but {', '.join(parts)}")


def _alpha(config: Any, run: str | Path) -> float:
    """The first "alpha" that stands beside a "rank" in the config of the run."""
    queue = [config]
    while queue:
        at = queue.pop(0)
        if isinstance(at, Mapping):
            if {"alpha", "rank"} <= at.keys():
                return float(at["alpha"])
            queue += at.values()
        elif isinstance(at, list):
            queue += at
    raise LiveAvatarError(f"the config of {run} has no alpha beside a rank; give it with --alpha")


def _read(
    run: str | Path, step: int, part: str, ours: Mapping[str, Any], dtype: str | None
) -> dict[str, np.ndarray]:
    found = checkpoints.read(run, step, [part + path for path in ours])
    arrays = {path.removeprefix(part): array for path, array in found.items()}
    return arrays if dtype is None else {p: a.astype(np.dtype(dtype)) for p, a in arrays.items()}


def _require_rules(ours: Mapping[str, Any], table: tuple[Rule, ...]) -> None:
    named = {place.leaf for place in rules.places(dict(ours), table).values()}
    if astray := [path for path in ours if path not in named]:
        raise LiveAvatarError(
            f"{astray[0]} and {len(astray) - 1} more have no published name; only a DiT and its "
            "LoRA can be exported, choose another --part"
        )


def _export_shards(
    run: str | Path,
    step: int,
    part: str,
    ours: Mapping[str, jax.ShapeDtypeStruct],
    out: Path,
    dtype: str | None,
) -> None:
    """The DiT, a shard in memory at a time; the index is written last."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LiveAvatarError(f"{out} is there already; remove it or name another --out folder")
    groups: list[dict[str, jax.ShapeDtypeStruct]] = []
    room = 0
    for path, leaf in ours.items():
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype if dtype is None else dtype).itemsize
        if size > room:
            groups.append({})
            room = SHARD
        groups[-1][path] = leaf
        room -= size
    listed: dict[str, str] = {}
    for i, group in enumerate(groups, 1):
        name = f"{NAME}-{i:05d}-of-{len(groups):05d}.safetensors"
        tensors = rules.export(_read(run, step, part, group, dtype), DIT_RULES)
        _write(out / name, tensors, {"step": str(step)})
        listed |= dict.fromkeys(tensors, name)
    with _writing(out):
        (out / f"{NAME}.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": listed}, indent=1)
        )


def _write(path: Path, tensors: dict[str, np.ndarray], about: dict[str, str]) -> None:
    part = path.with_name(path.name + ".partial")
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, part, metadata=about)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # safetensors has errors of its own kind
        said = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise LiveAvatarError(
            f"{path} cannot be written ({said}); make room or name another --out"
        ) from None


def main(argv: Sequence[str] | None = None) -> int:
    """0 = done, 2 = refused with one sentence."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("train.export", None, __doc__, formatter_class=plain)
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--out", type=Path, required=True,
                        help=".safetensors file for a LoRA, folder for a DiT")  # fmt: skip
    parser.add_argument("--step", type=int, help="default: the newest")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ema", action="store_true", help="the student's moving average")
    which.add_argument("--part", default="student", help="field of the state (default: student)")
    parser.add_argument("--alpha", type=float, help="of the LoRA (default: the run's)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: as trained")
    args = parser.parse_args(argv)
    part = "average" if args.ema else args.part
    try:
        step = export(args.run, args.out, step=args.step, part=part, alpha=args.alpha,
                      dtype=args.dtype)  # fmt: skip
    except LiveAvatarError as error:
        print(f"train.export: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {part} of step {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
