"""A JSON file of rows, written after each row, whole or not at all: a run that is cut short keeps what it measured.

A row that fails has an "error" in place of figures, and the run goes on. After an error that leaves the device unusable
(an illegal address, say) nothing more can be measured in the process: it ends with LOST, and the next one resumes
behind the row that did it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "gpu")) if path not in sys.path]

from ldmfast import files  # noqa: E402

LOST = 75  # exit status
RED, STARTED = "LDMFAST_BENCH_RED", "LDMFAST_BENCH_STARTED"  # what failed before, by commas; seconds since the epoch


class DeviceLost(RuntimeError):
    """The device takes no more calls from this process."""


class Record:
    """path     of the JSON; what it held before is kept where `resume`
    about    of the whole file: what was measured, in what
    """

    def __init__(self, path: Path | None, about: dict, resume: bool = False) -> None:
        self.path, self.failed, self.clocks = path, False, None
        before = files.read_json(path) if resume and path is not None and path.exists() else {"rows": []}
        red = [name for name in os.environ.get(RED, "").split(",") if name]
        self.content = {**about, "commit": commit(), "red": red, "rows": before["rows"]}
        self.write()

    def has(self, name: str) -> bool:
        return any(row["name"] == name for row in self.content["rows"])

    def measure(self, name: str, figures: Callable[[], dict], **about) -> dict:
        """Adds the row that figures() gives, or the error that it raised; returns it.

        A row that an earlier process has is left as it is. Raises DeviceLost after an error that ends the process.
        """
        if self.has(name):
            return next(row for row in self.content["rows"] if row["name"] == name)
        begin, lost = time.time(), False
        try:
            found = figures()
        except (
            Exception
        ) as error:  # a refusal is an answer; a rival that fails is a row too, and the exit status says so
            if is_refusal(error):
                found = {"refused": str(error)}
            else:
                found, lost, self.failed = {"error": f"{type(error).__name__}: {error}"[:2000]}, is_lost(error), True
        row = {"name": name, **about, **found, "at_s": round(begin - float(os.environ.get(STARTED, begin)), 1)}
        if self.clocks is not None and not lost:
            row |= self.clocks.within(begin, time.time())
        self.content["rows"].append(row)
        self.write()
        print(
            f"{name:<60} " + "  ".join(f"{key} {short(value)}" for key, value in row.items() if key != "name"),
            flush=True,
        )
        if lost:
            raise DeviceLost(row["error"])
        return row

    def write(self) -> None:
        if self.path is not None:
            files.write_text(self.path, json.dumps(self.content, indent=1) + "\n")

    @property
    def status(self) -> int:
        return int(self.failed)


def is_refusal(error: Exception) -> bool:
    """Whether a backend, ours or PyTorch's, only said that it does not take these arguments."""
    return isinstance(error, NotImplementedError) or "No viable backend for scaled_dot_product_attention" in str(error)


def is_lost(error: Exception) -> bool:
    """Whether the device takes no more calls after it; running out of memory is no such error."""
    text = f"{type(error).__name__}: {error}"
    return ("CUDA error" in text or "AcceleratorError" in text) and "out of memory" not in text.lower()


def short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:80]


def commit() -> str:
    """This checkout's, or what LDMFAST_BENCH_COMMIT says of a copy without git."""
    if named := os.environ.get("LDMFAST_BENCH_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"
