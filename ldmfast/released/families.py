"""The published latent diffusion models as data: what a checkpoint's shapes do not say, by family.

Shapes give the widths, the levels and where attention stands; they give neither the number of heads nor the noise
schedule of a pruned file. A checkpoint is recognised by its structure (infer.py) and takes the rest from its row here.
Source: Rombach et al. 2022, Table 8 and following, and the released configurations; Stable Diffusion v1, v2, XL.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class Structure:
    """A U-Net as its shapes show it.

    mult, attention, depth   one entry a level, from the largest picture down; depth 0 where attention has no context
    """

    inputs: int
    outputs: int
    ch: int
    mult: tuple[int, ...]
    attention: tuple[bool, ...]
    layers: int = 2
    depth: tuple[int, ...] = ()  # transformer blocks at each level
    mid_depth: int = 0
    context: int | None = None  # width of the keys of cross-attention
    scale_shift: bool = False
    updown: bool = False  # residual blocks resample
    linear: bool = False  # the transformers' projections are linear layers, not 1x1 convolutions
    label: int | None = None  # width of the vector joined to the time embedding
    classes: int | None = None  # rows of a table of such vectors

    def alike(self) -> Structure:
        """Without the widths: a narrower model of the same build is equal to its row here."""
        narrow = {name: None if getattr(self, name) is None else 1 for name in ("context", "label", "classes")}
        return dataclasses.replace(self, ch=1, **narrow)


@dataclass(frozen=True)
class Autoencoder:
    """An autoencoder: ch 128, two residual blocks a level.

    attention   levels of the encoder that have it; codebook None for a KL autoencoder
    """

    z: int
    mult: tuple[int, ...]
    codebook: int | None = None
    attention: tuple[int, ...] = ()
    mid_attention: bool = True
    ch: int = 128

    def alike(self) -> Autoencoder:
        return dataclasses.replace(self, ch=1, codebook=None if self.codebook is None else 1)


AUTOENCODERS = {
    "kl-f4": Autoencoder(3, (1, 2, 4)),
    "kl-f8": Autoencoder(4, (1, 2, 4, 4)),
    "kl-f16": Autoencoder(16, (1, 1, 2, 2, 4), attention=(4,)),
    "kl-f32": Autoencoder(64, (1, 1, 2, 2, 4, 4), attention=(4, 5)),
    "vq-f4": Autoencoder(3, (1, 2, 4), 8192),
    "vq-f4-noattn": Autoencoder(3, (1, 2, 4), 8192, mid_attention=False),
    "vq-f8": Autoencoder(4, (1, 2, 2, 4), 16384, attention=(3,)),
    "vq-f16": Autoencoder(8, (1, 1, 2, 2, 4), 16384, attention=(4,)),
}


@dataclass(frozen=True)
class Denoiser:
    """A released model.

    heads, width     one of them: heads at every level, or channels of a head
    condition        none, class, text (a transformer trained with it), boxes, map, masked, picture; clip, openclip, two
    betas            first and last, linear in square-root space over 1000 steps
    scale_factor     of the latents, where the file does not hold it
    prediction       epsilon or v_prediction
    both_predictions whether models of this build predict the other, too: published, finetuned or merged ones
    """

    structure: Structure
    autoencoder: str  # a row of AUTOENCODERS
    condition: str
    betas: tuple[float, float]
    heads: int | None = None
    width: int | None = None
    scale_factor: float = 1.0
    sample_size: int = 64
    prediction: str = "epsilon"
    both_predictions: bool = False

    def heads_at(self, channels: int) -> int:
        return self.heads or channels // self.width


def _at(mult: tuple, factors: tuple) -> tuple[bool, ...]:
    """At which levels attention stands, from the released configurations' downsampling factors."""
    return tuple(2**level in factors for level in range(len(mult)))


def _plain(inputs, outputs, ch, mult, factors, **more) -> Structure:
    return Structure(inputs, outputs, ch, mult, _at(mult, factors), depth=(0,) * len(mult), **more)


def _cross(inputs, ch, mult, factors, context, depth=1, outputs=None, **more) -> Structure:
    """Cross-attention with `depth` blocks at each level that has it, and in the middle."""
    levels = _at(mult, factors)
    depths = depth if isinstance(depth, tuple) else tuple(depth * there for there in levels)
    more = {"mid_depth": depth if isinstance(depth, int) else depths[-1], **more}
    return Structure(inputs, outputs or inputs, ch, mult, levels, depth=depths, context=context, **more)


_FACES = _plain(3, 3, 224, (1, 2, 3, 4), (8, 4, 2))
_SD, _SD_BETAS = ((1, 2, 4, 4), (4, 2, 1)), (0.00085, 0.012)
_CLIP = {"betas": _SD_BETAS, "heads": 8, "scale_factor": 0.18215}
_OPEN = {"betas": _SD_BETAS, "width": 64, "scale_factor": 0.18215}
_XL = {"betas": _SD_BETAS, "width": 64, "scale_factor": 0.13025, "sample_size": 128}

