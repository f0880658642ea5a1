"""Stage-1 reconstruction losses. Pictures are float [N, 3, H, W] in [-1, 1]."""

import torch
import torch.nn.functional as F

from ldmfast.metrics.reconstruction import ssim


def reconstruction(pictures, decoded, *, ssim_weight):
    """Scalar: L1 + ssim_weight * (1 - SSIM). Perceptual and adversarial terms join it in autoencoder_loss.py."""
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
