"""Classes and boxes as tokens for cross-attention (or, for classes, as a label beside the timestep)."""

from __future__ import annotations

import difflib
import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.condition import Condition


class ClassNames:
    """Classes by name or by number.   classes  a count, or a list of names"""

    def __init__(self, classes: int | Sequence[str], owner: str) -> None:
        self.names = None if isinstance(classes, int) else list(classes)
        self.count, self.owner = classes if self.names is None else len(self.names), owner
        if self.count < 1 or (self.names and len(set(self.names)) < self.count):
            raise ValueError(f"{owner}: classes must be a count of at least 1 or different names; got {classes!r:.80}")

    def index(self, value: int | str) -> int:
        """0 .. count - 1. Raises ValueError naming what comes near."""
        if isinstance(value, str) and self.names:
            if value in self.names:
                return self.names.index(value)
            near = difflib.get_close_matches(value, self.names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(self.names)}"
            raise ValueError(f"{self.owner}: no class {value!r}; {hint}")
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < self.count:
            return value
        wanted = f"a whole number from 0 to {self.count - 1}" + (" or a name" if self.names else "")
        raise ValueError(f"{self.owner}: a class must be {wanted}; got {value!r:.80}")


class ClassEmbedder(Conditioner):
    """A class as one token; in mode "adm" as its number, for the U-Net's own label embedding; in mode "concat" as a
    vector beside every place of the latent, which a network learns to heed soonest.

    classes        a count, or the names
    width          channels of the token or vector
    unconditional  whether one class more, the last, stands for "no class" (the released cin256-v2 has it: 1001 in all)
    Source: Rombach et al. 2022, class-conditional ImageNet.
    """

    option = "class"
    trainable = True

    def __init__(
        self, classes: int | Sequence[str], width: int = 512, *, unconditional: bool = True, mode: str = "crossattn"
    ) -> None:
        super().__init__(classes=classes, width=width, unconditional=unconditional, mode=mode)
        if mode not in ("crossattn", "adm", "concat"):
            raise ValueError(f"ClassEmbedder: mode={mode!r} is none of crossattn, adm, concat")
        self.mode, self.width, self.unconditional = mode, width, unconditional
        self.classes = ClassNames(classes, "ClassEmbedder")
        self.trainable = mode != "adm"
        if self.trainable:
            self.embedding = nn.Embedding(self.classes.count + unconditional, width)

    def forward(self, inputs: list) -> Condition:
        return self._condition([self.classes.index(value) for value in inputs])

    def empty(self, n: int) -> Condition:
        if not self.unconditional:
            raise ValueError("ClassEmbedder: this model has no unconditional class; sample it with guidance 1")
        return self._condition([self.classes.count] * n)

    def _condition(self, indices):
        label = torch.tensor(indices, dtype=torch.int64, device=self.device)
        if self.mode == "adm":
            return Condition(label=label)
        vector = self.embedding(label)
        if self.mode == "concat":
            return Condition(concat=vector[..., None, None])
        return Condition(context=vector[:, None])


class PlacedClass(Conditioner):
    """A class alone, for a Hybrid conditioned on boxes: one of the class's boxes is drawn and put in its place.

    p(picture | class) = sum over boxes of p(picture | class, box) p(box | class): a network conditioned on where
    the object stands learns in a fraction of the steps what it looks like.

    boxes       {class: [[x0, y0, x1, y1], ...]}, those of the collection that the model was trained on
    stands_for  the member that gets the box
    """

    option = "class"

    def __init__(self, boxes: dict[str, list[list[float]]], stands_for: str = "boxes") -> None:
        super().__init__(boxes=boxes, stands_for=stands_for)
        self.classes, self.stands_for = ClassNames(list(boxes), "PlacedClass"), stands_for
        self.boxes = [[check_box(box, "PlacedClass") for box in each] for each in boxes.values()]
        if bare := next((name for name, each in boxes.items() if not each), None):
            raise ValueError(f"PlacedClass: no box of {bare!r} to draw from")

    def draw(self, value: int | str, seed: int) -> list[dict[str, Any]]:
        """The layout drawn for the class `value`; the same one for the same seed."""
        index = self.classes.index(value)
        box = self.boxes[index][random.Random(seed).randrange(len(self.boxes[index]))]
        return [{"object": self.classes.names[index], "box": box}]

    def forward(self, inputs: list) -> Condition:
        raise ValueError("PlacedClass: a class is drawn as a box; call complete(inputs, seeds) of the Hybrid first")

    def empty(self, n: int) -> Condition:
        return Condition()


