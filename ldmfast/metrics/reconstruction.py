"""How much of a picture an autoencoder gives back: PSNR, SSIM, a perceptual distance, and how a codebook is used.

Pictures are float [N, 3, H, W] in [-1, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldmfast.models import VQModel


def ssim(x, y, *, width=11, sigma=1.5):
    """Structural similarity, mean over pixels and channels -> [N].   Source: Wang et al. 2004."""
    with torch.autocast(x.device.type, enabled=False):  # its variances are differences: bfloat16 turns them negative
        return _ssim(x.float(), y.float(), width, sigma)


def _ssim(x, y, width, sigma):
    c = x.shape[1]
    offsets = torch.arange(width, dtype=torch.float32, device=x.device) - (width - 1) / 2
    taps = torch.exp(-(offsets**2) / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(c, 1, width)

    def blur(a):
        a = F.conv2d(a, taps[..., None], padding=(width // 2, 0), groups=c)
        return F.conv2d(a, taps[:, :, None], padding=(0, width // 2), groups=c)

    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2  # the range of [-1, 1] is 2
    score = (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return score.mean(dim=(1, 2, 3))


def psnr(x, y):
    """Peak signal-to-noise ratio in dB -> [N]."""
    mse = (x.float() - y.float()).pow(2).mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / mse.clamp_min(1e-12))


def codebook_use(counts: torch.Tensor) -> dict[str, float]:
    """From how often each code was chosen [K]: `perplexity`, exp of the entropy, and `used`, the share ever chosen."""
    p = counts.double() / counts.sum().clamp_min(1)
    entropy = -(p * p.clamp_min(1e-30).log()).sum()
    return {"perplexity": entropy.exp().item(), "used": (counts > 0).double().mean().item()}


COMPARED = {"psnr": psnr, "ssim": ssim}  # name -> function of two batches of pictures; metrics/columns.py shows them


@torch.no_grad()
def reconstruct(model, x):
    """(reconstructions of x [N, 3, H, W] clamped to [-1, 1], float32; indices of the codes [N h w] or None)."""
    x = x.to(model.dtype)
    if isinstance(model, VQModel):
        codes, _, index = model.quantise(model.encode(x).latents)
        return model.decode_quantised(codes).float().clamp(-1, 1), index
    return model.decode(model.encode(x).latent_dist.mode()).sample.float().clamp(-1, 1), None


@torch.no_grad()
def score(model, pictures, batch=64, scorer=None):
    """Means over the reconstructions of `pictures` (a Pictures): {"psnr", "ssim"}, the `scorer`'s distance under its
    name, and of a VQModel {"perplexity", "used"}.

    scorer  a distance of metrics/perceptual.py; None leaves it out
    """
    measures = COMPARED | ({scorer.name: scorer} if scorer else {})
    found, counts = {name: [] for name in measures}, 0
    for part in pictures.parts(batch):
        x = pictures.batch(part)
        y, index = reconstruct(model, x)
        for name, measure in measures.items():
            found[name].append(measure(x, y))
        counts = counts + torch.bincount(index, minlength=model.quantize.n_e) if index is not None else counts
    report = {name: torch.cat(values).mean().item() for name, values in found.items()}
    report |= codebook_use(counts) if isinstance(model, VQModel) else {}
    return {name: round(value, 2 if name == "psnr" else 4) for name, value in report.items()}
