"""What people hand over by mistake, and the sentence that it earns: a row each, by each way on which it can arise.

The ways: UNet (or the autoencoder) itself, a diffusers pipeline under `ldmfast.optimize`, ldmfast's own pipeline, and
`ldmfast sample`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import warnings

import diffusers
import numpy
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import ldmfast
from ldmfast import UNet
from ldmfast.commands import cli
from ldmfast.conditioning.classes_and_boxes import ClassEmbedder
from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.checks import head_counts
from ldmfast.models.unet2d import UNet2D
from ldmfast.ops import attention
from ldmfast.pipeline import LatentDiffusionPipeline

SMALL = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL = {"block_out_channels": (16, 32), "layers_per_block": 1, "transformer_layers_per_block": 1, "sample_size": 8}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def unet(family="sd1", **changes):
    return UNet.from_unet(tiny.unet(family, **{**(XL if family == "sdxl" else SMALL), **changes}))


def call(family="sd1", /, **changed):
    """One call of a small U-Net, one argument of it changed."""
    model = unet(family)
    return model(**{**tiny.inputs(model, (8, 8)), **changed})


def stock_pipeline(scheduler=None, kind=diffusers.StableDiffusionPipeline, network=None, **more):
    """diffusers' own, for prompts that are encoded already, under `optimize`."""
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    parts = {**absent, "image_encoder": None, "requires_safety_checker": False, **more}
    if kind is diffusers.StableDiffusionControlNetPipeline:
        parts.pop("image_encoder")
    scheduler = scheduler or diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear")
    pipe = kind(vae=tiny.vae(), unet=network or tiny.unet(**SMALL), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return ldmfast.optimize(pipe)


def optimized(scheduler=None, kind=diffusers.StableDiffusionPipeline, network=None, parts=None, width=32, **changed):
    pipe = stock_pipeline(scheduler, kind, network, **(parts or {}))
    prompt = {name: torch.randn(1, 7, width) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return pipe(**{"num_inference_steps": 2, "output_type": "np", **prompt, **changed})


def ours(**parts):
    made = {
        "unet": unet(cross_attention_dim=8),
        "vae": AutoencoderKL.from_vae(tiny.vae()),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False),
        "conditioner": ClassEmbedder(3, 8),
    }
    return LatentDiffusionPipeline(**{**made, **parts})


def pipeline(**changed):
    return ours()([1], **{"steps": 2, **changed})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ours().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of a saved pipeline, to be damaged."""
    import shutil

    return shutil.copytree(saved, tmp_path / "model")


def said_by_sample(folder, out, capsys, *arguments):
    """What `ldmfast sample` prints to stderr, having failed."""
    options = ["--model", str(folder), "-o", str(out), "--quiet", "--class", "1"]
    steps = [] if "--steps" in arguments else ["--steps", "2"]
    assert cli.main(["sample", *options, *steps, *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1 and said.startswith("ldmfast: ")
    return said


def residuals(count=4, channels=16):
    """As a ControlNet for the small U-Net leaves them, or one for another."""
    shapes = [(2, channels, 8, 8), (2, channels, 8, 8), (2, channels, 4, 4), (2, 2 * channels, 4, 4)][:count]
    down = [torch.zeros(shape) for shape in shapes]
    return {
        "down_block_additional_residuals": down,
        "mid_block_additional_residual": torch.zeros(2, 2 * channels, 4, 4),
    }


def adapters(*shapes):
    return {"down_intrablock_additional_residuals": [torch.zeros(2, *shape) for shape in shapes]}


def controlled():
    """A ControlNet of another model's in a pipeline."""
    control = diffusers.ControlNetModel.from_unet(
        tiny.unet(**{**SMALL, "layers_per_block": 2}), conditioning_embedding_out_channels=(16, 32, 32)
    )
    kind = diffusers.StableDiffusionControlNetPipeline
    options = {"image": torch.rand(1, 3, 32, 32), "height": 32, "width": 32}
    return optimized(kind=kind, parts={"controlnet": control}, **options)


def added(text=(2, 32), ids=(2, 6)):
    return {"added_cond_kwargs": {"text_embeds": torch.zeros(text), "time_ids": torch.zeros(ids)}}


LIST = {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 32), "time_ids": [[8, 8, 0, 0, 8, 8]] * 2}}
IMG2IMG = {"kind": diffusers.StableDiffusionImg2ImgPipeline, "image": torch.rand(1, 3, 32, 32)}
PNDM, DDPM, DDIM = (getattr(diffusers, f"{name}Scheduler") for name in ("PNDM", "DDPM", "DDIM"))

