"""ldmfast beside its peers on this CPU: stock diffusers, torch.compile with freezing, OpenVINO; in turn, in one run.

    make bench-peers                                                       U-Net and decoder, float32 and bfloat16
    make bench-peers PEERS="--work unet --size 32 96 --batch 1 2"           other sizes
    make bench-peers PEERS="--work picture --size 32 64 --rounds 3"         20 steps with guidance, and the decoding
    make bench-peers PEERS="--work sdxl --dtype bfloat16"                   SDXL's U-Net at 64x64
    make bench-peers PEERS="--sizes"                                        a step against latent size and batch

Every engine is a process of its own (worker.py), with the same random weights; they take turns, one round after the
other, and a row has their medians. What one computes is compared with stock first. Where memory does not hold all of
them at once, ldmfast is measured beside each. An engine that is not installed, that fails or computes something else
is left out with a sentence. The JSON is written after every row; `ldmfast report` draws it.

OpenVINO is installed into build/peers (`make bench-peers` does it), not beside ldmfast.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent
ROOT = BENCH.parent
sys.path[:0] = [str(ROOT), str(BENCH)]

CACHE = ROOT / "build" / "peers"
OPENVINO = ("2026.4.1", "2026.3.0")
PEERS = ("ldmfast", "stock", "compile", *(f"openvino-{version}" for version in OPENVINO))
WORKS = ("unet", "vae", "picture", "sdxl")
# norm of the difference from stock's over stock's, above which an engine computes something else
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
PARAMETERS = {"unet": 860e6, "vae": 84e6, "picture": 944e6, "sdxl": 2567e6}
SIZES = [(size, 1) for size in (32, 48, 64, 96, 128)] + [(64, batch) for batch in (2, 4, 8)]


class Failed(Exception):
    """Why an engine is left out, as a clause."""


@dataclass
class Engine:
    """A running worker. Raises Failed where it ends or does not answer in `patience` seconds."""

    name: str
    patience: float
    command: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        if not self.command:
            kind, _, version = self.name.partition("-")
            self.command = [sys.executable, str(BENCH / "peers" / "worker.py"), kind]
            if version:
                where = CACHE / self.name
                if not (where / "openvino").is_dir():
                    raise Failed(f"is not installed in {where}")
                self.environment = {"PYTHONPATH": str(where)}
        self.log = CACHE / f"{self.name}.log"
        with self.log.open("w") as log:
            environment = {**os.environ, **self.environment}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(self.command, **pipes, env=environment, text=True)

    def ask(self, wish: dict) -> dict:
        import threading

        timer = threading.Timer(self.patience, self.process.kill)
        timer.start()
        begin = time.perf_counter()
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
        if time.perf_counter() - begin >= self.patience:
            raise Failed(f"took longer than {self.patience:.0f} s")
        lines = self.log.read_text().strip().splitlines() or ["no reason"]
        raise Failed(f"failed: {lines[-1][:200]}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()


def convert(name: str, job: dict, patience: float) -> None:
    """Makes OpenVINO's file where there is none, in a process of its own, before the others take memory."""
    engine = Engine(name, patience)
    try:
        for work in ("unet", "vae") if job["work"] == "picture" else (job["work"],):
            engine.ask({"convert": {"work": work, "cache": job["cache"]}})
    finally:
        engine.close()


