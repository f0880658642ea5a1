"""`ldmfast.verify`: the user's own weights, ours beside stock diffusers and an exact run, by block and end to end.

>>> print(ldmfast.verify(pipe))                          # a loaded pipeline, optimised or not
>>> ldmfast.verify(pipe, against="model/").right         # the folder whose weights stock's classes take

What is right (bench/check_unet.py has the same limits): in float32 at most 1e-5 from stock, or as near to the exact
run as stock is; in 16 bits at most 1.1 times stock's own error. Blocks, layers and a few steps have limits of their own
(verify_blocks.py).
"""

from __future__ import annotations

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from torch import nn

from ldmfast.conditioning.condition import Condition
from ldmfast.diffusion import sampling
from ldmfast.evaluation import verify_subject
from ldmfast.evaluation.verify_blocks import TIMES, Row, Three, compare_blocks, judged
from ldmfast.evaluation.verify_subject import Subject
from ldmfast.models.encode_decode import decode_latents, downsampling, encode_pictures, unscaled
from ldmfast.pictures import to_pil

PROMPT = "a red apple on a yellow background"
LARGEST = 64  # side of the latents, where none is asked for: a larger model is looked at in this size
SPARE = 2**30  # bytes that a run takes beside the weights


@dataclass
class Network:
    """One network's figures.

    wholes   a row for each way through it;   blocks  {way: its blocks' rows}
    changed  tensors that are not those of stock's files, and how far;   explained  what `explain()` says
    """

    name: str
    kind: str
    dtype: str
    exact: str
    weights: str
    wholes: list[Row] = field(default_factory=list)
    blocks: dict[str, list[Row]] = field(default_factory=dict)
    changed: list[tuple[str, float]] = field(default_factory=list)
    explained: list[str] = field(default_factory=list)

    def wrong(self) -> Row | None:
        """The first block that is not right, else the way through the network that is not."""
        rows = [row for rows in self.blocks.values() for row in rows]
        return next((row for row in [*rows, *self.wholes] if not row.fine), None)


@dataclass
class Drawn:
    """A picture of a few steps, from one noise by both.   levels  of 255, at most, between them, [H, W]"""

    rows: list[Row]
    ours: Image.Image
    stock: Image.Image
    levels: torch.Tensor
    about: str


@dataclass
class Verification:
    """What `verify` found. `right`, a `verdict` in one line; printed, the table."""

    source: str
    device: str
    networks: list[Network]
    drawn: Drawn | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        drawn = [] if self.drawn is None else self.drawn.rows
        return not any(n.wrong() or n.changed for n in self.networks) and all(row.fine for row in drawn)

    @property
    def verdict(self) -> str:
        if self.right:
            return f"right: {self._counted()}; {self._worst()}"
        for network in self.networks:
            if (row := network.wrong()) is not None:
                return f"WRONG: first differs at {_place(network, row)}"
            if network.changed:
                return f"WRONG: first differs at {_tensor(network, network.changed[0])}"
        row = next(row for row in self.drawn.rows if not row.fine)
        return f"WRONG: first differs at the {row.name}: {_far(row)}"

    def _counted(self) -> str:
        blocks = sum(len(rows) for network in self.networks for rows in network.blocks.values())
        names = " and ".join(f"the {network.name}'s" for network in self.networks)
        return f"{names} {blocks} blocks" + (" and a picture are stock's" if self.drawn else " are stock's")

    def _worst(self) -> str:
        wholes = [row for network in self.networks for row in network.wholes]
        text = f"whole networks at most {max(row.apart for row in wholes):.1e} apart"
        halves = [(row, n.dtype) for n in self.networks if n.dtype != "float32" for row in n.wholes]
        ratios = [row.ours / row.stock for row, _ in halves if 0 < row.stock < float("inf")]
        if ratios:
            text += f", with at most {max(ratios):.2f} times stock's own error"
        if self.drawn:
            text += f", the pictures at most {int(self.drawn.levels.max())} of 255 levels"
        return text

    def __str__(self) -> str:
        return "\n".join([*self._lines(), "", self.verdict])

    def _lines(self) -> Iterator[str]:
        yield f"{self.source} on {self.device}: errors are norms of differences over norms"
        for network in self.networks:
            yield f"\n{network.name}: {network.kind} in {network.dtype}; stock's weights: {network.weights}"
            yield f"{'':34}{'ours from':>12}{'stock from':>12}{'ours from':>12}"
            yield f"{'':34}{network.exact:>12}{network.exact:>12}{'stock':>12}"
            for whole in network.wholes:
                yield from _rows(whole, "")
                for row in network.blocks[whole.name]:
                    yield from _rows(row, "  ")
            yield from (f"  changed: {_tensor(network, each)}" for each in network.changed[:5])
            if len(network.changed) > 5:
                yield f"  changed: {len(network.changed) - 5} tensors more"
            yield from (f"  not through our ops: {sentence}" for sentence in network.explained)
        if self.drawn:
            yield f"\n{self.drawn.about}"
            for row in self.drawn.rows:
                yield from _rows(row, "")
        yield from (f"\nnote: {note}" for note in self.notes)


