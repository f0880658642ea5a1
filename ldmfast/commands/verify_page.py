"""What `verify` found as one HTML page that needs nothing beside it."""

from __future__ import annotations

import base64
import io
import math

import torch
from PIL import Image

from ldmfast._version import __version__
from ldmfast.commands import charts
from ldmfast.commands.charts import escape

STYLE = """
.verdict { padding: .7rem 1rem; border-radius: 4px; border-left: .4rem solid currentColor; background: var(--line) }
.verdict b { color: var(--ink); font-weight: 600 }
.yes { color: #3a8f4a } .no { color: #d03030 }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(13rem, 1fr)); gap: 1rem }
.pictures img { width: 100%; image-rendering: pixelated; display: block; border: 1px solid var(--line) }
svg.errors { max-width: 46rem } svg rect { fill: currentColor }
svg text.bad { fill: #d03030; font-weight: 600 }
"""
NAME, WIDE, ROW, HEAD = 170, 640, 26, 30  # of the bars' drawing: names, the whole, a block's height, the axis
OURS, STOCK = 0, 1  # colours


def page(found) -> str:
    """found: a Verification."""
    css = "yes" if found.right else "no"
    body = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f"<title>ldmfast verify: {escape(found.source)}</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{charts.STYLE}{STYLE}</style></head><body>",
        f"<h1>ldmfast verify: {escape(found.source)}</h1>",
        f"<p class='verdict {css}'><b>{escape(found.verdict)}</b></p>",
        f"<p class='soft'>ldmfast {__version__}, torch {escape(torch.__version__)}, on {escape(found.device)}. "
        "Errors are norms of differences over norms.</p>",
        *(f"<p class='soft'>{escape(note)}</p>" for note in found.notes),
    ]
    if found.drawn:
        body.append(f"<section><h2>The picture, both ways</h2>{_pictures(found.drawn)}</section>")
    body += [
        f"<section><h2>{escape(n.name)}: {escape(n.kind)}, {n.dtype}</h2>{_network(n)}</section>"
        for n in found.networks
    ]
    return "\n".join([*body, "</body></html>\n"])


def _pictures(drawn) -> str:
    most = int(drawn.levels.max())
    times = 255 // most if most else 1
    difference = Image.fromarray((drawn.levels * times).to(torch.uint8).numpy())
    said = f"their difference, {times} times" if most else "their difference: none"
    shown = (("ldmfast", drawn.ours), ("stock diffusers", drawn.stock), (said, difference))
    figures = "".join(f"<figure>{_image(p, n)}<figcaption>{escape(n)}</figcaption></figure>" for n, p in shown)
    apart = (drawn.levels > 0).double().mean().item()
    levels = f"At most {most} of 255 levels apart; {100 * apart:.2g} % of the pixels differ."
    return f"<p>{escape(drawn.about)}. {levels}</p><div class='pictures'>{figures}</div>{_table(drawn.rows, 'exact')}"


def _image(picture: Image.Image, name: str) -> str:
    data = io.BytesIO()
    picture.save(data, format="PNG")
    coded = base64.b64encode(data.getvalue()).decode()
    return f"<img alt='{escape(name)}' src='data:image/png;base64,{coded}'>"


def _network(network) -> str:
    parts = [f"<p class='soft'>Stock's weights: {escape(network.weights)}.</p>", _table(network.wholes, network.exact)]
    for name, rows in network.blocks.items():
        title = "The blocks" if len(network.blocks) == 1 else f"The blocks of {name}"
        about = f"error of each against {network.exact}, with its true input"
        keys = f"{charts.key(OURS)}ldmfast &nbsp; {charts.key(STOCK)}stock diffusers"
        parts.append(f"<h3>{escape(title)}: {about}</h3><p class='soft'>{keys}</p>{bars(rows)}")
        inner = [each for row in rows for each in row.wrong]
        if inner:
            parts.append(f"<h3>Inside them, what is not right</h3>{_table(inner, network.exact)}")
    if network.changed:
        lines = [[escape(name), f"{100 * far:.3g} %"] for name, far in network.changed[:50]]
        more = f"<p class='soft'>and {len(network.changed) - 50} more</p>" if len(network.changed) > 50 else ""
        title = f"<h3>Tensors that are not those of stock's weights: {len(network.changed)}</h3>"
        parts.append(f"{title}{charts.table(['tensor', 'apart'], lines)}{more}")
    parts.append("<h3>What does not go through ldmfast's ops</h3>")
    listed = "".join(f"<li>{escape(sentence)}</li>" for sentence in network.explained)
    parts.append(f"<ul>{listed}</ul>" if listed else "<p class='soft'>Nothing: every layer that can does.</p>")
    return "".join(parts)


def _table(rows: list, exact: str) -> str:
    head = ["", f"ours from {exact}", f"stock from {exact}", "ours from stock", ""]
    lines = [
        [
            escape(row.name),
            *(f"{v:.2e}" for v in (row.ours, row.stock, row.apart)),
            f"{_mark(row)} {escape(row.remark)}",
        ]
        for row in rows
    ]
    return charts.table(head, lines)


def _mark(row) -> str:
    return "<span class='yes'>right</span>" if row.fine else "<span class='no'>WRONG</span>"


def bars(rows: list) -> str:
    """Two bars a block on a logarithmic axis: ours above stock's. No bar: no error at all. To the edge: not finite."""
    values = [value for row in rows for value in (row.ours, row.stock) if 0 < value < math.inf]
    low = math.floor(math.log10(min(values, default=1e-8) / 3))
    high = max(low + 2, math.ceil(math.log10(max(values, default=1e-6))))
    left, right = NAME, WIDE - 120

    def place(value: float) -> float:
        if value <= 0:
            return left
        share = 1.0 if math.isinf(value) else (math.log10(value) - low) / (high - low)
        return left + (right - left) * min(1.0, max(0.0, share))

    height = HEAD + ROW * len(rows)
    drawn = [f"<text x='{WIDE}' y='{HEAD - 14}' text-anchor='end'>ldmfast / stock</text>"]
    for power in range(low, high + 1):
        x = place(10.0**power)
        drawn.append(f"<line class='axis' x1='{x:.1f}' x2='{x:.1f}' y1='{HEAD - 8}' y2='{height}'/>")
        drawn.append(f"<text x='{x:.1f}' y='{HEAD - 14}' text-anchor='middle'>1e{power}</text>")
    for index, row in enumerate(rows):
        y, bad = HEAD + ROW * index, "" if row.fine else " class='bad'"
        drawn.append(f"<text{bad} x='{NAME - 8}' y='{y + 14}' text-anchor='end'>{escape(row.name)}</text>")
        for kind, value, down in ((OURS, row.ours, 3), (STOCK, row.stock, 11)):
            width = max(0.0, place(value) - left)
            drawn.append(f"<g class='k{kind}'><rect x='{left}' y='{y + down}' width='{width:.1f}' height='7'/></g>")
        said = f"{row.ours:.1e} / {row.stock:.1e}"
        drawn.append(f"<text{bad} x='{WIDE}' y='{y + 14}' text-anchor='end'>{said}</text>")
    label = "errors of each block, ours above stock's"
    inside = "".join(drawn)
    return f"<svg class='errors' viewBox='0 0 {WIDE} {height}' role='img' aria-label='{escape(label)}'>{inside}</svg>"
