"""(x + bias + add + residual) * output_scale in one pass, in Triton, in float32.   Source: He et al. 2015."""

import torch
import triton
import triton.language as tl
from ldmfast.kernels.launch_kernel import launch_kernel

BLOCK = 1024
WARPS = 4  # 8 numbers a thread: one 16-byte access to each tensor in 16 bits


@triton.jit
def bias_residual_kernel(
    x_ptr, residual_ptr, y_ptr,  # [N, rows, length], dense; residual may be None
    bias_ptr,  # [C] or None
    add_ptr,  # [N, C] or None
    stride_add, rows, length, blocks, output_scale,  # blocks of a row
    CHANNELS_LAST: tl.constexpr,  # a row is a pixel with its channels; else a channel with its pixels
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // blocks).to(tl.int64)
    n, within = row // rows, row % rows
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = offs < length
    at = row * length + offs
    y = tl.load(x_ptr + at, mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        if CHANNELS_LAST:
            y += tl.load(bias_ptr + offs, mask, other=0.0).to(tl.float32)
        else:
            y += tl.load(bias_ptr + within).to(tl.float32)
    if add_ptr is not None:
        if CHANNELS_LAST:
            y += tl.load(add_ptr + n * stride_add + offs, mask, other=0.0).to(tl.float32)
        else:
            y += tl.load(add_ptr + n * stride_add + within).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (y * output_scale).to(y_ptr.dtype.element_ty), mask)


def bias_residual(x, bias, add, residual, channels_last, y, output_scale):
    """y = (x + bias + add + residual) * output_scale.

    x, residual, y  [N, C, ...]  dense, in the same layout; residual may be None; not empty
    bias            [C], dense, or None
    add             [N, C], unit stride in C, or None
    """
    n, channels, pixels = *x.shape[:2], x.shape[2:].numel()
    rows, length = (pixels, channels) if channels_last else (channels, pixels)
    blocks = triton.cdiv(length, BLOCK)
    stride_add = 0 if add is None else add.stride(0)
    with torch.cuda.device_of(x):
        launch_kernel(
            bias_residual_kernel, (n * rows * blocks,),
            x, residual, y, bias, add, stride_add, rows, length, blocks, float(output_scale),
            CHANNELS_LAST=channels_last, BLOCK=BLOCK, num_warps=WARPS, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