DENOISERS = {
    "celeba256": Denoiser(_FACES, "vq-f4", "none", (0.0015, 0.0195), width=32),
    "ffhq256": Denoiser(_FACES, "vq-f4", "none", (0.0015, 0.0195), width=32),
    "lsun_beds256": Denoiser(_FACES, "vq-f4", "none", (0.0015, 0.0195), width=32),
    "lsun_churches256": Denoiser(
        _plain(4, 4, 192, (1, 2, 2, 4, 4), (1, 2, 4, 8), scale_shift=True, updown=True),
        "kl-f8",
        "none",
        (0.0015, 0.0155),
        heads=8,
        sample_size=32,
    ),
    "cin256": Denoiser(
        _cross(4, 256, (1, 2, 4), (4, 2, 1), 512), "vq-f8", "class", (0.0015, 0.0195), width=32, sample_size=32
    ),
    "cin256-v2": Denoiser(_cross(3, 192, (1, 2, 3, 5), (8, 4, 2), 512), "vq-f4", "class", (0.0015, 0.0195), heads=1),
    "text2img-1.45B": Denoiser(
        _cross(4, 320, *_SD, 1280), "kl-f8", "text", _SD_BETAS, heads=8, scale_factor=0.18215, sample_size=32
    ),
    "text2img256": Denoiser(_cross(3, 192, (1, 2, 3, 5), (8, 4, 2), 640), "vq-f4", "text", (0.0015, 0.0195), width=32),
    "layout2img": Denoiser(
        _cross(3, 128, (1, 2, 3, 4), (8, 4, 2), 512, depth=3), "vq-f4", "boxes", (0.0015, 0.0205), width=32
    ),
    "semantic_synthesis": Denoiser(
        _plain(6, 3, 128, (1, 4, 8), (32, 16, 8)), "vq-f4", "map", (0.0015, 0.0205), heads=8
    ),
    "inpainting_big": Denoiser(
        _plain(7, 3, 256, (1, 2, 3, 4), (8, 4, 2), updown=True), "vq-f4-noattn", "masked", (0.0015, 0.0205), heads=8
    ),
    "bsr_sr": Denoiser(_plain(6, 3, 160, (1, 2, 2, 4), (16, 8)), "vq-f4", "picture", (0.0015, 0.0155), width=32),
    "sd-v1": Denoiser(_cross(4, 320, *_SD, 768), "kl-f8", "clip", both_predictions=True, **_CLIP),
    "sd-v1-inpainting": Denoiser(_cross(9, 320, *_SD, 768, outputs=4), "kl-f8", "clip", both_predictions=True, **_CLIP),
    "instruct-pix2pix": Denoiser(_cross(8, 320, *_SD, 768, outputs=4), "kl-f8", "clip", both_predictions=True, **_CLIP),
    "sd-v2": Denoiser(
        _cross(4, 320, *_SD, 1024, linear=True),
        "kl-f8",
        "openclip",
        prediction="v_prediction",
        both_predictions=True,
        sample_size=96,
        **_OPEN,
    ),
    "sd-v2-inpainting": Denoiser(
        _cross(9, 320, *_SD, 1024, outputs=4, linear=True), "kl-f8", "openclip", both_predictions=True, **_OPEN
    ),
    "sd-v2-depth": Denoiser(_cross(5, 320, *_SD, 1024, outputs=4, linear=True), "kl-f8", "openclip", **_OPEN),
    "sdxl": Denoiser(
        _cross(4, 320, (1, 2, 4), (4, 2), 2048, depth=(0, 2, 10), linear=True, label=2816),
        "kl-f8",
        "two",
        both_predictions=True,
        **_XL,
    ),
    "sdxl-inpainting": Denoiser(
        _cross(9, 320, (1, 2, 4), (4, 2), 2048, depth=(0, 2, 10), outputs=4, linear=True, label=2816),
        "kl-f8",
        "two",
        both_predictions=True,
        **_XL,
    ),
    "sdxl-refiner": Denoiser(
        _cross(4, 384, (1, 2, 4, 4), (4, 2), 1280, depth=4, linear=True, label=2560), "kl-f8", "openclip", **_XL
    ),
}


def recognise(structure: Structure, condition: str | None) -> list[str]:
    """The rows that a U-Net of this structure and condition may be: by every width, else by the build alone.

    condition   as the checkpoint's other tensors show it; None if they are not there, or do not show it
    """
    fitting = {k: row for k, row in DENOISERS.items() if condition in (None, row.condition)}
    exact = [name for name, row in fitting.items() if row.structure == structure]
    return exact or [name for name, row in fitting.items() if row.structure.alike() == structure.alike()]


def recognise_autoencoder(found: Autoencoder) -> str | None:
    """The row of an autoencoder, by every width, else by the build alone."""
    exact = [name for name, row in AUTOENCODERS.items() if row == found]
    alike = [name for name, row in AUTOENCODERS.items() if row.alike() == found.alike()]
    return next(iter(exact or alike), None)
