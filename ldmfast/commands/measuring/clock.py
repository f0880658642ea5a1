"""Time on a GPU without the host's share in it, and the processor standing in for a GPU where there is none.

A small kernel is timed in a CUDA graph of many launches: neither Python nor the events' two microseconds are in the
figure. `hot`, every launch reads the same buffers, which the second-level cache then holds, as it does in a step;
`cold`, the launches go round buffers of twice that cache's size.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from ldmfast.ops.measured.tuned import driver, processor

MODES = ("reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile, beside the default
LAUNCHES, MOST_LAUNCHES = 20, 512  # in a graph: at least, and at most where cold buffers are gone round


class Gpu:
    """The current CUDA device."""

    kind = "cuda"

    def about(self) -> dict:
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "device": found.name,
            "architecture": 10 * found.major + found.minor,
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "second_level_cache_mib": round(found.L2_cache_size / 2**20, 1),
            "driver": driver(),
            **versions(),
        }

    @property
    def cache_bytes(self) -> int:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size

    def wait(self) -> None:
        torch.cuda.synchronize()

    def graph(self, run: Callable) -> Callable:
        """run, recorded once in a CUDA graph: a function that replays it and returns what the recorded call returned.

        run must not wait for the device. It is called three times first, for what a first call allocates or compiles.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            answer = run()

        def replay():
            graph.replay()
            return answer

        return replay

    def compiled(self, network: Callable, mode: str, fullgraph: bool) -> Callable:
        return torch.compile(network, mode=mode, fullgraph=fullgraph)

    def once(self, run: Callable) -> float:
        """Seconds of one call, by events on the device."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class StandIn:
    """The processor with a GPU's interface, where a graph and what is compiled are the function itself."""

    kind = "cpu"
    cache_bytes = 1 << 20

    def about(self) -> dict:
        return {"device": processor(), "threads": torch.get_num_threads(), **versions()}

    def wait(self) -> None:
        pass

    def graph(self, run: Callable) -> Callable:
        run()
        return run

    def compiled(self, network: Callable, mode: str, fullgraph: bool) -> Callable:
        if mode not in MODES:
            raise ValueError(f"torch.compile has no mode {mode!r}")
        return network  # compiling for a processor would take a dry run's whole time: bench/peers does it

    def once(self, run: Callable) -> float:
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin


def device(kind: str) -> Gpu | StandIn:
    return Gpu() if torch.device(kind).type == "cuda" else StandIn()


def times(device: Gpu | StandIn, run: Callable, seconds: float, least: int = 3) -> list[float]:
    """Seconds of each call, for about `seconds` and `least` times at least, after two calls that do not count."""
    for _ in range(2):
        run()
    device.wait()
    found, end = [], time.perf_counter() + seconds
    while len(found) < least or time.perf_counter() < end:
        found.append(device.once(run))
    return found


def per_call(device: Gpu | StandIn, calls: Sequence[Callable], seconds: float, launches: int = LAUNCHES) -> float:
    """Median seconds of one call: `launches` at least in one graph, which goes round `calls`.

    calls  the same work, each on buffers of its own; one: hot
    """
    every = [calls[i % len(calls)] for i in range(max(launches, len(calls)))]
    replay = device.graph(lambda: [call() for call in every])  # each output lives to the end: no two share memory
    return statistics.median(times(device, replay, seconds)) / len(every)


def host_seconds(device: Gpu | StandIn, call: Callable, count: int = 50) -> float:
    """Median seconds that a call keeps the host busy: launches are queued, not waited for."""
    call()
    found = []
    for _ in range(3):
        device.wait()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        found.append((time.perf_counter() - begin) / count)
    device.wait()
    return statistics.median(found)


def rounds_for_cold(device: Gpu | StandIn, size: int) -> int:
    """How many sets of buffers of `size` bytes each are twice the second-level cache, within MOST_LAUNCHES."""
    return max(2, min(MOST_LAUNCHES, math.ceil(2 * device.cache_bytes / max(size, 1))))


def versions() -> dict:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    try:
        import triton
    except ImportError:
        return found
    return found | {"triton": triton.__version__}
