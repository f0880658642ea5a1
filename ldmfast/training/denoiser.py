"""Stage 2: train the denoiser on cached latents and caption states, and export the whole pipeline."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ldmfast.diffusion.objective import add_noise, denoising_loss
from ldmfast.diffusion.schedule import STEPS, alphas_cumprod, make_scheduler
from ldmfast.models import TextEncoder, UNet
from ldmfast.pipeline import TextToImagePipeline
from ldmfast.training import checkpoint
from ldmfast.training.autoencoder import encode_all
from ldmfast.training.autoencoder import load as load_autoencoder
from ldmfast.training.data import load_pictures
from ldmfast.training.loop import Run, fit


def build(config, latent_channels, latent_size, context_width):
    """A fresh U-Net with Stable Diffusion's blocks."""
    torch.manual_seed(config.seed)
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention))
    return UNet(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers,
        down_block_types=down,
        up_block_types=up,
        cross_attention_dim=context_width,
        attention_head_dim=tuple(c // config.head_width for c in config.channels),  # diffusers' name for head counts
        norm_num_groups=config.groups,
    )


@dataclass(frozen=True)
class Cache:
    """Everything a step reads, computed once: neither encoder runs while the denoiser trains."""

    mean: torch.Tensor  # [N, z, h, w]
    std: torch.Tensor  # [N, z, h, w]
    states: torch.Tensor  # [M, L, E], states[0] belongs to the empty caption
    first: torch.Tensor  # [N] index into states of a picture's first caption
    count: torch.Tensor  # [N] how many captions it has; they lie one after another

    def draw(self, config, draw):
        """A batch of latents [B, z, h, w] and caption states [B, L, E], on the draw's device."""
        index = draw.integers(len(self.mean))
        noise = draw.normal(*self.mean.shape[1:])
        plain, other, dropped = draw.uniform(3).unbind(1)
        other = torch.where(plain < config.plain_captions, 0, (other * self.count[index]).long())
        caption = torch.where(dropped < config.guidance_dropout, 0, self.first[index] + other)
        mean, std = self.mean[index].to(draw.device), self.std[index].to(draw.device)
        return mean + std * noise, self.states[caption].to(draw.device).float()


def make_cache(pictures, vae, encoder):
    """Encode every picture and every distinct list of captions."""
    mean, std = encode_all(vae, pictures)
    captions, start = [""], {}
    for row in pictures.rows:
        texts = tuple(row["texts"])
        if texts not in start:
            start[texts] = len(captions)
            captions.extend(texts)
    first = torch.tensor([start[tuple(row["texts"])] for row in pictures.rows])
    count = torch.tensor([len(row["texts"]) for row in pictures.rows])
    factor = vae.config.scaling_factor
    return Cache(mean * factor, std * factor, encoder.states(captions).half(), first, count)


def loss_of(model, cache, config):
    """The step's loss as a function of the Draw that the batch, the times and the noise come from."""
    alphas = alphas_cumprod(config.beta_start, config.beta_end)

    def step(draw):
        x0, context = cache.draw(config, draw)
        t = draw.integers(STEPS)
        noise = draw.normal(*x0.shape[1:])
        predicted = model(add_noise(x0, noise, alphas[t]), t.to(x0.device), encoder_hidden_states=context).sample
        return denoising_loss(
            predicted, x0, noise, alphas[t], prediction=config.prediction, gamma=config.min_snr
        )

    return step


def train(data, autoencoder, folder, config, *, restart=False, quiet=False):
    """Train on the folder `data` and write checkpoints and the finished pipeline to `folder`. Returns the losses."""
    vae, encoder = load_autoencoder(autoencoder), TextEncoder.from_pretrained(config.text_encoder)
    pictures = load_pictures(data, vae.config.sample_size, split="train", captions=True)
    cache = make_cache(pictures, vae, encoder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = Run(build(config, cache.mean.shape[1], cache.mean.shape[-1], encoder.width), config)
    step = loss_of(run.model, cache, config)
    history = fit(run, step, Path(folder, "denoiser.pt"), restart=restart, quiet=quiet)
    run.finish().cpu()
    if not run.main:
        return history
    scheduler = make_scheduler(config.beta_start, config.beta_end, config.prediction)
    pipeline = TextToImagePipeline(run.model, vae, scheduler, encoder, text_encoder_name=config.text_encoder)
    dtype = torch.float16 if config.export == "fp16" else torch.float32
    checkpoint.replace_folder(Path(folder, "pipeline"), lambda home: pipeline.save_pretrained(home, dtype=dtype))
    Path(folder, "denoiser.json").write_text(json.dumps({"loss": history}, indent=1))
    return history
