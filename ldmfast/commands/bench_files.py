"""The benchmarks' JSON, checked and brought to one form for `ldmfast report`."""

from __future__ import annotations

import math
from pathlib import Path

from ldmfast import files


def read(path) -> dict:
    """{"kind": "peers" | "parts" | "layers" | "step", "name", "about", and what that kind has}.

    Raises ValueError with one sentence naming a file that is damaged or that no benchmark wrote, FileNotFoundError.
    """
    content = files.read_json(path)
    for kind, (belongs, form) in KINDS.items():
        if belongs(content):
            try:
                return {"kind": kind, "name": Path(path).name, "about": _about(content), **form(content)}
            except KeyError as error:
                raise ValueError(f"{path} is damaged: a row lacks {error}") from error
            except (TypeError, AttributeError, ValueError) as error:
                raise ValueError(f"{path} is damaged: {files.first_line(error)}") from error
    raise ValueError(f"{path} is not a file of bench/peers, bench/layers.py or bench/gpu/step_time.py --json")


def number(value, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"{what} is {value!r}, expected a number from 0 on")
    return float(value)


def _about(content: dict) -> str:
    machine = content.get("machine") or {"device": content.get("device"), "torch": content.get("torch")}
    found = [f"{name.replace('_', ' ')} {value}" for name, value in machine.items() if value not in (None, "none")]
    found += [f"{name}={value}" for name, value in (content.get("environment") or {}).items()]
    return ", ".join(found)


def _shape(row: dict) -> dict:
    sizes = {name: int(number(row[name], name)) for name in ("size", "batch")}
    return {"work": str(row["work"]), "dtype": str(row["dtype"]), **sizes}


def _peers(content: dict) -> dict:
    """Rows of the same work and shape, of which memory held a few engines at a time, become one."""
    merged: dict[tuple, dict] = {}
    for row in content["rows"]:
        shape = _shape(row)
        engines = merged.setdefault(tuple(shape.values()), {**shape, "engines": {}})["engines"]
        for name, figures in row["engines"].items():
            if "left_out" in figures:
                engines.setdefault(name, {"left_out": str(figures["left_out"])})
                continue
            one = {"seconds": number(figures["median_s"], f"median_s of {name}")}
            if "memory_mib" in figures and not math.isnan(figures["memory_mib"]):
                one["memory"] = number(figures["memory_mib"], f"memory_mib of {name}")
            if "seconds" not in engines.get(name, {}):  # the first group's
                engines[name] = one
    return {"rows": list(merged.values())}


def _parts(content: dict) -> dict:
    found = []
    for part in content["parts"]:
        one = {"part": str(part["part"]), "seconds": number(part["seconds"], "seconds")}
        if "gflops" in part:
            one["gflops"] = number(part["gflops"], "gflops")
        if "percent_of_peak" in part:
            one["percent"] = number(part["percent_of_peak"], "percent_of_peak")
        found.append(one)
    if not sum(part["seconds"] for part in found):
        raise ValueError("it has no part that took any time")
    return {**_shape(content), "parts": found}


def _layers(content: dict) -> dict:
    return {
        "rows": [
            {
                "layer": str(row["layer"]),
                "dtype": str(row["dtype"]),
                "seconds": number(row["ours_ms"], "ours_ms") / 1e3,
                "percent": number(row["percent_of_peak"], "percent_of_peak"),
            }
            for row in content["rows"]
        ]
    }


def _step(content: dict) -> dict:
    rows = []
    for row in content["rows"]:
        failed = next((name for name in ("error", "refused") if name in row), None)
        if failed:
            figures = {"error": str(row[failed])}
        else:
            figures = {"seconds": number(row["median_ms"], "median_ms") / 1e3}
        rows.append({"name": str(row["name"]), **figures})
    return {"title": f"{content['what']}, {content['dtype']}", "rows": rows}


KINDS = {
    "peers": (lambda content: content.get("what") == "peers", _peers),
    "parts": (lambda content: content.get("what") == "parts", _parts),
    "layers": (lambda content: "peak_gflops" in content and "rows" in content, _layers),
    "step": (
        lambda content: ("work" in content or str(content.get("what")).startswith("SD1.5 step")) and "rows" in content,
        _step,
    ),
}
