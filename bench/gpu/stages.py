"""What each stage of bench/gpu.sh runs, and how it is tried without a GPU.

A command's limit is bounded by what its stage has left of STAGE seconds, so the order is that of importance.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

STAGE = 535  # seconds
NUMBERS = ("tests/ops/test_ops_numbers.py", "tests/ops/test_backward.py")


@dataclass(frozen=True)
class Command:
    """argv   what Python is given, after the interpreter
    limit  seconds
    dry    what is added where it is only tried
    tool   the program that Python runs under, with its options
    json   the file in OUT that it writes, and takes up again with --resume
    """

    name: str
    argv: tuple[str, ...]
    limit: int
    dry: tuple[str, ...] = ()
    tool: tuple[str, ...] = ()
    json: str = ""


TINY = ("--device", "cpu", "--dtype", "float32", "--tiny")


def measured(name: str, script: str, limit: int, *options: str, file: str = "") -> Command:
    file = file or f"{name}.json"
    argv = (f"bench/gpu/{script}", *options, "--json", f"OUT/{file}")
    return Command(name, argv, limit, (*TINY, "--seconds", "0"), json=file)


def tests(name: str, limit: int, *options: str) -> Command:
    """Tests, on as many processes as there are cores to compile for them; tried, they are only collected."""
    share = ("-n", str(min(12, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    argv = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *share, f"--junitxml=OUT/{name}.xml", *options)
    return Command(name, argv, limit, ("--collect-only",))


def sanitizer(tool: str, limit: int) -> Command:
    options = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=ldmfast")
    tried = ("--device", "cpu", "--backend", "cpu", "--most", "1")
    return Command(tool, ("bench/gpu/sanitize.py",), limit, tried, options)


def profile(work: str, limit: int, *keys: str) -> Command:
    rows = [word for key in keys for word in ("--row", key)]
    argv = ("-m", "ldmfast", "profile", "--work", work, "-o", "OUT/profile", *rows)
    return Command(f"profile-{work}", argv, limit, (*TINY, "--steps", "1"))


NCU = (
    *("ncu", "--profile-from-start", "off", "--kernel-name-base", "demangled", "--clock-control", "none"),
    *("--set", "full", "--import-source", "yes", "-f", "-o", "OUT/ops"),
)
# without it the tests of stage A would all be skipped
MODULE = """import sys
from ldmfast.ops import native
missing = native.missing("cuda")
print(missing or native.module("cuda").flags)
sys.exit(bool(missing) and "dry" not in sys.argv)
"""
STAGES = {
    "A": (
        Command("build", ("setup.py", "-q", "build_ext", "--inplace"), 400, ("--help",)),
        Command("module", ("-c", MODULE), 60, ("dry",)),
        Command("smi", ("-c", "print()"), 20, (), ("nvidia-smi", "-q")),
        tests("cuda", 300, *NUMBERS, "tests/ops/test_ops_contract.py", "-k", "(cuda and not host) or contract"),
    ),
    "B": (
        measured("step", "step_time.py", 150),
        profile("sd15", 60, "ours-graph", "stock-graph", "ours"),
        measured("ops", "op_table.py", 190),
        measured("layers", "layer_table.py", 90),
        measured("sdxl", "step_time.py", 90, "--work", "sdxl"),
        measured("vae", "step_time.py", 60, "--work", "vae"),
        measured("train", "step_time.py", 70, "--work", "train", "--dtype", "bfloat16"),
    ),
    "C": (
        tests("triton", 270, *NUMBERS, "-k", "triton"),
        Command("tune", ("-m", "ldmfast", "tune", "--seconds", "0.05", "--dtype", "float16"), 100, TINY),
        sanitizer("memcheck", 60),
        Command("ncu", ("bench/gpu/op_table.py", "--once"), 90, TINY, NCU),
        sanitizer("racecheck", 90),
    ),
    "D": (
        measured("compiled-autotune", "step_time.py", 420, "--compiled", "--row", "stock", "stock-autotune"),
        measured("compiled", "step_time.py", 200, "--compiled", "--row", "stock", "stock-overhead", "ours-overhead"),
    ),
}


def placed(words: tuple[str, ...], out: Path) -> list[str]:
    """The words with OUT's path in OUT's place."""
    return [word.replace("OUT/", f"{out}/") for word in words]


# Options of the tools that are not there in a dry run, and how many words each takes
KNOWN = {
    "nvidia-smi": {"-q": 0},
    "compute-sanitizer": {"--tool": 1, "--error-exitcode": 1, "--kernel-regex": 1},
    "ncu": {
        **{"--profile-from-start": 1, "--kernel-name-base": 1, "--clock-control": 1, "--set": 1, "--import-source": 1},
        **{"-f": 0, "-o": 1},
    },
}


def check_tool(words: tuple[str, ...]) -> None:
    """Raises ValueError for an option that the tool is not known to have, or one without its value."""
    name, *rest = words
    while rest:
        option = rest.pop(0)
        if option not in KNOWN[name]:
            raise ValueError(f"{name} has no option {option}")
        if len(rest) < KNOWN[name][option]:
            raise ValueError(f"{name} {option} lacks its value")
        del rest[: KNOWN[name][option]]
