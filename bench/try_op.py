"""make try OP=attention: builds what changed, then one op's numbers and speed, on one screen.

    python bench/try_op.py OP [--base COMMIT]

Numbers: op_numbers.py. Speed: op_speed.py, against the last run on this machine (or the last of COMMIT); runs are kept
in build/try. Exits with 1 if a number is outside its budget or a row is slower by more than the noise of both runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
FOLDER = ROOT / "build" / "try"


def build() -> int:
    """cmake's exit status; its output is in build/try/build.log."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    gpu = Path("/proc/driver/nvidia/version").exists()
    targets = "_cpu,_cuda_host" + (",_cuda" if gpu and shutil.which("nvcc") else "")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {"LDMFAST_CUDA": "ON" if gpu else "OFF", **os.environ, "PATH": path}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace", "--targets", targets]
    with (FOLDER / "build.log").open("w") as log:
        return subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("op", nargs="?")
    parser.add_argument("--base", help="compare with the last run of this commit")
    arguments = parser.parse_args()
    begin = time.monotonic()
    from ldmfast.ops.registry import OPS

    if arguments.op not in OPS:
        print(f"try: OP is {arguments.op!r}, expected one of: {', '.join(OPS)}", file=sys.stderr)
        return 2
    if build():
        print((FOLDER / "build.log").read_text(), file=sys.stderr)
        return 1
    return tried(arguments, begin)


def tried(arguments, begin: float) -> int:
    import op_numbers
    import op_speed
    from conftest import machine

    record = machine()
    commit = record.pop("commit")
    print(f"{arguments.op} at {commit}: built in {time.monotonic() - begin:.0f} s")
    wrong = op_numbers.print_table(op_numbers.measured(arguments.op))
    rows, file = op_speed.measured(arguments.op), FOLDER / f"{arguments.op}.jsonl"
    key = ", ".join(f"{name} {value}" for name, value in record.items())
    slower = op_speed.print_table(rows, op_speed.before(file, key, arguments.base))
    entry = {"machine": key, "commit": commit, "when": time.strftime("%Y-%m-%d %H:%M"), "rows": rows}
    with file.open("a") as log:
        log.write(json.dumps(entry) + "\n")
    print(f"outside their budget: {', '.join(wrong)}" if wrong else "every number within its budget")
    print(f"slower beyond noise: {'; '.join(slower)}" if slower else "no row slower beyond noise")
    print(f"{time.monotonic() - begin:.0f} s in all")
    return 1 if wrong or slower else 0


if __name__ == "__main__":
    sys.exit(main())
