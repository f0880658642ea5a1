"""LoRA finetuning: a few low-rank layers learn a new collection, the pipeline they belong to stays as it is."""

import contextlib
import json
from pathlib import Path

import torch

from ldmfast import files
from ldmfast.conditioning.text import TextEncoder
from ldmfast.data.collection import CACHE, load_pictures
from ldmfast.models.encode_decode import downsampling
from ldmfast.models.lora import add_lora, save_lora
from ldmfast.pipeline import LatentDiffusionPipeline
from ldmfast.pipeline.load import load
from ldmfast.training import condition_sources, latents, parallel
from ldmfast.training.loop import fit
from ldmfast.training.run import Run
from ldmfast.training.train_denoiser import loss_of, sheet


def train(data, model, folder, config, *, restart=False, quiet=False):
    """Finetune the saved pipeline `model` on the captioned folder `data`. Returns the losses.

    Writes checkpoints and pytorch_lora_weights.safetensors to `folder`.
    Raises ValueError for a model that is conditioned on something else than a caption, or on more (SDXL).
    """
    accelerator = parallel.start(config)
    pipeline = _text_pipeline(model)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    torch.manual_seed(config.seed)
    add_lora(unet, config.rank, config.alpha or config.rank, config.targets.split(","))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    side = unet.config.sample_size * downsampling(pipeline.vae)
    pictures = load_pictures(
        data, side, split="train", captions=True, skip_broken=config.skip_broken, cache=Path(folder, CACHE)
    )
    codes = latents.prepare(pictures, pipeline.vae, file=config.latents, folder=folder, accelerator=accelerator)
    described = map(condition_sources.captions, pictures.rows)
    with accelerator.main_process_first() if config.states else contextlib.nullcontext():
        keeping = accelerator.device, folder, config.states
        source = condition_sources.gather(pipeline.conditioner, described, config, *keeping)
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = Run(unet, config, accelerator=accelerator)
    target = dict(alphas=scheduler.alphas_cumprod, prediction=scheduler.config.prediction_type)
    history = fit(
        run,
        loss_of(unet, codes, source, config, **target),
        Path(folder, "lora.pt"),
        restart=restart,
        quiet=quiet,
        sample=lambda: sheet(pipeline, source),
    )
    run.finish()
    if run.main:
        save_lora(unet, folder)
        files.write_text(Path(folder, "lora.json"), json.dumps({"model": str(model), "loss": history}, indent=1))
    return history


def _text_pipeline(model):
    """The pipeline of a saved folder, a released file, or None: the shipped model."""
    pipeline = load(model) if model else LatentDiffusionPipeline.from_pretrained()
    conditioner = getattr(pipeline, "conditioner", None)
    if not isinstance(conditioner, TextEncoder):
        found = "more than a caption" if conditioner is None else f"what {type(conditioner).__name__} takes"
        raise ValueError(f"train lora: {model} is conditioned on {found}; only models of a caption are finetuned here")
    return pipeline
