"""Fréchet distance of two sets of features: FID with Inception's of frames, FVD with I3D's of
clips, or with those of any other network."""

import dataclasses
from pathlib import Path

import numpy as np

from liveavatar_jax.types import Float, LiveAvatarError


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of a set of features: how many, their mean, and the sum of squares about it."""

    count: int
    mean: Float[np.ndarray, " k"]
    scatter: Float[np.ndarray, "k k"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n k"]) -> "Statistics":
        """Raises LiveAvatarError for features that are none, or not finite."""
        x = np.asarray(features, np.float64)
        if not len(x) or not np.isfinite(x).all():
            raise LiveAvatarError(
                f"features of shape {x.shape} are none or not finite; give one row a picture"
            )
        mean = x.mean(axis=0)
        return cls(len(x), mean, (x - mean).T @ (x - mean))

    def add(self, other: "Statistics") -> "Statistics":
        """Of both sets together, so that features need not be kept."""
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter
        scatter = scatter + np.outer(apart, apart) * (self.count * other.count / count)
        return Statistics(count, self.mean + apart * other.count / count, scatter)

    @property
    def covariance(self) -> Float[np.ndarray, "k k"]:
        """Without bias, as in all published code."""
        return self.scatter / max(1, self.count - 1)

    def save(self, path: Path) -> None:
        np.savez(path, count=self.count, mean=self.mean, scatter=self.scatter)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """What `save` wrote; or mu and sigma as other code stores them, whose number is unknown
        and taken to be large; or `features`. Raises LiveAvatarError for anything else."""
        try:
            with np.load(path) as file:
                held = {name: np.asarray(file[name]) for name in file.files}
        except (OSError, ValueError) as error:
            raise LiveAvatarError(f"{path} cannot be read as .npz ({error})") from None
        if "features" in held:
            return cls.of(held["features"].reshape(-1, held["features"].shape[-1]))
        if {"count", "mean", "scatter"} <= held.keys():
            return cls(int(held["count"]), held["mean"], held["scatter"])
        if {"mu", "sigma"} <= held.keys():
            many = 100_000
            return cls(many, held["mu"].astype(np.float64), held["sigma"] * (many - 1.0))
        raise LiveAvatarError(
            f"{path} holds {', '.join(held) or 'nothing'}; it needs features, or mean, scatter "
            "and count, or mu and sigma"
        )


def frechet(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|² + tr(A + B - 2 (A B)^½).

    With A = R Rᵀ and B = S Sᵀ, tr (A B)^½ is the sum of the singular values of Rᵀ S: no square
    root of a product that is not symmetric, and nothing complex when a covariance is singular.

    Raises LiveAvatarError where the features have different widths.
    """
    if a.mean.shape != b.mean.shape:
        raise LiveAvatarError(
            f"features of width {len(a.mean)} and {len(b.mean)} have no distance; take both from "
            "the same network"
        )
    cross = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    apart = float(((a.mean - b.mean) ** 2).sum())
    return apart + float(np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def small_sample(a: Statistics, b: Statistics) -> str | None:
    """A warning, where there are too few features to fill their covariance: then the distance
    is far too large, and falls with every further clip."""
    fewest, width = min(a.count, b.count), len(a.mean)
    if fewest > 2 * width:
        return None
    return (
        f"{fewest} features of width {width} are too few for a Fréchet distance to mean much; "
        "compare it with equal numbers of features only"
    )


def _root(covariance: Float[np.ndarray, "k k"]) -> Float[np.ndarray, "k k"]:
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * np.sqrt(np.maximum(values, 0.0))
