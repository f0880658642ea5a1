"""The gradient of group_norm_silu in Triton: one launch where a group is small, else four.

A program owns a tile of whole groups of one sample, as in the forward, and walks over it three times: moments, the
channels' sums of g and g * xhat, then dx. Where a group is large the walks are launches of their own, the positions
are split over programs, and a small launch combines the parts' sums, in a fixed order.
Source: Wu & He 2018, section 3, differentiated; Chan et al. 1983 for the moments.
"""

import functools
from dataclasses import replace

import torch
import triton
import triton.language as tl
from ldmfast.kernels.group_norm_silu import Configuration
from ldmfast.kernels.group_norm_silu import configuration as forward_configuration
from ldmfast.kernels.group_norm_tiles import (
    affine,
    channel_sums,
    combine,
    gather,
    group_members,
    group_moments,
    moments_of_parts,
    reciprocal_deviation,
    spread,
    write_dx,
)
from ldmfast.kernels.launch_kernel import launch_kernel


@triton.jit
def _sums(
    x_ptr, dy_ptr, add_ptr,
    sums_ptr,  # [3, N, C]: the channels' sums of g and g * xhat, where this program has all positions
    parts_ptr,  # [3, N, parts, C]: where it has a part of them, those of xhat as well; else None
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_xc, stride_xp, stride_yc, stride_yp,
    member, channels, length, parts, P, NC, mean, rstd,
    SILU: tl.constexpr, GROUP_SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr,
):  # fmt: skip
    """Writes the tile's sums; returns mean_g and mean_gx, [BLOCK_G], which mean something without parts."""
    lane_c = tl.arange(0, BLOCK_C)
    mean_c, rstd_c = spread(member, mean), spread(member, rstd)
    mean_g = tl.zeros([BLOCK_G], tl.float32)
    mean_gx = tl.zeros([BLOCK_G], tl.float32)
    inverse = 1.0 / tl.cast(GROUP_SIZE * P, tl.float32)
    for c in range(0, CHANNELS, BLOCK_C):
        mask_c = c + lane_c < channels
        gain, offset = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, c + lane_c, mask_c)
        sum_g, sum_gx, sum_x = channel_sums(
            x_ptr + c * stride_xc, dy_ptr + c * stride_yc, add_ptr, c, lane_c, stride_xc, stride_xp,
            stride_yc, stride_yp, mask_c, length, mean_c, rstd_c, gain, offset, SILU, BLOCK_C, BLOCK_P, EVEN_P,
        )  # fmt: skip
        if parts_ptr is not None:
            tl.store(parts_ptr + c + lane_c, sum_g, mask_c)
            tl.store(parts_ptr + parts * NC + c + lane_c, sum_gx, mask_c)
            tl.store(parts_ptr + 2 * parts * NC + c + lane_c, sum_x, mask_c)
        else:
            tl.store(sums_ptr + c + lane_c, sum_g, mask_c)
            tl.store(sums_ptr + NC + c + lane_c, sum_gx, mask_c)
            mean_g += gather(member, gain * sum_g) * inverse
            mean_gx += gather(member, gain * sum_gx) * inverse
    return mean_g, mean_gx


@triton.jit
def _apply(
    x_ptr, dy_ptr, dx_ptr, add_ptr,
    sum_dx_ptr,  # [N, C], or None where another program adds them up
    weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_xc, stride_xp, stride_yc, stride_yp,
    member, channels, length, mean, rstd, mean_g, mean_gx,
    SILU: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Writes the tile's dx, and its sums over the positions."""
    lane_c = tl.arange(0, BLOCK_C)
    mean_c, rstd_c = spread(member, mean), spread(member, rstd)
    for c in range(0, CHANNELS, BLOCK_C):
        mask_c = c + lane_c < channels
        gain, offset = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, c + lane_c, mask_c)
        sum_dx = write_dx(
            x_ptr + c * stride_xc, dy_ptr + c * stride_yc, dx_ptr + c * stride_yc, add_ptr, c, lane_c,
            stride_xc, stride_xp, stride_yc, stride_yp, mask_c, length, mean_c, rstd_c, gain, offset,
            spread(member, mean_g), spread(member, mean_gx), SILU, BLOCK_C, BLOCK_P,
        )  # fmt: skip
        if sum_dx_ptr is not None:
            tl.store(sum_dx_ptr + c + lane_c, sum_dx, mask_c)


