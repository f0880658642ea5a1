"""Models and files that are wrong in themselves, and the sentence that each earns, by each way on which it arises."""

from __future__ import annotations

import json
import warnings

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from ways import SMALL, ours, said_by_sample, stock_pipeline, unet

import ldmfast
from ldmfast import UNet
from ldmfast.commands import cli
from ldmfast.models.checks import head_counts
from ldmfast.ops import attention

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A saved pipeline, to be damaged."""
    ours().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def family(monkeypatch):
    """The small U-Net's shapes as a family of their own, with four heads."""
    monkeypatch.setitem(head_counts._USUAL, ((16, 32), 8), (4, 4))
    monkeypatch.setitem(head_counts.WIDTHS, 8, "SD0")


WRONG_HEADS = "attention_head_dim=2; SD0 has 4 heads. A wrong number loads, and draws noise"


def test_a_wrong_number_of_heads_is_warned_of_by_every_way(family, folder, tmp_path, capsys):
    config = json.loads((folder / "unet" / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        UNet.from_pretrained(folder / "unet")
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "attention_head_dim": 2}))
    with pytest.warns(UserWarning, match=WRONG_HEADS):
        UNet.from_pretrained(folder / "unet")
    with pytest.warns(UserWarning, match=WRONG_HEADS):
        ldmfast.load(folder)
    with pytest.warns(UserWarning, match=WRONG_HEADS):
        stock_pipeline(network=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"))
    with pytest.warns(UserWarning, match=WRONG_HEADS):
        out = str(tmp_path / "a.png")
        assert cli.main(["sample", "--model", str(folder), "-o", out, "--quiet", "--class", "1", "--steps", "1"]) == 0


@pytest.mark.parametrize(
    "channels, width, heads, sentence",
    [
        ((320, 640, 1280, 1280), 1024, 8, r"attention_head_dim=8; SD2.x has \[5, 10, 20, 20\] heads"),
        ((320, 640, 1280), 2048, (8, 8, 8), r"attention_head_dim=\[8, 8, 8\]; SDXL has \[5, 10, 20\] heads"),
        ((320, 640, 1280), [2048] * 3, 8, r"attention_head_dim=8; SDXL has"),  # another way to say the width
        ((320, 640, 1280, 1280), 768, 8, None),
        ((320, 640, 1280), 2048, (5, 10, 20), None),
    ],
)
def test_the_families_heads(channels, width, heads, sentence):
    levels = len(channels)
    kinds = [*["CrossAttnDownBlock2D"] * (levels - 1), "DownBlock2D"]
    if levels == 3:
        kinds = ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]
    up = [kind.replace("Down", "Up") for kind in reversed(kinds)]
    with torch.device("meta"):
        stock = diffusers.UNet2DConditionModel(
            block_out_channels=channels,
            cross_attention_dim=width,
            attention_head_dim=heads,
            down_block_types=kinds,
            up_block_types=up,
            layers_per_block=1,
        )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        UNet.from_unet(stock)
    said = [str(each.message) for each in seen if "heads" in str(each.message)]
    assert len(said) == (sentence is not None)
    if sentence:
        with pytest.warns(UserWarning, match=sentence):
            head_counts.warn_of_heads(stock, "it")


def test_a_head_that_no_kernel_takes_runs_by_the_reference_and_is_explained(monkeypatch):
    """As on a GPU, whose kernels end at 256; the CPU's take any width."""
    stock = tiny.unet(**{**SMALL, "block_out_channels": (288, 288)}, attention_head_dim=1)
    model, inputs = UNet.from_unet(stock), tiny.inputs(stock, (4, 4))
    assert model.explain() == []
    for backend in attention.op.automatic("cpu"):
        if backend.name != "torch":
            refuses = [*backend.conditions, lambda q, *others: "over 256" if q.shape[3] > 256 else None]
            monkeypatch.setattr(backend, "conditions", refuses)
    with torch.no_grad():
        assert tiny.error(model(**inputs).sample, stock(**inputs).sample) <= 1e-5
    said = model.explain()
    assert len(said) == 1 and "attention's reference runs" in said[0] and "over 256" in said[0]


# --- files ------------------------------------------------------------------------------------------------------------


def missing(path):
    state = load_file(path)
    del state["mid_block.resnets.0.conv1.weight"]
    save_file(state, path, metadata={"format": "pt"})


def web_page(path):
    path.write_text("<html><body>Not found</body></html>" * 9)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def another_family(path):
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 2048}))


DAMAGED = {
    missing: "mid_block.resnets.0.conv1.weight",
    web_page: "starts with `<html`: a failed download",
    truncated: "truncated",
    another_family: "prompts of width 8, its config.json says 2048 .SDXL.",
}


@pytest.mark.parametrize("damage", DAMAGED, ids=lambda each: each.__name__)
def test_a_damaged_file_is_refused_by_every_way(damage, folder, tmp_path, capsys):
    damage(folder / "unet" / WEIGHTS)
    for load in (lambda: UNet.from_pretrained(folder / "unet"), lambda: ldmfast.load(folder)):
        with pytest.raises(ValueError, match=DAMAGED[damage]) as raised:
            load()
        assert "\n" not in str(raised.value)
    said = said_by_sample(folder, tmp_path / "a.png", capsys)
    assert DAMAGED[damage].replace(" .SDXL.", " (SDXL)") in said


def test_an_overflowing_float16_autoencoder_under_optimize():
    pipe = stock_pipeline()
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight *= 3e5
        pipe.vae.half()
        with pytest.warns(UserWarning, match="float16 autoencoder overflowed; decoded again in float32"):
            assert torch.isfinite(pipe.vae.decode(torch.randn(1, 4, 8, 8).half()).sample).all()


def test_no_time_ids_from_the_command_line_either(folder, tmp_path, capsys):
    unet("sdxl", cross_attention_dim=8).save_pretrained(folder / "unet")
    assert "needs text_embeds and time_ids" in said_by_sample(folder, tmp_path / "a.png", capsys)


def test_a_width_that_does_not_fit_from_the_command_line(folder, tmp_path, capsys):
    unet(cross_attention_dim=16).save_pretrained(folder / "unet")
    said = said_by_sample(folder, tmp_path / "a.png", capsys)
    assert "states are 8 wide; this U-Net expects 16" in said


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, value",
    [
        ("in_channels", 2**31),
        ("block_out_channels", [16, 2**40]),
        ("cross_attention_dim", [2**31, 8]),
        ("conv_in_kernel", 2**20),
        ("num_class_embeds", 2**62),
        ("time_embedding_dim", 2**31),
    ],
)
def test_a_size_that_no_weight_has_is_refused_before_memory_is_asked_for(name, value, tmp_path):
    unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ValueError, match=f"config.json has [0-9]+ in {name}, and no weight is larger than") as raised:
        UNet.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("shape", [[8], [8, []], "ab", [8.5, 8], None])
def test_a_header_whose_shapes_are_none_is_refused(shape, tmp_path):
    unet().save_pretrained(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8 : 8 + length])
    next(entry for name, entry in table.items() if name.endswith("attn2.to_k.weight"))["shape"] = shape
    header = json.dumps(table).encode()
    (tmp_path / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    with pytest.raises((OSError, ValueError), match=str(tmp_path)) as raised:
        UNet.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)
