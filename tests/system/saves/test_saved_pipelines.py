"""A diffusers pipeline that holds our classes: what it saves names diffusers', and loads where ldmfast never was."""

from __future__ import annotations

import json
import subprocess
import sys

import diffusers
import pytest
import tiny
import torch

import ldmfast
from ldmfast.diffusion import catalogue

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
BARE = {"text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}


def text_parts():
    return {"unet": tiny.unet(), "vae": tiny.vae(), "scheduler": diffusers.DDIMScheduler(**SD)}


def plain_parts():
    return {"unet": tiny.unet2d(), "vqvae": tiny.vq(), "scheduler": diffusers.DDPMScheduler(**SD)}


def ours(parts):
    return {name: catalogue.take_over(part) for name, part in parts.items()}


def index(pipe, folder):
    pipe.save_pretrained(folder)
    return json.loads((folder / "model_index.json").read_text())


def text_pipeline(parts):
    return diffusers.StableDiffusionPipeline(**parts, **BARE, requires_safety_checker=False)


@pytest.mark.parametrize("way", ["given", "set afterwards", "compiled", "optimize", "from a pipeline"])
def test_a_pipeline_of_our_classes_saves_diffusers_names(way, tmp_path):
    stock = text_parts()
    if way == "given":
        pipe = text_pipeline(ours(stock))
    elif way == "from a pipeline":
        pipe = diffusers.StableDiffusionImg2ImgPipeline(**text_pipeline(ours(stock)).components)
    else:
        pipe = text_pipeline(stock)
        if way == "optimize":
            ldmfast.optimize(pipe)
        else:
            for name, part in ours(stock).items():
                setattr(pipe, name, torch.compile(part) if way == "compiled" and name == "unet" else part)
    found = index(pipe, tmp_path / "saved")
    wanted = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "DDIMScheduler"}
    assert {name: found[name] for name in wanted} == {name: ["diffusers", kind] for name, kind in wanted.items()}


def test_an_unconditional_pipeline_of_our_classes_saves_diffusers_names(tmp_path):
    found = index(diffusers.LDMPipeline(**ours(plain_parts())), tmp_path / "saved")
    assert found["unet"] == ["diffusers", "UNet2DModel"] and found["vqvae"] == ["diffusers", "VQModel"]
    assert found["scheduler"] == ["diffusers", "DDPMScheduler"]
    pndm = diffusers.PNDMPipeline(ldmfast.UNet2D.adopt(plain_parts()["unet"]), ldmfast.PNDMScheduler())
    assert pndm.config["scheduler"] == ("diffusers", "PNDMScheduler")


def test_what_is_saved_loads_without_ldmfast(tmp_path):
    text_pipeline(ours(text_parts())).save_pretrained(tmp_path / "saved")
    script = f"""
import sys, diffusers
pipe = diffusers.StableDiffusionPipeline.from_pretrained({str(tmp_path / "saved")!r}, **{BARE})
assert type(pipe.unet) is diffusers.UNet2DConditionModel and type(pipe.vae) is diffusers.AutoencoderKL
assert type(pipe.scheduler) is diffusers.DDIMScheduler and not any(m.startswith("ldmfast") for m in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_class_derived_from_ours_keeps_its_name():
    class Mine(ldmfast.UNet):
        pass

    pipe = text_pipeline({**text_parts(), "unet": Mine(**tiny.SD1)})
    assert pipe.config["unet"] == (Mine.__module__, "Mine")
    assert pipe.config["vae"] == ("diffusers", "AutoencoderKL")  # a stock part is recorded as ever
