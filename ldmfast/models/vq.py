"""`VQModel`: diffusers' VQModel, the autoencoder with a codebook, over `ldmfast.ops`.

vqvae = VQModel.from_pretrained("CompVis/ldm-celebahq-256", subfolder="vqvae")
pipe.vqvae = VQModel.adopt(pipe.vqvae)
"""

from __future__ import annotations

import diffusers
import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.autoencoders.vq_model import VQEncoderOutput
from diffusers.utils.accelerate_utils import apply_forward_hook

from ldmfast.models.autoencoder import beginning, decode, encode, without_overflow
from ldmfast.models.drop_in import DropIn
from ldmfast.models.guard import plain
from ldmfast.models.input_checks import check_picture, check_values
from ldmfast.models.layers import channels_last, conv2d, in_layout_of
from ldmfast.ops.contract.stock_ops import in_fixed_order


class VQModel(DropIn, diffusers.VQModel):
    """Images to latents and back through a codebook: LDM's vq-f4, vq-f8 and vq-f16.

    Constructed, configured, loaded and saved as diffusers' VQModel is. `encode` returns what comes before the codebook,
    which is what a denoiser is trained on; `decode` quantises. A decoder with norm_type "spatial" (MoVQ) runs as
    diffusers' own. What overflows in float16 is repeated in float32.
    Source: Rombach et al. 2022, section 3.1; van den Oord et al. 2017 for the codebook.
    """

    stock = diffusers.VQModel

    @in_fixed_order
    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> VQEncoderOutput | tuple:
        """Images [N, 3, H, W] to latents [N, c, H/f, W/f], not quantised."""
        if self.stock_reason():
            return super().encode(x, return_dict)
        check_picture("x", x, beginning(self.encoder), "autoencoder")
        check_values(x=x)
        h = without_overflow(self, "encoded", self._encode_as_it_is, x)
        return VQEncoderOutput(latents=h) if return_dict else (h,)

    def _encode_as_it_is(self, x: torch.Tensor) -> torch.Tensor:
        return in_layout_of(x, conv2d(self.quant_conv, encode(self.encoder, channels_last(x))))

    @in_fixed_order
    @apply_forward_hook
    def decode(
        self,
        h: torch.Tensor,
        force_not_quantize: bool = False,
        return_dict: bool = True,
        shape: tuple[int, ...] | None = None,
    ) -> DecoderOutput | tuple:
        """Latents [N, c, h, w] to images [N, 3, f h, f w]; `force_not_quantize` and `shape` as diffusers takes them."""
        if (
            self.stock_reason()
            or self.config.norm_type == "spatial"
            or (force_not_quantize and self.config.lookup_from_codebook)
        ):
            return super().decode(h, force_not_quantize, return_dict, shape)
        check_picture("h", h, self.post_quant_conv if plain(self.quantize) else None, "autoencoder")
        check_values(h=h)
        quantised, commit_loss = (h, h.new_zeros(h.shape[0])) if force_not_quantize else self.quantise(h)[:2]
        x = self.decode_quantised(quantised)
        return DecoderOutput(sample=x, commit_loss=commit_loss) if return_dict else (x, commit_loss)

    @in_fixed_order
    def quantise(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(nearest codes [N, c, h, w] with the straight-through gradient, loss, indices [N h w]) of latents h.

        The distances are float32 whatever the dtype: torch has no cdist in the halves.
        """
        if h.dtype not in (torch.float16, torch.bfloat16):
            codes, loss, (_, _, index) = self.quantize(h)
            return codes, loss, index
        weight = self.quantize.embedding.weight
        codes, loss, (_, _, index) = torch.func.functional_call(
            self.quantize, {"embedding.weight": weight.float()}, (h.float(),)
        )
        return codes.to(h.dtype), loss.to(h.dtype), index

    @in_fixed_order
    def decode_quantised(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes [N, c, h, w] to images [N, 3, f h, f w]."""
        return without_overflow(self, "decoded", self._decode_as_it_is, codes)

    def _decode_as_it_is(self, codes: torch.Tensor) -> torch.Tensor:
        return in_layout_of(codes, decode(self.decoder, conv2d(self.post_quant_conv, channels_last(codes))))

    def remarks(self) -> list[str]:
        spatial = self.config.norm_type == "spatial"
        return ["Decoding runs as diffusers' VQModel: its norms are spatial (MoVQ)."] if spatial else []
