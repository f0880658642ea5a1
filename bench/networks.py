"""The networks that the benchmarks run: SD1.5's U-Net and autoencoder in full size, with random weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ldmfast.commands.measuring.works import SDXL

GFLOP = 803  # of one 64x64 sample through the U-Net, counted


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights N(0, 1 / fan-in), so that activations stay near 1; norms and biases a little off 1 and 0."""
    if next(model.parameters()).is_meta:
        return model.eval().requires_grad_(False)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1, generator=generator)
    return model.eval().requires_grad_(False)


def empty(kind, dtype: torch.dtype, device: str, **config) -> torch.nn.Module:
    with torch.device("meta"):
        model = kind(**config)
    return model.to(dtype).to_empty(device=device)


def sd15(dtype: torch.dtype, device: str = "cpu") -> UNet2DConditionModel:
    """859.5 M parameters."""
    return randomise(empty(UNet2DConditionModel, dtype, device, sample_size=64, cross_attention_dim=768))


def sdxl(dtype: torch.dtype, device: str = "cpu") -> UNet2DConditionModel:
    """2567 M parameters: SDXL's U-Net."""
    return randomise(empty(UNet2DConditionModel, dtype, device, **SDXL))


def sdxl_added(batch: int, dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """SDXL's text_embeds [N, 1280] and time_ids [N, 6]."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(batch, 1280, generator=generator)
    ids = torch.tensor([[512.0, 512, 0, 0, 512, 512]]).expand(batch, -1)
    return text.to(device, dtype), ids.to(device, dtype)


def sd15_vae(dtype: torch.dtype, device: str = "cpu") -> AutoencoderKL:
    """83.7 M parameters."""
    config = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    }
    return randomise(empty(AutoencoderKL, dtype, device, **config))


def inputs(batch: int, dtype: torch.dtype, device: str = "cpu", size: int = 64, width: int = 768) -> dict:
    """Arguments of the U-Net's forward."""
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(batch, 4, size, size, generator=generator)
    context = torch.randn(batch, 77, width, generator=generator)
    return {
        "sample": sample.to(device, dtype),
        "timestep": torch.tensor(501, device=device),
        "encoder_hidden_states": context.to(device, dtype),
    }


def error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over norm."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()