def verify(
    model: Any,
    *,
    against: Any = None,
    prompt: str = PROMPT,
    steps: int = 4,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    text_encoder: str | None = None,
    device: str | torch.device | None = None,
) -> Verification:
    """Compare ours with stock diffusers over the same weights, block by block and in a picture of a few steps.

    model    a loaded pipeline, diffusers' or ldmfast's, optimised or not, or a network: as it is, on its device and in
             its dtype; it is not changed.  Or the name of a model that ships, a folder or a released file, which is
             loaded in `dtype` with `text_encoder` and put on `device`, as `ldmfast.load` does
    against  where stock's weights are from. None: the files that the networks were loaded from, so that a layer that
             was changed since is found; the live weights where that is no folder in diffusers' layout, where most of
             them were trained since, or where a LoRA is attached. "live": these, so that the kernels alone are
             compared. Or a folder, a released file, a pipeline, a network
    prompt   for a model of text whose encoder is there; others are conditioned on random numbers
    size     (width, height) of the picture; None: what the model was trained on, 64 latents along a side at most
    returns  a Verification: `right`, `verdict`, and the table when it is printed

    Raises ValueError, TypeError, OSError, NotImplementedError in one sentence.
    """
    if isinstance(model, str | os.PathLike):
        subject, path = verify_subject.from_source(model, dtype, text_encoder)
        _to(subject, device)
        source, against, strict = str(model), path if against is None and path.is_dir() else against, True
    else:
        subject, source, strict = verify_subject.of(model), type(model).__name__, against is not None
    stock = verify_subject.stock_of(subject, against, strict)
    found = Verification(source, str(next(iter(subject.networks.values())).device), [], notes=subject.notes)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the float16 autoencoder overflowed")  # the rows say so
        with _in_eval_mode([*subject.networks.values(), *(model for model, _ in stock.values())]):
            _Comparison(subject, stock, found, prompt=prompt, steps=steps, seed=seed, size=size).run()
    return found


@contextlib.contextmanager
def _in_eval_mode(models: list[nn.Module]) -> Iterator[None]:
    """As a pipeline runs them; a network that was constructed, not loaded, is in training mode."""
    kept = [module for model in models for module in model.modules() if module.training]
    try:
        for module in kept:
            module.training = False
        yield
    finally:
        for module in kept:
            module.training = True


def _to(subject: Subject, device) -> None:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if hasattr(subject.pipeline, "to"):
        subject.pipeline.to(device)
    for network in subject.networks.values():
        nn.Module.to(network, device)


