"""Registers, shared memory and spills of every kernel, for sm_80 and sm_90, on a machine that needs no GPU.

    python bench/resources.py [--arch 80 90] [--json FILE]

Triton: the launchers are called with tensors on no device and their launches are recorded, specialised as Triton
specialises them and compiled ahead of time. CUDA: nvcc compiles csrc/cuda. In both, `ptxas -v` says what a kernel
takes. Exits with 1 if anything spills.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import inspect
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]  # a bare checkout works too

from triton_calls import CALLS  # noqa: E402

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


PTXAS = re.compile(
    r"Compiling entry function '(\w+)' for.*?(\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Launch:
    """One launch as it was made: the kernel, its arguments by name, and how many warps and stages."""

    label: str
    kernel: object
    arguments: dict
    options: dict


@dataclass(frozen=True)
class Usage:
    arch: int
    kernel: str
    label: str
    registers: int
    shared: int  # bytes
    spill: int  # bytes stored and loaded


@contextlib.contextmanager
def recorded(module, label, launches):
    """Replaces the launch of every Triton kernel of the module by a note of it."""
    import triton

    kernels = [value for value in vars(module).values() if isinstance(value, triton.JITFunction)]

    def record(kernel):
        def run(*args, grid, warmup, **kwargs):
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            arguments = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
            launches.append(Launch(label, kernel, arguments, options))

        return run

    for kernel in kernels:
        kernel.run = record(kernel)
    try:
        yield
    finally:
        for kernel in kernels:
            del kernel.run


def triton_launches(ops=tuple(CALLS)) -> list[Launch]:
    """The launches of the shipped configurations, each compiled form once."""
    launches = []
    for op in ops:
        module = importlib.import_module(f"ldmfast.kernels.{op}")
        for label, args in CALLS[op]():
            with recorded(module, label, launches):
                getattr(module, op)(*args)
    return distinct(launches)


def distinct(launches: list[Launch]) -> list[Launch]:
    """Each compiled form once."""
    forms = {repr((launch.kernel.fn.__name__, specialise(launch), launch.options)): launch for launch in launches}
    return list(forms.values())


def specialise(launch: Launch):
    """(signature, constants, attributes) as Triton's run time makes them; memory is taken to be 16-byte aligned."""
    from triton.runtime.jit import type_canonicalisation_dict as names

    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value, name = launch.arguments[parameter.name], parameter.name
        free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + names[str(value.dtype).removeprefix("torch.")]
        elif type(value) is int:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
        else:
            signature[name] = {bool: "u1", float: "fp32"}[type(value)]
        if signature[name][0] == "*" or (signature[name] in ("i32", "i64") and value % 16 == 0 and not free):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, arch: int):
    """(compiled kernel, whose `asm` holds TTGIR, PTX and cubin; what ptxas said) for the architecture; needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialise(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # from its cache there would be no log
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    return compiled, log.getvalue()


def triton_usage(launch: Launch, arch: int) -> Usage:
    compiled, log = compile_launch(launch, arch)
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()
    registers, spill = int(re.search(r"Used (\d+) registers", log)[1]), int(stores) + int(loads)
    return Usage(arch, launch.kernel.fn.__name__, launch.label, registers, compiled.metadata.shared, spill)


def _triton_usage(op: str, index: int, arch: int) -> Usage:
    return triton_usage(triton_launches([op])[index], arch)  # in a worker: kernels do not pickle


def all_triton_usage(archs, ops=tuple(CALLS), workers=None) -> list[Usage]:
    """Usage of every shipped configuration, compiled in parallel."""
    jobs = [(op, index, arch) for op in ops for index in range(len(triton_launches([op]))) for arch in archs]
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(_triton_usage, *zip(*jobs, strict=True)))


def cuda_usage(archs) -> list[Usage]:
    """Usage of every CUDA kernel, from nvcc, one source at a time."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        print("CUDA: nvcc is not on PATH, so the CUDA kernels are left out", file=sys.stderr)
        return []
    jobs = [(nvcc, source, arch) for source in sorted((ROOT / "csrc" / "cuda").rglob("*.cu")) for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [usage for usages in pool.map(lambda job: _nvcc_usage(*job), jobs) for usage in usages]


def _nvcc_usage(nvcc: str, source: Path, arch: int) -> list[Usage]:
    name = f"{arch}a" if arch == 90 else str(arch)
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{name},code=sm_{name}", "-Xptxas", "-v"]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *flags, "-cubin", "-o", f"{folder}/out.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc refused {source.name}:\n{done.stderr}")
    usages = []
    for kernel, stores, loads, registers, rest in PTXAS.findall(done.stderr):
        shared, spill = re.search(r"(\d+) bytes smem", rest), int(stores) + int(loads)
        usages.append(
            Usage(arch, demangled(kernel), source.name, int(registers), int(shared[1]) if shared else 0, spill)
        )
    return usages


def demangled(symbol: str) -> str:
    if shutil.which("c++filt") is None:
        return symbol
    name = subprocess.run(["c++filt", symbol], check=True, capture_output=True, text=True).stdout.strip()
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    return re.sub(r"\([^()]*\)$", "", name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, default=[80, 90], help="compute capabilities, 80 for sm_80")
    parser.add_argument("--json", type=Path, help="write the table here as well")
    parser.add_argument("--only", choices=("triton", "cuda"), help="half of the table")
    arguments = parser.parse_args()
    start = time.perf_counter()
    by = "nvcc" if arguments.only == "cuda" else f"Triton {importlib.metadata.version('triton')}"
    usages = [] if arguments.only == "cuda" else all_triton_usage(arguments.arch)
    usages += [] if arguments.only == "triton" else cuda_usage(arguments.arch)
    print(f"{'arch':5} {'registers':>9} {'shared':>7} {'spill':>6}  kernel: configuration")
    for usage in usages:
        print(f"sm_{usage.arch:<2} {usage.registers:9} {usage.shared:7} {usage.spill:6}  {usage.kernel}: {usage.label}")
    spilling = sum(usage.spill > 0 for usage in usages)
    print(
        f"{by}, {time.perf_counter() - start:.0f} s: {len(usages)} kernels compiled, {spilling} spill; at most "
        f"{max(u.registers for u in usages)} registers, {max(u.shared for u in usages)} bytes of shared memory "
        "(CUDA: what is static)"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(usage) for usage in usages], indent=1) + "\n")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
