"""`ldmfast verify`: right where ours is stock's, and the layer that differs where a weight or a kernel is 1 % off."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import ldmfast
from ldmfast.commands import cli
from ldmfast.evaluation.verify_blocks import judged
from ldmfast.models import layers
from ldmfast.models.autoencoder import AutoencoderKL

SHORT = ["--steps", "2", "--device", "cpu"]
ABSENT = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
CONV = "down_blocks.1.resnets.0.conv1"


def stock_pipeline(seed=0):
    torch.manual_seed(seed)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
    parts = {"unet": tiny.unet(layers_per_block=1), "vae": tiny.vae(), "scheduler": scheduler}
    return diffusers.StableDiffusionPipeline(**parts, **ABSENT, requires_safety_checker=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("verify") / "model"
    stock_pipeline().save_pretrained(path)
    return path


def loaded(folder, dtype=torch.float32):
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **ABSENT)


def with_one_layer_changed(folder, part, layer, to):
    shutil.copytree(folder, to)
    file = to / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights[f"{layer}.weight"] *= 1.01
    save_file(weights, file, metadata={"format": "pt"})
    return to


def test_a_folder_of_stock_diffusers_is_right_and_its_page_is_whole(folder, tmp_path, capsys):
    page = tmp_path / "verify.html"
    assert cli.main(["verify", str(folder), *SHORT, "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^right: the unet's and the vae's \d+ blocks and a picture are stock's", said, re.MULTILINE)
    for block in ("down_blocks.0", "mid_block", "up_blocks.2", "encoder.down_blocks.2", "decoder.up_blocks.0"):
        assert re.search(rf"^  {block} +\S+e-\d\d ", said, re.MULTILINE), block
    text, parser = page.read_text(), Whole()
    parser.feed(text)
    assert parser.open == [] and text.count("src='data:image/png;base64,") == 3
    assert not re.findall(r"(?:src|href)='(?!data:)|https?://|@import|url\(", text)
    assert "right: the unet" in text and text.count("<rect") > 40


class Whole(HTMLParser):
    """Keeps the tags that are open; one that closes another fails."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "line", "rect", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if tag not in ("meta", "img", "line", "rect", "br"):
            assert self.open.pop() == tag


@pytest.mark.parametrize(
    "part, layer, name",
    [
        ("unet", CONV, "down_blocks.1 of the unet"),
        ("unet", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "up_blocks.1 of the unet"),
        ("vae", "encoder.mid_block.resnets.0.conv2", "encoder.mid_block of the vae"),
        ("vae", "decoder.up_blocks.1.upsamplers.0.conv", "decoder.up_blocks.1 of the vae"),
    ],
)
def test_one_layer_changed_by_a_hundredth_between_two_folders_is_named(part, layer, name, folder, tmp_path, capsys):
    other = with_one_layer_changed(folder, part, layer, tmp_path / "other")
    page = tmp_path / "verify.html"
    assert cli.main(["verify", str(folder), "--against", str(other), *SHORT, "--html", str(page)]) == 1
    verdict = capsys.readouterr().out.splitlines()[-2]
    assert verdict.startswith(f"WRONG: first differs at {name}, in {layer}: ")
    assert f"{layer}.weight is 0.99 % from that of {other}" in verdict
    assert f"<td>{layer}.weight</td><td class='n'>0.99 %</td>" in page.read_text()


@pytest.mark.parametrize("optimised", [False, True])
def test_a_layer_changed_since_a_pipeline_was_loaded_is_named(optimised, folder):
    pipe = loaded(folder)
    pipe = ldmfast.optimize(pipe) if optimised else pipe
    assert ldmfast.verify(pipe, steps=1).right
    with torch.no_grad():
        pipe.unet.get_submodule(CONV).weight *= 1.01
    found = ldmfast.verify(pipe, steps=1)
    assert not found.right and found.verdict.startswith(
        f"WRONG: first differs at down_blocks.1 of the unet, in {CONV}:"
    )
    assert f"{CONV}.weight is 1 % from that of {folder}" in found.verdict
    assert ldmfast.verify(pipe, against="live", steps=1).right  # the kernels are


