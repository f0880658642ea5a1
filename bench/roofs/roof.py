"""The machine's limit in multiply-adds: multiply_adds.cpp, compiled here for the kernels' instruction set and run.

python bench/roofs/roof.py          GFLOP/s in float32 and bfloat16, on all threads
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402

from ldmfast import files  # noqa: E402
from ldmfast.ops import native  # noqa: E402

SOURCE = Path(__file__).with_name("multiply_adds.cpp")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
FLAGS = {"generic": (), "avx2": ("-mavx2", "-mfma"), "avx512": AVX512, "avx512_bf16": (*AVX512, "-mavx512bf16")}
FLAGS["amx"] = (*FLAGS["avx512_bf16"], "-mamx-tile", "-mamx-bf16")
ROUNDS = 1 << 20


def library(isa: str) -> ctypes.CDLL:
    """The loops for an instruction set, compiled into build/ if they are not there yet. Raises OSError without g++."""
    built = ROOT / "build" / "roofs" / f"{isa}.so"
    if not built.exists() or built.stat().st_mtime < SOURCE.stat().st_mtime:
        built.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(built) as partial:
            subprocess.run(
                ["g++", "-O2", "-fopenmp", "-shared", "-fPIC", *FLAGS[isa], str(SOURCE), "-o", str(partial)], check=True
            )
    found = ctypes.CDLL(str(built))
    for name in ("float32", "bfloat16"):
        loop = getattr(found, name)
        loop.restype, loop.argtypes = ctypes.c_double, (ctypes.c_longlong, ctypes.POINTER(ctypes.c_float))
    return found


def multiply_adds(dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations a second, the best of the runs that fit into `seconds`; float16 is computed in float32."""
    name = "bfloat16" if dtype is torch.bfloat16 else "float32"
    loop, sink, best = getattr(library(native.module("cpu").active_isa()), name), ctypes.c_float(0), 0.0
    end = time.perf_counter() + seconds
    while not best or time.perf_counter() < end:
        begin = time.perf_counter()
        done = loop(ROUNDS, ctypes.byref(sink))
        best = max(best, done / (time.perf_counter() - begin))
    return best


if __name__ == "__main__":
    for kind in (torch.float32, torch.bfloat16):
        print(f"{str(kind).removeprefix('torch.'):10} {multiply_adds(kind) / 1e9:8.1f} GFLOP/s")
