"""The rows of a step's table: ours and its rivals, each as it is best run, and what each needs set while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldmfast.commands.measuring.clock import Gpu, StandIn

if TYPE_CHECKING:  # it needs diffusers, which a table of ops does without
    from ldmfast.commands.measuring.works import Work

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Row:
    """key       what --row takes;   name  in tables
    ours      our network, else diffusers'
    last      weights in channels_last; the activations of ours always are
    measured  cuDNN measures its algorithms (torch.backends.cudnn.benchmark)
    graph     "recorded": the step in a CUDA graph that is recorded here; "own": the network's own graph mode
    sdpa      the only kernel that F.scaled_dot_product_attention may take: a key of SDPA
    backend   the only backend of our ops
    compiled  mode of torch.compile
    works     those that it is a row of; None: all
    """

    key: str
    name: str
    ours: bool = False
    last: bool = False
    measured: bool = False
    graph: str = ""
    sdpa: str = ""
    backend: str = ""
    compiled: str = ""
    works: tuple[str, ...] | None = None


BEST = {"last": True, "measured": True, "graph": "recorded"}
STEPS = ("sd15", "sdxl", "vae")
UNETS = ("sd15", "sdxl")
ROWS = (  # the first that a run of few minutes must bring, first
    Row("stock", "diffusers, eager"),
    Row("ours", "ldmfast", ours=True),
    Row("ours-graph", "ldmfast, CUDA graph", ours=True, graph="recorded", works=STEPS),
    Row("stock-graph", "diffusers, CUDA graph, channels_last, measured algorithms", **BEST, works=STEPS),
    Row("ours-own-graph", "ldmfast, graph mode", ours=True, graph="own", works=UNETS),
    Row("ours-best", "ldmfast, CUDA graph, channels_last, measured algorithms", ours=True, **BEST, works=STEPS),
    Row("stock-last", "diffusers, channels_last, measured algorithms", last=True, measured=True),
    Row("ours-triton", "ldmfast, CUDA graph, Triton kernels", True, graph="recorded", backend="triton", works=STEPS),
    *(
        Row(f"stock-{key}", f"diffusers, CUDA graph, SDPA {key}", **BEST, sdpa=key, works=("sd15",))
        for key in ("flash", "cudnn", "efficient", "math")
    ),
)
COMPILED = (
    Row("stock-autotune", "diffusers, torch.compile max-autotune", last=True, compiled="max-autotune"),
    Row("stock-overhead", "diffusers, torch.compile reduce-overhead", last=True, compiled="reduce-overhead"),
    Row("ours-overhead", "ldmfast, torch.compile reduce-overhead", ours=True, compiled="reduce-overhead"),
)
BY_KEY = {row.key: row for row in (*ROWS, *COMPILED)}


def rows_of(work: str, rows: tuple[Row, ...] = ROWS) -> list[Row]:
    return [row for row in rows if row.works is None or work in row.works]


@contextlib.contextmanager
def settings(row: Row) -> Iterator[None]:
    """Context in which the row is made and timed."""
    from ldmfast.ops.registry import use_backend

    with contextlib.ExitStack() as stack:
        if row.sdpa:
            stack.enter_context(sdpa_kernel(SDPA[row.sdpa]))
        if row.backend:
            stack.enter_context(use_backend(row.backend))
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = row.measured
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = before


def prepared(row: Row, work: Work, device: Gpu | StandIn) -> Callable[[], torch.Tensor]:
    """A function that makes one step of the row; call it, and this, within `settings(row)`.

    Raises NotImplementedError with a sentence where this ldmfast or this device has no such row.
    """
    model = work.ours if row.ours else work.stock
    model.to(memory_format=torch.channels_last if row.last else torch.contiguous_format)
    if row.graph == "own":
        return _own_graph(model, work)
    network = work.network(row.ours)
    if row.compiled:
        network = device.compiled(network, row.compiled, fullgraph=not row.ours)
    recorded = row.graph == "recorded"
    run = work.step(network, row.ours, recorded)
    return device.graph(run) if recorded else run


def _own_graph(model, work: Work) -> Callable:
    if not hasattr(model, "graph"):
        raise NotImplementedError(f"{type(model).__name__} has no graph mode")
    try:
        model.graph()
    except ValueError as reason:  # on a machine without a GPU
        raise NotImplementedError(str(reason)) from reason
    return work.step(work.network(True), True, True)


def released(row: Row, work: Work) -> dict:
    """Turns off what the row turned on in the network; why its calls ran without their graph, if they did."""
    graphs = getattr(work.ours, "graphs", None) if row.graph == "own" else None
    if graphs is None:
        return {}
    reason = graphs.eager
    work.ours.graph(False)
    return {"without_graph": str(reason)} if reason else {}
