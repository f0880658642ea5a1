"""The gradient of attention in Triton, flash-style: scores and weights are recomputed, and never reach memory.

Three steps, without atomics, so the same bits each time: the rows' maxima and sums and delta = sum_d dout * out;
dk and dv by blocks of keys (in two launches for heads wider than 80, whose sums do not fit the registers together); dq
by blocks of queries. Where keys are few, programs share the queries and their sums are added in a fixed order. Head
widths are cut as in the forward: 40 = 32 + 8.
Source: Dao 2023 (FlashAttention-2), algorithm 2.
"""

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from ldmfast.kernels.attention_statistics import attention_statistics_kernel
from ldmfast.kernels.attention_tiles import (
    add_mask,
    head_of_program,
    load_parts,
    product,
    scores_of_rows,
    split_width,
    store_parts,
)
from ldmfast.kernels.launch_kernel import launch_kernel


@triton.jit
def attention_backward_keys_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, mask_ptr, rows_ptr,
    dk_ptr, dv_ptr,  # [splits, N, S, H, D], dense
    stride_qn, stride_ql, stride_qh, stride_kn, stride_ks, stride_kh, stride_vn, stride_vs, stride_vh,
    stride_mn, stride_mh, stride_ml, stride_ms,
    N, L, S, H, blocks,
    share,  # queries that a program walks over, from share * program_id(1) on
    factor, scale,  # factor: scale * log2(e)
    D: tl.constexpr, D0: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr, MASK_ONE_ROW: tl.constexpr,
    PRECISION: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """dk, dv or both of BLOCK_N keys, over a share of the queries: everything is transposed, [BLOCK_N, BLOCK_M]."""
    D1: tl.constexpr = D - D0
    n, h, first = head_of_program(blocks, H, BLOCK_N)
    lane_n, lane_m = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M)
    stride_ql, stride_ks, stride_vs = stride_ql * ALIGN, stride_ks * ALIGN, stride_vs * ALIGN
    begin = tl.program_id(1) * share
    q_ptr += (n * stride_qn + h * stride_qh) * ALIGN + tl.cast(begin, tl.int64) * stride_ql
    k_ptr += (n * stride_kn + h * stride_kh) * ALIGN + first * stride_ks
    v_ptr += (n * stride_vn + h * stride_vh) * ALIGN + first * stride_vs
    dout_ptr += ((n * L + begin) * H + h) * D
    rows_ptr += (n * H + h) * L
    stride_rows = tl.cast(N, tl.int64) * H * L
    if MASK != "none":
        mask_ptr += n * stride_mn + h * stride_mh + first * stride_ms
    k0, k1 = load_parts(k_ptr, lane_n, stride_ks, S - first, D0, D1, BLOCK_D0, BLOCK_D1, False)
    v0, v1 = k0, k1
    if DK:
        v0, v1 = load_parts(v_ptr, lane_n, stride_vs, S - first, D0, D1, BLOCK_D0, BLOCK_D1, False)
    dk0 = tl.zeros([BLOCK_N, BLOCK_D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, BLOCK_D0], tl.float32)
    dk1, dv1 = dk0, dv0
    if D1 > 0:
        dk1 = tl.zeros([BLOCK_N, BLOCK_D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, BLOCK_D1], tl.float32)
    for start in range(begin, min(L, begin + share), BLOCK_M):
        left = L - start
        q0, q1 = load_parts(q_ptr, lane_m, stride_ql, left, D0, D1, BLOCK_D0, BLOCK_D1, EVEN)
        scores = product(k0, k1, q0, q1, D1 > 0, PRECISION) * factor
        if MASK != "none":
            offs, inside = lane_n[:, None] * stride_ms, (lane_n < S - first)[:, None]
            if not MASK_ONE_ROW:
                offs += lane_m[None, :] * stride_ml
                inside &= (lane_m < left)[None, :]
                mask_ptr_ = mask_ptr + tl.cast(start, tl.int64) * stride_ml
            else:
                mask_ptr_ = mask_ptr
            scores = add_mask(scores, mask_ptr_, offs, inside, MASK == "bool")
        # a query past the last has an infinite maximum and so weights of zero
        top = tl.load(rows_ptr + start + lane_m, lane_m < left, other=float("inf"))
        inverse = tl.load(rows_ptr + stride_rows + start + lane_m, lane_m < left, other=0.0)
        delta = tl.load(rows_ptr + 2 * stride_rows + start + lane_m, lane_m < left, other=0.0)
        p = tl.exp2(scores - top[None, :]) * inverse[None, :]
        do0, do1 = load_parts(dout_ptr, lane_m, H * D, left, D0, D1, BLOCK_D0, BLOCK_D1, EVEN)
        if DV:
            dv0 = tl.dot(p.to(do0.dtype), do0, dv0, input_precision=PRECISION)
            if D1 > 0:
                dv1 = tl.dot(p.to(do0.dtype), do1, dv1, input_precision=PRECISION)
        if DK:
            ds = (p * (product(v0, v1, do0, do1, D1 > 0, PRECISION) - delta[None, :])).to(q0.dtype)
            dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
            if D1 > 0:
                dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
        q_ptr += BLOCK_M * stride_ql
        dout_ptr += BLOCK_M * H * D
    offs = (((tl.program_id(1) * tl.cast(N, tl.int64) + n) * S + first) * H + h) * D
    if DV:
        store_parts(dv_ptr + offs, dv0, dv1, lane_n, H * D, S - first, D0, D1, BLOCK_D0, BLOCK_D1)
    if DK:
        store_parts(dk_ptr + offs, dk0 * scale, dk1 * scale, lane_n, H * D, S - first, D0, D1, BLOCK_D0, BLOCK_D1)


