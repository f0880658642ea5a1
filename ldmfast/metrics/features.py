"""One vector a picture, for KID, precision, recall and retrieval: `features(pictures)`, named `NAME`."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from ldmfast.metrics.backbones import efficientnet_lite0

NAME = "efficientnet-lite0"
SIDE = 224  # what the network was trained at


@torch.no_grad()
def features(pictures: torch.Tensor, *, batch: int = 32, side: int = SIDE) -> torch.Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] -> EfficientNet-Lite0's pooled features, float32 [N, 1280].

    They are resized to `side` pixels. These are not Inception's features: a distance over them is not FID.
    Raises ModuleNotFoundError naming the package that holds the weights.
    """
    network = _network().to(pictures.device)
    found = [network.pooled(_resized(part, side)) for part in pictures.float().split(batch)]
    return torch.cat(found) if found else pictures.new_zeros(0, network.head.out_channels)


@functools.cache
def _network():
    return efficientnet_lite0()


def _resized(x: torch.Tensor, side: int) -> torch.Tensor:
    if x.shape[2:] == (side, side):
        return x
    return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
