"""The graphs of one network: found, captured, replayed, released."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ldmfast.files import first_line
from ldmfast.models.graph.call_inputs import CallInputs, StaticInputs, difference, shortened
from ldmfast.models.graph.cuda_capture import Capture, CudaCapture, Outputs, Recording
from ldmfast.models.graph.graph_reasons import call_reason, network_reason
from ldmfast.models.graph.network_state import NetworkState
from ldmfast.ops.registry import chosen_backend

STATES = 16  # of a network that are kept: as many LoRA scales, say, as may take turns
SEEN = 64  # kinds of calls that are known to have come once


class Graphs:
    """A bounded number of captured calls of a network, and what became of the others.

    entries  how many graphs are kept
    memory   bytes that they may take together; None: what `capture` says, a quarter of a GPU's
    captures, replays   how often each has happened
    stopped  why no more graphs are made or used, as a clause, or None
    eager    why the last call ran without a graph, or None: it did not, or was the first of its kind
    """

    def __init__(self, entries: int = 8, memory: int | None = None, capture: Capture | None = None) -> None:
        for name, value in (("entries", entries), ("memory", memory)):
            if value is not None and value < 1:
                raise ValueError(f"graph: {name} is {value}, expected at least 1")
        self.entries, self.memory = entries, memory
        self.captures = self.replays = 0
        self.stopped: str | None = None
        self.eager: str | None = None
        self._capture = CudaCapture() if capture is None else capture
        self._lock, self._thread = threading.RLock(), threading.local()
        self._kept: OrderedDict[tuple, _Graph] = OrderedDict()  # the last used is last
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        self._states: list[NetworkState] = []  # likewise
        self._too_large: dict[tuple, str] = {}
        self._unused_captures = self._unused_states = 0  # since the last replay

    def __deepcopy__(self, memo: dict) -> Graphs:
        return Graphs(self.entries, self.memory)  # another network, none of whose calls was captured

    def __reduce__(self) -> tuple:
        return Graphs, (self.entries, self.memory)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """What the graphs hold."""
        return sum(graph.bytes for graph in self._kept.values())

    def refusal(self, device: torch.device) -> str | None:
        """Why nothing is captured on this device, as a clause."""
        return self.stopped or self._capture.refusal(device)

    def call(
        self,
        network: nn.Module,
        name: str,
        function: Callable[..., Outputs],
        arguments: dict[str, Any],
        as_it_is: Callable[[], Outputs],
        device: torch.device,
        settings: Hashable = (),
        reason: str | None = None,
    ) -> Outputs:
        """as_it_is(), a tuple of tensors, from its graph where there is one.

        function(**arguments)  computes the same on `device`, and is what is captured
        name, settings         what tells functions apart, and what they use beside the arguments and the network
        reason                 why this call is to have no graph, if the caller knows one, as a clause
        """
        if getattr(self._thread, "inside", False) or self._capture.busy(device):
            return as_it_is()
        with self._inside():
            with self._lock:
                key, inputs, state = None, None, None
                reason = reason or self.refusal(device) or call_reason()
                if reason is None:
                    inputs = CallInputs(arguments, device)
                    reason = inputs.refusal
                if reason is None:
                    state = self._state(network)
                    reason = self.stopped or state.reason or _elsewhere(state, device)
                if reason is None:
                    key = (name, settings, inputs.key, _surroundings(device), id(state))
                    reason = self._too_large.get(key)
                self.eager = reason
                if key in self._kept:
                    return self._replayed(key, arguments, inputs, device)
                if reason is None and key in self._seen:
                    return self._captured(key, state, function, arguments, inputs, as_it_is, device)
                if reason is None:
                    _remember(self._seen, key)
            return as_it_is()

    def release(self) -> None:
        """Free what the graphs hold. They are captured again as they are used."""
        with self._lock:
            for key in list(self._kept):
                self._drop(key)
            self._states, self._seen = [], OrderedDict()

    def _replayed(self, key, arguments, inputs, device):
        graph = self._kept[key]
        self._kept.move_to_end(key)
        self._unused_captures = self._unused_states = 0
        self._ordered(device)
        graph.static.fill(inputs)
        graph.recording.replay()
        self.replays += 1
        for name, count in graph.taken.items():
            del arguments[name][:count]
        return tuple(x.clone() for x in graph.recording.outputs)

    def _captured(self, key, state, function, arguments, inputs, as_it_is, device):
        """The call as it is, whose result is returned; and its graph, if that gives the same bits."""
        if self._unused_captures >= self.entries:
            self._stop(f"calls of more kinds take turns than the {self.entries} graphs that are kept", warn=False)
            return as_it_is()
        static = StaticInputs(arguments, inputs)
        wanted = as_it_is()
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._ordered(device)
                graph = _Graph(self._capture, state, function, static, device)
                graph.recording.replay()
                differs = difference(graph.recording.outputs, wanted)
        except Exception as error:  # the call itself has just succeeded
            self._stop(f"a capture failed: {type(error).__name__}: {first_line(error)}")
            return wanted
        if differs:
            graph.recording.release()
            self._stop(f"the first replay is not what the call gave: {differs}")
            return wanted
        self.captures += 1
        self._unused_captures += 1
        self._kept[key] = graph
        self._bound(key, device)
        return wanted

    def _bound(self, key, device) -> None:
        """Release what is too much, once `key` is captured."""
        while len(self._kept) > self.entries:
            self._drop(next(iter(self._kept)))
        most, taken, alone = self.memory or self._capture.memory(device), self.bytes, len(self._kept) == 1
        if taken <= most:
            return
        # memory that graphs share is freed with the last of them, so the others cannot be kept
        for each in list(self._kept):
            self._drop(each)
        if alone:
            self._too_large[key] = f"its graph takes {_megabytes(taken)}, of {_megabytes(most)} that graphs may take"

    def _state(self, network: nn.Module) -> NetworkState:
        """The network's state: one that is known, or a new one. What no longer can come back is released."""
        patched = network.patched()
        for state in reversed(self._states):
            if patched is None and state.holds():
                if state.weights_hold():
                    self._states.remove(state)
                    self._states.append(state)
                    return state
                self._forget(state)
                break
        new = NetworkState(network, network_reason(network))
        self._unused_states += new.reason is None
        if self._unused_states > STATES:
            self._stop(f"the network's settings or weights changed {STATES} times without a graph being used", False)
        gone = [state for state in self._states if not state.within(new)]
        for state in [*gone, *self._states[: len(self._states) - len(gone) + 1 - STATES]]:
            self._forget(state)
        self._states.append(new)
        return new

    def _forget(self, state: NetworkState) -> None:
        if state in self._states:
            self._states.remove(state)
        for key in [key for key in self._kept if key[-1] == id(state)]:
            self._drop(key)
        for table in (self._seen, self._too_large):
            for key in [key for key in table if key[-1] == id(state)]:
                del table[key]

    def _drop(self, key) -> None:
        self._kept.pop(key).recording.release()
        if not self._kept:
            self._capture.renew()

    def _stop(self, reason: str, warn: bool = True) -> None:
        self.stopped = self.eager = reason
        self.release()
        self._capture.renew()
        if warn:
            warnings.warn(f"graph mode is off: {reason}; graph() tries again", stacklevel=5)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """In it, calls of this thread run as they are: they are part of another."""
        self._thread.inside = True
        try:
            yield
        finally:
            self._thread.inside = False

    def _ordered(self, device) -> None:
        if isinstance(self._capture, CudaCapture):
            self._capture.ordered(device)


