"""An adapter for a normalisation's weight and bias, which LyCORIS trains and peft's LoRA has no layer for.

It keeps peft's protocol for adapter layers, so what scales, switches, merges and removes LoRA does the same to it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call


class NormAdapter(nn.Module, BaseTunerLayer):
    """A GroupNorm or LayerNorm whose weight and bias have, for each active adapter, its scale times a difference added.

    base_layer   the normalisation;   lora_weight, lora_bias  {adapter: difference [C]}
    """

    adapter_layer_names = ("lora_weight", "lora_bias")
    other_param_names = ("r", "scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_weight, self.lora_bias = nn.ParameterDict(), nn.ParameterDict()
        self.r, self.scaling, self.merged_adapters, self._active_adapter = {}, {}, [], []
        self.lora_A = {}  # diffusers looks for an adapter's matrices there when it moves them

    def add(self, name: str, weight: torch.Tensor | None, bias: torch.Tensor | None) -> None:
        """Another adapter, active and at scale 1."""
        like = self.base_layer.weight
        for table, value in ((self.lora_weight, weight), (self.lora_bias, bias)):
            value = torch.zeros_like(like) if value is None else value.to(like)
            table[name] = nn.Parameter(value, requires_grad=False)
        self.r[name], self.scaling[name] = 1, 1.0
        self._active_adapter = [*self.active_adapters, name]

    def set_scale(self, adapter: str, scale: float) -> None:
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        for name in self._present():
            self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for name in self._present():
            self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active adapters (or those named) to the normalisation's own parameters, for good until `unmerge`."""
        for name in self._present(adapter_names):
            if name not in self.merged_adapters:
                changed = self._changed([name])
                if safe_merge and not all(value.isfinite().all() for value in changed.values()):
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
                self._assign(changed)
                self.merged_adapters.append(name)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self._assign(self._changed([self.merged_adapters.pop()], -1.0))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [] if self.disable_adapters or self.merged else self._present()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        return functional_call(self.base_layer, self._changed(names), (x, *args), kwargs)

    def _present(self, names: list[str] | None = None) -> list[str]:
        return [name for name in (self.active_adapters if names is None else names) if name in self.scaling]

    def _changed(self, names, sign: float = 1.0) -> dict[str, torch.Tensor]:
        base = self.base_layer
        return {
            "weight": base.weight + sum(sign * self.scaling[name] * self.lora_weight[name] for name in names),
            "bias": base.bias + sum(sign * self.scaling[name] * self.lora_bias[name] for name in names),
        }

    def _assign(self, values: dict[str, torch.Tensor]) -> None:
        self.base_layer.weight.data, self.base_layer.bias.data = values["weight"].data, values["bias"].data


def adapt_norm(network: nn.Module, name: str, adapter: str, weight: Any, bias: Any) -> None:
    """Put an adapter on the normalisation of that name in `network`.   weight, bias  [C] or None for none"""
    parent, _, attribute = name.rpartition(".")
    home = network.get_submodule(parent)
    layer = getattr(home, attribute)
    if not isinstance(layer, NormAdapter):
        layer = NormAdapter(layer)
        setattr(home, attribute, layer)
    layer.add(adapter, weight, bias)
