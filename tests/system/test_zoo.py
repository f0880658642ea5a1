"""Every released model: its layout, narrowed where it would not fit, loads to the right numbers, goes there and back.

python tests/system/test_zoo.py      the table of rows
"""

# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub reads it: the table would wait for the hub's tokenizer

import pytest
import released_layout as layout
import released_reference as reference
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import ldmfast
from ldmfast.released.conversion import convert

CLOSE = 1e-5  # norm of the difference over norm, float32
CH = 32  # in place of 128 to 320: what 32 groups need


@dataclasses.dataclass
class Row:
    """A released model, narrowed: its tables, and what the released configuration says beside them."""

    unet: dict
    stage: dict
    condition: dict
    betas: tuple
    heads: object
    context: int | None = None
    buffers: dict = dataclasses.field(default_factory=dict)
    ema: bool = False
    suffix: str = ".safetensors"


def kl(z, mult, at=()):
    return layout.autoencoder(z, CH, mult, at=at)


def vq(z, mult, at=(), mid=True):
    return layout.autoencoder(z, CH, mult, codebook=64, at=at, mid=mid)


def width_32(channels):
    return channels // 32


def eight(channels):
    return 8


def one(channels):
    return 1


KL8, VQ4 = (lambda: kl(4, (1, 2, 4, 4))), (lambda: vq(3, (1, 2, 4)))
AUTOENCODERS = {
    "kl-f4": lambda: kl(3, (1, 2, 4)),
    "kl-f8": KL8,
    "kl-f16": lambda: kl(16, (1, 1, 2, 2, 4), (16,)),
    "kl-f32": lambda: kl(64, (1, 1, 2, 2, 4, 4), (16, 8)),
    "vq-f4": VQ4,
    "vq-f8": lambda: vq(4, (1, 2, 2, 4), (32,)),
    "vq-f16": lambda: vq(8, (1, 1, 2, 2, 4), (16,)),
}


def faces(**more):
    return Row(layout.denoiser(3, 3, CH, (1, 2, 3, 4), (8, 4, 2)), VQ4(), {}, (0.0015, 0.0195), width_32, **more)


def churches():
    unet = layout.denoiser(4, 4, CH, (1, 2, 2, 4, 4), (1, 2, 4, 8), scale_shift=True, updown=True)
    return Row(unet, KL8(), {}, (0.0015, 0.0155), eight, buffers={"scale_factor": torch.tensor(0.22)})


def crossing(inputs, mult, ds, stage, condition, betas, heads, context, **more):
    unet = layout.denoiser(inputs, inputs, CH, mult, ds, context=context, depth=more.pop("depth", 1))
    return Row(unet, stage, condition, betas, heads, context, **more)


def classes(count):
    return {"embedding.weight": (count, 64)}


def inpainting_big():
    stage = vq(3, (1, 2, 4), mid=False)
    unet = layout.denoiser(7, 3, CH, (1, 2, 3, 4), (8, 4, 2), updown=True)
    return Row(unet, stage, dict(stage), (0.0015, 0.0205), eight)  # its condition is the autoencoder itself


DENOISERS = {
    "celeba256": lambda: faces(ema=True),
    "ffhq256": lambda: faces(),
    "lsun_beds256": lambda: faces(suffix=".ckpt"),
    "lsun_churches256": churches,
    "cin256": lambda: crossing(
        4, (1, 2, 4), (4, 2, 1), vq(4, (1, 2, 2, 4), (32,)), classes(1000), (0.0015, 0.0195), width_32, 64, ema=True
    ),
    "cin256-v2": lambda: crossing(3, (1, 2, 3, 5), (8, 4, 2), VQ4(), classes(1001), (0.0015, 0.0195), one, 64),
    "text2img 1.45B": lambda: crossing(
        4, (1, 2, 4, 4), (4, 2, 1), KL8(), layout.transformer(30522, 64, 32, 77), (0.00085, 0.012), eight, 64
    ),
    "text2img256": lambda: crossing(
        3, (1, 2, 3, 5), (8, 4, 2), VQ4(), layout.transformer(30522, 64, 32, 77), (0.0015, 0.0195), width_32, 64
    ),
    "layout2img": lambda: crossing(
        3, (1, 2, 3, 4), (8, 4, 2), VQ4(), layout.transformer(8192, 64, 16, 92), (0.0015, 0.0205), width_32, 64, depth=3
    ),
    "semantic_synthesis": lambda: Row(
        layout.denoiser(6, 3, CH, (1, 4, 8), (32, 16, 8)),
        VQ4(),
        {"channel_mapper.weight": (3, 182, 1, 1)},
        (0.0015, 0.0205),
        eight,
    ),
    "inpainting_big": inpainting_big,
    "bsr_sr": lambda: Row(layout.denoiser(6, 3, CH, (1, 2, 2, 4), (16, 8)), VQ4(), {}, (0.0015, 0.0155), width_32),
    "SD v1": lambda: crossing(
        4,
        (1, 2, 4, 4),
        (4, 2, 1),
        KL8(),
        layout.under("transformer.", layout.clip(64, 12)),
        (0.00085, 0.012),
        eight,
        64,
        suffix=".ckpt",
    ),
}


