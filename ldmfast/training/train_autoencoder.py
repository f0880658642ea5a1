"""Stage 1: train the autoencoder, KL or VQ, then standardise its latents and export it in diffusers' layout."""

import json
from pathlib import Path

import torch

from ldmfast import files
from ldmfast.data.collection import CACHE, load_pictures
from ldmfast.metrics.reconstruction import reconstruct, score
from ldmfast.models import AutoencoderKL, VQModel
from ldmfast.pictures import grid, to_pil
from ldmfast.pipeline import saved_autoencoder
from ldmfast.training import checkpoint, latents
from ldmfast.training.first_weights import grown, linear_start
from ldmfast.training.loop import fit
from ldmfast.training.losses.autoencoder_loss import AutoencoderLoss
from ldmfast.training.run import Run

SHOWN = 8  # pictures of a sample grid
SCORED = 512  # pictures that the figures are means over
STARTED = 512 * 64**2  # pixels that first weights are fitted on, of at least 32 pictures


def build(config):
    """A fresh AutoencoderKL or VQModel: one halving fewer than config.channels has entries (three entries: f = 4)."""
    torch.manual_seed(config.seed)
    n = len(config.channels)
    shared = dict(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        block_out_channels=tuple(config.channels),
        layers_per_block=config.layers,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
        sample_size=config.size,
        scaling_factor=1.0,
        force_upcast=False,
    )
    model = _model(shared, config)
    if config.start == "unit":
        _unit_gain(model)
    if config.family == "kl":
        with torch.no_grad():  # log variance: no noise drowns the first steps
            model.quant_conv.bias[config.latent_channels :] = -6.0
    return model


def _model(shared, config):
    if config.family == "vq":
        model = VQModel(**shared, num_vq_embeddings=config.codebook)
        # diffusers keeps an old slip by default, which weighs the codebook's term in place of the commitment
        model.quantize.legacy, model.quantize.beta = False, config.commitment
        return model
    return AutoencoderKL(**shared)


@torch.no_grad()
def _unit_gain(model):
    """Convolutions that neither shrink nor shift what passes through them, with quiet residual branches.

    torch's own shrink it by sqrt(3) a layer beside biases that do not shrink, so that a deep decoder begins by drawing
    one picture whatever the latent, and takes hundreds of steps to notice it.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            gain = 0.2 if name.endswith("conv2") else 1.0
            module.weight.normal_(0, gain / fan_in**0.5)
            module.bias.zero_()


def loss_of(model, pictures, config, books=()):
    """The losses of a Step, a generator of one for each phase: they draw its batch and its latent noise.

    model   AutoencoderLoss
    books   where a VQ model's dead codes are re-seeded: the codebook and its average
    """

    def losses(step):
        x = pictures.batch(step.integers(len(pictures)))
        x = torch.where(step.uniform(1, 1, 1) < 0.5, x.flip(-1), x)
        if config.crop:
            x = _cropped(x, config.crop, step)
        return model.losses_of(x.to(step.device), step, books)

    return losses


def _cropped(x, side, step):
    """A square of `side` pixels at a random place of each picture [N, 3, H, W]."""
    tops, lefts = (step.integers(length - side + 1).tolist() for length in x.shape[2:])
    parts = [p[:, top : top + side, left : left + side] for p, top, left in zip(x, tops, lefts, strict=True)]
    return torch.stack(parts)


@torch.no_grad()
def standardise(model, mean, std):
    """Make the latents of mean 0 and deviation 1 for a denoiser; a VQModel's only of deviation 1 over all channels.

    Its distances to the codes would not survive a scale a channel, so it keeps one number: scaling_factor.
    mean, std [z]
    """
    if isinstance(model, VQModel):
        variance = std.square().mean() + mean.var(unbiased=False)  # of all values together
        model.register_to_config(scaling_factor=1 / variance.sqrt().item())
    else:
        _standardise_posterior(model, mean, std)


def _standardise_posterior(model, mean, std):
    """Fold z -> (z - mean) / std, one pair a channel, into the 1x1 convolutions on either side of the latent.

    The pictures stay the same; the latents get mean 0 and deviation 1, so that scaling_factor is 1 and no channel
    drowns in the noise that suits another.   mean, std [z]
    """
    z = len(mean)
    quant, post = model.quant_conv, model.post_quant_conv
    quant.weight[:z] /= std.view(-1, 1, 1, 1)
    quant.bias[:z] = (quant.bias[:z] - mean) / std
    quant.bias[z:] -= 2 * std.log()  # the second half is the log variance
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std.view(1, -1, 1, 1)


def sheet(pictures, decoded):
    """A PIL picture: the pictures [N, 3, H, W] in a row above what was made of them."""
    return grid(to_pil(torch.cat([pictures, decoded.cpu()])), len(pictures))


def books_of(run):
    """The codebook [K, c] and its average, where a run of a VQModel keeps them; [] for a KL model."""
    if run.model.codebook is None:
        return []
    weight = run.model.vae.quantize.embedding.weight
    return [weight.data, run.average_of(weight)]


def train(data, folder, config, *, restart=False, quiet=False):
    """Train on the folder `data`, write checkpoints and the finished `vae/` to `folder`. Returns the metrics."""
    pictures = load_pictures(
        data, config.size, split="train", skip_broken=config.skip_broken, cache=Path(folder, CACHE)
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    vae = build(config)
    some = pictures.sample(SCORED, config.seed)
    few = slice(max(32, STARTED // config.size**2))
    if config.start == "linear":
        linear_start.begin(vae, some.batch(few))
    grew_from = saved_autoencoder.load(config.first_weights) if config.start == "grown" else None
    if grew_from is not None:
        grown.begin(vae, grew_from, some.batch(few))
    model = AutoencoderLoss(vae, config, grew_from)
    run = Run(model, config, phases=model.phases())
    shown = pictures.sample(SHOWN, config.seed).batch(slice(None))
    history = fit(
        run,
        loss_of(model, pictures, config, books_of(run)),
        Path(folder, "autoencoder.pt"),
        restart=restart,
        quiet=quiet,
        sample=lambda: sheet(shown, reconstruct(model.vae, shown.to(run.device))[0]),
    )
    vae = run.finish().vae.cpu()
    if not run.main:
        return {"loss": history}
    mean, _ = latents.encode(some, vae)
    mean, std = mean.mean(dim=(0, 2, 3)), mean.std(dim=(0, 2, 3))
    if grew_from is not None:  # denoisers know the latents of the model that it grew from
        mean[: grew_from.config.latent_channels], std[: grew_from.config.latent_channels] = 0, 1
    standardise(vae, mean, std)
    return write_autoencoder(folder, "autoencoder", vae, model, pictures, history)


def write_autoencoder(folder, stage, vae, loss, pictures, history):
    """Write vae/ and the figures in `stage`.json; returns the figures.

    loss      the PictureLoss that it was trained with;   history  as `fit` returns it
    pictures  those that it was trained on
    """
    config = loss.config
    figures = {
        "trained": score(vae, pictures.sample(SCORED, config.seed)),
        **loss.networks(),
        "steps": config.steps,
        "loss": history,
    }
    vae = vae.half() if config.export == "fp16" else vae
    checkpoint.replace_folder(Path(folder, "vae"), vae.save_pretrained)
    files.write_text(Path(folder, f"{stage}.json"), json.dumps(figures, indent=1))
    return figures
