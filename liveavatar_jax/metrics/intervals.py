"""Numbers about many clips, with how sure they are: means, worst tenths, trends over time."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit

from liveavatar_jax.types import Float

DRAWS = 2000  # of a bootstrap


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g}, {self.high:.3g})"


def known(values: Sequence[float] | np.ndarray) -> Float[np.ndarray, " n"]:
    """Those that are numbers: a clip for which a metric cannot be had is left out of its mean."""
    values = np.asarray(values, np.float64).reshape(-1)
    return values[np.isfinite(values)]


def bootstrap(
    values: Sequence[float] | np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """The mean over clips. The interval is that of means of clips drawn anew; nan without clips."""
    values = known(values)
    if not len(values):
        return Interval(*[float("nan")] * 3)
    random = np.random.default_rng(seed)
    means = values[random.integers(len(values), size=(draws, len(values)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(values.mean()), float(low), float(high))


def worst_tenth(values: Sequence[float] | np.ndarray) -> float:
    """The mean of the lowest tenth of the clips, at least of one."""
    values = np.sort(known(values))
    return float(values[: max(1, round(len(values) / 10))].mean()) if len(values) else float("nan")


def slope(
    times: Float[np.ndarray, " n"], values: Float[np.ndarray, " n"], *, pieces: int = 20
) -> Interval:
    """What `values` gain in a unit of `times`, a straight line through all.

    Neighbouring frames are alike, and so count for less than they are many: the line goes
    through the means of `pieces` stretches, longer than the memory of the signal if this is to
    hold, and the interval is Student's with two degrees of freedom spent. nan below 3 stretches.
    """
    there = np.isfinite(values)
    times, values = np.asarray(times, np.float64)[there], np.asarray(values, np.float64)[there]
    pieces = min(pieces, len(values))
    if pieces < 3:
        return Interval(*[float("nan")] * 3)
    parts = np.array_split(np.arange(len(values)), pieces)
    t = np.array([times[part].mean() for part in parts])
    y = np.array([values[part].mean() for part in parts])
    t = t - t.mean()
    gain = float((t * y).sum() / (t**2).sum())
    rest = y - y.mean() - gain * t
    error = np.sqrt((rest**2).sum() / (pieces - 2) / (t**2).sum())
    reach = float(stdtrit(pieces - 2, 0.975) * error)
    return Interval(gain, gain - reach, gain + reach)