# row, way: (the call, the sentence)
REFUSED = {
    ("width", "UNet"): (lambda: call(encoder_hidden_states=torch.zeros(2, 7, 2048)), "width 2048; .* expects 32.*SDXL"),
    ("width", "optimize"): (lambda: optimized(width=1024), "width 1024; this UNet expects 32. 1024 is that of SD2.x"),
    ("width", "pipeline"): (lambda: ours(conditioner=ClassEmbedder(3, 16)), "states are 16 wide; this U-Net expects 8"),
    ("no added", "UNet"): (lambda: call("sdxl", added_cond_kwargs=None), "needs text_embeds and time_ids.*SDXL's kind"),
    ("no added", "optimize"): (
        lambda: optimized(network=tiny.unet("sdxl", **XL), width=64),
        "needs text_embeds and time_ids",
    ),
    ("no added", "pipeline"): (
        lambda: ours(unet=unet("sdxl", cross_attention_dim=8))([1], steps=2),
        "needs text_embeds and time_ids",
    ),
    ("added", "UNet, text"): (lambda: call("sdxl", **added(text=(2, 16))), r"^text_embeds: expected \(2, 32\), got"),
    ("added", "UNet, text by a multiple"): (
        lambda: call("sdxl", **added(text=(2, 24))),
        r"^text_embeds: expected \(2, 32\)",
    ),
    ("added", "UNet, ids"): (lambda: call("sdxl", **added(ids=(2, 4))), r"^time_ids: expected \(2, 6\), got \(2, 4\)"),
    ("added", "UNet, both"): (lambda: call("sdxl", **added((2, 3), (2, 4))), r"text_embeds: .*; time_ids: expected"),
    ("added", "UNet, list"): (lambda: call("sdxl", **LIST), r"time_ids must be a tensor \(2, 6\); got list"),
    ("added", "UNet, tuple"): (lambda: call("sdxl", added_cond_kwargs=(1, 2)), "must be a dict of tensors; got tuple"),
    ("batch", "UNet"): (lambda: call(encoder_hidden_states=torch.zeros(3, 7, 32)), "has batch 3, sample has batch 2"),
    ("list", "UNet"): (lambda: call(timestep=[1, 2]), "timestep must be an int, a float or a tensor.*got list"),
    ("list", "UNet2D"): (lambda: unet_2d(timestep=[1]), "timestep must be an int, a float or a tensor.*got list"),
    ("no context", "UNet"): (lambda: call(encoder_hidden_states=None), "must be a tensor .*; got NoneType"),
    ("no tokens", "UNet"): (lambda: call(encoder_hidden_states=torch.zeros(2, 0, 32)), "at least one token; got"),
    ("dtype", "UNet"): (lambda: call(sample=torch.zeros(2, 4, 8, 8).half()), r"sample is float16.*sample.to\(torch"),
    ("dtype", "UNet, context"): (
        lambda: call(encoder_hidden_states=torch.zeros(2, 7, 32).half()),
        "encoder_hidden_states is float16",
    ),
    ("dtype", "optimize"): (lambda: optimized(latents=torch.zeros(1, 4, 8, 8).half()), "sample is float16"),
    ("nan", "UNet"): (lambda: call(timestep=float("nan")), "timestep is nan"),
    ("nan", "UNet, tensor"): (lambda: call(timestep=torch.tensor([3, float("nan")])), "timestep is nan"),
    ("nan", "UNet, inf"): (lambda: call(timestep=torch.tensor(float("inf"))), "timestep is inf"),
    ("nan", "UNet, numpy"): (lambda: call(timestep=numpy.float32("nan")), "timestep is nan"),
    ("nan", "UNet2D"): (lambda: unet_2d(timestep=torch.tensor([float("nan")])), "timestep is nan"),
    ("nan", "pipeline"): (lambda: pipeline(guidance=float("nan")), "guidance=nan must be a finite number"),
    ("sizes", "pipeline"): (lambda: pipeline(size=(30, 31)), "both sides must be multiples of 4"),
    ("control", "UNet"): (lambda: call(**residuals(3)), "has 3 tensors; this UNet has 4 skips"),
    ("control", "UNet, shape"): (lambda: call(**residuals(4, 8)), r"residuals\[0\] has shape \(2, 8, 8, 8\); expected"),
    ("control", "UNet, mid"): (
        lambda: call(**{**residuals(), "mid_block_additional_residual": torch.zeros(2, 32, 2, 2)}),
        r"mid_block_additional_residual has shape \(2, 32, 2, 2\); expected \(2, 32, 4, 4\)",
    ),
    ("control", "UNet, dtype"): (
        lambda: call(**{**residuals(), "mid_block_additional_residual": torch.zeros(2, 32, 4, 4).double()}),
        "mid_block_additional_residual is float64 and the sample float32",
    ),
    ("control", "optimize"): (controlled, "has 6 tensors; this UNet has 4 skips"),
    ("adapter", "UNet"): (
        lambda: call(**adapters((8, 8, 8))),
        r"residuals\[0\] has shape .*; expected \(2, 16, 8, 8\)",
    ),
    ("adapter", "UNet, surplus"): (
        lambda: call(**adapters((16, 8, 8), (32, 4, 4), (32, 4, 4), (32, 4, 4))),
        "has 4 tensors; this UNet takes 2, and one for the mid block",
    ),
    ("adapter", "UNet, mid"): (
        lambda: call(**adapters((16, 8, 8), (32, 4, 4), (32, 2, 2))),
        r"residuals\[2\] has shape \(2, 32, 2, 2\); expected \(2, 32, 4, 4\)",
    ),
    ("adapter", "UNet, the older way"): (
        lambda: call(down_block_additional_residuals=[torch.zeros(2, 5, 8, 8)]),
        r"down_block_additional_residuals\[0\] has shape",
    ),
    **{
        ("0 steps", f"optimize, {kind.__name__}"): (
            lambda kind=kind: optimized(kind(steps_offset=1), num_inference_steps=0),
            "num_inference_steps is 0, expected at least 1",
        )
        for kind in (PNDM, DDPM, DDIM)
    },
    ("0 steps", "pipeline"): (lambda: pipeline(steps=0), "steps=0 must lie between 1 and 1000"),
    ("strength", "optimize"): (lambda: optimized(**IMG2IMG, strength=1.5), "strength should in .* but is 1.5"),
    ("strength", "pipeline"): (
        lambda: pipeline(image=torch.zeros(3, 32, 32), strength=1.5),
        "strength=1.5 must lie between 0 and 1",
    ),
}


