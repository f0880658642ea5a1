"""The layers with what surrounds a product: folded into it where our kernels take it, in turn where they do not."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldmfast.models import drop_in, layers
from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.unet import UNet
from ldmfast.models.unet2d import UNet2D
from ldmfast.models.vq import VQModel
from ldmfast.ops import native
from ldmfast.ops.gradients import products


def pair():
    """(stock, ours), with parameters of their own."""
    stock = tiny.unet("sd1")
    return stock, UNet.from_unet(copy.deepcopy(stock))


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def slow(request, monkeypatch):
    """A dtype that torch is slow at, as on a processor with vectors of 8."""
    for module in (products, layers):
        monkeypatch.setattr(module, "SLOW", (request.param,))
    monkeypatch.setattr(native, "lanes", lambda: 8)
    return request.param


def noted(monkeypatch):
    """The dtypes of what F.linear and F.conv2d are called with, as they come."""
    seen = []

    def noting(function):
        def note(x, *args, **kwargs):
            seen.append(x.dtype)
            return function(x, *args, **kwargs)

        return note

    monkeypatch.setattr(drop_in, "FUNCTIONS", ())  # as if nobody had replaced them
    for name in ("linear", "conv2d"):
        monkeypatch.setattr(F, name, noting(getattr(F, name)))
    return seen


def test_no_product_of_the_network_is_left_to_torch_in_a_slow_type(slow, monkeypatch):
    _, ours = pair()
    ours, arguments, seen = copy.deepcopy(ours).to(slow), tiny.to(tiny.inputs(ours), slow), noted(monkeypatch)
    with torch.no_grad():
        ours(**arguments)
    assert slow not in seen


def test_the_gradient_of_a_slow_type_is_computed_in_float32(slow, monkeypatch):
    for kind, x in ((nn.Conv2d(8, 16, 3, padding=1), torch.randn(2, 8, 12, 12)), (nn.Linear(8, 16), torch.randn(5, 8))):
        layer = kind.to(slow)
        x = x.to(slow).requires_grad_()
        function = layers.conv2d if isinstance(layer, nn.Conv2d) else layers.linear
        function(layer, x).float().square().sum().backward()
        wanted = copy.deepcopy(layer).double()
        exact = x.detach().double().requires_grad_()
        wanted(exact).square().sum().backward()
        pairs = [(x, exact), *zip(layer.parameters(), wanted.parameters(), strict=True)]
        for found, true in ((a.grad, b.grad) for a, b in pairs):
            assert found.dtype == slow and tiny.error(found, true) <= 3 * torch.finfo(slow).eps


class Products(TorchDispatchMode):
    """The dtypes of what torch multiplies."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in {"aten::convolution", "aten::convolution_backward", "aten::mm", "aten::addmm", "aten::bmm"}:
            self.seen |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return func(*args, **(kwargs or {}))


def test_autocast_to_a_slow_type_leaves_no_product_of_a_layer_to_torch(slow):
    """A step of somebody's training in mixed precision: its weights and their gradients are float32."""
    for kind, x in (
        (nn.Conv2d(8, 16, 3, padding=1), torch.randn(2, 8, 12, 12)),
        (nn.Conv2d(8, 16, 3, padding=1, stride=2), torch.randn(2, 8, 12, 12)),
        (nn.Conv2d(8, 16, 1), torch.randn(2, 8, 12, 12)),
        (nn.Linear(8, 16), torch.randn(5, 8)),
    ):
        function = layers.conv2d if isinstance(kind, nn.Conv2d) else layers.linear
        x, wanted, exact = x.requires_grad_(), copy.deepcopy(kind).double(), x.detach().double().requires_grad_()
        with Products() as products:
            with torch.autocast("cpu", slow):
                y = function(kind, x)
            y.float().square().sum().backward()
        assert y.dtype == slow and products.seen <= {torch.float32}
        wanted(exact).square().sum().backward()
        pairs = [(x, exact), *zip(kind.parameters(), wanted.parameters(), strict=True)]
        for found, true in ((a.grad, b.grad) for a, b in pairs):
            assert found.dtype == torch.float32 and tiny.error(found, true) <= 4 * torch.finfo(slow).eps


SURROUNDED = {
    "norm": {"norm": nn.GroupNorm(4, 24), "silu": True},
    "modulated": {"norm": nn.GroupNorm(4, 24), "silu": True, "scale": (2, 24), "shift": (2, 24)},
    "after": {"add": (2, 16), "residual": (2, 16, 9, 7), "output_scale": 0.7},
    "upsample": {"upsample": 2, "norm": nn.GroupNorm(4, 24)},
}


