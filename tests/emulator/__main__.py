"""`python tests/emulator races|seeds|mutations`: what takes too long for the suite, on every case but the big ones.

races      every kernel under race detection
seeds      random orders of blocks, warps and lanes, approximate functions 2 ulp off: --seeds of them
mutations  each barrier, wait and commit removed in turn: a table of what notices. --json writes it

Exits with 1 if a kernel races or is wrong, or nothing notices a mutant. `make host-kernels` builds what runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from emulated import every_call, failure, settings_of
from mutations import RUNS, noticed, sites


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("races", "seeds", "mutations"))
    parser.add_argument("--only", default=[""], nargs="+", help="calls, or sites, with one of these in their names")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--first-seed", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, help="write the table of mutations here")
    given = parser.parse_args()
    if given.what == "mutations":
        return _mutations(given)
    runs = [{"RACES": "1"}]
    if given.what == "seeds":
        runs = [{"SEED": str(seed)} for seed in range(given.first_seed, given.first_seed + given.seeds)]
    return _calls(given, runs)


def _calls(given, runs) -> int:
    count, failed, start = Counter(), 0, time.perf_counter()
    for op, of in itertools.groupby(every_call(given.only), lambda call: call.case.op):
        for call in of:
            count[op + "_backward" * call.backward] += len(runs)
            for settings in runs:
                if found := failure(call, **settings):
                    failed += 1
                    print(f"{call} {settings}: {found}", flush=True)
        # a run that is cut short has said how far it came
        print(f"{op}: {count[op]} calls and {count[f'{op}_backward']} of its gradient", flush=True)
    seconds = time.perf_counter() - start
    named = ", ".join(f"{name} {n}" for name, n in count.items())
    print(f"{sum(count.values())} calls ({named}), {failed} fail; {seconds:.0f} s")
    return 1 if failed or not count else 0


def _mutations(given) -> int:
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
