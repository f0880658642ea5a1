"""Stage 2: train the denoiser on cached latents and what it is told of them, and export the whole pipeline."""

import json
from pathlib import Path

import torch

from ldmfast.data.collection import load_pictures
from ldmfast.diffusion.loss import add_noise, denoising_loss
from ldmfast.diffusion.schedule import alphas_cumprod, make_scheduler
from ldmfast.models import UNet
from ldmfast.models.encode_decode import downsampling
from ldmfast.models.unet2d import UNet2D
from ldmfast.pictures import grid
from ldmfast.pipeline import LatentDiffusionPipeline
from ldmfast.training import checkpoint, condition_sources, latents, parallel, picture_sources
from ldmfast.training.loop import Run, fit
from ldmfast.training.train_autoencoder import load as load_autoencoder

SHOWN = 16  # pictures of a sample grid
POOLING_HEADS = 8


def build(config, latent_channels, latent_size, context_width, joined=0, classes=None, pooled=False):
    """A fresh U-Net with Stable Diffusion's blocks.   joined  channels that a condition adds to the latent's
    classes  how many classes are told by a label; None for none
    pooled   whether an attention pools the context into one vector that is added to the time's embedding

    Without a context (context_width None) it is a UNet2D, whose attention is among the latent's own places.
    """
    torch.manual_seed(config.seed)
    crosses = context_width is not None
    kind = "CrossAttn" if crosses else "Attn"
    settings = dict(
        sample_size=latent_size,
        in_channels=latent_channels + joined,
        out_channels=latent_channels,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers,
        down_block_types=tuple(f"{kind}DownBlock2D" if a else "DownBlock2D" for a in config.attention),
        up_block_types=tuple(f"{kind}UpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)),
        norm_num_groups=config.groups,
        num_class_embeds=classes,
        resnet_time_scale_shift=config.time_embedding,
    )
    if not crosses:
        return UNet2D(**settings, attention_head_dim=config.head_width)
    heads = tuple(c // config.head_width for c in config.channels)  # diffusers' name for head counts
    pooling = {"addition_embed_type": "text", "addition_embed_type_num_heads": POOLING_HEADS} if pooled else {}
    return UNet(**settings, **pooling, cross_attention_dim=context_width, attention_head_dim=heads)


def network(config, shape, conditioner):
    """The U-Net for latents of `shape` (z, h, w) and what `conditioner` says; with it, if it is trained jointly."""
    empty = conditioner.empty(1)
    if empty.label is not None and empty.label.is_floating_point():
        raise ValueError("a U-Net told by a label that is a vector is not built here; pass `unet` to denoiser.train")
    width = None if empty.context is None else empty.context.shape[-1]
    joined = 0 if empty.concat is None else empty.concat.shape[1]
    classes = None if empty.label is None else int(empty.label.max()) + 1  # "no class" is the last of them
    pooled = getattr(config, "pooled_text", False) and width is not None
    return build(config, shape[0], shape[-1], width, joined, classes, pooled)


def learner(unet, conditioner, config):
    """What the run optimises: the U-Net, beside it the conditioner where that is trained jointly."""
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return torch.nn.ModuleDict({"unet": unet, "conditioner": conditioner}) if conditioner.trainable else unet


def loss_of(unet, codes, descriptions, config, *, alphas=None, prediction=None):
    """The step's loss as a function of the Draw that the batch, the times and the noise come from.

    codes  Latents;   descriptions  Told or Shown
    alphas, prediction   of a model that has its own: cumulative products [T], and what it predicts
    """
    alphas = alphas_cumprod(config.beta_start, config.beta_end) if alphas is None else alphas.double().cpu()
    prediction = prediction or config.prediction

    def step(draw):
        index = draw.integers(len(codes))
        x0 = codes.draw(index, draw)
        condition = descriptions.draw(index, config, draw)
        t, noise = draw.integers(len(alphas)), draw.normal(*codes.shape)
        alpha_t = alphas[t].to(draw.device)
        predicted = condition.predict(unet, add_noise(x0, noise, alpha_t), t.to(draw.device))
        return denoising_loss(predicted, x0, noise, alpha_t, prediction=prediction, gamma=config.min_snr)

    return step


def train(data, autoencoder, folder, config, *, conditioner=None, describe=None, unet=None, restart=False, quiet=False):
    """Train on the folder `data` and write checkpoints and the finished pipeline to `folder`. Returns the losses.

    conditioner, describe   a Conditioner and the function from a row of the collection to the inputs that describe it;
                            by default those that config.condition names
    unet                    the network to train; by default a fresh one of config's size
    """
    accelerator = parallel.start(config)
    vae = load_autoencoder(autoencoder)
    captions = conditioner is None and config.condition in ("text", "transformer")
    pictures = load_pictures(data, vae.config.sample_size, split="train", captions=captions)
    codes = latents.prepare(pictures, vae, file=config.latents, scale=config.latent_scale, accelerator=accelerator)
    if conditioner is None and config.condition in ("inpainting", "super-resolution"):
        conditioner = picture_sources.make(config.condition, codes.shape[0]).bind(vae)
        descriptions = picture_sources.Shown(conditioner, pictures, downsampling(vae))
    else:
        if conditioner is None:
            conditioner, describe = condition_sources.make(config, pictures.rows)
        described = [describe(row) for row in pictures.rows]
        descriptions = condition_sources.gather(conditioner, described, accelerator.device)
    unet = unet or network(config, codes.shape, conditioner)
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = Run(learner(unet, conditioner, config), config, accelerator=accelerator)
    scheduler = make_scheduler(config.beta_start, config.beta_end, config.prediction)
    pipeline = LatentDiffusionPipeline(unet, vae, scheduler, conditioner)
    history = fit(
        run,
        loss_of(unet, codes, descriptions, config),
        Path(folder, "denoiser.pt"),
        restart=restart,
        quiet=quiet,
        sample=lambda: sheet(pipeline, descriptions),
    )
    run.finish()
    if run.main:
        export(pipeline.to("cpu"), folder, config, history)
    return history


def sheet(pipeline, descriptions):
    """A PIL picture of SHOWN samples; the same inputs and seeds each time."""
    pipeline.to(pipeline.unet.device)  # a first stage whose latents were kept has not run yet
    return grid(pipeline(**descriptions.sheet(SHOWN), seeds=0), None, 1)


def export(pipeline, folder, config, history):
    """Write the finished pipeline and the losses; each is complete or absent."""
    dtype = torch.float16 if config.export == "fp16" else torch.float32
    checkpoint.replace_folder(Path(folder, "pipeline"), lambda home: pipeline.save_pretrained(home, dtype=dtype))
    checkpoint.write_text(Path(folder, "denoiser.json"), json.dumps({"loss": history}, indent=1))
