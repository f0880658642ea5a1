"""The numbers of try_op.py: an op's worst errors against their budgets, on every backend that runs here.

`python bench/op_numbers.py OP BACKENDS` prints a JSON line for each of forward and gradient, backend and dtype. A
process gives LIMIT seconds of processor time to the forward and as many to the gradient, shared evenly, at least one
case to each of them; a line says how many cases ran.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "ops")]
LIMIT = 9.0
BIG = ("cpu", "cuda")  # backends that run the big cases, too


def worst(tests, cases, dtype, backend, until):
    """{error, budget, case, ran, of, refused} over the cases begun before `until`: the nearest to its budget."""
    import torch
    from cases import home

    found = {"ran": 0, "of": 0, "refused": None}
    for case in cases:
        with torch.device(home(backend)):
            if reason := tests.refusal(case, dtype, backend):
                found["refused"] = reason
                continue
            found["of"] += 1
            if found["ran"] and time.process_time() > until:
                continue
            error, budget = tests.errors(case, dtype, backend)
        found["ran"] += 1
        if "error" not in found or not error / budget <= found["error"] / found["budget"]:
            found |= {"error": error, "budget": budget, "case": case.label}
    return found


def print_lines(name: str, backends: list[str]) -> None:
    """Prints a JSON line for each of forward and gradient, backend and dtype."""
    import test_backward
    import test_ops_numbers
    import torch
    from cases import CASES, DTYPES

    test_backward.Op.fused = lambda op, args, backend: True  # `torch` is the closed form, as in the tests
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    for tests, what in ((test_ops_numbers, "forward"), (test_backward, "gradient")):
        until = time.process_time() + LIMIT
        turns = [(backend, dtype) for backend in backends for dtype in DTYPES]
        for i, (backend, dtype) in enumerate(turns):
            big = what == "forward" and backend in BIG
            cases = [case for case in CASES if case.op == name and (big or not case.big)]
            cases = [case for start in range(4) for case in cases[start::4]]  # of each kind, however early it ends
            now = time.process_time()
            found = worst(tests, cases, dtype, backend, now + (until - now) / (len(turns) - i))
            print(json.dumps({"what": what, "backend": backend, "dtype": str(dtype)[6:], **found}), flush=True)


def measured(name: str) -> list[dict]:
    """The interpreter beside the others; OpenMP's threads sleep, not spin, where two processes share the cores."""
    import torch

    gpu = torch.cuda.is_available()
    groups = {"torch,cpu,cuda-host,triton,cuda": "0"} if gpu else {"torch,cpu,cuda-host": "0", "triton": "1"}
    running = []
    for backends, interpret in groups.items():
        command = [sys.executable, "-W", "ignore::RuntimeWarning", __file__, name, backends]
        environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_WAIT_POLICY": "passive"}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"try: the numbers of {name} ended with an error")
    return [json.loads(line) for output in outputs for line in output.splitlines()]


def print_table(rows: list[dict]) -> list[str]:
    """The table; returns what is outside its budget."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    print(f"{'worst error / budget':<22}" + "".join(f"{dtype:<20}" for dtype in dtypes) + "cases")
    for what, backend in dict.fromkeys((row["what"], row["backend"]) for row in rows):
        line = [row for row in rows if (row["what"], row["backend"]) == (what, backend)]
        cells = [f"{row['error']:.1e} / {row['budget']:.1e}" if row["ran"] else "-" for row in line]
        ran, of = sum(row["ran"] for row in line), sum(row["of"] for row in line)
        tail = f"{ran}" + ("" if ran == of else f" of {of}")
        tail = tail if of else next(row["refused"] or "no cases" for row in line)
        print(f"{backend + ' ' + what:<22}" + "".join(f"{cell:<20}" for cell in cells) + tail)
    return [
        f"{row['backend']} {row['what']} {row['dtype']} ({row['case']})"
        for row in rows
        if row["ran"] and not row["error"] <= row["budget"]
    ]


if __name__ == "__main__":
    print_lines(sys.argv[1], sys.argv[2].split(","))
