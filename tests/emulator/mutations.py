"""Each barrier, wait and commit of the CUDA kernels taken away: what notices.

The emulator knows every call of such a primitive by its file and line, and can let one do nothing
(LDMFAST_CUDA_HOST_SKIP), or let a cluster's arrive release no writes (LDMFAST_CUDA_HOST_RELAX); so nothing is compiled.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from cases import CASES
from emulated import NO_CLUSTERS, SLABS, Call, calls, failure

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
PRIMITIVE = re.compile(
    r"\b(__syncthreads|__syncwarp|cp_async_wait|cp_async_commit|cluster_arrive_relaxed|cluster_arrive|cluster_wait"
    r"|wait_for_previous_kernel)(?:<\d+>)?\(\);"
)
WAIT = "wait_for_previous_kernel"
RUNS = {"order": {}, "seed 1": {"SEED": "1"}, "races": {"RACES": "1"}}  # by whom a mutant is noticed

# Cases that between them reach every kernel and every path with a barrier, in one dtype or two
CHOSEN = {
    "attention": ("peaked", "cross-50x77x160", "width-20", "mask-additive", "shared-queries-520x20x16"),
    "group_norm_silu": (
        "C320-8x8-channels_last",
        "outlier-contiguous",
        "C640-8x8-contiguous",
        "one-group-odd-slice-4x4-channels_last",
        "everything-channels_last",
    ),
    "timestep_mlp": ("float-t", "batch-17", "wide"),
}


@dataclass(frozen=True)
class Site:
    file: Path  # below csrc/cuda
    line: int
    primitive: str
    change: str = "SKIP"

    def __str__(self) -> str:
        what = "removed" if self.change == "SKIP" else "releases nothing"
        return f"{self.file.name}:{self.line} {self.primitive} {what}"

    @property
    def setting(self) -> dict[str, str]:
        return {self.change: f"{self.file.name}:{self.line}"}

    @property
    def op(self) -> str:
        """The forward op whose kernels, or whose gradient's, it lies in."""
        return (self.file.parts[0] if len(self.file.parts) > 1 else self.file.stem).removesuffix("_backward")


def sites() -> Iterator[Site]:
    for path in sorted([*SOURCES.rglob("*.cu"), *SOURCES.rglob("*.cuh")]):
        file = path.relative_to(SOURCES)
        if file.parts[0] in ("emulator", "common.cuh"):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            for match in PRIMITIVE.finditer(line):
                yield Site(file, number, match[1])
                if match[1] == "cluster_arrive":
                    yield Site(file, number, match[1], "RELAX")


def newer_than(built: float) -> list[str]:
    """Sources that were written after this time: a module built then knows other lines than `sites`, or other code."""
    paths = sorted([*SOURCES.rglob("*.cu"), *SOURCES.rglob("*.cuh"), *SOURCES.rglob("*.h")])
    return [str(path.relative_to(SOURCES)) for path in paths if path.stat().st_mtime > built]


def chosen_calls(op: str) -> list[Call]:
    """float16 where tensor cores differ from float32, which is there for the plain kernels."""
    found = []
    for case in CASES:
        if case.op == op and case.label in CHOSEN.get(op, (case.label,)):
            for call in calls(case, (torch.float16, torch.float32)):
                found.append(call)
                if op == "group_norm_silu" and call.dtype is torch.float16:
                    found += [replace(call, settings=SLABS)] + [replace(call, settings=NO_CLUSTERS)] * (
                        not call.backward
                    )
    return found


def noticed(site: Site, run: str) -> tuple[Call, str] | None:
    """The first call that fails without it, and how; None if all pass. RuntimeError where one fails by itself."""
    if site.primitive == WAIT and run != "races":
        return None  # kernels run one after the other here: only who looks for it sees that one does not wait
    for call in chosen_calls(site.op):
        if found := failure(call, **RUNS[run], **site.setting):
            if wrong := _whole(call, run):
                raise RuntimeError(f"{call}, {run}: wrong with nothing removed: {wrong}")
            return call, found
    return None


@functools.cache
def _whole(call: Call, run: str) -> str | None:
    return failure(call, **RUNS[run])
