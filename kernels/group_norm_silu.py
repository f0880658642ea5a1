"""SiLU(GroupNorm(x + add) * (1 + scale) + shift) in Triton: one launch where a group is small, else two.

A program owns a tile of whole groups of one sample and walks over it twice: moments, then normalisation. Where a
group is small the second walk finds it in the L1 or L2 cache, and device memory is read once. Where it is large the
walks are two launches, the positions are split over programs, and the parts' moments are combined (Chan et al. 1983).
Source: Wu & He 2018, section 3.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ldmfast.kernels.group_norm_tiles import (
    BLOCK_PARTS,
    group_members,
    group_moments,
    load_tile,
    moments_of_parts,
    reciprocal_deviation,
)
from ldmfast.kernels.launch_kernel import launch_kernel


@triton.jit
def _normalize(
    x_ptr, y_ptr, weight_ptr, bias_ptr, add_ptr, scale_ptr, shift_ptr,  # at the tile's first channel and position
    group_mean, group_rest, group_rstd,  # [BLOCK_G]
    stride_xc, stride_xp, stride_yc, stride_yp, channels, length,
    SILU: tl.constexpr, GROUP_SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    lane_c, lane_p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    member = group_members(lane_c, channels, GROUP_SIZE, BLOCK_G)
    mean = tl.sum(tl.where(member, group_mean[:, None], 0.0), axis=0)
    rest = tl.sum(tl.where(member, group_rest[:, None], 0.0), axis=0)
    rstd = tl.sum(tl.where(member, group_rstd[:, None], 0.0), axis=0)
    for c in range(0, CHANNELS, BLOCK_C):
        offs_c = c + lane_c
        mask_c = offs_c < channels
        gain, offset = rstd, tl.zeros([BLOCK_C], tl.float32)
        if weight_ptr is not None:
            gain *= tl.load(weight_ptr + offs_c, mask_c, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            offset += tl.load(bias_ptr + offs_c, mask_c, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            scale = 1.0 + tl.load(scale_ptr + offs_c, mask_c, other=0.0).to(tl.float32)
            gain *= scale
            offset *= scale
        if shift_ptr is not None:
            offset += tl.load(shift_ptr + offs_c, mask_c, other=0.0).to(tl.float32)
        offset -= rest * gain
        x_tile_ptr, y_tile_ptr = x_ptr, y_ptr
        for p in range(0, length, BLOCK_P):
            mask_p = lane_p < length - p
            x = load_tile(x_tile_ptr, add_ptr, c, lane_c, lane_p, stride_xc, stride_xp, mask_c, mask_p)
            # the mean is taken off first: folded into the offset it would round at |mean| * 2^-24
            y = (x - mean[:, None]) * gain[:, None] + offset[:, None]
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            offs = lane_c[:, None] * stride_yc + lane_p[None, :] * stride_yp
            tl.store(y_tile_ptr + offs, y.to(y_ptr.dtype.element_ty), mask_c[:, None] & mask_p[None, :])
            x_tile_ptr += BLOCK_P * stride_xp
            y_tile_ptr += BLOCK_P * stride_yp
        x_ptr += BLOCK_C * stride_xc
        y_ptr += BLOCK_C * stride_yc


@triton.jit
def group_norm_silu_kernel(
    x_ptr, y_ptr,  # [N, C, P]; y is dense, in the layout of x
    weight_ptr, bias_ptr,  # [C] or None
    add_ptr, scale_ptr, shift_ptr,  # [N, C] or None
    partial_ptr,  # [N, G, parts, 3] float32: a part's mean, its rest and M2; None in one launch
    stride_xn, stride_xc, stride_xp, stride_add, stride_scale, stride_shift,
    C, P, tiles, parts, part_length,  # tiles of channels of a sample, parts of the positions and their length
    eps,
    STEP: tl.constexpr,  # "all" in one launch, or "moments" then "normalize"
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % parts
    tile = tl.program_id(0) // parts % tiles
    n = (tl.program_id(0) // parts // tiles).to(tl.int64)
    CHANNELS: tl.constexpr = TILE_GROUPS * GROUP_SIZE
    c = tile.to(tl.int64) * CHANNELS
    p = part.to(tl.int64) * part_length
    channels = min(C - tile * CHANNELS, CHANNELS)
    length = min(P - part * part_length, part_length)
    x_ptr += n * stride_xn + c * stride_xc + p * stride_xp
    add_ptr = add_ptr + n * stride_add + c if add_ptr is not None else None
    if STEP != "normalize":
        mean, rest, m2 = group_moments(
            x_ptr, add_ptr, stride_xc, stride_xp, channels, length,
            GROUP_SIZE, CHANNELS, BLOCK_G, BLOCK_C, BLOCK_P, EVEN_P,
        )  # fmt: skip
    if STEP != "all":
        offs_g = tl.arange(0, BLOCK_G)
        partial_ptr += (n * (C // GROUP_SIZE) + tile * TILE_GROUPS) * parts * 3
        mask_g = offs_g * GROUP_SIZE < channels
    if STEP == "moments":
        tl.store(partial_ptr + (offs_g * parts + part) * 3, mean, mask_g)
        tl.store(partial_ptr + (offs_g * parts + part) * 3 + 1, rest, mask_g)
        tl.store(partial_ptr + (offs_g * parts + part) * 3 + 2, m2, mask_g)
    else:
        if STEP == "normalize":
            mean, rest, m2 = moments_of_parts(partial_ptr, mask_g, offs_g, parts, part_length, P, GROUP_SIZE)
        rstd = reciprocal_deviation(m2, P, eps, GROUP_SIZE)
        stride_yc = 1 if CHANNELS_LAST else P
        stride_yp = C if CHANNELS_LAST else 1
        y_ptr += n * C * P + c * stride_yc + p * stride_yp
        weight_ptr = weight_ptr + c if weight_ptr is not None else None
        bias_ptr = bias_ptr + c if bias_ptr is not None else None
        scale_ptr = scale_ptr + n * stride_scale + c if scale_ptr is not None else None
        shift_ptr = shift_ptr + n * stride_shift + c if shift_ptr is not None else None
        _normalize(
            x_ptr, y_ptr, weight_ptr, bias_ptr, add_ptr, scale_ptr, shift_ptr, mean, rest, rstd,
            stride_xc, stride_xp, stride_yc, stride_yp, channels, length, SILU,
            GROUP_SIZE, CHANNELS, BLOCK_G, BLOCK_C, BLOCK_P,
        )  # fmt: skip


@dataclass(frozen=True)
class Configuration:
    split: bool  # two launches
    tile_groups: int
    block_c: int
    block_p: int
    num_warps: int
    part_length: int  # positions of a program


@functools.lru_cache(maxsize=1024)  # a refusal and the launch ask for the same one
def configuration(n: int, channels: int, positions: int, groups: int, channels_last: bool) -> Configuration:
    """One launch while a group, with the padding of its tile, is at most 49,152 numbers; else two.

    In one launch a program has a group to itself: 64 programs for batch 2. 49,152 lets [2, 320, 64, 64] in (40,960 a
    group, 80 KB in 16 bits: the second walk fits an L1 cache of 256 KB). In channels_last the same group is 4,096
    pieces of 20 bytes padded from 10 lanes to 16; so two launches, over 12 groups: 240 bytes, 120 of 128 lanes.
    """
    channels_last = channels_last or positions == 1  # there the channels are the long dimension
    size = channels // groups
    pow_c, pow_p = triton.next_power_of_2(size), triton.next_power_of_2(positions)
    one_tile = pow_c * pow_p <= 8192
    split = not one_tile and (pow_c if channels_last else size) * positions > 49152
    tile_groups = max(1, min(groups, 128 // size)) if split and channels_last else 1
    block_c = triton.next_power_of_2(size * tile_groups)  # covers the tile's channels
    block_p = max(min(8192 // block_c, pow_p), 1)
    divisor = min(size & -size, 16)
    row = min(8192 // divisor, 1 << (positions.bit_length() - 1))
    if not channels_last and not one_tile and divisor * row >= 4096:
        block_c, block_p = divisor, row  # divides them: no lane is idle
    # 16 numbers a thread: two 16-byte accesses in 16 bits, 48 registers for the three sums; fewer of one by one
    a_thread = 16 if channels_last or positions % 8 == 0 else 8
    num_warps = min(max(triton.next_power_of_2(block_c * block_p) // (32 * a_thread), 1), 16)
    part_length = positions
    if split:  # about 1024 programs: two waves of four on each of 132 multiprocessors
        parts = min(BLOCK_PARTS.value, max(1, 1024 // (n * triton.cdiv(groups, tile_groups))))
        part_length = triton.cdiv(triton.cdiv(positions, parts), block_p) * block_p
    return Configuration(split, tile_groups, block_c, block_p, num_warps, part_length)


def group_norm_silu(x, strides, channels_last, y, weight, bias, add, scale, shift, groups, eps, silu):
    """y = act((GroupNorm(x + add) * weight + bias) * (1 + scale) + shift), statistics in float32.

    x                  [N, C, ...] float16 | bfloat16 | float32, not empty
    strides            of x seen as [N, C, P], unit in C where channels_last, else in P; below 2^31 inside a tile
    y                  as x, dense, in the layout of x
    weight, bias       [C], dense, or None                  dtype of x, or float32
    add, scale, shift  [N, C], unit stride in C, or None    dtype of x, or float32
    """
    n, channels, positions = *x.shape[:2], x.shape[2:].numel()
    config = configuration(n, channels, positions, groups, channels_last)
    tiles, parts = triton.cdiv(groups, config.tile_groups), triton.cdiv(positions, config.part_length)
    partial = x.new_empty((n, groups, parts, 3), dtype=torch.float32) if config.split else None
    rows = [0 if tensor is None else tensor.stride(0) for tensor in (add, scale, shift)]
    with torch.cuda.device_of(x):
        for step in ("moments", "normalize") if config.split else ("all",):
            launch_kernel(
                group_norm_silu_kernel, (n * tiles * parts,),
                x, y, weight, bias, add, scale, shift, partial, *strides, *rows,
                channels, positions, tiles, parts, config.part_length, float(eps),
                STEP=step, SILU=bool(silu), CHANNELS_LAST=channels_last, GROUP_SIZE=channels // groups,
                TILE_GROUPS=config.tile_groups, BLOCK_G=triton.next_power_of_2(config.tile_groups),
                BLOCK_C=config.block_c, BLOCK_P=config.block_p, EVEN_P=positions % config.block_p == 0,
                num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
            )  # fmt: skip