def test_a_model_that_ldmfast_loaded_is_compared_with_its_files(folder):
    context = ldmfast.conditioning.base.Conditioner()
    context.mode = "crossattn"
    pipe = ldmfast.load(folder, conditioner=context)
    with torch.no_grad():
        pipe.vae.decoder.mid_block.resnets[1].norm2.weight *= 1.01
    found = ldmfast.verify(pipe, steps=1)
    assert found.verdict.startswith(
        "WRONG: first differs at decoder.mid_block of the vae, in decoder.mid_block.resnets.1"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_a_hundredth_off_in_one_layer_is_named(dtype, folder, monkeypatch):
    pipe = ldmfast.optimize(loaded(folder, dtype))
    layer, right = pipe.unet.get_submodule(CONV), layers.ops.conv2d

    def conv2d(x, weight, *args, **kwargs):
        y = right(x, weight, *args, **kwargs)
        return y * 1.01 if weight is layer.weight else y

    monkeypatch.setattr(layers.ops, "conv2d", conv2d)
    found = ldmfast.verify(pipe, steps=1)
    assert not found.right and found.verdict.startswith(
        f"WRONG: first differs at down_blocks.1 of the unet, in {CONV}:"
    )
    assert not any(network.changed for network in found.networks)


def test_the_picture_alone_is_judged_too(folder, monkeypatch):
    pipe = ldmfast.optimize(loaded(folder))
    right = type(pipe.scheduler).step

    def step(self, *args, **kwargs):
        result = right(self, *args, **kwargs)
        result.prev_sample = result.prev_sample * 1.001
        return result

    monkeypatch.setattr(type(pipe.scheduler), "step", step)
    assert ldmfast.verify(pipe, steps=2).verdict.startswith("WRONG: first differs at the latents:")


def test_float16_overflow_is_seen_and_said():
    vae = AutoencoderKL.adopt(tiny.vae())
    with torch.no_grad():
        vae.encoder.conv_in.weight *= 2e5
        vae.decoder.conv_in.weight *= 2e5
    found = ldmfast.verify(vae.half(), size=(32, 32))
    assert found.right, str(found)
    rows = {row.name: row for row in found.networks[0].wholes}
    for way in ("encode", "decode"):
        assert rows[way].remark == "stock's overflows in float16, ours does not"
    blocks = [row for rows in found.networks[0].blocks.values() for row in rows]
    assert any(row.remark == "overflows in float16, stock's as well" for row in blocks)


def test_what_is_attached_is_listed_and_the_model_is_left_as_it_was(folder):
    from peft import LoraConfig

    pipe = ldmfast.optimize(loaded(folder))
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    pipe.unet.train()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    found = ldmfast.verify(pipe, steps=1)
    assert found.right and pipe.unet.training and all(module.training for module in pipe.unet.modules())
    assert any("to_q" in sentence for sentence in found.networks[0].explained) and "to_q" in str(found)
    assert any("something is attached to it" in note for note in found.notes)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def test_an_unconditional_model_with_a_codebook_is_right():
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"block_out_channels": (32, 32), "norm_num_groups": 8, "layers_per_block": 1}
    unet = ldmfast.UNet2D(sample_size=8, in_channels=3, out_channels=3, **blocks, **sizes, attention_head_dim=8)
    vq = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = ldmfast.VQModel(latent_channels=3, num_vq_embeddings=16, **vq, **sizes)
    pipe = ldmfast.LatentDiffusionPipeline(unet, vae, ldmfast.DDIMScheduler(clip_sample=False))
    found = ldmfast.verify(pipe)
    assert found.right, str(found)
    assert "conditioned on unconditional" not in str(found) and "unconditional" in found.drawn.about


@pytest.mark.parametrize("family", ["sdxl", "inpainting"])
def test_what_a_u_net_takes_beside_the_latent_is_drawn(family):
    unet = ldmfast.UNet.from_unet(tiny.unet(family))
    pipe = ldmfast.LatentDiffusionPipeline(unet, tiny.vae(), diffusers.DDIMScheduler(), Mute())
    found = ldmfast.verify(pipe, steps=1, size=(32, 32))
    assert found.right, str(found)
    assert "random numbers" in found.drawn.about


class Mute(ldmfast.Conditioner):
    mode = "crossattn"


@pytest.mark.parametrize(
    "dtype, ours, stock, right",
    [
        (torch.float32, 0.9e-5, 0.0, True),
        (torch.float32, 1.1e-5, 0.0, False),
        (torch.float32, 1e-3, 1e-3, True),  # stock is as far from the exact run
        (torch.float32, 1.2e-3, 1e-3, False),
        (torch.bfloat16, 1.05e-2, 1e-2, True),
        (torch.bfloat16, 1.15e-2, 1e-2, False),
        (torch.bfloat16, 4e-4, 0.0, True),  # the floor: an eighth of a rounding
        (torch.bfloat16, 6e-4, 0.0, False),
        (torch.float16, 6e-5, 0.0, True),
        (torch.float16, 7e-5, 0.0, False),
        (torch.float16, 1e-3, float("inf"), True),  # stock overflowed
        (torch.float16, 1e-1, float("inf"), False),
        (torch.float16, float("inf"), 1e-3, False),
        (torch.float16, float("inf"), float("nan"), True),
    ],
)
def test_the_limits(dtype, ours, stock, right):
    exact = torch.ones(1, 1, dtype=torch.float64)
    row = judged("unet", "network", dtype, exact + ours, exact - stock, exact)
    assert row.right == right


def test_what_cannot_be_compared_is_refused_in_a_sentence(folder, tmp_path, capsys):
    pipe = loaded(folder)
    with pytest.raises(TypeError, match="verify takes a pipeline of diffusers' or ldmfast's, or a network; got dict"):
        ldmfast.verify({})
    with pytest.raises(ValueError, match="DiTPipeline|Linear has no UNet2DConditionModel"):
        ldmfast.verify(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="the unet of the other .* is another network: .* there, .* here"):
        ldmfast.verify(pipe.unet, against=tiny.unet(layers_per_block=1, cross_attention_dim=16))
    with pytest.raises(ValueError, match="size 30x32: both sides must be multiples of 4"):
        ldmfast.verify(pipe, size=(30, 32))
    assert cli.main(["verify", str(folder), "--against", str(tmp_path / "none")]) == 2
    assert "is neither a file nor a folder" in capsys.readouterr().err
    assert cli.main(["verify", str(tmp_path / "none")]) == 2


def test_a_shipped_model_keeps_the_contract_in_16_bits():
    """Its first layer has 40 channels: as Winograd in bfloat16 it alone broke the limit of the whole network."""
    native = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )  # else stock's own bfloat16 takes minutes, and ours is float32
    found = ldmfast.verify("scenes64", steps=1, dtype=torch.bfloat16 if native else torch.float32)
    assert found.right, found.verdict
