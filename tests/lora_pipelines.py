"""Tiny whole pipelines of diffusers', of random weights, and LoRA files for them as kohya's trainer names its keys."""

from __future__ import annotations

from pathlib import Path

import diffusers
import tiny
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

TOKENS = 7


def tokenizer():
    """CLIP's, its vocabulary the letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["!", *letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    made = transformers.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    made.model_max_length = TOKENS
    return made


def _tower(kind, words: int, layers: int = 2):
    config = transformers.CLIPTextConfig(
        vocab_size=words,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=32,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
    )
    return kind(config).eval()


def stable_diffusion() -> diffusers.StableDiffusionPipeline:
    torch.manual_seed(7)
    reader = tokenizer()
    pipe = diffusers.StableDiffusionPipeline(
        tiny.vae(),
        _tower(transformers.CLIPTextModel, len(reader)),
        reader,
        tiny.unet(sample_size=8),
        diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_xl() -> diffusers.StableDiffusionXLPipeline:
    torch.manual_seed(7)
    first, second = tokenizer(), tokenizer()
    pipe = diffusers.StableDiffusionXLPipeline(
        tiny.vae(),
        _tower(transformers.CLIPTextModel, len(first)),
        _tower(transformers.CLIPTextModelWithProjection, len(first)),
        first,
        second,
        tiny.unet("sdxl", sample_size=8),
        diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_kohya(pipe, path: Path, seed: int, method: str = "lora", rank: int = 2, size: float = 0.3) -> Path:
    """A file that changes the attentions and feed-forwards of the U-Net and of its text encoders, at random."""
    generator, table = torch.Generator().manual_seed(seed), {}

    def new(*shape):
        return torch.randn(*shape, generator=generator) * size

    two = getattr(pipe, "text_encoder_2", None) is not None
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_" if two else "lora_te_"}
    prefixes |= {"text_encoder_2": "lora_te2_"} if two else {}
    for part, prefix in prefixes.items():
        for name, layer in getattr(pipe, part).named_modules():
            wanted = (
                (".attn" in name or ".ff." in name) if part == "unet" else (".self_attn." in name or ".mlp." in name)
            )
            if isinstance(layer, nn.Linear) and wanted:
                name = name if part == "unet" or name.startswith("text_model") else f"text_model.{name}"
                outputs, inputs = layer.weight.shape
                key = prefix + name.replace(".", "_")
                if method == "lora":
                    table[f"{key}.lora_down.weight"] = new(rank, inputs)
                    table[f"{key}.lora_up.weight"] = new(outputs, rank)
                else:
                    for i in (1, 2):
                        table[f"{key}.hada_w{i}_a"], table[f"{key}.hada_w{i}_b"] = new(outputs, rank), new(rank, inputs)
                table[f"{key}.alpha"] = torch.tensor(1.0)
    save_file(table, path)
    return path
