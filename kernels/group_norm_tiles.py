"""What the kernels of GroupNorm and of its gradient do with a tile: whole groups of channels by positions."""

import triton
import triton.language as tl

BLOCK_PARTS = tl.constexpr(64)  # most parts that the positions are split in


@triton.jit
def load_tile(x_ptr, add_ptr, c, lane_c, lane_p, stride_xc, stride_xp, mask_c, mask_p):
    # [BLOCK_C, BLOCK_P] in float32; inside a tile offsets stay below 2**31 (checked by the launcher)
    offs = lane_c[:, None] * stride_xc + lane_p[None, :] * stride_xp
    x = tl.load(x_ptr + offs, mask_c[:, None] & mask_p[None, :], other=0.0).to(tl.float32)
    if add_ptr is not None:
        x += tl.load(add_ptr + c + lane_c, mask_c, other=0.0).to(tl.float32)[:, None]
    return x


@triton.jit
def group_members(offs_c, channels, GROUP_SIZE: tl.constexpr, BLOCK_G: tl.constexpr):
    # [BLOCK_G, BLOCK_C]: does the tile's channel belong to its group? A mask, not a product: NaN stays in its group
    return ((offs_c // GROUP_SIZE)[None, :] == tl.arange(0, BLOCK_G)[:, None]) & (offs_c < channels)[None, :]


@triton.jit
def group_moments(
    x_ptr, add_ptr, stride_xc, stride_xp,  # at the tile's first channel and position
    channels, length,  # of the tile: how many exist
    GROUP_SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr,
):  # fmt: skip
    """Mean, what its rounding left, and sum of squared deviations of each of the tile's groups, [BLOCK_G] float32.

    A lane sums x - first and its square, `first` being the lane's first number. As that is one of the n numbers,
    (first - mean)^2 is at most their M2, so the cancellation in M2 = square - total^2 / n loses at most a factor n
    (some hundreds of 2^-24) whatever the data are; unlike E[x^2] - E[x]^2, whose loss has no bound. Each mean is taken
    once more, of what is left after the first: one float32 is rounded by 1e-5 of a deviation where it is 190 away.
    """
    lane_c, lane_p = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    first = load_tile(x_ptr, add_ptr, 0, lane_c, lane_p, stride_xc, stride_xp, lane_c < channels, lane_p < length)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    square = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for c in range(0, CHANNELS, BLOCK_C):
        tile_ptr = x_ptr
        for p in range(0, length, BLOCK_P):
            mask_p = lane_p < length - p
            x = load_tile(tile_ptr, add_ptr, c, lane_c, lane_p, stride_xc, stride_xp, c + lane_c < channels, mask_p)
            delta = x - first
            if not EVEN_P:
                delta = tl.where(mask_p[None, :], delta, 0.0)
            total += delta
            square += delta * delta
            tile_ptr += BLOCK_P * stride_xp
        x_ptr += BLOCK_C * stride_xc
    # a lane has numbers in the first iteration or never: BLOCK_C divides CHANNELS or covers them
    count = (length - lane_p + (BLOCK_P - 1)) // BLOCK_P * ((CHANNELS + BLOCK_C - 1) // BLOCK_C)
    count = count.to(tl.float32)[None, :]
    inverse = 1.0 / tl.maximum(count, 1.0)
    row_count = tl.sum(count, axis=1)  # the same for every channel
    above = total * inverse  # the lane's mean, less its first number
    mean = tl.sum(count * (first + above), axis=1) / row_count
    off = (first - mean[:, None]) + above
    rest = tl.sum(count * off, axis=1) / row_count
    off -= rest[:, None]
    m2 = tl.sum(square - total * total * inverse + count * off * off, axis=1)

    member = group_members(lane_c, channels, GROUP_SIZE, BLOCK_G)
    rows = tl.maximum(tl.sum(member.to(tl.float32), axis=1), 1.0)
    group_mean = tl.sum(tl.where(member, mean[None, :], 0.0), axis=1) / rows
    off = tl.where(member, (mean[None, :] - group_mean[:, None]) + rest[None, :], 0.0)
    group_rest = tl.sum(off, axis=1) / rows
    off -= group_rest[:, None]
    return group_mean, group_rest, tl.sum(tl.where(member, m2[None, :] + row_count * off * off, 0.0), axis=1)


@triton.jit
def moments_of_parts(moments_ptr, mask_g, offs_g, parts, part_length, P, GROUP_SIZE: tl.constexpr):
    # what group_moments gives, of each group from the parts' (Chan et al. 1983). The parts come first: Triton 3.6 gives
    # every thread the whole of [BLOCK_G, BLOCK_PARTS], which spilled 2436 bytes
    offs_part = tl.arange(0, BLOCK_PARTS)
    mask = (offs_part < parts)[:, None] & mask_g[None, :]
    offs = (offs_g[None, :] * parts + offs_part[:, None]) * 3
    part_mean = tl.load(moments_ptr + offs, mask, other=0.0)
    part_rest = tl.load(moments_ptr + offs + 1, mask, other=0.0)
    part_m2 = tl.load(moments_ptr + offs + 2, mask, other=0.0)
    count = tl.where(mask, tl.minimum(P - offs_part * part_length, part_length)[:, None], 0).to(tl.float32)
    mean = tl.sum(count * part_mean, axis=0) / P
    off = tl.where(mask, (part_mean - mean[None, :]) + part_rest, 0.0)
    rest = tl.sum(count * off, axis=0) / P
    off -= rest[None, :]
    return mean, rest, tl.sum(part_m2 + GROUP_SIZE * count * off * off, axis=0)


@triton.jit
def reciprocal_deviation(m2, P, eps, GROUP_SIZE: tl.constexpr):
    # 1 / std of each group, [BLOCK_G]
    return 1.0 / tl.sqrt_rn(m2 / tl.cast(GROUP_SIZE * P, tl.float32) + eps)


@triton.jit
def affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, offs_c, mask_c):
    # gain and offset, [BLOCK_C]: z = xhat * gain + offset
    gain = tl.where(mask_c, 1.0, 0.0)
    offset = tl.zeros_like(gain)
    if weight_ptr is not None:
        gain = tl.load(weight_ptr + offs_c, mask_c, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        offset += tl.load(bias_ptr + offs_c, mask_c, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        scale = 1.0 + tl.load(scale_ptr + offs_c, mask_c, other=0.0).to(tl.float32)
        gain *= scale
        offset *= scale
    if shift_ptr is not None:
        offset += tl.load(shift_ptr + offs_c, mask_c, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit
def gradient_terms(
    x_ptr, dy_ptr, add_ptr, c, lane_c, lane_p, stride_xc, stride_xp, stride_yc, stride_yp, mask_c, mask_p,
    mean, rstd, gain, offset,  # [BLOCK_C]
    SILU: tl.constexpr,
):  # fmt: skip
    """xhat and g = dL/dz, [BLOCK_C, BLOCK_P]; g is zero where there is no element."""
    x = load_tile(x_ptr, add_ptr, c, lane_c, lane_p, stride_xc, stride_xp, mask_c, mask_p)
    offs = lane_c[:, None] * stride_yc + lane_p[None, :] * stride_yp
    g = tl.load(dy_ptr + offs, mask_c[:, None] & mask_p[None, :], other=0.0).to(tl.float32)
    xhat = (x - mean[:, None]) * rstd[:, None]
    if SILU:
        z = xhat * gain[:, None] + offset[:, None]
        sigmoid = 1.0 / (1.0 + tl.exp(-z))
        g *= sigmoid * (1.0 + z * (1.0 - sigmoid))
    return xhat, g


@triton.jit
def channel_sums(
    x_ptr, dy_ptr, add_ptr, c, lane_c, stride_xc, stride_xp, stride_yc, stride_yp, mask_c, length,
    mean, rstd, gain, offset, SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, EVEN_P: tl.constexpr,
):  # fmt: skip
    """Sums over the positions of g, g * xhat and xhat, [BLOCK_C] each."""
    lane_p = tl.arange(0, BLOCK_P)
    sum_g = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_gx = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_x = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for p in range(0, length, BLOCK_P):
        mask_p = lane_p < length - p
        xhat, g = gradient_terms(
            x_ptr, dy_ptr, add_ptr, c, lane_c, lane_p, stride_xc, stride_xp, stride_yc, stride_yp, mask_c, mask_p,
            mean, rstd, gain, offset, SILU,
        )  # fmt: skip
        sum_g += g
        sum_gx += g * xhat
        sum_x += xhat if EVEN_P else tl.where(mask_p[None, :], xhat, 0.0)
        x_ptr += BLOCK_P * stride_xp
        dy_ptr += BLOCK_P * stride_yp
    return tl.sum(sum_g, axis=1), tl.sum(sum_gx, axis=1), tl.sum(sum_x, axis=1)


@triton.jit
def write_dx(
    x_ptr, dy_ptr, dx_ptr, add_ptr, c, lane_c, stride_xc, stride_xp, stride_yc, stride_yp, mask_c, length,
    mean, rstd, gain, offset, mean_g, mean_gx,  # [BLOCK_C]
    SILU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (gain * g - mean_g - xhat * mean_gx); returns its sum over the positions, [BLOCK_C]."""
    lane_p = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for p in range(0, length, BLOCK_P):
        mask_p = lane_p < length - p
        xhat, g = gradient_terms(
            x_ptr, dy_ptr, add_ptr, c, lane_c, lane_p, stride_xc, stride_xp, stride_yc, stride_yp, mask_c, mask_p,
            mean, rstd, gain, offset, SILU,
        )  # fmt: skip
        dx = rstd[:, None] * (gain[:, None] * g - mean_g[:, None] - xhat * mean_gx[:, None])
        inside = mask_c[:, None] & mask_p[None, :]
        total += tl.where(inside, dx, 0.0)
        offs = lane_c[:, None] * stride_yc + lane_p[None, :] * stride_yp
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), inside)
        x_ptr += BLOCK_P * stride_xp
        dy_ptr += BLOCK_P * stride_yp
        dx_ptr += BLOCK_P * stride_yp
    return tl.sum(total, axis=1)


@triton.jit
def spread(member, groups):
    # [BLOCK_G] of the groups -> [BLOCK_C] of their channels; a mask, so that a NaN stays in its group
    return tl.sum(tl.where(member, groups[:, None], 0.0), axis=0)


@triton.jit
def gather(member, channels):
    # the sum over each group's channels: [BLOCK_C] -> [BLOCK_G]
    return tl.sum(tl.where(member, channels[None, :], 0.0), axis=1)


@triton.jit
def combine(
    sums_ptr, parts_ptr, stats_ptr, weight_ptr, bias_ptr, scale_ptr, shift_ptr, mean, rstd,
    offs_g, mask_g, channels, parts, C, P, NC,
    GROUP_SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The parts' sums to the channels' sums and each group's mean, 1 / std, mean_g and mean_gx."""
    lane_c, offs_part = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_PARTS)
    member = group_members(lane_c, channels, GROUP_SIZE, BLOCK_G)
    mean_g = tl.zeros([BLOCK_G], tl.float32)
    mean_gx = tl.zeros([BLOCK_G], tl.float32)
    inverse = 1.0 / tl.cast(GROUP_SIZE * P, tl.float32)
    for c in range(0, CHANNELS, BLOCK_C):
        mask_c = c + lane_c < channels
        gain, offset = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, c + lane_c, mask_c)
        mask = (offs_part < parts)[:, None] & mask_c[None, :]
        offs = offs_part[:, None] * C + (c + lane_c)[None, :]
        sum_g = tl.sum(tl.load(parts_ptr + offs, mask, other=0.0), axis=0)
        sum_gx = tl.sum(tl.load(parts_ptr + parts * NC + offs, mask, other=0.0), axis=0)
        tl.store(sums_ptr + c + lane_c, sum_g, mask_c)
        tl.store(sums_ptr + NC + c + lane_c, sum_gx, mask_c)
        mean_g += gather(member, gain * sum_g) * inverse
        mean_gx += gather(member, gain * sum_gx) * inverse
    for c in range(0, CHANNELS, BLOCK_C):
        mask_c = c + lane_c < channels
        gain, offset = affine(weight_ptr, bias_ptr, scale_ptr, shift_ptr, c + lane_c, mask_c)
        mask = (offs_part < parts)[:, None] & mask_c[None, :]
        offs = offs_part[:, None] * C + (c + lane_c)[None, :]
        sum_g = tl.sum(tl.load(parts_ptr + offs, mask, other=0.0), axis=0)
        sum_x = tl.sum(tl.load(parts_ptr + 2 * parts * NC + offs, mask, other=0.0), axis=0)
        sum_dx = spread(member, rstd) * (
            gain * sum_g - P * spread(member, mean_g) - sum_x * spread(member, mean_gx)
        )
        tl.store(sums_ptr + 2 * NC + c + lane_c, sum_dx, mask_c)
    tl.store(stats_ptr + offs_g * 4, mean, mask_g)
    tl.store(stats_ptr + offs_g * 4 + 1, rstd, mask_g)
    tl.store(stats_ptr + offs_g * 4 + 2, mean_g, mask_g)
    tl.store(stats_ptr + offs_g * 4 + 3, mean_gx, mask_g)
