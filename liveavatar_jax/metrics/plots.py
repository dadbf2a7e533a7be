"""Small charts as SVG and sheets of pictures as PNG, both as text to put into a page."""

import base64
import dataclasses
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from liveavatar_jax.types import Float, UInt8

WIDTH, HEIGHT = 460, 200
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 14, 30  # margins of a chart
POINTS = 400  # of a curve at most; longer ones are averaged


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line with a name, and a band about it if there are low and high."""

    name: str
    x: Float[np.ndarray, " n"]
    y: Float[np.ndarray, " n"]
    low: Float[np.ndarray, " n"] | None = None
    high: Float[np.ndarray, " n"] | None = None


def chart(
    curves: Sequence[Curve], *, title: str, x: str, y: str = "", zero: bool = False,
    mark: float | None = None, width: int = WIDTH,
) -> str:  # fmt: skip
    """Lines over common axes. zero: y begins there; mark: a vertical line at this x."""
    curves = [_thinned(curve) for curve in curves if np.isfinite(curve.y).any()]
    if not curves:
        return ""
    xs = np.concatenate([curve.x for curve in curves])
    parts = [p for c in curves for p in (c.y, c.low, c.high) if p is not None]
    ys = np.concatenate(parts)
    x0, x1, y0, y1 = (float(f(v)) for v in (xs, ys) for f in (np.nanmin, np.nanmax))
    x_ticks, y_ticks = _ticks(x0, x1), _ticks(min(0.0, y0) if zero else y0, y1)
    x1, y0, y1 = max(x1, x0 + 1e-9), y_ticks[0], max(y_ticks[-1], y_ticks[0] + 1e-9)
    px = lambda v: LEFT + (v - x0) / (x1 - x0) * (width - LEFT - RIGHT)
    py = lambda v: HEIGHT - BOTTOM - (v - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
    out = [f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for v in y_ticks:
        out.append(f'<path class="grid" d="M{LEFT} {py(v):.1f}H{width - RIGHT}"/>')
        out.append(f'<text class="y" x="{LEFT - 6}" y="{py(v) + 3.5:.1f}">{v:.4g}</text>')
    for v in (v for v in x_ticks if x0 <= v <= x1):
        out.append(f'<text class="x" x="{px(v):.1f}" y="{HEIGHT - BOTTOM + 14}">{v:.5g}</text>')
    if mark is not None:
        out.append(f'<path class="mark" d="M{px(mark):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    for i, curve in enumerate(curves):
        if curve.low is not None and curve.high is not None:
            edge = [*zip(curve.x, curve.low, strict=True),
                    *zip(curve.x[::-1], curve.high[::-1], strict=True)]  # fmt: skip
            points = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in edge if np.isfinite(b))
            out.append(f'<polygon class="band c{i % 4}" points="{points}"/>')
        for part in _pieces(curve.x, curve.y):
            points = " ".join(f"{px(a):.1f},{py(b):.1f}" for a, b in part)
            out.append(f'<polyline class="line c{i % 4}" points="{points}"/>')
    out.append(f'<text class="x" x="{(LEFT + width - RIGHT) / 2}" y="{HEIGHT - 3}">'
               f"{html.escape(x)}</text></svg>")  # fmt: skip
    keys = [c.name for c in curves if c.name]
    legend = "".join(f'<span class="key c{i % 4}">{html.escape(k)}</span>'
                     for i, k in enumerate(keys)) if len(keys) > 1 else ""  # fmt: skip
    unit = f" <small>{html.escape(y)}</small>" if y else ""
    head = f"<figcaption><b>{html.escape(title)}</b>{unit}{legend}</figcaption>"
    return f"<figure>{head}{''.join(out)}</figure>"


def strip(frames: Sequence[UInt8[np.ndarray, "H W 3"]], side: int = 96, gap: int = 2) -> str:
    """Pictures side by side, as an <img>; large ones are made smaller, small ones shown larger."""
    if not len(frames):
        return ""
    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    wide, high = max(i.width for i in images), max(i.height for i in images)
    sheet = Image.new("RGB", (len(images) * (wide + gap) - gap, high), (255, 255, 255))
    for i, image in enumerate(images):
        sheet.paste(image, (i * (wide + gap), 0))
    out = io.BytesIO()
    sheet.quantize(256, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    shown = round(sheet.width * max(1, round(side / max(wide, high), 2)))
    return f'<img alt="" width="{shown}" src="data:image/png;base64,{data}">'


def _thinned(curve: Curve) -> Curve:
    """Averages of neighbours, where there are more points than a screen has."""
    if len(curve.x) <= POINTS:
        return curve
    parts = np.array_split(np.arange(len(curve.x)), POINTS)
    few = lambda v: None if v is None else np.array([np.mean(v[part]) for part in parts])
    x, y = few(curve.x), few(curve.y)
    assert x is not None and y is not None
    return Curve(curve.name, x, y, few(curve.low), few(curve.high))


def _pieces(x: np.ndarray, y: np.ndarray) -> list[list[tuple[float, float]]]:
    """A line without what is not a number, and without bridges over gaps in x."""
    step = np.median(np.diff(x)) if len(x) > 1 else 1.0
    pieces: list[list[tuple[float, float]]] = [[]]
    last = None
    for a, b in zip(x, y, strict=True):
        if pieces[-1] and (not np.isfinite(b) or (last is not None and a - last > 4 * step)):
            pieces.append([])
        if np.isfinite(b):
            pieces[-1].append((float(a), float(b)))
        last = a
    return [piece for piece in pieces if len(piece) > 1]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose the range."""
    span = max(float(high) - float(low), 1e-6 * max(1.0, abs(float(high))))
    step = 10.0 ** np.floor(np.log10(span / count))
    step *= next(k for k in (1, 2, 2.5, 5, 10) if span / (k * step) <= count)
    first, last = np.floor(low / step + 1e-9), np.ceil(high / step - 1e-9)
    return [float(round(i * step, 10)) for i in np.arange(first, max(last, first + 1) + 1)]
