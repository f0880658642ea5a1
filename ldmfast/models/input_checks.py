"""What a U-Net refuses at its door, with a sentence that says what came and what was wanted.

The checks read shapes and dtypes only, never values, so that they cost no synchronisation on a GPU. With the
environment variable LDMFAST_DEBUG=1 the inputs' values are looked at too.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ldmfast.models.guard import plain
from ldmfast.models.weight_files import WIDTHS

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel, UNet2DModel


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
    _check_added(unet, sample, added)
    if class_labels is not None and unet.class_embedding is not None and len(class_labels) != len(sample):
        raise ValueError(f"class_labels has batch {len(class_labels)}, sample has batch {len(sample)}")
    for name, mask in masks.items():
        if mask is not None and (mask.ndim != 2 or mask.shape[0] not in (1, len(sample))):
            raise ValueError(f"{name} has shape {tuple(mask.shape)}; expected (batch, keys), batch {len(sample)}")
    mask = masks["encoder_attention_mask"]
    if mask is not None and isinstance(context, torch.Tensor) and mask.shape[1] != context.shape[1]:
        raise ValueError(f"encoder_attention_mask covers {mask.shape[1]} keys; the context has {context.shape[1]}")
    if os.environ.get("LDMFAST_DEBUG") == "1":
        _check_finite(sample=sample, encoder_hidden_states=context)


def check_sample(unet: UNet2DConditionModel | UNet2DModel, sample: torch.Tensor) -> None:
    """The noisy latents: rank, channels, dtype. Raises ValueError."""
    if not isinstance(sample, torch.Tensor) or sample.ndim != 4:
        got = tuple(sample.shape) if isinstance(sample, torch.Tensor) else type(sample).__name__
        raise ValueError(f"sample must be a tensor [N, C, H, W]; got {got}")
    if not plain(unet.conv_in):
        return
    channels, weight = unet.conv_in.in_channels, unet.conv_in.weight
    if sample.shape[1] != channels and unet.config.get("addition_embed_type") != "image_hint":
        more = " (a 9-channel U-Net takes latents, mask and masked latents, concatenated)" if channels == 9 else ""
        raise ValueError(f"sample has {sample.shape[1]} channels; this UNet expects {channels}{more}")
    if sample.dtype != weight.dtype and not torch.is_autocast_enabled(sample.device.type):
        raise ValueError(_dtype_message("sample", sample.dtype, weight.dtype))


def _dtype_message(name: str, got: torch.dtype, wanted: torch.dtype) -> str:
    wanted = str(wanted).removeprefix("torch.")
    return f"{name} is {str(got).removeprefix('torch.')} and this UNet {wanted}; cast one: {name}.to(torch.{wanted})"


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
    widths = {width} if isinstance(width, int | None) else set(width)
    return widths.pop() if len(widths) == 1 else None


def _width_message(got: int, wanted: int) -> str:
    family = f" ({WIDTHS[wanted]})" if wanted in WIDTHS else ""
    other = f" {got} is that of {WIDTHS[got]}." if got in WIDTHS else ""
    return f"encoder_hidden_states has width {got}; this UNet expects {wanted}{family}.{other}"


def _check_added(unet, sample, added) -> None:
    if unet.config.addition_embed_type != "text_time":
        return
    width, total = unet.config.addition_time_embed_dim, unet.config.projection_class_embeddings_input_dim
    missing = [name for name in ("text_embeds", "time_ids") if added is None or added.get(name) is None]
    if missing:
        raise ValueError(
            f"added_cond_kwargs needs {' and '.join(missing)}: this UNet (SDXL's kind) takes text_embeds (B, T) and "
            f"time_ids (B, n) with T + n * {width} = {total}; SDXL's are (B, 1280) and (B, 6)"
        )
    text, ids, n = added["text_embeds"], added["time_ids"], len(sample)
    if text.ndim != 2 or len(text) != n:
        raise ValueError(f"text_embeds has shape {tuple(text.shape)}; expected (B, T) with B = {n}, the sample's batch")
    if text.numel() + ids.numel() * width == n * total:
        return
    if (total - text.shape[1]) % width == 0 and total > text.shape[1]:
        raise ValueError(f"time_ids: expected ({n}, {(total - text.shape[1]) // width}), got {tuple(ids.shape)}")
    wanted = total - ids.shape[-1] * width
    raise ValueError(f"text_embeds: expected ({n}, {wanted}), got {tuple(text.shape)}")


def timestep_tensor(timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
    """An int, a float, or a tensor [] or [N] -> [N] on the sample's device. Raises ValueError for anything else."""
    n = len(sample)
    if isinstance(timestep, bool) or not isinstance(timestep, int | float | torch.Tensor):
        raise ValueError(f"timestep must be an int, a float or a tensor [] or [N]; got {type(timestep).__name__}")
    if not isinstance(timestep, torch.Tensor):
        if not math.isfinite(timestep):
            raise ValueError(f"timestep is {timestep}")
        if isinstance(timestep, int) and not 0 <= timestep < 10_000:
            warnings.warn(f"timestep {timestep} is outside anything a U-Net is trained on (0 to 999)", stacklevel=4)
        dtype = torch.int64 if isinstance(timestep, int) else torch.float32
        return torch.full((n,), timestep, dtype=dtype, device=sample.device)
    if timestep.ndim > 1 or (timestep.ndim == 1 and len(timestep) not in (1, n)):
        raise ValueError(f"timestep has shape {tuple(timestep.shape)}; expected () or ({n},), the sample's batch")
    return timestep.to(sample.device).expand(n)


def add_residuals(skips: tuple[torch.Tensor, ...], residuals: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The skips with a ControlNet's residuals added. Raises ValueError if their count or a shape differs."""
    if len(residuals) != len(skips):
        raise ValueError(
            f"down_block_additional_residuals has {len(residuals)} tensors; this UNet has {len(skips)} skips"
        )
    return tuple(
        add_residual(f"down_block_additional_residuals[{i}]", skip, residual)
        for i, (skip, residual) in enumerate(zip(skips, residuals, strict=True))
    )


def add_residual(name: str, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    if residual.shape[1:] != x.shape[1:] or residual.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{name} has shape {tuple(residual.shape)}; expected {tuple(x.shape)}")
    return x + residual


def _check_finite(**tensors) -> None:
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor) and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} has values that are not finite (seen because LDMFAST_DEBUG=1)")
