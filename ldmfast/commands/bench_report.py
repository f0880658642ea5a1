"""`ldmfast report`: what the benchmarks wrote, as one HTML file that needs nothing beside it.

Any number of files of bench/peers/compare.py, bench/peers/parts.py, bench/layers.py and bench/gpu/step_time.py.
"""

from __future__ import annotations

from pathlib import Path

from ldmfast import files
from ldmfast.commands import bench_files, charts
from ldmfast.commands.charts import escape
from ldmfast.commands.common import command

# What a section is drawn from, and what makes such a file
MISSING = {
    "peers": "None of these files compares engines: <code>make bench-peers</code> does.",
    "parts": "None of these files has the parts of a step: <code>python bench/peers/parts.py --json FILE</code>.",
    "layers": "None of these files has layers: <code>python bench/layers.py --json FILE</code> measures them.",
    "step": "None of these files has a step with guidance: <code>python bench/gpu/step_time.py --json FILE</code>.",
}
NAMES = {"unet": "SD1.5 U-Net", "sdxl": "SDXL U-Net", "vae": "decoder", "picture": "whole picture"}
FIRST = ("ldmfast", "stock", "compile")  # these have a colour of their own; others follow


def add(commands):
    made = command(commands, "report", "draw what the benchmarks wrote as one HTML page", run)
    made.add_argument("files", nargs="+", help="JSON files of bench/")
    made.add_argument("-o", "--output", default="report.html", help="(default: report.html)")


def run(arguments):
    found = [bench_files.read(path) for path in arguments.files]
    output = Path(arguments.output)
    if output.resolve() in [Path(path).resolve() for path in arguments.files]:
        raise ValueError(f"--output {output} is one of the files to read")
    files.write_text(output, page(found))
    print(output)


def page(found: list[dict]) -> str:
    """found: what bench_files.read gave."""
    drawn = {kind: [file for file in found if file["kind"] == kind] for kind in MISSING}
    sections = (
        ("Beside other engines", "peers", peers),
        ("Cost against size and batch", "peers", costs),
        ("The step and its parts", "parts", parts),
        ("Layers against the roof", "layers", layers),
        ("A step with guidance", "step", steps),
    )
    body = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>ldmfast: benchmarks</title>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<style>{charts.STYLE}</style></head><body><h1>ldmfast: benchmarks</h1>{_sources(found)}",
    ]
    for title, kind, draw in sections:
        content = draw(drawn[kind]) if drawn[kind] else f"<p class='soft'>{MISSING[kind]}</p>"
        body.append(f"<section><h2>{title}</h2>{content}</section>")
    return "\n".join([*body, "</body></html>\n"])


def _sources(found: list[dict]) -> str:
    rows = [[escape(file["name"]), escape(file["about"])] for file in found]
    return charts.table(["file", "measured on"], rows, numbers=2)


def _title(row: dict) -> str:
    name = NAMES.get(row["work"], row["work"])
    return f"{name}, {row['size']}x{row['size']} latents, batch {row['batch']}, {row['dtype']}"


def _colours(rows: list[dict]) -> dict[str, int]:
    names = dict.fromkeys([*FIRST, *(name for row in rows for name in row["engines"])])
    return {name: index % charts.KINDS for index, name in enumerate(names)}


def peers(found: list[dict]) -> str:
    rows = [row for file in found for row in file["rows"]]
    colours, drawn, others = _colours(rows), [], []
    for row in rows:
        ours = row["engines"].get("ldmfast", {}).get("seconds")
        timed = {name: figures for name, figures in row["engines"].items() if "seconds" in figures}
        lines = []
        for name, figures in sorted(timed.items(), key=lambda item: item[1]["seconds"]):
            said = charts.seconds(figures["seconds"])
            said += f", {figures['seconds'] / ours:.2f}x" if ours and name != "ldmfast" else ""
            said += f", {figures['memory'] / 1024:.1f} GiB" if "memory" in figures else ""
            lines.append((name, figures["seconds"], said, colours[name]))
        left = [
            f"{name} is left out: {figures['left_out']}"
            for name, figures in row["engines"].items()
            if name not in timed
        ]
        notes = "".join(f"<p class='soft'>{escape(text)}.</p>" for text in left)
        usual = (row["size"], row["batch"]) == (64, 1)
        (drawn if usual else others).append(f"<div><h3>{escape(_title(row))}</h3>{charts.bars(lines)}{notes}</div>")
    about = "Median seconds, how many times ldmfast's, and the most memory held; less is better."
    grid = "<div class='grid'>{}</div>".format
    summary = f"<summary>{len(others)} other sizes and batches</summary>"
    more = f"<details{' open' * (not drawn)}>{summary}{grid(''.join(others))}</details>" if others else ""
    return f"<p class='soft'>{about}</p>{grid(''.join(drawn))}{more}"


