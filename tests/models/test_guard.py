"""Whatever stock's forward obeys, ours obeys: each method and attribute that it reads is patched, and both compared.

The cases come from the source of diffusers' and torch's classes, by ast: what `forward`, and the methods that it
calls, read of `self`, and what the attention processors read of `attn`.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import textwrap

import diffusers
import pytest
import tiny
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor, embeddings
from diffusers.models.attention_processor import Attention
from diffusers.utils import BaseOutput
from torch import nn

from ldmfast.diffusion import catalogue
from ldmfast.models import originals

CLOSE = 1e-5
SMALL = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
DOWN, UP = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def legacy():
    model = tiny.unet(**SMALL, down_block_types=DOWN, up_block_types=UP, num_class_embeds=3)
    model.set_default_attn_processor()
    return model


def unet_2d():
    kinds = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(sample_size=16, attention_head_dim=8, **SMALL, **kinds).eval()


def resampling():
    kinds = ("ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "ResnetUpsampleBlock2D")
    return tiny.unet(**SMALL, down_block_types=kinds[0], up_block_types=kinds[1])


def vq():
    blocks = {"down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")}
    blocks |= {"up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")}
    return diffusers.VQModel(**SMALL, **blocks, num_vq_embeddings=16).eval()


MAKE = {
    "sdxl": lambda: tiny.unet("sdxl", block_out_channels=(16, 32), layers_per_block=1, transformer_layers_per_block=1),
    "legacy": legacy,
    "resampling": resampling,
    "unet_2d": unet_2d,
    "vae": lambda: tiny.vae(
        **SMALL, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    ),
    "vq": vq,
}


@functools.cache
def made(name):
    torch.manual_seed(0)
    return MAKE[name]()


def answer(model):
    """What the model makes of fixed inputs, without gradients and with them."""
    torch.manual_seed(2)
    if isinstance(model, diffusers.UNet2DConditionModel):
        inputs = tiny.inputs(model, (8, 8), batch=2)
        inputs["encoder_attention_mask"] = torch.tensor([[1, 1, 0, 1, 1, 1, 0]] * 2)
        inputs |= {} if model.class_embedding is None else {"class_labels": torch.tensor([0, 2])}
    elif isinstance(model, diffusers.UNet2DModel):
        inputs = {"sample": torch.randn(1, 3, 8, 8), "timestep": 40}
    else:
        inputs = {"sample": PIXELS}
    with torch.no_grad():
        first = model(**inputs).sample
    return torch.cat([first, model(**inputs).sample.detach()])


# --- what stock's forward reads ---------------------------------------------------------------------------------------


def reads(kind: type) -> set[str]:
    """The attributes that forward, and the methods that it calls, read of `self`."""
    names, waiting = set(), ["forward"]
    while waiting:
        name = waiting.pop()
        new = attributes(getattr(kind, name), "self") - names
        if kind is Attention:
            for processor in (attention_processor.AttnProcessor, attention_processor.AttnProcessor2_0):
                new |= attributes(processor.__call__, "attn") - names
        names |= new
        waiting += [each for each in new if inspect.isfunction(getattr(kind, each, None))]
    return names | {"forward", "_call_impl", "__call__"}


def attributes(function, of: str) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name))
    return {node.attr for node in found if node.value.id == of}


def cases():
    """(model, kind, attribute, how): each once, on the first model that has it."""
    seen = {}
    for name in MAKE:
        for module in made(name).modules():
            kind = type(module)
            if kind.forward is nn.Module.forward or kind is nn.ModuleList:
                continue
            processor = type(module.processor).__name__ if kind is Attention else ""
            for attribute in sorted(reads(kind)):
                for how in ways(module, attribute):
                    seen.setdefault((kind, processor, attribute, how), name)
    return [(name, kind, attribute, how) for (kind, _, attribute, how), name in seen.items()]


def ways(module, attribute):
    value = getattr(module, attribute, None)
    if attribute == "__call__":
        return ("class",)  # Python does not look for it on an instance
    if inspect.ismethod(value):
        return ("method", "class")
    if isinstance(value, nn.ModuleList):
        return ()  # what is in it is looked at for itself
    if isinstance(value, nn.Module):
        return ("hook", "replaced")
    changed = other(value)
    return () if changed is value else ("value",)


# --- how it is patched ------------------------------------------------------------------------------------------------


def scaled(value):
    """A tensor times 1.5, or the first tensor of a tuple or an output."""
    if isinstance(value, torch.Tensor):
        return value * 1.5 if value.is_floating_point() else value
    if isinstance(value, BaseOutput):
        found = {field.name: value[field.name] for field in dataclasses.fields(value) if field.name in value}
        return type(value)(**{name: scaled(each) for name, each in found.items()})
    return (scaled(value[0]), *value[1:]) if isinstance(value, tuple) else value


def other(value):
    """Another value of the kind, such as stock's forward may be given; the value itself if we know of none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value // 2 if value > 1 and value % 2 == 0 else value + 1
    if isinstance(value, float):
        return value * 1.5
    if isinstance(value, str):
        return {"zeros": "circular", "default": "none"}.get(value, "other")
    return 1.5 * value.detach() if isinstance(value, torch.Tensor) else value


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return scaled(self.inner(*args, **kwargs))


