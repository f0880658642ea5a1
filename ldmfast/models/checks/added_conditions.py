"""What a U-Net takes in added_cond_kwargs, checked at its door: SDXL's pooled text and sizes, image prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_POOLED, _IDS = 1280, (6, 5)  # the width of SDXL's pooled text; how many time_ids the base model and the refiner take
_NEEDED = {  # by addition_embed_type or encoder_hid_dim_type
    "text_time": ("text_embeds", "time_ids"),
    "text_image": ("image_embeds",),
    "image": ("image_embeds",),
    "image_hint": ("image_embeds", "hint"),
    "text_image_proj": ("image_embeds",),
    "image_proj": ("image_embeds",),
    "ip_image_proj": ("image_embeds",),
}


def check_added(unet: UNet2DConditionModel, sample: torch.Tensor, added: Mapping[str, Any] | None) -> None:
    """Raises ValueError for what is missing in `added`, or of the wrong type or shape."""
    if added is not None and not isinstance(added, Mapping):
        raise ValueError(f"added_cond_kwargs must be a dict of tensors; got {type(added).__name__}")
    kinds = (unet.config.addition_embed_type, unet.config.encoder_hid_dim_type)
    wanted = [name for kind in kinds for name in _NEEDED.get(kind, ())]
    missing = [name for name in dict.fromkeys(wanted) if added is None or added.get(name) is None]
    if missing:
        raise ValueError(f"added_cond_kwargs needs {' and '.join(missing)}: this UNet {_takes(unet)}")
    if kinds[0] == "text_time":
        _check_text_time(unet, added["text_embeds"], added["time_ids"], sample.shape[0])


def _takes(unet) -> str:
    if unet.config.addition_embed_type != "text_time":
        return "is conditioned on pictures, too"
    width, total = unet.config.addition_time_embed_dim, unet.config.projection_class_embeddings_input_dim
    return (
        f"(SDXL's kind) takes text_embeds (B, T) and time_ids (B, n) with T + n * {width} = {total}; "
        f"SDXL's are (B, {_POOLED}) and (B, {_IDS[0]})"
    )


def _check_text_time(unet, text, ids, batch: int) -> None:
    """T + n * width = total leaves open which of two is wrong: SDXL's own T or n decides, where the total allows it."""
    width, total = unet.config.addition_time_embed_dim, unet.config.projection_class_embeddings_input_dim
    count = next((n for n in _IDS if total - n * width == _POOLED), _IDS[0] if total > _IDS[0] * width else _IDS[1])
    expected = {"text_embeds": (batch, total - count * width), "time_ids": (batch, count)}
    for name, value in (("text_embeds", text), ("time_ids", ids)):
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{name} must be a tensor {expected[name]}; got {type(value).__name__}")
    if text.ndim != 2 or text.shape[0] != batch:
        shape = tuple(text.shape)
        raise ValueError(f"text_embeds has shape {shape}; expected (B, T) with B = {batch}, the sample's batch")
    if text.numel() + ids.numel() * width == batch * total:
        return
    wrong = [
        f"{name}: expected {expected[name]}, got {tuple(value.shape)}"
        for name, value in (("text_embeds", text), ("time_ids", ids))
        if tuple(value.shape) != expected[name]
    ]
    raise ValueError("; ".join(wrong))
