"""The study: one denoiser on pixels and on latents of 4, 8 and 16 times smaller sides, each for the same time.

What Rombach et al. 2022 claim in sections 4.1 and 4.2, at a size that a laptop trains: a latent saves compute, f = 4
and 8 are the sweet spot, and the first stage caps the detail. `run` trains and measures, `claims` reads the table.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ldmfast.conditioning.text import TextEncoder
from ldmfast.data.collection import load_pictures
from ldmfast.diffusion import sampling
from ldmfast.diffusion.schedule import make_scheduler
from ldmfast.evaluation.samples import features as small_picture
from ldmfast.metrics import features, sets
from ldmfast.models.encode_decode import decode_latents, encode_pictures
from ldmfast.pictures import grid, to_pil
from ldmfast.study import cost
from ldmfast.training import checkpoint, condition_sources, latents, parallel, train_autoencoder, train_denoiser
from ldmfast.training.config import AutoencoderConfig, DenoiserConfig
from ldmfast.training.loop import Run, optimize

LATENT_CHANNELS = {4: 3, 8: 4, 16: 16}  # of the released kl-f4, kl-f8, kl-f16
WIDTHS = (32, 64, 96, 96, 128)


@dataclass(frozen=True)
class StudyConfig:
    """How long and how large; `QUICK` takes under half an hour of two CPU cores."""

    factors: tuple = (1, 4, 8, 16)
    size: int = 64  # pixels a side
    first_stage_steps: int = 400
    seconds: float = 120.0  # of training the denoiser, evaluation not counted
    points: int = 3  # evaluations in that time
    batch: int = 16
    samples: int = 48
    steps: int = 12  # of the sampler
    channels: tuple = (32, 64, 96)
    feature_side: int = 128  # pixels that pictures are resized to for the scoring network
    memory: int = 24 << 30  # bytes that the largest batch must fit
    seed: int = 0


QUICK = StudyConfig()
FULL = replace(QUICK, first_stage_steps=5000, seconds=3600.0, points=12, batch=32, samples=512, steps=25)


class Reference:
    """The real pictures, their features, and what the samples are asked for."""

    def __init__(self, data, config):
        self.pictures = load_pictures(data, config.size, split="train", captions=True)
        self.some = train_autoencoder.sample_of(self.pictures, 512, config.seed)
        self.side = config.feature_side
        self.features = self.of(self.some.batch(slice(None)))
        asked = train_autoencoder.sample_of(self.pictures, config.samples, config.seed + 1).rows
        self.prompts = [row["text"] for row in asked]
        self.label = "object" if all("object" in row for row in self.pictures.rows) else "text"
        self.wanted = [row[self.label] for row in asked]

    def of(self, pictures):
        return features.features(pictures.clamp(-1, 1), side=self.side)

    def score(self, drawn):
        """KID against the real pictures, and retrieval of what was asked for.   drawn [N, 3, H, W]"""
        pixels = ((drawn.clamp(-1, 1) + 1) * 127.5).round()
        labels = [row[self.label] for row in self.some.rows]
        near = sets.retrieval(small_picture(pixels), small_picture(self.some.pixels), self.wanted, labels, ranks=(1, 5))
        return {"kid": sets.kid(self.features, self.of(drawn)), **near}


def run(data, folder, config=QUICK, *, first_stages=None, quiet=False) -> dict:
    """Train and measure every f on the collection `data`; write study.json to `folder`. Returns what it holds.

    first_stages  a folder with f4/, f8/, ... that `ldmfast train autoencoder` wrote, in place of training them
    A finished f is kept in `folder` and not repeated. Raises ValueError if it belongs to another configuration, other
    data or other first stages.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    reference, encoder = Reference(data, config), TextEncoder.from_pretrained()
    rows, origin = [], {"data": str(Path(data).resolve()), "first_stages": first_stages and str(first_stages)}
    for f in config.factors:
        vae = lambda f=f: None if f == 1 else first_stage(f, data, folder, config, first_stages, quiet)  # noqa: E731
        make = lambda f=f, vae=vae: row(f, vae(), folder, config, reference, encoder, quiet)  # noqa: E731
        rows.append(_kept(folder / f"f{f}.json", {**_plain(config), **origin}, make))
    report = {"config": _plain(config), "features": features.NAME, "rows": rows, "claims": claims(rows)}
    _write(folder / "study.json", report)
    return report