def costs(found: list[dict]) -> str:
    """Time and memory against the latents' size (batch 1) and against the batch (64x64)."""
    rows, drawn = [row for file in found for row in file["rows"]], []
    colours = _colours(rows)
    axes = (("size", {"batch": 1}, "side of the latents"), ("batch", {"size": 64}, "batch, 64x64 latents"))
    for work, dtype in dict.fromkeys((row["work"], row["dtype"]) for row in rows):
        of_it = [row for row in rows if (row["work"], row["dtype"]) == (work, dtype)]
        for axis, fixed, below in axes:
            mine = [row for row in of_it if all(row[name] == value for name, value in fixed.items())]
            for value, unit, scale in (("seconds", "seconds", 1.0), ("memory", "GiB held", 1 / 1024)):
                series = _series(mine, axis, value, scale)
                if series:
                    title = f"{NAMES.get(work, work)}, {dtype}: {unit}"
                    drawn.append(charts.lines(series, colours, title, below))
    if not drawn:
        return (
            "<p class='soft'>These files have one size and one batch: "
            "<code>make bench-peers PEERS=--sizes</code> measures several.</p>"
        )
    return f"<div class='grid'>{''.join(drawn)}</div>"


def _series(rows: list[dict], axis: str, value: str, scale: float) -> dict[str, list]:
    """{engine: (place on the axis, value)} of those with two places at least; the last file says what two have."""
    found = {}
    for row in rows:
        for name, figures in row["engines"].items():
            if value in figures:
                found.setdefault(name, {})[row[axis]] = figures[value] * scale
    return {name: sorted(points.items()) for name, points in found.items() if len(points) > 1}


def parts(found: list[dict]) -> str:
    drawn = []
    for file in found:
        whole = sum(part["seconds"] for part in file["parts"])
        pieces = [(part["part"], part["seconds"], index % charts.KINDS) for index, part in enumerate(file["parts"])]
        bar = charts.stack(pieces, f"the parts of {charts.seconds(whole)}")
        rows = []
        for part, (name, _, kind) in zip(file["parts"], pieces, strict=True):
            rate = f"{part['gflops']:.0f}" if "gflops" in part else ""
            roof = f"{part['percent']:.0f} %" if "percent" in part else ""
            share = f"{100 * part['seconds'] / whole:.1f} %"
            rows.append([charts.key(kind) + escape(name), charts.seconds(part["seconds"]), share, rate, roof])
        head = ["part", "time", "share", "GFLOP/s", "of a product's"]
        drawn.append(f"<h3>{escape(_title(file))}: {charts.seconds(whole)}</h3>{bar}{charts.table(head, rows)}")
    return "".join(drawn) + (
        "<p class='soft'>Operations are counted as a direct convolution's: Winograd's forms make fewer, "
        "and may pass 100 %.</p>"
    )


def layers(found: list[dict]) -> str:
    drawn = []
    for file in found:
        for dtype in dict.fromkeys(row["dtype"] for row in file["rows"]):
            mine = [row for row in file["rows"] if row["dtype"] == dtype]
            most = max(100.0, *(row["percent"] for row in mine))
            lines = [
                (row["layer"], row["percent"], f"{row['percent']:.0f} %, {charts.seconds(row['seconds'])}", 0)
                for row in sorted(mine, key=lambda row: -row["percent"])
            ]
            summary = f"{len(mine)} layers, {escape(dtype)}"
            drawn.append(f"<details open><summary>{summary}</summary>{charts.bars(lines, most)}</details>")
    about = "Share of the processor's multiply-adds in that dtype; operations counted as a direct convolution's."
    return f"<p class='soft'>{about}</p><div class='grid'>{''.join(drawn)}</div>"


def steps(found: list[dict]) -> str:
    drawn = []
    for file in found:
        lines, failed = [], []
        for row in file["rows"]:
            if "seconds" in row:
                kind = 0 if row["name"].startswith("ldmfast") else 1
                lines.append((row["name"], row["seconds"], charts.seconds(row["seconds"]), kind))
            else:
                failed.append(f"<p class='soft'>{escape(row['name'])} failed: {escape(row['error'])}</p>")
        drawn.append(f"<h3>{escape(file['title'])}</h3>{charts.bars(lines)}{''.join(failed)}")
    return "".join(drawn)
