"""Stage 1: train the first stage, KL or VQ, then standardise its latents and export it in diffusers' layout."""

import json
from pathlib import Path

import torch

from ldmfast import shipped
from ldmfast.data.collection import Pictures, load_pictures
from ldmfast.models import AutoencoderKL, VQModel
from ldmfast.pictures import grid, to_pil
from ldmfast.training import checkpoint, codebook, losses
from ldmfast.training.autoencoder_loss import FirstStage
from ldmfast.training.loop import Run, fit

SHOWN = 8  # pictures of a sample grid


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


def load(folder):
    """The vae/ that a stage 1 wrote, or of a shipped model by its name, float32.

    Raises FileNotFoundError naming the command that makes it.
    """
    home = shipped.locate(folder) / "vae"
    if not (home / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no vae/; train it first: ldmfast train autoencoder --output {folder}")
    name = json.loads((home / "config.json").read_text())["_class_name"]
    family = VQModel if name == "VQModel" else AutoencoderKL
    return family.from_pretrained(home, torch_dtype=torch.float32).eval()


def loss_of(model, pictures, config, books=()):
    """The step's losses as a function of the Draw that the batch and the latent noise come from.

    model   FirstStage
    books   where a VQ model's dead codes are re-seeded: the codebook and its average
    """

    def step(draw):
        x = pictures.batch(draw.integers(len(pictures)))
        x = torch.where(draw.uniform(1, 1, 1) < 0.5, x.flip(-1), x)
        if config.crop:
            x = _cropped(x, config.crop, draw)
        x = x.to(draw.device)
        return model.losses_of(x, draw, books() if callable(books) else list(books))

    return step


def _cropped(x, side, draw):
    """A square of `side` pixels at a random place of each picture [N, 3, H, W]."""
    tops, lefts = (draw.integers(length - side + 1).tolist() for length in x.shape[2:])
    parts = [p[:, top : top + side, left : left + side] for p, top, left in zip(x, tops, lefts, strict=True)]
    return torch.stack(parts)


@torch.no_grad()
def encode_all(model, pictures, batch=64):
    """Posterior mean and standard deviation of every picture: two float32 [N, z, h, w], not scaled.

    A VQModel's are its latents before the codebook, and 0.
    """
    if isinstance(model, VQModel):
        mean = torch.cat([model.encode(pictures.batch(slice(i, i + batch))).latents for i in _starts(pictures, batch)])
        return mean, torch.zeros_like(mean)
    parts = [model.encode(pictures.batch(slice(i, i + batch))).latent_dist for i in _starts(pictures, batch)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


def _starts(pictures, batch):
    return range(0, len(pictures), batch)


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


@torch.no_grad()
def score(model, pictures, batch=64, scorer=None):
    """Mean PSNR (dB) and SSIM of the reconstructions, the `scorer`'s distance, and how a codebook is used.

    scorer  a distance of training/perceptual.py, reported under its name; None leaves it out
    """
    found, counts = [], 0
    for i in _starts(pictures, batch):
        x = pictures.batch(slice(i, i + batch))
        y, index = reconstruct(model, x)
        found.append(torch.stack([losses.psnr(y, x), losses.ssim(y, x), *([scorer(x, y)] if scorer else [])]))
        counts = counts + torch.bincount(index, minlength=model.quantize.n_e) if index is not None else counts
    values = torch.cat(found, dim=1).mean(dim=1).tolist()
    report = {"psnr": round(values[0], 2), "ssim": round(values[1], 4)}
    if scorer:
        report[scorer.name] = round(values[2], 4)
    if isinstance(model, VQModel):
        report |= {name: round(value, 4) for name, value in codebook.use(counts).items()}
    return report


@torch.no_grad()
def reconstruct(model, x):
    """(reconstructions of x [N, 3, H, W] clamped to [-1, 1], indices of the codes [N h w] or None)."""
    if isinstance(model, VQModel):
        codes, _, index = model.quantise(model.encode(x).latents)
        return model.decode_quantised(codes).clamp(-1, 1), index
    return model.decode(model.encode(x).latent_dist.mode()).sample.clamp(-1, 1), None


def sheet(pictures, decoded):
    """A PIL picture: the pictures [N, 3, H, W] in a row above what was made of them."""
    return grid(to_pil(torch.cat([pictures, decoded.cpu()])), len(pictures))


def sample_of(pictures, count, seed):
    """At most `count` of the pictures, drawn at random: enough for a mean."""
    keep = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return Pictures(pictures.pixels[keep], tuple(pictures.rows[i] for i in keep.tolist()))


def books_of(run):
    """The codebook [K, c] and its average, where a run of a VQModel keeps them; [] for a KL model."""
    if run.model.codebook is None:
        return []
    weight = run.model.vae.quantize.embedding.weight
    place = next(i for i, parameter in enumerate(run.average) if parameter is weight)
    return [weight.data, run.ema.shadow_params[place]]


def train(data, folder, config, *, restart=False, quiet=False):
    """Train on the folder `data`, write checkpoints and the finished `vae/` to `folder`. Returns the metrics."""
    pictures = load_pictures(data, config.size, split="train")
    Path(folder).mkdir(parents=True, exist_ok=True)
    stage = FirstStage(build(config), config)
    run = Run(stage, config, phases=stage.phases())
    step = loss_of(stage, pictures, config, lambda: books_of(run))
    shown = sample_of(pictures, SHOWN, config.seed).batch(slice(None))
    history = fit(
        run,
        step,
        Path(folder, "autoencoder.pt"),
        restart=restart,
        quiet=quiet,
        sample=lambda: sheet(shown, reconstruct(stage.vae, shown.to(run.device))[0]),
    )
    model = run.finish().vae.cpu()
    if not run.main:
        return {"loss": history}
    pictures = sample_of(pictures, 512, config.seed)
    latents, _ = encode_all(model, pictures)
    standardise(model, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
    metrics = {
        "trained": score(model, pictures),
        "perceptual": stage.perceptual.name if stage.perceptual is not None else "none",
        "adversarial": config.adversarial,
        "discriminator_features": config.discriminator_features if config.adversarial else "none",
        "steps": config.steps,
        "loss": history,
    }
    model = model.half() if config.export == "fp16" else model
    checkpoint.replace_folder(Path(folder, "vae"), model.save_pretrained)
    checkpoint.write_text(Path(folder, "autoencoder.json"), json.dumps(metrics, indent=1))
    return metrics
