"""Makes the speech that puppets are trained on, once for all runs:

    python -m train.speech --out speech --clips 2000 --seconds 8

2,000 clips of 8 s with the truth about the mouth take about a minute and a half on two cores, and
half a gigabyte. Sentences and voices of train, validation and held-out have nothing in common
(data/sentences.py, data/voice.py). A run that was stopped goes on where it was; --clips may grow.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from liveavatar_jax.data.mouth import FPS
from liveavatar_jax.data.sentences import SPLITS
from liveavatar_jax.data.spoken import part_path, settle, write_part
from liveavatar_jax.types import LiveAvatarError

PER_PART = 50  # clips


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--clips", type=int, default=2000, help="to train (default: %(default)s)")
    parser.add_argument("--others", type=int, default=100, metavar="N",
                        help="to validate, and as many held out (default: %(default)s)",
                        )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=8, help="of a clip (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        for name in ("clips", "others", "seconds", "workers"):
            if getattr(args, name) <= 0:
                raise LiveAvatarError(f"--{name} {getattr(args, name)} must be above 0")
        if args.seed < 0:
            raise LiveAvatarError(f"--seed {args.seed} must not be negative")
        numbers = (args.clips, args.others, args.others)
        counts: dict[str, int] = dict(zip(SPLITS, numbers, strict=True))
        make_speech(args.out, counts, round(args.seconds * FPS), args.seed, args.workers)
    except LiveAvatarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def make_speech(
    out: Path, counts: dict[str, int], frames: int, seed: int = 0, workers: int = 2
) -> None:
    """Writes the parts that are missing. Raises LiveAvatarError for a folder of other speech."""
    settle(out, {"frames": frames, "seed": seed, "per_part": PER_PART})
    jobs = [
        (part_path(out, split, part), split, range(part * PER_PART, (part + 1) * PER_PART))
        for split, count in counts.items()
        for part in range(-(-count // PER_PART))
    ]
    left = [job for job in jobs if not job[0].exists()]
    total = len(jobs) * PER_PART
    with tqdm(total=total, initial=total - len(left) * PER_PART, unit="clip", disable=None) as bar:
        if workers == 1 or len(left) < 2:
            for job in left:
                write_part(*job, frames, seed)
                bar.update(PER_PART)
            return
        spawn = multiprocessing.get_context("spawn")  # espeak's state must not be inherited
        with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
            made = [pool.submit(write_part, *job, frames, seed) for job in left]
            try:
                for future in as_completed(made):
                    future.result()
                    bar.update(PER_PART)
            except BrokenProcessPool:
                raise LiveAvatarError(
                    f"a process that made speech for {out} was killed; run the command again, "
                    "with --workers 1 if memory is short"
                ) from None
            finally:
                pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
