"""Every picture's latent, encoded once, so that the autoencoder does not run while the denoiser trains.

They are kept in memory and, where a file is named, on the disk, marked with what they were made from.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ldmfast import files
from ldmfast.models.encode_decode import scaled

WEIGHTS = "first-stage weights"  # what files of latents call the autoencoder's


@dataclass(frozen=True)
class Latents:
    """What the denoiser learns, scaled as the autoencoder's scaling_factor says.

    mean  float32 [N, z, h, w]
    std   float32 [N, z, h, w]; of a VQModel's latents zeros: they are those before the codebook
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __len__(self):
        return len(self.mean)

    @property
    def shape(self):
        """(z, h, w)."""
        return self.mean.shape[1:]

    def sample_latents(self, index, step):
        """Latents [B, z, h, w] of the pictures `index` [B], on the step's device."""
        noise = step.normal(*self.shape)
        return self.mean[index].to(step.device) + self.std[index].to(step.device) * noise


def prepare(pictures, vae, *, file="", scale="config", accelerator):
    """Encode `pictures` on the accelerator's device, or read `file` if it holds them already.

    scale  "config": by the autoencoder's scaling_factor; "std": by 1 / their measured deviation, which becomes the
           autoencoder's scaling_factor, so that whoever decodes undoes it
    Raises ValueError if `file` holds the latents of other pictures or of another autoencoder.
    """
    if file:
        with accelerator.main_process_first():
            mean, std = _kept(pictures, vae, Path(file), accelerator.device)
    else:
        mean, std = encode(pictures, vae, accelerator.device)
    if scale == "std":
        vae.register_to_config(scaling_factor=1 / deviation(mean, std))
    return Latents(scaled(vae, mean), std * vae.config.scaling_factor)


@torch.no_grad()
def encode(pictures, vae, device="cpu", batch=64):
    """Mean and deviation of every picture's posterior, unscaled: two float32 [N, z, h, w] on the CPU.

    A VQModel's are its latents before the codebook, and 0.
    """
    vae.to(device)
    means = deviations = None
    for start in range(0, len(pictures), batch):
        found = vae.encode(pictures.batch(slice(start, start + batch)).to(device, vae.dtype))
        exact = not hasattr(found, "latent_dist")
        mean = found.latents if exact else found.latent_dist.mean
        if means is None:  # their size; two lists and what joins them would take twice the memory
            means, deviations = (torch.zeros(len(pictures), *mean.shape[1:]) for _ in range(2))
        here = slice(start, start + len(mean))
        means[here] = mean
        if not exact:
            deviations[here] = found.latent_dist.std
    return means, deviations


def deviation(mean, std):
    """Of all elements of all latents, the posterior's own noise included."""
    return (mean.double().var(correction=0) + std.double().square().mean()).sqrt().item()


def _kept(pictures, vae, file, device):
    made_from = {"pictures": _digest_of(pictures.pixels), WEIGHTS: _digest(vae.state_dict().values())}
    if not file.exists():
        mean, std = encode(pictures, vae, device)
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.replacing(file) as partial:
            save_file({"mean": mean.contiguous(), "std": std.contiguous()}, partial, metadata=made_from)
        return mean, std
    try:
        with safe_open(file, "pt") as kept:
            found = kept.metadata() or {}
            tensors = kept.get_tensor("mean"), kept.get_tensor("std")
    except (SafetensorError, OSError) as error:  # the latter of a folder
        raise ValueError(f"{file} holds no latents ({error}); remove it, and it is made anew") from error
    other = [name for name, digest in made_from.items() if found.get(name) != digest]
    other = ["autoencoder weights" if name == WEIGHTS else name for name in other]
    if other:
        raise ValueError(f"{file} was made from other {' and other '.join(other)}; remove it, or name another")
    return tensors


def _digest(tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def _digest_of(pixels, together=256):
    """As `_digest` of the one tensor, read a part at a time."""
    found = hashlib.sha256(f"{torch.uint8} {tuple(pixels.shape)}".encode())
    for start in range(0, len(pixels), together):
        found.update(pixels[start : start + together].contiguous().flatten().numpy())
    return found.hexdigest()
