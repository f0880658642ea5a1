"""Pictures to the denoiser's latents and back, whichever family the autoencoder is of."""

from __future__ import annotations

from typing import TypeAlias

import diffusers
import torch

from ldmfast.ops.dispatcher import transformed

Autoencoder: TypeAlias = "diffusers.AutoencoderKL | diffusers.VQModel"


def encode_pictures(vae: Autoencoder, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] to latents [N, c, H/f, W/f], scaled as a denoiser takes them.

    generator  draws from the posterior of an AutoencoderKL; None takes its mean. A VQModel has nothing to draw: its
               latents are those before the codebook.
    Raises TypeError for a model of neither family, FloatingPointError where float16 overflows: ours encode again in
    float32 first, diffusers' do not.
    """
    if isinstance(vae, diffusers.VQModel):
        z = vae.encode(x).latents
    elif isinstance(vae, diffusers.AutoencoderKL):
        posterior = vae.encode(x).latent_dist
        z = posterior.mode() if generator is None else posterior.sample(generator)
    else:
        raise _unknown("encode_pictures", vae)
    unseen = torch.compiler.is_compiling() or transformed()
    if z.dtype is torch.float16 and not unseen and not torch.isfinite(z).all():
        raise FloatingPointError("encode_pictures: the latents are not finite (weights in torch.float16); use float32")
    return scaled(vae, z)


def decode_latents(vae: Autoencoder, z: torch.Tensor) -> torch.Tensor:
    """Latents [N, c, h, w], scaled as `encode_pictures` leaves them, to pictures [N, 3, f h, f w], not clamped.

    A VQModel quantises them first. Raises TypeError for a model of neither family.
    """
    if not isinstance(vae, (diffusers.VQModel, diffusers.AutoencoderKL)):
        raise _unknown("decode_latents", vae)
    return vae.decode(unscaled(vae, z)).sample


def scaled(vae: Autoencoder, z: torch.Tensor) -> torch.Tensor:
    """The autoencoder's latents as the denoiser takes them, (z - shift_factor) * scaling_factor."""
    return (z - shift(vae)) * vae.config.scaling_factor


def unscaled(vae: Autoencoder, z: torch.Tensor) -> torch.Tensor:
    """The denoiser's latents as the autoencoder decodes them."""
    return z / vae.config.scaling_factor + shift(vae)


def shift(vae: Autoencoder) -> float:
    """What is taken from the autoencoder's latents before they are scaled."""
    return getattr(vae.config, "shift_factor", None) or 0


def downsampling(vae: Autoencoder) -> int:
    """f: pixels of a picture to one of its latent, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _unknown(function: str, vae) -> TypeError:
    return TypeError(f"{function}: vae is a {type(vae).__name__}; expected an AutoencoderKL or a VQModel")