def check_objects(
    value: Sequence[dict[str, Any]], classes: ClassNames, most: int
) -> list[tuple[int, list[float] | None]]:
    """[(class index, [x0, y0, x1, y1] or None), ...] of one layout input. Raises ValueError saying what is wrong."""
    owner = classes.owner
    if not isinstance(value, list | tuple):
        raise ValueError(f"{owner}: a layout is a list of objects; got {value!r:.80}")
    if len(value) > most:
        raise ValueError(f"{owner}: {len(value)} objects, at most {most} fit")
    found = []
    for each in value:
        if not isinstance(each, dict) or "object" not in each or set(each) - {"object", "box"}:
            raise ValueError(f'{owner}: an object is {{"object": name, "box": [x0, y0, x1, y1]}}; got {each!r:.120}')
        found.append((classes.index(each["object"]), check_box(each.get("box"), owner)))
    return found


def check_box(box: Iterable[float] | None, owner: str) -> list[float] | None:
    """Four numbers with 0 <= x0 < x1 <= 1 and the same for y, as floats; None stays None."""
    if box is None:
        return None
    try:
        x0, y0, x1, y1 = map(float, box)
    except (TypeError, ValueError):
        raise ValueError(f"{owner}: a box is four numbers [x0, y0, x1, y1]; got {box!r:.80}") from None
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"{owner}: a box needs 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1; got {[x0, y0, x1, y1]}")
    return [x0, y0, x1, y1]


def waves(values: torch.Tensor, octaves: int) -> torch.Tensor:
    """values [...] in 0..1 -> [..., 1 + 2 * octaves]: the value, and its sine and cosine at 1, 2, 4, ... half turns."""
    angles = values[..., None] * math.pi * 2.0 ** torch.arange(octaves, device=values.device)
    return torch.cat([values[..., None], angles.sin(), angles.cos()], dim=-1)


