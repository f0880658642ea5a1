"""The loss of stage 1, with everything in it that learns or counts beside the model.

    (L1 + ssim + gradients + perceptual) / exp(logvar) + logvar + KL or codebook term + adaptive weight * adversarial

Every term is a mean over elements. Rombach et al. sum over a picture instead; that scales the whole loss by the number
of its values, which Adam does not see, and the weight of the KL term by latent elements / picture elements: their 1e-6
at f = 8 and 4 channels is 2e-8 here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ldmfast.metrics import backbones, perceptual
from ldmfast.metrics.reconstruction import ssim
from ldmfast.training.losses import adversarial
from ldmfast.training.losses.codebook import Codebook, flat
from ldmfast.training.run import Phase
from ldmfast.training.step import mixed


def gradient_strengths(pictures, window=8):
    """Root mean square of the differences of neighbouring pixels, in windows that overlap by half: [N, 6, h, w].

    pictures  [N, 3, H, W]; one smaller than a window is one. Strengths down and across are channels of their own
    """
    down, across = pictures.diff(dim=2)[..., :-1], pictures.diff(dim=3)[:, :, :-1]
    energies = F.avg_pool2d(torch.cat([down, across], dim=1).square(), min(window, *down.shape[2:]), window // 2)
    return (energies + 1e-6).sqrt()  # a flat window's gradient is finite; half a grey level of grain still counts


def gradient_loss(pictures, decoded):
    """Scalar: mean distance of the `gradient_strengths`. An edge that L1 leaves soft, for it may lie a pixel aside, is
    as strong as the picture's wherever it is drawn.   After Abrahamyan et al. 2022, who compare variances."""
    return F.l1_loss(gradient_strengths(decoded.float()), gradient_strengths(pictures))


def reconstruction_loss(pictures, decoded, *, ssim_weight, gradient_weight=0.0):
    """Scalar: L1 + ssim_weight * (1 - SSIM) + gradient_weight * gradient_loss."""
    loss = F.l1_loss(decoded.float(), pictures)
    if ssim_weight:
        loss = loss + ssim_weight * (1 - ssim(decoded, pictures)).mean()
    if gradient_weight:
        loss = loss + gradient_weight * gradient_loss(pictures, decoded)
    return loss


def kl_loss(posterior):
    """Scalar: KL to the standard normal, mean over latent elements (diffusers' DiagonalGaussianDistribution)."""
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).mean()


def nll_loss(reconstruction, logvar):
    """Scalar: reconstruction / exp(logvar) + logvar. At its least, logvar is the reconstruction's logarithm."""
    return reconstruction * torch.exp(-logvar) + logvar


class PictureLoss(nn.Module):
    """The loss of decoded pictures: the terms above but the regulariser's, with everything in them that learns.

    It yields a loss for each of `phases()`. `perceptual` is the distance in use, or None.   side  of the pictures
    Raises ValueError where they are too small for the discriminator.
    """

    def __init__(self, config, side):
        super().__init__()
        self.config = config
        self.logvar = nn.Parameter(torch.zeros(())) if config.logvar == "learned" else None
        self.discriminator = self._discriminator(side) if config.adversarial else None
        # its weights are not ours to train, average or save: not a submodule
        distance = perceptual.make(config.perceptual, config.lpips) if config.perceptual != "none" else None
        self.__dict__["perceptual"] = distance

    def _discriminator(self, side):
        c = self.config
        if c.discriminator_features != "none":
            backbone = backbones.INSTALLED[c.discriminator_features]()
            return adversarial.FeatureDiscriminator(backbone, c.discriminator_channels, c.discriminator_layers)
        net = adversarial.Discriminator(c.discriminator_channels, c.discriminator_layers, c.discriminator_norm)
        least = net.smallest()
        if side < least:
            raise ValueError(f"{side} pixels: a discriminator of {c.discriminator_layers} layers needs {least}")
        return net.to(memory_format=torch.channels_last)

    def networks(self) -> dict:
        """What it compares with, for the record: a network that trained a model is no fair judge of it."""
        c, distance = self.config, self.perceptual
        return {
            "perceptual": "none" if distance is None else distance.name,
            "adversarial": c.adversarial,
            "discriminator_features": c.discriminator_features if c.adversarial else "none",
        }

    def phases(self, learners) -> list[Phase]:
        """The networks that follow losses of their own, in the order in which they are yielded.

        learners  the parameters that learn from the first one
        """
        phases = [Phase("loss", list(learners))]
        if self.logvar is not None:
            phases.append(Phase("logvar", [self.logvar], weight_decay=0.0, betas=(0.5, 0.9)))
        if self.discriminator is not None:
            rate = self.config.discriminator_rate or None
            weights = list(self.discriminator.parameters())
            phases.append(Phase("discriminator", weights, learning_rate=rate, weight_decay=0.0, betas=(0.5, 0.9)))
        return phases

    def losses_of_decoded(self, pictures, decoded, regulariser, last, step):
        """Yield a scalar for each phase; None for a discriminator that has not started.

        pictures, decoded  [B, 3, H, W] in [-1, 1]
        regulariser        the KL or codebook term, or 0
        last               the decoder's last weight, at which the adaptive weight compares gradients
        step               Step; the terms are logged there
        """
        c = self.config
        reconstruction = self._reconstruction(pictures, decoded, step)
        nll = reconstruction if self.logvar is None else nll_loss(reconstruction, self.logvar.detach())
        learns = self.discriminator is not None and step.number >= c.adversarial_start - c.discriminator_lead
        started = learns and step.number >= c.adversarial_start
        total = nll + regulariser
        if started:
            g = adversarial.generator_loss(self.discriminator, decoded)
            weight = adversarial.adaptive_weight(nll, g, last)
            step.log("generator", g)
            step.log("adaptive_weight", weight)
            total = total + c.adversarial * weight * g
        yield total
        if self.logvar is not None:
            step.log("logvar", self.logvar)
            yield nll_loss(reconstruction.detach(), self.logvar)
        if self.discriminator is not None:
            yield adversarial.discriminator_loss(self.discriminator, pictures, decoded) if learns else None

    def _reconstruction(self, pictures, decoded, step):
        c = self.config
        reconstruction = reconstruction_loss(
            pictures, decoded, ssim_weight=c.ssim_weight, gradient_weight=c.gradient_weight
        )
        if self.perceptual is not None:
            distance = self.perceptual.to(pictures.device)(pictures, decoded).mean()
            step.log(self.perceptual.name, distance)
            reconstruction = reconstruction + c.perceptual_weight * distance
        step.log("reconstruction", reconstruction)
        return reconstruction


