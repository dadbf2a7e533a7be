"""Does it learn? Both stages on a world whose law is known, and what each of their parts is worth.

    python -m train.world --out runs/world            the table, one row after another
    python -m train.world --out runs/world --quick    the recipe and its baseline alone

Each row trains a student with the code of `train.forcing` and `train.distill`, with the exact
velocity as its teacher, lets it stream with the audio of clips that it has not seen, and compares
that with clips drawn from the exact law. A row that is done stays in the folder, so what was
interrupted goes on with the next one.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from liveavatar_jax.diffusion.flow import euler, sampling_levels
from liveavatar_jax.types import Array, Float, LiveAvatarError
from train.ablation import BLOCK, LONG, MANY, QUICK, ROWS, WORLD, Budget, teacher, trained
from train.gaussians import TEXT, kinds, positions, pushes, sample
from train.likeness import Distance, energy
from train.networks import Frozen
from train.sample import sampled


@dataclasses.dataclass(frozen=True)
class Report:
    """What a row's clips are like. Energy distances are of clips together with their audio, of a
    clip's last frame alone, of the positions at the seams of blocks together with the push between
    them, and of the last stretch of long videos; `follows` is what the position does per push of
    the audio, `rarest` the share of the kind that is seen least, and `stays` the share of long
    videos that end as the kind that they began with."""

    name: str
    clip: Distance
    frame: Distance
    seam: Distance
    late: Distance | None
    follows: float
    rarest: float
    stays: float | None
    seconds: float

    def line(self) -> str:
        cell = lambda d: "–" if d is None else f"{d.value:.4f} ({d.low:.4f}, {d.high:.4f})"
        stays = "–" if self.stays is None else f"{self.stays:.0%}"
        distances = map(cell, (self.clip, self.frame, self.seam, self.late))
        return (
            f"| `{self.name}` {ROWS[self.name].says} | {' | '.join(distances)} | "
            f"{self.follows:.2f} | {self.rarest:.0%} | {stays} | {self.seconds:.0f} |"
        )


HEAD = (
    "| row | clips | frames | seams of blocks | after 10 clips' time | follows | rarest | stays "
    "| s |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def judged(name: str, budget: Budget, folder: Path, show: bool = True) -> Report:
    """Trains a row, and compares what it makes with exact clips of other audio."""
    began, row = time.monotonic(), ROWS[name]
    frames = WORLD.frames if name == "teacher" or "steps" in row.stream else LONG * WORLD.frames
    batch = sample(WORLD, jax.random.key(11), budget.judged, frames)
    if name == "exact":
        made = batch["latents"]
    elif name == "teacher":
        made = _solved(batch)
    else:
        exp, student = trained(name, budget, folder, show)
        frozen = Frozen(base=None, negative=jnp.zeros((1, TEXT)))
        make = jax.jit(functools.partial(sampled, exp, MANY, frozen))
        made = make(student, {k: a for k, a in batch.items() if k != "latents"})
    return report(name, made, pushes(batch["audio"]), time.monotonic() - began)


def report(
    name: str, made: Float[Array, "b f h w c"], push: Float[Array, "b f"], seconds: float = 0.0
) -> Report:
    """The judgement on clips, or long videos, that were made for these pushes."""
    true = sample(WORLD, jax.random.key(12), len(made))
    real, heard = true["latents"], pushes(true["audio"])
    first, last = slice(None, WORLD.frames), slice(-WORLD.frames, None)
    whole = lambda x, p: np.concatenate([np.asarray(x).reshape(len(x), -1), np.asarray(p)], axis=1)

    def seam(x: Array, p: Array) -> np.ndarray:
        """Before and after the last seam of a clip, and what is heard there; few numbers, for
        among many the audio's would count for little."""
        at = slice(WORLD.frames - BLOCK - 1, WORLD.frames - BLOCK + 1)
        return np.concatenate([positions(WORLD, x)[:, at], p[:, at][:, 1:]], axis=1)

    long = made.shape[1] > WORLD.frames
    clip, said = made[:, first], push[:, first]
    show = kinds(WORLD, made)
    share = np.bincount(np.asarray(show[:, first]).ravel(), minlength=WORLD.kinds)
    follows = jnp.mean(positions(WORLD, clip) * said) / jnp.mean(said**2)
    return Report(
        name=name,
        clip=energy(whole(clip, said), whole(real, heard)),
        frame=energy(*(np.asarray(x)[:, -1].reshape(len(x), -1) for x in (clip, real))),
        seam=energy(seam(clip, said), seam(real, heard)),
        late=energy(whole(made[:, last], push[:, last]), whole(real, heard)) if long else None,
        follows=float(follows),
        rarest=float(share.min() / share.sum()),
        stays=float(jnp.mean(show[:, 0] == show[:, -1])) if long else None,
        seconds=seconds,
    )


def _solved(batch: dict[str, Array], steps: int = 4) -> Float[Array, "b f h w c"]:
    """Clips by the solver and the exact velocity, at the levels of the stream."""
    levels = sampling_levels(steps)
    x = jax.random.normal(jax.random.key(13), batch["latents"].shape)
    for sigma, to in itertools.pairwise(levels):
        v = teacher(x, jnp.full(len(x), sigma), True, True, batch)
        x = euler(x, v, jnp.asarray(sigma), jnp.asarray(to))
    return x


# ---- the command


def main(argv: Sequence[str] | None = None) -> int:
    """0 = done, 2 = refused with one sentence, 130 = interrupted; rows that are done are kept."""
    args = _parser().parse_args(argv)
    try:
        return _table(args)
    except LiveAvatarError as error:
        print(f"world: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the rows; goes on there")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--json", action="store_true", help="as JSON")
    for field in dataclasses.fields(Budget):
        parser.add_argument(f"--{field.name}", type=int, default=field.default, metavar="N",
                            help=f"default: {field.default}")  # fmt: skip
    return parser


def _table(args: argparse.Namespace) -> int:
    names = args.rows or (QUICK if args.quick else tuple(ROWS))
    for name in names:
        if name not in ROWS:
            raise LiveAvatarError(f"--rows: there is no {name!r}; name some of {', '.join(ROWS)}")
    budget = Budget(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Budget)})
    for field, value in dataclasses.asdict(budget).items():
        if value < (0 if field == "warm" else 1):
            raise LiveAvatarError(f"--{field} {value} must be at least 1")
    jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
    reports = []
    for name in names:
        path = args.out / f"{name}.json"
        found = _stored(path, budget)
        if found is None:
            print(f"{name}: {ROWS[name].says}", file=sys.stderr)
            found = judged(name, budget, args.out)
            args.out.mkdir(parents=True, exist_ok=True)
            whole = {"budget": dataclasses.asdict(budget), "report": dataclasses.asdict(found)}
            path.write_text(json.dumps(whole, indent=1))
        print(found.line(), file=sys.stderr)
        reports.append(found)
    if args.json:
        print(json.dumps([dataclasses.asdict(r) for r in reports], indent=1))
    else:
        print("\n".join([HEAD, *(r.line() for r in reports)]))
    return 0


def _stored(path: Path, budget: Budget) -> Report | None:
    """A row that is done, with the same budget."""
    try:
        whole = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if whole["budget"] != dataclasses.asdict(budget):
        return None
    fields = whole["report"]
    for name in ("clip", "frame", "seam", "late"):
        fields[name] = None if fields[name] is None else Distance(**fields[name])
    return Report(**fields)


if __name__ == "__main__":
    sys.exit(main())
