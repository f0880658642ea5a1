"""A peer's process: started, asked, ended; and which of them memory holds at the same time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent
CACHE = BENCH.parent / "build" / "peers"
PARAMETERS = {"unet": 860e6, "vae": 84e6, "picture": 944e6, "sdxl": 2567e6}
ACTIVATIONS = {"unet": 0.7, "sdxl": 0.7, "vae": 3.0, "picture": 3.0}  # GiB at 64x64, at most


class Failed(Exception):
    """Why an engine is left out, as a clause."""


@dataclass
class Engine:
    """A running worker. Raises Failed where it ends or does not answer in `patience` seconds."""

    name: str
    patience: float
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    cache: Path = CACHE

    def __post_init__(self):
        if not self.command:
            kind, _, version = self.name.partition("-")
            self.command = [sys.executable, str(BENCH / "peers" / "worker.py"), kind]
            if version:
                where = self.cache / self.name
                if not (where / "openvino").is_dir():
                    raise Failed(f"is not installed in {where}")
                self.environment = {"PYTHONPATH": str(where)}
        self.cache.mkdir(parents=True, exist_ok=True)
        self.log = self.cache / f"{self.name}.log"
        with self.log.open("w") as log:
            environment = {**os.environ, **self.environment}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(self.command, **pipes, env=environment, text=True)

    def ask(self, wish: dict) -> dict:
        late = threading.Event()

        def give_up():
            late.set()
            self.process.kill()

        timer = threading.Timer(self.patience, give_up)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(wish) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            return json.loads(line)
        if late.is_set():
            raise Failed(f"took longer than {self.patience:.0f} s")
        if self.process.wait() == -9:
            raise Failed("was ended by the system, which lacks memory, it seems")
        lines = self.log.read_text().strip().splitlines() or ["no reason given"]
        raise Failed(f"failed: {lines[-1][:200]}")

    def close(self) -> None:
        """Ends the process; it may have ended by itself, with a wish that it did not read."""
        self.process.kill()
        self.process.wait()
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        self.process.stdout.close()


def available() -> float:
    """GiB of memory that may still be taken."""
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) / 2**20


def needs(name: str, job: dict) -> tuple[float, float]:
    """GiB that an engine holds when it is ready, and how much more while it prepares; an estimate from its weights.

    OpenVINO's weights are in float32 where the processor does not multiply what was asked for; its mapped file is not
    counted: the system takes those pages back.
    """
    full = PARAMETERS[job["work"]] * 4 / 2**30
    weights = full if job["dtype"] == "float32" else full / 2
    held = 0.6 + job["batch"] * (job["size"] / 64) ** 2 * ACTIVATIONS[job["work"]]
    if name.startswith("openvino"):
        return held + full, 0.1 * full
    copies = 2.0 if name == "compile" else 1.0  # frozen, it lays them out anew
    return held + copies * weights, full * 1.1 - weights + (weights if name == "compile" else 0.0)


def groups(names: list[str], job: dict, memory: float) -> tuple[list[list[str]], list[str]]:
    """(engines that memory, in GiB, holds together; those that it does not hold).

    stock and ldmfast are in each group, or ldmfast alone in those after the first, where there is no room for both.
    """
    first, missing, found = [name for name in ("stock", "ldmfast") if name in names], [], []

    def fits(group):
        held = most = 0.0
        for ready, more in (needs(name, job) for name in group):  # they prepare one after the other
            held, most = held + ready, max(most, held + ready + more)
        return most <= 0.9 * memory

    if not fits(first):
        return [], names
    for name in (name for name in names if name not in first):
        if found and fits([*found[-1], name]):
            found[-1].append(name)
        elif fits([*first, name]):
            found.append([*first, name])
        elif len(first) == 2 and fits(["ldmfast", name]):
            found += [first] * (not found) + [["ldmfast", name]]
        else:
            missing.append(name)
    return found or ([first] if first else []), missing
