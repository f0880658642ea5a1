"""A linear layer with what surrounds it, in Triton, in one launch: LayerNorm, bias, activation, residual, scale.

    for each block of rows of x and of rows of the weight, those of one block of rows of x side by side:
        mean, rstd = of the rows of x                       where LayerNorm comes first: one more pass over them
        for k in blocks of K:
            x = (x[:, k] - mean) * rstd * norm_weight[k] + norm_bias[k], rounded to x's dtype
            h += x weight[:, k]^T                           and g likewise, from the weight's second half, for GEGLU
        out = (activation(h + bias) + residual) * output_scale

Up to three weights of one shape can stand beside each other (queries, keys and values): each program takes its own.
Source: Shazeer 2020 (GEGLU); Ba et al. 2016 (LayerNorm); Chan et al. 1983 (moments of parts).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ldmfast.kernels.gelu import gelu
from ldmfast.kernels.launch_kernel import launch_kernel


@triton.jit
def _row_moments(
    x_ptr, lane_k, mask_m, K, eps, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr  # x_ptr: [BLOCK_M, 1], at the rows
):  # fmt: skip
    """Mean and 1 / deviation of each row, [BLOCK_M] float32: two passes over a block, blocks combined; a block's
    mean once more from what is left, without which a row of like elements would be roundings times 1 / sqrt(eps)."""
    mean = tl.zeros([BLOCK_M], tl.float32)
    m2 = tl.zeros([BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask = mask_m[:, None] & (lane_k < K - k)[None, :]
        x = tl.load(x_ptr + k + lane_k[None, :], mask, other=0.0).to(tl.float32)
        count = tl.minimum(K - k, BLOCK_K).to(tl.float32)
        block_mean = tl.sum(x, axis=1) / count
        off = tl.where((lane_k < K - k)[None, :], x - block_mean[:, None], 0.0)
        by = tl.sum(off, axis=1) / count
        off = tl.where((lane_k < K - k)[None, :], off - by[:, None], 0.0)
        block_mean += by
        delta, before = block_mean - mean, tl.cast(k, tl.float32)
        m2 += tl.sum(off * off, axis=1) + delta * delta * (before * count / (before + count))
        mean += delta * (count / (before + count))
    return mean, 1.0 / tl.sqrt(m2 / K + eps)


@triton.jit
def linear_fused_kernel(
    x_ptr,  # [M, K]
    weight_ptr, second_ptr, third_ptr,  # [N, K], with geglu [2N, K]; None where there are fewer
    bias_ptr,  # [N] or [2N], or None
    residual_ptr,  # [M, N] or None
    out_ptr,  # [M, N], or [M, weights * N]
    norm_weight_ptr, norm_bias_ptr,  # [K] or None
    stride_x, stride_w, stride_second, stride_third, stride_residual, stride_out,  # from row to row
    M, N, K, blocks_n, eps, output_scale,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    GEGLU: tl.constexpr = ACTIVATION == "geglu"
    # blocks of the same rows of x are neighbours: they share them in the L2 cache, as all share the weight
    column = tl.program_id(0) % blocks_n
    stride_w = tl.cast(stride_w, tl.int64)
    if second_ptr is not None:
        part = tl.program_id(0) // blocks_n
        if third_ptr is not None:
            weight, m = part % 3, part // 3
        else:
            weight, m = part % 2, part // 2
        if weight == 1:
            weight_ptr, stride_w = second_ptr, tl.cast(stride_second, tl.int64)
        if third_ptr is not None:
            if weight == 2:
                weight_ptr, stride_w = third_ptr, tl.cast(stride_third, tl.int64)
        out_ptr += weight * N
    else:
        m = tl.program_id(0) // blocks_n
    offs_m = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    lane_k = tl.arange(0, BLOCK_K)
    mask_m, mask_n = offs_m < M, offs_n < N
    x_ptr += offs_m[:, None] * stride_x
    weight_ptr += offs_n.to(tl.int64)[None, :] * stride_w
    gate_ptr = weight_ptr + tl.cast(N, tl.int64) * stride_w
    if NORM:
        mean, rstd = _row_moments(x_ptr, lane_k, mask_m, K, eps, BLOCK_M, BLOCK_K)
    h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    g = h
    for k in range(0, K, BLOCK_K):
        offs_k = k + lane_k
        mask_k = offs_k < K
        x = tl.load(x_ptr + offs_k[None, :], mask_m[:, None] & mask_k[None, :], other=0.0)
        if NORM:
            y = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
            if norm_weight_ptr is not None:
                y *= tl.load(norm_weight_ptr + offs_k, mask_k, other=0.0).to(tl.float32)[None, :]
            if norm_bias_ptr is not None:
                y += tl.load(norm_bias_ptr + offs_k, mask_k, other=0.0).to(tl.float32)[None, :]
            # past K the weight is 0, and so must x be: what lies there may be infinite
            x = tl.where(mask_k[None, :], y, 0.0).to(x.dtype)
        mask_w = mask_k[:, None] & mask_n[None, :]
        h = tl.dot(x, tl.load(weight_ptr + offs_k[:, None], mask_w, other=0.0), h, input_precision=PRECISION)
        if GEGLU:
            g = tl.dot(x, tl.load(gate_ptr + offs_k[:, None], mask_w, other=0.0), g, input_precision=PRECISION)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + offs_n, mask_n, other=0.0).to(tl.float32)[None, :]
        if GEGLU:
            g += tl.load(bias_ptr + N + offs_n, mask_n, other=0.0).to(tl.float32)[None, :]
    if GEGLU:
        h *= gelu(g)
    elif ACTIVATION == "gelu":
        h = gelu(h)
    elif ACTIVATION == "silu":
        h = h / (1.0 + tl.exp(-h))
    mask = mask_m[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs_m[:, None] * stride_residual + offs_n[None, :], mask, other=0.0)
        h += residual.to(tl.float32)
    out = (h * output_scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * stride_out + offs_n[None, :], out, mask)


@dataclass(frozen=True)
class Configuration:
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


TILES = ((128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (16, 32))


def configuration(m: int, n: int, k: int, itemsize: int, products: int, weights: int = 1) -> Configuration:
    """The largest tile that still gives 132 programs, one for each multiprocessor of an H100; else the smallest.

    products  2 for GEGLU, which keeps two sums: half the columns.  A stage is at most 32 KB, three at most 96 KB, what
    sm_86 and sm_89 have. In float32 there are no tensor cores (ieee): products live in registers, so tiles are small.
    """
    rows = max(16, triton.next_power_of_2(m))
    columns = max(16, triton.next_power_of_2(n))
    tiles = [(bm, bn // products) for bm, bn in TILES if itemsize == 2 or bm * bn <= 64 * 64]
    fitting = [tile for tile in tiles if tile[0] <= rows and tile[1] <= columns] or [(16, 16)]

    def programs(tile):
        return triton.cdiv(m, tile[0]) * triton.cdiv(n, tile[1]) * weights

    def idle(tile):  # columns that are computed and do not exist
        return triton.cdiv(n, tile[1]) * tile[1] / max(n, 1) > 1.15

    block_m, block_n = next((t for t in fitting if programs(t) >= 132 and not idle(t)), fitting[-1])
    if itemsize == 4:
        return Configuration(block_m, max(block_n, 16), 32, 4, 2)
    block_k = min(64, max(16, triton.next_power_of_2(k)))
    # 128 rows by 4 warps take up to 255 registers a thread
    return Configuration(block_m, max(block_n, 16), block_k, 8 if block_m == 128 else 4, 3)


def launch(x, weights, bias, residual, out, activation, output_scale, norm_weight, norm_bias, eps):
    """out = (activation(norm(x) weight^T + bias) + residual) * output_scale for each weight, side by side in out.

    x         [M, K]                     weights  one to three, [N, K] or, with geglu, [2N, K]; one dtype
    bias      [N] or [2N], or None       residual [M, N], or None
    out       [M, weights * N], not empty
    norm_weight, norm_bias   [K], dense, or None; eps: LayerNorm of x comes first, or None
    Everything of unit stride in its last dimension; bias dense.
    """
    (m, k), count = x.shape, len(weights)
    n = out.shape[1] // count
    config = configuration(m, n, k, x.element_size(), 2 if activation == "geglu" else 1, count)
    blocks_n = triton.cdiv(n, config.block_n)
    first, second, third = (*weights, None, None)[:3]
    strides = [0 if tensor is None else tensor.stride(0) for tensor in (x, first, second, third, residual)]
    with torch.cuda.device_of(x):
        launch_kernel(
            linear_fused_kernel, (triton.cdiv(m, config.block_m) * count * blocks_n,),
            x, first, second, third, bias, residual, out, norm_weight, norm_bias, *strides, out.stride(0),
            m, n, k, blocks_n, float(eps or 0.0), float(output_scale),
            ACTIVATION=activation, NORM=eps is not None, PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip


def linear(x, weight, bias, residual, out, activation, output_scale, norm_weight, norm_bias, eps):
    """As `launch`, with one weight."""
    launch(x, (weight,), bias, residual, out, activation, output_scale, norm_weight, norm_bias, eps)
