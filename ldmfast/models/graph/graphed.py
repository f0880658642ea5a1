"""What `UNet` and `UNet2D` have of graph mode: the switch, the way into a graph, the sentences of `explain`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ldmfast.models.graph.cuda_capture import Capture
from ldmfast.models.graph.graph_reasons import network_reason
from ldmfast.models.graph.graphs import Graphs

if TYPE_CHECKING:
    from typing_extensions import Self

# what decides whether stock's forward takes a call as a whole, in the order in which stock_reason has it
_DECIDING = (
    "cross_attention_kwargs",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


class Graphed:
    """Mixed into a U-Net of ours, before DropIn."""

    _graphs: Graphs | None = None

    def graph(
        self, on: bool = True, *, entries: int = 8, memory: int | None = None, capture: Capture | None = None
    ) -> Self:
        """From now on calls are captured as CUDA graphs and replayed; `graph(False)` ends it and frees them.

        entries  how many graphs are kept: one for each shape, dtype, LoRA scale, ... that takes turns with others
        memory   bytes that they may take together; None: a quarter of the GPU's
        capture  what captures, in place of CUDA: for tests

        ldmfast/models/graph/__init__.py says what is seen, what makes another graph, and what turns it off; `explain()`
        says which of that is so. A call that no graph takes runs as without graph mode. Calling it again begins anew.
        Returns this network. Raises ValueError where torch sees no NVIDIA GPU at all: it could never take effect there,
        and what was asked for by name is not left out in silence. A network that is still on the CPU may be switched:
        its graphs begin once it is on a GPU.
        """
        if on and capture is None and not torch.cuda.is_available():
            raise ValueError("graph mode needs an NVIDIA GPU, and torch sees none (torch.cuda.is_available() is False)")
        graphs = Graphs(entries, memory, capture) if on else None
        if self._graphs is not None:
            self._graphs.release()
        self._graphs = graphs
        return self

    @property
    def graphs(self) -> Graphs | None:
        """The graphs, with the number of captures and replays; None while graph mode is off."""
        return self._graphs

    def explain(self, *arguments: Any, **named: Any) -> list[str]:
        """As DropIn's; with graph mode on, also why it is not in use, or was not for the last call."""
        sentences = super().explain(*arguments, **named)
        graphs = self._graphs
        if graphs is None:
            return sentences
        if reason := graphs.refusal(self.device) or network_reason(self):
            return [*sentences, f"Graph mode is off: {reason}."]
        return [*sentences, *([f"The last call ran without its graph: {graphs.eager}."] if graphs.eager else [])]


def from_graph(output: type) -> Callable[[Callable], Callable]:
    """Decorator of a U-Net's forward, whose result is an `output`: from a graph where graph mode is on and has one."""

    def decorate(forward: Callable) -> Callable:
        names = tuple(inspect.signature(forward).parameters)[1:]
        deciding = tuple(name for name in _DECIDING if name in names)

        @functools.wraps(forward)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self._graphs is None or torch.compiler.is_compiling():
                return forward(self, *args, **kwargs)
            arguments = {**dict(zip(names, args, strict=False)), **kwargs}
            complete = set(names) >= arguments.keys() and len(arguments) == len(args) + len(kwargs)
            if not complete or not _tensors(arguments):
                return forward(self, *args, **kwargs)  # which says what is wrong
            named, result = arguments.pop("return_dict", True), None

            def as_it_is():
                nonlocal result
                result = forward(self, *args, **kwargs)
                return (result[0],)

            def over_buffers(**inputs):
                return forward(self, **inputs, return_dict=False)

            if reason := _reason(self, [arguments.get(name) for name in deciding]):
                arguments = {}
            else:
                arguments["timestep"] = self.times(arguments["timestep"], arguments["sample"])
            device = (args[0] if args else kwargs["sample"]).device
            (x,) = self._graphs.call(self, "forward", over_buffers, arguments, as_it_is, device, reason=reason)
            if result is not None:
                return result
            return output(sample=x) if named else (x,)

        return call

    return decorate


def _tensors(arguments: dict[str, Any]) -> bool:
    sample = arguments.get("sample")
    return isinstance(sample, torch.Tensor) and sample.dim() == 4 and arguments.get("timestep") is not None


def _reason(network, deciding: list) -> str | None:
    """Why this call goes elsewhere than through our forward, which reads the timestep; as a clause."""
    if stock := network.stock_reason(*deciding):
        return f"it runs as {network.stock.__name__}.forward: {stock}"
    methods = network.replaced_methods()
    return f"its {methods[0]} was replaced" if methods else None