def unet_2d(**changed):
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = UNet2D(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=8, **kinds)
    return model(**{"sample": torch.zeros(1, 3, 8, 8), "timestep": 3, **changed})


@pytest.mark.parametrize("case", REFUSED, ids="-".join)
def test_the_sentence(case):
    run, sentence = REFUSED[case]
    with pytest.raises(ValueError, match=sentence) as raised:
        run()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--guidance", "nan"], "guidance=nan must be a finite number"),
        (["--size", "30x31"], "both sides must be multiples of 4"),
        (["--steps", "0"], "steps=0 must lie between 1 and 1000"),
        (["--strength", "1.5"], "strength=1.5 is given without image"),
    ],
    ids=["nan", "sizes", "0 steps", "strength"],
)
def test_the_sentence_from_the_command_line(arguments, sentence, saved, tmp_path, capsys):
    assert sentence in said_by_sample(saved, tmp_path / "a.png", capsys, *arguments)


# --- a timestep's value -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "timestep",
    [-5, 10**6, -5.0, torch.tensor(-5), torch.tensor([3, 10**6]), torch.tensor([-5.0]), numpy.int64(-5)],
    ids=str,
)
def test_a_timestep_outside_of_the_schedule_is_warned_of(timestep):
    with pytest.warns(UserWarning, match=r"timestep (-5|-5.0|1000000) is outside anything .* \(0 to 999\)"):
        assert torch.isfinite(call(timestep=timestep).sample).all()


