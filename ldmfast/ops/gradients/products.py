"""The gradients of linear and conv2d where nothing is fused, from other products."""

from __future__ import annotations

from collections.abc import Callable

import torch

# 16-bit types that oneDNN does not multiply on this processor. torch's own loops then do, many times slower than
# float32 products: one thread of Zen 3 (AVX2), 320 -> 320 at 32x32 twice, 365 ms in bfloat16 and 43 ms in float32.
SLOW = tuple(
    dtype
    for dtype, native in (
        (torch.bfloat16, torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        (torch.float16, torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    )
    if not native
)


def computed_in(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which torch multiplies tensors like this one fast: exact products and sums, rounded once."""
    return torch.float32 if tensor.dtype in SLOW and tensor.device.type == "cpu" else tensor.dtype


def linear_gradients(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needed: tuple[bool, ...]
) -> list[torch.Tensor | None]:
    """Of x [..., K], weight [N, K] and bias [N], for g [..., N]; None where one is not needed."""
    dtype, (g_, x_, weight_) = g.dtype, (tensor.to(computed_in(tensor)) for tensor in (g, x, weight))
    rows = g_.reshape(x.shape[:-1].numel(), weight.shape[0])
    dx = g_ @ weight_ if needed[0] else None
    dweight = rows.mT @ x_.reshape(rows.shape[0], weight.shape[1]) if needed[1] else None
    dbias = rows.sum(0) if needed[2] else None
    return [None if found is None else found.to(dtype) for found in (dx, dweight, dbias)]


def convolution_gradients(
    g: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    padding: int,
    needed: tuple[bool, ...],
    convolve: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
    weigh: Callable[[], torch.Tensor] | None = None,
) -> list[torch.Tensor | None]:
    """Of x [N, Ci, H, W], weight [Co, Ci, k, k] and bias [Co], for g [N, Co, Ho, Wo]; None where one is not needed.

    convolve  called as convolve(g, weight, padding) for the gradient of x where that is a convolution of g with the
              weight turned round, which stride 1 makes it; returns [N, Ci, H, W]
    weigh     called for the gradient of weight, if there is one; returns [Co, Ci, k, k]
    """
    found: list[torch.Tensor | None] = [None] * 3
    wanted = list(needed[:3])
    turned = wanted[0] and stride == 1 and padding < weight.shape[2] and g.numel() > 0
    if turned:
        found[0] = convolve(g, weight.flip(2, 3).transpose(0, 1), weight.shape[2] - 1 - padding)
        wanted[0] = False
    if wanted[1] and weigh is not None:
        found[1] = weigh()
        if wanted[2]:  # which convolution_backward would compute together with weight's
            found[2] = g.sum((0, 2, 3))
        wanted[1:] = False, False
    if any(wanted):
        dtype, tensors = g.dtype, [tensor.to(computed_in(tensor)) for tensor in (g, x, weight)]
        pair = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
        others = torch.ops.aten.convolution_backward(*tensors, [weight.shape[0]], *pair, wanted)
        found = [a if b is None else b.to(dtype) for a, b in zip(found, others, strict=True)]
    return found
