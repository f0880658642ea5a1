"""Flash attention in Triton: softmax(scale * q k^T + mask) v without the score matrix in memory.

Tensor-core tiles are powers of two. A head width between them is cut in two, D = D0 + D1: 40 = 32 + 8 (a contraction
needs 16, so 32 + 16), 80 = 64 + 16, 160 = 128 + 32. For 40 that is 48 instead of 64 columns in both products.
Source: Dao 2023 (FlashAttention-2), algorithm 1.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ldmfast.kernels.attention_tiles import add_mask, load_tile, split_width
from ldmfast.kernels.launch_kernel import launch_kernel


@triton.jit
def _masked(qk, mask_ptr, rows, cols, stride_ml, stride_ms, L, S, BOOL: tl.constexpr, ONE_ROW: tl.constexpr):
    # rows below L and cols below S exist, counted from mask_ptr; ONE_ROW: a key mask, the same for all queries
    offs, inside = cols[None, :] * stride_ms, (cols < S)[None, :]
    if not ONE_ROW:
        offs += rows[:, None] * stride_ml
        inside &= (rows < L)[:, None]
    return add_mask(qk, mask_ptr, offs, inside, BOOL)


@triton.jit
def _attend(
    acc0, acc1, row_sum, row_max, q0, q1,  # the state, [BLOCK_M, D0], [BLOCK_M, D1], [BLOCK_M] twice; and the queries
    k_ptr, v_ptr, mask_ptr, stride_ks, stride_vs, stride_ml, stride_ms,
    lane_m, L, S, scale, start, stop,  # L: query rows from the block's first one
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, MASK_ONE_ROW: tl.constexpr, SCALE_FIRST: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over keys start to stop; FULL: no block reaches past S."""
    lane_n, cols0, cols1 = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D0), tl.arange(0, BLOCK_D1)
    k_ptr += tl.cast(start, tl.int64) * stride_ks
    v_ptr += tl.cast(start, tl.int64) * stride_vs
    if MASK != "none":
        mask_ptr += tl.cast(start, tl.int64) * stride_ms
    # the last, partial block is one iteration: nothing to pipeline
    for n in tl.range(start, stop, BLOCK_N, num_stages=None if FULL else 1):
        k0 = load_tile(k_ptr, lane_n, stride_ks, S - n, cols0, D0, BLOCK_D0, FULL)
        if D1 > 0:
            k1 = load_tile(k_ptr + D0, lane_n, stride_ks, S - n, cols1, D1, BLOCK_D1, FULL)
            qk = tl.dot(q1, k1.T, tl.dot(q0, k0.T, input_precision=PRECISION), input_precision=PRECISION)
        else:
            qk = tl.dot(q0, k0.T, input_precision=PRECISION)
        if SCALE_FIRST:
            qk *= scale
        if MASK != "none":
            qk = _masked(qk, mask_ptr, lane_m, lane_n, stride_ml, stride_ms, L, S - n, MASK == "bool", MASK_ONE_ROW)
            mask_ptr += BLOCK_N * stride_ms
        if not FULL:
            qk = tl.where((lane_n < S - n)[None, :], qk, float("-inf"))
        if SCALE_FIRST:
            new_max = tl.maximum(row_max, tl.max(qk, axis=1))
            # all masked so far: 0 stands in, as -inf - -inf would be NaN
            safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(qk - safe_max[:, None])
        else:
            new_max = tl.maximum(row_max, tl.max(qk, axis=1) * scale)
            safe_max = new_max
            p = tl.exp2(qk * scale - safe_max[:, None])
        alpha = tl.exp2(row_max - safe_max)
        row_sum = row_sum * alpha + tl.sum(p, axis=1)
        row_max = new_max
        v0 = load_tile(v_ptr, lane_n, stride_vs, S - n, cols0, D0, BLOCK_D0, FULL)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * alpha[:, None], input_precision=PRECISION)
        if D1 > 0:
            v1 = load_tile(v_ptr + D0, lane_n, stride_vs, S - n, cols1, D1, BLOCK_D1, FULL)
            acc1 = tl.dot(p, v1, acc1 * alpha[:, None], input_precision=PRECISION)
        k_ptr += BLOCK_N * stride_ks
        v_ptr += BLOCK_N * stride_vs
    return acc0, acc1, row_sum, row_max


