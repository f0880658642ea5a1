"""Semantic maps and pictures, joined to the latent along its channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.classes_and_boxes import ClassNames
from ldmfast.conditioning.condition import Condition
from ldmfast.models.encode_decode import encode_pictures

if TYPE_CHECKING:
    from PIL import Image


class SpatialRescaler(nn.Module):
    """n_stages halvings, then a 1x1 convolution.   [N, in, H, W] -> [N, out, H / 2**n_stages, W / 2**n_stages]

    Source: Rombach et al. 2022, the released semantic synthesis model (bilinear, no bias).
    """

    def __init__(self, n_stages: int, in_channels: int, out_channels: int, *, bias: bool = False) -> None:
        super().__init__()
        self.n_stages = n_stages
        self.channel_mapper = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.n_stages):
            x = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
        return self.channel_mapper(x)


class MapEncoder(Conditioner):
    """A semantic map as one-hot classes, rescaled to the latent's size and a few channels.

    An input is an integer tensor [H, W] of class indices, or a PIL picture in the palette's colours (the nearest colour
    counts). The empty map is all zeros: no pixel has a class.

    classes  a count, or the names         stages  halvings; 2 for an autoencoder with f = 4
    width    channels after rescaling      palette  [[r, g, b], ...] of 0..255, one a class, for pictures
    """

    option = "map"
    mode = "concat"
    trainable = True

    def __init__(
        self,
        classes: int | Sequence[str],
        width: int = 8,
        *,
        stages: int = 2,
        palette: Sequence[Sequence[int]] | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(classes=classes, width=width, stages=stages, palette=palette, bias=bias)
        self.classes, self.stages = ClassNames(classes, "MapEncoder"), stages
        if palette is not None and len(palette) != self.classes.count:
            raise ValueError(f"MapEncoder: {len(palette)} palette colours for {self.classes.count} classes")
        self.palette = None if palette is None else torch.tensor(palette, dtype=torch.float32)
        self.rescaler = SpatialRescaler(stages, self.classes.count, width, bias=bias)

    def forward(self, inputs: list) -> Condition:
        maps = [self.indices(value) for value in inputs]
        if len({m.shape for m in maps}) > 1:
            raise ValueError(f"MapEncoder: maps of different sizes: {sorted({tuple(m.shape) for m in maps})}")
        stacked = torch.stack(maps).to(self.device)
        weight = self.rescaler.channel_mapper.weight
        one_hot = F.one_hot(stacked, self.classes.count).permute(0, 3, 1, 2).to(weight.dtype)
        return Condition(concat=self.rescaler(one_hot))

    def empty(self, n: int) -> Condition:
        blank = torch.zeros(n, self.classes.count, 1, 1, device=self.device)
        return Condition(concat=self.rescaler.channel_mapper(blank))

    def indices(self, value: torch.Tensor | Image.Image) -> torch.Tensor:
        """One input as int64 [H, W]. Raises ValueError for anything else, and for sides that cannot be halved."""
        if hasattr(value, "convert"):
            value = self._from_picture(value)
        if not isinstance(value, torch.Tensor) or value.ndim != 2 or value.is_floating_point():
            what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else f"{value!r:.80}"
            raise ValueError(f"MapEncoder: a map is an integer tensor [H, W] or a picture; got {what}")
        if any(side % 2**self.stages or not side for side in value.shape):
            raise ValueError(f"MapEncoder: the map's sides {tuple(value.shape)} must divide by {2**self.stages}")
        if value.min() < 0 or value.max() >= self.classes.count:
            raise ValueError(
                f"MapEncoder: classes run from 0 to {self.classes.count - 1}; the map holds {int(value.min())} to "
                f"{int(value.max())}"
            )
        return value.long()

    def _from_picture(self, picture):
        import numpy as np

        from ldmfast.pictures import rgb

        if self.palette is None:
            raise ValueError("MapEncoder: this model has no palette; give the map as an integer tensor [H, W]")
        pixels = torch.from_numpy(np.array(rgb(picture, "the map"))).float()  # [H, W, 3]
        return torch.cdist(pixels.flatten(0, 1), self.palette).argmin(dim=1).view(pixels.shape[:2])


class PictureConditioner(Conditioner):
    """Base of those that are conditioned on a picture [3, H, W] in [-1, 1].

    The autoencoder that encodes it (`bind`) is not theirs to save.
    """

    mode = "concat"
    takes_inputs = False

    def __init__(self, channels: int, **settings: Any) -> None:
        super().__init__(channels=channels, **settings)
        self.channels = channels
        self._vae = []  # in a list, so that it is no submodule: the pipeline moves and saves it

    def bind(self, vae: nn.Module) -> PictureConditioner:
        self._vae[:] = [vae]
        return self

    def with_pictures(self, inputs: list, images: torch.Tensor, masks: torch.Tensor | None) -> list:
        return list(images)

    @torch.no_grad()
    def encode(self, pictures: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] -> the autoencoder's latents [N, z, h, w]. Raises RuntimeError before `bind`."""
        if not self._vae:
            raise RuntimeError(f"{type(self).__name__}: no autoencoder; call bind(vae) before encoding pictures")
        (vae,) = self._vae
        return encode_pictures(vae, pictures.to(vae.device, vae.dtype))

    def empty(self, n: int) -> Condition:
        return Condition(concat=torch.zeros(n, self.channels, 1, 1))

    def pictures(self, values: list) -> torch.Tensor:
        """Check and stack N pictures [3, H, W]. Raises ValueError for another shape, dtype or range."""
        owner = type(self).__name__
        for value in values:
            if (
                not isinstance(value, torch.Tensor)
                or value.ndim != 3
                or len(value) != 3
                or not value.dtype.is_floating_point
            ):
                what = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else f"{value!r:.80}"
                raise ValueError(f"{owner}: a picture is a float tensor [3, H, W] in [-1, 1]; got {what}")
            if value.numel() and value.abs().max() > 1.001:
                raise ValueError(f"{owner}: a picture lies in [-1, 1]; got values up to {float(value.abs().max()):.4g}")
        if len({v.shape for v in values}) > 1:
            raise ValueError(f"{owner}: pictures of different sizes: {sorted({tuple(v.shape) for v in values})}")
        return torch.stack(list(values))