class BoxEncoder(Conditioner):
    """Objects with boxes, one token each: an embedding of the class and the box's coordinates through an MLP.

    An input is a list of {"object": name or number, "box": [x0, y0, x1, y1] in 0..1}; without "box" the object may
    stand anywhere. Places that are not taken hold a learned token.

    classes  a count, or the names                     objects  how many tokens there are
    width    channels of a token                       grid     side of the latent; if above 0 the coordinates of its
                                                                cells are joined to it, for queries to compare with
    paint    channels, beside the coordinates, of a picture in which every box is filled with its class's vector and
             with the coordinates inside the box, later boxes over earlier ones: which part of what stands where
    """

    option = "boxes"
    trainable = True
    OCTAVES = 4

    def __init__(
        self, classes: int | Sequence[str], width: int = 128, *, objects: int = 3, grid: int = 0, paint: int = 0
    ) -> None:
        super().__init__(classes=classes, width=width, objects=objects, grid=grid, paint=paint)
        if paint and not grid:
            raise ValueError(f"BoxEncoder: paint={paint} needs grid, the latent's side, to paint on")
        self.mode = "hybrid" if grid else "crossattn"
        self.width, self.objects, self.grid = width, objects, grid
        self.classes = ClassNames(classes, "BoxEncoder")
        coordinates = 4 * (1 + 2 * self.OCTAVES)
        self.names = nn.Embedding(self.classes.count, width)
        self.paint = nn.Embedding(self.classes.count, paint) if paint else None
        self.anywhere = nn.Parameter(torch.zeros(coordinates))
        self.nothing = nn.Parameter(torch.randn(width) * 0.02)
        self.mlp = nn.Sequential(nn.Linear(width + coordinates, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, inputs: list) -> Condition:
        found = [check_objects(value, self.classes, self.objects) for value in inputs]
        spare = [self.objects - len(each) for each in found]
        flat = [pair for each in found for pair in each]
        label = torch.tensor([index for index, _ in flat], dtype=torch.int64, device=self.device)
        box = torch.tensor([b or [0.0] * 4 for _, b in flat], device=self.device).view(-1, 4)
        known = torch.tensor([b is not None for _, b in flat], dtype=torch.bool, device=self.device)
        place = torch.where(known[:, None], waves(box, self.OCTAVES).flatten(1), self.anywhere)
        tokens = self.mlp(torch.cat([self.names(label), place], dim=1))  # [objects of the whole batch, width]
        tokens = torch.cat([tokens, self.nothing.to(tokens.dtype)[None]])
        rows, start = [], 0
        for each, free in zip(found, spare, strict=True):
            rows.append([*range(start, start + len(each)), *[len(flat)] * free])
            start += len(each)
        index = torch.tensor(rows, dtype=torch.int64, device=self.device).view(-1, self.objects)
        return Condition(context=tokens[index], concat=self._cells(label, box, index))

    def empty(self, n: int) -> Condition:
        return self([[]] * n)

    def _cells(self, label, box, index):
        """[N, 10, grid, grid] or None: the coordinates of the cells' centres; with `paint`, then the filled boxes, in
        paint + 10 channels more.

        label [M], box [M, 4] of all objects, zeros for one without a box;   index [N, objects], M where there is none
        """
        if not self.grid:
            return None
        centres = (torch.arange(self.grid, device=self.device) + 0.5) / self.grid
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        cells = torch.cat([waves(x, 2), waves(y, 2)], dim=-1).permute(2, 0, 1).expand(len(index), -1, -1, -1)
        if self.paint is None:
            return cells
        # the last of each is of the places that hold no object
        share, drawn = (torch.cat([t, t.new_zeros(1, *t.shape[1:])]) for t in self._filled(label, box, centres))
        painted = drawn.new_zeros(len(index), *drawn.shape[1:])
        for place in index.unbind(1):
            painted = painted * (1 - share[place]) + drawn[place] * share[place]
        return torch.cat([cells, painted], dim=1)

    def _filled(self, label, box, centres):
        """Each object's share of every cell [M, 1, grid, grid], and its class and inner coordinates there
        [M, paint + 10, grid, grid].   label [M], box [M, 4], centres [grid]"""
        across, down = (covered(box[:, i], box[:, i + 2], self.grid) for i in (0, 1))  # [M, grid]
        share = down[:, :, None] * across[:, None, :]
        x, y = (inside(centres, box[:, i], box[:, i + 2]) for i in (0, 1))
        coordinates = (x[:, None, :].expand_as(share), y[:, :, None].expand_as(share))
        inner = torch.cat([waves(c, 2) for c in coordinates], dim=-1).permute(0, 3, 1, 2)
        name = self.paint(label).to(share.dtype)[:, :, None, None].expand(-1, -1, *share.shape[1:])
        return share[:, None], torch.cat([name, inner], dim=1)


def inside(centres: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """centres [cells], low, high [M] -> [M, cells]: 0 at `low`, 1 at `high`, and no further."""
    return ((centres - low[:, None]) / (high - low).clamp_min(1e-6)[:, None]).clamp(0, 1)


def covered(low: torch.Tensor, high: torch.Tensor, cells: int) -> torch.Tensor:
    """low, high [M] in 0..1 -> [M, cells]: the share of each cell that lies between them."""
    left = torch.arange(cells, device=low.device) / cells
    return ((high[:, None].minimum(left + 1 / cells) - low[:, None].maximum(left)) * cells).clamp_min(0)
