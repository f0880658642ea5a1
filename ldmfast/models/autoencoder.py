"""`AutoencoderKL`: diffusers' AutoencoderKL with encoder and decoder over `ldmfast.ops`.

vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse")
pipe.vae = AutoencoderKL.adopt(pipe.vae)
"""

from __future__ import annotations

import contextlib
import warnings

import diffusers
import torch
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ldmfast.models.blocks import BlockInputs, downsample, image_attention, mid_block, resnet, upsample
from ldmfast.models.drop_in import DropIn
from ldmfast.models.guard import obstacle, obstacles
from ldmfast.models.layers import channels_last, conv2d, in_layout_of
from ldmfast.models.tiled_decode import decode_in_strips


class AutoencoderKL(DropIn, diffusers.AutoencoderKL):
    """Images to latents and back.

    Constructed, configured, loaded and saved as diffusers' AutoencoderKL is, with the same encode, decode, slicing and
    tiling; tiles go through diffusers' own forward. A float16 decoding that overflows is repeated in float32.
    Source: Rombach et al. 2022, section 3.1.
    """

    stock = diffusers.AutoencoderKL

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_tiling and max(x.shape[2:]) > self.tile_sample_min_size:
            return super()._encode(x)
        h = encode(self.encoder, channels_last(x))
        h = h if self.quant_conv is None else conv2d(self.quant_conv, h)
        return in_layout_of(x, h)

    @apply_forward_hook
    def decode(
        self,
        z: torch.Tensor,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
        *,
        tile: int | None = None,
    ) -> DecoderOutput | tuple:
        """Latents [N, c, h, w], unscaled, to pictures [N, 3, f h, f w], as AutoencoderKL.decode.

        tile  rows of latents that are decoded at a time, 1 or more: the same picture, to rounding, with less memory
              and in longer time (tiled_decode.py); no gradient. None: all at once.
        Raises ValueError for a tile below 1, or for a decoder that something is attached to.
        """
        if tile is None:
            return super().decode(z, return_dict, generator)
        if tile < 1:
            raise ValueError(f"decode: tile is {tile}, expected 1 or more rows of latents")
        with torch.no_grad():
            parts = z.split(1) if self.use_slicing else (z,)
            x = torch.cat([self._decode(part, return_dict=False, tile=tile)[0] for part in parts])
        return DecoderOutput(sample=x) if return_dict else (x,)

    def _decode(self, z: torch.Tensor, return_dict: bool = True, tile: int | None = None) -> DecoderOutput | tuple:
        x = self._decode_as_it_is(z, tile)
        if _overflowed(x):
            x = self._decode_in_float32(z, tile)
        return DecoderOutput(sample=x) if return_dict else (x,)

    def _decode_as_it_is(self, z: torch.Tensor, tile: int | None) -> torch.Tensor:
        if tile is None and self.use_tiling and max(z.shape[2:]) > self.tile_latent_min_size:
            return super()._decode(z).sample
        h = channels_last(z)
        h = h if self.post_quant_conv is None else conv2d(self.post_quant_conv, h)
        return in_layout_of(z, decode(self.decoder, h) if tile is None else decode_in_strips(self.decoder, h, tile))

    def _decode_in_float32(self, z: torch.Tensor, tile: int | None) -> torch.Tensor:
        """Again, with the decoder in float32 for this call. Where its weights are managed by others, only a warning."""
        managed = next(obstacles(self), None)
        again = "decoded again in float32" if managed is None else f"left so, because of {managed[0]}: {managed[1]}"
        if not getattr(self, "_overflow_warned", False):
            self._overflow_warned = True
            warnings.warn(f"the float16 autoencoder overflowed; {again}", stacklevel=2)
        if managed is not None:
            return self._decode_as_it_is(z, tile)
        with _in_float32(self):
            return self._decode_as_it_is(z.float(), tile).to(z.dtype)

    def remarks(self) -> list[str]:
        return ["Pictures larger than a tile run as diffusers' AutoencoderKL: tiling is on."] if self.use_tiling else []


def encode(m: Encoder, x: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, H, W] to moments [N, 2c, H/f, W/f]."""
    if obstacle(m):
        return m(x)
    cond = BlockInputs()
    x = conv2d(m.conv_in, x)
    for block in m.down_blocks:
        x = _level(block, x, cond, downsample, "downsamplers")  # half the size, but at the last level
    return _out(m, mid_block(m.mid_block, x, cond))  # [N, 2c, H/f, W/f]


def decode(m: Decoder, z: torch.Tensor) -> torch.Tensor:
    """Latents [N, c, h, w] to images [N, 3, f h, f w]."""
    if obstacle(m):
        return m(z)
    cond = BlockInputs()
    x = mid_block(m.mid_block, conv2d(m.conv_in, z), cond)
    for block in m.up_blocks:
        x = _level(block, x, cond, upsample, "upsamplers")  # twice the size, but at the last level
    return _out(m, x)  # [N, 3, f h, f w]


def _level(m: nn.Module, x: torch.Tensor, cond: BlockInputs, resample, name: str) -> torch.Tensor:
    """One size: its resnets, each with its attention where there is one, then the step to the next size."""
    if obstacle(m):
        return m(x)
    for i, layer in enumerate(m.resnets):
        x = resnet(layer, x, cond)
        if hasattr(m, "attentions"):
            x = image_attention(m.attentions[i], x, cond)
    for layer in getattr(m, name) or ():
        x = resample(layer, x)
    return x


def _out(m: Encoder | Decoder, x: torch.Tensor) -> torch.Tensor:
    return conv2d(m.conv_out, x, norm=m.conv_norm_out, silu=True)


def _overflowed(x: torch.Tensor) -> bool:
    """Whether a finished float16 picture has values that are not finite. Waits for the device, once a picture."""
    if x.dtype is not torch.float16 or torch.compiler.is_compiling():
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not bool(torch.isfinite(x).all())


@contextlib.contextmanager
def _in_float32(model: nn.Module):
    """The parameters in float32 for a while; float16 to float32 and back is exact."""
    kept = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in kept:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
