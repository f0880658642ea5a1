"""What `ldmfast tune` measured on this machine: times of each backend at the shapes of a network.

One file for each device, driver, torch, ldmfast and, on a CPU, instruction set and number of threads, in
~/.cache/ldmfast/speeds (XDG_CACHE_HOME, LDMFAST_SPEEDS; `LDMFAST_SPEEDS=off` reads none). speeds.py asks here first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from ldmfast import files
from ldmfast._version import __version__

VARIABLE = "LDMFAST_SPEEDS"
# sizes that a time depends on smoothly: a point holds within FAR times of each; every other size must be the same
EXTENTS = frozenset({"L", "S", "M", "P", "N", "pixels", "heads", "rows", "numel", "Ci", "Co", "C", "K"})
FAR = 2.0
NEAR = 1.03  # a backend that takes less than this many times the fastest one's time is as fast

_tables: dict[torch.device, Table | None] = {}
_forgetting: list[Callable[[], None]] = []  # what else keeps something of a table


class Table:
    """The times of one file. points: {(op, dtype): [(sizes, {backend: seconds})]}"""

    def __init__(self, path: Path, content: dict) -> None:
        self.path, self.when = path, str(content["when"])
        self.points: dict[tuple[str, str], list[tuple[dict, dict]]] = {}
        for row in content["rows"]:
            times = {name: float(seconds) for name, seconds in row["seconds"].items()}
            if not all(math.isfinite(seconds) and seconds > 0 for seconds in times.values()):
                raise ValueError(f"a time of {row['op']} is no positive number")
            sizes = {name: int(value) for name, value in row["sizes"].items()}
            self.points.setdefault((row["op"], row["dtype"]), []).append((sizes, times))

    def times(
        self, op: str, dtype: torch.dtype, sizes: dict[str, int]
    ) -> tuple[dict[str, int], dict[str, float]] | None:
        """(sizes, {backend: seconds}) of the nearest point, or None if none is near."""
        found = self.points.get((op, str(dtype).removeprefix("torch.")), ())
        near = [(distance, i) for i, (point, _) in enumerate(found) if (distance := apart(sizes, point)) is not None]
        return found[min(near)[1]] if near else None


def apart(sizes: dict[str, int], point: dict[str, int]) -> float | None:
    """How far two shapes are apart, as a sum of logarithms of their extents' ratios; None if too far."""
    if sizes.keys() != point.keys():
        return None
    total = 0.0
    for name, value in sizes.items():
        if value == point[name]:
            continue
        if name not in EXTENTS or min(value, point[name]) < 1:
            return None
        ratio = abs(math.log(value / point[name]))
        if ratio > math.log(FAR):
            return None
        total += ratio
    return total


def folder() -> Path | None:
    """Where the tables are; None where none is to be read."""
    named = os.environ.get(VARIABLE)
    if named:
        return None if named == "off" else Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ldmfast" / "speeds"


def machine(device: torch.device) -> dict[str, str]:
    """What a measured time holds for: it makes the file's name."""
    from ldmfast.ops import native

    found = {"torch": torch.__version__, "ldmfast": __version__}
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        missing = native.missing("cuda")
        flags = "none" if missing else str(getattr(native.module("cuda"), "flags", ""))
        return {"device": gpu.name, "driver": driver(), "cuda": torch.version.cuda or "none", "module": flags, **found}
    isa = "none" if native.missing("cpu") else native.module("cpu").active_isa()
    threads = str(torch.get_num_threads())
    return {"device": processor(), "instruction_set": isa, "threads": threads, **found}


def path_of(device: torch.device) -> Path | None:
    """The file of this device, which need not be there; None as `folder`."""
    place = folder()
    if place is None:
        return None
    about = machine(device)
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")[:40]
    digest = hashlib.sha256(repr(sorted(about.items())).encode()).hexdigest()[:12]
    return place / f"{name}-{digest}.json"


def table(device: torch.device) -> Table | None:
    """This device's table, read once a process; None if it has none. A damaged file is warned of and not used."""
    try:
        return _tables[device]
    except KeyError:
        _tables[device] = found = _read(path_of(device))
        return found


def _read(path: Path | None) -> Table | None:
    if path is None or not path.exists():
        return None
    try:
        return Table(path, files.read_json(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {files.first_line(error)}"
        warnings.warn(f"{path} is damaged and is not used ({what}); `ldmfast tune` measures again", stacklevel=2)
        return None


def write(device: torch.device, rows: list[dict], when: str) -> Path:
    """Puts this device's table in place of the one before, and in use."""
    path = path_of(device)
    if path is None:
        raise ValueError(f"{VARIABLE}=off: there is no folder for what is measured")
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"what": "tune", "machine": machine(device), "when": when, "rows": rows}
    files.write_text(path, json.dumps(content, indent=1) + "\n")
    forget()
    return path


def clear() -> list[Path]:
    """Removes every table; returns which."""
    place = folder()
    found = sorted(place.glob("*.json")) if place and place.is_dir() else []
    for path in found:
        path.unlink()
    forget()
    return found


def forget() -> None:
    """The tables are read anew when they are next asked for."""
    _tables.clear()
    for more in _forgetting:
        more()


def on_forgetting(function: Callable[[], None]) -> None:
    _forgetting.append(function)


def driver() -> str:
    """The NVIDIA driver's version, or "none"."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        return text.splitlines()[0].split("Kernel Module")[-1].split()[0]
    except (OSError, IndexError):
        return f"CUDA {torch._C._cuda_getDriverVersion()}" if torch.version.cuda else "none"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
