"""Registers, shared memory and spills of every kernel, for sm_80 and sm_90, on a machine that needs no GPU.

    python bench/resources.py [--arch 80 90] [--json FILE]

Triton: the launchers are called with tensors on no device and their launches are recorded, specialised as Triton
specialises them and compiled ahead of time; `ptxas -v` says what a kernel takes. CUDA: cuobjdump reads the built
extension. Exits with 1 if anything spills.
"""

import argparse
import contextlib
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a bare checkout works too

OPS = ("group_norm_silu", "attention", "timestep_mlp", "ddim_step")


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
            options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in kwargs}
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


def triton_launches(ops=OPS) -> list[Launch]:
    """The launches of the shipped configurations, each compiled form once."""
    import importlib

    launches = []
    for op in ops:
        module = importlib.import_module(f"ldmfast.kernels.{op}")
        for label, args in module.compile_specs():
            with recorded(module, label, launches):
                getattr(module, op)(*args)
    return list({repr((launch.kernel.fn.__name__, specialise(launch), launch.options)): launch for launch in launches}.values())


def specialise(launch: Launch):
    """(signature, constants, attributes) as Triton's run time would make them; memory is taken to be 16-byte aligned."""
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
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    return Usage(arch, launch.kernel.fn.__name__, launch.label, registers, compiled.metadata.shared, int(stores) + int(loads))
