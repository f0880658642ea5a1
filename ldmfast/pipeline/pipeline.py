"""From what is asked for to pictures: conditioning, guided denoising, one decode.

>>> pipe = TextToImagePipeline.from_pretrained()
>>> pipe("a red apple on a yellow background", seeds=3)[0].save("apple.png")
>>> pipe("a pear on a blue background", sampler="dpm++", image=Image.open("apple.png"), strength=0.7)

pipeline_files.py describes the folder that a pipeline is saved to, request.py what is checked of a call.
"""

from __future__ import annotations

import dataclasses

import torch
from tqdm.auto import tqdm

from ldmfast import shipped
from ldmfast.conditioning.base import Condition, Hybrid, Unconditional
from ldmfast.diffusion import sampling
from ldmfast.diffusion.samplers import make_sampler
from ldmfast.models.encode_decode import decode_first_stage, downsampling, encode_first_stage
from ldmfast.pictures import to_pil
from ldmfast.pipeline.call import Request, listed, make_canvas, seed_list
from ldmfast.pipeline.folder import load_parts, save_parts

STEPS, GUIDANCE, STRENGTH = 25, 3.0, 0.8


class LatentDiffusionPipeline:
    """A denoiser with its first stage, noise schedule and conditioner, all of them replaceable attributes.

    unet         UNet or UNet2D
    vae          AutoencoderKL or VQModel
    scheduler    a diffusers scheduler: the noise schedule, and the sampler unless a call names another
    conditioner  a Conditioner; None for a model that is told nothing
    guidance     the scale of classifier-free guidance where a call names none
    """

    def __init__(self, unet, vae, scheduler, conditioner=None, *, guidance=GUIDANCE):
        conditioner = Unconditional() if conditioner is None else conditioner
        crosses = getattr(conditioner, "mode", "crossattn") == "crossattn"
        width, wanted = getattr(conditioner, "width", None) if crosses else None, unet.config.get("cross_attention_dim")
        if width is not None and wanted is not None and width != wanted:
            raise ValueError(f"the text encoder's states are {width} wide; this U-Net expects {wanted}")
        self.unet, self.vae, self.scheduler, self.conditioner = unet.eval(), vae.eval(), scheduler, conditioner
        self.guidance = guidance
        for module in conditioner.modules() if hasattr(conditioner, "modules") else ():
            if hasattr(module, "bind"):  # it encodes pictures with the first stage
                module.bind(vae)

    @classmethod
    def from_pretrained(cls, folder=None, *, text_encoder=None, dtype=torch.float32):
        """Load a saved pipeline, or a shipped one by its name (shipped.py); by default the shipped text model.

        text_encoder  "minilm", a hub name or a folder, in place of the one that the pipeline names
        Raises FileNotFoundError if a part is missing, ValueError if one is damaged, OSError without a text encoder.
        """
        return cls(**load_parts(shipped.locate(folder), text_encoder=text_encoder, dtype=dtype))

    def save_pretrained(self, folder, *, dtype=None):
        """Write the folder that `from_pretrained` reads. `dtype` converts the weights in the files only."""
        parts = {name: getattr(self, name) for name in ("unet", "vae", "scheduler", "conditioner", "guidance")}
        save_parts(folder, **parts, dtype=dtype)

    def to(self, *args, **kwargs):
        """Move (and cast) the networks, as torch.nn.Module.to does."""
        for part in (self.unet, self.vae, self.conditioner):
            part.to(*args, **kwargs)
        return self

    def __call__(
        self,
        inputs=None,
        *,
        steps=STEPS,
        guidance=None,
        guidance_rescale=0.0,
        seeds=0,
        batch=16,
        sampler=None,
        eta=0.0,
        size=None,
        image=None,
        mask=None,
        strength=None,
        progress=False,
        on_preview=None,
        preview_every=5,
    ):
        """Draw one picture for each input.

        inputs    a list of N of what the conditioner takes (captions, classes, ...), or one of them; for a model that
                  is told nothing, how many pictures
        guidance  scale of classifier-free guidance; 1 turns it off.   guidance_rescale  0 to 1: Lin et al. 2023's phi
        seeds     an int (picture i gets seeds + i) or N ints; a seed gives the same picture in any batch
        sampler   a name of diffusion.samplers.SAMPLERS, a diffusers scheduler or its class; None: the model's own
        eta       how stochastic DDIM is, 0 to 1
        size      (width, height) in pixels; None: the image's, or what the model was trained on
        image     a PIL picture or tensor [3, H, W] in [-1, 1], one for all or N: where to begin; for a model that
                  takes a picture beside the latent, that picture
        mask      where to draw anew: white in a PIL picture, 1 in a tensor [1, H, W]; the rest of image stays
        strength  how much of the schedule is run on image, above 0 to 1; None: 0.8, with a mask 1
        on_preview, preview_every   called every so many steps as (step, steps, PIL pictures of the predicted result)
        returns   N PIL pictures

        Raises ValueError or TypeError naming the argument that is wrong, FloatingPointError if a picture overflows.
        """
        inputs = listed(inputs, isinstance(self.conditioner, Unconditional))
        seeds = seed_list(seeds, len(inputs))
        if batch < 1 or preview_every < 1:
            raise ValueError(f"batch={batch} and preview_every={preview_every} must be at least 1")
        request = Request(
            make_sampler(sampler, self.scheduler),
            steps,
            self._guidance(guidance),
            guidance_rescale,
            eta,
            self._strength(strength, image, mask),
        )
        canvas = self.canvas(len(inputs), size, image, mask)
        drawn, starts = [], range(0, len(inputs), batch)
        with tqdm(unit="step", disable=not progress) as bar:
            for i in starts:
                part = slice(i, i + batch)
                watch = self._watcher(bar, len(starts), canvas[part], on_preview, preview_every)
                latents = self.denoise(inputs[part], seeds[part], request, canvas[part], watch)
                drawn += to_pil(canvas[part].paste(self.decode(latents)))
        return drawn

    def canvas(self, count, size=None, image=None, mask=None):
        """The Canvas that `count` pictures are drawn on. Raises ValueError for sizes that do not fit."""
        side = self.unet.config.sample_size
        trained = (side, side) if isinstance(side, int) else tuple(side)
        member = self._picture_member()[1]
        enlarged = self._pictures == ("image",) and not getattr(member, "encoded", False)
        factor = downsampling(self.vae)
        return make_canvas(count, trained, factor, size=size, image=image, mask=mask, enlarged=enlarged)

    @torch.no_grad()
    def denoise(self, inputs, seeds, request, canvas=None, watch=None):
        """Latents [N, z, h, w] for N inputs and seeds.   watch(i, times, function giving the predicted latents)"""
        canvas = self.canvas(len(inputs)) if canvas is None else canvas
        device, dtype, scheduler = self.unet.device, self.unet.dtype, request.scheduler
        inputs = self.conditioner.complete(inputs, seeds)
        told = self.condition(inputs, canvas, request.guided).to(device, dtype)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = self._noise(generators, canvas.size).to(device, dtype)
        times = sampling.begin_at(scheduler, request.steps, request.skipped, device)
        known = None
        if canvas.image is not None and not (self._pictures and not request.skipped):
            known = encode_first_stage(self.vae, canvas.image.to(device, self.vae.dtype)).to(dtype)
        keep = None
        if canvas.mask is not None and not self._pictures:
            keep = sampling.keep_known(scheduler, times, known, noise, canvas.latent_mask().to(device))

        def predict(x, t):
            return told.predict(self.unet, torch.cat([x, x]) if request.guided else x, t)

        return sampling.sample(
            predict,
            sampling.starting_point(scheduler, times, noise, known if request.skipped else None),
            scheduler,
            times,
            guidance=request.guidance if request.guided else None,
            rescale=request.rescale,
            eta=request.eta,
            generators=generators,
            after=keep,
            watch=watch and (lambda i, x0: watch(i, times, x0)),
        )

    def condition(self, inputs, canvas, guided):
        """What the denoiser is told, [N]; guided, [2N] with nothing told to the first N but the canvas' pictures."""
        told = self.conditioner(self._with_pictures(inputs, canvas))
        self._check_fit(told.concat, canvas)
        if told.text_embeds is not None:  # SDXL is told the sizes too: before cropping, where cropped, drawn
            height, width = (side * downsampling(self.vae) for side in canvas.size)
            sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
            told = dataclasses.replace(told, time_ids=sizes.expand(len(inputs), -1).to(told.text_embeds))
        if not guided:
            return told
        empty = self.conditioner.empty(len(inputs))
        if self._pictures:
            empty = dataclasses.replace(empty, concat=told.concat)
        return Condition.cat([dataclasses.replace(empty, time_ids=told.time_ids), told])

    def _check_fit(self, concat, canvas):
        """Raises ValueError if the U-Net cannot take the latents with `concat` [N, c, h, w] or None beside them."""
        own, joined = self.vae.config.latent_channels, 0 if concat is None else concat.shape[1]
        if own + joined != self.unet.config.in_channels:
            raise ValueError(
                f"this U-Net takes {self.unet.config.in_channels} channels; the latents have {own} and what it is told "
                f"beside them {joined}"
            )
        if joined and tuple(concat.shape[2:]) not in ((1, 1), tuple(canvas.size)):
            (h, w), (height, width) = concat.shape[2:], canvas.size
            raise ValueError(f"what is told beside the latents is {w}x{h}, the latents are {width}x{height}")

    def noise(self, seeds, size=None):
        """The starting noise [N, z, h, w] of N seeds."""
        return self._noise([torch.Generator().manual_seed(seed) for seed in seeds], size or self.canvas(1).size)

    def _noise(self, generators, size):
        """Each picture's from its own generator, on the CPU, so that it is the same in any batch and on any device."""
        shape = (self.vae.config.latent_channels, *size)
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    @torch.no_grad()
    def decode(self, latents):
        """Latents [N, z, h, w] to pictures [N, 3, H, W] in [-1, 1], not clamped, float32 on the CPU."""
        decoded = decode_first_stage(self.vae, latents.to(self.vae.dtype)).float().cpu()
        if not torch.isfinite(decoded).all():
            raise FloatingPointError(f"the decoded picture is not finite (weights in {self.vae.dtype}); use float32")
        return decoded

    @property
    def _pictures(self):
        """What the model takes beside the latent: (), ("image",) or ("image", "mask")."""
        member = self._picture_member()[1]
        return () if member is None else member.takes_pictures

    def _picture_member(self):
        """The conditioner that takes pictures, or None, after its name in a Hybrid."""
        hybrid = isinstance(self.conditioner, Hybrid)
        members = self.conditioner.members.items() if hybrid else [(None, self.conditioner)]
        return next((pair for pair in members if pair[1].takes_pictures), (None, None))

    def _with_pictures(self, inputs, canvas):
        """The inputs with each one's image, or image and mask, for the conditioner that takes them."""
        name, member = self._picture_member()
        if member is None:
            return inputs
        told = list(canvas.image)
        if "mask" in member.takes_pictures:
            told = [{"image": image, "mask": mask} for image, mask in zip(told, canvas.mask, strict=True)]
        if name is None:
            return told
        other = next(n for n in self.conditioner.members if n != name)
        inputs = [value if isinstance(value, dict) else {other: value} for value in inputs]
        return [{**value, name: picture} for value, picture in zip(inputs, told, strict=True)]

    def _guidance(self, guidance):
        if not isinstance(self.conditioner, Unconditional) and not self.conditioner.takes_pictures:
            return self.guidance if guidance is None else guidance
        if guidance not in (None, 1):
            raise ValueError(f"guidance={guidance}: this model is told nothing to guide towards")
        return 1.0

    def _strength(self, strength, image, mask):
        wanted = self._pictures
        for name, value in (("image", image), ("mask", mask)):
            if name in wanted and value is None:
                raise ValueError(f"{name} is missing: this model takes {' and '.join(wanted)} beside the latent")
        if wanted == ("image",) and (strength is not None or mask is not None):
            raise ValueError("strength and mask belong to models that begin at an image; this one enlarges it")
        if strength is not None and image is None:
            raise ValueError(f"strength={strength} is given without image")
        if strength is None:
            return 1.0 if image is None or mask is not None or wanted else STRENGTH
        return strength

    def _watcher(self, bar, batches, canvas, on_preview, every):
        """What to do after each step: move the bar, and show the predicted pictures every so often."""

        def watch(i, times, x0):
            bar.total = len(times) * batches
            bar.update()
            if on_preview and (i + 1) % every == 0 and i + 1 < len(times):
                on_preview(i + 1, len(times), to_pil(canvas.paste(self.decode(x0()))))

        return watch


class TextToImagePipeline(LatentDiffusionPipeline):
    """The pipeline of a model that is told a caption; `encoder` is its TextEncoder."""

    @property
    def encoder(self):
        return self.conditioner
