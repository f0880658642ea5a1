"""CUDA's side of graph mode: capturing, replaying, and the memory that graphs share.

Tests put a recorder in its place (tests/launch_recorder.py), which has the same methods and needs no GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]


class Recording(Protocol):
    """A captured call.

    outputs  where each replay leaves its results; the next replay, of any graph, may overwrite them
    bytes    by how much its capture enlarged the memory that the graphs share
    """

    outputs: Outputs
    bytes: int

    def replay(self) -> None: ...

    def release(self) -> None: ...


class Capture(Protocol):
    """What captures calls. One for each network; all its recordings share memory and are replayed one at a time."""

    def refusal(self, device: torch.device) -> str | None: ...

    def busy(self, device: torch.device) -> bool: ...

    def memory(self, device: torch.device) -> int: ...

    def warm_up(self, function: Callable[[], Outputs], device: torch.device) -> None: ...

    def record(self, function: Callable[[], Outputs], device: torch.device) -> Recording: ...

    def renew(self) -> None: ...


class CudaCapture:
    """Captures on a stream of its own, into a memory pool of its own."""

    def __init__(self) -> None:
        self._pool = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._last: torch.cuda.Stream | None = None

    def refusal(self, device: torch.device) -> str | None:
        """Why nothing can be captured on this device, as a clause."""
        return None if device.type == "cuda" else f"it is on {device}; a CUDA graph needs an NVIDIA GPU"

    def busy(self, device: torch.device) -> bool:
        """Whether somebody else captures this call, in whose graph it belongs."""
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def memory(self, device: torch.device) -> int:
        """How many bytes the graphs may take where nobody said: a quarter of the device's."""
        return torch.cuda.get_device_properties(device).total_memory // 4

    def warm_up(self, function: Callable[[], Outputs], device: torch.device) -> None:
        """Run it once where it will be captured, so that what is set up once a stream is there."""
        stream, current = self._stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.device(device), torch.cuda.stream(stream):
            function()
        current.wait_stream(stream)

    def record(self, function: Callable[[], Outputs], device: torch.device) -> Recording:
        """Capture what it launches. Raises what it raises, or RuntimeError for what cannot be captured."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), self._stream(device)
        with torch.cuda.device(device):
            current = torch.cuda.current_stream()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            try:
                # other threads may go on allocating meanwhile
                with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
                    outputs = function()
            except BaseException:
                torch.cuda.set_stream(current)  # where ending the capture fails, torch leaves its stream behind
                raise
            return _CudaRecording(self, graph, outputs, max(0, torch.cuda.memory_reserved() - before), device)

    def renew(self) -> None:
        """Another pool for the next recording. To be called once none is left: torch refuses to revive a dead one."""
        self._pool = None

    def ordered(self, device: torch.device) -> None:
        """Make this stream wait for the stream of the last replay, whose graph may use the same memory."""
        current = torch.cuda.current_stream(device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

    def _stream(self, device):
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class _CudaRecording:
    def __init__(self, capture, graph, outputs, taken, device):
        self._capture, self._graph, self._device = capture, graph, device
        self.outputs, self.bytes = outputs, taken

    def replay(self):
        self._graph.replay()

    def release(self):
        torch.cuda.synchronize(self._device)  # it may be running
        self.outputs = ()
        self._graph.reset()
