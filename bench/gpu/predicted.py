"""Each kernel's predicted time beside its goal and its floor; beside them what was measured, once it is.

    python bench/gpu/predicted.py                        predictions alone
    python bench/gpu/predicted.py --measured OUT         beside OUT/ops.json, step.json and sdxl.json of bench/gpu.sh

The floor is the larger of the operations at the matrix units' rate and the bytes at the memory's, both of the data
sheet: no version runs faster. Until a row was measured the choice between backends rests on these predictions, and
says so (ldmfast/ops/speeds.py, `ldmfast.explain`); `ldmfast tune` measures them away.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

from record import ROOT  # noqa: E402,F401  (puts the package on the path)

from ldmfast import files  # noqa: E402

PREDICTED = Path(__file__).with_name("predicted.json")
ITEM = 2  # bytes of float16


def floor_us(row: dict, about: dict) -> float:
    """Microseconds that the device's rates allow; an example's shape does not say all, so its row has the sizes."""
    if "bytes" in row:
        return 1e6 * max(row.get("flop", 0) / about["flop_per_second"], row["bytes"] / about["bytes_per_second"])
    sizes = [int(n) for part in row["shape"].split() for n in part.split("x") if n.isdigit()]
    if row["op"] == "attention":
        N, L, S, H, D = sizes
        flop, size = 4 * N * L * S * H * D, 2 * (L + S) * N * H * D * ITEM
    else:
        numel = sizes[0] * sizes[1] * sizes[2] * sizes[3]
        passes = {"group_norm_silu": 2, "group_norm_silu_backward": 3, "ddim_step": 5}[row["op"]]
        flop, size = 0, passes * numel * ITEM
    return 1e6 * max(flop / about["flop_per_second"], size / about["bytes_per_second"])


def measured_us(row: dict, ops: dict | None) -> float | None:
    for found in ops["rows"] if ops else ():
        if all(found.get(key) == row[key] for key in ("op", "shape", "dtype", "backend")) and "hot_us" in found:
            return found["hot_us"]
    return None


def measured_ms(step: dict, folder: Path | None) -> float | None:
    content = read(folder, step["file"])
    for found in content["rows"] if content else ():
        if found.get("key") == step["key"] and "median_ms" in found:
            return found["median_ms"]
    return None


def read(folder: Path | None, name: str) -> dict | None:
    return files.read_json(folder / name) if folder is not None and (folder / name).exists() else None


def span(values: list | None) -> str:
    return "" if values is None else "-".join(f"{value:g}" for value in dict.fromkeys(values))


def table(folder: Path | None) -> list[str]:
    """A Markdown table of kernels, in microseconds, and one of steps, in milliseconds."""
    about, ops = files.read_json(PREDICTED), read(folder, "ops.json")
    lines = [
        f"Predictions for {about['device']}; none of these times was measured, but those in the last column.",
        "",
        "| kernel, float16 | backend | floor, us | predicted, us | gate | goal | PyTorch, predicted | measured, us |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in about["rows"]:
        found = measured_us(row, ops)
        cells = [f"{row['op']} {row['shape']}", row["backend"], f"{floor_us(row, about):.2g}", span(row["us"])]
        cells += [f"{row.get('gate_us', '')}", f"{row.get('goal_us', '')}", span(row["eager_us"])]
        lines.append("| " + " | ".join([*cells, "not yet" if found is None else f"{found:g}"]) + " |")
    lines += ["", "| step | predicted, ms | gate | goal | measured, ms |", "| --- | --- | --- | --- | --- |"]
    for step in about["steps"]:
        found = measured_ms(step, folder)
        cells = [step["name"], span(step["ms"]) or "none", f"{step['gate_ms']:g}", f"{step['goal_ms']:g}"]
        lines.append("| " + " | ".join([*cells, "not yet" if found is None else f"{found:g}"]) + " |")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--measured", type=Path, metavar="OUT", help="the folder that bench/gpu.sh wrote")
    print("\n".join(table(parser.parse_args(argv).measured)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
