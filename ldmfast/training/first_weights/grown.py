"""First weights of an autoencoder for pictures of twice the side of a finished one's, under the same latents.

The encoder halves the picture and goes on as the finished one; the decoder goes through the finished one's layers and
enlarges what it drew. So a denoiser of the finished one's latents stays valid, and what is left to learn is the detail
of the larger picture. Latents may get more channels, behind the finished one's.
Source: the growth of Karras et al. 2018, section 2, of an autoencoder and at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

SHIFTS = 27  # channels of the first convolution that hold the picture, shifted by -1, 0 or 1 in y and in x: 3 x 3 x 3
# how tap -1..3 of 5 is reached: (tap of the strided convolution, shift); the last reach past its picture as zeros
TAPS = ((0, 0), (0, 1), (1, 1), (1, 2), (2, 2))
LOG_VARIANCE = -6.0  # of what is new in the latent
ROWS = 1 << 16  # places that the first layers are fitted on, at most


@torch.no_grad()
def begin(model: nn.Module, finished: nn.Module, pictures: torch.Tensor) -> None:
    """Give an AutoencoderKL (training/train_autoencoder.build) those weights.

    finished  AutoencoderKL whose channels are `model`'s but the first; `model` may have more blocks at each resolution,
              and more channels of the latent: those begin at deviation 1, and the decoder does not look at them yet
    pictures  float [N, 3, H, W] in [-1, 1], N a few hundred, that the halving is fitted on
    Raises ValueError where the two do not go together.
    """
    _check(model, finished)
    for name, module in model.named_modules():
        if name.endswith("conv2"):  # a block that nothing is copied to passes its input on
            module.weight.zero_()
            module.bias.zero_()
    own = model.state_dict()
    copied = {_place_of(name): value for name, value in finished.state_dict().items()}
    copied = {name: value for name, value in copied.items() if not name.startswith("encoder.conv_in.")}
    wrong = [n for n in copied if n not in own or not _is_of_latents(n) and own[n].shape != copied[n].shape]
    if wrong:
        raise ValueError(f"start=grown: {wrong[0]} of the finished autoencoder has no such place in this one")
    model.load_state_dict({n: v for n, v in copied.items() if not _is_of_latents(n)}, strict=False)
    _copy_latent_layers(model, finished)
    _fit_halving(model.encoder, finished.encoder.conv_in, pictures)
    enlarge = model.decoder.up_blocks[-2].upsamplers[0].conv  # after a nearest-neighbour enlargement
    nn.init.dirac_(enlarge.weight)
    enlarge.bias.zero_()
    _level(model, finished.config.latent_channels, pictures)


def _check(model, finished):
    for name in ("norm_num_groups", "scaling_factor"):
        ours, theirs = model.config[name], finished.config[name]
        if ours != theirs:
            raise ValueError(f"start=grown: {name} is {ours}, the finished autoencoder's {theirs}")
    ours, theirs = (each.config.latent_channels for each in (model, finished))
    if ours < theirs:
        raise ValueError(f"start=grown: latent_channels={ours} must be at least the finished autoencoder's {theirs}")
    ours, theirs = (tuple(each.config.block_out_channels) for each in (model, finished))
    if ours != (theirs[0], *theirs):
        raise ValueError(f"start=grown: channels={ours} of one that grows from {theirs} must be {(theirs[0], *theirs)}")
    if ours[0] < SHIFTS:
        raise ValueError(f"start=grown: channels={ours}: the first must be {SHIFTS} or more")


def _place_of(name):
    """The encoder has a new level in front, the decoder one behind."""
    head = "encoder.down_blocks."
    if not name.startswith(head):
        return name
    number, rest = name.removeprefix(head).split(".", 1)
    return f"{head}{int(number) + 1}.{rest}"


def _is_of_latents(name):
    return name.startswith(("encoder.conv_out.", "quant_conv.", "post_quant_conv.", "decoder.conv_in."))


def _copy_latent_layers(model, finished):
    """The layers whose channels are those of the latent; the encoder's give means, then log variances."""
    z, new = finished.config.latent_channels, model.config.latent_channels
    both = [*range(z), *range(new, new + z)]
    rest = [i for i in range(2 * new) if i not in both]
    out, theirs = model.encoder.conv_out, finished.encoder.conv_out
    out.weight[both], out.bias[both] = theirs.weight, theirs.bias
    out.weight[new + z :], out.bias[rest] = 0, 0
    quant = torch.eye(2 * new)[..., None, None]
    quant[[[i] for i in both], both] = finished.quant_conv.weight
    model.quant_conv.weight.copy_(quant)
    model.quant_conv.bias[both] = finished.quant_conv.bias
    model.quant_conv.bias[rest] = torch.tensor([0.0] * (new - z) + [LOG_VARIANCE] * (new - z))
    post = torch.eye(new)[..., None, None]
    post[:z, :z] = finished.post_quant_conv.weight
    model.post_quant_conv.weight.copy_(post)
    model.post_quant_conv.bias.zero_()
    model.post_quant_conv.bias[:z] = finished.post_quant_conv.bias
    inner = model.decoder.conv_in
    inner.weight.zero_()
    inner.weight[:, :z] = finished.decoder.conv_in.weight
    inner.bias.copy_(finished.decoder.conv_in.bias)


def _level(model, z, pictures):
    """Bring the channels behind the first z to mean 0 and deviation 1."""
    new = model.config.latent_channels
    if new > z:
        means = model.encode(pictures).latent_dist.mean
        mean, std = means.mean(dim=(0, 2, 3))[z:], means.std(dim=(0, 2, 3))[z:]
        model.quant_conv.weight[z:new] /= std.view(-1, 1, 1, 1)
        model.quant_conv.bias[z:new] = -mean / std


def _fit_halving(encoder, first, pictures):
    """Make conv_in and the first downsampling give what `first` makes of the halved pictures, by least squares.

    Together they see 5 x 5 pixels; what they imitate sees 6 x 6, of which it weighs each 2 x 2 alike.
    """
    wanted = F.conv2d(F.avg_pool2d(pictures, 2), first.weight, first.bias, padding=1)
    seen = F.unfold(F.pad(pictures, (1, 2, 1, 2)), 5, stride=2)  # [N, 75, places]
    rows = seen.transpose(1, 2).reshape(-1, seen.shape[1])
    some = torch.linspace(0, len(rows) - 1, min(len(rows), ROWS)).long()
    rows, targets = rows[some].double(), wanted.flatten(2).transpose(1, 2).reshape(-1, wanted.shape[1])[some].double()
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    ridge = 1e-4 * len(rows) * torch.eye(rows.shape[1], dtype=torch.float64)  # flat grounds leave much undetermined
    found = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ targets).float()
    weight, bias = found[:-1].T.view(-1, 3, 5, 5), found[-1]
    shifts, halving = encoder.conv_in, encoder.down_blocks[0].downsamplers[0].conv
    for conv in (shifts, halving):
        conv.weight.zero_()
        conv.bias.zero_()
    for channel in range(SHIFTS):
        colour, y, x = channel // 9, channel // 3 % 3, channel % 3
        shifts.weight[channel, colour, y, x] = 1
    for i, (tap_y, y) in enumerate(TAPS):
        for j, (tap_x, x) in enumerate(TAPS):
            for colour in range(3):
                halving.weight[: len(weight), colour * 9 + y * 3 + x, tap_y, tap_x] = weight[:, colour, i, j]
    halving.bias[: len(bias)] = bias
