"""LoRA finetuning: a few low-rank layers learn a new collection, the pipeline they belong to stays as it is."""

import json
from pathlib import Path

import torch

from ldmfast.conditioning.text import TextEncoder
from ldmfast.data.collection import load_pictures
from ldmfast.models.lora import add_lora, save_lora
from ldmfast.pipeline import LatentDiffusionPipeline
from ldmfast.pipeline.load import load
from ldmfast.training import checkpoint, condition_sources, latents, parallel
from ldmfast.training.loop import Run, fit
from ldmfast.training.train_denoiser import loss_of, sheet


def train(data, model, folder, config, *, restart=False, quiet=False):
    """Finetune the saved pipeline `model` on the captioned folder `data`. Returns the losses.

    Writes checkpoints and pytorch_lora_weights.safetensors to `folder`.
    Raises ValueError for a model that is told something else than a caption, or more (SDXL).
    """
    accelerator = parallel.start(config)
    pipeline = _told_a_caption(model)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    torch.manual_seed(config.seed)
    add_lora(unet, config.rank, config.alpha or config.rank, config.targets.split(","))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    side = unet.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    pictures = load_pictures(data, side, split="train", captions=True)
    codes = latents.prepare(pictures, pipeline.vae, file=config.latents, accelerator=accelerator)
    conditioner = pipeline.conditioner
    described = [condition_sources.texts(row) for row in pictures.rows]
    descriptions = condition_sources.gather(conditioner, described, accelerator.device)
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = Run(unet, config, accelerator=accelerator)
    step = loss_of(
        unet, codes, descriptions, config, alphas=scheduler.alphas_cumprod, prediction=scheduler.config.prediction_type
    )
    history = fit(
        run, step, Path(folder, "lora.pt"), restart=restart, quiet=quiet, sample=lambda: sheet(pipeline, descriptions)
    )
    run.finish()
    if run.main:
        save_lora(unet, folder)
        checkpoint.write_text(Path(folder, "lora.json"), json.dumps({"model": str(model), "loss": history}, indent=1))
    return history


def _told_a_caption(model):
    """The pipeline of a saved folder, a released file, or None: the shipped model."""
    pipeline = load(model) if model else LatentDiffusionPipeline.from_pretrained()
    conditioner = getattr(pipeline, "conditioner", None)
    if not isinstance(conditioner, TextEncoder):
        told = "more than a caption" if conditioner is None else f"what {type(conditioner).__name__} takes"
        raise ValueError(f"train lora: {model} is told {told}; models that are told a caption can be finetuned here")
    return pipeline
