"""From numbers about frames to numbers about a clip, and from those to the table of a model."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from liveavatar_jax.metrics import picture, sync
from liveavatar_jax.metrics.frechet import Statistics, frechet, small_sample
from liveavatar_jax.metrics.intervals import Interval, bootstrap, known, slope, worst_tenth
from liveavatar_jax.metrics.observe import spreads
from liveavatar_jax.types import Float

FPS = 25
PER = 1000.0  # seconds that a trend is stated for

# name: (label, what is good, what it is)
METRICS = {
    "mouth": ("mouth, correlation with truth", "high", "of opening, frame by frame, at lag 0"),
    "worst": ("… of the worst tenth of clips", "high", "mean of the lowest tenth"),
    "shuffled": ("… with the truth of other clips", "0", "control: sound that is not its own"),
    "lag": ("peak of the lag curve, frames", "0", "mean curve; positive: the picture is late"),
    "amplitude": ("mouth, amplitude over truth", "1", "ratio of standard deviations"),
    "ceiling": ("mouth of the true video, the same reader", "high", "what the reader can see"),
    "width": ("mouth width, correlation with truth", "high", "within each clip"),
    "envelope": ("mouth with the loudness of the sound", "high", "needs no truth"),
    "silent": ("opening in silence over that in speech", "0", "0: closed when nothing is said"),
    "expression": ("expression as the prompt says", "high", "share of clips"),
    "looks": ("attributes, distance to the portrait", "low", "mean of looks in 0..1 as read"),
    "looks_trend": ("… growth in 1000 s", "0", "slope over time"),
    "colour": ("colour difference to the portrait", "low", "CIE76, mean of 4 x 4 cells"),
    "colour_trend": ("… growth in 1000 s", "0", "slope over time"),
    "face": ("face distance to the portrait", "low", "0.6 and more: another person"),
    "sync_c": ("Sync-C", "high", "published formula, embeddings as given"),
    "sync_d": ("Sync-D", "low", "published formula, embeddings as given"),
    "sharpness": ("sharpness over truth", "1", "ratio of mean gradients"),
    "sharpness_portrait": ("sharpness over the portrait", "1", "ratio of mean gradients"),
    "psnr": ("PSNR, dB", "high", "to the true video; heads move as they like"),
    "psnr_mouth": ("PSNR of the mouth box, dB", "high", "to the true video"),
    "flicker": ("temporal flickering", "high", "VBench's: 1 - mean change"),
    "true_flicker": ("… of the true video", "high", ""),
    "seam": ("change between blocks over between latents", "1", "1: no seam of blocks can be seen"),
    "steps": ("change between latents over within", "1", "1: motion is even"),
    "dynamic": ("dynamic degree", "high", "mean change in 0.4 s, percent"),
    "dynamic_ratio": ("… over truth", "1", ""),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table."""

    key: str
    label: str
    good: str  # "high", "low", "0" or "1"
    note: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    clips: int = 0

    def cells(self) -> tuple[str, str, str]:
        show = lambda x: f"{x:.4g}" if abs(x) < 1000 else f"{x:.0f}"
        sure = f"{show(self.low)} … {show(self.high)}" if np.isfinite(self.low) else ""
        return self.label, show(self.value), sure