def _kept(path, study, make):
    """The row in `path`, or one that is made and written there.   study  what it belongs to"""
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["config"] != study:
            raise ValueError(f"{path} is a row of another study; remove it, or name another folder")
        return kept["row"]
    made = make()
    _write(path, {"config": study, "row": made})
    return made


def _plain(config):
    return json.loads(json.dumps(asdict(config)))


def _write(path, value):
    checkpoint.write_text(path, json.dumps(value, indent=1))


def row(f, vae, folder, config, reference, encoder, quiet) -> dict:
    """Everything that the table says of one f.   vae  its first stage; None for pixels"""
    found = {"f": f, "reconstruction": reconstruction(vae, reference)}
    settings = DenoiserConfig(
        batch=config.batch,
        channels=config.channels,
        attention=(0,) + (1,) * (len(config.channels) - 1),
        groups=8,
        prediction="v_prediction",
        min_snr=0.0,
        learning_rate=1e-3,
        warmup=20,
        precision="fp32",
        seed=config.seed,
        steps=10**9,
        plain_captions=1.0,
        head_width=min(32, *config.channels),
    )
    codes = encode(reference.pictures, vae, settings)
    descriptions = condition_sources.gather(encoder, [row["texts"][:1] for row in reference.pictures.rows])
    unet = train_denoiser.network(settings, codes.shape, encoder)
    context = descriptions.conditions.context.shape[1:]
    found["parameters"] = sum(p.numel() for p in unet.parameters())
    found["gflop"] = cost.step_flops(unet, codes.shape, context) / 1e9
    found |= learn(unet, codes, descriptions, settings, config, vae, encoder, reference, folder / f"f{f}.png", quiet)
    found["largest_batch"] = cost.largest_batch(unet, found["activation_bytes"], config.memory)
    return found


def first_stage(f, data, folder, config, given, quiet):
    """The AutoencoderKL of that f: read from `given`/f4, ..., else trained in `folder`/f4."""
    home = Path(given or folder, f"f{f}")
    if not (home / "vae" / "config.json").is_file():
        if given:
            raise FileNotFoundError(f"{home} holds no vae/; train it: ldmfast train autoencoder --output {home}")
        levels = f.bit_length()
        settings = AutoencoderConfig(
            steps=config.first_stage_steps,
            size=config.size,
            channels=WIDTHS[:levels],
            precision="fp32",
            latent_channels=LATENT_CHANNELS[f],
            seed=config.seed,
            export="fp32",
        )
        train_autoencoder.train(data, home, settings, quiet=quiet)
    return train_autoencoder.load(home)


@torch.no_grad()
def reconstruction(vae, reference) -> dict:
    """PSNR, SSIM and KID of pictures that went through the first stage and back; of pixels, the ends of the scales."""
    if vae is None:
        return {"psnr": None, "ssim": 1.0, "kid": 0.0}
    x = reference.some.batch(slice(None))
    y = torch.cat([decode_latents(vae, encode_pictures(vae, part)) for part in x.split(32)])
    scores = train_autoencoder.score(vae, reference.some)
    return {"psnr": scores["psnr"], "ssim": scores["ssim"], "kid": sets.kid(reference.features, reference.of(y))}


def encode(pictures, vae, settings):
    """Every picture's latent; without a first stage its pixels, which are their own latents."""
    if vae is None:
        pixels = pictures.batch(slice(None))
        return latents.Latents(pixels, torch.zeros(()).expand_as(pixels))
    return latents.prepare(pictures, vae, accelerator=parallel.start(settings))


