"""What a network refuses at its door, with a sentence that says what came and what was wanted.

The checks read shapes and dtypes, and of values only a timestep's on a CPU, so that they cost no synchronisation on a
GPU. With the environment variable LDMFAST_DEBUG=1 the inputs' values are looked at too.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import TYPE_CHECKING

import numpy
import torch

from ldmfast.models.checks.added_conditions import check_added
from ldmfast.models.guard import plain
from ldmfast.models.weight_files import WIDTHS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel, UNet2DModel
    from torch import nn

_NUMPY = (numpy.ndarray, numpy.generic)
STEPS = 1000  # that a U-Net is trained on, where its configuration says nothing
# Models of Karras et al. 2022 (EDM) take a quarter of the noise level's logarithm for the time: -1.6 at sigma 0.002
_LOWEST_NOISE_LEVEL = -4


def check_inputs(
    unet: UNet2DConditionModel,
    sample: torch.Tensor,
    context: torch.Tensor | tuple | None,
    class_labels: torch.Tensor | None,
    added: dict[str, torch.Tensor] | None,
    masks: dict[str, torch.Tensor | None],
) -> None:
    """The shapes and dtypes of everything but the timestep and the residuals. Raises ValueError."""
    check_sample(unet, sample)
    _check_context(unet, sample, context)
    check_added(unet, sample, added)
    if class_labels is not None and unet.class_embedding is not None and class_labels.shape[0] != sample.shape[0]:
        raise ValueError(f"class_labels has batch {class_labels.shape[0]}, sample has batch {sample.shape[0]}")
    for name, mask in masks.items():
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise ValueError(f"{name} must be a tensor [N, keys]; got {type(mask).__name__}")
        if mask is not None and (mask.ndim != 2 or mask.shape[0] not in (1, sample.shape[0])):
            raise ValueError(f"{name} has shape {tuple(mask.shape)}; expected (batch, keys), batch {sample.shape[0]}")
    mask = masks["encoder_attention_mask"]
    if mask is not None and isinstance(context, torch.Tensor) and mask.shape[1] != context.shape[1]:
        raise ValueError(f"encoder_attention_mask covers {mask.shape[1]} keys; the context has {context.shape[1]}")
    check_values(sample=sample, encoder_hidden_states=context, class_labels=class_labels, **(added or {}))


def check_sample(unet: UNet2DConditionModel | UNet2DModel, sample: torch.Tensor) -> None:
    """The noisy latents: rank, channels, dtype. Raises ValueError."""
    hinted = unet.config.get("addition_embed_type") == "image_hint"  # more channels are put beside them
    check_picture("sample", sample, unet.conv_in, "UNet", any_channels=hinted)


def check_picture(
    name: str, x: torch.Tensor, first: nn.Conv2d | None, what: str, *, any_channels: bool = False
) -> None:
    """What a network (`what`) is given that begins with the convolution `first`: rank, channels, dtype.

    first  None where it is not known; of one that something is attached to, neither channels nor dtype are
    Raises ValueError.
    """
    if not isinstance(x, torch.Tensor) or x.ndim != 4:
        got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor [N, C, H, W]; got {got}")
    if first is None or not plain(first):
        return
    weight = first.weight
    channels = weight.shape[1] * first.groups  # in_channels is not read by stock's forward
    if x.shape[1] != channels and not any_channels:
        more = " (a 9-channel U-Net takes latents, mask and masked latents, concatenated)" if channels == 9 else ""
        raise ValueError(f"{name} has {x.shape[1]} channels; this {what} expects {channels}{more}")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(_dtype_message(name, x.dtype, weight.dtype, what))


def _dtype_message(name: str, got: torch.dtype, wanted: torch.dtype, what: str = "UNet") -> str:
    wanted = str(wanted).removeprefix("torch.")
    return f"{name} is {str(got).removeprefix('torch.')} and this {what} {wanted}; cast one: {name}.to(torch.{wanted})"


def _check_context(unet, sample, context) -> None:
    width = expected_context_width(unet)
    if width is None or isinstance(context, tuple):
        return
    if not isinstance(context, torch.Tensor):
        raise ValueError(f"encoder_hidden_states must be a tensor [N, S, {width}]; got {type(context).__name__}")
    if context.ndim != 3 or context.shape[1] == 0:
        raise ValueError(
            f"encoder_hidden_states must be [N, S, {width}] with at least one token; got {tuple(context.shape)}"
        )
    if context.shape[2] != width:
        raise ValueError(_width_message(context.shape[2], width))
    if context.shape[0] != sample.shape[0]:
        raise ValueError(f"encoder_hidden_states has batch {context.shape[0]}, sample has batch {sample.shape[0]}")
    if context.dtype != sample.dtype and plain(unet.conv_in) and not torch.is_autocast_enabled(sample.device.type):
        raise ValueError(_dtype_message("encoder_hidden_states", context.dtype, sample.dtype))


def expected_context_width(unet: UNet2DConditionModel) -> int | None:
    """The width of encoder_hidden_states; None if the network takes none, or puts a projection of its own before it."""
    if unet.config.encoder_hid_dim_type is not None:
        return None
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    if not any(getattr(block, "has_cross_attention", False) for block in blocks):
        return None
    width = unet.config.cross_attention_dim
    widths = {width} if isinstance(width, (int, type(None))) else set(width)
    return widths.pop() if len(widths) == 1 else None


def _width_message(got: int, wanted: int) -> str:
    family = f" ({WIDTHS[wanted]})" if wanted in WIDTHS else ""
    other = f" {got} is that of {WIDTHS[got]}." if got in WIDTHS else ""
    return f"encoder_hidden_states has width {got}; this UNet expects {wanted}{family}.{other}"


def timestep_tensor(
    timestep: torch.Tensor | numpy.ndarray | float | int, sample: torch.Tensor, steps: float = STEPS
) -> torch.Tensor:
    """A number, or a tensor or numpy array [] or [N] -> [N] on the sample's device.

    steps  of the schedule. A time outside of it is warned of, one that is not finite refused. The values of a tensor
           are read only where that waits for nothing: on a CPU; on a GPU with LDMFAST_DEBUG=1.
    Raises ValueError for anything else.
    """
    n = sample.shape[0]
    if isinstance(timestep, _NUMPY) and timestep.dtype.kind in "iuf":
        timestep = torch.from_numpy(numpy.array(timestep, "int64" if timestep.dtype.kind in "iu" else "float32"))
    if isinstance(timestep, bool) or not isinstance(timestep, (int, float, torch.Tensor)):
        kinds = "an int, a float or a tensor [] or [N]"
        raise ValueError(f"timestep must be {kinds}, of numpy or torch; got {type(timestep).__name__}")
    if not isinstance(timestep, torch.Tensor):
        _check_time([timestep], steps)
        dtype = torch.int64 if isinstance(timestep, int) else torch.float32
        return torch.full((n,), timestep, dtype=dtype, device=sample.device)
    if timestep.ndim > 1 or (timestep.ndim == 1 and timestep.shape[0] not in (1, n)):
        raise ValueError(f"timestep has shape {tuple(timestep.shape)}; expected () or ({n},), the sample's batch")
    if readable(timestep) and (timestep.device.type == "cpu" or _debugging()):
        _check_time(timestep.reshape(-1).tolist(), steps)
    return timestep.to(sample.device).expand(n)


def _check_time(times: list[float], steps: float) -> None:
    for t in times:
        if not math.isfinite(t):
            raise ValueError(f"timestep is {t}")
    lowest = 0 if all(isinstance(t, int) for t in times) else _LOWEST_NOISE_LEVEL
    outside = [t for t in times if not lowest <= t <= steps]
    if outside and steps < math.inf:
        warnings.warn(
            f"timestep {outside[0]} is outside anything a U-Net is trained on (0 to {steps - 1:.0f})", stacklevel=5
        )


def readable(x: torch.Tensor) -> bool:
    """Whether x holds values that Python may look at: not while somebody traces, transforms or fakes the call."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in (torch.Tensor, torch.nn.Parameter)
        and not x.is_meta
        and not torch.jit.is_tracing()
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def _debugging() -> bool:
    return os.environ.get("LDMFAST_DEBUG") == "1"


def check_values(**inputs: object) -> None:
    """With LDMFAST_DEBUG=1: raises ValueError for a tensor, or one in a list of tensors, with values not finite."""
    if not _debugging():
        return
    for name, value in inputs.items():
        several = isinstance(value, (list, tuple))
        for i, x in enumerate(value if several else (value,)):
            if isinstance(x, torch.Tensor) and readable(x) and not bool(torch.isfinite(x).all()):
                what = f"{name}[{i}]" if several else name
                raise ValueError(f"{what} has values that are not finite (seen because LDMFAST_DEBUG=1)")
