"""What the kernels of attention and of its gradient do with a tile: rows of queries or keys by a head's columns."""

import triton
import triton.language as tl


def split_width(d: int) -> tuple[int, int, int]:
    """(D0, its tile, the rest's tile or 16): one or two tiles of powers of two, 16 or more, with the fewest columns."""
    whole = max(triton.next_power_of_2(d), 16)
    d0 = whole // 2
    rest = max(triton.next_power_of_2(d - d0), 16) if d > d0 else 0
    return (d0, d0, rest) if 0 < rest < d0 else (d, whole, 16)


@triton.jit
def load_tile(ptr, rows, stride_row, length, cols, D: tl.constexpr, BLOCK_D: tl.constexpr, FULL: tl.constexpr):
    # a [rows, cols] tile; FULL: every row exists. No mask at all where none is needed, so that copies stay asynchronous
    offs = ptr + rows[:, None] * stride_row + cols[None, :]
    if FULL and D == BLOCK_D:
        return tl.load(offs)
    elif FULL:
        return tl.load(offs, (cols < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        return tl.load(offs, (rows < length)[:, None], other=0.0)
    else:
        return tl.load(offs, (rows < length)[:, None] & (cols < D)[None, :], other=0.0)


@triton.jit
def add_mask(scores, mask_ptr, offs, inside, BOOL: tl.constexpr):
    # scores in units of log2, the base of exp2
    mask = tl.load(mask_ptr + offs, inside, other=0)
    if BOOL:
        return tl.where(mask != 0, scores, float("-inf"))
    # float32's lowest number, which is no -inf, must not become one
    mask = mask.to(tl.float32)
    return scores + tl.where(mask == float("-inf"), mask, tl.maximum(mask * 1.4426950408889634, -3.4028234e38))


@triton.jit
def product(a0, a1, b0, b1, TWO: tl.constexpr, PRECISION: tl.constexpr):
    # a b^T over the width's one or two parts
    total = tl.dot(a0, b0.T, input_precision=PRECISION)
    if TWO:
        total = tl.dot(a1, b1.T, total, input_precision=PRECISION)
    return total


@triton.jit
def load_parts(ptr, rows, stride_row, length, D0: tl.constexpr, D1: tl.constexpr, BLOCK_D0: tl.constexpr,
                BLOCK_D1: tl.constexpr, FULL: tl.constexpr):  # fmt: skip
    part0 = load_tile(ptr, rows, stride_row, length, tl.arange(0, BLOCK_D0), D0, BLOCK_D0, FULL)
    part1 = part0
    if D1 > 0:
        part1 = load_tile(ptr + D0, rows, stride_row, length, tl.arange(0, BLOCK_D1), D1, BLOCK_D1, FULL)
    return part0, part1


@triton.jit
def store_parts(ptr, part0, part1, rows, stride_row, length, D0: tl.constexpr, D1: tl.constexpr,
                 BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr):  # fmt: skip
    cols0, cols1 = tl.arange(0, BLOCK_D0), tl.arange(0, BLOCK_D1)
    mask = (rows < length)[:, None]
    offs = ptr + rows[:, None] * stride_row
    tl.store(offs + cols0[None, :], part0.to(ptr.dtype.element_ty), mask & (cols0 < D0)[None, :])
    if D1 > 0:
        tl.store(offs + D0 + cols1[None, :], part1.to(ptr.dtype.element_ty), mask & (cols1 < D1)[None, :])


@triton.jit
def scores_of_rows(
    q0, q1, k_ptr, mask_ptr, stride_ks, stride_ml, stride_ms, lane_m, L, left, scale,
    D0: tl.constexpr, D1: tl.constexpr, BLOCK_D0: tl.constexpr, BLOCK_D1: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, MASK_ONE_ROW: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of the queries against `left` keys from k_ptr on, [BLOCK_M, BLOCK_N], -inf past the last; and the keys."""
    lane_n = tl.arange(0, BLOCK_N)
    k0, k1 = load_parts(k_ptr, lane_n, stride_ks, left, D0, D1, BLOCK_D0, BLOCK_D1, FULL)
    scores = product(q0, q1, k0, k1, D1 > 0, PRECISION) * scale
    if MASK != "none":
        offs, inside = lane_n[None, :] * stride_ms, (lane_n < left)[None, :]
        if not MASK_ONE_ROW:
            offs += lane_m[:, None] * stride_ml
            inside &= (lane_m < L)[:, None]
        scores = add_mask(scores, mask_ptr, offs, inside, MASK == "bool")
    if not FULL:
        scores = tl.where((lane_n < left)[None, :], scores, float("-inf"))
    return scores, k0, k1


@triton.jit
def head_of_program(blocks, H, BLOCK: tl.constexpr):
    # sample, head and first row of this program's block; a head's blocks are neighbours, for the L2 cache
    head = tl.program_id(0) // blocks
    return (head // H).to(tl.int64), (head % H).to(tl.int64), (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