def judged(seen: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The numbers of one clip, or of one window of it, by the names of METRICS; what cannot be
    had is left out.

    seen: what an `Observer` kept; and of the clip's sound, as long as the video: "level" (the
    envelope), and if they are known "true_open", "true_width" and "true_expression"; "start",
    the number of its first frame; of what was made in blocks "lead", "block" and "latent", the
    frames of the first block that are not shown, of a block and of a latent.
    """
    numbers: dict[str, float] = {}
    change, start = seen["change"], int(seen.get("start", np.int64(0)))
    numbers["colour"] = float(seen["colour"].mean())
    numbers["flicker"] = picture.flicker(change)
    if "lead" in seen:  # known of a stream
        lead, block, latent = (int(seen[name]) for name in ("lead", "block", "latent"))
        numbers["seam"], numbers["steps"] = picture.seams(change, start + lead, block, latent)
    numbers["dynamic"] = picture.dynamic_degree(seen["coarse"].astype(np.float32))
    sharp = float(seen["gradient"].mean())
    numbers["sharpness_portrait"] = sharp / max(float(seen["reference_gradient"].mean()), 1e-6)
    if "looks" in seen:
        numbers["looks"] = float(seen["looks"].mean())
    if "face_distance" in seen:
        numbers["face"] = float(known(seen["face_distance"]).mean()) if len(
            known(seen["face_distance"])) else float("nan")  # fmt: skip
    numbers |= {k: float(np.nanmean(v)) for k, v in seen.items() if k.startswith("cosine/")}
    numbers |= _of_mouth(seen) | _beside_truth(seen, sharp)
    if "expression" in seen and "true_expression" in seen:
        said = int(seen["expression"].mean(axis=0).argmax())
        numbers["expression"] = float(said == int(seen["true_expression"]))
    return numbers


def opening(seen: Mapping[str, np.ndarray]) -> Float[np.ndarray, " F"] | None:
    """Of the mouth as it is seen, by the readers or the face mesh; gaps are bridged. None where
    nobody looked, or no face was found in half of the frames."""
    if "mouth" in seen:
        return seen["mouth"][:, 0]
    if "face_open" not in seen:
        return None
    gaps = seen["face_open"]
    there = np.isfinite(gaps)
    if there.mean() < 0.5:
        return None
    return np.interp(np.arange(len(gaps)), np.flatnonzero(there), gaps[there])


def _of_mouth(seen: Mapping[str, np.ndarray]) -> dict[str, float]:
    mouth, numbers = opening(seen), {}
    if mouth is None or len(mouth) < 3:
        return {}
    if "true_open" in seen:
        true = seen["true_open"]
        numbers["mouth"] = sync.correlation(mouth, true)
        if "mouth" in seen:  # the face mesh measures in other units
            numbers["amplitude"] = sync.amplitude(mouth, true)
            numbers["width"] = sync.correlation(seen["mouth"][:, 1], seen["true_width"])
        if "true_mouth" in seen:
            read = seen["true_mouth"][:, 0]
            numbers["ceiling"] = sync.correlation(read, true[: len(read)])
    if "level" in seen:
        level = seen["level"]
        numbers["envelope"] = sync.correlation(mouth, level)
        silent = sync.silence(level)
        if silent.sum() >= 5 and (~silent).sum() >= 5:
            floor = 0.0 if "mouth" in seen else float(np.quantile(mouth, 0.02))
            size = max(float(np.quantile(mouth[~silent], 0.9)) - floor, 1e-6)
            numbers["silent"] = (float(mouth[silent].mean()) - floor) / size
    return numbers


def _beside_truth(seen: Mapping[str, np.ndarray], sharp: float) -> dict[str, float]:
    if "true_gradient" not in seen:
        return {}
    frames = len(seen["true_gradient"])
    part = float(seen["gradient"][:frames].mean())
    coarse = seen["true_coarse"].astype(np.float32)
    true = picture.dynamic_degree(coarse)
    own = picture.dynamic_degree(seen["coarse"][:frames].astype(np.float32))
    numbers = {
        "sharpness": part / max(float(seen["true_gradient"].mean()), 1e-6),
        "true_flicker": picture.flicker(seen["true_change"]),
        "dynamic_ratio": own / true if true > 1e-6 else float("nan"),
        "psnr": float(known(seen["psnr"]).mean()),
    }
    if "psnr_mouth" in seen and len(known(seen["psnr_mouth"])):
        numbers["psnr_mouth"] = float(known(seen["psnr_mouth"]).mean())
    return numbers


def trend(windows: Sequence[Mapping[str, np.ndarray]], name: str) -> Interval:
    """Growth of a number about frames in 1000 s, over all windows of one clip; nan for clips of
    less than a minute, which say nothing of 1000 s."""
    times = [int(w.get("start", np.int64(0))) + np.arange(len(w[name])) for w in windows]
    if times[-1][-1] - times[0][0] < 60 * FPS:
        return Interval(*[float("nan")] * 3)
    gain = slope(
        np.concatenate(times) / (FPS * PER),
        np.concatenate([w[name] for w in windows]).astype(np.float64),
        pieces=max(20, 5 * len(windows)),
    )
    return gain


def table(clips: Sequence[Sequence[Mapping[str, np.ndarray]]]) -> list[Line]:
    """The lines of a model's table. clips: of each, the windows that were seen."""
    each = [[judged(window) for window in windows] for windows in clips]
    lines = {}

    def line(key: str, found: Interval, count: int) -> None:
        label, good, note = METRICS.get(key, (key.replace("cosine/", "cosine to the portrait, "),
                                              "high", "mean over frames"))  # fmt: skip
        if np.isfinite(found.value):
            lines[key] = Line(key, label, good, note, found.value, found.low, found.high, count)

    names = {name: None for windows in each for numbers in windows for name in numbers}
    for name in names:
        values = [_mean([n[name] for n in windows if name in n]) for windows in each]
        line(name, bootstrap(values), len(known(values)))
    if "mouth" in names:
        values = [_mean([n.get("mouth", np.nan) for n in windows]) for windows in each]
        line("worst", Interval(worst_tenth(values), np.nan, np.nan), len(known(values)))
        whole = [w for windows in clips for w in windows[:1] if "true_open" in w]
        whole = [w for w in whole if opening(w) is not None]
        seen = [np.asarray(opening(w)) for w in whole]
        line("shuffled", sync.shuffled(seen, [w["true_open"] for w in whole]), len(whole))
        curve = lag_curves(clips)
        line(
            "lag",
            Interval(float(sync.best_lag(np.nanmean(curve, axis=0))), np.nan, np.nan),
            len(curve),
        )
    for name in ("looks", "colour"):
        gains = [trend(windows, name) for windows in clips if windows and name in windows[0]]
        line(f"{name}_trend", _together(gains), len(gains))
    order = {name: i for i, name in enumerate(METRICS)}
    return sorted(lines.values(), key=lambda line: order.get(line.key, len(order)))


