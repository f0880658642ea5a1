"""LoRA files as people have them, each against a stock network whose weights have the change added by its formula."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import tiny
import torch
from lora_files import (
    ALPHA,
    ATTENTION,
    LAYERS,
    METHODS,
    RANK,
    answer,
    check,
    file_of,
    kohya,
    loha,
    lokr,
    lora,
    lycoris,
    made,
    whole,
)
from safetensors.torch import save_file

from ldmfast.models.unet import UNet
from ldmfast.pipeline.load_lora import load_lora


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_method_adds_what_its_formula_says(method, family, tmp_path):
    stock, path = tiny.unet(family), tmp_path / "it.safetensors"
    check(stock, file_of(stock, method, path, lycoris if method is lokr else kohya), path)


def test_biases_and_norms(tmp_path):
    stock, new = tiny.unet(), made()
    changed, table = copy.deepcopy(stock), {}
    for layer in ("down_blocks.0.resnets.0.norm1", "conv_norm_out", f"{ATTENTION}.norm2"):
        norm = changed.get_submodule(layer)
        table[f"{kohya(layer)}.w_norm"], table[f"{kohya(layer)}.b_norm"] = (
            new(*norm.weight.shape),
            new(*norm.bias.shape),
        )
        norm.weight.data += 0.3 * table[f"{kohya(layer)}.w_norm"]
        norm.bias.data += 0.3 * table[f"{kohya(layer)}.b_norm"]
    only_norms = copy.deepcopy(changed)
    save_file(table, tmp_path / "norms.safetensors")
    for layer in ("mid_block.resnets.0.conv2", "conv_in"):
        conv = changed.get_submodule(layer)
        tensors, delta = whole(conv.weight.shape, new)
        table[f"{kohya(layer)}.diff"], table[f"{kohya(layer)}.diff_b"] = tensors["diff"], new(*conv.bias.shape)
        conv.weight.data += 0.3 * delta
        conv.bias.data += 0.3 * table[f"{kohya(layer)}.diff_b"]
    bias_alone = kohya(f"{ATTENTION}.attn1.to_out.0")
    table[f"{bias_alone}.diff_b"] = new(32)
    changed.get_submodule(f"{ATTENTION}.attn1.to_out.0").bias.data += 0.3 * table[f"{bias_alone}.diff_b"]
    save_file(table, tmp_path / "all.safetensors")
    check(stock, changed, tmp_path / "all.safetensors")
    check(stock, only_norms, tmp_path / "norms.safetensors")


@pytest.mark.parametrize("method", [lora, loha])
def test_dora(method, tmp_path):
    """The changed weight's rows (a convolution's output channels) have the norms that the file says."""
    stock, new, table = tiny.unet(), made(), {}
    changed = copy.deepcopy(stock)
    for layer in LAYERS:
        weight = changed.get_submodule(layer).weight
        tensors, delta = method(weight.shape, new)
        direction = weight.data + delta
        norms = new(len(weight)).abs() + 0.5
        tensors["dora_scale"] = norms.reshape(-1, *(1,) * (weight.ndim - 1))
        weight.data = direction / direction.flatten(1).norm(dim=1).reshape(tensors["dora_scale"].shape)
        weight.data *= tensors["dora_scale"]
        table |= {f"{kohya(layer)}.{suffix}": value for suffix, value in tensors.items()}
    save_file(table, tmp_path / "dora.safetensors")
    check(stock, changed, tmp_path / "dora.safetensors", scale=1.0)


# --- the names that trainers write ------------------------------------------------------------------------------------


def old_diffusers(layer: str) -> str:
    attention, _, last = layer.rpartition(".attn")
    return f"{attention}.attn{last.replace('.to_', '.processor.to_').replace('to_out.0', 'to_out')}_lora"


SPELLINGS = {
    "kohya": (kohya, "lora_down.weight", "lora_up.weight"),
    "onetrainer": (lambda layer: f"unet.{layer}", "lora_down.weight", "lora_up.weight"),
    "diffusers": (lambda layer: f"unet.{layer}", "lora.down.weight", "lora.up.weight"),
    "peft in diffusers": (lambda layer: f"unet.{layer}", "lora_A.weight", "lora_B.weight"),
    "peft": (lambda layer: f"base_model.model.{layer}", "lora_A.weight", "lora_B.weight"),
    "peft's live keys": (lambda layer: f"unet.{layer}", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers 0.16": (lambda layer: f"unet.{old_diffusers(layer)}", "down.weight", "up.weight"),
    "diffusers 0.12": (old_diffusers, "down.weight", "up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling(spelling, tmp_path):
    name, down, up = SPELLINGS[spelling]
    stock, path = tiny.unet(), tmp_path / "it.safetensors"

    def spelt(shape, new):
        tensors, delta = lora(shape, new)
        return {down: tensors["lora_down.weight"], up: tensors["lora_up.weight"]}, delta * RANK / ALPHA

    layers = [layer for layer in LAYERS if ".attn" in layer] if "0.1" in spelling else LAYERS
    check(stock, file_of(stock, spelt, path, name, layers), path)


def test_kohyas_sdxl_names_are_read_as_diffusers_reads_them(tmp_path):
    """The released layout's names, every linear layer and convolution of it."""
    torch.manual_seed(0)
    stock, new, table = tiny.unet("sdxl"), made(), {}
    names = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_k": (64, 64),
        "input_blocks_5_1_transformer_blocks_1_attn2_to_v": (64, 64),
        "middle_block_1_transformer_blocks_1_ff_net_2": (64, 256),
        "output_blocks_1_1_transformer_blocks_0_attn2_to_out_0": (64, 64),
        "input_blocks_4_1_proj_in": (64, 64),
        "input_blocks_1_0_in_layers_2": (32, 32, 3, 3),
        "input_blocks_3_0_op": (32, 32, 3, 3),
        "input_blocks_4_0_skip_connection": (64, 32, 1, 1),
        "middle_block_2_out_layers_3": (64, 64, 3, 3),
        "output_blocks_2_2_conv": (64, 64, 3, 3),
        "output_blocks_0_0_emb_layers_1": (64, 128),
        "time_embed_2": (128, 128),
        "out_2": (4, 32, 3, 3),
    }
    for name, shape in names.items():
        tensors, _ = lora(torch.Size(shape), new)
        table |= {f"lora_unet_{name}.{suffix}": value for suffix, value in tensors.items()}
    save_file(table, tmp_path / "xl.safetensors")
    ours, arguments = UNet.from_unet(copy.deepcopy(stock)), tiny.inputs(stock)
    plain = answer(stock, arguments)
    load_lora(ours, tmp_path / "xl.safetensors")
    kind = diffusers.StableDiffusionXLPipeline
    state, alphas = kind.lora_state_dict(dict(table), unet_config=stock.config)
    kind.load_lora_into_unet(state, alphas, stock)
    wanted = answer(stock, arguments)
    assert tiny.error(answer(ours, arguments), wanted) < 2e-5 and tiny.error(plain, wanted) > 1e-3


