"""A denoiser that begins with the weights of a finished one."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ldmfast.shipped import locate


def begin_with(unet: nn.Module, model: str | Path) -> list[str]:
    """Give `unet` the weights of a finished pipeline's U-Net that it has under the same name and in the same shape.

    A latent of more channels is met: conv_in does not look at those behind the finished one's yet, conv_out keeps its
    random weights for them.
    model  a folder or a shipped model's name
    Returns the names that keep their random first weights. Raises ValueError if nothing agrees.
    """
    found = type(unet).from_pretrained(locate(model), subfolder="unet").state_dict()
    own = unet.state_dict()
    _more_channels(found, own)
    same = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    if not same:
        raise ValueError(f"first_weights={model}: none of its {len(found)} weights has a name and shape of this U-Net")
    unet.load_state_dict(same, strict=False)
    return sorted(set(own) - set(same))


def _more_channels(found, own):
    """Bring the outermost layers in `found` to the channels that those in `own` have more."""
    for name, dim in (("conv_in.weight", 1), ("conv_out.weight", 0), ("conv_out.bias", 0)):
        value, wanted = found[name], own[name]
        had, here = value.shape[dim], wanted.shape[dim]
        if had < here and value.movedim(dim, 0).shape[1:] == wanted.movedim(dim, 0).shape[1:]:
            rest = wanted.narrow(dim, had, here - had)
            found[name] = torch.cat([value, torch.zeros_like(rest) if dim else rest], dim=dim)
