"""The GPU's clocks, power and temperature while rows are measured, read beside them. It sets none of them."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator

FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")
NAMES = ("sm_mhz", "memory_mhz", "watts", "celsius")
PERIOD = 100  # milliseconds


class Clocks:
    """Readings of one device, (seconds since the epoch, values)."""

    def __init__(self, command: list[str]) -> None:
        self.readings: list[tuple[float, tuple[float, ...]]] = []
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # "[N/A]", of a value that this GPU has not
                self.readings.append((time.time(), tuple(float(value) for value in line.split(","))))

    def within(self, begin: float, end: float) -> dict:
        """{"clocks": {name: [least, median, most]}} of the readings between; {} without any."""
        found = [values for when, values in list(self.readings) if begin <= when <= end]
        if not found:
            return {}
        columns = zip(NAMES, zip(*found, strict=True), strict=False)
        return {"clocks": {name: [min(v), round(statistics.median(v), 1), max(v)] for name, v in columns}}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.thread.join(1)


def command() -> list[str] | None:
    if not shutil.which("nvidia-smi"):
        return None
    return ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits", "-lms", str(PERIOD)]


@contextlib.contextmanager
def watched(record, wanted: bool) -> Iterator[None]:
    """Context in which each row of the record has its clocks, where nvidia-smi is."""
    if not wanted or command() is None:
        yield
        return
    record.clocks = Clocks(command())
    try:
        yield
    finally:
        record.clocks.stop()
        record.clocks = None
