"""From what is asked for to pictures: conditioning, guided denoising, one decode.

>>> pipe = TextToImagePipeline.from_pretrained()
>>> pipe("a red apple on a yellow background", seeds=3)[0].save("apple.png")
>>> pipe("a pear on a blue background", sampler="dpm++", image=Image.open("apple.png"), strength=0.7)

folder.py describes the folder that a pipeline is saved to, call.py what is checked of a call.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from ldmfast import shipped
from ldmfast.conditioning.base import Conditioner, Unconditional
from ldmfast.conditioning.condition import Condition
from ldmfast.conditioning.text_weights import PromptReading
from ldmfast.diffusion import sampling
from ldmfast.diffusion.samplers import make_sampler
from ldmfast.models.encode_decode import decode_latents, downsampling, encode_pictures
from ldmfast.ops.contract.stock_ops import in_fixed_order
from ldmfast.pictures import Images, to_pil
from ldmfast.pipeline import diffusers_names
from ldmfast.pipeline.added_files import add_files, check_load_options
from ldmfast.pipeline.assemble import assemble
from ldmfast.pipeline.call import Canvas, SamplingOptions, check_channels, listed, make_canvas, seed_list, strength_of
from ldmfast.pipeline.captured_step import captured_step
from ldmfast.pipeline.diffusers_names import missing_attribute, unknown_arguments
from ldmfast.pipeline.folder import save_parts
from ldmfast.pipeline.prompts import Prompts, negative_list
from ldmfast.pipeline.step_callback import StepCallback, as_step

STEPS, GUIDANCE = 25, 3.0


class LatentDiffusionPipeline:
    """A denoiser with its autoencoder, noise schedule and conditioner, all of them replaceable attributes.

    unet         UNet or UNet2D
    vae          AutoencoderKL or VQModel
    scheduler    a diffusers scheduler: the noise schedule, and the sampler unless a call names another
    conditioner  a Conditioner; None for an unconditional model
    guidance     the scale of classifier-free guidance where a call names none
    words        what `load_embedding` put on the text towers
    """

    words: tuple[str, ...] = ()
    _interrupt = False

    def __init__(
        self,
        unet: nn.Module,
        vae: nn.Module,
        scheduler: diffusers.SchedulerMixin,
        conditioner: Conditioner | None = None,
        *,
        guidance: float = GUIDANCE,
    ) -> None:
        conditioner = Unconditional() if conditioner is None else conditioner
        width, wanted = getattr(conditioner, "width", None), unet.config.get("cross_attention_dim")
        if conditioner.mode == "crossattn" and None not in (width, wanted) and width != wanted:
            raise ValueError(f"the text encoder's states are {width} wide; this U-Net expects {wanted}")
        self.unet, self.vae, self.scheduler = unet.eval(), vae.eval(), scheduler
        self.conditioner, self.guidance = conditioner.bind(vae), guidance

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, **options: Any) -> LatentDiffusionPipeline:
        """As `ldmfast.load`, whose options it takes; without a source the shipped text model.

        Raises what `ldmfast.load` raises, and ValueError for a model that is no LatentDiffusionPipeline.
        """
        source = shipped.locate() if source is None else source
        added = {name: options.pop(name, None) for name in ("embedding", "lora")}
        check_load_options(options)
        found = assemble(source, **options)
        if not isinstance(found, dict):
            what = f"{source} is a {type(found).__name__}, no {LatentDiffusionPipeline.__name__}"
            raise ValueError(f"{what}; in Python, ldmfast.load({str(source)!r}) gives it")
        pipeline = cls(**found)
        add_files(pipeline, **added)
        return pipeline

    def __getattr__(self, name: str) -> Any:
        raise missing_attribute(type(self).__name__, name)

    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
        """Write a folder that `ldmfast.load` reads. `dtype` converts the weights in the files only.

        Warns of words of embeddings, which are not saved. Raises ValueError with a LoRA on it.
        """
        if getattr(self.unet, "peft_config", None):
            raise ValueError("this pipeline has a LoRA; take it off before saving: ldmfast.load_lora(pipeline)")
        if self.words:
            warnings.warn(f"not saved with the pipeline: the embeddings of {', '.join(self.words)}", stacklevel=2)
        parts = {name: getattr(self, name) for name in ("unet", "vae", "scheduler", "conditioner", "guidance")}
        save_parts(folder, **parts, dtype=dtype)

    def to(self, *args: Any, **kwargs: Any) -> LatentDiffusionPipeline:
        """Move (and cast) the networks, as torch.nn.Module.to does."""
        for part in (self.unet, self.vae, self.conditioner):
            part.to(*args, **kwargs)
        return self

    @in_fixed_order
    def __call__(
        self,
        inputs: Any = None,
        *,
        steps: int = STEPS,
        guidance: float | None = None,
        guidance_rescale: float = 0.0,
        seeds: int | list[int] = 0,
        batch: int = 16,
        sampler: str | type | diffusers.SchedulerMixin | None = None,
        eta: float = 0.0,
        size: tuple[int, int] | None = None,
        image: Images | None = None,
        mask: Images | None = None,
        strength: float | None = None,
        progress: bool = False,
        on_preview: Callable[[int, int, list[Image.Image]], None] | None = None,
        preview_every: int = 5,
        negative: Any = None,
        prompt_weights: bool | None = None,
        clip_skip: int | None = None,
        long_prompts: bool = False,
        callback_on_step_end: StepCallback | None = None,
        **others: Any,
    ) -> list[Image.Image]:
        """Draw one picture for each input.

        inputs    a list of N of what the conditioner takes (captions, classes, ...), or one of them; for an
                  unconditional model, how many pictures
        guidance  scale of classifier-free guidance; 1 turns it off.   guidance_rescale  0 to 1: Lin et al. 2023's phi
        seeds     an int (picture i gets seeds + i) or N ints; a seed gives the same picture in any batch
        sampler   a name of diffusion.samplers.SAMPLERS, a diffusers scheduler or its class; None: the model's own
        eta       how stochastic DDIM is, 0 to 1
        size      (width, height) in pixels; None: the image's, or what the model was trained on
        image     a PIL picture or tensor [3, H, W] in [-1, 1], one for all or N: where to begin; for a model that
                  takes a picture beside the latent, that picture
        mask      where to repaint: white in a PIL picture, 1 in a tensor [1, H, W]; the rest of image stays
        strength  how much of the schedule is run on image, above 0 to 1; None: 0.8, with a mask 1
        on_preview, preview_every   called every so many steps as (step, steps, PIL pictures of the predicted result)
        negative  what to guide away from: an input for all, or N, None for a picture without one; "" is the empty
                  caption, which for SDXL is other than none
        prompt_weights, clip_skip, long_prompts   how CLIP's text towers read the prompts: PromptReading's weights,
                  clip_skip and long, in conditioning/text_weights.py. prompt_weights=True: (word), [word], (word:1.3);
                  None: where a prompt has an explicit (word:1.3). clip_skip in diffusers' counting
        callback_on_step_end   (pipeline, step, time, {"latents": x [n, z, h, w]}) after each step, of each batch, as in
                  diffusers; "latents" in the dict that it returns go on in place of x. It may set
                  pipeline._interrupt = True: the run ends there, and what was begun is decoded as it is
        returns   N PIL pictures; those that were begun, if the run was ended

        What diffusers' pipelines take beyond this is answered with its name here, or that it stays with diffusers.
        Raises ValueError or TypeError naming the argument that is wrong, FloatingPointError if a picture overflows.
        """
        if others:
            taken = [name for name in inspect.signature(LatentDiffusionPipeline.__call__).parameters][1:-1]
            raise unknown_arguments("a LatentDiffusionPipeline", others, diffusers_names.CALL, taken)
        inputs = listed(inputs, self.conditioner.takes_inputs)
        seeds = seed_list(seeds, len(inputs))
        if batch < 1 or preview_every < 1:
            raise ValueError(f"batch={batch} and preview_every={preview_every} must be at least 1")
        options = SamplingOptions(
            make_sampler(sampler, self.scheduler),
            steps,
            self._guidance(guidance),
            guidance_rescale,
            eta,
            strength_of(strength, image, mask, self.conditioner.takes_pictures),
        )
        canvas = self.canvas(len(inputs), size, image, mask)
        negatives = negative_list(negative, len(inputs), options.guidance, self.conditioner.takes_inputs)
        prompts = Prompts(inputs, negatives, PromptReading(clip_skip, prompt_weights, long_prompts))
        prompts.warn_of_cuts(self.conditioner)
        after_step = as_step(callback_on_step_end, self)
        self._interrupt = False
        drawn, starts = [], range(0, len(inputs), batch)
        with tqdm(unit="step", disable=not progress) as bar:
            for i in starts:
                part = slice(i, i + batch)
                watch = self._watcher(bar, len(starts), canvas[part], on_preview, preview_every)
                latents = self.denoise(prompts[part], seeds[part], options, canvas[part], watch, after_step)
                drawn += to_pil(canvas[part].paste(self.decode(latents)))
                if self._interrupt:
                    break
        return drawn

    def canvas(
        self, count: int, size: tuple[int, int] | None = None, image: Images | None = None, mask: Images | None = None
    ) -> Canvas:
        """The Canvas that `count` pictures are drawn on. Raises ValueError for sizes that do not fit."""
        side = self.unet.config.sample_size
        trained = (side, side) if isinstance(side, int) else tuple(side)
        factor, enlarged = downsampling(self.vae), self.conditioner.enlarges
        return make_canvas(count, trained, factor, size=size, image=image, mask=mask, enlarged=enlarged)

    @in_fixed_order
    @torch.no_grad()
    def denoise(
        self,
        inputs: list | Prompts,
        seeds: list[int],
        options: SamplingOptions,
        canvas: Canvas | None = None,
        watch: Callable[[int, torch.Tensor, Callable[[], torch.Tensor]], None] | None = None,
        after_step: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Latents [N, z, h, w] for N inputs and seeds.

        watch       (i, times, function giving the predicted latents)
        after_step  (x, i, time) -> x, what goes on after step i
        """
        prompts = inputs if isinstance(inputs, Prompts) else Prompts(inputs)
        canvas = self.canvas(len(prompts.inputs)) if canvas is None else canvas
        device, dtype, scheduler = self.unet.device, self.unet.dtype, options.scheduler
        prompts = prompts.completed(self.conditioner, seeds)
        condition = self.condition(prompts, canvas, options.guided).to(device, dtype)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = self._noise(generators, canvas.size).to(device, dtype)
        times = sampling.begin_at(scheduler, options.steps, options.skipped, device)
        known, beside = None, bool(self.conditioner.takes_pictures)
        if canvas.image is not None and (options.skipped or not beside):
            known = encode_pictures(self.vae, canvas.image.to(device, self.vae.dtype)).to(dtype)
        keep = None
        if canvas.mask is not None and not beside:
            keep = sampling.keep_known(scheduler, times, known, noise, canvas.latent_mask().to(device))

        def after(x, i):
            x = keep(x, i) if keep else x
            return after_step(x, i, times[i]) if after_step else x

        def predict(x, t):
            return condition.predict(self.unet, torch.cat([x, x]) if options.guided else x, t)

        how = {"guidance": options.guidance if options.guided else None, "rescale": options.rescale, "eta": options.eta}
        return sampling.sample(
            predict,
            sampling.starting_point(scheduler, times, noise, known if options.skipped else None),
            scheduler,
            times,
            **how,
            generators=generators,
            after=after if keep or after_step else None,
            watch=watch and (lambda i, x0: watch(i, times, x0)),
            step=captured_step(self.unet, scheduler, times, condition, **how),
            stop=(lambda: self._interrupt) if after_step else None,
        )

    @in_fixed_order
    def condition(self, prompts: Prompts, canvas: Canvas, guided: bool) -> Condition:
        """What the denoiser is conditioned on, [N]; guided, [2N], the first N unconditional but for the pictures."""
        condition = prompts.condition(self.conditioner, canvas)
        check_channels(self.unet, self.vae, condition.concat, canvas)
        if condition.text_embeds is not None:  # SDXL takes the sizes too: before cropping, where cropped, drawn
            height, width = (side * downsampling(self.vae) for side in canvas.size)
            sizes = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
            sizes = sizes.expand(len(prompts.inputs), -1).to(condition.text_embeds)
            condition = dataclasses.replace(condition, time_ids=sizes)
        if not guided:
            return condition
        return Condition.cat([prompts.unconditional(self.conditioner, canvas, condition), condition])

    def noise(self, seeds: list[int], size: tuple[int, int] | None = None) -> torch.Tensor:
        """The starting noise [N, z, h, w] of N seeds.   size  (h, w)"""
        return self._noise([torch.Generator().manual_seed(seed) for seed in seeds], size or self.canvas(1).size)

    def _noise(self, generators, size):
        """Each picture's from its own generator, on the CPU, so that it is the same in any batch and on any device."""
        shape = (self.vae.config.latent_channels, *size)
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])

    @in_fixed_order
    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [N, z, h, w] to pictures [N, 3, H, W] in [-1, 1], not clamped, float32 on the CPU."""
        decoded = decode_latents(self.vae, latents.to(self.vae.dtype)).float().cpu()
        if not torch.isfinite(decoded).all():
            decoder = torch.isfinite(latents).all()
            what, network = ("decoded picture is", self.vae) if decoder else ("latents are", self.unet)
            debug = "with LDMFAST_DEBUG=1 a network names what it is given that is not"
            mend = "use float32" if network.dtype is torch.float16 else debug
            raise FloatingPointError(f"the {what} not finite (weights in {network.dtype}); {mend}")
        return decoded

    def _guidance(self, guidance):
        if self.conditioner.takes_inputs:
            return self.guidance if guidance is None else guidance
        if guidance not in (None, 1):
            raise ValueError(f"guidance={guidance}: this model is unconditional; there is nothing to guide towards")
        return 1.0

    def _watcher(self, bar, batches, canvas, on_preview, every):
        """What to do after each step: move the bar, and show the predicted pictures every so often."""

        def watch(i, times, x0):
            bar.total = len(times) * batches
            bar.update()
            if on_preview and (i + 1) % every == 0 and i + 1 < len(times):
                on_preview(i + 1, len(times), to_pil(canvas.paste(self.decode(x0()))))

        return watch


class TextToImagePipeline(LatentDiffusionPipeline):
    """The pipeline of a model that is conditioned on a caption; `encoder` is its TextEncoder."""

    @property
    def encoder(self) -> Conditioner:
        return self.conditioner
