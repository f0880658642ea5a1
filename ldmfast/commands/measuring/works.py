"""The works that are timed and profiled: networks in full size with random weights, what goes in, and one step.

sd15   U-Net on two 64x64 latents, guidance and DDIM: a step of SD1.5 at 512x512
sdxl   the same with SDXL's U-Net on two 128x128 latents: 1024x1024
vae    the decoder, one 64x64 latent to 512x512
train  a training step of SD1.5's U-Net on four latents: loss, gradients, AdamW; float32 weights under autocast

`tiny` networks have the same blocks at a few channels, so that a machine without a GPU runs every line.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import torch.nn.functional as F

GUIDANCE = 7.5
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
TINY_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
CONFIGS = {  # (of the network, what is smaller in a tiny one, side of the latents)
    "sd15": (
        {"sample_size": 64, "cross_attention_dim": 768},
        {
            **TINY_UNET,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        64,
    ),
    "sdxl": (
        SDXL,
        {
            **TINY_UNET,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
        128,
    ),
    "vae": (
        {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "sample_size": 512,
        },
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 8,
            "layers_per_block": 1,
        },
        64,
    ),
}
CONFIGS["train"] = CONFIGS["sd15"]
TINY_SIDE = 8


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Weights N(0, 1 / fan-in), so that activations stay near 1; norms and biases a little off 1 and 0."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1, generator=generator)
    return model.eval().requires_grad_(False)


def made(kind: type, dtype: torch.dtype, device: str, config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        model = kind(**config)
    return randomised(model.to(dtype).to_empty(device=device))


class Work:
    """One of CONFIGS: both networks, made when they are first asked for, and a function that makes one step."""

    def __init__(self, name: str, dtype: torch.dtype, device: str, tiny: bool = False, batch: int | None = None):
        self.name, self.dtype, self.device = name, dtype, device
        config, smaller, side = CONFIGS[name]
        self.config = {**config, **smaller} if tiny else dict(config)
        self.side = TINY_SIDE if tiny else side
        self.batch = batch or (2 if tiny and name == "train" else {"train": 4}.get(name, 1))
        self.trains = name == "train"
        self.weights_dtype = torch.float32 if self.trains else dtype

    @property
    def what(self) -> str:
        side = f"{self.side}x{self.side}"
        if self.name == "vae":
            return f"decoder of SD1.5's autoencoder, {self.batch} latent {side}"
        if self.trains:
            return f"training step of SD1.5's U-Net, {self.batch} latents {side}: loss, gradients, AdamW"
        family = {"sd15": "SD1.5", "sdxl": "SDXL"}[self.name]
        # bench_files.py and the page of `ldmfast report` know a step by how this begins
        return f"{family} step with guidance: U-Net on {2 * self.batch} {side} latents, guidance, DDIM"

    @functools.cached_property
    def stock(self) -> torch.nn.Module:
        kind = diffusers.AutoencoderKL if self.name == "vae" else diffusers.UNet2DConditionModel
        return made(kind, self.weights_dtype, self.device, self.config)

    @functools.cached_property
    def ours(self) -> torch.nn.Module:
        from ldmfast import AutoencoderKL, UNet

        kind = AutoencoderKL if self.name == "vae" else UNet
        return kind.adopt(copy.deepcopy(self.stock))

    def shaped(self) -> torch.nn.Module:
        """Our network with every parameter a view of one number: its calls have the right shapes and cost no memory."""
        from ldmfast import AutoencoderKL, UNet

        kind = AutoencoderKL if self.name == "vae" else UNet
        with torch.device("meta"):
            model = kind.adopt(kind.stock(**self.config)).eval()
        one = torch.zeros((), dtype=self.weights_dtype, device=self.device)
        for module in model.modules():
            for name, value in module.named_parameters(recurse=False):
                setattr(module, name, torch.nn.Parameter(one.expand(value.shape), requires_grad=False))
        return model

    def tensor(self, *shape: int, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(self.device, self.dtype)

    def prompt(self, count: int) -> dict[str, Any]:
        """What the U-Net is conditioned on, `count` prompts of 77 tokens."""
        found = {"encoder_hidden_states": self.tensor(count, 77, self.config["cross_attention_dim"])}
        if "addition_embed_type" in self.config:
            times = 6 * self.config["addition_time_embed_dim"]
            width = self.config["projection_class_embeddings_input_dim"] - times
            ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]]).expand(count, -1)
            embeds = self.tensor(count, width)
            found["added_cond_kwargs"] = {"text_embeds": embeds, "time_ids": ids.to(self.device, self.dtype)}
        return found

    def step(self, network: Callable, ours: bool, recorded: bool) -> Callable[[], torch.Tensor]:
        """A function that makes one step with `network`, which is called as this work's models are.

        recorded  the step will be in a CUDA graph: stock's scheduler is given the timestep as a number, since it would
                  wait for the device to read one
        """
        if self.name == "vae":
            latents = self.tensor(self.batch, 4, self.side, self.side)
            return lambda: network(latents, return_dict=False)[0]
        if self.trains:
            return self._training(network)
        return self._sampling(network, ours, recorded)

    def network(self, ours: bool) -> Callable:
        """What `step` calls: the model, or the autoencoder's decoder."""
        model = self.ours if ours else self.stock
        return model.decode if self.name == "vae" else model

    def passed(self) -> None:
        """One pass of our network: what a step is without its scheduler."""
        network = self.network(True)
        if self.name == "vae":
            network(self.tensor(self.batch, 4, self.side, self.side), return_dict=False)
            return
        latents = self.tensor(2 * self.batch, self.config.get("in_channels", 4), self.side, self.side)
        t = torch.full((2 * self.batch,), 501, device=self.device)
        network(latents, t, **self.prompt(2 * self.batch), return_dict=False)

    def _sampling(self, network, ours, recorded):
        from ldmfast import DDIMScheduler

        kind = DDIMScheduler if ours else diffusers.DDIMScheduler
        scheduler = kind(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
        scheduler.set_timesteps(50, self.device)
        t = scheduler.timesteps[20]
        at = t if ours or not recorded else int(t)
        latents = self.tensor(self.batch, self.config.get("in_channels", 4), self.side, self.side)
        prompt = self.prompt(2 * self.batch)

        def run():
            output = network(torch.cat([latents, latents]), t, **prompt, return_dict=False)[0]
            if ours:
                return scheduler.step(output, at, latents, guidance=GUIDANCE, return_dict=False)[0]
            unconditional, conditional = output.chunk(2)
            output = unconditional + GUIDANCE * (conditional - unconditional)
            return scheduler.step(output, at, latents, return_dict=False)[0]

        return run

    def _training(self, network):
        model = network.requires_grad_(True).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        x, noise = (self.tensor(self.batch, 4, self.side, self.side, seed=seed) for seed in (1, 2))
        t, prompt = torch.arange(self.batch, device=self.device) * 200 + 1, self.prompt(self.batch)

        def run():
            with torch.enable_grad(), torch.autocast(self.device, self.dtype):
                loss = F.mse_loss(model(x, t, **prompt, return_dict=False)[0].float(), noise.float())
            loss.backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            return loss.detach()

        return run