@pytest.mark.parametrize("timestep", [0, 999, 1000, 3.5, -1.4, torch.tensor([0, 999]), torch.tensor(-1.4)], ids=str)
def test_a_timestep_of_a_schedule_is_not(timestep):
    """DDIM's steps_offset gives 1000 of 1000; EDM's models take a quarter of the noise level's logarithm."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(timestep=timestep)


def test_numpys_timesteps_are_taken():
    stock = tiny.unet(**SMALL)
    model, inputs = UNet.from_unet(stock), tiny.inputs(stock, (8, 8))
    for timestep, same in (
        (numpy.int64(30), 30),
        (numpy.int32(30), 30),
        (numpy.float32(3.5), 3.5),
        (numpy.array(30), 30),
        (numpy.array([30]), 30),
        (numpy.array([30, 700]), torch.tensor([30, 700])),
        (numpy.arange(0, 1000, 100)[::-1][:2], torch.tensor([900, 800])),
    ):
        with torch.no_grad():
            got, wanted = model(**{**inputs, "timestep": timestep}).sample, stock(**{**inputs, "timestep": same}).sample
        assert tiny.error(got, wanted) <= 1e-5
    with pytest.raises(ValueError, match=r"timestep has shape \(3,\)"):
        model(**{**inputs, "timestep": numpy.arange(3)})
    with pytest.raises(ValueError, match="got bool"):
        model(**{**inputs, "timestep": numpy.bool_(True)})


NAN = float("nan")
NOT_FINITE = {
    "sample": lambda: call(sample=torch.full((2, 4, 8, 8), NAN)),
    "encoder_hidden_states": lambda: call(encoder_hidden_states=torch.full((2, 7, 32), NAN)),
    "text_embeds": lambda: call(
        "sdxl", **{"added_cond_kwargs": {**added()["added_cond_kwargs"], "text_embeds": torch.full((2, 32), NAN)}}
    ),
    "time_ids": lambda: call(
        "sdxl", **{"added_cond_kwargs": {**added()["added_cond_kwargs"], "time_ids": torch.full((2, 6), NAN)}}
    ),
    "mid_block_additional_residual": lambda: call(
        **{**residuals(), "mid_block_additional_residual": torch.full((2, 32, 4, 4), NAN)}
    ),
    r"down_intrablock_additional_residuals\[0\]": lambda: call(
        down_intrablock_additional_residuals=[torch.full((2, 16, 8, 8), NAN)]
    ),
    "z": lambda: AutoencoderKL.from_vae(tiny.vae()).decode(torch.full((1, 4, 4, 4), NAN)),
    "x": lambda: AutoencoderKL.from_vae(tiny.vae()).encode(torch.full((1, 3, 16, 16), NAN)),
    "sample, by guidance": lambda: optimized(guidance_scale=float("inf")),  # diffusers takes NaN for no guidance
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_debug_mode_names_what_is_not_finite(name, monkeypatch):
    with contextlib.suppress(RuntimeWarning):
        NOT_FINITE[name]()  # runs, as stock's does
    monkeypatch.setenv("LDMFAST_DEBUG", "1")
    with pytest.raises(ValueError, match=f"{name.partition(',')[0]} has values that are not finite"):
        NOT_FINITE[name]()


def test_debug_mode_compiles_and_exports(monkeypatch):
    monkeypatch.setenv("LDMFAST_DEBUG", "1")
    model = unet()
    inputs = tiny.inputs(model, (8, 8))
    with torch.no_grad():
        wanted = model(**inputs).sample
        assert tiny.error(torch.compile(model, backend="eager", fullgraph=True)(**inputs).sample, wanted) <= 1e-5
        exported = torch.export.export(model, (), inputs).module()
        assert tiny.error(exported(**inputs).sample, wanted) <= 1e-5


@pytest.mark.parametrize("size", [(7, 5), (1, 1)])
def test_odd_sizes_and_an_empty_batch_run(size):
    stock = tiny.unet(**SMALL)
    model = UNet.from_unet(stock)
    with torch.no_grad():
        inputs = tiny.inputs(stock, size)
        assert tiny.error(model(**inputs).sample, stock(**inputs).sample) <= 1e-5
        assert model(**{**tiny.inputs(stock, size, batch=0), "timestep": 3}).sample.shape == (0, 4, *size)


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_residuals_that_fit_are_taken(size):
    """What the check at the door computes is what the network has, in every kind of block."""
    kinds = ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    shape = {**SMALL, "block_out_channels": (16, 32, 32), "down_block_types": kinds[0]}
    for changes in (SMALL, {**shape, "up_block_types": (*kinds[1], "UpBlock2D")}, {**SMALL, "downsample_padding": 0}):
        stock = tiny.unet(**changes)
        seen = []
        for block in stock.down_blocks:
            block.register_forward_hook(lambda m, i, o, seen=seen: seen.extend(o[1]))
        model, inputs = UNet.from_unet(copy.deepcopy(stock)), tiny.inputs(stock, size)
        with torch.no_grad():
            stock(**inputs)
            down = [torch.randn(2, 16, *size), *map(torch.randn_like, seen)]
            control = {"down_block_additional_residuals": down, "mid_block_additional_residual": down[-1][:1]}
            assert tiny.error(model(**inputs, **control).sample, stock(**inputs, **control).sample) <= 1e-5


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