def checkpoint(row):
    """The tensors of the row's released file."""
    table = layout.under("model.diffusion_model.", row.unet)
    table |= layout.averaged(table) if row.ema else {}
    table |= layout.under("first_stage_model.", row.stage) | layout.under("cond_stage_model.", row.condition)
    tensors = layout.weights(table) | layout.schedule(*row.betas) | row.buffers
    if "encoder.conv_in.weight" in row.condition:
        tensors |= {n: tensors["first_" + n.removeprefix("cond_")].clone() for n in table if n.startswith("cond_stage")}
    if row.ema:
        tensors["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)
    if "transformer.text_model.embeddings.token_embedding.weight" in row.condition:
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return tensors


def write(tensors, path):
    if path.suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 3}, path)
    else:
        save_file(tensors, path)
    return path


def own(tensors, prefix):
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}


def same(got, wanted):
    """Whether two tables have the same names, and under each the same bits."""
    return got.keys() == wanted.keys() and all(
        got[n].dtype == v.dtype and got[n].shape == v.shape and torch.equal(got[n], v) for n, v in wanted.items()
    )


@torch.no_grad()
def unet_error(pipe, tensors, row, size=16):
    x = torch.randn(1, row.unet["input_blocks.0.0.weight"][1], size, size)
    t = torch.tensor([371])
    context = {} if row.context is None else {"encoder_hidden_states": torch.randn(1, 5, row.context)}
    wanted = reference.unet(tensors, x, t, row.heads, *context.values())
    return tiny.error(pipe.unet(x, t, **context).sample, wanted)


