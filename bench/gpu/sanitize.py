"""Some cases of every op and of its gradient in the CUDA backend, for compute-sanitizer:

compute-sanitizer --tool memcheck --error-exitcode 9 --kernel-regex kns=ldmfast python bench/gpu/sanitize.py

One dtype and MOST small cases an op at most: under racecheck a launch takes a thousand times as long. `--all` takes
every small case in every dtype.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

from cases import CASES, DTYPES  # noqa: E402

from ldmfast import ops  # noqa: E402
from ldmfast.ops.registry import OPS  # noqa: E402

MOST = 6  # cases an op: spread over its list, which goes from shape to shape


def chosen(every: bool, backend: str, most: int = MOST) -> list[tuple]:
    """(case, dtype), each of an op that the backend has; `most` cases an op in float16, or every one in every dtype."""
    able = [case for case in CASES if not case.big and backend in OPS[case.op].backends]
    if every:
        return [(case, dtype) for case in able for dtype in DTYPES]
    found = []
    for op in dict.fromkeys(case.op for case in able):
        of_op = [case for case in able if case.op == op]
        found += [(case, torch.float16) for case in of_op[:: -(-len(of_op) // most)]]
    return found


def run(case, dtype: torch.dtype, device: str, backend: str) -> bool:
    """Forward and gradient; False where the backend refuses the arguments."""
    with torch.device(device):
        args, kwargs = case.make(dtype)
    op = OPS[case.op]
    if op.backends[backend].refusal(op.normalise(*args, **kwargs)):
        return False
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.is_floating_point()]
    for leaf in leaves:
        leaf.requires_grad_(leaf is not kwargs.get("mask"))  # a mask's gradient is the reference's
    out = getattr(ops, case.op)(*args, **kwargs, backend=backend)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda", help="cpu tries the cases with --backend cpu")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--all", action="store_true", help="every small case in every dtype")
    parser.add_argument("--most", type=int, default=MOST, help=f"cases an op (default: {MOST})")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu/sanitize.py: needs an NVIDIA GPU", file=sys.stderr)
        return 2
    with torch.enable_grad():
        ran = [
            run(*wanted, options.device, options.backend)
            for wanted in chosen(options.all, options.backend, options.most)
        ]
    if options.device == "cuda":
        torch.cuda.synchronize()
    print(f"{sum(ran)} calls, {len(ran) - sum(ran)} refused")
    return 0 if any(ran) else 1


if __name__ == "__main__":
    sys.exit(main())