class AutoencoderLoss(PictureLoss):
    """An autoencoder in training: `vae`, and what learns or counts beside it.

    grew_from  the autoencoder of half the size whose latents config.keep_latents holds it to
    The names of its parts are keys of saved checkpoints.
    """

    def __init__(self, vae, config, grew_from=None):
        super().__init__(config, config.crop or config.size)
        self.vae = vae
        self.__dict__["grew_from"] = grew_from  # not a submodule: it stays as it is, and is not saved
        self.codebook = Codebook(config.codebook, config.latent_channels) if config.family == "vq" else None
        self.revived_at = -1

    def phases(self) -> list[Phase]:
        return super().phases(self.vae.parameters())

    def losses_of(self, pictures, step, books):
        """Yield a scalar for each phase, as `losses_of_decoded` does.

        pictures  [B, 3, H, W] in [-1, 1]
        books     the codebook [K, c] and its average, in which dead codes are re-seeded; empty for a KL model
        """
        autoencode = self._through_posterior if self.codebook is None else self._through_codebook
        decoded, regulariser = autoencode(pictures, step, books)
        yield from self.losses_of_decoded(pictures, decoded, regulariser, self.vae.decoder.conv_out.weight, step)

    def _through_posterior(self, pictures, step, books):
        posterior = self.vae.encode(pictures).latent_dist
        noise = step.normal(*posterior.mean.shape[1:])
        kl = kl_loss(posterior)
        step.log("kl", kl)
        regulariser = self.config.kl_weight * kl
        if self.config.keep_latents:
            kept = self._latents_it_grew_from(pictures)
            distance = F.mse_loss(posterior.mean[:, : kept.shape[1]].float(), kept)
            step.log("latent_distance", distance)
            regulariser = regulariser + self.config.keep_latents * distance
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, regulariser

    @torch.no_grad()
    def _latents_it_grew_from(self, pictures):
        halves = F.avg_pool2d(pictures, 2)
        return self.grew_from.to(pictures.device).encode(halves).latent_dist.mean.float()

    def _through_codebook(self, pictures, step, books):
        latents, seed = self.vae.encode(pictures).latents.float(), mixed(self.config.seed, step.number)
        self.codebook.note(flat(latents), seed)
        if step.number < self.config.codebook_start:
            return self.vae.decode_quantised(latents), 0.0
        if self._revives(step.number):
            step.log("revived_codes", self.codebook.revive(books, seed))
        codes, loss, index = self.vae.quantise(latents)
        self.codebook.count(index)
        step.log("codebook", loss)
        return self.vae.decode_quantised(codes), self.config.codebook_weight * loss

    def _revives(self, number):
        """At the codebook's first step, which seeds all of it from the data, then at every `revive_every`th until the
        last fifth of the training, so that every code has time to settle; once a step."""
        c = self.config
        since = number - c.codebook_start
        due = c.revive_every and since % c.revive_every == 0 and number <= 0.8 * c.steps
        due = (due or since == 0 < c.codebook_start) and number != self.revived_at
        self.revived_at = number
        return bool(due)
