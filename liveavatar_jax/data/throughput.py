"""How fast batches come: `python -m liveavatar_jax.data.throughput [FOLDER ...] [--batch N]`.

Without a folder, shards of noise of the published size (720x400 pixels, 21 latent frames) are
written to a temporary one first. The second of two passes over them counts, so that shards which
fit into memory are read from there: a rate far above that of your disk says so.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from liveavatar_jax.data.clips import Batches, DataConfig, Source, open_clips, open_synthetic
from liveavatar_jax.data.records import PER_LATENT, About, Clip, Shapes, pack, write_shard
from liveavatar_jax.types import LiveAvatarError

PUBLISHED = Shapes(f=21, m=19, h=50, w=90, c=16, layers=25, audio_dim=1024, text_dim=4096)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="throughput", description=__doc__)
    parser.add_argument("folders", nargs="*", help="folders of shards")
    parser.add_argument("--batch", type=int, default=4, help="rows (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=DataConfig.threads)
    parser.add_argument("--records", type=int, default=48, help="to make, without a folder")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement")
    args = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as temporary:
            folders = tuple(args.folders)
            if not folders:
                blobs = noise(PUBLISHED, args.records)
                write_shard(Path(temporary) / "clips-00000.array_record", blobs)
                folders = (temporary,)
            cfg = DataConfig((Source(folders),), batch=args.batch, threads=args.threads)
            data = open_clips(cfg)
            passes = dataclasses.asdict(data.shapes)
            print(" ".join(f"{name}={value}" for name, value in passes.items()))
            report("shards", data, args.seconds)
            report("synthetic", open_synthetic(cfg, data.shapes), args.seconds)
    except LiveAvatarError as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    return 0


def report(name: str, data: Batches, seconds: float) -> None:
    """Prints batches and MB per second, and what of a core a batch costs, which other work on the
    machine hardly changes; the first batches, which fill the buffer, do not count."""
    first = next(data)
    size = sum(array.nbytes for array in first.values())
    for _ in range(8):
        next(data)
    count, begun, busy = 0, time.perf_counter(), time.process_time()
    while (spent := time.perf_counter() - begun) < seconds and count < 100_000:
        next(data)
        count += 1
    busy = (time.process_time() - busy) / count
    data.close()
    rate = count / spent
    print(
        f"{name:10} {rate:12.1f} batches/s {rate * size / 1e6:12.0f} MB/s; {busy * 1e3:.2f} ms of "
        f"a core for a batch of {size / 1e6:.1f} MB"
    )


def noise(shapes: Shapes, count: int, references: int = 3, text: int = 128) -> Iterator[bytes]:
    """Records of random numbers."""
    rng, s = np.random.default_rng(0), shapes
    grid = (s.h, s.w, s.c)
    sizes = {
        "latents": (s.f, *grid),
        "motion": (s.m, *grid),
        "references": (references, *grid),
        "stills": (references, s.m, *grid),
        "text": (text, s.text_dim),
        "audio": (PER_LATENT * s.f, s.layers, s.audio_dim),
    }
    for number in range(count):
        arrays = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
        arrays = {name: array.astype(s.dtype) for name, array in arrays.items()}
        yield pack(Clip(**arrays, about=About(f"noise{number}", 0.0, PER_LATENT * s.f)))


if __name__ == "__main__":
    sys.exit(main())
