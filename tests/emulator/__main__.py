"""`python tests/emulator races|seeds|mutations`: what takes too long for the suite, on every case but the big ones.

races      every kernel under race detection; 20 minutes of one core
seeds      random orders of blocks, warps and lanes, approximate functions 2 ulp off: --seeds of them
mutations  each barrier, wait and commit removed in turn: a table of what notices. --json writes it

races and seeds take --jobs N processes, and --log FILE: what passed is in it, call by call, and is not run again.
Exits with 1 if a kernel races or is wrong, or nothing notices a mutant. `make host-kernels` builds what runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from emulated import BACKEND, every_call, failure, refused, settings_of
from mutations import RUNS, newer_than, noticed, sites

from ldmfast.ops import native


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("races", "seeds", "mutations"))
    parser.add_argument("--only", default=[""], nargs="+", help="calls, or sites, with one of these in their names")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--first-seed", type=int, default=1, metavar="N")
    parser.add_argument("--jobs", type=int, default=1, metavar="N")
    parser.add_argument("--log", type=Path, help="of races and seeds: what ended, with its seconds; goes on from it")
    parser.add_argument("--json", type=Path, help="write the table of mutations here")
    given = parser.parse_args()
    if given.what == "mutations":
        return _mutations(given)
    runs = [{"RACES": "1"}]
    if given.what == "seeds":
        runs = [{"SEED": str(seed)} for seed in range(given.first_seed, given.first_seed + given.seeds)]
    return _calls(given, runs)


def _calls(given, runs) -> int:
    start = time.perf_counter()
    tries = [(call, run) for call in every_call(given.only) for run in runs]
    lines = given.log.read_text().splitlines() if given.log and given.log.exists() else []
    passed = {line.split("\t")[0] for line in lines if line.endswith("\tpasses")}
    count = Counter(call.op for call, run in tries if named(call, run) in passed)
    todo = [one for one in tries if named(*one) not in passed]
    left, took, failed = Counter(call.op for call, _ in todo), Counter(), 0
    with (given.log or Path(os.devnull)).open("a") as log, each(todo, given.jobs) as ended:
        for number, seconds, found in ended:
            call, run = todo[number]
            left[call.op] -= 1
            if seconds is not None:
                count[call.op] += 1
                took[call.op] += seconds
                failed += found is not None
                print(f"{named(call, run)}\t{seconds:.2f} s\t{found or 'passes'}", file=log, flush=True)
            if found:
                print(f"{named(call, run)}: {found}", flush=True)
            if not left[call.op] and count[call.op]:
                print(f"{call.op}: {count[call.op]} calls, {took[call.op]:.0f} s", flush=True)
    names = ", ".join(f"{name} {n}" for name, n in count.items())
    print(f"{count.total()} calls ({names}), {failed} fail; {time.perf_counter() - start:.0f} s")
    return 1 if failed or not count else 0


def named(call, run) -> str:
    return f"{call} {' '.join(f'{name}={value}' for name, value in run.items())}"


@contextlib.contextmanager
def each(todo, jobs: int):
    """Context giving (place in todo, seconds, what failed) of each as it ends; seconds None: no kernel takes it."""
    if jobs == 1:
        _begin(todo)
        yield map(_tried, range(len(todo)))
        return
    with multiprocessing.get_context("fork").Pool(jobs, _begin, (todo,)) as pool:  # cases do not pickle
        yield pool.imap_unordered(_tried, range(len(todo)))


_todo: list = []  # of this process


def _begin(todo) -> None:
    _todo[:] = todo
    torch.set_num_threads(1)


def _tried(number: int) -> tuple[int, float | None, str | None]:
    call, run = _todo[number]
    if refused(call) is not None:
        return number, None, None
    begun = time.process_time()  # what else runs on the machine is not counted
    found = failure(call, **run)
    return number, time.process_time() - begun, found


def _mutations(given) -> int:
    if newer := newer_than(Path(native.module(BACKEND).__file__).stat().st_mtime):
        print(f"{newer[0]} was changed after the module was built: make host-kernels", file=sys.stderr)
        return 1
    rows, start = [], time.perf_counter()
    width = max(len(str(site)) for site in sites())
    print(f"{'':{width}}  " + "  ".join(f"{run:8}" for run in RUNS))
    for site in sites():
        if not any(part in str(site) for part in given.only):
            continue
        found = {run: noticed(site, run) for run in RUNS}
        rows.append({"site": str(site)} | {run: f"{hit[0]}: {hit[1]}" if hit else None for run, hit in found.items()})
        first = next(filter(None, found.values()), None)
        marks = "  ".join(f"{'fails' if hit else '-':8}" for hit in found.values())
        print(f"{str(site):{width}}  {marks}  {f'{first[0]}: {first[1]}' if first else 'NOTHING NOTICES'}", flush=True)
    lost = [row for row in rows if not any(row[run] for run in RUNS)]
    print(f"{len(rows)} mutants, {len(lost)} that nothing notices; {time.perf_counter() - start:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if lost or not rows else 0


if __name__ == "__main__":
    with settings_of(SEED=None, RACES=None, SKIP=None, RELAX=None, ARCH=None, SLAB=None, BLOCKS=None):
        sys.exit(main())
