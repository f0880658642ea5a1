"""What a graph has captured of a network beside its inputs: where its weights are, and how its modules are set up.

A graph reads a weight where it was at capture, so values may change under it and places may not. Everything else that
Python decided at capture (which module, which adapter, which scale, which eps) is in the graph for good. So a state
holds the attributes of every module as they were, and is compared with the modules themselves at each call: for SD1.5's
709 modules and 686 weights that takes less than what our forward asks its guard.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from ldmfast.models import originals

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ORDINARY = frozenset(vars(nn.Module()))
# on the network itself, and read by no forward: ours, and what loading and fusing LoRA leaves behind
_NOTES = ("_graphs", "peft_config", "_hf_peft_config_loaded", "_safe_fusing", "lora_scale")


class NetworkState:
    """A network as it is when this is made.

    reason   why no graph is made of a network in this state, as a clause, or None
    devices  where its weights are, as torch spells it
    """

    def __init__(self, network: nn.Module, reason: str | None = None) -> None:
        self.reason = reason
        self.modules = list(network.modules())
        self._kinds = [type(m) for m in self.modules]
        self._hooks = [vars(m)[name] for m in self.modules for name in HOOKS]
        self._hooked = [len(hooks) for hooks in self._hooks]
        self._network, self._own = network, _settings(network)
        self._attributes = [(vars(m), dict(vars(m))) for m in self.modules if m is not network]
        self._attributes += [(m._modules, dict(m._modules)) for m in self.modules]
        for m in self.modules:
            self._attributes += _inner(_settings(m))
        self._methods = [(kind, name, getattr(kind, name)) for kind in set(self._kinds) for name in _names(kind)]
        processors = [p for m in self.modules if (p := vars(m).get("processor")) is not None]
        self._attributes += [(vars(p), dict(vars(p))) for p in processors]
        self._methods += [(kind, "__call__", kind.__call__) for kind in {type(p) for p in processors}]
        self._tables = [m._parameters for m in self.modules] + [m._buffers for m in self.modules if m._buffers]
        weights = self._present()
        self._weights = [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in weights]
        self.devices = {str(x.device) for x in weights}

    def holds(self) -> bool:
        """Whether the modules are set up as they were. It says nothing of the weights."""
        return (
            [type(m) for m in self.modules] == self._kinds
            and [len(hooks) for hooks in self._hooks] == self._hooked
            and _equal(_settings(self._network), self._own)
            and all(_equal(now, then) for now, then in self._attributes)
            and all(getattr(kind, name) is function for kind, name, function in self._methods)
        )

    def weights_hold(self) -> bool:
        """Whether each weight and buffer is where it was, with its dtype, shape and strides."""
        weights = self._present()
        return len(weights) == len(self._weights) and all(map(_is_at, weights, self._weights))

    def within(self, other: NetworkState) -> bool:
        """Whether the other state still has all modules of this one."""
        return {id(m) for m in self.modules} <= {id(m) for m in other.modules}

    def _present(self) -> list[Tensor]:
        return [x for table in self._tables for x in table.values() if x is not None]


def _is_at(x: Tensor, place: tuple) -> bool:
    return (x.data_ptr(), x.dtype, x.shape, x.stride()) == place


def _settings(m: nn.Module) -> dict[str, Any]:
    """A module's attributes without what is only noted on it."""
    return {name: value for name, value in vars(m).items() if name not in _NOTES}


def _inner(settings: dict[str, Any]) -> list[tuple[Any, Any]]:
    """(it, a copy) of each dict, list and set among a module's own attributes: adapters, their scales."""
    own = [value for name, value in settings.items() if name not in _ORDINARY]
    return [(value, kind(value)) for value in own for kind in (dict, list, set) if isinstance(value, kind)]


def _equal(now: Any, then: Any) -> bool:
    try:
        return bool(now == then)
    except (RuntimeError, ValueError):  # another array among them, whose comparison has no one answer
        return False


@functools.cache
def _names(kind: type) -> tuple[str, ...]:
    """The methods of a class that its forward comes to."""
    return tuple(name for name, _ in originals.methods(kind))


def subclassed(network: nn.Module) -> str | None:
    """Which kind of weight of the network is not a plain one, as a clause."""
    for m in network.modules():
        for table in (m._parameters, m._buffers):
            for x in table.values():
                if x is not None and type(x) not in (nn.Parameter, Tensor):
                    return f"one of its weights is a {type(x).__name__}"
    return None
