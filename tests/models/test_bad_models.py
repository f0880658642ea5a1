"""Models and files that are wrong in themselves, and the sentence that each earns, by each way on which it arises."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings

import diffusers
import pytest
import tiny
import torch
from lora_pipelines import stable_diffusion_xl
from safetensors.torch import load_file, save_file
from ways import SMALL, ours, said_by_sample, stock_pipeline, unet

import ldmfast
from ldmfast import UNet
from ldmfast.commands import cli
from ldmfast.models.checks import head_counts
from ldmfast.ops import attention
from ldmfast.pipeline import LatentDiffusionPipeline

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


WIDE_HEADS = {**SMALL, "block_out_channels": (288, 288), "attention_head_dim": 1}


@pytest.fixture
def up_to_256(monkeypatch):
    """Kernels of attention as on a GPU, which end at heads 256 wide; the CPU's take any width."""
    for backend in attention.op.automatic("cpu"):
        if backend.name != "torch":
            refuses = [*backend.conditions, lambda q, *others: "over 256" if q.shape[3] > 256 else None]
            monkeypatch.setattr(backend, "conditions", refuses)


def explained(model):
    said = model.explain()
    return len(said) == 1 and "attention's reference runs" in said[0] and "over 256" in said[0]


def test_a_head_that_no_kernel_takes_runs_by_the_reference_and_is_explained(up_to_256):
    stock = tiny.unet(**WIDE_HEADS)
    model, inputs = UNet.from_unet(stock), tiny.inputs(stock, (4, 4))
    with torch.no_grad():
        assert tiny.error(model(**inputs).sample, stock(**inputs).sample) <= 1e-5
    assert explained(model)


def test_such_a_head_in_every_pipeline(up_to_256, tmp_path):
    pipe = stock_pipeline(network=tiny.unet(**WIDE_HEADS))
    prompt = {name: torch.randn(1, 7, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    assert pipe(num_inference_steps=1, **prompt).images and explained(pipe.unet)
    own = ours(unet=unet(**{**WIDE_HEADS, "cross_attention_dim": 8}))
    assert own([1], steps=1) and explained(own.unet)
    own.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "-o", str(tmp_path / "a.png"), "--quiet", "--class", "1"]
    assert cli.main(["sample", *options, "--steps", "1"]) == 0


def test_a_head_that_the_kernels_take_is_not_explained():
    assert UNet.from_unet(tiny.unet(**WIDE_HEADS)).explain() == []


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


# By the way that ends in diffusers' own loading: its sentence, or, of a missing weight, its warning.
OF_DIFFUSERS = {
    web_page: (OSError, "Unable to load weights from checkpoint file for .*diffusion_pytorch_model.safetensors"),
    truncated: (OSError, "Unable to load weights from checkpoint file for .*diffusion_pytorch_model.safetensors"),
    another_family: (ValueError, r"attn2.to_k.weight expected shape torch.Size\(\[16, 2048\]\), but got"),
}


@pytest.mark.parametrize("damage", OF_DIFFUSERS, ids=lambda each: each.__name__)
def test_a_damaged_file_under_optimize_is_refused_by_diffusers(damage, tmp_path):
    tiny.unet(**SMALL).save_pretrained(tmp_path)
    damage(tmp_path / WEIGHTS)
    kind, sentence = OF_DIFFUSERS[damage]
    with pytest.raises(kind, match=sentence):
        stock_pipeline(network=diffusers.UNet2DConditionModel.from_pretrained(tmp_path))


def test_a_missing_weight_under_optimize_is_warned_of_by_diffusers(tmp_path, monkeypatch):
    tiny.unet(**SMALL).save_pretrained(tmp_path)
    missing(tmp_path / WEIGHTS)
    said = []
    monkeypatch.setattr(diffusers.models.modeling_utils.logger, "warning", lambda text, *_: said.append(text))
    stock_pipeline(network=diffusers.UNet2DConditionModel.from_pretrained(tmp_path))
    assert any("newly initialized: ['mid_block.resnets.0.conv1.weight']" in text for text in said)


def test_a_conditioner_that_is_lost_is_refused_by_every_way(folder, tmp_path, capsys):
    shutil.rmtree(folder / "conditioner")
    sentence = "conditioner is missing: the ClassEmbedder that ldmfast.json names"
    for load in (ldmfast.load, LatentDiffusionPipeline.from_pretrained):
        with pytest.raises(FileNotFoundError, match=sentence):
            load(folder)
    assert sentence in said_by_sample(folder, tmp_path / "a.png", capsys)


OVERFLOWED = "float16 autoencoder overflowed; decoded again in float32"


def test_an_overflowing_float16_autoencoder_by_every_way(tmp_path):
    stock, own = stock_pipeline(), ours()
    for pipe in (stock, own):
        pipe.vae.decoder.conv_in.weight.data *= 3e5
    own.save_pretrained(tmp_path / "model")
    for pipe in (stock, own):
        pipe.vae.half()
    with torch.no_grad(), pytest.warns(UserWarning, match=OVERFLOWED):
        assert torch.isfinite(stock.vae.decode(torch.randn(1, 4, 8, 8).half()).sample).all()
    with pytest.warns(UserWarning, match=OVERFLOWED):
        own([1], steps=1)
    options = ["--model", str(tmp_path / "model"), "-o", str(tmp_path / "a.png"), "--quiet", "--class", "1"]
    with pytest.warns(UserWarning, match=OVERFLOWED):
        assert cli.main(["sample", *options, "--steps", "1", "--dtype", "float16"]) == 0


DEBUG = "with LDMFAST_DEBUG=1 a network names what it is given that is not"


@pytest.mark.parametrize(
    "spoil, dtype, sentence",
    [
        (lambda pipe: pipe.unet.conv_out, torch.float32, rf"^the latents are not finite \(weights in .*32\); {DEBUG}$"),
        (
            lambda pipe: pipe.unet.conv_out,
            torch.float16,
            r"^the latents are not finite \(weights in .*16\); use float32$",
        ),
        (
            lambda pipe: pipe.vae.decoder.conv_out,
            torch.float32,
            rf"^the decoded picture is not finite \(.*32\); {DEBUG}$",
        ),
    ],
)
def test_weights_that_are_not_finite(spoil, dtype, sentence, tmp_path, capsys):
    pipe = ours()
    spoil(pipe).weight.data[:1] = float("nan")
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(FloatingPointError, match=sentence):
        pipe.to(dtype)([1], steps=1)
    name = str(dtype).removeprefix("torch.")
    assert re.search(sentence[1:], said_by_sample(tmp_path / "model", tmp_path / "a.png", capsys, "--dtype", name))


def test_wrong_text_embeds_from_the_command_line(tmp_path, capsys):
    pipe = stable_diffusion_xl()
    config = copy.deepcopy(pipe.text_encoder_2.config)
    config.projection_dim = 16
    pipe.register_modules(text_encoder_2=type(pipe.text_encoder_2)(config))
    pipe.save_pretrained(tmp_path / "model")
    options = ["--model", str(tmp_path / "model"), "-o", str(tmp_path / "a.png"), "--quiet", "--steps", "1"]
    assert cli.main(["sample", "a", *options]) == 2
    assert capsys.readouterr().err.strip().endswith("ldmfast: text_embeds: expected (2, 32), got (2, 16)")


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
