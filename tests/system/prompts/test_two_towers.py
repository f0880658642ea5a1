"""SDXL by a conditioner of two text towers, beside diffusers' own pipeline."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import tiny
import torch
import transformers
from tiny_pipelines import array, scheduler

from ldmfast import UNet
from ldmfast.conditioning.base import Unconditional
from ldmfast.conditioning.hybrid import Hybrid
from ldmfast.conditioning.text_sdxl import TwoTextEncoders
from ldmfast.models import AutoencoderKL
from ldmfast.pipeline import LatentDiffusionPipeline

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers


def test_sdxl_by_a_conditioner_of_two_text_towers():
    """As diffusers' own pipeline: the same context, pooled state and sizes, the empty caption all zeros."""
    pipe = stable_diffusion_xl()
    ours = LatentDiffusionPipeline(
        UNet.from_unet(pipe.unet),
        AutoencoderKL.adopt(pipe.vae),
        pipe.scheduler,
        TwoTextEncoders([pipe.text_encoder, pipe.text_encoder_2], [pipe.tokenizer, pipe.tokenizer_2], name="tiny"),
    )
    wanted = pipe(
        "a b", num_inference_steps=3, guidance_scale=4.0, latents=ours.noise([5]), height=32, width=32
    ).images[0]
    got = ours("a b", steps=3, guidance=4.0, seeds=5)[0]
    assert got.size == (32, 32) and np.abs(array(got) - array(wanted)).max() <= 2
    with pytest.raises(ValueError, match="a caption must be a string; got 3"):
        ours([3], steps=1)
    most = min(tower.config.max_position_embeddings for tower in (pipe.text_encoder, pipe.text_encoder_2))
    long = "a " * most
    assert ours.conditioner.truncated_captions(["a b", long]) == [(long, most)]
    beside = Hybrid(text=ours.conditioner, label=Unconditional())
    assert beside.truncated_captions([{"text": long}, {"label": None}, {"text": "a"}, "a text", None]) == [(long, most)]


class Words:
    """A tokenizer of one token a letter."""

    model_max_length, added_tokens_encoder, tokenize = 7, {}, staticmethod(list)
    bos_token_id, eos_token_id, pad_token_id = 0, 51, 51

    def __call__(self, captions, add_special_tokens=True, **_):
        if not add_special_tokens:
            return {"input_ids": [ord(c) % 50 for c in captions]}
        ids = [([0] + [ord(c) % 50 for c in text] + [51] * 7)[:6] + [51] for text in captions]
        return transformers.BatchEncoding({"input_ids": torch.tensor(ids)})


def stable_diffusion_xl():
    torch.manual_seed(6)
    text = dict(
        hidden_size=32,
        intermediate_size=32,
        projection_dim=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=52,
        max_position_embeddings=7,
        bos_token_id=0,
        eos_token_id=51,
    )
    config = transformers.CLIPTextConfig(**text)
    towers = transformers.CLIPTextModel(config), transformers.CLIPTextModelWithProjection(config)
    unet = tiny.unet("sdxl", sample_size=8)
    pipe = diffusers.StableDiffusionXLPipeline(
        tiny.vae(), *(tower.eval() for tower in towers), Words(), Words(), unet, scheduler(), add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
