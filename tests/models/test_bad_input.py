"""What people hand over by mistake, and the sentence that it earns: a row each, by each way on which it can arise."""

from __future__ import annotations

import contextlib
import copy
import warnings

import diffusers
import numpy
import pytest
import tiny
import torch
from ways import (
    SMALL,
    XL,
    Given,
    adapters,
    added,
    call,
    controlled,
    optimized,
    optimized_xl,
    ours,
    pipeline,
    residuals,
    said_by_sample,
    unet,
)

from ldmfast import UNet
from ldmfast.conditioning.base import Unconditional
from ldmfast.conditioning.classes_and_boxes import ClassEmbedder
from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.unet2d import UNet2D
from ldmfast.models.vq import VQModel

LIST = {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 32), "time_ids": [[8, 8, 0, 0, 8, 8]] * 2}}
IMG2IMG = {"kind": diffusers.StableDiffusionImg2ImgPipeline, "image": torch.rand(1, 3, 32, 32)}
POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
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
    ("added", "optimize, text"): (
        lambda: optimized_xl(**dict.fromkeys(POOLED, torch.zeros(1, 16))),
        r"^text_embeds: expected \(2, 32\), got \(2, 16\)",
    ),
    ("added", "optimize, ids"): (  # diffusers' own
        lambda: optimized_xl(original_size=(8, 8, 8)),
        "expects an added time embedding vector of length 80, but a vector of 88 was created",
    ),
    ("added", "pipeline"): (
        lambda: given(unet("sdxl", cross_attention_dim=8), context=(None, 7, 8), text_embeds=(None, 16)),
        r"^text_embeds: expected \(2, 32\), got \(2, 16\)",
    ),
    ("batch", "optimize"): (
        lambda: optimized(latents=torch.zeros(3, 4, 8, 8)),
        "encoder_hidden_states has batch 2, sample has batch 6",
    ),
    ("batch", "pipeline"): (lambda: given(context=(3, 7, 8)), "encoder_hidden_states has batch 6, sample has batch 2"),
    ("no context", "optimize"): (  # diffusers' own
        lambda: optimized(prompt_embeds=None, negative_prompt_embeds=None),
        "Provide either `prompt` or `prompt_embeds`",
    ),
    ("no context", "pipeline"): (lambda: ours(conditioner=Unconditional())(1, steps=2), "tensor .*; got NoneType"),
    ("no tokens", "pipeline"): (lambda: given(context=(None, 0, 8)), r"at least one token; got \(2, 0, 8\)"),
    ("sizes", "optimize"): (lambda: optimized_xl(height=33), "have to be divisible by 8 but are 33"),  # diffusers' own
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    ours().save_pretrained(folder)
    return folder


def given(network=None, **shapes):
    parts = {} if network is None else {"unet": network}
    return ours(**parts, conditioner=Given(**shapes))([1], steps=2)


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


def test_no_tokens_under_optimize_ends_before_a_network():
    """In diffusers' own encode_prompt, as without us."""
    empty = dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), torch.zeros(1, 0, 32))
    with pytest.raises(RuntimeError, match="cannot reshape tensor of 0 elements"):
        optimized(**empty)


AUTOENCODERS = {  # the network, what it is asked for, its argument and that one's channels
    "decode": (lambda: AutoencoderKL.adopt(tiny.vae()), "decode", "z", 4),
    "encode": (lambda: AutoencoderKL.adopt(tiny.vae()), "encode", "x", 3),
    "VQ decode": (lambda: VQModel.adopt(tiny.vq()), "decode", "h", 3),
    "VQ encode": (lambda: VQModel.adopt(tiny.vq()), "encode", "x", 3),
}
FOR_AUTOENCODERS = {
    "half": (lambda x: x.half(), "{name} is float16 and this autoencoder float32; cast one: {name}.to.torch.float32.$"),
    "integers": (lambda x: x.byte(), "{name} is uint8 and this autoencoder float32"),
    "wider": (lambda x: torch.cat([x, x], dim=1), "{name} has {twice} channels; this autoencoder expects {channels}$"),
    "one": (lambda x: x[0], r"{name} must be a tensor .N, C, H, W.; got .{channels}, 8, 8."),
    "numpy": (lambda x: x.numpy(), r"{name} must be a tensor .N, C, H, W.; got ndarray"),
}


@pytest.mark.parametrize("wrong", FOR_AUTOENCODERS)
@pytest.mark.parametrize("way", AUTOENCODERS)
def test_an_autoencoders_sentence(way, wrong):
    make, method, name, channels = AUTOENCODERS[way]
    change, sentence = FOR_AUTOENCODERS[wrong]
    with pytest.raises(ValueError, match="^" + sentence.format(name=name, channels=channels, twice=2 * channels)):
        getattr(make(), method)(change(torch.zeros(1, channels, 8, 8)))


def first_of(output):
    """The picture or latent of what a method of an autoencoder returns."""
    found = output[0]
    return found if isinstance(found, torch.Tensor) else found.mode()


@pytest.mark.parametrize("way", AUTOENCODERS)
def test_an_autoencoder_that_casts_what_it_is_given_is_not_asked(way):
    """By a hook of the layer or of the part around it, or under autocast: as with stock's."""
    make, method, _, channels = AUTOENCODERS[way]
    model = make()
    part = {"encode": "encoder", "decode": "quantize" if way.startswith("VQ") else "post_quant_conv"}[method]
    given = torch.randn(1, channels, 8, 8)
    with torch.no_grad():
        wanted = getattr(model, method)(given)
        with torch.autocast("cpu", torch.bfloat16):
            getattr(model, method)(given.half() if not way.startswith("VQ d") else given)
        getattr(model, part).register_forward_pre_hook(lambda m, args: tuple(x.float() for x in args))
        got = getattr(model, method)(given.double())
    assert tiny.error(*map(first_of, (got, wanted))) <= 1e-5  # a hooked layer is torch's; float16 would be 1e-3 off


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--guidance", "nan"], "--guidance nan must be finite, and 0 or more"),
        (["--size", "30x31"], "both sides must be multiples of 4"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--strength", "1.5"], "--strength 1.5 must lie above 0, and be at most 1"),
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
