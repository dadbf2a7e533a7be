"""What a loop costs beside its steps, and how long it waits for its data:

    python -m train.throughput configs/forcing_tiny.py
    python -m train.throughput configs/distill_tiny.py --pairs 10

The stage's own loop runs as it is: it reads, watches, and writes its metrics. After every few
calls of its compiled steps the very same calls are made again, one after the other and with
nothing around them. The best times of the two are compared, by the clock and by the processors'
time, which other programs on the machine disturb less. Tokens are those of the clips that a step
learns from.

Noise comes in turn from memory (synthetic data) and from ArrayRecord shards of it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax

from liveavatar_jax.data.records import write_shard
from liveavatar_jax.data.throughput import noise
from liveavatar_jax.types import LiveAvatarError
from train import distill, forcing
from train.experiment import Distill, Forcing
from train.run import Run, command, load


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, help="a file with `def config()`, with synthetic data")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE")
    parser.add_argument("--calls", type=int, help="before they are repeated (default: 5, or all "
                        "of a round of the schedule)")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=20, help="how often (default: %(default)s)")
    parser.add_argument("--records", type=int, default=64, help="that are written")
    parser.add_argument("--device", choices=("cpu", "gpu", "tpu"), help="default: the best")
    args = parser.parse_args(argv)
    try:
        exp = load(args.config, (Forcing, Distill), args.set)
        stage = distill.train if isinstance(exp, Distill) else forcing.train
        if exp.synthetic is None:
            raise LiveAvatarError(f"{args.config} has no `synthetic` shapes to make noise of")
        calls = args.calls or _round(exp)
        text = min(128, exp.data.text_len)
        with tempfile.TemporaryDirectory() as folder:
            write_shard(
                Path(folder, "noise.array_record"), noise(exp.synthetic, args.records, text=text)
            )
            sources = f'data.sources=[{{"folders": ["{folder}"]}}]'
            for name, more in (("synthetic", []), ("ArrayRecord", ["synthetic=null", sources])):
                steps = calls * (args.pairs + 1) + 1
                given = [*args.set, *more, f"steps={steps}", f"save_every={steps}"]
                flags = ["--device", args.device] if args.device else []
                train = partial(_measured, name, stage, calls, args.pairs)
                out = str(Path(folder, name))
                code = command(
                    None,
                    type(exp),
                    train,
                    [str(args.config), "--out", out, "--set", *given, *flags],
                )
                if code:
                    return code
    except LiveAvatarError as error:
        print(f"throughput: {error}", file=sys.stderr)
        return 2
    return 0


def _round(exp: Forcing) -> int:
    """Calls after which the same ones follow."""
    if not isinstance(exp, Distill):
        return 5
    return sum(len(exp.schedule.sides(step)) for step in range(exp.schedule.ratio))


def _measured(name: str, train: Callable[[Run], int], calls: int, pairs: int, run: Run) -> int:
    timed = Timed(run, calls, pairs)
    code = train(run)
    exp: Forcing = run.experiment
    _, f, h, w, _ = timed.shape
    tokens = exp.data.batch * f * (h // 2) * (w // 2)
    print(f"{name} data: {tokens} tokens a step, the best of {len(timed.loop)} times {calls} calls")
    best = lambda spent: [min(each[i] for each in spent) / calls for i in (0, 1)]
    loop, bare = best(timed.loop), best(timed.bare)
    for what, (wall, cpu) in (("loop", loop), ("bare", bare)):
        print(f"  {what}  {tokens / wall:10.0f} tokens/s  {1e3 * wall:8.2f} ms a call  "
              f"{1e3 * cpu:8.2f} ms of processors")  # fmt: skip
    print(f"  the loop takes {loop[0] / bare[0] - 1:+.1%} by the clock, "
          f"{loop[1] / bare[1] - 1:+.1%} of the processors' time")  # fmt: skip
    own = median(timed.own)
    print(
        f"  its own thread works {1e3 * own:.2f} ms between two calls, {own / bare[1]:.2%} of one"
    )
    wait = median(timed.waits)
    share = wait / (median(each[0] for each in timed.bare) / calls)
    print(
        f"  a batch is waited for {1e3 * wait:.2f} ms, {share:.2%} of a call (medians)", flush=True
    )
    return code


class Timed:
    """Has a run's compiled steps repeat themselves, and its batches timed.

    loop, bare: seconds by the clock and of the processors, of so many calls each; own: seconds of
    the loop's thread at work between two calls; waits: seconds for each batch to come out of the
    pipeline; shape: of its latents.
    """

    def __init__(self, run: Run, calls: int, pairs: int):
        self.loop: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self.own: list[float] = []
        self.waits: list[float] = []
        self.shape: tuple[int, ...] = ()
        self._calls, self._pairs = calls, pairs
        self._taken: list[tuple[Callable[..., Any], Any]] = []
        self._began: tuple[float, float] | None = None
        self._left: float | None = None
        compiled, take = run.compiled, run.next_batch
        run.compiled = lambda step, state: partial(self._call, compiled(step, state))
        run.next_batch = partial(self._next, take)

    def _next(self, take: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        batch = take()
        self.waits.append(time.perf_counter() - begun)
        self.shape = batch["latents"].shape
        return batch

    def _call(self, step: Callable[..., Any], frozen: Any, state: Any, batch: Any) -> Any:
        if self._left is not None:
            self.own.append(time.thread_time() - self._left)
        if len(self._taken) == self._calls:
            state = self._repeated(frozen, state)
        self._taken.append((step, batch))
        made = step(frozen, state, batch)
        self._left = time.thread_time()
        return made

    def _repeated(self, frozen: Any, state: Any) -> Any:
        """The end of a pair: the calls since the last one once more, bare."""
        looped = self._since(state)
        for step, batch in self._taken:
            state, _ = step(frozen, state, batch)
        bare = self._since(state)
        if looped is not None and bare is not None and len(self.loop) < self._pairs:
            self.loop.append(looped)
            self.bare.append(bare)
        self._taken = []
        return state

    def _since(self, state: Any) -> tuple[float, float] | None:
        """What passed since the last time; None at first, for the steps were compiled then."""
        jax.block_until_ready(state)
        now, before = (time.perf_counter(), time.process_time()), self._began
        self._began = now
        return None if before is None else (now[0] - before[0], now[1] - before[1])


if __name__ == "__main__":
    sys.exit(main())
