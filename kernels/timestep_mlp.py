"""Sinusoid, linear, SiLU, linear for a handful of timesteps, in Triton: two launches.

Both products are bound by reading the weights (5 MB in 16 bits for SD1.5), so they are plain multiplications and sums,
many rows' weights in flight, not tensor-core tiles. The second launch needs every hidden number, hence two of them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ldmfast.kernels.launch_kernel import launch_kernel


@triton.jit
def sinusoid(t, freqs_ptr, offs, mask, half, FLIP: tl.constexpr):
    # t [BLOCK_N], offs [BLOCK_K] -> [BLOCK_N, BLOCK_K]; past 2 * half, where an odd width ends, it is zero
    second = offs >= half
    freqs = tl.load(freqs_ptr + tl.where(second, offs - half, offs), mask & (offs < 2 * half), other=0.0)
    angle = t[:, None] * freqs[None, :]
    cosine = (second != FLIP)[None, :]
    value = tl.where(cosine, tl.cos(angle), tl.sin(angle))
    return tl.where((offs < 2 * half)[None, :], value, 0.0)


@triton.jit
def sinusoid_linear_silu_kernel(
    t_ptr,  # [N] float32
    freqs_ptr,  # [half] float32
    weight_ptr,  # [F, K]
    bias_ptr,  # [F] or None
    hidden_ptr,  # [N, F] float32
    N, F, K, half,
    FLIP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.load(t_ptr + offs_n, offs_n < N, other=0.0)
    acc = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask = (offs_f < F)[:, None] & mask_k[None, :]
        weight = tl.load(weight_ptr + offs_f.to(tl.int64)[:, None] * K + offs_k[None, :], mask, other=0.0)
        # rounded to the weights' dtype, as the layer's input is in the model
        x = sinusoid(t, freqs_ptr, offs_k, mask_k, half, FLIP).to(weight_ptr.dtype.element_ty).to(tl.float32)
        acc += tl.sum(x[:, None, :] * weight.to(tl.float32)[None, :, :], axis=2)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_f, offs_f < F, other=0.0).to(tl.float32)[None, :]
    hidden = acc / (1.0 + tl.exp(-acc))
    mask_out = (offs_n < N)[:, None] & (offs_f < F)[None, :]
    tl.store(hidden_ptr + offs_n.to(tl.int64)[:, None] * F + offs_f[None, :], hidden, mask_out)


@triton.jit
def linear_kernel(
    x_ptr,  # [N, K] float32
    weight_ptr,  # [E, K]
    bias_ptr,  # [E] or None
    out_ptr,  # [N, E]
    N, E, K,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        mask = (offs_e < E)[:, None] & mask_k[None, :]
        weight = tl.load(weight_ptr + offs_e.to(tl.int64)[:, None] * K + offs_k[None, :], mask, other=0.0)
        x = tl.load(
            x_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :], mask_n[:, None] & mask_k[None, :], other=0.0
        )
        acc += tl.sum(x[:, None, :] * weight.to(tl.float32)[None, :, :], axis=2)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_e, offs_e < E, other=0.0).to(tl.float32)[None, :]
    mask_out = mask_n[:, None] & (offs_e < E)[None, :]
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_n.to(tl.int64)[:, None] * E + offs_e[None, :], out, mask_out)


@dataclass(frozen=True)
class Configuration:
    block_n: int
    block_rows: int  # of the weight
    block_k: int
    num_warps: int = 8
    num_stages: int = 1  # one or two iterations: every load of a block is in flight at once


def configuration(n: int, k: int) -> Configuration:
    """Blocks of 4 rows: 320 of them for SD1.5's 1280 outputs, two or three on each multiprocessor."""
    block_n = min(triton.next_power_of_2(n), 4)
    # the products of a block, BLOCK_N * 4 * BLOCK_K numbers, live in registers: 64 a thread
    return Configuration(block_n, 4, min(max(triton.next_power_of_2(k), 128), 2048 // block_n))


def timestep_mlp(t, freqs, w1, b1, w2, b2, out, flip_sin_to_cos, workspace):
    """out = w2 silu(w1 sinusoid(t) + b1) + b2; the sinusoid is rounded to the weights' dtype, the hidden layer is not.

    t          [N] float32           freqs  [dim // 2] float32
    w1         [F, dim], b1 [F]      w2     [E, F], b2 [E]     dense, one dtype; biases may be None
    workspace  [N, F] float32        out    [N, E] dense, not empty
    """
    n, (f, dim), e = t.shape[0], w1.shape, w2.shape[0]
    first, second = configuration(n, dim), configuration(n, f)
    with torch.cuda.device_of(w1):
        launch_kernel(
            sinusoid_linear_silu_kernel, (triton.cdiv(f, first.block_rows), triton.cdiv(n, first.block_n)),
            t, freqs, w1, b1, workspace, n, f, dim, dim // 2, bool(flip_sin_to_cos),
            first.block_n, first.block_rows, first.block_k,
            num_warps=first.num_warps, num_stages=first.num_stages, enable_fp_fusion=True,
            maxnreg=128,  # left alone, ptxas stops at 64 for N = 2 in float32 and spills 8 bytes
        )  # fmt: skip
        launch_kernel(
            linear_kernel, (triton.cdiv(e, second.block_rows), triton.cdiv(n, second.block_n)),
            workspace, w2, b2, out, n, e, f,
            second.block_n, second.block_rows, second.block_k,
            num_warps=second.num_warps, num_stages=second.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