@torch.no_grad()
def stage_error(vae, tensors, z, factor):
    side = max(2, 16 // factor)
    x, latent = torch.randn(1, 3, side * factor, side * factor), torch.randn(1, z, side, side)
    encoded = vae.encode(x)
    got = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.parameters
    errors = [tiny.error(got, reference.encode(tensors, x))]
    return max(*errors, tiny.error(vae.decode(latent).sample, reference.decode(tensors, latent)))


@torch.no_grad()
def condition_error(pipe, tensors, row):
    """How far the conditioner is from the plain one; 0 where it has no weights."""
    if "transformer.token_emb.weight" in row.condition:
        ids = torch.randint(0, row.condition["transformer.token_emb.weight"][0], (2, 9))
        return tiny.error(pipe.conditioner.transformer(ids), reference.transformer(tensors, ids))
    if "embedding.weight" in row.condition:
        return tiny.error(pipe.conditioner([3, 7]).context[:, 0], tensors["embedding.weight"][[3, 7]])
    if "channel_mapper.weight" in row.condition:
        halves = torch.randint(0, 182, (1, 16, 16)).repeat_interleave(4, 1).repeat_interleave(4, 2)
        one_hot = F.one_hot(halves[:, ::4, ::4], 182).permute(0, 3, 1, 2).float()
        return tiny.error(pipe.conditioner([halves[0]]).concat, F.conv2d(one_hot, tensors["channel_mapper.weight"]))
    return 0.0


def draw(pipe, name):
    """One small picture in one step, of what the row's pipeline takes; None where a tokenizer is needed."""
    picture, mask = torch.rand(3, 64, 64) * 2 - 1, torch.ones(1, 64, 64)
    boxes = [[{"object": 3, "box": [0.1, 0.1, 0.6, 0.8]}]]
    asked = {
        "celeba256": (1, {"size": (64, 64)}),
        "cin256-v2": ([7], {"size": (64, 64), "guidance": 1.5}),
        "layout2img": (boxes, {"size": (64, 64)}),
        "semantic_synthesis": ([torch.zeros(64, 64, dtype=torch.long)], {"size": (64, 64)}),
        "inpainting_big": (1, {"image": picture, "mask": mask}),
        "bsr_sr": (1, {"image": picture[:, :16, :16]}),
    }
    return pipe(asked[name][0], steps=1, **asked[name][1])[0] if name in asked else None


def round_trip(path, tmp):
    """(the folder between, the released file that comes back)"""
    convert(path, tmp / "folder")
    convert(tmp / "folder", tmp / "back.safetensors")
    return tmp / "folder", load_file(tmp / "back.safetensors")


@pytest.mark.parametrize("name", DENOISERS)
def test_a_released_denoiser_loads_and_comes_back(name, tmp_path):
    row = DENOISERS[name]()
    tensors = checkpoint(row)
    path = write(tensors, tmp_path / f"model{row.suffix}")
    pipe = ldmfast.load(path)
    assert unet_error(pipe, own(tensors, "model.diffusion_model."), row) <= CLOSE
    assert condition_error(pipe, own(tensors, "cond_stage_model."), row) <= CLOSE
    config = pipe.scheduler.config
    assert (config.beta_start, config.beta_end) == row.betas and config.beta_schedule == "scaled_linear"
    assert "scale_factor" not in row.buffers or abs(pipe.vae.config.scaling_factor - 0.22) < 1e-7
    assert pipe.unet.explain() == [] and pipe.vae.explain() == []
    picture = draw(pipe, name)
    assert picture is None or picture.size == (64, 64)
    if row.ema:
        averaged = {n: tensors["model_ema.diffusion_model" + n.replace(".", "")] for n in row.unet}
        assert unet_error(ldmfast.load(path, ema=True), averaged, row) <= CLOSE
    folder, back = round_trip(path, tmp_path)
    assert same(back, tensors)
    again = ldmfast.load(folder)
    assert same(again.unet.state_dict(), pipe.unet.state_dict()) and same(again.vae.state_dict(), pipe.vae.state_dict())


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_a_released_autoencoder_loads_and_comes_back(name, tmp_path):
    table = AUTOENCODERS[name]() | {"loss.logvar": (), "loss.discriminator.main.0.weight": (8, 3, 4, 4)}
    tensors = layout.weights(table)
    path = write(tensors, tmp_path / "model.ckpt")
    vae = ldmfast.load(path)
    assert type(vae).__name__ == ("VQModel" if name.startswith("vq") else "AutoencoderKL")
    z, factor = table["decoder.conv_in.weight"][1], int(name.split("-f")[1])
    assert stage_error(vae, tensors, z, factor) <= CLOSE and vae.explain() == []
    folder, back = round_trip(path, tmp_path)
    assert same(back, tensors)
    assert same(ldmfast.load(folder).state_dict(), vae.state_dict())


def main():
    print("| row | tensors | loads: error of the denoiser or autoencoder | round trip |\n| --- | --- | --- | --- |")
    for name in (*DENOISERS, *AUTOENCODERS):
        with tempfile.TemporaryDirectory() as tmp:
            tmp = Path(tmp)
            torch.manual_seed(0)
            stage = name in AUTOENCODERS
            row = None if stage else DENOISERS[name]()
            tensors = layout.weights(AUTOENCODERS[name]()) if stage else checkpoint(row)
            path = write(tensors, tmp / f"model{'.ckpt' if stage else row.suffix}")
            loaded = ldmfast.load(path)
            if stage:
                z, factor = tensors["decoder.conv_in.weight"].shape[1], int(name.split("-f")[1])
                error = stage_error(loaded, tensors, z, factor)
            else:
                error = unet_error(loaded, own(tensors, "model.diffusion_model."), row)
            exact = same(round_trip(path, tmp)[1], tensors)
            print(f"| {name} | {len(tensors)} | {error:.1e} | {'every bit' if exact else 'NOT EQUAL'} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
