"""`AutoencoderKL`: diffusers' AutoencoderKL with encoder and decoder over `ldmfast.ops`.

vae = AutoencoderKL.from_pretrained("stabilityai/sd-vae-ft-mse")
pipe.vae = AutoencoderKL.from_vae(pipe.vae)
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import diffusers
import torch
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ldmfast import ops
from ldmfast.models.blocks import BlockInputs, downsample, image_attention, is_large, mid_block, resnet, upsample
from ldmfast.models.drop_in import DropIn
from ldmfast.models.guard import obstacle, obstacles, plain
from ldmfast.models.input_checks import check_picture, check_values
from ldmfast.models.layers import (
    activated_conv2d,
    channels_last,
    conv2d,
    for_stock,
    from_stock,
    in_layout_of,
    kernel_takes,
)
from ldmfast.models.limits import modified
from ldmfast.models.missing_weights import SingleFile
from ldmfast.models.tiled_decode import decode_in_strips
from ldmfast.ops.contract.stock_ops import in_fixed_order
from ldmfast.ops.dispatcher import transformed
from ldmfast.ops.measured.ranges import block as named
from ldmfast.ops.planning.memory import give_back_freed

# Bytes of a picture from which on memory is worth a little time. malloc takes blocks of more than half of that from the
# system and gives them back (M_MMAP_THRESHOLD); what it frees of smaller ones the process goes on holding.
LARGE = 64 << 20
STRIP = 2 << 20  # bytes of a 1x1 convolution's result, still in the cache when it is copied to where it stays


class AutoencoderKL(SingleFile, DropIn, diffusers.AutoencoderKL):
    """Images to latents and back.

    Constructed, configured, loaded and saved as diffusers' AutoencoderKL is, with the same encode, decode, slicing and
    tiling; tiles go through diffusers' own forward. What overflows in float16 is repeated in float32.
    Source: Rombach et al. 2022, section 3.1.
    """

    stock = diffusers.AutoencoderKL
    encode = in_fixed_order(diffusers.AutoencoderKL.encode)

    @classmethod
    def from_vae(cls, vae: diffusers.AutoencoderKL) -> AutoencoderKL:
        """The same network under our forward, sharing its parameters. Raises as `DropIn.adopt` does."""
        return cls.adopt(vae)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        check_picture("x", x, beginning(self.encoder), "autoencoder")
        check_values(x=x)
        return without_overflow(self, "encoded", self._encode_as_it_is, x)

    def _encode_as_it_is(self, x: torch.Tensor) -> torch.Tensor:
        if (self.use_tiling and max(x.shape[2:]) > self.tile_sample_min_size) or self.stock_reason():
            return super()._encode(x)
        h = encode(self.encoder, channels_last(x))
        h = h if self.quant_conv is None else conv2d(self.quant_conv, h)
        return in_layout_of(x, h)

    @in_fixed_order
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

        tile  rows of latents that are decoded at a time, 1 or more: the same picture, to rounding, in longer time but
              the memory of two pictures of the last width and some strips, where all at once takes that of three
              (tiled_decode.py); no gradient. None: all at once.
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
        check_picture("z", z, self.post_quant_conv or beginning(self.decoder), "autoencoder")
        check_values(z=z)
        x = without_overflow(self, "decoded", lambda latents: self._decode_as_it_is(latents, tile), z)
        return DecoderOutput(sample=x) if return_dict else (x,)

    def _decode_as_it_is(self, z: torch.Tensor, tile: int | None) -> torch.Tensor:
        reason = self.stock_reason()
        if tile is not None and reason:
            raise ValueError(f"tile: this autoencoder cannot be run in strips, because {reason}")
        if tile is None and (reason or (self.use_tiling and max(z.shape[2:]) > self.tile_latent_min_size)):
            return super()._decode(z).sample
        h = channels_last(z)
        h = h if self.post_quant_conv is None else conv2d(self.post_quant_conv, h)
        return in_layout_of(z, decode(self.decoder, h) if tile is None else decode_in_strips(self.decoder, h, tile))

    def remarks(self) -> list[str]:
        return ["Pictures larger than a tile run as diffusers' AutoencoderKL: tiling is on."] if self.use_tiling else []


def beginning(m: nn.Module) -> nn.Module | None:
    """The convolution that an encoder or decoder begins with; None for one that may do something before it."""
    return m.conv_in if type(m) in (Encoder, Decoder) and modified(m, type(m)) is None else None


def encode(m: Encoder, x: torch.Tensor) -> torch.Tensor:
    """Images [N, 3, H, W] to moments [N, 2c, H/f, W/f]."""
    if obstacle(m):
        return from_stock(m(for_stock(x)))
    cond = BlockInputs()
    held = [conv2d(m.conv_in, x)]
    for block in m.down_blocks:
        held = level(block, held, cond, downsample, "downsamplers")  # half the size, but at the last level
    return _out(m, mid_block(m.mid_block, held.pop(), cond))  # [N, 2c, H/f, W/f]


def decode(m: Decoder, z: torch.Tensor) -> torch.Tensor:
    """Latents [N, c, h, w] to images [N, 3, f h, f w]."""
    if obstacle(m):
        return from_stock(m(for_stock(z)))
    cond = BlockInputs()
    held = [mid_block(m.mid_block, conv2d(m.conv_in, z), cond)]
    *blocks, last = m.up_blocks
    for block in blocks:
        following = last if block is blocks[-1] else None
        held = level(block, held, cond, upsample, "upsamplers", following)  # twice the size
    return _out(m, level(last, held, cond, upsample, "upsamplers").pop())  # [N, 3, f h, f w]


def level(
    m: nn.Module,
    held: list[torch.Tensor],
    cond: BlockInputs,
    resample: Callable[..., torch.Tensor],
    name: str,
    following: nn.Module | None = None,
) -> list[torch.Tensor]:
    """One size: its resnets, each with its attention where there is one, then the step to the next size.

    held       [picture], or its halves by channels, in a list that this call takes over
    following  the block of the next size, where that may be given halves: the last, at which memory is at its most
    returns    as held

    Before a large picture's memory that was freed goes back to the system: at 512x512 up to 240 MiB, in 10 ms.
    A picture is given away with the call that takes it (Python 3.10 keeps it until that returns): at 512x512 one of 256
    channels is 256 MiB, and no caller's name for it outlives its use.
    """
    if obstacle(m):
        return [from_stock(m(for_stock(held.pop())))]
    if is_large(held[0], len(held) * held[0].numel(), LARGE):
        give_back_freed()
    for i, layer in enumerate(m.resnets):
        held.append(_resnet_of_halves(layer, held) if len(held) == 2 else resnet(layer, held.pop(), cond))
        if hasattr(m, "attentions"):
            held.append(image_attention(m.attentions[i], held.pop(), cond))
    layers = list(getattr(m, name) or ())
    for layer in layers:
        if following is not None and layer is layers[-1] and _leaves_halves(layer, following, held[0]):
            return _upsampled_halves(layer, held.pop())
        held.append(resample(layer, held.pop()))
    return held


def _leaves_halves(m: Upsample2D, following: nn.Module, x: torch.Tensor) -> bool:
    """Whether x, enlarged, is left in halves: it is large, and the next level's first resnet, which takes them, leaves
    half of its channels."""
    if not (plain(m) and plain(following) and is_large(x, 4 * x[:, 0].numel() * m.out_channels, LARGE)):
        return False
    first = following.resnets[0]
    if not plain(first) or first.conv_shortcut is None:
        return False
    convolutions = m.conv, first.conv1, first.conv2, first.conv_shortcut
    return (
        all(plain(layer) for layer in (first.norm1, first.norm2, first.dropout, *convolutions))
        and all(kernel_takes(layer, x) for layer in convolutions)
        and m.interpolate
        and first.upsample is first.downsample is None
        and first.conv_shortcut.kernel_size == (1, 1)
        and m.out_channels == 2 * first.out_channels
    )


@named
def _upsampled_halves(m: Upsample2D, x: torch.Tensor) -> list[torch.Tensor]:
    """As blocks.upsample, one half of the channels after the other: each has its own memory."""
    m, (stride, _), (padding, _) = m.conv, m.conv.stride, m.conv.padding
    weights = m.weight.chunk(2)
    biases = (None, None) if m.bias is None else m.bias.chunk(2)
    around = {"stride": stride, "padding": padding, "upsample": 2}
    return [ops.conv2d(x, weight, bias, **around) for weight, bias in zip(weights, biases, strict=True)]


@named
def _resnet_of_halves(m: ResnetBlock2D, halves: list[torch.Tensor]) -> torch.Tensor:
    """As blocks.resnet, without a time, of a picture in halves, which it takes out of the list.

    What the 1x1 convolution leaves takes the place of the first half, and the second is free when the last convolution
    makes the result: three halves are there at most, where four would be.
    """
    x, second = halves
    halves.clear()
    h = conv2d(m.conv1, x, skip=second, norm=m.norm1, silu=True)
    rows = max(1, STRIP // (x[:, :, 0].numel() * x.element_size()))
    for first in range(0, x.shape[2], rows):
        strip = x[:, :, first : first + rows]
        strip.copy_(conv2d(m.conv_shortcut, strip, skip=second[:, :, first : first + rows]))
    del second
    return conv2d(m.conv2, h, norm=m.norm2, silu=True, residual=x, output_scale=1 / m.output_scale_factor)


def _out(m: Encoder | Decoder, x: torch.Tensor) -> torch.Tensor:
    return activated_conv2d(m.conv_out, x, m.conv_norm_out, m.conv_act)


def without_overflow(
    vae: nn.Module, what: str, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """run(x); where that leaves float16's range, run again with the weights in float32 and rounded, warned of once.

    run   encodes or decodes with the parameters that `vae` has at that moment;   what  "encoded" or "decoded"
    Only a warning where others manage the weights (offloading, quantisation). An `x` that is not finite itself is no
    overflow: its result is left as it is.
    """
    y = run(x)
    if not _overflowed(y) or not bool(torch.isfinite(x).all()):
        return y
    managed = next(obstacles(vae), None)
    if managed is not None:
        again = f"left so, because of {managed[0]}: {managed[1]}"
    else:
        with _in_float32(vae), torch.autocast(x.device.type, enabled=False):
            y = run(x.float()).to(y.dtype)
        again = f"{what} again in float32"
        again += ", and the result is beyond float16 itself: use float32 or bfloat16" if _overflowed(y) else ""
    warned = vae.__dict__.setdefault("_overflows_warned", set())
    if again not in warned:
        warned.add(again)
        warnings.warn(f"the float16 autoencoder overflowed; {again}", stacklevel=2)
    return y


def _overflowed(x: torch.Tensor) -> bool:
    """Whether a finished float16 picture has values that are not finite. Waits for the device, once a picture."""
    if x.dtype is not torch.float16 or torch.compiler.is_compiling() or transformed():
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return not bool(torch.isfinite(x).all())


@contextlib.contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """The parameters in float32 for a while; float16 to float32 and back is exact."""
    kept = [(parameter, parameter.data) for parameter in model.parameters()]
    try:
        for parameter, data in kept:
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