def test_the_alphas_of_diffusers_metadata_count(tmp_path):
    stock = tiny.unet()
    path, layer = tmp_path / "it.safetensors", LAYERS[0]
    table = {f"unet.{layer}.lora_A.weight": torch.ones(2, 32), f"unet.{layer}.lora_B.weight": torch.ones(32, 2)}
    settings = {
        "unet.r": 2,
        "unet.lora_alpha": 7,
        "unet.alpha_pattern": {"attn1.to_q": 3},
        "unet.target_modules": ["to_q"],
    }
    save_file(table, path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    changed = copy.deepcopy(stock)
    changed.get_submodule(layer).weight.data += 0.3 * 2 * 3 / 2
    check(stock, changed, path)


# --- refused by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "its method is GLoRA"),
        (("oft_blocks", "alpha"), "its method is OFT"),
        (("weight", "on_input"), r"its method is \(IA\)\^3"),
        (("lora_up.weight",), "has up, which make no whole change"),
        (("lora_down.weight", "lora_up.weight", "strange"), "a key that is not known"),
    ],
)
def test_what_is_no_matrix_is_refused_by_its_name(keys, said, tmp_path):
    unet, path = UNet.from_unet(tiny.unet()), tmp_path / "it.safetensors"
    save_file({f"{kohya(LAYERS[0])}.{key}": torch.zeros(4, 4) for key in keys}, path)
    before = unet.state_dict().keys()
    with pytest.raises(ValueError, match=said) as error:
        load_lora(unet, path)
    assert "holds no LoRA" not in str(error.value) and unet.state_dict().keys() == before


def test_another_family_is_named(tmp_path):
    unet, path = UNet.from_unet(tiny.unet()), tmp_path / "it.safetensors"
    name = kohya(LAYERS[1])
    save_file({f"{name}.lora_down.weight": torch.zeros(2, 768), f"{name}.lora_up.weight": torch.zeros(32, 2)}, path)
    with pytest.raises(ValueError, match=r"does not fit this U-Net: .*the file is made for SD1.x"):
        load_lora(unet, path)
    save_file({f"{kohya('down_blocks.7.conv')}.diff": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="changes 'down_blocks_7_conv', which is no layer of it"):
        load_lora(unet, path)
