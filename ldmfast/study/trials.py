"""The study: one denoiser on pixels and on latents of 4, 8 and 16 times smaller sides, each for the same time.

What Rombach et al. 2022 claim in sections 4.1 and 4.2, at a size that a laptop trains: a latent saves compute, f = 4
and 8 are the sweet spot, and the autoencoder caps the detail. `run` makes a `Trial` of every f; claims.py reads the
rows.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ldmfast import files
from ldmfast.conditioning.text import TextEncoder
from ldmfast.diffusion import sampling
from ldmfast.diffusion.schedule import make_scheduler
from ldmfast.metrics import features, sets
from ldmfast.metrics.columns import COLUMNS
from ldmfast.metrics.reconstruction import COMPARED, score
from ldmfast.models import AutoencoderKL
from ldmfast.models.encode_decode import decode_latents, encode_pictures
from ldmfast.pictures import grid, to_pil
from ldmfast.pipeline import saved_autoencoder
from ldmfast.study import cost
from ldmfast.study.claims import claims
from ldmfast.study.reference import Reference
from ldmfast.training import condition_sources, latents, parallel, train_autoencoder, train_denoiser
from ldmfast.training.config import AutoencoderConfig, DenoiserConfig
from ldmfast.training.loop import train_step
from ldmfast.training.run import Run

LATENT_CHANNELS = {4: 3, 8: 4, 16: 16}  # of the released kl-f4, kl-f8, kl-f16
WIDTHS = (32, 64, 96, 96, 128)
SHOWN = 16  # samples of a sheet, and of a batch


@dataclass(frozen=True)
class StudyConfig:
    """How long and how large; `QUICK` takes under half an hour of two CPU cores."""

    factors: tuple = (1, 4, 8, 16)
    size: int = 64  # pixels a side
    autoencoder_steps: int = 400
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
FULL = replace(QUICK, autoencoder_steps=5000, seconds=3600.0, points=12, batch=32, samples=512, steps=25)


@dataclass(frozen=True)
class Trial:
    """The denoiser on the latents of one f.   vae  None where f = 1: pixels are their own latents"""

    f: int
    vae: AutoencoderKL | None
    encoder: TextEncoder
    reference: Reference
    config: StudyConfig

    def run(self, folder, quiet) -> dict:
        """Everything that the table says of this f; a sheet of samples is written to `folder`/f<f>.png."""
        codes, source = self.codes(), self.source()
        unet = train_denoiser.network(self.settings, codes.shape, self.encoder)
        context = source.conditions.context.shape[1:]
        found = {
            "f": self.f,
            "reconstruction": self.reconstruction(),
            "parameters": sum(p.numel() for p in unet.parameters()),
            "gflop": cost.step_flops(unet, codes.shape, context) / 1e9,
        }
        loss = train_denoiser.loss_of(unet, codes, source, self.settings)
        found |= self.learn(Run(unet, self.settings), loss, codes.shape, folder / f"f{self.f}.png", quiet)
        found["largest_batch"] = cost.largest_batch(unet, found["activation_bytes"], self.config.memory)
        return found

    @property
    def settings(self) -> DenoiserConfig:
        """Of the training; how many steps it takes is the clock's to say, and a constant rate does not ask."""
        c = self.config
        return DenoiserConfig(
            batch=c.batch,
            channels=c.channels,
            attention=(0,) + (1,) * (len(c.channels) - 1),
            groups=8,
            prediction="v_prediction",
            min_snr=0.0,
            learning_rate=1e-3,
            schedule="constant_with_warmup",
            warmup=20,
            precision="fp32",
            seed=c.seed,
            plain_captions=1.0,
            head_width=min(32, *c.channels),
        )

    def codes(self) -> latents.Latents:
        """The latents of every picture."""
        if self.vae is None:
            pixels = self.reference.pictures.batch(slice(None))
            return latents.Latents(pixels, torch.zeros(()).expand_as(pixels))
        return latents.prepare(self.reference.pictures, self.vae, accelerator=parallel.start(self.settings))

    def source(self) -> condition_sources.InputSource:
        """Every picture's plain caption."""
        described = [row["texts"][:1] for row in self.reference.pictures.rows]
        return condition_sources.gather(self.encoder, described, self.settings)

    @torch.no_grad()
    def reconstruction(self) -> dict:
        """PSNR, SSIM and KID of pictures that went to latents and back."""
        if self.vae is None:
            return {name: COLUMNS[name].perfect for name in (*COMPARED, "kid")}
        parts = self.reference.some.batch(slice(None)).split(32)
        back = torch.cat([decode_latents(self.vae, encode_pictures(self.vae, x)) for x in parts])
        scores = score(self.vae, self.reference.some)
        kid = sets.kid(self.reference.features, self.reference.of(back))
        return {name: scores[name] for name in COMPARED} | {"kid": kid}

    def learn(self, training, loss, shape, sheet, quiet) -> dict:
        """Train for config.seconds, scoring samples `points` times on the way.   shape (z, h, w);  sheet  a path"""
        config, unet = self.config, training.model.train()
        activations = _activation_bytes(training, loss)
        times, points, spent = [], [], 0.0
        train_step(training, loss)  # the first step allocates
        with tqdm(total=round(config.seconds), unit="s", desc=f"f{self.f}", disable=quiet) as bar:
            for point in range(1, config.points + 1):
                while spent < config.seconds * point / config.points:
                    times.append(_seconds(train_step, training, loss))
                    spent += times[-1]
                    bar.update(min(round(spent), bar.total) - bar.n)
                with training.averaged():
                    samples = self.sample_pictures(unet, shape)
                points.append({"seconds": spent, "steps": len(times), **self.reference.score(samples)})
        grid(to_pil(samples[:SHOWN]), 8, 1).save(sheet)
        ms = 1000 * statistics.median(times)
        speed = {"ms": ms, "samples_per_second": 1000 * config.batch / ms}
        return {**speed, "activation_bytes": activations, "points": points}

    @torch.no_grad()
    def sample_pictures(self, unet, shape):
        """Pictures [N, 3, H, W] in [-1, 1] for the prompts, without guidance; the same noise at every call."""
        scheduler = make_scheduler(DenoiserConfig.beta_start, DenoiserConfig.beta_end, "v_prediction")
        prompts, pictures = self.reference.prompts, []
        for first in range(0, len(prompts), SHOWN):
            condition = self.encoder(prompts[first : first + SHOWN])
            seeds = range(first, first + len(condition))
            x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
            times = sampling.begin_at(scheduler, self.config.steps, 0)
            z = sampling.sample(lambda x, t, c=condition: c.predict(unet, x, t), x, scheduler, times)
            pictures.append(z if self.vae is None else decode_latents(self.vae, z))
        return torch.cat(pictures).float().clamp(-1, 1)


