"""pytest bench/ --benchmark-only: the machine in the record, the table at the end."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # a bare checkout, and timing.py


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")
    config.option.benchmark_quiet = True  # the table below stands in for pytest-benchmark's

    config.pluginmanager.register(Progress(config), "ldmfast progress")


class Progress:
    """A line a row, with the seconds since the beginning, in place of pytest's letters."""

    def __init__(self, config):
        self.config, self.shown, self.left_out = config, 0, []

    def pytest_runtest_setup(self, item):
        from timing import BUDGET, elapsed

        if elapsed() >= BUDGET:
            self.left_out.append(item.name)
            pytest.skip(f"not measured: the {BUDGET:.0f} s of this run are over")

    def pytest_report_teststatus(self, report):
        if report.when == "call" and report.passed or report.skipped:
            return ("skipped" if report.skipped else "passed"), "", ""

    def pytest_runtest_logreport(self, report):
        from timing import ROWS, elapsed

        for row in ROWS[self.shown :]:
            text = "  ".join(filter(None, [*row.line, row.note]))
            self.config.get_terminal_writer().line(f"{elapsed():5.0f} s  {text}", flush=True)
        self.shown = len(ROWS)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.update(machine())


def said(*command: str) -> str:
    """What a command prints, or an empty string where it is missing or fails."""
    if not shutil.which(command[0]):
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return names[0] if names else platform.processor()


def machine() -> dict:
    import torch

    from ldmfast.ops import native

    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": "not built" if native.missing("cpu") else native.module("cpu").active_isa(),
        "gpu": said("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "none",
        "torch": torch.__version__,
        "commit": said("git", "describe", "--always", "--dirty", "--abbrev=12") or "unknown",
    }


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    from timing import ROWS, elapsed, table

    if not ROWS:
        return
    terminalreporter.section("ldmfast")
    for key, value in machine().items():
        terminalreporter.line(f"{key}: {value}")
    terminalreporter.line("of roof: of the copy (GB/s, same bytes) or matrix product (TFLOP/s, same dtype) of this run")
    terminalreporter.line(
        f"{elapsed():.0f} s in all; a row has a note where something was left out or is measured once"
    )
    for line in table():
        terminalreporter.line(line)
