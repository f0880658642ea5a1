"""Stage 1: train the autoencoder, then standardise its latents and export it in diffusers' layout."""

import json
from pathlib import Path

import torch

from ldmfast.models import AutoencoderKL
from ldmfast.training import checkpoint, losses
from ldmfast.training.data import Pictures, load_pictures
from ldmfast.training.loop import Run, fit


def build(config):
    """A fresh AutoencoderKL: one halving fewer than config.channels has entries (three entries: f = 4)."""
    torch.manual_seed(config.seed)
    n = len(config.channels)
    model = AutoencoderKL(
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
    with torch.no_grad():
        model.quant_conv.bias[config.latent_channels :] = -6.0  # log variance: no noise drowns the first steps
    return model


def load(folder):
    """The vae/ that a stage 1 wrote, float32. Raises FileNotFoundError naming the command that makes it."""
    home = Path(folder, "vae")
    if not (home / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no vae/; train it first: ldmfast train autoencoder --output {folder}")
    return AutoencoderKL.from_pretrained(home, torch_dtype=torch.float32).eval()


def loss_of(model, pictures, config):
    """The step's loss as a function of the Draw that the batch and the latent noise come from."""

    def step(draw):
        x = pictures.batch(draw.integers(len(pictures)))
        x = torch.where(draw.uniform(1, 1, 1) < 0.5, x.flip(-1), x).to(draw.device)
        posterior = model.encode(x).latent_dist
        noise = draw.normal(*posterior.mean.shape[1:])
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        kl = config.kl_weight * losses.kl(posterior)
        return kl + losses.reconstruction(x, decoded, ssim_weight=config.ssim_weight)

    return step


@torch.no_grad()
def encode_all(model, pictures, batch=64):
    """Posterior mean and standard deviation of every picture: two float32 [N, z, h, w]."""
    parts = [model.encode(pictures.batch(slice(i, i + batch))).latent_dist for i in range(0, len(pictures), batch)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


@torch.no_grad()
def standardise(model, mean, std):
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
def score(model, pictures, batch=64):
    """Mean PSNR (dB) and SSIM of the reconstructions."""
    found = []
    for i in range(0, len(pictures), batch):
        x = pictures.batch(slice(i, i + batch))
        y = model.decode(model.encode(x).latent_dist.mode()).sample.clamp(-1, 1)
        found.append(torch.stack([losses.psnr(y, x), losses.ssim(y, x)]))
    psnr, ssim = torch.cat(found, dim=1).mean(dim=1).tolist()
    return {"psnr": round(psnr, 2), "ssim": round(ssim, 4)}


def sample_of(pictures, count, seed):
    """At most `count` of the pictures, drawn at random: enough for a mean."""
    keep = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return Pictures(pictures.pixels[keep], tuple(pictures.rows[i] for i in keep.tolist()))


def train(data, folder, config, *, restart=False, quiet=False):
    """Train on the folder `data`, write checkpoints and the finished `vae/` to `folder`. Returns the metrics."""
    pictures = load_pictures(data, config.size, split="train")
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = Run(build(config), config)
    step = loss_of(run.model, pictures, config)
    history = fit(run, step, Path(folder, "autoencoder.pt"), restart=restart, quiet=quiet)
    model = run.finish().cpu()
    if not run.main:
        return {"loss": history}
    pictures = sample_of(pictures, 512, config.seed)
    latents, _ = encode_all(model, pictures)
    standardise(model, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
    metrics = {"trained": score(model, pictures), "loss": history}
    model = model.half() if config.export == "fp16" else model
    checkpoint.replace_folder(Path(folder, "vae"), model.save_pretrained)
    Path(folder, "autoencoder.json").write_text(json.dumps(metrics, indent=1))
    return metrics