def around(function):
    @functools.wraps(function)
    def patched(*args, **kwargs):
        return scaled(function(*args, **kwargs))

    return patched


def patch(model, kind, attribute, how):
    """The instances of `kind` in the model, changed."""
    for module in list(model.modules()):
        if not (type(module) is kind or getattr(module, "stock", None) is kind):
            continue
        value = getattr(module, attribute, None)
        if how == "method":
            setattr(module, attribute, around(value))
        elif how == "hook" and value is not None:
            value.register_forward_hook(lambda m, i, o: scaled(o))
        elif how == "replaced" and value is not None:
            setattr(module, attribute, Scaled(value))
        elif how == "value" and isinstance(value, nn.Parameter):
            value.data.mul_(1.5)
        elif how == "value":
            setattr(module, attribute, other(value))


CASES = cases()


def case_id(case):
    return "-".join(each if isinstance(each, str) else each.__name__ for each in case)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_a_patch_is_obeyed(case, monkeypatch):
    name, kind, attribute, how = case
    stock = copy.deepcopy(made(name))
    ours = catalogue.take_over(copy.deepcopy(stock))
    before = answer(stock)
    if how == "class":
        monkeypatch.setattr(kind, attribute, around(getattr(kind, attribute)))
    else:
        patch(stock, kind, attribute, how)
        patch(ours, kind, attribute, how)
    try:
        wanted = answer(stock)
    except Exception:
        return  # a value that stock cannot have
    got = answer(ours)
    assert tiny.error(got, wanted) <= CLOSE
    if how != "value" and tiny.error(before, wanted) > 1e-6:
        assert ours.explain()


def test_the_cases_are_those_that_people_use():
    found = {(kind.__name__, attribute, how) for _, kind, attribute, how in CASES}
    assert len(found) > 300
    assert found >= {
        ("Conv2d", "_conv_forward", "method"),
        ("Conv2d", "padding_mode", "value"),
        ("Attention", "get_attention_scores", "method"),
        ("Attention", "get_attention_scores", "class"),
        ("Attention", "scale", "value"),
        ("Attention", "rescale_output_factor", "value"),
        ("ResnetBlock2D", "nonlinearity", "hook"),
        ("Decoder", "conv_act", "replaced"),
        ("UNet2DConditionModel", "get_time_embed", "method"),
        ("UNet2DConditionModel", "forward", "class"),
        ("AutoencoderKL", "_decode", "class"),
        ("Transformer2DModel", "_operate_on_continuous_inputs", "method"),
    }


def compare(name, change):
    """Ours against stock after change(model)."""
    stock = copy.deepcopy(made(name))
    ours = catalogue.take_over(copy.deepcopy(stock))
    before = answer(stock)
    for model in (stock, ours):
        change(model)
    wanted, got = answer(stock), answer(ours)
    assert tiny.error(got, wanted) <= CLOSE and tiny.error(before, wanted) > 1e-6
    return ours.explain()


