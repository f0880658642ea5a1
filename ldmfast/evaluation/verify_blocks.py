"""A network's blocks and layers one by one, each with its true input: ours beside stock's and beside an exact run.

The exact run is stock's class in float64, or float32 where that does not fit. What goes into a block there, rounded to
the network's own type, is what all three are given, so a figure is the error of that block alone.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ldmfast.models import autoencoder, blocks, layers

APART = 1e-5  # float32 and float64: how far ours may be from stock, norm of the difference over norm
# 16 bits: times stock's own error. Winograd's transforms round, too: a convolution alone was seen at 2.7 in bfloat16,
# which the roundings of the others cover in a block, and in a whole network.
TIMES = {"network": 1.1, "block": 1.5, "layer": 3.0}
FLOOR = {torch.bfloat16: 2**-8 / 8, torch.float16: 2**-11 / 8}  # an error below this share of a rounding is right
ONCE_MORE = 16  # where stock's 16 bits overflow and ours do not: the error that ours may have, in roundings

_UNIT = re.compile(
    r"(encoder\.|decoder\.)?(conv_in|down_blocks\.\d+|mid_block|up_blocks\.\d+|conv_norm_out|conv_out)"
    r"|(post_)?quant_conv|time_proj"
)
Call = tuple[tuple, dict[str, Any]]  # positional and keyword arguments


@dataclass(frozen=True)
class Three:
    """One network three times: `ours` and `stock` in their type, `exact` in float64 or float32."""

    ours: nn.Module
    stock: nn.Module
    exact: nn.Module
    dtype: torch.dtype  # asked of a network it walks through all of its parameters
    exact_dtype: torch.dtype


@dataclass(frozen=True)
class Row:
    """What was compared: errors are norms of differences over norms. wrong  the rows inside that are not right."""

    name: str
    ours: float  # from the exact run
    stock: float  # likewise
    apart: float  # ours from stock
    right: bool
    remark: str = ""
    wrong: list[Row] = field(default_factory=list)

    @property
    def fine(self) -> bool:
        return self.right and not self.wrong

    def innermost(self) -> Row:
        """The first row that is not right, and of what lies inside it the first again."""
        found, inside = self, self.wrong
        while inside:
            found = inside[0]
            inside = [row for row in inside if row.name.startswith(f"{found.name}.")]
        return found


def error(got: Any, wanted: Any) -> float:
    """Norm of the difference over norm, over all tensors of both. Infinite where `got` is not finite."""
    difference = size = 0.0
    for a, b in zip(_tensors(got), _tensors(wanted), strict=True):
        difference += float((a.double() - b.double()).square().sum())
        size += float(b.double().square().sum())
    if difference == 0:
        return 0.0
    found = (difference / size) ** 0.5 if size else float("inf")
    return found if found == found else float("inf")


def judged(name: str, level: str, dtype: torch.dtype, ours: Any, stock: Any, exact: Any) -> Row:
    """The row of three results of one thing in `dtype`. level  network, block or layer"""
    finite = [all(bool(t.isfinite().all()) for t in _tensors(result)) for result in (ours, stock)]
    mine, theirs, apart = error(ours, exact), error(stock, exact), error(ours, stock)
    if not all(finite):
        where = str(dtype).removeprefix("torch.")
        if not any(finite):
            return Row(name, mine, theirs, apart, True, f"overflows in {where}, stock's as well")
        if not finite[0]:
            return Row(name, mine, theirs, apart, False, f"overflows in {where}, stock's does not")
        limit = ONCE_MORE * torch.finfo(dtype).eps
        return Row(name, mine, theirs, apart, mine <= limit, f"stock's overflows in {where}, ours does not")
    if dtype in FLOOR:
        return Row(name, mine, theirs, apart, mine <= max(TIMES[level] * theirs, FLOOR[dtype]))
    return Row(name, mine, theirs, apart, apart <= APART or mine <= TIMES["network"] * theirs)


def compare_blocks(three: Three, run: Callable[[nn.Module], Any]) -> Iterator[Row]:
    """A row for each block that `run(three.exact)` goes through, in that order.

    The layers inside are looked at as well: a block forgives much, a GroupNorm any factor of what it is given.
    """
    names = [n for n, m in three.exact.named_modules() if _UNIT.fullmatch(n) and _known(three, n)]
    for name, call in _calls(three.exact, names, lambda: run(three.exact)).items():
        row = _compare(three, name, call, "layer" if _is_layer(three, name) else "block")
        yield replace(row, wrong=_inside(three, name, call))


def _inside(three: Three, name: str, call: Call) -> list[Row]:
    """The rows that are not right of the block's layers, in the order of their calls."""
    if name == "time_proj":
        return []
    block = three.exact.get_submodule(name)
    inner = [f"{name}.{n}" for n, m in block.named_modules() if n and _known(three, f"{name}.{n}")]
    args, kwargs = _cast(_cast(call, three.dtype), three.exact_dtype)
    found = _calls(three.exact, inner, lambda: block(*args, **kwargs)).items()
    rows = [_compare(three, n, c, "layer" if _is_layer(three, n) else "block") for n, c in found]
    return [row for row in rows if not row.right]


