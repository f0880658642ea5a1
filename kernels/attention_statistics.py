"""What the gradients of attention need of each query's row: its largest score, 1 / its sum, and sum_d dout * out."""

import triton
import triton.language as tl
from ldmfast.kernels.attention_tiles import head_of_program, load_parts, scores_of_rows


@triton.jit
def attention_statistics_kernel(
    q_ptr, k_ptr, dout_ptr, out_ptr, mask_ptr,
    rows_ptr,  # [3, N, H, L] float32: the largest score (+inf: none attended), 1 / sum, delta
    stride_qn, stride_ql, stride_qh, stride_kn, stride_ks, stride_kh,  # in units of ALIGN
    stride_mn, stride_mh, stride_ml, stride_ms,
    N, L, S, H, blocks,
    scale,  # times log2(e)
    D: tl.constexpr, D0: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr, MASK_ONE_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    D1: tl.constexpr = D - D0
    n, h, first = head_of_program(blocks, H, BLOCK_M)
    lane_m = tl.arange(0, BLOCK_M)
    stride_ql, stride_ks = stride_ql * ALIGN, stride_ks * ALIGN
    q_ptr += (n * stride_qn + h * stride_qh) * ALIGN + first * stride_ql
    k_ptr += (n * stride_kn + h * stride_kh) * ALIGN
    if MASK != "none":
        mask_ptr += n * stride_mn + h * stride_mh + first * stride_ml
    q0, q1 = load_parts(q_ptr, lane_m, stride_ql, L - first, D0, D1, BLOCK_D0, BLOCK_D1, False)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, S, BLOCK_N):
        scores, k0, k1 = scores_of_rows(
            q0, q1, k_ptr, mask_ptr, stride_ks, stride_ml, stride_ms, lane_m, L - first, S - start, scale,
            D0, D1, BLOCK_D0, BLOCK_D1, BLOCK_N, MASK, MASK_ONE_ROW, EVEN, PRECISION,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(scores, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)  # -inf - -inf would be NaN
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), axis=1)
        top = new
        k_ptr += BLOCK_N * stride_ks
        if MASK != "none":
            mask_ptr += BLOCK_N * stride_ms
    # dense: dout and out
    offs = ((n * L + first) * H + h) * D
    do0, do1 = load_parts(dout_ptr + offs, lane_m, H * D, L - first, D0, D1, BLOCK_D0, BLOCK_D1, False)
    o0, o1 = load_parts(out_ptr + offs, lane_m, H * D, L - first, D0, D1, BLOCK_D0, BLOCK_D1, False)
    delta = tl.sum(do0.to(tl.float32) * o0.to(tl.float32), axis=1)
    if D1 > 0:
        delta += tl.sum(do1.to(tl.float32) * o1.to(tl.float32), axis=1)
    dead = top == float("-inf")
    to = rows_ptr + (n * H + h) * L + first + lane_m
    stride = tl.cast(N, tl.int64) * H * L
    mask = lane_m < L - first
    tl.store(to, tl.where(dead, float("inf"), top), mask)
    tl.store(to + stride, tl.where(dead, 0.0, 1.0 / total), mask)
    tl.store(to + 2 * stride, delta, mask)
