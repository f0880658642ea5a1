"""Bars and lines as HTML and SVG that need nothing beside them; colours are the page's, by class."""

from __future__ import annotations

import html
import math
from collections.abc import Callable

KINDS = 8  # colours that the page's style has: .k0 to .k7
WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 400, 250, 46, 34, 12

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1d2126; --soft: #5b6570; --line: #d9dee3;
  --k0: #c8401f; --k1: #6b7680; --k2: #8a5fb0; --k3: #1f6fb2; --k4: #3a9a8f; --k5: #b3852a;
  --k6: #b3477d; --k7: #5d7f35 }
@media (prefers-color-scheme: dark) { :root { --back: #15181c; --ink: #e6e9ec; --soft: #9aa4ae; --line: #333a42;
  --k0: #ff7a55; --k1: #97a3ae; --k2: #bb95dd; --k3: #69b1ea; --k4: #63c9bd; --k5: #e0b55c;
  --k6: #e287b4; --k7: #9cc26d } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 0 auto; padding: 1rem; color: var(--ink);
  background: var(--back); overflow-wrap: break-word }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.2rem } h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
p.soft, figcaption, .soft { color: var(--soft); font-size: .87rem } figure { margin: .6rem 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .87rem }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
td.n, th.n { text-align: right; white-space: nowrap }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2rem }
.bar { margin: .3rem 0 .45rem; font-size: .87rem }
.bar .head { display: flex; flex-wrap: wrap; justify-content: space-between; column-gap: 1rem }
.bar .fill { display: block; height: .6rem; border-radius: 2px; background: currentColor; min-width: 2px }
.name { font-size: .87rem } figcaption span { white-space: nowrap; margin-right: .6rem }
.stack { display: flex; height: 1.7rem; border-radius: 3px; overflow: hidden } .stack i { background: currentColor }
.key { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; background: currentColor;
  margin-right: .4rem }
svg { width: 100%; max-width: 34rem; height: auto } svg text { font-size: 12px; fill: var(--soft) }
svg .axis { stroke: var(--line) } svg polyline { fill: none; stroke: currentColor; stroke-width: 2.2 }
svg circle { fill: currentColor }
details summary { cursor: pointer; margin: .6rem 0 }
""" + "".join(f".k{kind} {{ color: var(--k{kind}) }} " for kind in range(KINDS))


def escape(value) -> str:
    return html.escape(str(value), quote=True)


def seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} us"


def bars(rows: list[tuple[str, float, str, int]], most: float | None = None) -> str:
    """Horizontal bars: (name, length, what is said beside it, colour), the longest as wide as fits."""
    most = most or max((length for _, length, _, _ in rows), default=0) or 1.0
    return "".join(
        f"<div class='bar'><div class='head'><span>{escape(name)}</span><span>{escape(said)}</span></div>"
        f"<i class='fill k{kind}' style='width:{min(100.0, 100 * length / most):.2f}%'></i></div>"
        for name, length, said, kind in rows
    )


def stack(parts: list[tuple[str, float, int]], label: str) -> str:
    """One bar of its parts: (name, length, colour)."""
    whole = sum(length for _, length, _ in parts) or 1.0
    pieces = "".join(
        f"<i class='k{kind}' style='width:{100 * length / whole:.3f}%' "
        f"title='{escape(name)}: {100 * length / whole:.1f} %'></i>"
        for name, length, kind in parts
    )
    return f"<div class='stack' role='img' aria-label='{escape(label)}'>{pieces}</div>"


def key(kind: int) -> str:
    return f"<span class='key k{kind}'></span>"


def table(head: list[str], rows: list[list[str]], numbers: int = 1) -> str:
    """A table; the columns from `numbers` on are aligned right. Cells are HTML already."""

    def line(cells, tag):
        marks = ["" if index < numbers else " class='n'" for index in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{m}>{cell}</{tag}>" for m, cell in zip(marks, cells, strict=True)) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<div class='wide'><table><thead>{line(head, 'th')}</thead><tbody>{body}</tbody></table></div>"


def lines(series: dict[str, list[tuple[float, float]]], colours: dict[str, int], title: str, below: str) -> str:
    """A plot of series of (x, y); both axes begin at 0."""
    points = [point for found in series.values() for point in found]
    right, top = max(x for x, _ in points), _round(max(y for _, y in points) or 1.0)
    x_of = _scale(right, LEFT, WIDTH - 14)
    y_of = _scale(top, HEIGHT - BELOW, ABOVE)
    drawn = [_axes(sorted({x for x, _ in points}), top, x_of, y_of)]
    for name, found in series.items():
        places = [(x_of(x), y_of(y)) for x, y in sorted(found)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dots = "".join(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3.2'/>" for x, y in places)
        drawn.append(f"<g class='k{colours[name]}'><title>{escape(name)}</title><polyline points='{line}'/>{dots}</g>")
    names = " ".join(f"<span>{key(colours[name])}{escape(name)}</span>" for name in series)
    picture = f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(title)}'>{''.join(drawn)}</svg>"
    return (
        f"<figure><b class='name'>{escape(title)}</b>{picture}"
        f"<figcaption>{escape(below)}. {names}</figcaption></figure>"
    )


def _scale(most: float, low: float, high: float) -> Callable[[float], float]:
    return lambda value: low + (high - low) * value / most


def _round(value: float) -> float:
    """The least of 1, 1.2, 1.6, 2, 4, 6, 8 and 10 times a power of ten that is not below value."""
    power = 10 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 1.2, 1.6, 2, 4, 6, 8, 10) if step * power >= value * (1 - 1e-9))


def _axes(marks: list[float], top: float, x_of: Callable, y_of: Callable) -> str:
    floor = HEIGHT - BELOW
    found = [f"<text x='{x_of(x):.1f}' y='{floor + 18}' text-anchor='middle'>{x:g}</text>" for x in marks]
    for part in (0, 0.25, 0.5, 0.75, 1):
        y = y_of(top * part)
        found.append(f"<line class='axis' x1='{LEFT}' x2='{WIDTH}' y1='{y:.1f}' y2='{y:.1f}'/>")
        found.append(f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{top * part:.3g}</text>")
    return "".join(found)
