"""`UNet` in diffusers programs that train it or hand it arguments of their own, beside a stock network."""

from __future__ import annotations

import accelerate
import pytest
import tiny
import torch
from both_networks import CLOSE, answers, freeu, lora, pair
from torch import nn


def test_freeu_off_again():
    stock, ours = pair()
    freeu(ours)
    assert "FreeU" in " ".join(ours.explain())
    ours.disable_freeu()
    wanted, got = answers([stock, ours])
    assert tiny.error(got, wanted) <= CLOSE and ours.explain() == []


def test_gradient_checkpointing():
    stock, ours = pair()
    arguments, kept = tiny.inputs(stock), {}
    for name, model in (("without", ours), ("stock", stock), ("ours", ours)):
        if name != "without":
            model.enable_gradient_checkpointing()
        model.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = model.train()(**arguments).sample.square().mean()
        kept[name] = sum(sizes)
        loss.backward()
    for name, parameter in stock.named_parameters():
        assert tiny.error(dict(ours.named_parameters())[name].grad, parameter.grad) <= 1e-4, name
    assert ours.explain() == [] and kept["ours"] < 0.7 * kept["without"]


def test_lora_training_reaches_the_adapter_alone():
    _, ours = pair()
    ours.requires_grad_(False)
    lora(ours)
    ours(**tiny.inputs(ours)).sample.square().mean().backward()
    trained = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)


def test_gligen_goes_to_the_parent():
    stock, ours = pair(attention_type="gated")
    boxes = {"boxes": torch.rand(2, 3, 4), "positive_embeddings": torch.randn(2, 3, 32), "masks": torch.ones(2, 3)}
    for model in (stock, ours):
        for name, parameter in model.named_parameters():
            if "alpha" in name:
                parameter.data.fill_(0.5)
    extra = {"cross_attention_kwargs": {"gligen": boxes}}
    wanted, got = answers([stock, ours], **extra)
    assert tiny.error(got, wanted) <= CLOSE
    assert "gligen" in ours.explain(extra["cross_attention_kwargs"])[0]


def test_a_global_hook_goes_to_the_parent():
    stock, ours = pair()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output * 1.1 if isinstance(module, nn.GroupNorm) else None
    )
    try:
        wanted, got = answers([stock, ours])
        assert "global module hook" in ours.explain()[0]
    finally:
        handle.remove()
    assert tiny.error(got, wanted) <= CLOSE


def test_accelerate_mixed_precision_training_step():
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    losses = []
    for model in pair():
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        torch.manual_seed(1)
        arguments = tiny.inputs(accelerator.unwrap_model(model))
        for _ in range(2):
            loss = model(**arguments).sample.float().square().mean()
            accelerator.backward(loss)
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_dtype_moves_and_a_replaced_conv_in():
    stock, ours = pair()
    for model in (stock, ours):
        model.to(torch.float64).to(torch.float32)
        model.conv_in = nn.Conv2d(8, 32, 3, padding=1)
    ours.conv_in.load_state_dict(stock.conv_in.state_dict())
    wanted, got = answers([stock, ours], sample=torch.randn(2, 8, 16, 16))
    assert tiny.error(got, wanted) <= CLOSE


def test_ip_adapter():
    stock, ours = pair()
    for model in (stock, ours):
        torch.manual_seed(8)
        projection = {
            "proj.weight": torch.randn(4 * 32, 16),
            "proj.bias": torch.randn(4 * 32),
            "norm.weight": torch.ones(32),
            "norm.bias": torch.zeros(32),
        }
        state = {"image_proj": projection, "ip_adapter": {}}
        key = 1
        for name, attention in model.named_modules():
            if name.endswith("attn2"):
                for part in ("k", "v"):
                    state["ip_adapter"][f"{key}.to_{part}_ip.weight"] = 0.3 * torch.randn(attention.inner_dim, 32)
                key += 2
        model._load_ip_adapter_weights([state])
    added = {"image_embeds": [torch.randn(2, 1, 16)]}
    wanted, got = answers([stock, ours], added_cond_kwargs=added)
    assert tiny.error(got, wanted) <= CLOSE
    assert "IPAdapter" in " ".join(ours.explain())
