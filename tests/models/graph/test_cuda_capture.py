"""What CudaCapture asks of torch.cuda, in order, with a stand-in for that; on a GPU test_graph_rows.py has the rest."""

from __future__ import annotations

import contextlib

import pytest
import torch

from ldmfast.models.graph.cuda_capture import CudaCapture

GPU = torch.device("cuda", 0)


class Cuda:
    """torch.cuda as far as a capture needs it: streams by name, and a log of what was done."""

    def __init__(self):
        self.log, self.stream_now, self.reserved, self.pools = [], "main", 0, 0

    def install(self, patch):
        cuda = self

        class Stream:
            def __init__(self, device=None, name="side"):
                self.name = name

            def wait_stream(self, other):
                cuda.log.append(f"{self.name} waits for {other.name}")

            def __eq__(self, other):
                return self.name == other.name

        class Graph:
            def replay(self):
                cuda.log.append("replay")

            def reset(self):
                cuda.log.append("reset")

        @contextlib.contextmanager
        def on(stream):
            before, cuda.stream_now = cuda.stream_now, stream.name
            yield
            cuda.stream_now = before

        @contextlib.contextmanager
        def graph(graph, pool, stream, capture_error_mode):
            cuda.log.append(f"capture on {stream.name} into {pool}, {capture_error_mode}")
            cuda.stream_now = stream.name
            yield  # as torch's: if the body raises, the stream stays
            cuda.stream_now = "main"

        def handle():
            self.pools += 1
            return f"pool {self.pools}"

        names = {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "stream": on,
            "graph": graph,
            "device": lambda device: contextlib.nullcontext(),
            "current_stream": lambda device=None: Stream(name=self.stream_now),
            "set_stream": lambda stream: setattr(self, "stream_now", stream.name),
            "synchronize": lambda device=None: self.log.append("synchronize"),
            "empty_cache": lambda: self.log.append("empty"),
            "memory_reserved": lambda: self.reserved,
            "graph_pool_handle": handle,
            "is_current_stream_capturing": lambda: self.stream_now == "side",
        }
        for name, value in names.items():
            patch.setattr(torch.cuda, name, value)


@pytest.fixture
def cuda(monkeypatch):
    found = Cuda()
    found.install(monkeypatch)
    return found


def grown(cuda, by):
    def function():
        cuda.log.append(f"run on {cuda.stream_now}")
        cuda.reserved += by
        return ()

    return function


def test_a_capture_is_warmed_up_where_it_is_captured_and_measured(cuda):
    capture = CudaCapture()
    capture.warm_up(grown(cuda, 0), GPU)
    assert cuda.log == ["side waits for main", "run on side", "main waits for side"]
    cuda.log.clear()
    first, second = (capture.record(grown(cuda, by), GPU) for by in (5, 7))
    assert (first.bytes, second.bytes) == (5, 7)
    begin = ["synchronize", "empty", "capture on side into pool 1, thread_local", "run on side"]
    assert cuda.log == begin * 2 and cuda.stream_now == "main"
    cuda.log.clear()
    first.release()
    assert cuda.log == ["synchronize", "reset"] and first.outputs == ()
    capture.renew()
    capture.record(grown(cuda, 0), GPU)
    assert "capture on side into pool 2, thread_local" in cuda.log


def test_after_a_failure_work_goes_on_on_the_stream_before(cuda):
    def failing():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        CudaCapture().record(failing, GPU)
    assert cuda.stream_now == "main"


def test_replays_on_two_streams_are_ordered(cuda):
    capture = CudaCapture()
    for stream in ("main", "main", "other", "main"):
        cuda.stream_now = stream
        capture.ordered(GPU)
    assert cuda.log == ["other waits for main", "main waits for other"]


def test_what_it_refuses_and_leaves_to_others(cuda):
    capture = CudaCapture()
    assert capture.refusal(GPU) is None and "needs an NVIDIA GPU" in capture.refusal(torch.device("cpu"))
    assert not capture.busy(GPU) and not capture.busy(torch.device("cpu"))
    cuda.stream_now = "side"
    assert capture.busy(GPU)