def compared(names: list[str], job: dict, rounds: int, patience: float, said=print) -> dict[str, dict]:
    """{engine: its times, medians and memory}: they take turns in this group. The first is what others are held to."""
    import torch

    engines, found, wanted = {}, {}, None
    for name in (name for name in names if name.startswith("openvino")):
        try:
            convert(name, job, patience)
        except Failed as reason:
            said(f"{name} is left out: it {reason}.")
            found[name] = {"left_out": str(reason)}
    try:
        for name in (name for name in names if name not in found):
            try:
                engine = Engine(name, patience)
                engines[name] = engine
                answer = engine.ask({"prepare": job})
                output = torch.load(answer.pop("output"), weights_only=True)
                error = 0.0 if wanted is None else ((output - wanted).norm() / wanted.norm()).item()
                wanted = output if wanted is None else wanted
                if not error <= TOLERANCE[job["dtype"]]:
                    raise Failed(f"computes something else: {error:.1e} from {names[0]}")
            except Failed as reason:
                said(f"{name} is left out: it {reason}.")
                if name in engines:
                    engines.pop(name).close()
                found[name] = {"left_out": str(reason)}
                continue
            found[name] = {**answer, "error": error, "times_s": []}
            said(f"{name}: ready after {answer['prepare_s']:.1f} s, first call {answer['first_s']:.2f} s")
        for _ in range(rounds):
            for name, engine in engines.items():
                answer = engine.ask({"run": True})
                found[name]["times_s"].append(round(answer["seconds"], 4))
                found[name]["memory_mib"] = answer["memory_mib"]
    finally:
        for engine in engines.values():
            engine.close()
    for name in engines:
        found[name]["median_s"] = statistics.median(found[name]["times_s"])
    return found


def available() -> float:
    """GiB of memory that may still be taken."""
    text = Path("/proc/meminfo").read_text()
    return int(text.partition("MemAvailable:")[2].split()[0]) / 2**20


def groups(names: list[str], job: dict, memory: float) -> list[list[str]]:
    """Engines that fit into memory (GiB) together, stock and ldmfast in each group: weights twice, and activations."""
    weights = PARAMETERS[job["work"]] * (4 if job["dtype"] == "float32" else 2) / 2**30
    one = (
        2.1 * weights
        + 0.6
        + job["batch"] * (job["size"] / 64) ** 2 * (3.0 if job["work"] in ("vae", "picture") else 0.7)
    )
    most = max(3, int(memory * 0.9 / one))
    first = [name for name in ("stock", "ldmfast") if name in names]
    others = [name for name in names if name not in first]
    if not others or len(names) <= most:
        return [first + others]
    step = most - len(first)
    return [first + others[i : i + step] for i in range(0, len(others), step)]


def print_row(job: dict, found: dict) -> None:
    ours = found.get("ldmfast", {}).get("median_s")
    print(f"{job['work']} {job['dtype']} {job['batch']} x {job['size']}x{job['size']}")
    for name, row in found.items():
        if "median_s" in row:
            ratio = f"{row['median_s'] / ours:6.2f} x ldmfast's" if ours else ""
            memory = f"{row['memory_mib']:8.0f} MiB"
            print(f"  {name:20} {row['median_s']:8.3f} s {ratio} {memory}  {row['error']:.1e} from stock", flush=True)


def write(path: Path | None, record: dict) -> None:
    from ldmfast.files import replacing

    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


def jobs(options) -> list[dict]:
    pairs = SIZES if options.sizes else [(size, batch) for size in options.size for batch in options.batch]
    works = ["unet"] if options.sizes else options.work
    return [
        {"work": work, "dtype": dtype, "size": size, "batch": batch, "cache": str(CACHE)}
        for work in works
        for dtype in options.dtype
        for size, batch in pairs
    ]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", nargs="+", default=["unet", "vae"], choices=WORKS)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(TOLERANCE))
    parser.add_argument("--size", nargs="+", type=int, default=[64], help="side of the latents")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--sizes", action="store_true", help="a U-Net step against latent size and batch")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, default=900, help="seconds that an engine may take for one answer")
    parser.add_argument("--seconds", type=float, help="begin no further row after so long")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    from conftest import machine  # here, since tests/ has a conftest, too

    CACHE.mkdir(parents=True, exist_ok=True)
    switches = ("LDMFAST_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")
    set_here = {name: os.environ[name] for name in switches if name in os.environ}
    record = {"what": "peers", "machine": machine(), "environment": set_here, "rounds": options.rounds, "rows": []}
    begin = time.perf_counter()
    for job in jobs(options):
        if options.seconds and time.perf_counter() - begin > options.seconds:
            print(f"{options.seconds:.0f} s are over: {job['work']} {job['dtype']} and what follows is left out.")
            break
        for names in groups(options.peers, job, available()):
            found = compared(names, job, options.rounds, options.patience)
            print_row(job, found)
            record["rows"].append({**{k: v for k, v in job.items() if k != "cache"}, "engines": found})
            write(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
