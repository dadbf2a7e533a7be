"""How good the pictures are, and how they move. Frames are bytes, all figures one a frame."""

import numpy as np

from liveavatar_jax.types import Bool, Float, UInt8

_APART = 10  # frames between two that are compared for motion, 0.4 s


def change(frames: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, " F"]:
    """Mean |difference| to the frame before, in bytes; nan for the first."""
    x = frames.astype(np.float32)
    return np.concatenate([[np.nan], np.abs(x[1:] - x[:-1]).mean(axis=(1, 2, 3))])


def flicker(changes: Float[np.ndarray, " F"]) -> float:
    """VBench's temporal flickering, 1 = still: (255 - mean change) / 255. Motion lowers it as
    flicker does, so compare with truth, and look at `seams` and at the dynamic degree as well."""
    return float(1 - np.nanmean(changes) / 255)


def seams(
    changes: Float[np.ndarray, " F"], lead: int, block: int, latent: int
) -> tuple[float, float]:
    """Change from block to block over that from latent to latent within blocks, and this over
    that within latents: 1 and 1 where neither can be told. nan where nothing moves, or there is
    nothing to compare.

    lead: frames of the first block that are not shown; block, latent: frames of one.
    """
    number = np.arange(len(changes)) + lead
    known = np.isfinite(changes)  # the first frame has none before it
    mean = lambda at: changes[at & known].mean() if (at & known).any() else np.nan
    blocks, latents = number % block == 0, number % latent == 0
    steps = [mean(blocks), mean(latents & ~blocks), mean(~latents)]
    over = lambda a, b: float(a / b) if b > 1e-6 else float("nan")
    return over(steps[0], steps[1]), over(steps[1], steps[2])


def coarse(frames: UInt8[np.ndarray, "F H W 3"], cells: int = 16) -> Float[np.ndarray, "F k"]:
    """Brightness of cells of a picture, in 0..1: what is left of grain and flicker is little."""
    F, H, W, _ = frames.shape
    cells = min(cells, H, W)
    h, w = H // cells, W // cells
    grey = frames[:, : cells * h, : cells * w].astype(np.float32).mean(axis=-1) / 255
    return grey.reshape(F, cells, h, cells, w).mean(axis=(2, 4)).reshape(F, -1)


def dynamic_degree(thumbs: Float[np.ndarray, "F k"]) -> float:
    """How much moves in 0.4 s: mean |change| of `coarse` pictures, in percent of the range.

    Not RAFT's optical flow, which VBench takes, so only good for comparing with truth and among
    models: a face that stands still has 0. nan below 0.4 s.
    """
    if len(thumbs) <= _APART:
        return float("nan")
    return float(100 * np.abs(thumbs[_APART:] - thumbs[:-_APART]).mean())


def gradient(frames: UInt8[np.ndarray, "F H W 3"]) -> Float[np.ndarray, " F"]:
    """Mean length of the brightness gradient; over that of truth it is the sharpness."""
    grey = frames.astype(np.float32).mean(axis=-1)
    down, right = np.diff(grey, axis=1)[:, :, :-1], np.diff(grey, axis=2)[:, :-1]
    return np.sqrt(down**2 + right**2).mean(axis=(1, 2))


def psnr(
    frames: UInt8[np.ndarray, "F H W 3"],
    true: UInt8[np.ndarray, "F H W 3"],
    mask: Bool[np.ndarray, "F H W"] | None = None,
) -> Float[np.ndarray, " F"]:
    """Decibels, everywhere or where the mask is; nan where it is empty, 99 for equal pictures."""
    error = ((frames.astype(np.float32) - true.astype(np.float32)) ** 2).mean(axis=-1)
    weight = np.ones(error.shape, bool) if mask is None else mask
    size = weight.sum(axis=(1, 2))
    total = (error * weight).sum(axis=(1, 2))
    mean = np.divide(total, size, out=np.full(len(error), np.nan), where=size > 0)
    return 10 * np.log10(255**2 / np.maximum(mean, 255**2 * 10**-9.9))


def box_mask(boxes: Float[np.ndarray, "F 4"], height: int, width: int) -> Bool[np.ndarray, "F H W"]:
    """Pixels whose middle lies in a box of (top, left, bottom, right) in 0..1 of the picture."""
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    top, left, bottom, right = np.moveaxis(boxes, -1, 0)
    rows = (y[None] >= top[:, None]) & (y[None] < bottom[:, None])
    columns = (x[None] >= left[:, None]) & (x[None] < right[:, None])
    return rows[:, :, None] & columns[:, None, :]
