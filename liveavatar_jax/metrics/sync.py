"""Does the mouth say what is heard?

A lag counts video frames; at a positive one the picture is late. Openings are any numbers that
grow as the mouth opens: of truth, of a reader, or of a face mesh.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from liveavatar_jax.metrics.intervals import Interval, bootstrap
from liveavatar_jax.types import Bool, Float, Int, LiveAvatarError

REACH = 12  # frames to either side that a lag is looked for in
SYNC_REACH = 15  # of the published Sync-C and Sync-D
SAMPLES = 640  # of a video frame, 16 kHz at 25 frames a second
QUIET = 40.0  # decibels below the loud moments of a recording that are silence
_EPSILON = 1e-6  # torch adds it to every difference, and so does the published score


def correlation(seen: Float[np.ndarray, " F"], true: Float[np.ndarray, " F"]) -> float:
    """Pearson's, in [-1, 1]; nan where one of them does not move."""
    seen, true = (np.asarray(x, np.float64) - np.mean(x, dtype=np.float64) for x in (seen, true))
    size = np.sqrt((seen**2).sum() * (true**2).sum())
    return float((seen * true).sum() / size) if size > 1e-12 else float("nan")


def lags(reach: int = REACH) -> Int[np.ndarray, " lags"]:
    return np.arange(-reach, reach + 1)


def lag_curve(
    seen: Float[np.ndarray, " F"], true: Float[np.ndarray, " F"], reach: int = REACH
) -> Float[np.ndarray, " lags"]:
    """Correlation of `seen[t + lag]` with `true[t]` for every lag of `lags`, over what overlaps.

    nan at lags that leave fewer than 3 frames.
    """
    frames = min(len(seen), len(true))

    def at(lag: int) -> float:
        a, b = seen[max(0, lag) : frames + min(0, lag)], true[max(0, -lag) : frames - max(0, lag)]
        return correlation(a, b) if len(a) > 2 else float("nan")

    return np.array([at(int(lag)) for lag in lags(reach)])


def best_lag(curve: Float[np.ndarray, " lags"]) -> int:
    """Where a lag curve has its peak; 0 if it has none."""
    if np.isnan(curve).all():
        return 0
    return int(np.nanargmax(curve)) - len(curve) // 2


def amplitude(seen: Float[np.ndarray, " F"], true: Float[np.ndarray, " F"]) -> float:
    """How far the mouth moves, relative to truth: of standard deviations. nan if truth rests."""
    size = float(np.std(np.asarray(true, np.float64)))
    return float(np.std(np.asarray(seen, np.float64))) / size if size > 1e-6 else float("nan")


def shuffled(
    seen: Sequence[Float[np.ndarray, " _"]], true: Sequence[Float[np.ndarray, " _"]]
) -> Interval:
    """The control: each clip's mouth against the truth of the other clips' sound.

    The mean over clips; it is about 0 for a mouth that follows its sound, and not for one that
    merely opens at the beginning and shuts at the end. nan for a single clip.
    """
    others = [
        float(np.nanmean([_common(x, y) for j, y in enumerate(true) if j != i]))
        for i, x in enumerate(seen)
        if len(true) > 1 and np.std(x) > 0
    ]
    return bootstrap(others)


def _common(x: np.ndarray, y: np.ndarray) -> float:
    frames = min(len(x), len(y))
    return correlation(x[:frames], y[:frames])


# The published score


@dataclasses.dataclass(frozen=True)
class SyncScore:
    """LSE-C and LSE-D, as papers report them, and the offset that goes with them."""

    confidence: float
    distance: float
    offset: int  # frames, published sign: of the sound against the picture
    curve: Float[np.ndarray, " lags"]  # mean distance at each shift


def sync_score(
    video: Float[np.ndarray, "n k"], audio: Float[np.ndarray, "m j"], reach: int = SYNC_REACH
) -> SyncScore:
    """Sync-C and Sync-D of embeddings of windows, one a video frame, of any two-tower network.

    As in joonson/syncnet_python (`SyncNetInstance.evaluate`): the distance of every window of the
    picture to the 31 windows of sound around it, where those before the first and after the last
    are zeros; the mean over the clip at each shift; Sync-D is the least of them, Sync-C their
    median less that. Papers average over clips (over face tracks).

    Raises LiveAvatarError where the embeddings have different widths or there are none.
    """
    if video.shape[1] != audio.shape[1] or not min(len(video), len(audio)):
        raise LiveAvatarError(
            f"embeddings of {video.shape} and {audio.shape} cannot be compared; give one row a "
            "window, of equal width, for picture and sound"
        )
    frames = min(len(video), len(audio))
    seen = np.asarray(video[:frames], np.float64)
    heard = np.pad(np.asarray(audio[:frames], np.float64), ((reach, reach), (0, 0)))
    curve = np.array([
        np.sqrt(((seen - heard[i : i + frames] + _EPSILON) ** 2).sum(axis=1)).mean()
        for i in range(2 * reach + 1)
    ])  # fmt: skip
    least = int(curve.argmin())
    distance = float(curve[least])
    return SyncScore(float(np.median(curve)) - distance, distance, reach - least, curve)


# Against the sound alone


def envelope(samples: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " F"]:
    """Loudness of 16 kHz sound frame by frame (root mean square), over three frames' time."""
    frames = -(-len(samples) // SAMPLES)
    padded = np.pad(np.asarray(samples, np.float64), (0, frames * SAMPLES - len(samples)))
    power = (padded.reshape(frames, SAMPLES) ** 2).mean(axis=1)
    around = np.pad(power, 1, mode="edge")
    return np.sqrt((around[:-2] + around[1:-1] + around[2:]) / 3) if frames else power


def silence(level: Float[np.ndarray, " F"], margin: int = 4) -> Bool[np.ndarray, " F"]:
    """Frames in which nothing is heard, nor `margin` frames before and after: a mouth opens
    before its sound and takes a while to close."""
    if not len(level):
        return np.zeros(0, bool)
    loud = max(float(np.quantile(level, 0.95)), 1e-4)
    heard = level > loud * 10 ** (-QUIET / 20)
    near = np.pad(heard, margin)
    return ~np.array([near[i : i + 2 * margin + 1].any() for i in range(len(level))])
