"""From a prompt to a picture: text encoder, guided denoising, one decode.

>>> pipe = TextToImagePipeline.from_pretrained()
>>> pipe("a red apple on a yellow background", seeds=3)[0].save("apple.png")

A saved pipeline is a folder in diffusers' layout (unet/, vae/, scheduler/, model_index.json) with ldmfast.json beside
it, which names the text encoder. The text encoder itself is not copied.
"""

import copy
import json
from pathlib import Path

import diffusers
import torch
from PIL import Image
from tqdm.auto import tqdm

from ldmfast.diffusion.ddim import DDIMScheduler
from ldmfast.models import AutoencoderKL, TextEncoder, UNet

DEFAULT_MODEL = Path(__file__).parent / "assets" / "emoji64"
STEPS, GUIDANCE = 25, 3.0


class TextToImagePipeline:
    """unet, vae, scheduler and encoder (a TextEncoder), all of them replaceable attributes."""

    def __init__(self, unet, vae, scheduler, encoder, *, text_encoder_name="minilm"):
        if unet.config.cross_attention_dim != encoder.width:
            raise ValueError(
                f"the text encoder's states are {encoder.width} wide; "
                f"this U-Net expects {unet.config.cross_attention_dim}"
            )
        self.unet, self.vae, self.scheduler, self.encoder = unet.eval(), vae.eval(), scheduler, encoder
        self.text_encoder_name = text_encoder_name

    @classmethod
    def from_pretrained(cls, folder=None, *, text_encoder=None, dtype=torch.float32):
        """Load a saved pipeline, the shipped one by default.

        text_encoder  "minilm", a hub name or a folder, in place of the one that the pipeline names
        Raises FileNotFoundError if a part is missing, ValueError if one is damaged, OSError without a text encoder.
        """
        folder = Path(folder or DEFAULT_MODEL)
        for part in ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
            if not (folder / part).is_file():
                raise FileNotFoundError(f"{folder} is not a saved pipeline: it has no {part}")
        extra = folder / "ldmfast.json"
        settings = json.loads(extra.read_text()) if extra.is_file() else {}
        name = text_encoder or settings.get("text_encoder", "minilm")
        unet, vae = (_load(kind, folder / part, dtype) for kind, part in ((UNet, "unet"), (AutoencoderKL, "vae")))
        encoder = TextEncoder.from_pretrained(name)
        return cls(unet, vae, DDIMScheduler.from_pretrained(folder / "scheduler"), encoder, text_encoder_name=name)

    def save_pretrained(self, folder, *, dtype=None):
        """Write diffusers' layout. `dtype` converts the weights in the files only."""
        folder = Path(folder)
        for name in ("unet", "vae"):
            module = copy.deepcopy(getattr(self, name))  # a cast there and back would round the live weights
            torch.nn.Module.to(module, dtype or module.dtype).save_pretrained(folder / name)
            _forget_origin(folder / name / "config.json")
        self.scheduler.save_pretrained(folder / "scheduler")
        (folder / "model_index.json").write_text(json.dumps(_model_index(), indent=2) + "\n")
        (folder / "ldmfast.json").write_text(json.dumps({"text_encoder": self.text_encoder_name}) + "\n")

    def to(self, *args, **kwargs):
        """Move (and cast) the networks, as torch.nn.Module.to does."""
        for part in (self.unet, self.vae, self.encoder):
            part.to(*args, **kwargs)
        return self

    def __call__(self, prompts, *, steps=STEPS, guidance=GUIDANCE, seeds=0, batch=16, progress=False):
        """Draw one picture for each prompt.

        prompts   a string, or N of them
        seeds     an int (picture i gets seeds + i) or N ints; a seed gives the same picture in any batch
        guidance  scale of classifier-free guidance; 1 turns it off
        returns   N PIL pictures

        Raises ValueError for an empty prompt, fewer than one step, or seeds that do not match the prompts.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = list(range(seeds, seeds + len(prompts))) if isinstance(seeds, int) else list(seeds)
        _check(prompts, steps, guidance, seeds, batch, self.scheduler.config.num_train_timesteps)
        pictures = []
        starts = range(0, len(prompts), batch)
        with tqdm(total=steps * len(starts), unit="step", disable=not progress) as bar:
            for i in starts:
                latents = self.denoise(prompts[i : i + batch], seeds[i : i + batch], steps, guidance, bar.update)
                pictures += self.decode(latents)
        return pictures

    @torch.no_grad()
    def denoise(self, prompts, seeds, steps, guidance, on_step=lambda: None):
        """DDIM with guidance (Song et al. 2020; Ho & Salimans 2022). Returns latents [N, z, h, w]."""
        device, dtype = self.unet.device, self.unet.dtype
        guided = guidance != 1
        prompts = ([""] * len(prompts) if guided else []) + prompts
        states = self.encoder.states(prompts)  # [2N or N, L, E], empty ones first
        states = states.to(device, dtype)
        x = self.noise(seeds).to(device, dtype)
        self.scheduler.set_timesteps(steps, device=device)
        for t in self.scheduler.timesteps:
            predicted = self.unet(torch.cat([x, x]) if guided else x, t, encoder_hidden_states=states).sample
            x = self.scheduler.step(predicted, t, x, guidance=guidance if guided else None).prev_sample
            on_step()
        return x

    def noise(self, seeds):
        """The starting noise [N, z, h, w], each picture's from its own generator on the CPU."""
        side = self.unet.config.sample_size
        shape = (self.unet.config.in_channels, side, side)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    @torch.no_grad()
    def decode(self, latents):
        """Latents [N, z, h, w] to PIL pictures."""
        decoded = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample.float()
        if not torch.isfinite(decoded).all():
            raise FloatingPointError(f"the decoded picture is not finite (weights in {self.vae.dtype}); use float32")
        pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        return [Image.fromarray(p.permute(1, 2, 0).cpu().numpy()) for p in pixels]


def _forget_origin(path):
    """Drop the path that the part was once loaded from: it means nothing elsewhere."""
    settings = json.loads(path.read_text())
    settings.pop("_name_or_path", None)
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _load(kind, folder, dtype):
    try:
        return kind.from_pretrained(folder, torch_dtype=dtype)
    except Exception as error:  # diffusers and safetensors raise many types for a damaged file
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ValueError(f"{folder} could not be loaded: {reason}") from error


def _check(prompts, steps, guidance, seeds, batch, longest):
    if not prompts or any(not isinstance(p, str) or not p.strip() for p in prompts):
        raise ValueError("the prompt is empty: say what to draw, as in 'a red apple on a yellow background'")
    if not 1 <= steps <= longest:
        raise ValueError(f"steps={steps} must lie between 1 and {longest}")
    if not 0 <= guidance < float("inf"):
        raise ValueError(f"guidance={guidance} must be a finite number, 0 or more")
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts; give one seed a prompt, or a single number")
    if any(not 0 <= seed < 2**63 for seed in seeds):
        raise ValueError("seeds must lie between 0 and 2**63 - 1")
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")


def _model_index():
    """What StableDiffusionPipeline.from_pretrained(folder, text_encoder=..., tokenizer=...) reads."""
    return {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
