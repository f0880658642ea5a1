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
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

BENCH = Path(__file__).resolve().parent.parent
ROOT = BENCH.parent
sys.path[:0] = [str(ROOT), str(BENCH), str(BENCH / "peers")]

from engine import CACHE, PARAMETERS, Engine, Failed, available, groups  # noqa: E402

OPENVINO = ("2026.4.1", "2026.3.0")
PEERS = ("ldmfast", "stock", "compile", *(f"openvino-{version}" for version in OPENVINO))
# norm of the difference from stock's over stock's, above which an engine computes something else
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
SIZES = [(size, 1) for size in (32, 48, 64, 96, 128)] + [(64, batch) for batch in (2, 4, 8)]


def convert(name: str, job: dict, patience: float) -> None:
    """Makes OpenVINO's file where there is none, in a process of its own, before the others take memory."""
    engine = Engine(name, patience)
    try:
        for work in ("unet", "vae") if job["work"] == "picture" else (job["work"],):
            engine.ask({"convert": {"work": work, "cache": job["cache"]}})
    finally:
        engine.close()


def compared(
    names: list[str], job: dict, rounds: int, patience: float, start=Engine, said=print, wanted=None
) -> dict[str, dict]:
    """{engine: its times, medians and memory}: they take turns in this group.

    wanted             stock's output, where a group before this one had it; else the first is what others are held to
    start(name, patience) makes an engine. One that fails is left out, and what it has measured with it.
    """
    engines, found = {}, {}
    reference = None if wanted is None else "stock"

    def leave_out(name, reason):
        said(f"{name} is left out: it {reason}.")
        found[name] = {"left_out": str(reason)}
        if name in engines:
            engines.pop(name).close()

    for name in (name for name in names if name.startswith("openvino")):
        try:
            convert(name, job, patience)
        except Failed as reason:
            leave_out(name, reason)
    try:
        for name in (name for name in names if name not in found):
            try:
                engines[name] = start(name, patience)
                found[name], wanted = prepared(engines[name], job, wanted, reference or next(iter(engines)))
                said(f"{name}: ready after {found[name]['prepare_s']:.1f} s, first call {found[name]['first_s']:.2f} s")
            except Failed as reason:
                leave_out(name, reason)
        for _ in range(rounds):
            for name, engine in list(engines.items()):
                try:
                    answer = engine.ask({"run": True})
                except Failed as reason:
                    leave_out(name, reason)
                    continue
                found[name]["times_s"].append(round(answer["seconds"], 4))
                found[name] |= {key: answer[key] for key in ("memory_mib", "idle_cpu_s") if key in answer}
    finally:
        for engine in engines.values():
            engine.close()
    for name in engines:
        found[name]["median_s"] = statistics.median(found[name]["times_s"])
    return found


def outputs(path: str | Path):
    import torch

    return torch.load(path, weights_only=True)


def prepared(engine: Engine, job: dict, wanted, reference: str) -> tuple[dict, object]:
    """(what the engine says, the output that the next ones are held to). Raises Failed where it computes otherwise."""
    answer = engine.ask({"prepare": job})
    output = outputs(answer.pop("output"))
    error = 0.0 if wanted is None else ((output - wanted).norm() / wanted.norm()).item()
    if not error <= TOLERANCE[job["dtype"]]:
        raise Failed(f"computes something else: {error:.1e} from {reference}, more than {TOLERANCE[job['dtype']]}")
    return {**answer, "error": error, "compared_with": reference, "times_s": []}, output if wanted is None else wanted


def print_row(job: dict, found: dict) -> None:
    ours = found.get("ldmfast", {}).get("median_s")
    print(f"{job['work']} {job['dtype']} {job['batch']} x {job['size']}x{job['size']}")
    for name, row in found.items():
        if "median_s" in row:
            ratio = f"{row['median_s'] / ours:6.2f} x ldmfast's" if ours else ""
            memory = f"{row['memory_mib']:8.0f} MiB"
            if "held_mib" in row:
                memory += f" ({row['memory_mib'] - row['held_mib']:.0f} over what it held before)"
            apart = f"{row['error']:.1e} from {row['compared_with']}"
            print(f"  {name:20} {row['median_s']:8.3f} s {ratio} {memory}  {apart}", flush=True)


def write(path: Path | None, record: dict) -> None:
    from ldmfast.files import replacing

    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


def flags() -> list[str]:
    """The processor's instruction sets that matter to products."""
    info = Path("/proc/cpuinfo")
    words = info.read_text().partition("\nflags")[2].partition("\n")[0].split() if info.exists() else []
    return [word for word in words if word.startswith(("avx", "amx", "fma", "f16c"))]


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
    parser.add_argument("--work", nargs="+", default=["unet", "vae"], choices=PARAMETERS)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=list(TOLERANCE))
    parser.add_argument("--size", nargs="+", type=int, default=[64], help="side of the latents")
    parser.add_argument("--batch", nargs="+", type=int, default=[1])
    parser.add_argument("--sizes", action="store_true", help="a U-Net step against latent size and batch")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=PEERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--patience", type=float, default=900, help="seconds that an engine may take for one answer")
    parser.add_argument("--seconds", type=float, help="begin no further row after so long")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    options.rounds = 2 if options.quick else max(1, options.rounds)
    return options


def main() -> int:
    options = parsed()
    from conftest import machine  # here, since tests/ has a conftest, too

    CACHE.mkdir(parents=True, exist_ok=True)
    switches = ("LDMFAST_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS")
    set_here = {name: os.environ[name] for name in switches if name in os.environ}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "numpy")}
    versions["python"] = platform.python_version()
    record = {"what": "peers", "machine": machine(), "flags": flags(), "versions": versions, "environment": set_here}
    record |= {"rounds": options.rounds, "rows": []}
    begin = time.perf_counter()
    for job in jobs(options):
        if options.seconds and time.perf_counter() - begin > options.seconds:
            print(f"{options.seconds:.0f} s are over: {job['work']} {job['dtype']} and what follows is left out.")
            break
        memory = available()
        together, missing = groups(options.peers, job, memory)
        left_out = {name: {"left_out": f"memory does not hold it: {memory:.0f} GiB are free"} for name in missing}
        for name in missing:
            print(f"{job['work']} {job['dtype']}: {name} is left out: {left_out[name]['left_out']}.")
        of_stock = False  # whether a group of this row had its output
        for index, names in enumerate(together or [[]]):
            wanted = {"wanted": outputs(CACHE / "stock.pt")} if of_stock and "stock" not in names else {}
            found = compared(names, job, options.rounds, options.patience, **wanted) if names else {}
            of_stock = of_stock or "median_s" in found.get("stock", {})
            found |= left_out if index == 0 else {}
            print_row(job, found)
            record["rows"].append({**{k: v for k, v in job.items() if k != "cache"}, "engines": found})
            write(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
