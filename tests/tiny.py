"""Tiny random networks in the shapes of the families, how far two answers are apart, and where the test data lies."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel, VQModel

CUTOUTS = Path(__file__).parent / "data" / "emoji"

SD1 = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
}
SD2 = {**SD1, "use_linear_projection": True, "attention_head_dim": (2, 4, 8), "upcast_attention": True}
SDXL = {
    **SD2,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 64,
    "attention_head_dim": (2, 4),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "transformer_layers_per_block": (1, 2),
    "projection_class_embeddings_input_dim": 80,
}
INPAINTING = {**SD1, "in_channels": 9}
FAMILIES = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "inpainting": INPAINTING}


def unet(family: str = "sd1", **changes) -> UNet2DConditionModel:
    """A stock network in inference mode, its norms and biases random too."""
    model = UNet2DConditionModel(**{**FAMILIES[family], **changes}).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs(model, size=(16, 16), batch: int = 2, tokens: int = 7) -> dict:
    """Arguments of its forward."""
    arguments = {
        "sample": torch.randn(batch, model.config.in_channels, *size),
        "timestep": torch.tensor([30, 700])[:batch],
        "encoder_hidden_states": torch.randn(batch, tokens, model.config.cross_attention_dim),
    }
    if model.config.addition_embed_type == "text_time":
        arguments["added_cond_kwargs"] = {"text_embeds": torch.randn(batch, 32), "time_ids": torch.rand(batch, 6) * 9}
    return arguments


def vae(**changes) -> AutoencoderKL:
    config = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "sample_size": 32,
    }
    return AutoencoderKL(**{**config, **changes}).eval()


def unet2d() -> UNet2DModel:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(block_out_channels=(32, 64), attention_head_dim=32, layers_per_block=1, **blocks).eval()


def vq() -> VQModel:
    return VQModel(block_out_channels=(32,), norm_num_groups=32).eval()


def to(tree, dtype: torch.dtype):
    """Every floating tensor in a dict of arguments in `dtype`."""
    if isinstance(tree, dict):
        return {name: to(value, dtype) for name, value in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(to(value, dtype) for value in tree)
    return tree.to(dtype) if isinstance(tree, torch.Tensor) and tree.is_floating_point() else tree


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over norm."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
