"""`python tests/fuzz --calls 20000 --op attention`: random plans until the count is reached; what fails, made small.

    --calls N [--op NAME ...]      plans of each op and each <op>_backward, shared out to the instruction sets; a plan
                                   runs on every backend
    --networks N [--kind NAME ..]  U-Nets, autoencoders and schedulers of random configurations beside stock, N in all
    --files N [--kind NAME ...]    damaged files, N in all
    --replay '{"plan": {...}}'     a finding of the log, once more; with its "isa" as LDMFAST_CPU_ISA

Each finding is a line of JSON, printed and added to the log: {"kind", "seed", "isa", "plan", "what"}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / room) for room in ("tests/fuzz", "tests", "tests/ops")]

from search import kinds, prepare, search, verdict  # noqa: E402

ROOMS = ("op", "network", "file")
PART = 250  # plans of one search; a failure ends a search, so what lies behind it is another's to find


def searched(kind: str, count: int, seed: int, log: Path) -> int:
    """Searches a kind in parts; returns how many findings were written to the log."""
    strategy, check = kinds()[kind]
    checked = calls = findings = 0
    seen, start, isa = set(), time.monotonic(), os.environ.get("LDMFAST_CPU_ISA", "best")
    while checked < count:
        found = search(strategy, check, min(PART, count - checked), seed)
        checked, calls = checked + max(1, found.checked), calls + found.calls
        for finding in found.findings:
            line = json.dumps({"kind": kind, "seed": seed, "isa": isa, **finding})
            if (finding["what"], isa) not in seen:
                seen.add((finding["what"], isa))
                findings += 1
                print(line, flush=True)
                with log.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
        seed += 1
    seconds = time.monotonic() - start
    print(f"{kind} ({isa}): {checked} plans, {calls} calls, {findings} findings, {seconds:.0f} s", flush=True)
    return findings


def instruction_sets() -> list[str]:
    """Those that this machine can run, the best one last."""
    from ldmfast.ops import native

    probe = "from ldmfast.ops import native; native.module('cpu').active_isa()"
    ran = {
        isa: subprocess.run(
            [sys.executable, "-c", probe], env={**os.environ, "LDMFAST_CPU_ISA": isa}, capture_output=True, check=False
        ).returncode
        for isa in native.module("cpu").compiled_isas().split()
    }
    return [isa for isa, code in ran.items() if not code]


def on_each_instruction_set(given, chosen: list[str]) -> bool:
    """The calls of the ops `chosen`, shared out to processes, one for each instruction set; True: something failed."""
    failed, sets = False, given.isa or instruction_sets()
    for i, isa in enumerate(sets):
        command = [sys.executable, __file__, "--calls", str(given.calls // len(sets)), "--op", *chosen]
        command += ["--seed", str(given.seed + 1000000 * i), "--log", str(given.log)]
        failed |= bool(subprocess.run(command, env={**os.environ, "LDMFAST_CPU_ISA": isa}, check=False).returncode)
    return failed


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--calls", "--networks", "--files"):
        parser.add_argument(name, type=int, default=0, metavar="N")
    parser.add_argument("--op", nargs="+", metavar="NAME")
    parser.add_argument("--kind", nargs="+", metavar="NAME")
    parser.add_argument("--isa", nargs="+", metavar="NAME", help="default: all that this machine has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=ROOT / "build" / "fuzz.jsonl")
    parser.add_argument("--replay", metavar="JSON")
    return parser


def main() -> int:
    given = options().parse_args()
    prepare(setattr)
    if given.replay:
        finding = json.loads(given.replay)
        _, what = verdict(kinds()[finding["kind"]][1], finding["plan"])
        print(what or "right")
        return int(bool(what))
    given.log.parent.mkdir(parents=True, exist_ok=True)
    every = {room: [kind.split(" ", 1)[1] for kind in kinds() if kind.startswith(room)] for room in ROOMS}
    ops, failed = given.op or every["op"], False
    if given.calls and "LDMFAST_CPU_ISA" not in os.environ:
        failed |= on_each_instruction_set(given, ops)
    elif given.calls:
        failed |= any([searched(f"op {name}", given.calls, given.seed, given.log) for name in ops])
    for room, count in (("network", given.networks), ("file", given.files)):
        names = given.kind or every[room]
        if count:
            each = -(-count // len(names))
            failed |= any([searched(f"{room} {name}", each, given.seed, given.log) for name in names])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
