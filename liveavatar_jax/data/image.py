"""The portrait: any picture file to the published output size.

The size rule, the shorter-side resize and the centre crop are those of the released
speech-to-video pipelines (`wan/speech2video.py`); pixels are uint8 until `to_pixels`.
"""

import math
import re
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from liveavatar_jax.types import Float, LiveAvatarError, UInt8

CELL = 64  # output sides are multiples of it: VAE stride 8, patch 2, coarsest motion patch 4
WHITE = (255, 255, 255)  # what a browser shows behind a cut-out, and a common studio backdrop
Fit = Literal["cover", "published"]


def parse_size(text: str) -> int:
    """The area in pixels of a size such as "720*400" or "720x400".

    Only the product counts, as in the released `--size`: the shape is the portrait's own.
    Raises LiveAvatarError for anything else and for areas below one 64x64 cell.
    """
    match = re.fullmatch(r"\s*(\d{1,6})\s*[*xX×]\s*(\d{1,6})\s*", text)
    if match is None:
        raise LiveAvatarError(f"size {text!r} must be two whole numbers, for example 720x400")
    area = int(match[1]) * int(match[2])
    if area < CELL**2:
        raise LiveAvatarError(f"size {text!r} must have an area of at least {CELL}x{CELL} pixels")
    return area


def target_size(height: int, width: int, area: int) -> tuple[int, int]:
    """Output (rows, columns) of a `height` x `width` picture: multiples of 64, at most `area`.

    The published `get_size_less_than_area`: the largest of 100 scales whose sides, rounded up
    to whole cells, fit into the area; where none fits, the cells inside the picture's own shape.
    Raises LiveAvatarError where that leaves no pixels: shapes that are all length.
    """
    if area < CELL**2:
        raise LiveAvatarError(f"area {area} must be at least {CELL}x{CELL} pixels")
    if height * width <= area:
        low, high = 0.1, 1.0
    else:  # the smallest scale bounds what rounding both sides up to a cell can add
        a, b, c = height * width, (CELL - 1) * (height + width), (CELL - 1) ** 2 - area
        low = (-b + math.sqrt(b * b - 2 * a * c)) / (2 * a)  # 2ac, not 4ac: as published
        high = math.sqrt(area / a)
    for i in range(100):
        scale = high - (high - low) * i / 100
        rows, columns = (math.ceil(int(side * scale) / CELL) * CELL for side in (height, width))
        if rows * columns <= area:
            break
    else:
        rows = int(math.sqrt(area * height / width)) // CELL * CELL
        columns = int(math.sqrt(area * width / height)) // CELL * CELL
        if rows >= height or columns >= width:
            rows, columns = height // CELL * CELL, width // CELL * CELL
    if rows * columns == 0:
        raise LiveAvatarError(
            f"a picture of {width}x{height} pixels has no output size within {area} pixels; "
            "crop it around the face"
        )
    return rows, columns


def resized_size(height: int, width: int, size: tuple[int, int], fit: Fit) -> tuple[int, int]:
    """(rows, columns) of the picture before the centre crop to `size`.

    "published" puts the shorter side onto the shorter side of the output, whatever becomes of
    the longer one; "cover" is the same where that fills the output and otherwise larger.
    """
    rows, columns = size
    if fit not in ("cover", "published"):
        raise LiveAvatarError(f'fit = {fit!r} must be "cover" or "published"')
    if fit == "cover":
        by_width = rows * width <= columns * height
    else:
        by_width = width <= height
        rows = columns = min(size)
    return (columns * height // width, columns) if by_width else (rows, rows * width // height)


def fit_portrait(
    image: UInt8[np.ndarray, "h w 3"],
    size: tuple[int, int],
    fit: Fit = "cover",
    *,
    above: float = 0.5,
) -> UInt8[np.ndarray, "H W 3"]:
    """`image` at `size` = (rows, columns): antialiased bilinear resize, then centre crop.

    "cover" fills every pixel. "published" is the original's, which for most tall and wide
    pictures leaves black bars of some pixels at the ends of the longer side. above: the share of
    what is cut off a tall picture that is cut off above.
    """
    rows, columns = resized_size(image.shape[0], image.shape[1], size, fit)
    picture = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
    bars = [max(0, want - have) for want, have in zip(size, (rows, columns), strict=True)]
    pads = [(bar // 2, bar - bar // 2) for bar in bars]
    canvas = np.pad(np.asarray(picture), (*pads, (0, 0)))
    top, left = (
        round((have - want) * share)  # ties to even, as published
        for have, want, share in zip(canvas.shape, size, (above, 0.5), strict=False)
    )
    return canvas[top : top + size[0], left : left + size[1]]


def load_portrait(
    path: str | Path,
    area: int,
    *,
    fit: Fit = "cover",
    background: tuple[int, int, int] = WHITE,
    side: int | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture in `path` at its published output size for `area` pixels (see `parse_size`).

    side: of a square, instead: for models that know pictures of one size. What is cut off a tall
    picture comes from below more than from above, for that is where faces are not.

    Upright by its EXIF orientation, transparency laid over `background`; grey, palette, CMYK
    and 16-bit pictures become 8-bit RGB; of an animation the first frame. Raises
    LiveAvatarError for files that are no picture and for pictures of which less than half
    would be left by the crop (extremely long shapes).
    """
    image = read_picture(path, background)
    height, width = image.shape[:2]
    try:
        size = target_size(height, width, area) if side is None else (side, side)
    except LiveAvatarError as error:
        raise LiveAvatarError(f"cannot use the portrait {path}: {error}") from None
    rows, columns = resized_size(height, width, size, fit)
    seen = min(1, size[0] / rows) * min(1, size[1] / columns)
    if seen < 0.5:
        raise LiveAvatarError(
            f"cannot use the portrait {path}: of its {width}x{height} pixels only {seen:.0%} "
            f"would be seen in the {size[1]}x{size[0]} output; crop it around the face"
        )
    return fit_portrait(image, size, fit, above=0.5 if side is None else 0.25)


def to_pixels(image: UInt8[np.ndarray, "*F H W 3"]) -> Float[np.ndarray, "*F H W 3"]:
    """uint8 to the networks' float32 pixels in [-1, 1]."""
    return image.astype(np.float32) / np.float32(255) * 2 - 1


def read_picture(
    path: str | Path, background: tuple[int, int, int] = WHITE
) -> UInt8[np.ndarray, "h w 3"]:
    """The first frame of a picture file, upright, 8-bit RGB, at its own size."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd metadata are nothing to the user
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                upright = ImageOps.exif_transpose(picture)
                return np.asarray(_rgb(upright, background))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise LiveAvatarError(
            f"the portrait {path} has more than {limit:.0f} million pixels; make it smaller"
        ) from None
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        if isinstance(error, OSError) and error.strerror:
            raise LiveAvatarError(
                f"cannot read the portrait {path}: {error.strerror.lower()}"
            ) from None
        raise LiveAvatarError(
            f"the portrait {path} ({Path(path).stat().st_size} bytes) is not a picture or is "
            "damaged; save it anew as PNG or JPEG"
        ) from error


def _rgb(picture: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if picture.mode[0] == "I":  # 16-bit grey in one of its byte orders; Pillow would clip it
        grey = np.asarray(picture).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        canvas = Image.new("RGBA", picture.size, background)
        canvas.alpha_composite(picture.convert("RGBA"))
        picture = canvas
    return picture.convert("RGB")