class _Graph:
    """A recording with its inputs. `state` is held so that no other takes its id."""

    def __init__(self, capture, state, function, static, device):
        self.state, self.static, self.taken = state, static, {}
        capture.warm_up(lambda: function(**static.arguments()), device)

        def run():
            arguments = static.arguments()
            outputs = function(**arguments)
            self.taken = shortened(static.arguments(), arguments)
            return outputs

        self.recording: Recording = capture.record(run, device)
        held: list[Tensor] = list(self.recording.outputs)
        self.bytes = self.recording.bytes + static.bytes + sum(x.nbytes for x in held)


def _remember(seen: OrderedDict, key: tuple) -> None:
    seen[key] = None
    while len(seen) > SEEN:
        seen.popitem(last=False)


def _elsewhere(state: NetworkState, device: torch.device) -> str | None:
    found = state.devices - {str(device)}
    return f"some of its weights are on {' and '.join(sorted(found))}, its inputs on {device}" if found else None


def _surroundings(device: torch.device) -> tuple:
    """The switches of torch and ours that choose kernels."""
    backends = torch.backends
    return (
        device,
        chosen_backend(),
        torch.are_deterministic_algorithms_enabled(),
        backends.cudnn.enabled,
        backends.cudnn.benchmark,
        backends.cudnn.deterministic,
        backends.cudnn.conv.fp32_precision,
        backends.cuda.matmul.fp32_precision,
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.cuda.matmul.allow_fp16_accumulation,
        backends.cuda.flash_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(),
        backends.cuda.cudnn_sdp_enabled(),
    )


def _megabytes(count: int) -> str:
    return f"{count / 2**20:.1f} MB"
