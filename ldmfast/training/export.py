"""What a finished stage leaves in its folder: each file and folder is whole or absent."""

import json
from pathlib import Path

import torch

from ldmfast import files
from ldmfast.metrics.reconstruction import score

SCORED = 512  # pictures that an autoencoder's figures are means over


def write_autoencoder(folder, stage, vae, loss, pictures, history):
    """Write vae/ and the figures in `stage`.json; returns the figures.

    loss      the PictureLoss that it was trained with;   history  as `fit` returns it
    pictures  those that it was trained on
    """
    config = loss.config
    figures = {
        "trained": score(vae, pictures.sample(SCORED, config.seed)),
        **loss.networks(),
        "steps": config.steps,
        "loss": history,
    }
    vae = vae.half() if config.export == "fp16" else vae
    _write_folder(Path(folder, "vae"), vae.save_pretrained)
    _write_json(Path(folder, f"{stage}.json"), figures)
    return figures


def write_pipeline(folder, pipeline, config, history):
    """Write the finished pipeline/ and the losses in denoiser.json."""
    dtype = torch.float16 if config.export == "fp16" else torch.float32
    _write_folder(Path(folder, "pipeline"), lambda home: pipeline.save_pretrained(home, dtype=dtype))
    _write_json(Path(folder, "denoiser.json"), {"loss": history})


def _write_folder(folder, write):
    files.remove_leftovers(folder)
    with files.replacing_folder(folder) as partial:
        write(partial)


def _write_json(path, value):
    files.write_text(path, json.dumps(value, indent=1))
