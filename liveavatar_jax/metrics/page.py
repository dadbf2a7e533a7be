"""The report: one HTML file with everything in it, and no script."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from liveavatar_jax.metrics import sync, verdict
from liveavatar_jax.metrics.plots import Curve, chart, strip
from liveavatar_jax.metrics.verdict import FPS, Line
from liveavatar_jax.types import Float

Windows = Sequence[Mapping[str, np.ndarray]]
TILES = ("mouth", "shuffled", "lag", "amplitude", "sharpness", "looks", "colour", "expression",
         "sync_c", "sync_d", "fps", "first_frame")  # fmt: skip
SHEETS = 24  # clips whose pictures are shown
OVER_TIME = {
    "colour": "colour difference to the portrait",
    "looks": "attributes, distance to the portrait",
    "change": "change to the frame before",
    "gradient": "mean gradient",
    "face_distance": "face distance to the portrait",
}
STYLE = """
:root{color-scheme:light dark;--ink:#1c2024;--dim:#6b7280;--line:#e4e6ea;--page:#f6f7f9;--card:#fff;
--c0:#3b6fe0;--c1:#e0663b;--c2:#2f9e6b;--c3:#9a5bd0}
@media(prefers-color-scheme:dark){:root{--ink:#e8eaed;--dim:#9aa1ab;--line:#2c3139;--page:#14171b;
--card:#1c2026;--c0:#7aa2ff;--c1:#ff9a70;--c2:#62cf9b;--c3:#c79bff}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}main{max-width:1080px;margin:0 auto;padding:36px 24px 60px}
h1{font-size:26px;margin:0 0 2px;letter-spacing:-.02em}h2{font-size:17px;margin:38px 0 12px}
p,small{color:var(--dim);margin:0 0 8px}code{font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(158px,1fr));gap:12px;
margin:22px 0}.tile,figure,.card{background:var(--card);border:1px solid var(--line);
border-radius:12px}.tile{padding:12px 14px}.tile b{display:block;font-size:24px;
font-variant-numeric:tabular-nums;letter-spacing:-.02em}.tile span{font-size:12.5px;
color:var(--dim);line-height:1.3;display:block}.tile i{font-style:normal;font-size:12px;
color:var(--dim);font-variant-numeric:tabular-nums}
.card{overflow-x:auto;padding:4px 16px}table{border-collapse:collapse;width:100%;font-size:14px}
th{font-weight:600;text-align:left;color:var(--dim)}td,th{padding:7px 10px 7px 0;
border-bottom:1px solid var(--line);vertical-align:baseline}tr:last-child td{border:0}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(400px,1fr));gap:12px}
figure{margin:0;padding:12px 14px 8px}figcaption{font-size:13.5px;margin-bottom:4px}
svg{width:100%;height:auto;display:block}svg text{font-size:10.5px;fill:var(--dim)}
.y{text-anchor:end}.x{text-anchor:middle}.grid{stroke:var(--line)}
.mark{stroke:var(--dim);stroke-dasharray:3 3}.line{fill:none;stroke-width:1.6;
stroke-linejoin:round}.band{opacity:.16}.line.c0{stroke:var(--c0)}.line.c1{stroke:var(--c1)}
.line.c2{stroke:var(--c2)}.line.c3{stroke:var(--c3)}.band.c0{fill:var(--c0)}
.band.c1{fill:var(--c1)}.band.c2{fill:var(--c2)}.band.c3{fill:var(--c3)}
.key{margin-left:12px;font-size:12px}.key:before{content:"";display:inline-block;width:10px;
height:3px;border-radius:2px;margin:0 5px 3px 0;background:currentColor}.key.c0{color:var(--c0)}
.key.c1{color:var(--c1)}.key.c2{color:var(--c2)}.key.c3{color:var(--c3)}
.sheets{display:grid;gap:14px}.sheet{display:grid;grid-template-columns:190px 1fr;gap:14px;
padding:12px 14px;overflow-x:auto}.sheet img{display:block;max-width:100%;height:auto;
border-radius:4px;margin-bottom:3px}
.sheet div{font-size:12.5px;color:var(--dim)}.sheet div b{color:var(--ink);font-size:13.5px;
word-break:break-all}
"""


def page(
    about: Mapping[str, Any],
    lines: Sequence[Line],
    by_window: Mapping[str, Sequence[Line]],
    clips: Mapping[str, Windows],
    warnings: Sequence[str],
) -> str:
    """The report of a model. about: what is judged, for the head; clips: what was seen, by id."""
    told = " · ".join(f"{k} {v}" for k, v in about.items() if v is not None)
    parts = [
        f"<h1>{html.escape(str(about.get('model', '')).rsplit('/', 1)[-1])}</h1>",
        f"<p>{html.escape(told)}</p>",
        _tiles(lines),
        _table(lines),
        *[f"<p>{html.escape(text)}</p>" for text in warnings],
        _windows(by_window),
        "<h2>Lips and sound</h2>" if _lips(clips) else "",
        _lips(clips),
        "<h2>Over time</h2>",
        _over_time(clips),
        "<h2>Contact sheets</h2>",
        "<p>The portrait, then frames of the clip; below them the true video where there is "
        "one.</p>",
        _sheets(clips),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Evaluation</title><style>{STYLE}</style><main>{''.join(parts)}</main></html>"
    )


def _tiles(lines: Sequence[Line]) -> str:
    known = {line.key: line for line in lines}
    tiles = []
    for line in (known[key] for key in TILES if key in known):
        label, value, sure = line.cells()
        tiles.append(f'<div class="tile"><span>{html.escape(label)}</span><b>{value}</b>'
                     f"<i>{sure or '&nbsp;'}</i></div>")  # fmt: skip
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _table(lines: Sequence[Line]) -> str:
    rows = []
    for line in lines:
        label, value, sure = line.cells()
        good = {"high": "↑", "low": "↓", "0": "→ 0", "1": "→ 1"}[line.good]
        rows.append(f'<tr><td>{html.escape(label)}</td><td class="n">{value}</td>'
                    f'<td class="n">{sure}</td><td>{good}</td>'
                    f"<td><small>{html.escape(line.note)}</small></td></tr>")  # fmt: skip
    head = '<tr><th>metric</th><th class="n">mean</th><th class="n">95 % interval</th>'
    return (
        f'<div class="card"><table>{head}<th>good</th><th></th></tr>{"".join(rows)}</table></div>'
    )


def _windows(by_window: Mapping[str, Sequence[Line]]) -> str:
    """A column a window."""
    if not by_window:
        return ""
    known = {name: {line.key: line for line in lines} for name, lines in by_window.items()}
    rows = []
    for key in (key for key in verdict.METRICS if any(key in some for some in known.values())):
        label = verdict.METRICS[key][0]
        cells = [some[key].cells()[1] if key in some else "" for some in known.values()]
        row = "".join(f'<td class="n">{cell}</td>' for cell in cells)
        rows.append(f"<tr><td>{html.escape(label)}</td>{row}</tr>")
    head = "".join(f'<th class="n">{html.escape(name)} s</th>' for name in known)
    return (
        '<h2>The horizon</h2><div class="card"><table>'
        f"<tr><th></th>{head}</tr>{''.join(rows)}</table></div>"
    )


def _lips(clips: Mapping[str, Windows]) -> str:
    """The lag curve, and the mouth of the best, the median and the worst clip."""
    known = {name: w[0] for name, w in clips.items() if w and verdict.opening(w[0]) is not None}
    with_truth = {name: w for name, w in known.items() if "true_open" in w}
    known = with_truth or {name: w for name, w in known.items() if "level" in w}
    if not known:
        return ""
    charts = []
    truth = bool(with_truth)
    field = "true_open" if truth else "level"
    curves = np.array([
        sync.lag_curve(np.asarray(verdict.opening(w)), w[field]) for w in known.values()
    ])  # fmt: skip
    curves = curves[np.isfinite(curves).any(axis=1)]
    if len(curves):
        low, middle, high = (_quantile(curves, q) for q in (0.1, None, 0.9))
        what = "truth" if truth else "the loudness of the sound"
        charts.append(chart([Curve("mean", sync.lags().astype(float), middle, low, high)], mark=0.0,
                            title=f"correlation with {what}, by lag",
                            x="the picture is late by … frames"))  # fmt: skip
    scores = {name: judged["mouth" if truth else "envelope"] for name, w in known.items()
              if np.isfinite((judged := verdict.judged(w)).get("mouth" if truth else "envelope",
                                                                np.nan))}  # fmt: skip
    order = sorted(scores, key=lambda name: scores[name])
    chosen = {"worst": order[:1], "median": order[len(order) // 2 :][:1], "best": order[-1:]}
    told = set()
    for word, names in chosen.items():
        for name in (name for name in names if name not in told):
            told.add(name)
            charts.append(_mouth(known[name], field, f"{word}: {name}, r = {scores[name]:.2f}"))
    return f'<div class="charts">{"".join(charts)}</div>'


def _mouth(seen: Mapping[str, np.ndarray], field: str, title: str) -> str:
    """The first ten seconds, both curves on a scale of their own if they differ in kind."""
    some = slice(0, 10 * FPS)
    mouth, true = np.asarray(verdict.opening(seen))[some], seen[field][some]
    if field == "level" or "mouth" not in seen:
        true = true * (np.std(mouth) / max(float(np.std(true)), 1e-9))
    at = np.arange(len(mouth)) / FPS
    name = "truth" if field == "true_open" else "loudness"
    return chart([Curve("seen", at, mouth), Curve(name, at, true)], title=title, x="seconds")


def _over_time(clips: Mapping[str, Windows]) -> str:
    """Means over clips, second by second, and where most of them lie."""
    charts = []
    for name, label in OVER_TIME.items():
        curves = [_seconds(w, name) for w in clips.values() if w and name in w[0]]
        if not curves or not len(curves[0][0]):
            continue
        times = max((c[0] for c in curves), key=len)
        rows = np.full((len(curves), len(times)), np.nan)
        for row, (_, values) in zip(rows, curves, strict=True):
            row[: len(values)] = values
        middle = _quantile(rows, None)
        band = (_quantile(rows, 0.1), _quantile(rows, 0.9)) if len(rows) > 2 else (None, None)
        several = any(len(windows) > 1 for windows in clips.values())
        x = "seconds seen, window after window" if several else "seconds"
        if len(times) > 1:
            charts.append(chart([Curve("", times, middle, *band)], title=label, x=x, zero=True))
    return f'<div class="charts">{"".join(charts)}</div>'


def _seconds(windows: Windows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Means of each second. Windows far apart are drawn side by side, each ten seconds wide."""
    times, values = [], []
    for i, window in enumerate(windows):
        rows = window[name].astype(np.float64)
        each = 1 if name == "face_distance" else FPS
        start = i * len(rows) / each if len(windows) > 1 else 0.0
        for second in range(-(-len(rows) // each)):
            part = rows[each * second : each * (second + 1)]
            part = part[np.isfinite(part)]
            times.append(start + second + 0.5)
            values.append(part.mean() if len(part) else np.nan)
    return np.array(times), np.array(values)


def _quantile(rows: Float[np.ndarray, "n k"], q: float | None) -> Float[np.ndarray, " k"]:
    """Or the mean; nan in columns that have nothing."""
    there = np.isfinite(rows).any(axis=0)
    out = np.full(rows.shape[1], np.nan)
    some = rows[:, there]
    out[there] = np.nanmean(some, axis=0) if q is None else np.nanquantile(some, q, axis=0)
    return out


def _sheets(clips: Mapping[str, Windows]) -> str:
    sheets = []
    for name, windows in list(clips.items())[:SHEETS]:
        for window in windows:
            numbers = verdict.judged(window)
            shown = [k for k in ("mouth", "amplitude", "looks", "colour", "sharpness", "psnr")
                     if k in numbers]  # fmt: skip
            told = "<br>".join(f"{k} {numbers[k]:.3g}" for k in shown)
            start = int(window["start"])
            at = f" at {start // FPS} s" if len(windows) > 1 else ""
            rows = [strip([window["reference"], *window["thumbs"]])]
            if len(window.get("true_thumbs", ())):
                rows.append(strip([window["reference"], *window["true_thumbs"]]))
            sheets.append(f'<div class="card sheet"><div><b>{html.escape(name + at)}</b><br>{told}'
                          f"</div><div>{''.join(rows)}</div></div>")  # fmt: skip
    return f'<div class="sheets">{"".join(sheets)}</div>'