class _Comparison:
    """One run of `verify`, network by network: only one exact copy is held at a time."""

    def __init__(self, subject, stock, found, *, prompt, steps, seed, size) -> None:
        self.subject, self.stock, self.found, self.seed, self.steps = subject, stock, found, seed, steps
        if steps < 1:
            raise ValueError(f"steps={steps} must be at least 1")
        self.size = self._latent_size(size)
        self.latents: torch.Tensor | None = None
        self.ours = self.theirs = None  # latents of the picture, where there is a denoiser
        self.rows: list[Row] = []
        self.prompt, self.about = prompt, ""

    def run(self) -> None:
        if "unet" in self.subject.networks:
            self._unet()
        if "vae" in self.subject.networks:
            self._vae()

    def _latent_size(self, size) -> tuple[int, int]:
        unet, vae = (self.subject.networks.get(name) for name in ("unet", "vae"))
        if size is not None:
            factor = 1 if vae is None else downsampling(vae)
            if min(size) < factor or size[0] % factor or size[1] % factor:
                raise ValueError(f"size {size[0]}x{size[1]}: both sides must be multiples of {factor}, and above 0")
            return size[1] // factor, size[0] // factor
        side = unet.config.sample_size if unet is not None else vae.config.sample_size // downsampling(vae)
        sides = (side, side) if side is None or isinstance(side, int) else tuple(side)
        return tuple(min(each or LARGEST, LARGEST) for each in sides)

    def _three(self, name: str) -> tuple[Three, Network]:
        ours, (stock, weights) = self.subject.networks[name], self.stock[name]
        kind = _exact_dtype(ours)
        exact = nn.Module.to(copy.deepcopy(stock), kind).requires_grad_(False)
        named = [str(dtype).removeprefix("torch.") for dtype in (ours.dtype, kind)]
        network = Network(name, ours.stock.__name__, *named, weights)
        network.changed = verify_subject.changed(ours, stock) if weights != "the live weights" else []
        network.explained = ours.explain()
        self.found.networks.append(network)
        return Three(ours, stock, exact, ours.dtype, kind), network

    # --- the denoiser -------------------------------------------------------------------------------------------------

    def _unet(self) -> None:
        three, network = self._three("unet")
        condition, guidance, what = verify_subject.condition(self.subject, self.prompt, self.size, self.seed)
        channels = verify_subject.latent_channels(self.subject)
        generator = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(1, channels, *self.size, generator=generator)
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        if self.subject.scheduler is None:
            seen.append((noise, torch.tensor(501)))
        else:
            self.latents = self._draw(three.exact, condition, guidance, noise, seen)
            self.theirs = self._draw(three.stock, condition, guidance, noise)
            self.ours = self._draw(three.ours, condition, guidance, noise)
            self.rows = [_after(three.dtype, "latents", self.ours, self.theirs, self.latents)]
            steps = f"{self.steps} steps of {type(self.subject.scheduler).__name__}"
            self.about = f"A picture: {steps}, seed {self.seed}, guidance {guidance:g}, {what}"

        def at(model, x, t):
            x = torch.cat([x, x]) if len(condition) == 2 else x
            given = x.to(model.device, three.dtype).to(model.dtype)
            return condition.to(model.device, model.dtype).predict(model, given, t)

        middle = seen[len(seen) // 2]
        self._both(three, network, "unet", lambda model: [at(model, *each) for each in seen], lambda m: at(m, *middle))

    def _draw(self, unet, condition: Condition, guidance: float, noise, seen: list | None = None) -> torch.Tensor:
        """Latents [1, c, h, w] after the steps, in the network's dtype; `seen` keeps what each step was given."""
        condition = condition.to(unet.device, unet.dtype)
        scheduler = verify_subject.fresh(self.subject.scheduler, stock=not hasattr(unet, "stock"))
        times = sampling.begin_at(scheduler, self.steps, 0, unet.device)
        guided = len(condition) == 2

        def predict(x, t):
            if seen is not None:
                seen.append((x, t))
            return condition.predict(unet, torch.cat([x, x]) if guided else x, t)

        return sampling.sample(
            predict,
            sampling.starting_point(scheduler, times, noise.to(unet.device, unet.dtype)),
            scheduler,
            times,
            guidance=guidance if guided else None,
            generators=[torch.Generator().manual_seed(self.seed)],
        )

    def _both(self, three: Three, network: Network, name: str, run: Callable, once: Callable | None = None) -> None:
        """The whole network's row from run(model), and its blocks', with the inputs that they have in once(exact)."""
        exact, stock, ours = (run(model) for model in (three.exact, three.stock, three.ours))
        network.wholes.append(judged(name, "network", three.dtype, ours, stock, exact))
        network.blocks[name] = list(compare_blocks(three, once or run))

    # --- the autoencoder ----------------------------------------------------------------------------------------------

    def _vae(self) -> None:
        three, network = self._three("vae")
        pixels = tuple(side * downsampling(three.ours) for side in self.size)
        picture = verify_subject.waves(pixels, self.seed).to(three.ours.device)

        def encode(vae):
            found = vae.encode(picture.to(three.dtype).to(vae.dtype))
            return found.latents if isinstance(vae, diffusers.VQModel) else found.latent_dist.parameters

        if self.latents is None:
            self.latents = encode_pictures(three.exact, picture.to(three.exact_dtype))
        z = unscaled(three.exact, self.latents.to(three.exact_dtype)).to(three.dtype)
        codes = {"force_not_quantize": True} if isinstance(three.ours, diffusers.VQModel) else {}

        def decode(vae):  # a codebook's choice is no rounding: it is left out here, and taken in the picture
            return vae.decode(z.to(vae.dtype), **codes).sample

        self._both(three, network, "encode", encode)
        self._both(three, network, "decode", decode)
        if self.ours is None:
            return
        given = ((three.ours, self.ours), (three.stock, self.theirs), (three.exact, self.latents))
        ours, stock, exact = (decode_latents(vae, latents.to(vae.dtype)).float().cpu() for vae, latents in given)
        if not codes:
            self.rows.append(_after(three.dtype, "picture", ours, stock, exact))
        for remark in (row.remark for row in self.rows if row.remark):
            self.found.notes.append(f"In the picture: {remark}.")
        a, b = (to_pil(torch.nan_to_num(x))[0] for x in (ours, stock))
        levels = (_pixels(a) - _pixels(b)).abs().amax(dim=2)
        self.found.drawn = Drawn(self.rows, a, b, levels, self.about)


def _after(dtype: torch.dtype, name: str, ours, stock, exact) -> Row:
    """The row of a few steps' result, which has the limit of a layer: errors of a step are input to the next."""
    return judged(name, "layer", dtype, ours, stock, exact)


def _pixels(picture: Image.Image) -> torch.Tensor:
    """[H, W, 3], 0 to 255"""
    return torch.from_numpy(np.asarray(picture, dtype=np.int16))


def _exact_dtype(network: nn.Module) -> torch.dtype:
    """float64 where a copy of the network in it fits into what memory is free, else float32."""
    needed = 8 * sum(parameter.numel() for parameter in network.parameters())
    if network.device.type == "cuda":
        free = torch.cuda.mem_get_info(network.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return torch.float64 if 1.5 * needed + SPARE < free else torch.float32


# --- words ------------------------------------------------------------------------------------------------------------


def _rows(row: Row, indent: str) -> Iterator[str]:
    mark = "" if row.fine else "  WRONG"
    remark = f"  {row.remark}" if row.remark else ""
    yield f"{indent + row.name:34}{row.ours:12.2e}{row.stock:12.2e}{row.apart:12.2e}{mark}{remark}"
    for inner in row.wrong:
        yield from _rows(inner, indent + "  ")


def _far(row: Row) -> str:
    if row.remark:
        return row.remark
    return f"{row.apart:.1e} from stock, whose own error is {row.stock:.1e}"


def _place(network: Network, row: Row) -> str:
    if row in network.wholes and not row.remark and network.dtype in ("bfloat16", "float16"):
        most = max((each for each in network.blocks[row.name] if each.stock), key=lambda each: each.ours / each.stock)
        return (
            f"the whole {row.name}, at no block alone: {row.ours / row.stock:.2f} times stock's own error, "
            f"limit {TIMES['network']}; {most.name} alone {most.ours / most.stock:.2f} times"
        )
    inner = row.innermost()
    found = row.name if row in network.wholes else f"{row.name} of the {network.name}"
    text = f"{found}" + (f", in {inner.name}" if inner is not row else "") + f": {_far(inner)}"
    within = [each for each in network.changed if f"{each[0]}.".startswith(f"{inner.name}.")]
    within = within or [each for each in network.changed if f"{each[0]}.".startswith(f"{row.name}.")]
    return f"{text}; {_tensor(network, within[0])}" if within else text


def _tensor(network: Network, changed: tuple[str, float]) -> str:
    name, far = changed
    return f"{name} is {100 * far:.2g} % from that of {network.weights}"