@triton.jit
def attention_kernel(
    q_ptr,  # [N, L, H, D]
    k_ptr, v_ptr,  # [N, S, H, D]
    out_ptr,  # [N, L, H, D], dense
    mask_ptr,  # [N, H, L, S] by strides, or None
    stride_qn, stride_ql, stride_qh,  # of q, k and v: in units of ALIGN, so that the compiler knows what divides them
    stride_kn, stride_ks, stride_kh,
    stride_vn, stride_vs, stride_vh,
    stride_mn, stride_mh, stride_ml, stride_ms,
    L, S, H, blocks_l,
    scale,  # times log2(e)
    D: tl.constexpr, D0: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, EVEN_S: tl.constexpr, ALIGN: tl.constexpr, MASK: tl.constexpr,
    MASK_ONE_ROW: tl.constexpr, SCALE_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    D1: tl.constexpr = D - D0
    # a head's blocks are neighbours, so its keys and values stay in the L2 cache
    h = (tl.program_id(0) // blocks_l % H).to(tl.int64)
    n = (tl.program_id(0) // blocks_l // H).to(tl.int64)
    first = (tl.program_id(0) % blocks_l).to(tl.int64) * BLOCK_M
    q_ptr += (n * stride_qn + h * stride_qh + first * stride_ql) * ALIGN
    k_ptr += (n * stride_kn + h * stride_kh) * ALIGN
    v_ptr += (n * stride_vn + h * stride_vh) * ALIGN
    stride_ql, stride_ks, stride_vs = stride_ql * ALIGN, stride_ks * ALIGN, stride_vs * ALIGN
    if MASK != "none":
        mask_ptr += n * stride_mn + h * stride_mh + first * stride_ml
    lane_m, cols0, cols1 = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D0), tl.arange(0, BLOCK_D1)
    q0 = load_tile(q_ptr, lane_m, stride_ql, L - first, cols0, D0, BLOCK_D0, False)
    acc0 = tl.zeros([BLOCK_M, BLOCK_D0], tl.float32)
    q1 = q0
    acc1 = acc0
    if D1 > 0:
        q1 = load_tile(q_ptr + D0, lane_m, stride_ql, L - first, cols1, D1, BLOCK_D1, False)
        acc1 = tl.zeros([BLOCK_M, BLOCK_D1], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    full = S // BLOCK_N * BLOCK_N
    acc0, acc1, row_sum, row_max = _attend(
        acc0, acc1, row_sum, row_max, q0, q1, k_ptr, v_ptr, mask_ptr, stride_ks, stride_vs, stride_ml, stride_ms,
        lane_m, L - first, S, scale, 0, full,
        D0, D1, BLOCK_D0, BLOCK_D1, BLOCK_N, MASK, MASK_ONE_ROW, SCALE_FIRST, True, PRECISION,
    )  # fmt: skip
    if not EVEN_S:
        acc0, acc1, row_sum, row_max = _attend(
            acc0, acc1, row_sum, row_max, q0, q1, k_ptr, v_ptr, mask_ptr, stride_ks, stride_vs, stride_ml, stride_ms,
            lane_m, L - first, S, scale, full, S,
            D0, D1, BLOCK_D0, BLOCK_D1, BLOCK_N, MASK, MASK_ONE_ROW, SCALE_FIRST, False, PRECISION,
        )  # fmt: skip
    # no key at all: zeros
    inverse = tl.where(row_sum > 0.0, 1.0 / row_sum, 0.0)[:, None]
    out_ptr += ((n * L + first) * H + h) * D
    offs = out_ptr + lane_m[:, None] * (H * D) + cols0[None, :]
    mask = (lane_m < L - first)[:, None]
    tl.store(offs, (acc0 * inverse).to(out_ptr.dtype.element_ty), mask & (cols0 < D0)[None, :])
    if D1 > 0:
        offs = out_ptr + lane_m[:, None] * (H * D) + D0 + cols1[None, :]
        tl.store(offs, (acc1 * inverse).to(out_ptr.dtype.element_ty), mask & (cols1 < D1)[None, :])


@dataclass(frozen=True)
class Configuration:
    d0: int  # the head width's first part; the second is the rest
    block_d0: int
    block_d1: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def configuration(d: int, rows: int, keys: int, itemsize: int, mask_rows: bool) -> Configuration:
    """Tiles for a head width, query rows over all heads, and keys; mask_rows: each query has its own row of a mask.

    No tile takes more than 99 KB of shared memory where `mma.sync` is used: GPUs of sm_86 and sm_89 have no more.
    """
    block_n, num_stages = 64 if d <= 128 else 32, 3 if d <= 64 else 2
    if itemsize == 4:
        # no tensor cores: products by plain multiplication, whose operands live in registers
        block_m, block_n, num_warps, num_stages = (64, 32, 8, 1) if d <= 64 and not mask_rows else (32, 16, 8, 1)
    elif d > 160:
        block_m, num_warps = 64, 8
    elif rows <= 256 * 128:
        # blocks of 64 rows, so that a short sequence still reaches every multiprocessor
        block_m, num_warps = 64, 4
    else:
        # two warp groups share the keys and values in shared memory: half of the traffic to the L2 cache. At d = 40 a
        # thread takes 118 registers on sm_90, so two such programs, 16 warps, fit; 4 warps would take 204 and fit 8
        block_m, num_warps = 128, 8
    if mask_rows:
        # its tile is as large as the scores', in registers and, pipelined, in shared memory
        block_n, num_stages = max(block_n // 2, 16), min(num_stages, 2)
    block_n = min(block_n, max(triton.next_power_of_2(keys), 16))
    return Configuration(*split_width(d), block_m, block_n, num_warps, num_stages)


WIDEST = 256  # the widest head: its tiles fill the shared memory of sm_86


def attention(q, k, v, out, mask, scale):
    """out = softmax(scale * q k^T + mask) v. A row with every key masked, or S == 0, gives zeros.

    q     [N, L, H, D]   k, v  [N, S, H, D]   float16 | bfloat16 | float32, unit stride in D; D is at most WIDEST
    out   [N, L, H, D]   dense, not empty
    mask  [N, H, L, S]   by strides (0 where broadcast): bool, True attends, or floating and added; or None
    """
    (n, length, heads, d), keys = q.shape, k.shape[1]
    kind = "none" if mask is None else "bool" if mask.dtype is torch.bool else "add"
    strides_m = (0, 0, 0, 0) if mask is None else mask.stride()
    config = configuration(d, n * heads * length, keys, q.element_size(), strides_m[2] != 0)
    blocks_l = triton.cdiv(length, config.block_m)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    # a head of 40 is 80 bytes from the next: 16-byte copies are right, but Triton itself looks for multiples of 16 only
    align = math.gcd(*strides, 16 // q.element_size())
    with torch.cuda.device_of(q):
        launch_kernel(
            attention_kernel, (blocks_l * heads * n,),
            q, k, v, out, mask.view(torch.uint8) if kind == "bool" else mask,
            *(stride // align for stride in strides), *strides_m,
            length, keys, heads, blocks_l, float(scale) * math.log2(math.e),
            D=d, D0=config.d0, BLOCK_D0=config.block_d0, BLOCK_D1=config.block_d1,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, EVEN_S=keys % config.block_n == 0, ALIGN=align,
            # the maximum can be scaled instead of every score, if scaling keeps the order
            MASK=kind, MASK_ONE_ROW=strides_m[2] == 0, SCALE_FIRST=mask is not None or scale <= 0,
            PRECISION="ieee" if q.dtype is torch.float32 else "tf32",
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
            # left alone, ptxas stops at 128 for some tiles of float32 and spills a few bytes
            maxnreg=255 if q.dtype is torch.float32 else None,
        )  # fmt: skip
