"""Stage 2: train the denoiser on cached latents and their conditions, and export the whole pipeline."""

import contextlib
import json
from pathlib import Path

import torch

from ldmfast import files
from ldmfast.data import vocabulary
from ldmfast.data.collection import CACHE, load_pictures
from ldmfast.diffusion.loss import add_noise, denoising_loss
from ldmfast.diffusion.schedule import alphas_cumprod, make_scheduler
from ldmfast.models import UNet
from ldmfast.models.unet2d import UNet2D
from ldmfast.pictures import grid
from ldmfast.pipeline import LatentDiffusionPipeline, saved_autoencoder
from ldmfast.training import checkpoint, condition_sources, latents, parallel
from ldmfast.training.first_weights.of_a_model import begin_with
from ldmfast.training.loop import fit
from ldmfast.training.run import Run

SHOWN = 16  # pictures of a sample grid
POOLING_HEADS = 8


def build(config, latent_channels, latent_size, context_width, joined=0, classes=None, pooled=False):
    """A fresh U-Net with Stable Diffusion's blocks.   joined  channels that a condition adds to the latent's
    classes  how many classes a label chooses from; None for none
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
    """A fresh U-Net for latents of `shape` (z, h, w) and the conditions that `conditioner` makes."""
    empty = conditioner.empty(1)
    if empty.label is not None and empty.label.is_floating_point():
        raise ValueError("a U-Net whose label is a vector is not built here; pass `unet` to train_denoiser.train")
    width = None if empty.context is None else empty.context.shape[-1]
    joined = 0 if empty.concat is None else empty.concat.shape[1]
    classes = None if empty.label is None else int(empty.label.max()) + 1  # "no class" is the last of them
    pooled = getattr(config, "pooled_text", False) and width is not None
    unet = build(config, shape[0], shape[-1], width, joined, classes, pooled)
    if config.first_weights:
        begin_with(unet, config.first_weights)
    return unet


def learner(unet, conditioner, config):
    """What the run optimises: the U-Net, beside it the conditioner where that is trained jointly."""
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return torch.nn.ModuleDict({"unet": unet, "conditioner": conditioner}) if conditioner.trainable else unet


def loss_of(unet, codes, source, config, *, alphas=None, prediction=None):
    """The loss of a Step, a scalar: it draws the batch, the times and the noise.

    codes  Latents;   source  InputSource or PictureSource
    alphas, prediction   of a model that has its own: cumulative products [T], and what it predicts
    """
    alphas = alphas_cumprod(config.beta_start, config.beta_end) if alphas is None else alphas.double().cpu()
    prediction = prediction or config.prediction

    def loss(step):
        index = step.integers(len(codes))
        x0 = codes.sample_latents(index, step)
        condition = source.conditions_of(index, step)
        t, noise = step.integers(len(alphas)), step.normal(*codes.shape)
        alpha_t = alphas[t].to(step.device)
        predicted = condition.predict(unet, add_noise(x0, noise, alpha_t), t.to(step.device))
        return denoising_loss(predicted, x0, noise, alpha_t, prediction=prediction, gamma=config.min_snr)

    return loss


def train(data, autoencoder, folder, config, *, conditioner=None, describe=None, unet=None, restart=False, quiet=False):
    """Train on the folder `data` and write checkpoints and the finished pipeline to `folder`. Returns the losses.

    conditioner, describe   a Conditioner and the function from a row of the collection to the inputs that describe it;
                            by default those that config.condition names
    unet                    the network to train; by default a fresh one of config's size
    """
    vae = saved_autoencoder.load(autoencoder)
    captions = conditioner is None and config.condition in ("text", "transformer")
    reading = dict(captions=captions, skip_broken=config.skip_broken, cache=Path(folder, CACHE))
    pictures = load_pictures(data, vae.config.sample_size, split="train", **reading)
    own = dict(conditioner=conditioner, describe=describe, unet=unet)
    return train_on(pictures, vae, folder, config, **own, restart=restart, quiet=quiet)


def train_on(pictures, vae, folder, config, *, conditioner=None, describe=None, unet=None, restart=False, quiet=False):
    """`train` on a collection and an autoencoder that are loaded already."""
    accelerator = parallel.start(config)
    keeping = dict(file=config.latents, folder=folder)
    codes = latents.prepare(pictures, vae, **keeping, scale=config.latent_scale, accelerator=accelerator)
    with accelerator.main_process_first() if config.states else contextlib.nullcontext():
        if conditioner is None:
            source = condition_sources.make(config, pictures, vae, codes.shape[0], accelerator.device, folder)
        else:
            described = map(describe, pictures.rows)
            source = condition_sources.gather(conditioner, described, config, accelerator.device, folder, config.states)
    unet = unet or network(config, codes.shape, source.conditioner)
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = Run(learner(unet, source.conditioner, config), config, accelerator=accelerator)
    scheduler = make_scheduler(config.beta_start, config.beta_end, config.prediction)
    pipeline = LatentDiffusionPipeline(unet, vae, scheduler, source.conditioner)
    history = fit(
        run,
        loss_of(unet, codes, source, config),
        Path(folder, "denoiser.pt"),
        restart=restart,
        quiet=quiet,
        sample=lambda: sheet(pipeline, source),
    )
    run.finish()
    if run.main:
        write_pipeline(folder, pipeline.to("cpu"), config, history)
        if conditioner is None and config.condition in ("text", "transformer"):
            vocabulary.write(Path(folder, "pipeline"), vocabulary.of_rows(pictures.rows))
    return history


def sheet(pipeline, source):
    """A PIL picture of SHOWN samples; the same inputs and seeds each time."""
    pipeline.to(pipeline.unet.device)  # an autoencoder whose latents were kept has not run yet
    return grid(pipeline(**source.sheet(SHOWN), seeds=0), None, 1)


def write_pipeline(folder, pipeline, config, history):
    """Write the finished pipeline/ and the losses in denoiser.json."""
    dtype = torch.float16 if config.export == "fp16" else torch.float32
    checkpoint.replace_folder(Path(folder, "pipeline"), lambda home: pipeline.save_pretrained(home, dtype=dtype))
    files.write_text(Path(folder, "denoiser.json"), json.dumps({"loss": history}, indent=1))