def learn(unet, codes, descriptions, settings, config, vae, encoder, reference, sheet, quiet) -> dict:
    """Train for config.seconds, scoring samples `points` times on the way."""
    training = Run(unet, settings)
    loss_of = train_denoiser.loss_of(unet, codes, descriptions, settings)
    unet.train()
    with cost.kept_for_backward(unet) as kept:
        loss = loss_of(next(iter(training.draws())))
        activations = kept() // config.batch
        del loss
    times, points, spent = [], [], 0.0
    optimize(training, loss_of)  # the first step allocates
    with tqdm(total=round(config.seconds), unit="s", desc=sheet.stem, disable=quiet) as bar:
        for point in range(1, config.points + 1):
            while spent < config.seconds * point / config.points:
                start = time.perf_counter()
                optimize(training, loss_of)
                times.append(time.perf_counter() - start)
                spent += times[-1]
                bar.update(min(round(spent), bar.total) - bar.n)
            with training.averaged():
                drawn = draw(unet, codes.shape, encoder, reference.prompts, vae, config)
            points.append({"seconds": spent, "steps": len(times), **reference.score(drawn)})
    grid(to_pil(drawn[:16]), 8, 1).save(sheet)
    ms = 1000 * statistics.median(times)
    return {"ms": ms, "samples_per_second": 1000 * config.batch / ms, "activation_bytes": activations, "points": points}


@torch.no_grad()
def draw(unet, shape, encoder, prompts, vae, config, batch=16):
    """Pictures [N, 3, H, W] in [-1, 1] for the prompts, without guidance; the same noise at every call."""
    scheduler = make_scheduler(DenoiserConfig.beta_start, DenoiserConfig.beta_end, "v_prediction")
    drawn = []
    for i in range(0, len(prompts), batch):
        condition = encoder(prompts[i : i + batch])
        seeds = range(i, i + len(condition))
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        times = sampling.begin_at(scheduler, config.steps, 0)
        z = sampling.sample(lambda x, t, c=condition: c.predict(unet, x, t), x, scheduler, times)
        drawn.append(z if vae is None else decode_latents(vae, z))
    return torch.cat(drawn).float().clamp(-1, 1)


def claims(rows) -> list[dict]:
    """What the table says to each claim: {"claim", "held", "figures"}."""
    by_f = {row["f"]: row for row in rows}
    latent = sorted(f for f in by_f if f > 1)
    last = {f: row["points"][-1]["kid"] for f, row in by_f.items()}
    best = min(last, key=last.get)
    found = []

    def claim(text, held, values):
        figures = ", ".join(f"f = {f}: {value:.4g}" for f, value in values.items())
        found.append({"claim": text, "held": bool(held), "figures": figures})

    def falls(values):
        ordered = [values[f] for f in sorted(values)]
        return all(a > b for a, b in zip(ordered, ordered[1:], strict=False))

    flops, ms = ({f: by_f[f][key] for f in sorted(by_f)} for key in ("gflop", "ms"))
    claim("A latent saves operations: GFLOP a sample and step fall with f", falls(flops), flops)
    claim("A latent saves time: ms a step fall with f", falls(ms), ms)
    fits = {f: by_f[f]["largest_batch"] for f in sorted(by_f)}
    claim("A latent saves memory: the largest batch grows with f", falls({-f: n for f, n in fits.items()}), fits)
    claim("f = 4 or 8 is the sweet spot: the lowest KID after the same time", best in (4, 8), last)
    if 1 in by_f and latent:
        held = all(last[f] < last[1] for f in latent if f in (4, 8))
        claim("f = 4 and 8 beat pixels after the same time (KID)", held, last)
    psnr = {f: by_f[f]["reconstruction"]["psnr"] for f in latent}
    claim("The first stage caps the detail: PSNR of reconstructions falls with f", falls(psnr), psnr)
    return found