@triton.jit
def attention_backward_queries_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, mask_ptr, rows_ptr,
    dq_ptr,  # [N, L, H, D], dense
    stride_qn, stride_ql, stride_qh, stride_kn, stride_ks, stride_kh, stride_vn, stride_vs, stride_vh,
    stride_mn, stride_mh, stride_ml, stride_ms,
    N, L, S, H, blocks,
    factor, scale,
    D: tl.constexpr, D0: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr, MASK_ONE_ROW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_M queries, over all keys."""
    D1: tl.constexpr = D - D0
    n, h, first = head_of_program(blocks, H, BLOCK_M)
    lane_m, lane_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    stride_ql, stride_ks, stride_vs = stride_ql * ALIGN, stride_ks * ALIGN, stride_vs * ALIGN
    q_ptr += (n * stride_qn + h * stride_qh) * ALIGN + first * stride_ql
    k_ptr += (n * stride_kn + h * stride_kh) * ALIGN
    v_ptr += (n * stride_vn + h * stride_vh) * ALIGN
    if MASK != "none":
        mask_ptr += n * stride_mn + h * stride_mh + first * stride_ml
    q0, q1 = load_parts(q_ptr, lane_m, stride_ql, L - first, D0, D1, BLOCK_D0, BLOCK_D1, False)
    offs = ((n * L + first) * H + h) * D
    do0, do1 = load_parts(dout_ptr + offs, lane_m, H * D, L - first, D0, D1, BLOCK_D0, BLOCK_D1, False)
    rows_ptr += (n * H + h) * L + first + lane_m
    stride_rows, mask = tl.cast(N, tl.int64) * H * L, lane_m < L - first
    top = tl.load(rows_ptr, mask, other=float("inf"))
    inverse = tl.load(rows_ptr + stride_rows, mask, other=0.0)
    delta = tl.load(rows_ptr + 2 * stride_rows, mask, other=0.0)
    dq0 = tl.zeros([BLOCK_M, BLOCK_D0], tl.float32)
    dq1 = dq0
    if D1 > 0:
        dq1 = tl.zeros([BLOCK_M, BLOCK_D1], tl.float32)
    for start in range(0, S, BLOCK_N):
        scores, k0, k1 = scores_of_rows(
            q0, q1, k_ptr, mask_ptr, stride_ks, stride_ml, stride_ms, lane_m, L - first, S - start, factor,
            D0, D1, BLOCK_D0, BLOCK_D1, BLOCK_N, MASK, MASK_ONE_ROW, EVEN, PRECISION,
        )  # fmt: skip
        v0, v1 = load_parts(v_ptr, lane_n, stride_vs, S - start, D0, D1, BLOCK_D0, BLOCK_D1, EVEN)
        p = tl.exp2(scores - top[:, None]) * inverse[:, None]
        ds = (p * (product(do0, do1, v0, v1, D1 > 0, PRECISION) - delta[:, None])).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_ks
        v_ptr += BLOCK_N * stride_vs
        if MASK != "none":
            mask_ptr += BLOCK_N * stride_ms
    store_parts(dq_ptr + offs, dq0 * scale, dq1 * scale, lane_m, H * D, L - first, D0, D1, BLOCK_D0, BLOCK_D1)


@dataclass(frozen=True)
class Configuration:
    block: int  # rows that a program owns: queries, or keys in the kernel over keys
    block_step: int  # rows of the other side an iteration
    num_warps: int
    num_stages: int


def configurations(d: int, itemsize: int, masked: bool, mask_rows: bool) -> dict[str, Configuration]:
    """Tiles of the three kernels for a head width; mask_rows: each query has its own row of the mask.

    No tile takes more than 99 KB of shared memory where `mma.sync` is used, and none spills (bench/resources.py).
    """
    if itemsize == 4:
        # no tensor cores: products by plain multiplication, whose operands live in registers
        size = 16 if mask_rows else 32
        queries = Configuration(size, size, 8, 1)
        # two sums and two products of more than 64 columns: Triton 3.6 spills 396 bytes with 32 rows an iteration
        keys = replace(queries, block_step=16) if d > 64 else queries
        return {"statistics": queries, "keys": keys, "queries": queries}
    step = 64 if d <= 64 else 32
    # a mask is prefetched as well, which the widest heads leave no registers for
    tight = masked and d > 128
    queries = Configuration(64, step // 2 if mask_rows or tight else step, 4, 1 if tight else 2)
    # two sums a program up to BOTH, of a width's operands each: fewer rows an iteration where they fill the registers
    keys = replace(queries, block_step=min(queries.block_step, 64 if d <= 40 else 32 if d <= 128 else 16))
    statistics = Configuration(64, step, 4, 2)
    return {"statistics": statistics, "keys": keys, "queries": queries}


def shares(length: int, programs: int) -> tuple[int, int]:
    """(how many programs share a block of keys' queries, how many each has): a prompt's 77 keys are few blocks.

    Enough for two programs on each of 132 multiprocessors, of 512 queries or more: a multiple of every tile.
    """
    splits = min(triton.cdiv(264, programs), triton.cdiv(length, 512))
    share = triton.cdiv(triton.cdiv(length, splits), 64) * 64
    return triton.cdiv(length, share), share


WIDEST = {4: 80, 2: 160}  # by bytes a number: wider, the sums and a product's operands do not fit the registers
BOTH = 80  # up to here one program keeps the sums of both dk and dv


def attention_backward(dout, q, k, v, out, dq, dk, dv, mask, scale):
    """The gradients of out = softmax(scale * q k^T + mask) v. A row with every key masked gives zeros.

    q            [N, L, H, D]   k, v  [N, S, H, D]   float16 | bfloat16 | float32, unit stride in D; D is at most WIDEST
    dout, out    [N, L, H, D]   dense; dq likewise; dk, dv  [N, S, H, D], dense; none is empty
    mask         [N, H, L, S]   by strides (0 where broadcast): bool, True attends, or floating and added; or None
    """
    (n, length, heads, d), keys = q.shape, k.shape[1]
    kind = "none" if mask is None else "bool" if mask.dtype is torch.bool else "add"
    strides_m = (0, 0, 0, 0) if mask is None else mask.stride()
    mask = mask.view(torch.uint8) if kind == "bool" else mask
    rows = q.new_empty((3, n, heads, length), dtype=torch.float32)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    align = math.gcd(*strides, 16 // q.element_size())  # see attention.py
    strides = [stride // align for stride in strides]
    d0, block_d0, block_d1 = split_width(d)
    factor = float(scale) * math.log2(math.e)

    def start(kernel, config, tensors, own, other, strides, scalars, block, step, splits=1, **constants):
        blocks = triton.cdiv(own, config.block)
        launch_kernel(
            kernel, (blocks * heads * n, splits),
            *tensors, *strides, *strides_m, n, length, keys, heads, blocks, *scalars,
            D=d, D0=d0, BLOCK_D0=block_d0, BLOCK_D1=block_d1, **{block: config.block, step: config.block_step},
            EVEN=other % config.block_step == 0, ALIGN=align, MASK=kind, MASK_ONE_ROW=strides_m[2] == 0,
            PRECISION="ieee" if q.dtype is torch.float32 else "tf32", **constants,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
            maxnreg=255,  # left alone, ptxas stops at 32 for some and spills
        )  # fmt: skip

    configs = configurations(d, q.element_size(), mask is not None, strides_m[2] != 0)
    scalars = factor, float(scale)
    splits, share = shares(length, triton.cdiv(keys, configs["keys"].block) * heads * n)
    parts = (dk, dv) if splits == 1 else q.new_empty((2, splits, *k.shape), dtype=torch.float32)
    with torch.cuda.device_of(q):
        start(attention_statistics_kernel, configs["statistics"], (q, k, dout, out, mask, rows), length, keys,
              strides[:6], (factor,), "BLOCK_M", "BLOCK_N")  # fmt: skip
        for with_dk, with_dv in ((True, True),) if d <= BOTH else ((True, False), (False, True)):
            start(attention_backward_keys_kernel, configs["keys"], (q, k, v, dout, mask, rows, *parts), keys, length,
                  strides, (share, *scalars), "BLOCK_N", "BLOCK_M", splits, DK=with_dk, DV=with_dv)  # fmt: skip
        if splits > 1:
            for gradient, part in zip((dk, dv), parts, strict=True):
                gradient.copy_(part.sum(0))
        start(attention_backward_queries_kernel, configs["queries"], (q, k, v, dout, mask, rows, dq), length, keys,
              strides, scalars, "BLOCK_M", "BLOCK_N")  # fmt: skip
