"""The patch discriminators of stage 1: hinge losses, a delayed start, and the adaptive weight.

Source: Isola et al. 2017 (the network), Miyato et al. 2018 (spectral norm), Sauer et al. 2021 (features), Esser et al.
2021, equation 7 (the weight), Rombach et al. 2022, appendix G.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm


class Discriminator(nn.Sequential):
    """Pictures [N, 3, H, W] to one logit a patch [N, 1, h, w]: convolutions of 4x4, normalised, and leaky ReLU.

    channels  width after the first convolution; it doubles with each layer, to 8 times that at most
    layers    convolutions of stride 2
    norm      "batch": batch norm after all but the first and the last, as released with LDM. It takes pictures and
              reconstructions in batches of their own, so what a blur does to the strength of a feature is divided out.
              "spectral": every convolution's weight is divided by its largest singular value instead
    """

    def __init__(self, channels: int = 64, layers: int = 3, norm: str = "batch"):
        batch, widths = norm == "batch", [channels * min(2**i, 8) for i in range(layers + 1)]
        parts = [nn.Conv2d(3, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            parts.append(nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=not batch))
            parts += [nn.BatchNorm2d(widths[i])] if batch else []
            parts.append(nn.LeakyReLU(0.2))
        super().__init__(*parts, nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.apply(_initialise)
        if not batch:
            for part in self:
                if isinstance(part, nn.Conv2d):
                    spectral_norm(part)

    def smallest(self) -> int:
        """The least side of a picture that leaves a logit."""
        strides = [part.stride[0] for part in self if isinstance(part, nn.Conv2d)]
        return 3 * 2 ** strides.count(2)


class FeatureDiscriminator(nn.Module):
    """Pictures [N, 3, H, W] to logits [N, maps, h, w]: a small head on each of a frozen network's feature maps.

    It starts from features in which pictures already differ, so that its verdict on a patch is of use after hundreds
    of steps.   Source: Sauer et al. 2021, section 3, without its random mixing of the maps.

    backbone  of metrics/backbones.py; neither trained nor saved with the heads
    channels  width of a head
    maps      of backbone.stages, from the finest on
    """

    def __init__(self, backbone: nn.Module, channels: int = 64, maps: int = 3):
        super().__init__()
        self.__dict__["backbone"] = backbone  # not a submodule
        with torch.no_grad():
            widths = [x.shape[1] for x in backbone.stages(torch.zeros(1, 3, 32, 32))]
        if maps > len(widths):
            raise ValueError(f"discriminator_layers={maps}: {backbone.name} has {len(widths)} feature maps")
        self.heads = nn.ModuleList(_head(width, channels) for width in widths[:maps])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.backbone.to(x.device).stages(x)
        logits = [head(a) for head, a in zip(self.heads, maps, strict=False)]
        return torch.cat([F.interpolate(a, logits[0].shape[2:]) for a in logits], dim=1)  # all maps count alike


def _head(width: int, channels: int) -> nn.Sequential:
    first, last = nn.Conv2d(width, channels, 3, padding=1), nn.Conv2d(channels, 1, 1)
    return nn.Sequential(spectral_norm(first), nn.LeakyReLU(0.2), spectral_norm(last))


def _initialise(m: nn.Module) -> None:
    if isinstance(m, nn.Conv2d):
        nn.init.normal_(m.weight, 0.0, 0.02)
    elif isinstance(m, nn.BatchNorm2d):
        nn.init.normal_(m.weight, 1.0, 0.02)


def hinge(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss: (mean relu(1 - D(x)) + mean relu(1 + D(y))) / 2, a scalar."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def adaptive_weight(nll: torch.Tensor, g: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """clamp(|d nll| / (|d g| + 1e-4), 0, 1e4), gradients at `last`, the decoder's last weight. A constant scalar."""
    of_nll, of_g = (torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (nll, g))
    return (of_nll / (of_g + 1e-4)).clamp(0, 1e4).detach()


def generator_loss(discriminator: nn.Module, decoded: torch.Tensor) -> torch.Tensor:
    """The term of the autoencoder's loss: -mean D(y), a scalar."""
    return -discriminator(decoded).float().mean()


def discriminator_loss(discriminator: nn.Module, pictures: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
    """`hinge` of pictures and their reconstructions [N, 3, H, W]; no gradient goes to the latter."""
    return hinge(discriminator(pictures), discriminator(decoded.detach()))
