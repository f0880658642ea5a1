"""Each row of the table in ldmfast/models/graph/__init__.py: what is seen, what makes another graph, what ends it."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import tiny
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor
from diffusers.training_utils import EMAModel
from launch_recorder import LaunchRecorder
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ldmfast
from ldmfast import UNet
from ldmfast.models import graph
from ldmfast.models.graph.cuda_capture import CudaCapture

LAYERS = ("to_q", "to_v", "ff.net.0.proj", "conv1", "time_emb_proj")
SMALL = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
PLACES = {"recorder": ("cpu", LaunchRecorder), "cuda": ("cuda", CudaCapture)}


@pytest.fixture(params=PLACES)
def place(request):
    device, capture = PLACES[request.param]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("a CUDA graph needs an NVIDIA GPU")
    return device, capture()


def network(place):
    device, capture = place
    return UNet.from_unet(tiny.unet(**SMALL).to(device)).graph(capture=capture)


def inputs(u, **named):
    found = tiny.inputs(u, size=(8, 8), **named)
    return {k: v.to(u.device) if isinstance(v, torch.Tensor) else v for k, v in found.items()}


@torch.no_grad()
def call(u, a):
    return u(**a).sample


@torch.no_grad()
def eager(u, a):
    graphs, u._graphs = u._graphs, None
    try:
        return u(**a).sample
    finally:
        u._graphs = graphs


def settle(u, a):
    """Call it until it is replayed."""
    for _ in range(4):
        before = u.graphs.replays
        y = call(u, a)
        if u.graphs.replays > before:
            assert torch.equal(y, eager(u, a))
            return y
    raise AssertionError(u.explain())


def add_lora(u, alpha=4):
    u.add_adapter(LoraConfig(r=2, lora_alpha=alpha, init_lora_weights=False, target_modules=list(LAYERS)), "one")


# --- seen -------------------------------------------------------------------------------------------------------------


def values(u, a):
    for name in ("sample", "encoder_hidden_states"):
        a[name] = torch.randn_like(a[name])


def a_number(u, a):
    a["timestep"] = 7


def an_element(u, a):
    a["timestep"] = torch.tensor(7)


def weights_in_place(u, a):
    ema = EMAModel(u.parameters(), model_cls=UNet, model_config=u.config)
    for x in ema.shadow_params:
        x.mul_(1.5)
    ema.copy_to(u.parameters())


def fused(u, a):
    u.fuse_lora()
    u.unload_lora()


def lora_in_place(u, a):
    for name, x in u.named_parameters():
        if "lora_B" in name:
            x.data.mul_(2)


SEEN = {
    "values of the inputs": (values,),
    "timestep: a number, [] or [N]": (a_number, an_element),
    "weights in place": (weights_in_place,),
    "LoRA matrices in place": (lora_in_place,),
}


@pytest.mark.parametrize("row, change", [(row, change) for row, changes in SEEN.items() for change in changes])
def test_a_change_is_seen_by_the_graph(row, change, place):
    u = network(place)
    if row.startswith("LoRA"):
        add_lora(u)
    a = inputs(u)
    before = settle(u, a)
    captures, replays = u.graphs.captures, u.graphs.replays
    change(u, a)
    y = call(u, a)
    assert torch.equal(y, eager(u, a)) and not torch.equal(y, before)
    assert (u.graphs.captures, u.graphs.replays) == (captures, replays + 1)


def test_fused_lora_is_seen_once_its_layers_are_gone(place):
    u = network(place)
    a = inputs(u)
    before = settle(u, a)
    add_lora(u)
    fused(u, a)
    replays, y = u.graphs.replays, call(u, a)
    assert torch.equal(y, eager(u, a)) and not torch.equal(y, before)
    assert u.graphs.replays == replays + 1  # the layers are the ones of the first graph, the values new


# --- another graph ----------------------------------------------------------------------------------------------------


def shape(u, a):
    a |= inputs(u, batch=1)


def tokens(u, a):
    a |= inputs(u, tokens=9)


def dtype(u, a):
    a["timestep"] = a["timestep"].float()


def layout(u, a):
    a["sample"] = a["sample"].contiguous(memory_format=torch.channels_last)


def control(u, a):
    n, s = 2, u.device
    shapes = [(16, 8), (16, 8), (16, 4), (32, 4)]
    a["down_block_additional_residuals"] = tuple(torch.randn(n, c, d, d, device=s) for c, d in shapes)
    a["mid_block_additional_residual"] = torch.randn(n, 32, 4, 4, device=s)


def mask(u, a):
    a["encoder_attention_mask"] = torch.ones(2, 7, device=u.device).tril(3)


def lora_scale(u, a):
    a["cross_attention_kwargs"] = {"scale": 0.5}


def adapter_scale(u, a):
    u.set_adapters("one", 0.25)


def adapters_off(u, a):
    u.disable_adapters()


def adapters_on(u, a):
    u.enable_adapters()


def whole_adapter(u, a):
    u.set_adapters("one", 1.0)


def epsilon(u, a):
    u.down_blocks[0].resnets[0].norm1.eps = 0.5


def epsilon_back(u, a):
    u.down_blocks[0].resnets[0].norm1.eps = 1e-5


def training(u, a):
    u.train()


def trained(u, a):
    u.eval()


def drop_scale(u, a):
    del a["cross_attention_kwargs"]


def drop_control(u, a):
    del a["down_block_additional_residuals"], a["mid_block_additional_residual"]


ANOTHER = {
    "shape, dtype or layout of an input": [(shape, None), (tokens, None), (dtype, None), (layout, None)],
    "an argument given or left out": [(control, drop_control), (mask, None)],
    "LoRA's scale or choice of adapters": [
        (lora_scale, drop_scale),
        (adapter_scale, whole_adapter),
        (adapters_off, adapters_on),
    ],
    "a module's attribute (eps, groups, ...)": [(epsilon, epsilon_back), (training, trained)],
}


@pytest.mark.parametrize("row, change, back", [(row, *pair) for row, pairs in ANOTHER.items() for pair in pairs])
def test_a_change_makes_another_graph(row, change, back, place):
    u = network(place)
    if row.startswith("LoRA"):
        add_lora(u)
    a = inputs(u)
    settle(u, a)
    first = dict(a)
    change(u, a)
    captures, replays = u.graphs.captures, u.graphs.replays
    y = call(u, a)
    assert torch.equal(y, eager(u, a)) and u.graphs.replays == replays
    settle(u, a)
    assert u.graphs.captures == captures + 1 == len(u.graphs)
    if back:
        back(u, a)
    else:
        a = first
    replays = u.graphs.replays
    assert torch.equal(call(u, a), eager(u, a))
    assert (u.graphs.captures, u.graphs.replays) == (captures + 1, replays + 1)  # the older one was kept


def test_loaded_and_removed_lora_makes_another_graph(place):
    u = network(place)
    a = inputs(u)
    plain = settle(u, a)
    add_lora(u)
    with_lora = settle(u, a)
    assert not torch.equal(plain, with_lora) and len(u.graphs) == 2
    u.unload_lora()
    captures = u.graphs.captures
    assert torch.equal(call(u, a), plain) and u.graphs.captures == captures
    add_lora(u)
    call(u, a)
    assert len(u.graphs) == 1  # the first adapter's layers are gone, and their graph with them


def test_a_switch_that_chooses_kernels_makes_another_graph(place):
    u = network(place)
    a = inputs(u)
    settle(u, a)
    for switch in (lambda: ldmfast.use_backend("torch"), lambda: torch.backends.cudnn.flags(benchmark=True)):
        captures, replays = u.graphs.captures, u.graphs.replays
        with switch():
            assert torch.equal(call(u, a), eager(u, a)) and u.graphs.replays == replays
            settle(u, a)
        call(u, a)
        assert u.graphs.captures == captures + 1 == len(u.graphs)


# --- captured again ---------------------------------------------------------------------------------------------------


def converted(u, a):
    u.to(torch.bfloat16)
    a |= tiny.to(a, torch.bfloat16)


def other_data(u, a):
    for x in u.parameters():
        x.data = x.data * 1.5


def other_parameter(u, a):
    m = u.mid_block.resnets[0].conv1
    m.weight = nn.Parameter(m.weight.detach() * 1.5)


def other_module(u, a):
    m = nn.Conv2d(4, 16, 3, padding=1).to(u.device)
    u.conv_in = m.requires_grad_(False)


AGAIN = {
    "weights moved, converted or replaced": (converted, other_data, other_parameter),
    "a module replaced": (other_module,),
}


@pytest.mark.parametrize("row, change", [(row, change) for row, changes in AGAIN.items() for change in changes])
def test_a_replaced_weight_is_captured_again(row, change, place):
    u = network(place)
    a = inputs(u)
    before = settle(u, a)
    change(u, a)
    replays, y = u.graphs.replays, call(u, a)
    assert torch.equal(y, eager(u, a)) and not torch.equal(y, before)
    assert len(u.graphs) == 0 and u.graphs.replays == replays
    settle(u, a)
    assert u.graphs.captures == 2


# --- off --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hooked(u, a):
    handle = u.mid_block.resnets[0].conv1.register_forward_hook(lambda m, args, y: y * 2)
    yield
    handle.remove()


@contextlib.contextmanager
def wrapped(u, a):
    m = u.mid_block.resnets[0]
    forward = m.forward
    m.forward = lambda *args, **kwargs: forward(*args, **kwargs) * 2
    yield
    del m.forward


@contextlib.contextmanager
def wrapped_whole(u, a):
    forward = u.forward
    u.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    yield
    del u.forward


@contextlib.contextmanager
def hooked_lora(u, a):
    add_lora(u)
    m = u.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    handle = m.lora_A["one"].register_forward_hook(lambda m, args, y: y * 2)
    yield
    handle.remove()


@contextlib.contextmanager
def sliced(u, a):
    before = u.attn_processors
    u.set_attn_processor({name: SlicedAttnProcessor(1) for name in before})
    yield
    u.set_attn_processor(before)


@contextlib.contextmanager
def other_class(u, a):
    class Twice(nn.Module):
        def forward(self, x, *args, **kwargs):
            return x * 2

    before = u.mid_block.resnets[0]
    u.mid_block.resnets[0] = Twice()
    yield
    u.mid_block.resnets[0] = before


@contextlib.contextmanager
def freeu(u, a):
    u.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    yield
    u.disable_freeu()


@contextlib.contextmanager
def chunked(u, a):
    block = u.mid_block.attentions[0].transformer_blocks[0]
    block.set_chunk_feed_forward(2, 1)
    yield
    block.set_chunk_feed_forward(None)


@contextlib.contextmanager
def dropping(u, a):
    u.mid_block.resnets[0].dropout.p = 0.5
    u.train()
    yield
    u.eval()


@contextlib.contextmanager
def dora(u, a):
    config = {"r": 2, "use_dora": True, "init_lora_weights": False, "target_modules": ["to_q"]}
    u.add_adapter(LoraConfig(**config), "one")
    yield
    u.unload_lora()


@contextlib.contextmanager
def subclassed(u, a):
    class Marked(nn.Parameter):
        pass

    before = u.mid_block.resnets[0].norm1.weight
    m = nn.Embedding(2, 2).to(u.device)
    m.weight = Marked(m.weight.detach())
    u.mid_block.other = m
    assert type(m.weight) is Marked and before is u.mid_block.resnets[0].norm1.weight
    yield
    del u.mid_block.other


@contextlib.contextmanager
def patched(u, a):
    before = nn.functional.silu
    nn.functional.silu = lambda x, inplace=False: before(x) * 2
    yield
    nn.functional.silu = before


@contextlib.contextmanager
def debugging(u, a):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LDMFAST_DEBUG", "1")
        yield


@contextlib.contextmanager
def exactly(u, a):
    with ldmfast.numerics("exact"):
        yield


@contextlib.contextmanager
def with_gradients(u, a):
    with torch.enable_grad():
        yield


@contextlib.contextmanager
def autocast(u, a):
    with torch.autocast(u.device.type, torch.bfloat16):
        yield


@contextlib.contextmanager
def watched(u, a):
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Watching():
        yield


@contextlib.contextmanager
def elsewhere(u, a):
    a["class_labels"] = torch.ones(2, device="meta")  # which this network does not read
    yield


@contextlib.contextmanager
def subclass(u, a):
    class Marked(torch.Tensor):
        pass

    a["encoder_hidden_states"] = a["encoder_hidden_states"].as_subclass(Marked)
    yield


@contextlib.contextmanager
def more_kwargs(u, a):
    a["cross_attention_kwargs"] = {"other": 1}
    yield


OFF = {
    "gradients, autocast": [(with_gradients, "gradients are on"), (autocast, "autocast is on")],
    "a mode, transform or trace that watches": [(watched, "a mode, a transform or a trace watches it")],
    "LDMFAST_DEBUG=1, the contract exact": [(debugging, "LDMFAST_DEBUG=1"), (exactly, "the numerical contract exact")],
    "an input on another device, a subclass": [
        (elsewhere, "class_labels is on meta"),
        (subclass, "encoder_hidden_states is a Marked"),
    ],
    "cross_attention_kwargs beyond scale": [(more_kwargs, "cross_attention_kwargs has other")],
    "hooks or a forward put on a module": [
        (hooked, "it has hooks"),
        (wrapped, "its forward is wrapped"),
        (wrapped_whole, "its forward was replaced"),
        (hooked_lora, "it has hooks"),
    ],
    "a processor or module that is not stock's": [
        (sliced, "its attention processor is SlicedAttnProcessor"),
        (other_class, "Twice is neither torch's nor diffusers'"),
    ],
    "FreeU, chunking, dropout in training": [
        (freeu, "FreeU is on"),
        (chunked, "its feed-forward is chunked"),
        (dropping, "it drops values"),
    ],
    "quantised weights, DoRA": [(subclassed, "one of its weights is a Marked"), (dora, "DoRA or the like")],
    "stock's code replaced": [(patched, "silu was replaced")],
}


@pytest.mark.parametrize("row, change, reason", [(row, *pair) for row, pairs in OFF.items() for pair in pairs])
def test_a_reason_turns_it_off_and_is_said(row, change, reason, place):
    u = network(place)
    a = inputs(u)
    settle(u, a)
    first, replays, captures = dict(a), u.graphs.replays, u.graphs.captures
    with change(u, a), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            torch.manual_seed(1)
            y = u(**a).sample if torch.is_grad_enabled() and change is with_gradients else call(u, a)
            graphs, u._graphs = u._graphs, None
            torch.manual_seed(1)
            with contextlib.nullcontext() if change is with_gradients else torch.no_grad():
                wanted = u(**a).sample
            u._graphs = graphs
            assert torch.equal(y, wanted) and type(y) is type(wanted)
        said = [line for line in u.explain() if line.startswith(("Graph mode is off", "The last call ran without"))]
        assert len(said) == 1 and reason in said[0], said
    assert (u.graphs.replays, u.graphs.captures) == (replays, captures)
    if row not in ("quantised weights, DoRA",) and change not in (hooked_lora, dropping):
        settle(u, first)
        assert u.explain() == []


def test_a_network_elsewhere_than_on_one_gpu_has_no_graph(place):
    device, capture = place
    other = {"cpu": "meta", "cuda": "cpu"}[device]
    u = network(place)
    a = inputs(u)
    settle(u, a)
    u.to(other)
    assert [line for line in u.explain() if f"it is on {other}" in line]
    u.to_empty(device=device)
    u.mid_block.to(other)
    with pytest.raises((RuntimeError, ValueError)):
        call(u, a)
    assert f"some of its weights are on {other}" in u.graphs.eager


ELSEWHERE = {  # rows whose tests stand beside this file, or above with a test of their own
    "LoRA loaded or removed",
    "use_backend, TF32, cuDNN's and SDPA's",
    "guidance, the sampler's configuration",
    "more graphs than `entries`",
    "more memory than `memory`",
    "the network on a CPU, or in parts",
    "one graph larger than `memory`",
    "settings that change at every call",
    "more kinds of calls in turn than entries",
    "a first replay that differs, a failure",
}


def test_every_row_of_the_table_is_tested():
    lines = graph.__doc__.rpartition("-----\n")[2].splitlines()
    rows = [line[4:46].strip() for line in lines if line.strip()]
    assert len(rows) > 25 and sorted(rows) == sorted([*SEEN, *ANOTHER, *AGAIN, *OFF, *ELSEWHERE])


def test_a_copy_of_the_network_has_graphs_of_its_own(place):
    u = network(place)
    a = inputs(u)
    settle(u, a)
    other = copy.deepcopy(u)
    assert other.graphs is not u.graphs and len(other.graphs) == 0 and other.graphs.entries == 8
    assert torch.equal(call(other, a), call(u, a))
