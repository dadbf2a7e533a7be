"""Is it still the same person? Colours and features of frames against those of the reference."""

import numpy as np

from liveavatar_jax.types import Float, UInt8

CELLS = 4  # to a side: coarse enough that a nod is no other person
_SRGB = np.array([[0.4124564, 0.3575761, 0.1804375],
                  [0.2126729, 0.7151522, 0.0721750],
                  [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip


def lab(colour: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
    """CIELAB of linear sRGB in 0..1 under D65: 1 is about what the eye can tell apart."""
    xyz = colour @ (_SRGB / _SRGB.sum(axis=1, keepdims=True)).T
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def colours(
    frames: UInt8[np.ndarray, "F H W 3"], cells: int = CELLS
) -> Float[np.ndarray, "F cells cells 3"]:
    """Mean colour of each cell of a picture, in CIELAB; what does not divide is cut off."""
    F, H, W, _ = frames.shape
    h, w = H // cells, W // cells
    x = frames[:, : cells * h, : cells * w].astype(np.float32) / 255
    light = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return lab(light.reshape(F, cells, h, cells, w, 3).mean(axis=(2, 4)))


def colour_distance(
    frames: UInt8[np.ndarray, "F H W 3"], reference: UInt8[np.ndarray, "H W 3"]
) -> Float[np.ndarray, " F"]:
    """CIE76 colour difference to the reference, the mean over 4 x 4 cells."""
    apart = colours(frames) - colours(reference[None])
    return np.sqrt((apart**2).sum(axis=-1)).mean(axis=(1, 2))


def attribute_distance(
    seen: Float[np.ndarray, "F k"], reference: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " F"]:
    """Mean difference of attributes, each of them in 0..1, that a reader sees."""
    return np.abs(np.asarray(seen, np.float64) - reference[None]).mean(axis=1)


def cosine(
    frames: Float[np.ndarray, "F k"], reference: Float[np.ndarray, " k"]
) -> Float[np.ndarray, " F"]:
    """Cosine of each frame's features with the reference's; its mean is the form of DINO-S (with
    DINOv2) and CSIM (with ArcFace) in papers. nan for features of zeros."""
    frames, reference = frames.astype(np.float64), reference.astype(np.float64)
    size = np.linalg.norm(frames, axis=1) * np.linalg.norm(reference)
    return np.divide(frames @ reference, size, out=np.full(len(frames), np.nan), where=size > 0)
