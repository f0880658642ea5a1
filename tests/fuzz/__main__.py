"""`python tests/fuzz --calls 20000 --op attention`: random plans until the count is reached; what fails, made small.

    --calls N [--op NAME ...]      of each op and each <op>_backward, shared out to the instruction sets; a plan calls
                                   every backend twice; TRITON_INTERPRET=1: Triton's, too
    --networks N [--kind NAME ..]  U-Nets, autoencoders and schedulers of random configurations beside stock, N in all
                                   that stock takes
    --files N [--kind NAME ...]    damaged files, N in all
    --replay '{"plan": {...}}'     a finding of the log, once more; with its "isa" as LDMFAST_CPU_ISA

Each finding is a line of JSON, printed and added to the log: {"kind", "seed", "isa", "plan", "what"}. What was checked
stands beside it, a line for each part of a search; with --resume, what stands there counts, and is not searched again.
    --counts                       how much that is: plans, calls and findings of each kind
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
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # of small calls most would be threads that spin
sys.path[:0] = [str(ROOT / room) for room in ("tests/fuzz", "tests", "tests/ops")]

from search import kinds, prepare, search, verdict  # noqa: E402

ROOMS = ("op", "network", "file")
PART = 250  # plans of one search; a failure ends a search, so what lies behind it is another's to find


def tally(log: Path) -> Path:
    return log.with_name(f"{log.stem}_counts.jsonl")


def parts(log: Path) -> list[dict]:
    """What was searched so far: {"kind", "isa", "seed", "plans", "calls", "findings"} of each part."""
    if not tally(log).exists():
        return []
    return [json.loads(line) for line in tally(log).read_text(encoding="utf-8").splitlines()]


def searched(kind: str, count: int, seed: int, log: Path, resume: bool = False) -> int:
    """Searches a kind in parts; returns how many findings were written to the log."""
    strategy, check = kinds()[kind]
    checked = calls = findings = 0
    seen, start, isa = set(), time.monotonic(), os.environ.get("LDMFAST_CPU_ISA", "best")
    for part in parts(log) if resume else ():
        if (part["kind"], part["isa"]) == (kind, isa):
            checked, calls, seed = checked + part["plans"], calls + part["calls"], max(seed, part["seed"] + 1)
    while calls < count:
        found = search(strategy, check, min(PART, count - calls), seed)
        checked, calls = checked + max(1, found.checked), calls + found.calls
        for finding in found.findings:
            line = json.dumps({"kind": kind, "seed": seed, "isa": isa, **finding})
            if (finding["what"], isa) not in seen:
                seen.add((finding["what"], isa))
                findings += 1
                print(line, flush=True)
                with log.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")
        part = {"kind": kind, "isa": isa, "seed": seed, "plans": max(1, found.checked), "calls": found.calls}
        with tally(log).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**part, "findings": len(found.findings)}) + "\n")
        seed += 1
    seconds = time.monotonic() - start
    print(f"{kind} ({isa}): {checked} plans, {calls} calls, {findings} findings, {seconds:.0f} s", flush=True)
    return findings


def counts(log: Path) -> str:
    """A line for each kind: how much of it was searched so far."""
    sums: dict[str, list[int]] = {}
    for part in parts(log):
        total = sums.setdefault(part["kind"], [0, 0, 0])
        total[:] = [a + part[name] for a, name in zip(total, ("plans", "calls", "findings"), strict=True)]
    return "\n".join(f"{kind}: {p} plans, {c} calls, {f} findings" for kind, (p, c, f) in sums.items())


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
        command += ["--resume"] * given.resume
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
    parser.add_argument("--resume", action="store_true", help="go on from what the log counts")
    parser.add_argument("--counts", action="store_true", help="print what the log counts, and end")
    return parser


def main() -> int:
    given = options().parse_args()
    if given.counts:
        print(counts(given.log))
        return 0
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
        failed |= any([searched(f"op {name}", given.calls, given.seed, given.log, given.resume) for name in ops])
    for room, count in (("network", given.networks), ("file", given.files)):
        names = given.kind or every[room]
        if count:
            each = -(-count // len(names))
            failed |= any([searched(f"{room} {name}", each, given.seed, given.log, given.resume) for name in names])
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
