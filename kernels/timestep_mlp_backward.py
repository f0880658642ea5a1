"""The gradient of the time embedding with regard to its weights and biases, in Triton: four launches.

Bound by reading the weights and writing their gradients, so products are plain multiplications and sums, as in the
forward. Everything between the launches is float32.
"""

import torch
import triton
import triton.language as tl
from ldmfast.kernels.launch_kernel import launch_kernel
from ldmfast.kernels.timestep_mlp import sinusoid

BLOCK_N, BLOCK_K, BLOCK_ROWS, BLOCK_E, BLOCK_F = 4, 128, 4, 64, 16


@triton.jit
def _rows(ptr, offs_n, offs, N, width):
    # [BLOCK_N, width's block] of a dense [N, width] in float32, zeros outside
    mask = (offs_n < N)[:, None] & (offs < width)[None, :]
    return tl.load(ptr + offs_n.to(tl.int64)[:, None] * width + offs[None, :], mask, other=0.0).to(tl.float32)


@triton.jit
def hidden_kernel(
    t_ptr, freqs_ptr, weight_ptr, bias_ptr,
    input_ptr,  # [N, K] float32: the sinusoid, rounded to the weights' dtype
    hidden_ptr,  # [N, F] float32: w1 input + b1
    N, F, K, half,
    FLIP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    t = tl.load(t_ptr + offs_n, offs_n < N, other=0.0)
    acc = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = sinusoid(t, freqs_ptr, offs_k, offs_k < K, half, FLIP).to(weight_ptr.dtype.element_ty).to(tl.float32)
        if tl.program_id(0) == 0:
            mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
            tl.store(input_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :], x, mask)
        weight = _rows(weight_ptr, offs_f, offs_k, F, K)
        acc += tl.sum(x[:, None, :] * weight[None, :, :], axis=2)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_f, offs_f < F, other=0.0).to(tl.float32)[None, :]
    mask = (offs_n < N)[:, None] & (offs_f < F)[None, :]
    tl.store(hidden_ptr + offs_n.to(tl.int64)[:, None] * F + offs_f[None, :], acc, mask)


@triton.jit
def gradient_kernel(
    dout_ptr,  # [N, E]
    weight_ptr,  # [E, F]
    hidden_ptr,  # [N, F]: w1 input + b1, becomes its silu
    gradient_ptr,  # [N, F] float32: of w1 input + b1
    N, E, F,
    BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    offs_f = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, BLOCK_F], tl.float32)
    for e in range(0, E, BLOCK_E):
        offs_e = e + tl.arange(0, BLOCK_E)
        dout = _rows(dout_ptr, offs_n, offs_e, N, E)
        weight = _rows(weight_ptr, offs_e, offs_f, E, F)
        acc += tl.sum(dout[:, :, None] * weight[None, :, :], axis=1)
    a = _rows(hidden_ptr, offs_n, offs_f, N, F)
    sigmoid = 1.0 / (1.0 + tl.exp(-a))
    mask = (offs_n < N)[:, None] & (offs_f < F)[None, :]
    offs = offs_n.to(tl.int64)[:, None] * F + offs_f[None, :]
    tl.store(gradient_ptr + offs, acc * sigmoid * (1.0 + a * (1.0 - sigmoid)), mask)
    tl.store(hidden_ptr + offs, a * sigmoid, mask)


@triton.jit
def outer_kernel(
    left_ptr,  # [N, R]
    right_ptr,  # [N, C] float32
    weight_ptr,  # [R, C]: left^T right
    bias_ptr,  # [R]: the sum of left
    N, R, C,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    weight = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    bias = tl.zeros([BLOCK_R], tl.float32)
    for _ in range(0, N):
        left = tl.load(left_ptr + offs_r, offs_r < R, other=0.0).to(tl.float32)
        right = tl.load(right_ptr + offs_c, offs_c < C, other=0.0)
        weight += left[:, None] * right[None, :]
        bias += left
        left_ptr += R
        right_ptr += C
    mask = (offs_r < R)[:, None] & (offs_c < C)[None, :]
    offs = offs_r.to(tl.int64)[:, None] * C + offs_c[None, :]
    tl.store(weight_ptr + offs, weight.to(weight_ptr.dtype.element_ty), mask)
    if tl.program_id(1) == 0:
        tl.store(bias_ptr + offs_r, bias.to(bias_ptr.dtype.element_ty), offs_r < R)


def timestep_mlp_backward(dout, t, freqs, w1, b1, w2, dw1, db1, dw2, db2, flip_sin_to_cos):
    """Writes dw1 [F, dim], db1 [F], dw2 [E, F], db2 [E], in the weights' dtype; b1 may be None.

    dout  [N, E], dense, dtype of the weights    t  [N] float32    freqs  [dim // 2] float32
    w1    [F, dim], w2  [E, F], dense
    """
    n, (f, dim), e = t.shape[0], w1.shape, w2.shape[0]
    source = w1.new_empty((n, dim), dtype=torch.float32)
    hidden, gradient = (w1.new_empty((n, f), dtype=torch.float32) for _ in range(2))
    chunks, options = triton.cdiv(n, BLOCK_N), {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
    with torch.cuda.device_of(w1):
        launch_kernel(
            hidden_kernel, (triton.cdiv(f, BLOCK_ROWS), chunks),
            t, freqs, w1, b1, source, hidden, n, f, dim, dim // 2, bool(flip_sin_to_cos),
            BLOCK_N, BLOCK_ROWS, BLOCK_K, **options,
        )  # fmt: skip
        launch_kernel(
            gradient_kernel, (triton.cdiv(f, BLOCK_F), chunks),
            dout, w2, hidden, gradient, n, e, f, BLOCK_N, BLOCK_E, BLOCK_F, **options
        )
        for left, right, weight, bias in ((dout, hidden, dw2, db2), (gradient, source, dw1, db1)):
            rows, columns = weight.shape
            launch_kernel(
                outer_kernel, (triton.cdiv(rows, 8), triton.cdiv(columns, 128)),
                left, right, weight, bias, n, rows, columns, 8, 128, **options
            )