def _together(gains: Sequence[Interval]) -> Interval:
    """The mean of trends. Of few clips each one's own interval tells more than how they differ."""
    gains = [gain for gain in gains if np.isfinite(gain.value)]
    if len(gains) >= 8 or not gains:
        return bootstrap([gain.value for gain in gains])
    value = _mean([gain.value for gain in gains])
    reach = float(np.sqrt(sum((gain.high - gain.value) ** 2 for gain in gains))) / len(gains)
    return Interval(value, value - reach, value + reach)


def lag_curves(clips: Sequence[Sequence[Mapping[str, np.ndarray]]]) -> Float[np.ndarray, "n lags"]:
    """Of the first window of each clip whose mouth is seen and known."""
    first = [w for windows in clips for w in windows[:1] if "true_open" in w]
    pairs = [(opening(w), w["true_open"]) for w in first]
    curves = [sync.lag_curve(np.asarray(m), t) for m, t in pairs if m is not None]
    return np.array(curves) if curves else np.full((1, 2 * sync.REACH + 1), np.nan)


def distances(
    clips: Sequence[Sequence[Mapping[str, np.ndarray]]], real: Mapping[str, Statistics]
) -> tuple[list[Line], list[str]]:
    """Fréchet distances of all frames to those of the true videos, or to `real` features, by the
    network that saw them; and warnings."""
    lines, warnings = [], []
    made, true = _pooled(clips, "made"), _pooled(clips, "true") | dict(real)
    for name in sorted(made.keys() & true.keys()):
        distance = frechet(made[name], true[name])
        label = f"Fréchet distance, {name}"
        lines.append(Line(f"frechet/{name}", label, "low", "of features of frames", distance,
                          clips=made[name].count))  # fmt: skip
        if said := small_sample(made[name], true[name]):
            warnings.append(f"{label}: {said}")
    return lines, warnings


def _pooled(
    clips: Sequence[Sequence[Mapping[str, np.ndarray]]], whose: str
) -> dict[str, Statistics]:
    pooled: dict[str, Statistics] = {}
    for window in (w for windows in clips for w in windows):
        for key in [key for key in window if key.startswith(f"count/{whose}/")]:
            name = key.removeprefix(f"count/{whose}/")
            spread = spreads(window, f"{whose}/{name}")
            assert spread is not None
            pooled[name] = pooled[name].add(spread) if name in pooled else spread
    return pooled


def _mean(values: Sequence[float]) -> float:
    found = known(values)
    return float(found.mean()) if len(found) else float("nan")


def as_text(lines: Sequence[Line]) -> str:
    """The table, for a terminal."""
    rows = [line.cells() for line in lines]
    wide = max((len(row[0]) for row in rows), default=0)
    return "\n".join(f"{a:{wide}}  {b:>8}  {c}".rstrip() for a, b, c in rows)
