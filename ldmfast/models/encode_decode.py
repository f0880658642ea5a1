"""Pictures to the denoiser's latents and back, whichever family the first stage is of."""

from __future__ import annotations

import diffusers
import torch


def encode_first_stage(vae, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Pictures [N, 3, H, W] in [-1, 1] to latents [N, c, H/f, W/f], scaled by the model's scaling_factor.

    generator  draws from the posterior of an AutoencoderKL; None takes its mean. A VQModel has nothing to draw: its
               latents are those before the codebook.
    Raises TypeError for a model of neither family.
    """
    if isinstance(vae, diffusers.VQModel):
        z = vae.encode(x).latents
    elif isinstance(vae, diffusers.AutoencoderKL):
        posterior = vae.encode(x).latent_dist
        z = posterior.mode() if generator is None else posterior.sample(generator)
    else:
        raise _unknown("encode_first_stage", vae)
    shift = getattr(vae.config, "shift_factor", None) or 0
    return (z - shift) * vae.config.scaling_factor


def decode_first_stage(vae, z: torch.Tensor) -> torch.Tensor:
    """Latents [N, c, h, w], scaled as `encode_first_stage` leaves them, to pictures [N, 3, f h, f w], not clamped.

    A VQModel quantises them first. Raises TypeError for a model of neither family.
    """
    if not isinstance(vae, diffusers.VQModel | diffusers.AutoencoderKL):
        raise _unknown("decode_first_stage", vae)
    shift = getattr(vae.config, "shift_factor", None) or 0
    return vae.decode(z / vae.config.scaling_factor + shift).sample


def downsampling(vae) -> int:
    """f: pixels of a picture to one of its latent, along a side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def _unknown(function: str, vae) -> TypeError:
    return TypeError(f"{function}: vae is a {type(vae).__name__}; expected an AutoencoderKL or a VQModel")
