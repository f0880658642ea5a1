"""First weights with which an autoencoder is a linear one: principal components of patches, and their mean colour.

A deep autoencoder with torch's first weights takes thousands of steps to reach what a linear one does at once, above
all because its GroupNorms divide out how bright a picture is. Here each residual branch begins at 0, so that the rest
is linear: the encoder's strided convolutions bring f x f patches to their principal components, level by level, and the
decoder draws each patch in its mean colour. The last norm of either half sees every channel beside its negative, and
two constants, so that it takes away no mean and divides by nearly the same number everywhere; SiLU is nearly a straight
line where its input is shifted far to the right.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CONSTANT = 8.0  # of the two constant channels: larger than what stands beside them
SHIFT = 4.0  # where SiLU is nearly straight
PATCHES = 1 << 16  # that components are estimated from, at most
LOG_VARIANCE = -6.0  # of the posterior: no noise drowns the first steps


@torch.no_grad()
def begin(model: nn.Module, pictures: torch.Tensor) -> None:
    """Give an AutoencoderKL (training/train_autoencoder.build) those weights.

    pictures  float [N, 3, H, W] in [-1, 1] that the components are of, N a few hundred
    Raises ValueError where the channels of the deepest level are too few for the latent's.
    """
    z, groups = model.config.latent_channels, model.config.norm_num_groups
    deepest, outermost = model.config.block_out_channels[-1], model.config.block_out_channels[0]
    for channels, count, half in ((deepest, z, "encoder"), (outermost, 3, "decoder")):
        if count > groups * ((channels // groups - 2) // 2):
            raise ValueError(
                f"start=linear: {channels} channels in groups={groups} are too few for {count} of the {half}, each "
                "beside its negative, and two constants a group"
            )
    _silence(model)
    codes = _encoder(model.encoder, pictures, z)
    model.quant_conv.weight.zero_()
    model.quant_conv.bias.zero_()
    model.quant_conv.weight[:z, :z, 0, 0] = torch.eye(z)
    model.quant_conv.bias[z:] = LOG_VARIANCE
    model.post_quant_conv.weight.copy_(torch.eye(z)[..., None, None])
    model.post_quant_conv.bias.zero_()
    side = 2 ** (len(model.config.block_out_channels) - 1)
    _decoder(model.decoder, codes, F.avg_pool2d(pictures, side))


def _silence(model):
    """Residual branches and the attention end in zeros."""
    for name, module in model.named_modules():
        if name.endswith(("conv2", "to_out.0")):
            module.weight.zero_()
            module.bias.zero_()


def _encoder(encoder, x, z):
    """Set its weights; returns the codes of x, [N, z, h, w] of unit deviation."""
    taken, last = 3, encoder.conv_in
    _set(encoder.conv_in, torch.eye(3))
    for number, block in enumerate(encoder.down_blocks):
        for resnet in block.resnets:
            if resnet.conv_shortcut is not None:
                last = resnet.conv_shortcut
                _set(last, torch.eye(taken))
        if block.downsamplers is not None:
            deepest, last = number == len(encoder.down_blocks) - 2, block.downsamplers[0].conv
            kept = z if deepest else min(4 * taken, last.out_channels)
            x, weight, bias = _halved(x, kept, whiten=deepest)
            _set(last, torch.zeros(1, 1))
            last.weight[:kept, :taken, :2, :2] = weight  # the padding is on the right and below
            last.bias[:kept] = bias
            taken = kept
    _straight(encoder.conv_norm_out, encoder.conv_out, _pair(last, z, encoder.conv_norm_out))
    return x


def _halved(x, kept, whiten):
    """(x [N, kept, h / 2, w / 2]: the components of its 2x2 blocks, their weight [kept, c, 2, 2], bias [kept])."""
    blocks = F.unfold(x, 2, stride=2)  # [N, 4 c, places]
    rows = blocks.transpose(1, 2).reshape(-1, blocks.shape[1]).double()
    some = rows[torch.linspace(0, len(rows) - 1, min(len(rows), PATCHES)).long()]
    mean = some.mean(dim=0)
    values, vectors = torch.linalg.eigh((some - mean).T @ (some - mean) / len(some))
    basis = vectors[:, -kept:].T.flip(0)  # the largest first
    if whiten:
        basis = basis / values[-kept:].flip(0).clamp_min(1e-8).sqrt()[:, None]
    bias = -(basis @ mean) if whiten else torch.zeros(kept, dtype=torch.float64)
    weight = basis.float().view(kept, x.shape[1], 2, 2)
    return F.conv2d(x, weight, bias.float(), stride=2), weight, bias.float()


def _decoder(decoder, codes, colours):
    """Set its weights: every place in the colour that its code says, as least squares find it."""
    rows = codes.permute(0, 2, 3, 1).reshape(-1, codes.shape[1]).double()
    wanted = colours.permute(0, 2, 3, 1).reshape(-1, 3).double()
    found = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1), wanted).solution
    matrix, offset = found[:-1].T.float(), found[-1].float()  # [3, z], [3]
    z = codes.shape[1]
    _set(decoder.conv_in, torch.cat([matrix, torch.eye(z)]))  # the colour, and the code for whoever learns from it
    decoder.conv_in.bias[:3] = offset
    last = decoder.conv_in
    for block in decoder.up_blocks:
        shortcuts = [resnet.conv_shortcut for resnet in block.resnets if resnet.conv_shortcut is not None]
        for last in [*shortcuts, *(each.conv for each in block.upsamplers or ())]:
            _set(last, torch.eye(min(3 + z, last.out_channels)))
    _straight(decoder.conv_norm_out, decoder.conv_out, _pair(last, 3, decoder.conv_norm_out))


def _set(conv, matrix):
    """`matrix` [out, in] at the middle tap of a convolution, 0 elsewhere."""
    conv.weight.zero_()
    conv.bias.zero_()
    middle = conv.kernel_size[0] // 2
    conv.weight[: matrix.shape[0], : matrix.shape[1], middle, middle] = matrix


def _pair(conv, count, norm):
    """Make the last convolution before a norm write its first `count` outputs, their negatives, and two constants in
    each group that has some of them.

    Returns the channels of the outputs and those of their negatives; a pair is always in one group.
    """
    each = norm.num_channels // norm.num_groups
    pairs = (each - 2) // 2
    plus = [i // pairs * each + i % pairs for i in range(count)]
    minus = [place + pairs for place in plus]
    up = [place // each * each + each - 2 for place in plus]
    weight, bias = conv.weight[:count].clone(), conv.bias[:count].clone()
    _set(conv, torch.zeros(1, 1))
    conv.weight[plus], conv.bias[plus] = weight, bias
    conv.weight[minus], conv.bias[minus] = -weight, -bias
    conv.bias[up], conv.bias[[place + 1 for place in up]] = CONSTANT, -CONSTANT
    return plus, minus


def _straight(norm, conv, places):
    """Make norm, SiLU and conv give the values that stand at `places`, as `_pair` returns them: nearly."""
    plus, minus = places
    each = norm.num_channels // norm.num_groups
    deviation = (2 * CONSTANT**2 / each) ** 0.5  # of a group, were the values 0
    norm.weight.fill_(1.0)
    norm.bias.fill_(SHIFT)
    at = torch.tensor(SHIFT, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(F.silu(at), at)
    scale = deviation / (2 * slope.item()) * torch.eye(len(plus))
    _set(conv, torch.zeros(1, 1))
    middle = conv.kernel_size[0] // 2
    conv.weight[: len(plus), plus, middle, middle] = scale
    conv.weight[: len(plus), minus, middle, middle] = -scale
