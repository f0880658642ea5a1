"""Which objects a composed picture shows, and where: greedy template matching, which knows nothing of what was asked.

At half resolution, the ground is the one of the palette that most pixels of the frame are nearest to (a large object
covers more than half of a picture, but little of its frame). Then every object in every size at every place is tried:
how much less is the squared error against the picture with the template there than with the bare ground? The best one
is taken, its pixels count no more, and so on while the gain is worth it.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ldmfast.data import scenes
from ldmfast.data.emoji import COLOURS

HALF = 2
LEAST = 0.02  # gain a template pixel (squared distance of colours in 0..1) that an object is worth


@dataclass(frozen=True)
class Templates:
    """All objects at one size."""

    mask: torch.Tensor  # [K, 1, s, s] 0 or 1
    colour: torch.Tensor  # [K, 3, s, s] in 0..1, zero outside the mask
    kernels: torch.Tensor  # [K, 5, s, s]


@dataclass(frozen=True)
class Found:
    """What one picture shows."""

    ground: str
    objects: tuple  # of {"object", "box"}, the best match first; boxes are of the visible pixels
    label: np.ndarray  # [size, size] indices into the grounds, then the objects: scenes.CLASSES for scenes


class Detector:
    """Of scenes, unless said otherwise.

    cutouts  as `emoji.font_cutouts` gives them
    size     of the pictures, pixels a side
    names    the objects to look for
    grounds  {name: RGB} of the grounds
    sides    an object's longer side in pixels, each that is tried; by default every one that a scene has
    """

    def __init__(self, cutouts, size=64, *, names=scenes.OBJECTS, grounds=None, sides=None):
        self.size, self.side = size, size // HALF
        self.names, self.ground_names = tuple(names), tuple(grounds or scenes.GROUNDS)
        sides = _sides_of_scenes(self.side) if sides is None else [side // HALF for side in sides]
        self.sizes = [_templates(cutouts, self.names, side) for side in sides]
        colours = [(grounds or COLOURS)[g] for g in self.ground_names]
        self.grounds = torch.tensor(colours, dtype=torch.float32) / 255

    @torch.no_grad()
    def __call__(self, picture, most=3):
        """picture  uint8 [size, size, 3] or PIL -> Found, with at most `most` objects."""
        x = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].float() / 255
        x = F.avg_pool2d(x, HALF)[0]
        frame = torch.cat([x[:, 0], x[:, -1], x[:, 1:-1, 0], x[:, 1:-1, -1]], dim=1)
        distance = (frame[None] - self.grounds[:, :, None]).square().sum(dim=1)
        ground = distance.argmin(dim=0).bincount(minlength=len(self.grounds)).argmax()
        bare = self.grounds[ground][:, None, None]
        free = torch.ones(1, *x.shape[1:])
        label = torch.full(x.shape[1:], int(ground), dtype=torch.int64)
        names = []
        while len(names) < most:
            name, mask = self._best(x, bare, free)
            if name is None:
                break
            label[(mask * free)[0] > 0] = self._class(name)
            free = free * (1 - mask)
            names.append(name)
        label = np.kron(label.numpy(), np.ones((HALF, HALF), dtype=np.int64))
        objects = tuple({"object": n, "box": scenes.box_of(label, self._class(n))} for n in dict.fromkeys(names))
        return Found(self.ground_names[ground], objects, label)

    def _class(self, name):
        return len(self.ground_names) + self.names.index(name)

    def _best(self, x, bare, free):
        """(name, mask [1, side, side]) of the template that gains most, or (None, None)."""
        without = (x - bare).square().sum(dim=0, keepdim=True)
        # |x - bare|^2 - |x - t|^2, summed over the template's free pixels, as one convolution
        maps = torch.cat([free * (without - x.square().sum(dim=0, keepdim=True)), 2 * free * x, -free])[None]
        best = (0.0, None)
        for templates in self.sizes:
            gain = F.conv2d(maps, templates.kernels)[0]  # [K, places, places]
            seen = F.conv2d(free[None], templates.mask)[0]
            # as many pixels as must be seen of an object, and a gain worth them
            gain = gain.where(seen >= (1 - scenes.MOST_HIDDEN) * templates.mask.sum(dim=(2, 3))[:, :, None] * 0.8, 0)
            gain = gain.where(gain > LEAST * seen, 0)
            value, index = gain.flatten().max(dim=0)
            if value > best[0]:
                k, y, left = np.unravel_index(int(index), gain.shape)
                best = (float(value), (templates, int(k), int(y), int(left)))
        if best[1] is None:
            return None, None
        templates, k, y, left = best[1]
        mask = torch.zeros_like(free)
        side = templates.mask.shape[-1]
        mask[:, y : y + side, left : left + side] = templates.mask[k]
        return self.names[k], mask


def _sides_of_scenes(side):
    low = min(low for low, _ in scenes.SIDES.values()) / scenes.CELLS
    high = max(high for _, high in scenes.SIDES.values()) / scenes.CELLS
    return range(int(low * side), int(high * side) + 2)


def _templates(cutouts, names, side):
    """Each of `names` with its longer side `side`, in the middle of its square."""
    masks, colours = [], []
    for name in names:
        placed = scenes.place(cutouts[name], name, side, side, 0.5, 0.5)
        mask = torch.from_numpy(placed.alpha >= scenes.OPAQUE / 255).float()
        colour = torch.from_numpy(placed.colour).float().permute(2, 0, 1) / 255
        masks.append(mask[None])
        colours.append(colour / torch.from_numpy(placed.alpha).float().clamp_min(0.5) * mask)
    mask, colour = torch.stack(masks), torch.stack(colours)
    squares = colour.square().sum(dim=1, keepdim=True)
    return Templates(mask, colour, torch.cat([mask, colour, squares], dim=1))


def iou(a, b):
    """Intersection over union of two boxes [x0, y0, x1, y1]."""
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    inner = max(0.0, width) * max(0.0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return inner / (areas - inner)
