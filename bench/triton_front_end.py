"""Every launch that tests/cases.py makes through Triton's front end, which needs no GPU: python to Triton's own IR.

    python bench/triton_front_end.py

Each case as it is and with a batch of one, two and three; some pictures have one pixel. Triton makes an int argument
that is 1 a constant, which has fewer methods than a variable, so that a kernel can fail to compile at one shape only.
Its interpreter does not see that.
Exits with 1 if a launch fails.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "tests")]  # a bare checkout works too

import torch  # noqa: E402
import triton  # noqa: E402
from cases import CASES, DTYPES, backward_inputs, tuples  # noqa: E402
from resources import Launch, distinct, recorded, specialise  # noqa: E402

from ldmfast.ops.registry import BACKWARD_OPS, OPS  # noqa: E402
from ldmfast.ops.triton_backend import refuse  # noqa: E402 - whether it can run here, which is not asked


def launches(cases=CASES, dtypes=DTYPES) -> list[Launch]:
    """What the cases and their gradients launch, each compiled form once."""
    found = []
    for case in cases:
        for dtype in dtypes:
            for batch in ({}, {"N": 1}, {"N": 2}, {"N": 3}):
                label = f"{case.op} {case.label} {dtype} {batch or ''}"
                with torch.device("meta"):  # of no memory
                    args, kwargs = case.make(dtype, **batch)
                    arguments = OPS[case.op].normalise(*args, **kwargs)
                    grads = tuples(OPS[case.op].reference(*arguments))
                    _record(OPS[case.op], arguments, label, found)
                    if backward := BACKWARD_OPS.get(f"{case.op}_backward"):
                        _record(backward, backward_inputs(case.op, arguments, grads), label, found)
    return distinct(found)


def _record(op, arguments, label, found) -> None:
    backend = op.backends.get("triton")
    if backend and not any(condition(*arguments) for condition in backend.conditions if condition is not refuse):
        with recorded(importlib.import_module(f"ldmfast.kernels.{op.name}"), label, found):
            backend.run(*arguments)


def representatives(launches: list[Launch]) -> list[Launch]:
    """One launch of each kernel, and of each of its steps, for each set of int arguments that are 1."""
    chosen = {}
    for launch in launches:
        ones = [name for name, value in launch.arguments.items() if type(value) is int and value == 1]
        chosen.setdefault((launch.kernel.fn.__name__, launch.arguments.get("STEP"), *ones), launch)
    return list(chosen.values())


def lower(launch: Launch, arch: int = 90) -> None:
    """Triton's IR of the launch. Raises what its front end raises."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    target = GPUTarget("cuda", arch, 32)
    backend = make_backend(target)
    signature, constants, attributes = specialise(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options, context = backend.parse_options(dict(launch.options)), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    source.make_ir(target, options, functions, modules, context)


def main() -> int:
    start = time.perf_counter()
    found, failed = launches(), 0
    for launch in found:
        try:
            lower(launch)
        except Exception as error:  # whatever the front end raises is what is looked for
            failed += 1
            print(f"{launch.kernel.fn.__name__} at {launch.label}: {str(error).strip().splitlines()[-1]}", flush=True)
    kernels = len({launch.kernel.fn.__name__ for launch in found})
    seconds = time.perf_counter() - start
    print(f"Triton {triton.__version__}: {len(found)} launches of {kernels} kernels, {failed} refused; {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
