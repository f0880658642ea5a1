"""s = x + residual and LayerNorm(s) in one pass, in Triton: a program keeps its rows in registers.

Statistics are of s as rounded, in float32, in two passes over the registers; the mean once more from what is left,
without which a row of like elements would be roundings times 1 / sqrt(eps).   Source: Ba, Kiros & Hinton 2016.
"""

import torch
import triton
import triton.language as tl
from ldmfast.kernels.launch_kernel import launch_kernel


@triton.jit
def residual_layer_norm_kernel(
    x_ptr, residual_ptr,  # [M, K]
    weight_ptr, bias_ptr,  # [K] or None
    sum_ptr, y_ptr,  # [M, K], dense
    stride_x, stride_residual, M, K, eps,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_k = offs_k < K
    mask = (offs_m < M)[:, None] & mask_k[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_x + offs_k[None, :], mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offs_m[:, None] * stride_residual + offs_k[None, :], mask, other=0.0)
    rounded = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
    at = offs_m[:, None] * K + offs_k[None, :]
    tl.store(sum_ptr + at, rounded, mask)
    s = rounded.to(tl.float32)
    off = tl.where(mask_k[None, :], s - (tl.sum(s, axis=1) / K)[:, None], 0.0)
    off = tl.where(mask_k[None, :], off - (tl.sum(off, axis=1) / K)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, axis=1) / K + eps)
    y = off * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + offs_k, mask_k, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_k, mask_k, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask)


def residual_layer_norm(x, residual, weight, bias, out_sum, y, eps):
    """out_sum = x + residual, y = LayerNorm of it: [M, K]; x and residual of unit stride in K, the others dense."""
    m, k = x.shape
    block_k = triton.next_power_of_2(k)
    block_m = max(1, min(1024 // block_k, triton.next_power_of_2(m)))
    with torch.cuda.device_of(x):
        launch_kernel(
            residual_layer_norm_kernel, (triton.cdiv(m, block_m),),
            x, residual, weight, bias, out_sum, y, x.stride(0), residual.stride(0), m, k, float(eps),
            BLOCK_M=block_m, BLOCK_K=block_k, num_warps=min(max(block_m * block_k // 256, 1), 16), num_stages=1,
            enable_fp_fusion=True,
        )  # fmt: skip
