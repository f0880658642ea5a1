"""Stage 1b: sharpen a finished autoencoder's decoder while its latents stay as they are.

It can run beside the denoiser's training, which reads the same latents, and after it: a denoiser stays valid.
"""

from pathlib import Path

import torch

from ldmfast.data.collection import CACHE, load_pictures
from ldmfast.pipeline import LatentDiffusionPipeline, saved_autoencoder
from ldmfast.training import latents
from ldmfast.training.denoised_latents import DenoisedLatents
from ldmfast.training.loop import fit
from ldmfast.training.losses.autoencoder_loss import PictureLoss
from ldmfast.training.run import Run
from ldmfast.training.train_autoencoder import SHOWN, sheet, write_autoencoder


class Decoder(PictureLoss):
    """The half of an autoencoder that is trained here, and its loss; a codebook goes along, frozen."""

    def __init__(self, vae, config):
        super().__init__(config, vae.config.sample_size)
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        if hasattr(vae, "quantize"):
            self.quantize = vae.quantize.requires_grad_(False)
        self.decode = vae.decode

    def phases(self):
        return super().phases([*self.post_quant_conv.parameters(), *self.decoder.parameters()])


def loss_of(model, pictures, mean, std, config, denoised=None):
    """The losses of a Step: they draw its batch and its latent noise.

    model     Decoder
    denoised  DenoisedLatents, or None: all latents are the encoder's
    """

    def losses(step):
        index = step.integers(len(pictures))
        noise, extra = step.normal(*mean.shape[1:]), step.normal(*mean.shape[1:])
        z = mean[index].to(step.device) + std[index].to(step.device) * noise + config.latent_noise * extra
        if denoised is not None and step.uniform()[0] < config.denoised_share:
            z = denoised(z, index, step)
        x = pictures.batch(index).to(step.device)
        return model.losses_of_decoded(x, model.decode(z).sample, 0.0, model.decoder.conv_out.weight, step)

    return losses


def _denoised(config, pictures, shape, device, folder):
    if not config.denoiser:
        return None
    pipeline = LatentDiffusionPipeline.from_pretrained(config.denoiser).to(device)
    return DenoisedLatents(pipeline, pictures.rows, shape, config.denoised_most, folder)


def train(data, autoencoder, folder, config, *, restart=False, quiet=False):
    """Train on the folder `data` and write `folder`/vae. Returns the metrics."""
    vae = saved_autoencoder.load(autoencoder)
    reading = dict(captions=bool(config.denoiser), skip_broken=config.skip_broken, cache=Path(folder, CACHE))
    pictures = load_pictures(data, vae.config.sample_size, split="train", **reading)
    mean, std = latents.encode(pictures, vae, folder=folder)
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)  # of a discriminator's first weights
    model = Decoder(vae, config)
    run = Run(model, config, phases=model.phases())
    denoised = _denoised(config, pictures, mean.shape[1:], run.device, folder)
    some = slice(0, SHOWN)
    history = fit(
        run,
        loss_of(run.model, pictures, mean, std, config, denoised),
        Path(folder, "decoder.pt"),
        restart=restart,
        quiet=quiet,
        sample=lambda: sheet(pictures.batch(some), run.model.decode(mean[some].to(run.device)).sample),
    )
    run.finish().cpu()
    if not run.main:
        return {"loss": history}
    return write_autoencoder(folder, "decoder", vae, model, pictures, history)
