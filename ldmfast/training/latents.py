"""Every picture's latent, encoded once, so that the autoencoder does not run while the denoiser trains.

They are kept in memory, or on the disk where they take more than rows_on_disk.IN_MEMORY bytes, and read from there a
batch at a time. Where a file is named they stay in it, marked with what they were made from.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ldmfast.data import rows_on_disk
from ldmfast.data.rows_on_disk import RowsOnDisk
from ldmfast.models.encode_decode import shift

WEIGHTS = "first-stage weights"  # what files of latents call the autoencoder's


@dataclass(frozen=True)
class Latents:
    """What the denoiser learns: (mean - shift) * factor, and std * factor, as the autoencoder's configuration says.

    mean  float32 [N, z, h, w]
    std   float32 [N, z, h, w]; of a VQModel's latents zeros: they are those before the codebook
    """

    mean: torch.Tensor | RowsOnDisk
    std: torch.Tensor | RowsOnDisk
    shift: float = 0.0
    factor: float = 1.0

    def __len__(self):
        return len(self.mean)

    @property
    def shape(self):
        """(z, h, w)."""
        return self.mean.shape[1:]

    def sample_latents(self, index, step):
        """Latents [B, z, h, w] of the pictures `index` [B], on the step's device."""
        noise = step.normal(*self.shape)
        mean = (self.mean[index].to(step.device) - self.shift) * self.factor
        return mean + self.std[index].to(step.device) * self.factor * noise


def prepare(pictures, vae, *, file="", folder=None, scale="config", accelerator):
    """Encode `pictures` on the accelerator's device, or read `file` if it holds them already.

    folder where those that are too many for the memory are kept while the process lives; without it, and without a
           file, all are in memory
    scale  "config": by the autoencoder's scaling_factor; "std": by 1 / their measured deviation, which becomes the
           autoencoder's scaling_factor, so that whoever decodes undoes it
    Raises ValueError if `file` holds the latents of other pictures or of another autoencoder.
    """
    if file:
        with accelerator.main_process_first():
            mean, std = _kept(pictures, vae, Path(file), accelerator.device)
    else:
        mean, std = encode(pictures, vae, accelerator.device, folder=folder)
    if scale == "std":
        vae.register_to_config(scaling_factor=1 / deviation(mean, std))
    return Latents(mean, std, shift(vae), vae.config.scaling_factor)


def encode(pictures, vae, device="cpu", *, folder=None):
    """Mean and deviation of every picture's posterior, unscaled: two float32 [N, z, h, w] on the CPU, or, where they
    are too large for the memory, on the disk in `folder`, if that is given.

    A VQModel's are its latents before the codebook, and 0.
    """
    tables = _tables(pictures, vae, device)
    if folder and rows_on_disk.large(tables):
        found = rows_on_disk.scratch(folder, tables)
        _fill(found, pictures, vae, device)
        return found["mean"], found["std"]
    mean, std = (torch.zeros(*shape, dtype=dtype) for shape, dtype in tables.values())
    for here, *both in _encoded(pictures, vae, device):
        mean[here], std[here] = both
    return mean, std


@torch.no_grad()
def _encoded(pictures, vae, device, parts=None):
    """(which, mean, deviation or 0) of the pictures, some at a time."""
    vae.to(device)
    for part in parts or pictures.parts():
        found = vae.encode(pictures.batch(part).to(device, vae.dtype))
        exact = not hasattr(found, "latent_dist")
        mean = found.latents if exact else found.latent_dist.mean
        yield part, mean, torch.zeros_like(mean) if exact else found.latent_dist.std


def _tables(pictures, vae, device):
    """{name: (shape, dtype)} of the pictures' latents, by those of the first."""
    ((_, mean, _),) = _encoded(pictures, vae, device, [slice(0, 1)])
    return dict.fromkeys(("mean", "std"), ((len(pictures), *mean.shape[1:]), torch.float32))


def _fill(found, pictures, vae, device):
    for here, mean, std in _encoded(pictures, vae, device):
        found["mean"].write(here.start, mean)
        found["std"].write(here.start, std)


def deviation(mean, std, together=1024):
    """Of all elements of all latents, the posterior's own noise included."""
    parts = [slice(start, start + together) for start in range(0, len(mean), together)]
    count = mean.shape.numel()
    centre = sum(mean[part].double().sum() for part in parts) / count
    squares = sum((mean[part].double() - centre).square().sum() + std[part].double().square().sum() for part in parts)
    return (squares / count).sqrt().item()


def _kept(pictures, vae, file, device):
    made_from = {"pictures": _digest_of(pictures.pixels), WEIGHTS: rows_on_disk.digest(vae.state_dict().values())}
    tables, fill = lambda: _tables(pictures, vae, device), lambda found: _fill(found, pictures, vae, device)
    spoken = {WEIGHTS: "autoencoder weights"}
    found = rows_on_disk.kept_or_made(file, "latents", made_from, tables, fill, spoken)
    return found["mean"], found["std"]


def _digest_of(pixels, together=256):
    """As rows_on_disk.digest of the one tensor, read a part at a time."""
    found = hashlib.sha256(f"{torch.uint8} {tuple(pixels.shape)}".encode())
    for start in range(0, len(pixels), together):
        found.update(pixels[start : start + together].contiguous().flatten().numpy())
    return found.hexdigest()