def _activation_bytes(training, loss):
    """What the backward pass of one sample needs."""
    with cost.kept_for_backward(training.model) as kept:
        value = loss(next(iter(training.micro_batches())))
        found = kept() // training.config.batch
        del value
    return found


def _seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def run(data, folder, config=QUICK, *, autoencoders=None, quiet=False) -> dict:
    """Train and measure every f on the collection `data`; write study.json to `folder`. Returns what it holds.

    autoencoders  a folder with f4/, f8/, ... that `ldmfast train autoencoder` wrote, in place of training them
    A finished f is kept in `folder` and not repeated. Raises ValueError if it belongs to another configuration, other
    data or other autoencoders.
    """
    folder, rows = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    reference, encoder = Reference(data, config), TextEncoder.from_pretrained()
    made_from = {"data": str(Path(data).resolve()), "autoencoders": autoencoders and str(autoencoders)}
    study = {**_plain(config), **made_from}
    for f in config.factors:
        path = folder / f"f{f}.json"
        row = _finished(path, study)
        if row is None:
            vae = None if f == 1 else _autoencoder(f, data, folder, config, autoencoders, quiet)
            row = Trial(f, vae, encoder, reference, config).run(folder, quiet)
            _write(path, {"config": study, "row": row})
        rows.append(row)
    report = {"config": _plain(config), "features": features.NAME, "rows": rows, "claims": claims(rows)}
    _write(folder / "study.json", report)
    return report


def _finished(path, study):
    """The row in `path`, None if there is none yet.   study  what it must belong to"""
    if not path.is_file():
        return None
    kept = json.loads(path.read_text())
    if kept["config"] != study:
        raise ValueError(f"{path} is a row of another study; remove it, or name another folder")
    return kept["row"]


def _plain(config):
    return json.loads(json.dumps(asdict(config)))


def _write(path, value):
    files.write_text(path, json.dumps(value, indent=1))


def _autoencoder(f, data, folder, config, given, quiet):
    """The AutoencoderKL of that f: read from `given`/f4, ..., else trained in `folder`/f4."""
    home = Path(given or folder, f"f{f}")
    if not (home / "vae" / "config.json").is_file():
        if given:
            raise FileNotFoundError(f"{home} holds no vae/; train it: ldmfast train autoencoder --output {home}")
        settings = AutoencoderConfig(
            steps=config.autoencoder_steps,
            size=config.size,
            channels=WIDTHS[: f.bit_length()],
            precision="fp32",
            latent_channels=LATENT_CHANNELS[f],
            seed=config.seed,
            export="fp32",
        )
        train_autoencoder.train(data, home, settings, quiet=quiet)
    return saved_autoencoder.load(home)