@triton.jit
def group_norm_silu_backward_kernel(
    dy_ptr, x_ptr, dx_ptr,  # [N, C, P]; dy and dx are dense, in the layout of x
    sums_ptr,  # [3, N, C] float32
    weight_ptr, bias_ptr,  # [C] or None
    add_ptr, scale_ptr, shift_ptr,  # [N, C] or None
    moments_ptr,  # [N, G, parts, 3] float32; this and the next two: None in one launch
    parts_ptr,  # [3, N, parts, C] float32: the sums of g, g * xhat and xhat over a part
    stats_ptr,  # [N, G, 4] float32: mean, 1 / std, mean_g, mean_gx
    stride_xn, stride_xc, stride_xp, stride_add, stride_scale, stride_shift,
    N, C, P, tiles, parts, part_length, eps,
    STEP: tl.constexpr,  # "all" in one launch, or "moments", "sums", "combine" and "apply"
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, GROUP_SIZE: tl.constexpr, TILE_GROUPS: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr,
):  # fmt: skip
    programs = 1 if STEP == "combine" else parts  # of a tile
    part = tl.program_id(0) % programs
    tile = tl.program_id(0) // programs % tiles
    n = (tl.program_id(0) // programs // tiles).to(tl.int64)
    CHANNELS: tl.constexpr = TILE_GROUPS * GROUP_SIZE
    c0 = tile.to(tl.int64) * CHANNELS
    p0 = part.to(tl.int64) * part_length
    channels = min(C - tile * CHANNELS, CHANNELS)
    length = min(P - part * part_length, part_length)
    stride_yc = 1 if CHANNELS_LAST else P
    stride_yp = C if CHANNELS_LAST else 1
    x_ptr += n * stride_xn + c0 * stride_xc + p0 * stride_xp
    dy_ptr += n * C * P + c0 * stride_yc + p0 * stride_yp
    dx_ptr += n * C * P + c0 * stride_yc + p0 * stride_yp
    sums_ptr += n * C + c0
    NC = tl.cast(N, tl.int64) * C
    weight_ptr = weight_ptr + c0 if weight_ptr is not None else None
    bias_ptr = bias_ptr + c0 if bias_ptr is not None else None
    add_ptr = add_ptr + n * stride_add + c0 if add_ptr is not None else None
    scale_ptr = scale_ptr + n * stride_scale + c0 if scale_ptr is not None else None
    shift_ptr = shift_ptr + n * stride_shift + c0 if shift_ptr is not None else None
    lane_c, offs_g = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_G)
    member = group_members(lane_c, channels, GROUP_SIZE, BLOCK_G)
    mask_g = offs_g * GROUP_SIZE < channels
    if STEP != "all":
        group = n * (C // GROUP_SIZE) + tile * TILE_GROUPS
        moments_ptr += group * parts * 3
        parts_ptr += n * parts * C + c0
        stats_ptr += group * 4

    if STEP == "all" or STEP == "moments":
        mean, rest, m2 = group_moments(
            x_ptr, add_ptr, stride_xc, stride_xp, channels, length,
            GROUP_SIZE, CHANNELS, BLOCK_G, BLOCK_C, BLOCK_P, EVEN_P,
        )  # fmt: skip
        rstd = reciprocal_deviation(m2, P, eps, GROUP_SIZE)
        if STEP == "moments":
            tl.store(moments_ptr + (offs_g * parts + part) * 3, mean, mask_g)
            tl.store(moments_ptr + (offs_g * parts + part) * 3 + 1, rest, mask_g)
            tl.store(moments_ptr + (offs_g * parts + part) * 3 + 2, m2, mask_g)
        mean += rest
    elif STEP == "apply":
        mean = tl.load(stats_ptr + offs_g * 4, mask_g, other=0.0)
        rstd = tl.load(stats_ptr + offs_g * 4 + 1, mask_g, other=0.0)
        mean_g = tl.load(stats_ptr + offs_g * 4 + 2, mask_g, other=0.0)
        mean_gx = tl.load(stats_ptr + offs_g * 4 + 3, mask_g, other=0.0)
    else:
        mean, rest, m2 = moments_of_parts(moments_ptr, mask_g, offs_g, parts, part_length, P, GROUP_SIZE)
        mean += rest
        rstd = reciprocal_deviation(m2, P, eps, GROUP_SIZE)
    if STEP == "combine":
        combine(
            sums_ptr, parts_ptr, stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean, rstd,
            offs_g, mask_g, channels, parts, C, P, NC, GROUP_SIZE, CHANNELS, BLOCK_G, BLOCK_C,
        )  # fmt: skip
    if STEP == "all" or STEP == "sums":
        mean_g, mean_gx = _sums(
            x_ptr, dy_ptr, add_ptr, sums_ptr, parts_ptr + part * C if STEP == "sums" else None,
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_xc, stride_xp, stride_yc, stride_yp,
            member, channels, length, parts, P, NC, mean, rstd,
            SILU, GROUP_SIZE, CHANNELS, BLOCK_G, BLOCK_C, BLOCK_P, EVEN_P,
        )  # fmt: skip
    if STEP == "all" or STEP == "apply":
        _apply(
            x_ptr, dy_ptr, dx_ptr, add_ptr, sums_ptr + 2 * NC if STEP == "all" else None,
            weight_ptr, bias_ptr, scale_ptr, shift_ptr, stride_xc, stride_xp, stride_yc, stride_yp,
            member, channels, length, mean, rstd, mean_g, mean_gx, SILU, CHANNELS, BLOCK_C, BLOCK_P,
        )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def configuration(n: int, channels: int, positions: int, groups: int, channels_last: bool) -> Configuration:
    """The forward's, with fewer numbers a thread where 16 warps share the registers: there are three more tiles.

    8, or 4 where an odd number of positions has every number accessed, and addressed, by itself.
    """
    config = forward_configuration(n, channels, positions, groups, channels_last)
    tile = 4096 if channels_last or positions == 1 or positions % 8 == 0 else 2048
    most = max(tile // config.block_c, 1) if config.num_warps == 16 else config.block_p
    return replace(config, block_p=min(config.block_p, most))


def group_norm_silu_backward(
    dy, x, strides, channels_last, dx, sums, weight, bias, add, scale, shift, groups, eps, silu
):
    """dx and, for each sample and channel, the sums over the positions of g, g * xhat and dx.

    dy, dx             [N, C, ...] dtype of x, dense, in the layout of x
    x                  [N, C, ...] float16 | bfloat16 | float32, not empty
    strides            of x seen as [N, C, P], unit in C where channels_last, else in P; below 2^31 inside a tile
    sums               [3, N, C] float32, dense
    weight, bias       [C], dense, or None                  dtype of x, or float32
    add, scale, shift  [N, C], unit stride in C, or None    dtype of x, or float32

    Deterministic.
    """
    n, channels, positions = *x.shape[:2], x.shape[2:].numel()
    config = configuration(n, channels, positions, groups, channels_last)
    tiles, parts = triton.cdiv(groups, config.tile_groups), triton.cdiv(positions, config.part_length)
    scratch = (None, None, None)
    if config.split:
        shapes = (n, groups, parts, 3), (3, n, parts, channels), (n, groups, 4)
        scratch = [x.new_empty(shape, dtype=torch.float32) for shape in shapes]
    rows = [0 if tensor is None else tensor.stride(0) for tensor in (add, scale, shift)]
    with torch.cuda.device_of(x):
        for step in ("moments", "sums", "combine", "apply") if config.split else ("all",):
            launch_kernel(
                group_norm_silu_backward_kernel, (n * tiles * (1 if step == "combine" else parts),),
                dy, x, dx, sums, weight, bias, add, scale, shift, *scratch, *strides, *rows,
                n, channels, positions, tiles, parts, config.part_length, float(eps),
                STEP=step, SILU=bool(silu), CHANNELS_LAST=channels_last, GROUP_SIZE=channels // groups,
                TILE_GROUPS=config.tile_groups, BLOCK_G=triton.next_power_of_2(config.tile_groups),
                BLOCK_C=config.block_c, BLOCK_P=config.block_p, EVEN_P=positions % config.block_p == 0,
                num_warps=config.num_warps, num_stages=1, enable_fp_fusion=True,
                maxnreg=128 if config.num_warps == 16 else 255,  # left alone, ptxas stops at 64 for some and spills
            )  # fmt: skip
