"""Rows of the table of ldmfast/models/graph: what turns graphs off, as contexts, and the reason that is said."""

from __future__ import annotations

import contextlib

import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor
from graph_calls import add_lora
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ldmfast


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
