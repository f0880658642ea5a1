"""A GPU's way through the networks, taken on the CPU: what one launch takes in leaves the numbers as stock has them.

The ops run by their reference, by the CUDA sources on the emulator, or by Triton's interpreter, which needs a process
of its own: TRITON_INTERPRET=1 pytest tests/models/test_gpu_way.py
"""

from __future__ import annotations

import copy
import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ldmfast
from ldmfast.models import layers
from ldmfast.models.gpu import folding
from ldmfast.models.unet import UNet
from ldmfast.ops import native

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench" / "checks"))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["torch", "cuda-host"]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(folding, "on_gpu", lambda x: True)
    monkeypatch.setattr(layers, "_taken", lambda x: False)
    monkeypatch.setattr(folding, "_TRITON", True)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == "cuda-host" and (reason := native.missing("cuda-host")):
        pytest.skip(f"cuda-host {reason}")
    with ldmfast.use_backend(request.param):
        yield request.param


class Ops(TorchDispatchMode):
    """Counts the calls of our ops by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        library, _, name = func._schema.name.partition("::")
        self.calls[name] += library == "ldmfast"
        return func(*args, **kwargs or {})


def called(network, arguments):
    with torch.no_grad(), Ops() as ops:
        network(**arguments)
    return ops.calls


AROUND = ("linear", "qkv_projection", "geglu", "bias_residual", "residual_layer_norm")


def tiny_call(dtype):
    torch.manual_seed(0)
    ours = UNet.from_unet(tiny.unet("sd1").to(dtype))
    return ours, tiny.to(tiny.inputs(ours), dtype)


@pytest.mark.skipif(INTERPRETED, reason="the choice does not depend on it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_what_is_taken_in(dtype):
    """In 16 bits by the products; in float32 they are PyTorch's, and what stands between them is one launch each."""
    network, arguments = tiny_call(dtype)
    kinds = Counter(type(m).__name__ for m in network.modules())
    blocks, calls = kinds["BasicTransformerBlock"], called(network, arguments)
    assert calls["bias_residual"] == kinds["ResnetBlock2D"] > 0
    if dtype is torch.float32:
        assert (calls["geglu"], calls["residual_layer_norm"]) == (blocks, 2 * blocks)
        assert not calls["linear"] and not calls["qkv_projection"]
    else:
        assert not calls["geglu"] and not calls["residual_layer_norm"]
        assert calls["qkv_projection"] == 2 * blocks
        # q of the prompt's attention, both outputs, both of the feed-forward, proj_out; the projections of the time
        assert calls["linear"] == 5 * blocks + kinds["Transformer2DModel"] + kinds["ResnetBlock2D"]


@pytest.mark.skipif(INTERPRETED, reason="the choice does not depend on it")
def test_nothing_is_taken_in_where_a_gradient_is_asked_for():
    network, arguments = tiny_call(torch.float32)
    with Ops() as ops:
        network(**arguments).sample.sum().backward()
    assert not any(ops.calls[name] for name in AROUND)
    assert all(parameter.grad is not None for parameter in network.parameters())


HOOKED = """mid_block.attentions.0.transformer_blocks.0.attn1.to_k
mid_block.attentions.0.transformer_blocks.0.attn2.to_v
mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0 mid_block.attentions.0.transformer_blocks.0.norm2
mid_block.attentions.0.transformer_blocks.0.norm1 mid_block.attentions.0.transformer_blocks.0.attn2
mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj mid_block.attentions.0.transformer_blocks.0.ff.net.2
mid_block.attentions.0.proj_out mid_block.resnets.0.conv1 mid_block.resnets.0.conv2 mid_block.resnets.0.norm2
mid_block.resnets.0.time_emb_proj up_blocks.1.resnets.0.conv_shortcut""".split()


@pytest.mark.skipif(INTERPRETED, reason="the guard does not depend on it")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_what_is_attached_to_a_layer_is_obeyed(dtype):
    torch.manual_seed(0)
    stock = tiny.unet("sd1").to(dtype)
    arguments, ours = tiny.to(tiny.inputs(stock), dtype), UNet.from_unet(copy.deepcopy(stock))
    seen = Counter()

    def hook(m, args, out):
        seen[id(m)] += 1
        return out * 1.5 + 0.25

    with torch.no_grad():
        for name in HOOKED:
            pair = [network.get_submodule(name) for network in (stock, ours)]
            handles = [layer.register_forward_hook(hook) for layer in pair]
            error = tiny.error(ours(**arguments).sample, stock(**arguments).sample)
            assert error < (1e-5 if dtype is torch.float32 else 5e-3), name
            assert [seen[id(layer)] for layer in pair] == [1, 1], name
            for handle in handles:
                handle.remove()


class Wrapped(torch.nn.Module):
    """A layer in another's place, as quantisation puts one there: it has no weight that one could read."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.skipif(INTERPRETED, reason="the guard does not depend on it")
def test_what_stands_in_a_layers_place_is_called():
    torch.manual_seed(0)
    stock = tiny.unet("sd1").half()
    for name in (name for name in HOOKED if not name.endswith("attn2")):
        parent, _, child = name.rpartition(".")
        stock.get_submodule(parent).register_module(child, Wrapped(stock.get_submodule(name)))
    arguments, ours = tiny.to(tiny.inputs(stock), torch.float16), UNet.from_unet(copy.deepcopy(stock))
    with torch.no_grad():
        assert tiny.error(ours(**arguments).sample, stock(**arguments).sample) < 5e-3


@pytest.mark.skipif(INTERPRETED, reason="nothing is computed")
def test_a_call_of_sd15_starts_at_most_400_kernels(monkeypatch):
    monkeypatch.undo()  # meta tensors take a GPU's way by themselves
    import launches

    assert launches.counted_call().total() <= 400


@torch.no_grad()
def answers(stock, arguments, dtype):
    """(ours, stock's, that of the same weights and inputs in float64)"""
    stock, arguments = stock.to(dtype), tiny.to(arguments, dtype)
    exact = copy.deepcopy(stock).double()(**tiny.to(arguments, torch.float64)).sample
    return UNet.from_unet(stock)(**arguments).sample, stock(**arguments).sample, exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("family", ["sd1"] if INTERPRETED else ["sd1", "sdxl"])
def test_the_numbers_are_stocks(family, dtype, backend):
    torch.manual_seed(0)
    stock = tiny.unet(family)
    errors, theirs = [], []
    for _ in range(1 if dtype is torch.float32 else 4):  # of one picture, stock's own error in 16 bits is some luck
        got, wanted, exact = answers(copy.deepcopy(stock), tiny.inputs(stock, size=(9, 12)), dtype)
        errors.append(tiny.error(got, exact))
        theirs.append(tiny.error(wanted, exact))
    assert sum(errors) <= (1e-5 if dtype is torch.float32 else 1.1 * sum(theirs))
