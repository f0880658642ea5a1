"""The residuals that ControlNet and T2I-Adapter add inside a U-Net: checked at its door, added on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d_blocks import (
    AttnDownBlock2D,
    CrossAttnDownBlock2D,
    DownBlock2D,
    ResnetDownsampleBlock2D,
)
from torch import nn

from ldmfast.models.input_checks import check_values

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_BLOCKS = (DownBlock2D, CrossAttnDownBlock2D, AttnDownBlock2D, ResnetDownsampleBlock2D)
_CONTROLS, _MID = "down_block_additional_residuals", "mid_block_additional_residual"
_ADAPTERS = "down_intrablock_additional_residuals"

Shape = tuple[int, ...]


def check_residuals(
    unet: UNet2DConditionModel,
    sample: torch.Tensor,
    controls: Sequence[torch.Tensor] | None,
    mid: torch.Tensor | None,
    adapters: Sequence[torch.Tensor] | None,
) -> None:
    """Number, shapes and types of ControlNet's and T2I-Adapter's residuals, before anything is computed.

    Where the U-Net has blocks whose shapes are not known here, `add_residual` finds what is wrong on the way.
    Raises ValueError.
    """
    if controls is None and mid is None and adapters is None:
        return
    check_values(**{_CONTROLS: controls, _MID: mid, _ADAPTERS: adapters})
    levels = _levels(unet, sample)
    if levels is None:
        return
    skips, places = levels
    if adapters is None and mid is None:  # an older way to hand over T2I-Adapter's
        _check_adapters(_CONTROLS, adapters=controls, places=places, last=skips[-1], sample=sample)
        return
    if controls is not None and mid is not None:
        _check_count(controls, len(skips))
        for i, (residual, wanted) in enumerate(zip(controls, skips, strict=True)):
            _check(f"{_CONTROLS}[{i}]", residual, wanted, sample)
        _check(_MID, mid, skips[-1], sample)
    if adapters is not None:
        _check_adapters(_ADAPTERS, adapters=adapters, places=places, last=skips[-1], sample=sample)


def _check_adapters(name: str, *, adapters, places: list[Shape], last: Shape, sample: torch.Tensor) -> None:
    """One for each level, at most. Of more, the first is the mid block's if it has its very shape (T2I-Adapter-XL's);
    others are not used, here as in the parent: the light adapter of a shallow U-Net has more levels than it."""
    if not isinstance(adapters, (list, tuple)):
        raise ValueError(f"{name} must be a list of tensors; got {type(adapters).__name__}")
    for i, (residual, wanted) in enumerate(zip(adapters, places, strict=False)):
        _check(f"{name}[{i}]", residual, wanted, sample)
    after = adapters[len(places) : len(places) + 1]
    if after and getattr(after[0], "shape", None) == last:
        _check(f"{name}[{len(places)}]", after[0], last, sample)


def _check_count(controls, skips: int) -> None:
    if len(controls) != skips:
        raise ValueError(f"{_CONTROLS} has {len(controls)} tensors; this UNet has {skips} skips")


def _check(name: str, residual, wanted: Shape, sample: torch.Tensor) -> None:
    if not isinstance(residual, torch.Tensor):
        raise ValueError(f"{name} must be a tensor {wanted}; got {type(residual).__name__}")
    if not _fits(residual.shape, wanted):
        raise ValueError(f"{name} has shape {tuple(residual.shape)}; expected {wanted}")
    kind, given = sample.dtype, residual.dtype
    if torch.promote_types(kind, given) != kind and not torch.is_autocast_enabled(sample.device.type):
        kind, given = (str(dtype).removeprefix("torch.") for dtype in (kind, given))
        raise ValueError(f"{name} is {given} and the sample {kind}; cast it: {name}.to(torch.{kind})")


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a tensor of that shape can be added to one of the wanted shape without enlarging it."""
    return len(shape) == len(wanted) and all(a in (1, b) for a, b in zip(shape, wanted, strict=True))


def _levels(unet, sample) -> tuple[list[Shape], list[Shape]] | None:
    """(the shapes of the skips, where T2I-Adapter's residual of each level is added), or None if a block is unknown."""
    batch, *size = sample.shape
    size = _convolved(unet.conv_in, tuple(size[1:]))
    if size is None:
        return None
    skips, places = [(batch, _channels(unet.conv_in), *size)], []
    for block in unet.down_blocks:
        if type(block) not in _BLOCKS or any(type(layer) is not ResnetBlock2D for layer in block.resnets):
            return None
        level = [(batch, layer.out_channels, *size) for layer in block.resnets]
        before = level[-1]
        for layer in block.downsamplers or ():
            size = _downsampled(layer, size)
            if size is None:
                return None
        if block.downsamplers:
            level.append((*before[:2], *size))
        skips += level
        places.append(before if type(block) is CrossAttnDownBlock2D else level[-1])
    return skips, places


def _downsampled(layer: nn.Module, size: Shape) -> Shape | None:
    layer = layer.downsample if type(layer) is ResnetBlock2D else layer
    if type(layer) is not Downsample2D:
        return None
    if layer.use_conv and layer.padding == 0:
        size = tuple(side + 1 for side in size)
    return _convolved(layer.conv, size)


def _convolved(layer: nn.Module, size: Shape) -> Shape | None:
    layer = getattr(layer, "base_layer", layer)  # of a LoRA
    if isinstance(layer, nn.AvgPool2d):
        return tuple(side // 2 for side in size)
    if not isinstance(layer, nn.Conv2d) or not isinstance(layer.padding, tuple):
        return None
    around = zip(size, layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    return tuple((side + 2 * pad - spread * (k - 1) - 1) // step + 1 for side, k, step, pad, spread in around)


def _channels(layer: nn.Module) -> int:
    return getattr(layer, "base_layer", layer).out_channels


def add_residuals(skips: tuple[torch.Tensor, ...], residuals: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The skips with a ControlNet's residuals added. Raises ValueError if their count or a shape differs."""
    _check_count(residuals, len(skips))
    return tuple(
        add_residual(f"{_CONTROLS}[{i}]", skip, residual)
        for i, (skip, residual) in enumerate(zip(skips, residuals, strict=True))
    )


def add_residual(name: str, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """x + residual. Raises ValueError if their shapes differ."""
    if not _fits(residual.shape, x.shape):
        raise ValueError(f"{name} has shape {tuple(residual.shape)}; expected {tuple(x.shape)}")
    return x + residual