@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0"])
def test_a_processors_call_that_was_replaced_on_its_class(processor, monkeypatch):
    kind = getattr(attention_processor, processor)
    name = "legacy" if processor == "AttnProcessor" else "sdxl"
    stock = copy.deepcopy(made(name))
    ours = catalogue.take_over(copy.deepcopy(stock))
    before = answer(stock)
    monkeypatch.setattr(kind, "__call__", around(kind.__call__))
    wanted = answer(stock)
    assert tiny.error(answer(ours), wanted) <= CLOSE and tiny.error(before, wanted) > 1e-3
    assert f"{processor}.__call__ was replaced" in " ".join(ours.explain())


@pytest.mark.parametrize(
    "space, function, name",
    [
        (F, "interpolate", "vae"),
        (F, "linear", "sdxl"),
        (F, "conv2d", "sdxl"),
        (F, "conv2d", "vae"),
        (F, "group_norm", "sdxl"),
        (F, "scaled_dot_product_attention", "sdxl"),
        (F, "silu", "vq"),
        (F, "layer_norm", "legacy"),
        (embeddings, "get_timestep_embedding", "sdxl"),
    ],
    ids=lambda each: getattr(each, "__name__", each),
)
def test_a_function_that_was_replaced_in_its_module(space, function, name, monkeypatch):
    ours = catalogue.take_over(copy.deepcopy(made(name)))
    before = answer(ours)
    monkeypatch.setattr(space, function, around(getattr(space, function)))
    wanted = answer(made(name))
    assert tiny.error(answer(ours), wanted) <= CLOSE and tiny.error(before, wanted) > 1e-3
    assert f"{function} was replaced" in ours.explain()[0]


def first_resnet(model):
    return next(module for module in model.modules() if type(module).__name__ == "ResnetBlock2D")


def a_norm_for_dropout(model):
    first_resnet(model).dropout = nn.GroupNorm(4, 16)


def a_layer_norm_for_a_group_norm(model):
    torch.manual_seed(3)
    first_resnet(model).norm1 = nn.LayerNorm([8, 8])


def a_convolution_for_a_downsampler(model):
    torch.manual_seed(3)
    model.down_blocks[0].downsamplers[0] = nn.Conv2d(16, 16, 2, stride=2)


def a_linear_layer_for_a_dropout(model):
    torch.manual_seed(3)
    attention = next(module for module in model.modules() if type(module) is Attention)
    attention.to_out[1] = nn.Linear(attention.inner_dim, attention.inner_dim)


def an_activation_for_a_dropout(model):
    for module in model.modules():
        if type(module).__name__ == "FeedForward":
            module.net[1] = nn.SiLU()


def same_padding(model):
    convolution = first_resnet(model).conv1
    convolution.padding, convolution.dilation = "same", (2, 2)


PLACED = [
    a_norm_for_dropout,
    a_layer_norm_for_a_group_norm,
    a_convolution_for_a_downsampler,
    a_linear_layer_for_a_dropout,
    an_activation_for_a_dropout,
    same_padding,
]


@pytest.mark.parametrize("change", PLACED, ids=lambda change: change.__name__)
def test_another_layer_that_we_know_in_a_place_that_is_not_its_own(change):
    assert compare("sdxl", change)


def test_a_global_hook_reaches_the_autoencoders():
    for name in ("vae", "vq"):
        ours = catalogue.take_over(copy.deepcopy(made(name)))
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, i, o: o * 1.1 if isinstance(m, nn.GroupNorm) else None
        )
        try:
            assert tiny.error(answer(ours), answer(made(name))) <= CLOSE
            assert "global module hook" in ours.explain()[0]
        finally:
            handle.remove()


def test_what_was_replaced_before_the_import_is_replaced():
    import subprocess
    import sys

    code = """
import torch
original = torch.nn.Conv2d._conv_forward
torch.nn.Conv2d._conv_forward = lambda self, *args: 1.5 * original(self, *args)
import tiny
from ldmfast.models.unet import UNet
print(UNet.from_unet(tiny.unet()).explain()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="tests")
    assert "_conv_forward was replaced" in done.stdout


def test_a_function_that_was_replaced_before_the_import_is_none_of_torchs(monkeypatch):
    monkeypatch.setattr(F, "linear", around(F.linear))
    found = {name: function for _, name, function in originals.functions((nn.Linear, nn.Conv2d))}
    assert found["linear"] is None and found["conv2d"] is F.conv2d
