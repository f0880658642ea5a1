"""Stage-1 reconstruction losses and the picture metrics. Pictures are float [N, 3, H, W] in [-1, 1]."""

import torch
import torch.nn.functional as F


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


def reconstruction(pictures, decoded, *, ssim_weight):
    """Scalar: L1 + ssim_weight * (1 - SSIM). Perceptual and adversarial terms join it in objective.py."""
    loss = F.l1_loss(decoded.float(), pictures)
    if ssim_weight:
        loss = loss + ssim_weight * (1 - ssim(decoded, pictures)).mean()
    return loss


def kl(posterior):
    """Scalar: KL to the standard normal, mean over latent elements (diffusers' DiagonalGaussianDistribution)."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()


def nll(reconstruction, logvar):
    """Scalar: reconstruction / exp(logvar) + logvar. At its least, logvar is the reconstruction's logarithm."""
    return reconstruction * torch.exp(-logvar) + logvar