@pytest.mark.parametrize("attached", [False, True], ids=["folded", "in turn"])
@pytest.mark.parametrize("around", SURROUNDED)
def test_a_convolution_is_the_same_folded_and_in_turn(around, attached):
    torch.manual_seed(0)
    m, called = nn.Conv2d(24, 16, 3, padding=1), []
    x, skip = torch.randn(2, 16, 9, 7), torch.randn(2, 8, 9, 7)
    named = {k: torch.randn(v) if isinstance(v, tuple) else v for k, v in SURROUNDED[around].items()}
    if attached:
        m.register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        found = layers.conv2d(m, x, skip=skip, **named)
    h = torch.cat([x, skip], 1)
    if "norm" in named:
        h = named["norm"](h)
        h = h * (1 + named["scale"][:, :, None, None]) + named["shift"][:, :, None, None] if "scale" in named else h
        h = F.silu(h) if named.get("silu") else h
    h = F.interpolate(h, scale_factor=2.0) if "upsample" in named else h
    y = F.conv2d(h, m.weight, m.bias, padding=1)
    if "add" in named:
        y = (y + named["add"][:, :, None, None] + named["residual"]) * named["output_scale"]
    assert tiny.error(found, y) <= 1e-6 and len(called) == attached


@pytest.mark.parametrize("attached", [False, True], ids=["folded", "in turn"])
@pytest.mark.parametrize("activation", ["none", "geglu"])
def test_a_linear_layer_is_the_same_folded_and_in_turn(activation, attached):
    torch.manual_seed(0)
    m, norm, x, called = nn.Linear(24, 32), nn.LayerNorm(24), torch.randn(2, 5, 24), []
    residual = torch.randn(2, 5, 16 if activation == "geglu" else 32)
    if attached:
        m.register_forward_hook(lambda *_: called.append(True))
    with torch.no_grad():
        found = layers.linear(m, x, norm=norm, activation=activation, residual=residual, output_scale=0.7)
    y = F.linear(norm(x), m.weight, m.bias)
    if activation == "geglu":
        a, b = y.chunk(2, -1)
        y = a * F.gelu(b)
    assert tiny.error(found, (y + residual) * 0.7) <= 1e-6 and len(called) == attached


class Names(TorchDispatchMode):
    """The names of torch's operators that are called."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.name())
        return func(*args, **(kwargs or {}))


def test_torch_normalises_and_activates_nothing_of_the_network():
    _, ours = pair()
    with torch.no_grad(), Names() as names:
        ours(**tiny.inputs(ours))
    assert {"ldmfast::conv2d", "ldmfast::group_norm_affine"} <= names.seen
    assert not {"aten::native_group_norm", "aten::native_layer_norm", "aten::gelu", "aten::add.Tensor"} & names.seen


EDITED = (
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.resnets.0.norm2",
    "mid_block.attentions.0.proj_in",
    "conv_out",
)


def test_a_single_element_that_is_changed_through_data_counts_at_once():
    """Nothing that was made of a weight outlives the call, so nothing can go stale."""
    stock, ours = pair()
    arguments = tiny.inputs(stock)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    names = (*EDITED, f"{block}.attn2.to_k", f"{block}.norm3", f"{block}.ff.net.0.proj", "time_embedding.linear_1")
    with torch.no_grad():
        before = ours(**arguments).sample
        for name in names:
            for model in (stock, ours):
                model.get_submodule(name).weight.data.view(-1)[3] += 5.0
            wanted, found = stock(**arguments).sample, ours(**arguments).sample
            assert tiny.error(found, wanted) <= 1e-5 < tiny.error(found, before)
            before = found


KINDS = {
    "unet": (tiny.unet, UNet.from_unet, tiny.inputs),
    "unet2d": (tiny.unet2d, UNet2D.from_unet, lambda model: {"sample": torch.randn(1, 3, 16, 16), "timestep": 3}),
    "autoencoder": (tiny.vae, AutoencoderKL.from_vae, lambda model: {"sample": torch.randn(1, 3, 32, 32)}),
    "codebook": (tiny.vq, VQModel.adopt, lambda model: {"sample": torch.randn(1, 3, 16, 16)}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_stay_as_stock_lays_them_out(kind, dtype, tmp_path):
    """So they are saved, flattened, viewed and drawn like as stock's are, after a step of training, too."""
    make, adopt, inputs = KINDS[kind]
    stock = make().to(dtype)
    ours, given = adopt(copy.deepcopy(stock)), tiny.to(inputs(stock), dtype)
    with torch.no_grad():
        ours(**given)
    ours(**given).sample.float().mean().backward()
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        assert mine.stride() == theirs.stride() and mine.view(-1).shape == (theirs.numel(),)
    save_file(ours.state_dict(), tmp_path / "weights.safetensors")
    flat = [nn.utils.parameters_to_vector(model.parameters()) for model in (stock, ours)]
    assert torch.equal(*flat)
    drawn = []
    for model in (stock, ours):
        torch.manual_seed(3)
        drawn.append(torch.cat([torch.randn_like(parameter).flatten() for parameter in model.parameters()]))
    assert torch.equal(*drawn)
