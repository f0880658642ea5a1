"""`python tests/sanitize address|thread`: the op tests on the modules that `make sanitize` built for that sanitizer.

address  AddressSanitizer and UndefinedBehaviorSanitizer, _cpu at each instruction set of this machine, and _cuda_host
thread   ThreadSanitizer, _cpu: its parallel regions run on the threads of openmp_threads.cpp. The CUDA emulator runs on
         one thread and has a race detection of its own

Ends at the first report, with the sanitizer's text. Python, torch and libgomp are not instrumented: what they read and
write is not looked at, but memory that they allocate is.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "generic")
TESTS = ("tests/ops/test_ops_numbers.py", "tests/ops/test_backward.py", "tests/ops/test_weight_backward.py")
LIBRARIES = {"address": ("libasan.so", "libubsan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so")}


def library(name: str) -> str:
    """The path of one of the compiler's libraries. Raises SystemExit where it has none."""
    compiler = os.environ.get("CXX", "g++")
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip()).resolve()
    if not path.is_file():
        raise SystemExit(f"{compiler} has no {name}")
    return str(path)


def environment(kind: str, isa: str) -> dict:
    """What a test's process needs to run with the sanitized modules."""
    options = {
        "LD_PRELOAD": " ".join(map(library, LIBRARIES[kind])),
        "ASAN_OPTIONS": "detect_leaks=0:strict_init_order=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        # torch's threads synchronise where the sanitizer does not see it
        "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1:report_signal_unsafe=0",
        "LDMFAST_SANITIZED": str(ROOT / "build" / "sanitize" / kind / "ldmfast"),
        "LDMFAST_CPU_ISA": isa,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    return {**os.environ, **options, **({"OMP_NUM_THREADS": "1"} if kind == "thread" else {})}


def runs(kind: str) -> list[tuple[str, str]]:
    """(instruction set, which of the tests): the emulated kernels once."""
    return [(isa, "cpu and not host") for isa in ISAS] + ([("generic", "cuda-host")] if kind == "address" else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(LIBRARIES))
    parser.add_argument("--isa", choices=ISAS, help="this one alone")
    parser.add_argument("--only", default="", help="more of pytest's -k")
    given = parser.parse_args()
    for isa, chosen in runs(given.kind):
        if given.isa not in (None, isa):
            continue
        environ = environment(given.kind, isa)
        probe = [sys.executable, "-c", "from ldmfast.ops import native; print(native.module('cpu').active_isa())"]
        plain = {**environ, "LD_PRELOAD": "", "LDMFAST_SANITIZED": ""}
        if subprocess.run(probe, env=plain, cwd=ROOT, capture_output=True, check=False).returncode:
            print(f"{given.kind}, {isa}: this processor does not have it")
            continue
        print(f"{given.kind}, {isa}, {chosen}", flush=True)
        chosen = f"({chosen}) and ({given.only})" if given.only else chosen
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "sanitized", "-k", chosen, *TESTS]
        if code := subprocess.run(command, env=environ, cwd=ROOT, check=False).returncode:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
