"""Attention heads: their number beside that of the released family of the same shapes, and widths that no kernel takes.

Weights of any number of heads have the same shapes: a wrong number loads without a word, and draws noise.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from ldmfast import ops
from ldmfast.models.guard import plain
from ldmfast.models.weight_files import WIDTHS

# heads at each level, by (channels of the levels, width of the prompt); what the released configurations say
_USUAL = {
    ((320, 640, 1280, 1280), 768): (8, 8, 8, 8),
    ((320, 640, 1280, 1280), 1024): (5, 10, 20, 20),
    ((320, 640, 1280), 2048): (5, 10, 20),
    ((384, 768, 1536, 1536), 1280): (6, 12, 24, 24),
}


def warn_of_heads(model: nn.Module, source: str | Path) -> None:
    """Warn if `model`, which came from `source`, has other numbers of heads than the family whose shapes it has."""
    blocks = [*(getattr(model, "down_blocks", None) or ()), getattr(model, "mid_block", None)]
    if blocks[-1] is None or not hasattr(model, "conv_in"):
        return
    levels = [_attention(block) for block in blocks]
    width = next((cross.to_k.in_features for _, cross in filter(None, levels) if hasattr(cross.to_k, "in_features")), 0)
    channels = tuple(
        getattr(block.resnets[-1], "out_channels", 0) for block in blocks[:-1] if hasattr(block, "resnets")
    )
    usual = _USUAL.get((channels, width))
    if usual is None:
        return
    wanted = (*usual, usual[-1])
    found = [wanted[i] if level is None else level[0].heads for i, level in enumerate(levels)]
    if tuple(found) != wanted:
        config = getattr(model, "config", {})
        name = "attention_head_dim" if config.get("num_attention_heads") is None else "num_attention_heads"
        said = config.get(name)
        warnings.warn(
            f"{source}: its configuration says {name}={said if isinstance(said, (int, type(None))) else list(said)}; "
            f"{WIDTHS[width]} has {list(usual) if len(set(usual)) > 1 else usual[0]} heads. "
            "A wrong number loads, and draws noise.",
            stacklevel=3,
        )


def _attention(block: nn.Module) -> tuple[Attention, Attention] | None:
    """The first self- and cross-attention of a block, or None."""
    found = {name.rpartition(".")[2]: m for name, m in reversed(list(block.named_modules())) if type(m) is Attention}
    return (found["attn1"], found["attn2"]) if {"attn1", "attn2"} <= found.keys() else None


def wide_heads(model: nn.Module) -> list[str]:
    """A sentence for each width of a head that only attention's reference takes, with what its kernels say to it."""
    places: dict[tuple, list[str]] = {}
    for name, m in model.named_modules():
        if type(m) is Attention and plain(m) and plain(m.to_q) and m.to_q.weight.device.type != "meta":
            weight = m.to_q.weight
            places.setdefault((weight.shape[0] // m.heads, weight.dtype, weight.device), []).append(name)
    sentences = []
    for (width, dtype, device), names in places.items():
        said, usual = (_refusals(torch.empty(1, 1, 1, w, dtype=dtype, device=device)) for w in (width, 64))
        if said and not usual:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            sentences.append(f"{names[0]}{more}: attention's reference runs; {'; '.join(said)}.")
    return sentences


def _refusals(x: torch.Tensor) -> list[str]:
    """Why each kernel for attention over heads like x refuses; none if one of them runs."""
    op = ops.attention.op
    arguments = op.normalise(x, x, x)
    best = op.best(arguments)
    if best is None or best.name != "torch":
        return []
    said = [(b.name, b.reason(arguments)) for b in op.automatic(x.device.type) if b.name != "torch"]
    return [f"{name}: {reason}" for name, reason in said if reason]
