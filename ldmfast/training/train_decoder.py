"""Stage 1b: sharpen a finished autoencoder's decoder while its latents stay as they are.

It can run beside the denoiser's training, which reads the same latents, and after it: a denoiser stays valid.
"""

import json
from pathlib import Path

from ldmfast.data.collection import load_pictures
from ldmfast.training import checkpoint
from ldmfast.training.autoencoder_loss import Objective
from ldmfast.training.loop import Run, fit
from ldmfast.training.train_autoencoder import SHOWN, encode_all, load, sample_of, score, sheet


class Decoder(Objective):
    """The half of a first stage that is trained here, and its loss; a codebook goes along, frozen."""

    def __init__(self, vae, config):
        super().__init__(config, vae.config.sample_size)
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder
        if hasattr(vae, "quantize"):
            self.quantize = vae.quantize.requires_grad_(False)
        self.decode = vae.decode

    def phases(self):
        return super().phases([*self.post_quant_conv.parameters(), *self.decoder.parameters()])


def loss_of(model, pictures, mean, std, config):
    """The step's losses as a function of the Draw that the batch and the latent noise come from.   model  Decoder"""

    def step(draw):
        index = draw.integers(len(pictures))
        noise, extra = draw.normal(*mean.shape[1:]), draw.normal(*mean.shape[1:])
        z = mean[index].to(draw.device) + std[index].to(draw.device) * noise + config.latent_noise * extra
        x = pictures.batch(index).to(draw.device)
        return model.judge(x, model.decode(z).sample, 0.0, model.decoder.conv_out.weight, draw)

    return step


def train(data, autoencoder, folder, config, *, restart=False, quiet=False):
    """Train on the folder `data` and write `folder`/vae. Returns the metrics."""
    vae = load(autoencoder)
    pictures = load_pictures(data, vae.config.sample_size, split="train")
    mean, std = encode_all(vae, pictures)
    Path(folder).mkdir(parents=True, exist_ok=True)
    model = Decoder(vae, config)
    run = Run(model, config, phases=model.phases())
    step = loss_of(run.model, pictures, mean, std, config)
    some = slice(0, SHOWN)
    history = fit(
        run,
        step,
        Path(folder, "decoder.pt"),
        restart=restart,
        quiet=quiet,
        sample=lambda: sheet(pictures.batch(some), run.model.decode(mean[some].to(run.device)).sample),
    )
    run.finish().cpu()
    if not run.main:
        return {"loss": history}
    metrics = {
        "trained": score(vae, sample_of(pictures, 512, config.seed)),
        "perceptual": model.perceptual.name if model.perceptual is not None else "none",
        "adversarial": config.adversarial,
        "discriminator_features": config.discriminator_features if config.adversarial else "none",
        "steps": config.steps,
        "loss": history,
    }
    vae = vae.half() if config.export == "fp16" else vae
    checkpoint.replace_folder(Path(folder, "vae"), vae.save_pretrained)
    checkpoint.write_text(Path(folder, "decoder.json"), json.dumps(metrics, indent=1))
    return metrics
