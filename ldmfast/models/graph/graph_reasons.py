"""Why a call, or a network, is not taken into a graph: each reason a clause that `explain` puts into a sentence.

A graph replays launches without the Python that made them. So whatever Python may do another way the next time, and
that network_state.py cannot see, keeps the network out: hooks, patches, modules and processors that are not stock's.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import nn
from torch.utils._device import DeviceContext

from ldmfast.models import guard, originals
from ldmfast.models.graph.network_state import HOOKS, subclassed
from ldmfast.models.limits import ALWAYS_CALLED, LIMITS, modified
from ldmfast.ops.contract.switch import exact, modes
from ldmfast.ops.dispatcher import transformed

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def call_reason() -> str | None:
    """What of this thread's state a replay would not obey."""
    if torch.is_grad_enabled():
        return "gradients are on; call it under torch.no_grad()"
    if torch._C._is_any_autocast_enabled():
        return "autocast is on"
    if exact():
        return "the numerical contract exact is on, which is for CPUs"
    if os.environ.get("LDMFAST_DEBUG") == "1":
        return "LDMFAST_DEBUG=1 has the inputs' values looked at"
    functions = torch.overrides._get_current_function_mode_stack()
    if (
        torch._C._len_torch_dispatch_stack() > modes.count
        or any(type(mode) is not DeviceContext for mode in functions)  # that is torch.set_default_device's
        or torch._C._get_tracing_state()
        or transformed()
    ):
        return "a mode, a transform or a trace watches it"
    return None


def network_reason(network: nn.Module) -> str | None:
    """What of the network itself a graph could not follow."""
    if reason := network.stock_reason():
        return f"the whole network runs as {network.stock.__name__}.forward: {reason}"
    if methods := network.replaced_methods():
        return f"its {methods[0]} was replaced"
    for name, reason in guard.obstacles(network):
        module = network.get_submodule(name)
        kind = type(module)
        if kind in _adapters():
            reason = _adapter_reason(module)
        elif kind not in LIMITS and kind not in ALWAYS_CALLED:
            reason = _unknown_reason(module)
        if reason is not None:
            return f"{name} is called as it is, because {reason}"
    return subclassed(network)


def _unknown_reason(module: nn.Module) -> str | None:
    """Why a module that none of our functions knows is more than what torch or diffusers wrote, as a clause."""
    for name, child in module.named_modules():
        of = f"of its {name}: " if name else ""
        kind = type(child)
        if kind in LIMITS or kind in _CONTAINERS:
            reason = guard.obstacle(child) if kind in LIMITS else None
        elif kind.__module__.partition(".")[0] not in ("torch", "diffusers"):
            reason = f"{kind.__name__} is neither torch's nor diffusers'"
        elif replaced := originals.replaced(child, kind, originals.methods(kind)):
            reason = f"its {replaced} was replaced"
        elif any(vars(child)[hooks] for hooks in HOOKS):
            reason = "it has hooks"
        elif isinstance(child, nn.modules.dropout._DropoutNd) and child.training and child.p > 0:
            reason = "it drops values"
        else:
            reason = None
        if reason is not None:
            return of + reason
    return None


def _adapters() -> tuple[type, ...]:
    """The layers whose LoRA a graph may hold, as far as peft was imported; without it there are none."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.lora.layer import Conv2d, Linear

    from ldmfast.models.lora_norm import NormAdapter

    return Linear, Conv2d, NormAdapter


def _adapter_reason(layer: nn.Module) -> str | None:
    """Why a LoRA layer is more than a product of matrices, scaled, beside a plain layer, as a clause."""
    kind = type(layer)
    if "forward" in vars(layer) or kind.forward.__globals__["__name__"].partition(".")[0] not in ("peft", "ldmfast"):
        return "its forward is wrapped (offloading, layerwise casting or a patch)"
    if any(vars(layer)[name] for name in HOOKS):
        return "it has hooks"
    if getattr(layer, "lora_variant", None):
        return "its LoRA is of another kind (DoRA or the like)"
    if getattr(layer, "ephemeral_gpu_offload", False):
        return "its LoRA is offloaded"
    for name, child in layer.named_modules():
        if child is layer or type(child) in _CONTAINERS:
            continue
        reason = modified(child, nn.Identity) if type(child) is nn.Identity else guard.obstacle(child)
        if reason is not None:
            return f"of its {name}: {reason}"
    return None
