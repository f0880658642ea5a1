"""The study as one HTML file that needs nothing beside it: table, claims, plots as SVG, samples as data URIs."""

from __future__ import annotations

import base64
import html
from pathlib import Path

from ldmfast import files
from ldmfast.metrics.columns import column
from ldmfast.metrics.reconstruction import COMPARED

COLOURS = ("#444444", "#1b6ca8", "#c8553d", "#588157", "#7b4b94")
WIDTH, HEIGHT, MARGIN = 460, 280, 48

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .7rem; border-bottom: 1px solid #ccc }
td { text-align: right } th { text-align: left } .no { color: #b00020; font-weight: 600 } .yes { color: #1b7837 }
svg { margin: .5rem } svg text { font-size: 11px; fill: #444 } img { image-rendering: pixelated; width: 100% }
"""


def _reconstruction(name):
    return f"{column(name).head} of reconstructions", lambda row: column(name).show(row["reconstruction"][name])


def _samples(name):
    return f"{column(name).head} of samples", lambda row: column(name).show(row["points"][-1][name])


def columns():
    """The table's (head, function from a row to the text of its cell)."""
    return (
        ("f", lambda row: f"{row['f']}" + (" (pixels)" if row["f"] == 1 else "")),
        *map(_reconstruction, (*COMPARED, "kid")),
        ("GFLOP a sample and step", lambda row: format(row["gflop"], ".2f")),
        ("ms a step", lambda row: format(row["ms"], ".0f")),
        ("samples/s", lambda row: format(row["samples_per_second"], ".1f")),
        ("MB kept a sample", lambda row: format(row["activation_bytes"] / 1e6, ".1f")),
        ("largest batch", lambda row: f"{row['largest_batch']}"),
        ("steps", lambda row: f"{row['points'][-1]['steps']}"),
        *map(_samples, ("kid", "R@1")),
    )


def write(report: dict, folder) -> Path:
    """study.html in `folder`, from what study.run returned and the sheets of samples that it left there."""
    folder = Path(folder)
    path = folder / "study.html"
    files.write_text(path, page(report, folder))
    return path


def page(report: dict, folder: Path) -> str:
    config, rows = report["config"], report["rows"]
    parts = [
        "<!doctype html><meta charset='utf-8'><title>Pixels or latents</title>",
        f"<style>{STYLE}</style><h1>The same denoiser on pixels and on latents</h1>",
        f"<p>{config['size']}x{config['size']} pictures; the same U-Net trained {config['seconds']:.0f} s on each, "
        f"batch {config['batch']}, scored {config['points']} times on {config['samples']} samples of "
        f"{config['steps']} steps. "
        f"KID is in {html.escape(report['features'])} features, so it is not Inception's. The largest batch is what "
        f"{config['memory'] / 2**30:.0f} GiB hold, counted from what the backward pass keeps.</p>",
        _table(rows),
        _claims(report["claims"]),
        "<h2>Quality against training time</h2>",
        _lines(rows, "kid", "KID of samples (lower is better)"),
        _lines(rows, "R@1", "share of samples that show what was asked for"),
        "<h2>What the autoencoder keeps, and what a step costs</h2>",
        _bars([(r["f"], r["reconstruction"]["psnr"]) for r in rows if r["f"] > 1], "PSNR of reconstructions, dB"),
        _bars([(r["f"], r["ms"]) for r in rows], "ms a step"),
        "<h2>Samples at the end, the same prompts and seeds, unpicked</h2>",
    ]
    for row in rows:
        data = base64.b64encode((folder / f"f{row['f']}.png").read_bytes()).decode()
        parts.append(f"<h3>f = {row['f']}</h3><img alt='samples at f = {row['f']}' src='data:image/png;base64,{data}'>")
    return "\n".join(parts)


def _table(rows) -> str:
    head = "".join(f"<th>{name}</th>" for name, _ in columns())
    body = "".join("<tr>" + "".join(f"<td>{show(row)}</td>" for _, show in columns()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _claims(claims) -> str:
    lines = []
    for claim in claims:
        word, kind = ("held", "yes") if claim["held"] else ("did not hold", "no")
        text, figures = html.escape(claim["claim"]), html.escape(claim["figures"])
        lines.append(f"<li>{text}: <span class='{kind}'>{word}</span> ({figures})</li>")
    return f"<h2>The claims</h2><ul>{''.join(lines)}</ul>"


def _scale(values, low, high):
    """value -> pixels between low and high, the values' range stretched over them."""
    bottom, top = min(values), max(values)
    span = (top - bottom) or 1.0
    return lambda value: low + (value - bottom) / span * (high - low)


def _frame(title, inside) -> str:
    return (
        f"<svg width='{WIDTH}' height='{HEIGHT}' role='img' aria-label='{html.escape(title)}'>"
        f"<text x='{MARGIN}' y='16'>{html.escape(title)}</text>"
        f"<path d='M{MARGIN} 28V{HEIGHT - MARGIN}H{WIDTH - 10}' fill='none' stroke='#999'/>{inside}</svg>"
    )


def _lines(rows, key, title) -> str:
    points = {row["f"]: [(p["seconds"], p[key]) for p in row["points"]] for row in rows}
    flat = [point for line in points.values() for point in line]
    x = _scale([0.0, *(p[0] for p in flat)], MARGIN, WIDTH - 50)
    y = _scale([0.0, *(p[1] for p in flat)], HEIGHT - MARGIN, 34)
    parts = []
    for (f, line), colour in zip(points.items(), COLOURS, strict=False):
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line)
        (a, b) = line[-1]
        parts.append(f"<path d='M{path}' fill='none' stroke='{colour}' stroke-width='2'/>")
        parts += [f"<circle cx='{x(a):.1f}' cy='{y(b):.1f}' r='3' fill='{colour}'/>" for a, b in line]
        parts.append(f"<text x='{x(a) + 6:.1f}' y='{y(b) + 4:.1f}'>f = {f}</text>")
    top, end = max(p[1] for p in flat), max(p[0] for p in flat)
    parts.append(f"<text x='2' y='{y(top) + 4:.1f}'>{top:.3g}</text><text x='2' y='{y(0) + 4:.1f}'>0</text>")
    parts.append(f"<text x='{x(end) - 20:.1f}' y='{HEIGHT - 28}'>{end:.0f} s</text>")
    return _frame(title, "".join(parts))


def _bars(values, title) -> str:
    top = max(value for _, value in values)
    step = (WIDTH - MARGIN - 20) / len(values)
    parts = []
    for i, (f, value) in enumerate(values):
        high = (HEIGHT - MARGIN - 40) * value / top
        left, under = MARGIN + 10 + i * step, HEIGHT - MARGIN
        parts.append(
            f"<rect x='{left:.1f}' y='{under - high:.1f}' width='{step * 0.6:.1f}' height='{high:.1f}' fill='#1b6ca8'/>"
            f"<text x='{left:.1f}' y='{under - high - 4:.1f}'>{value:.4g}</text>"
            f"<text x='{left:.1f}' y='{under + 16}'>f = {f}</text>"
        )
    return _frame(title, "".join(parts))
