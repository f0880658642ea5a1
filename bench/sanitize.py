"""Runs every small case of every op and of its gradient in the CUDA backend once, for compute-sanitizer:

compute-sanitizer --tool memcheck --error-exitcode 9 python bench/sanitize.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from cases import CASES, DTYPES  # noqa: E402

from ldmfast import ops  # noqa: E402


def main() -> int:
    if not torch.cuda.is_available():
        print("bench/sanitize.py: needs an NVIDIA GPU", file=sys.stderr)
        return 2
    ran = 0
    for case in CASES:
        if case.big:
            continue
        for dtype in DTYPES:
            with torch.device("cuda"):
                args, kwargs = case.make(dtype)
            leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.is_floating_point()]
            for leaf in leaves:
                leaf.requires_grad_(leaf is not kwargs.get("mask"))  # a mask's gradient is the reference's
            out = getattr(ops, case.op)(*args, **kwargs, backend="cuda")
            outputs = out if isinstance(out, tuple) else (out,)
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            ran += 1
    torch.cuda.synchronize()
    print(f"{ran} calls")
    return 0


if __name__ == "__main__":
    sys.exit(main())
