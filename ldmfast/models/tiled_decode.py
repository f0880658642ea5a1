"""The decoder in strips of rows: the whole picture's answer with a part of its memory.

Of each level only what a block takes and what it leaves is held whole; the enlarged picture between two levels and
everything inside a block exist for a strip at a time, with the rows around it that its convolutions reach. A strip has
no edge of its own: GroupNorm takes its statistics over the whole picture, merged from the strips', so nothing is
blended and no seam can be. The price: the first convolution of each block is computed twice, since the second norm
must have seen all of it, and an enlargement three times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from diffusers.models.autoencoders.vae import Decoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ldmfast import ops
from ldmfast.models.blocks import BlockInputs, mid_block
from ldmfast.models.guard import obstacle
from ldmfast.models.layers import conv2d
from ldmfast.ops.planning.memory import give_back_freed

# Rows on either side of a strip. A convolution reaches one; with four, and strips of a multiple of four, Winograd's
# tiles lie as they do in the whole picture, and so do their roundings. A norm's sums are made over so many pixels.
REACH, CHUNK = 4, 128

Table = tuple[torch.Tensor, torch.Tensor]  # norm_scale and norm_shift, [N, C] each


class Picture:
    """A picture [N, C, H, W] of which rows can be had; held whole here."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.height = x, x.shape[2]

    def rows(self, first: int, end: int) -> torch.Tensor:
        """Rows [first, end), [N, C, end - first, W]; those outside of the picture are left out."""
        return self.x[:, :, max(0, first) : min(end, self.height)]


class Enlarged(Picture):
    """A picture at twice its size, convolved: its rows are computed when they are asked for."""

    def __init__(self, m: Upsample2D, x: torch.Tensor) -> None:
        super().__init__(x)
        self.m, self.height = m, 2 * x.shape[2]

    def rows(self, first: int, end: int) -> torch.Tensor:
        first, end = max(0, first), min(end, self.height)
        low, high = max(0, first // 2 - REACH // 2), min(self.x.shape[2], end // 2 + REACH // 2)
        y = conv2d(self.m.conv, self.x[:, :, low:high], upsample=2)
        return y[:, :, first - 2 * low : end - 2 * low]


def decode_in_strips(m: Decoder, z: torch.Tensor, tile: int) -> torch.Tensor:
    """Latents [N, c, h, w] to pictures [N, 3, f h, f w], `tile` rows of latents at a time. No gradient.

    Raises ValueError naming a part of the decoder that something is attached to, which strips cannot call.
    """
    _require_plain(m)
    step = max(REACH, CHUNK // math.gcd(CHUNK, z.shape[3]))
    strip = -(-tile // step) * step
    x = mid_block(m.mid_block, conv2d(m.conv_in, z), BlockInputs())
    picture = Picture(x)
    for block in m.up_blocks:
        if x.device.type == "cpu":
            give_back_freed()  # what malloc keeps of the level before would be the larger part
        for layer in block.resnets:
            picture = Picture(_resnet(layer, picture, strip))
        for layer in block.upsamplers or ():
            picture, strip = Enlarged(layer, picture.x), 2 * strip
    table = _table(m.conv_norm_out, picture, picture.rows, strip)
    parts = [conv2d(m.conv_out, slab, table=table, silu=True)[:, :, cut] for slab, cut in _slabs(picture, strip)]
    return torch.cat(parts, dim=2)


def _require_plain(m: Decoder) -> None:
    for name, part in m.named_modules():
        kinds = (nn.GroupNorm, nn.Conv2d, nn.SiLU, ResnetBlock2D, Upsample2D)
        if isinstance(part, kinds) and (reason := obstacle(part)) is not None:
            raise ValueError(f"tile: the decoder's {name} cannot be run in strips, because {reason}")


def _strips(height: int, strip: int) -> Iterator[tuple[int, int]]:
    for first in range(0, height, strip):
        yield first, min(height, first + strip)


def _slabs(picture: Picture, strip: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """(rows of each strip with REACH more on either side, where the strip lies in them)"""
    for first, end in _strips(picture.height, strip):
        above = min(REACH, first)
        yield picture.rows(first - REACH, end + REACH), slice(above, above + end - first)


def _resnet(m: ResnetBlock2D, picture: Picture, strip: int) -> torch.Tensor:
    """As blocks.resnet, without a time: GroupNorm, SiLU, conv, twice; plus the input."""
    first = _table(m.norm1, picture, picture.rows, strip)

    def hidden(start: int, end: int) -> torch.Tensor:
        """Rows of what the first convolution leaves."""
        start, end = max(0, start), min(end, picture.height)
        above = min(REACH, start)
        y = conv2d(m.conv1, picture.rows(start - REACH, end + REACH), table=first, silu=True)
        return y[:, :, above : above + end - start]

    second = _table(m.norm2, picture, hidden, strip)
    around, out = {"table": second, "silu": True, "output_scale": 1 / m.output_scale_factor}, None
    for start, end in _strips(picture.height, strip):
        x = picture.rows(start - REACH, end + REACH)
        x = x if m.conv_shortcut is None else conv2d(m.conv_shortcut, x)
        y = conv2d(m.conv2, hidden(start - REACH, end + REACH), residual=x, **around)
        if out is None:
            size = (*y.shape[:2], picture.height, y.shape[3])
            out = torch.empty(size, dtype=y.dtype, device=y.device, memory_format=torch.channels_last)
        above = min(REACH, start)
        out[:, :, start:end] = y[:, :, above : above + end - start]
    return out


def _table(m: nn.GroupNorm, picture: Picture, rows: Callable[[int, int], torch.Tensor], strip: int) -> Table:
    """The norm of a whole picture from its strips' moments. Source: Chan, Golub & LeVeque 1983."""
    count = mean = squares = 0.0
    for first, end in _strips(picture.height, strip):
        x = rows(first, end)
        here, variance = ops.group_norm_affine(x, None, None, m.num_groups, m.eps)[2].unbind(2)  # [N, groups] each
        n = x[0].numel() // m.num_groups
        total, delta = count + n, here - mean
        squares = squares + n * variance + delta**2 * (count * n / total)
        mean, count = mean + delta * (n / total), total
    rstd = (squares / count + m.eps) ** -0.5
    mean, rstd = (t.repeat_interleave(m.num_channels // m.num_groups, 1) for t in (mean, rstd))  # [N, C] each
    factor = rstd if m.weight is None else rstd * m.weight.double()
    shift = -mean * factor if m.bias is None else m.bias.double() - mean * factor
    return factor.float(), shift.float()