def _compare(three: Three, name: str, call: Call, level: str) -> Row:
    given = _cast(call, three.dtype)
    exact = _stock_part(three.exact, name, _cast(given, three.exact_dtype))
    ours, stock = _our_part(three.ours, name, given), _stock_part(three.stock, name, given)
    shown = "time_embedding" if name == "time_proj" else name
    return judged(shown, level, three.dtype, ours, stock, exact)


def _calls(model: nn.Module, names: list[str], run: Callable[[], Any]) -> dict[str, Call]:
    """The arguments of each named module's first call while run() runs, in the order of the calls."""
    found: dict[str, Call] = {}

    def keeper(name):
        def keep(module, args, kwargs):
            found.setdefault(name, (args, kwargs))

        return keep

    handles = [model.get_submodule(n).register_forward_pre_hook(keeper(n), with_kwargs=True) for n in names]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _stock_part(network: nn.Module, name: str, call: Call) -> Any:
    args, kwargs = call
    if name == "time_proj":
        return network.time_embedding(network.time_proj(*args, **kwargs).to(network.dtype))
    return network.get_submodule(name)(*args, **kwargs)


def _our_part(network: nn.Module, name: str, call: Call) -> Any:
    """The same as our forward would compute it."""
    if network.stock_reason():
        return _stock_part(network, name, call)
    args, kwargs = call
    m = network.get_submodule(name)
    given = inspect.signature(type(m).forward).bind(m, *args, **kwargs).arguments
    x = list(given.values())[1]
    if name == "time_proj":
        return layers.timestep_embedding(m, network.time_embedding, x, None, network.dtype)
    return _way(name, m)(m, x, given)


def _known(three: Three, name: str) -> bool:
    """Whether all three have such a module, of one type, and ours has a function for it."""
    try:
        found = [network.get_submodule(name) for network in (three.ours, three.stock, three.exact)]
    except AttributeError:  # something is attached to one of them
        return False
    if name == "time_proj":
        return True
    return len({type(m) for m in found}) == 1 and _way(name, found[0]) is not None


def _is_layer(three: Three, name: str) -> bool:
    """Whether it is one product or norm."""
    return type(three.exact.get_submodule(name)) in (*_LAYERS, Downsample2D, Upsample2D)


def _way(name: str, m: nn.Module) -> Callable | None:
    """(module, x, its bound arguments) -> what our forward computes for it; None where it has no function."""
    if _UNIT.fullmatch(name) and type(m) not in _LAYERS:
        place = re.search(r"(down|mid|up)_block", name)
        return _BLOCKS[name.startswith(("encoder.", "decoder.")), place[1]] if place else None
    if type(m) is Attention and m.group_norm is None:  # inside a transformer's block, its norm and residual are fused
        return None
    return _LAYERS.get(type(m)) or _PARTS.get(type(m))


def _inputs(given: dict[str, Any]) -> blocks.BlockInputs:
    temb = given.get("temb")
    return blocks.BlockInputs(
        temb=temb,
        temb_silu=None if temb is None else F.silu(temb),
        context=given.get("encoder_hidden_states"),
        self_mask=given.get("attention_mask"),
        context_mask=given.get("encoder_attention_mask"),
    )


_LAYERS = {
    nn.Conv2d: lambda m, x, given: layers.conv2d(m, x),
    nn.Linear: lambda m, x, given: layers.linear(m, x),
    nn.GroupNorm: lambda m, x, given: layers.group_norm(m, x, silu=False),
    nn.LayerNorm: lambda m, x, given: layers.layer_norm(m, x),
}
_PARTS = {
    ResnetBlock2D: lambda m, x, given: blocks.resnet(m, x, _inputs(given)),
    Transformer2DModel: lambda m, x, given: blocks.transformer(m, x, _inputs(given)),
    BasicTransformerBlock: lambda m, x, given: blocks.transformer_block(m, x, _inputs(given)),
    Attention: lambda m, x, given: blocks.image_attention(m, x, _inputs(given)),
    Downsample2D: lambda m, x, given: blocks.downsample(m, x),
    Upsample2D: lambda m, x, given: blocks.upsample(m, x, given.get("output_size")),
}
_BLOCKS = {  # (in an autoencoder, place)
    (False, "down"): lambda m, x, given: blocks.down_block(m, x, _inputs(given)),
    (False, "mid"): lambda m, x, given: blocks.mid_block(m, x, _inputs(given)),
    (False, "up"): lambda m, x, given: blocks.up_block(
        m, x, given["res_hidden_states_tuple"], _inputs(given), given.get("upsample_size")
    ),
    (True, "down"): lambda m, x, given: autoencoder.level(m, [x], _inputs(given), blocks.downsample, "downsamplers")[0],
    (True, "mid"): lambda m, x, given: blocks.mid_block(m, x, _inputs(given)),
    (True, "up"): lambda m, x, given: autoencoder.level(m, [x], _inputs(given), blocks.upsample, "upsamplers")[0],
}


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    """The floating tensors in nested tuples, lists and dicts in `dtype`."""
    if isinstance(tree, torch.Tensor):
        return tree.to(dtype) if tree.is_floating_point() else tree
    if isinstance(tree, tuple | list):
        return type(tree)(_cast(each, dtype) for each in tree)
    return {k: _cast(v, dtype) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    each = result.values() if isinstance(result, dict) else result
    return [tensor for part in each for tensor in _tensors(part)]