class MaskedImage(PictureConditioner):
    """Inpainting: the latent of the picture without what is to be painted, and the mask.

    An input is {"image": [3, H, W] in [-1, 1], "mask": [1, H, W], 1 where to paint}.   channels  z + 1
    style  "ldm": (latent, mask), the masked part is -1 (black), the mask is -1 and 1, as inpainting_big was trained
           "sd": (mask, latent), the masked part is 0 (grey), the mask is 0 and 1, as Stable Diffusion's were
    """

    takes_pictures = ("image", "mask")

    def __init__(self, channels: int = 4, *, style: str = "ldm") -> None:
        if style not in ("ldm", "sd"):
            raise ValueError(f"MaskedImage: style={style!r} is neither ldm nor sd")
        super().__init__(channels, style=style)
        self.style = style

    def with_pictures(self, inputs: list, images: torch.Tensor, masks: torch.Tensor) -> list:
        return [{"image": image, "mask": mask} for image, mask in zip(images, masks, strict=True)]

    def forward(self, inputs: list) -> Condition:
        for value in inputs:
            if not isinstance(value, dict) or set(value) != {"image", "mask"}:
                raise ValueError(f"MaskedImage: an input is a dict with image and mask; got {value!r:.80}")
        images = self.pictures([value["image"] for value in inputs])
        for value, image in zip(inputs, images, strict=True):
            mask = value["mask"]
            if not isinstance(mask, torch.Tensor) or mask.shape != (1, *image.shape[1:]):
                wanted = [1, *image.shape[1:]]
                raise ValueError(
                    f"MaskedImage: mask must be a tensor {wanted}; got {getattr(mask, 'shape', mask)!r:.80}"
                )
        mask = torch.stack([(value["mask"] > 0.5).to(images.dtype) for value in inputs])
        released = self.style == "ldm"
        z = self.encode(images * (1 - mask) - mask if released else images * (1 - mask))
        small = F.interpolate(mask.to(z), size=z.shape[2:], mode="nearest")
        return Condition(concat=torch.cat([z, 2 * small - 1] if released else [small, z], dim=1))


class LowResolution(PictureConditioner):
    """Super-resolution: the small picture itself beside a latent of its size, or its latent.

    An input is a picture [3, h, w] in [-1, 1].   encoded  whether the autoencoder encodes it (then [3, H, W], enlarged)
    channels  3, or z where it is encoded.   The released bsr_sr takes the picture itself.
    """

    takes_pictures = ("image",)

    def __init__(self, channels: int = 3, *, encoded: bool = False) -> None:
        super().__init__(channels, encoded=encoded)
        self.encoded = encoded

    @property
    def enlarges(self) -> bool:
        return not self.encoded

    def forward(self, inputs: list) -> Condition:
        images = self.pictures(inputs)
        return Condition(concat=self.encode(images) if self.encoded else images)
