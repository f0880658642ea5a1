"""Composed scenes: 1 to 3 emoji cut-outs on a coloured ground, with exact boxes, semantic maps and captions.

Synthetic: the cut-outs are real artwork, their arrangement is drawn at random on a grid of 16 x 16 cells, which at 64
pixels are those of an f = 4 latent: an object looks the same to the denoiser wherever it stands. An object that more
than 40 % of is hidden by later ones is drawn again; boxes are of the visible pixels. Some pairs of objects never stand
together in the training scenes: scenes that hold such a pair are marked `"split": "heldout"`.
"""

from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from PIL import Image

from ldmfast import files
from ldmfast.data.collection import write_rows
from ldmfast.data.emoji import COLOURS
from ldmfast.data.emoji_words import with_article
from ldmfast.pictures import read

OBJECTS = (
    "dog",
    "cat",
    "lion",
    "panda",
    "frog",
    "penguin",
    "pig",
    "octopus",
    "crab",
    "whale",
    "butterfly",
    "sunflower",
    "cactus",
    "strawberry",
    "watermelon",
    "hamburger",
    "pizza",
    "banana",
    "car",
    "rocket",
    "house",
    "soccer ball",
    "umbrella",
    "robot",
)
GROUNDS = ("red", "yellow", "green", "blue", "purple", "white")
CLASSES = (*(f"{ground} ground" for ground in GROUNDS), *OBJECTS)  # what a semantic map's indices mean
CELLS = 16  # of the grid, a side
SIDES = {1: (8, 11), 2: (6, 8), 3: (6, 7)}  # an object's longer side in cells, least and most, by how many there are
MOST_HIDDEN, OPAQUE = 0.4, 128
TRIES = 200


@dataclass(frozen=True)
class Placed:
    """A cut-out at its place: alpha and colours of the whole scene's size."""

    name: str
    colour: np.ndarray  # [size, size, 3] float
    alpha: np.ndarray  # [size, size] float in 0..1


def held_out(names):
    """Whether a pair of `names` is one that training scenes never hold."""
    index = sorted(OBJECTS.index(name) for name in names)
    return any((3 * i + 5 * j) % 11 == 0 for i, j in combinations(index, 2))


def palette():
    """RGB bytes of the map's picture, one colour a class: the grounds' own, then hues around the circle."""
    import colorsys

    hues = [
        colorsys.hsv_to_rgb(i / len(OBJECTS), 0.9 if i % 2 else 0.55, 0.55 + 0.2 * (i % 3)) for i in range(len(OBJECTS))
    ]
    return [COLOURS[g] for g in GROUNDS] + [tuple(round(255 * c) for c in hue) for hue in hues]


def place(cutout, name, size, side, left, top, cell=1):
    """`cutout` with its longer side `side` pixels; left, top in 0..1 choose among the places, `cell` pixels apart."""
    small = fitted(cutout, side)
    height, width = small.shape[:2]
    x, y = (cell * round(part * ((size - s) // cell)) for part, s in ((left, width), (top, height)))
    return put(small, name, size, x, y)


def fitted(cutout, side):
    """What is opaque of `cutout`, its longer side `side` pixels: premultiplied RGBA in 0..255, float [H, W, 4]."""
    cutout = cutout.crop(cutout.getchannel("A").point(lambda a: 255 * (a >= OPAQUE)).getbbox())
    factor = side / max(cutout.size)
    width, height = (max(1, round(s * factor)) for s in cutout.size)
    return np.asarray(cutout.convert("RGBa").resize((width, height), Image.LANCZOS), dtype=float)


def put(small, name, size, x, y):
    """`fitted`'s array with its left upper corner at pixel (x, y) of a picture of `size`: a Placed."""
    canvas = np.zeros((size, size, 4))
    canvas[y : y + small.shape[0], x : x + small.shape[1]] = small
    return Placed(name, canvas[..., :3], canvas[..., 3] / 255)


def compose(placed, ground, size):
    """(RGB picture [size, size, 3] uint8, map [size, size] uint8 of indices into CLASSES)."""
    picture = np.broadcast_to(np.array(COLOURS[ground], dtype=float), (size, size, 3)).copy()
    label = np.full((size, size), GROUNDS.index(ground), dtype=np.uint8)
    for each in placed:
        picture = picture * (1 - each.alpha[..., None]) + each.colour
        label[each.alpha >= OPAQUE / 255] = CLASSES.index(each.name)
    return picture.clip(0, 255).round().astype(np.uint8), label


def hidden(placed):
    """The share of each object that later ones cover."""
    shares = []
    for i, each in enumerate(placed):
        own = each.alpha >= OPAQUE / 255
        over = np.zeros_like(own)
        for later in placed[i + 1 :]:
            over |= later.alpha >= OPAQUE / 255
        shares.append((own & over).sum() / max(1, own.sum()))
    return shares


def box_of(label, index):
    """The box [x0, y0, x1, y1] in 0..1 of the pixels of class `index` of a map [size, size]."""
    y, x = np.nonzero(label == index)
    size = len(label)
    return [round(float(v) / size, 5) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)]


def compose_scene(cutouts, rng, names, ground, size):
    """One scene of `names` (all different): (picture, map, objects), objects being dicts of object and box."""
    low, high = SIDES[len(names)]
    cell = size // CELLS
    for _ in range(TRIES):
        sides = cell * rng.integers(low, high, len(names), endpoint=True)
        placed = [place(cutouts[n], n, size, s, *rng.uniform(0, 1, 2), cell) for n, s in zip(names, sides, strict=True)]
        if max(hidden(placed)) <= MOST_HIDDEN:
            picture, label = compose(placed, ground, size)
            return picture, label, [{"object": n, "box": box_of(label, CLASSES.index(n))} for n in names]
    raise RuntimeError(f"{TRIES} scenes of {', '.join(names)} hid one of them; the cut-outs are too large")


def relation(one, other):
    """Where `one` is, seen from `other`: the axis on which their centres are further apart decides."""
    (ax, ay), (bx, by) = (((b[0] + b[2]) / 2, (b[1] + b[3]) / 2) for b in (one["box"], other["box"]))
    if abs(ax - bx) >= abs(ay - by):
        return "left of" if ax < bx else "right of"
    return "above" if ay < by else "below"


def caption(objects, ground):
    """ "a cat left of a rocket and above a pizza on a blue background"."""
    first, *others = objects
    relations = [f"{relation(first, other)} {with_article(other['object'])}" for other in others]
    where = f" {' and '.join(relations)}" if relations else ""
    return f"{with_article(first['object'])}{where} on {with_article(ground)} background"


def read_map(path):
    """What `write_map` wrote, as uint8 [H, W] of class indices."""
    return torch.from_numpy(np.array(read(path, _indices)))


def _indices(picture, name):
    if picture.mode not in ("P", "L"):
        raise ValueError(f"{name}: mode {picture.mode}, expected a class a pixel (mode P or L)")
    return picture.copy()


def write_map(label, path):
    """A semantic map as a PNG in palette colours."""
    picture = Image.fromarray(label, mode="P")
    picture.putpalette([channel for colour in palette() for channel in colour])
    picture.save(path)


def build(cutouts, folder, *, count=6000, size=64, seed=0, single=0.5):
    """Write the collection: pictures, maps/ and metadata.jsonl (file_name, text, objects, ground, map, split).

    single  share of scenes with one object; the others have two or three. One scene in ten is held out.
    Returns the number of scenes. The folder appears complete or not at all.
    """
    missing = [name for name in OBJECTS if name not in cutouts]
    if missing:
        raise ValueError(f"scenes: the cut-outs lack {', '.join(missing)}")
    rng = np.random.default_rng(seed)
    with files.new_folder(folder) as partial:
        (partial / "maps").mkdir()
        rows = [_write(cutouts, rng, partial, i, size, single) for i in range(count)]
        write_rows(rows, partial)
    return len(rows)


def _write(cutouts, rng, folder, index, size, single):
    """Compose and write scene number `index`; returns its row."""
    split = "heldout" if index % 10 == 9 else "train"
    names = choose(rng, 1 if rng.uniform() < single else int(rng.integers(2, 4)), split)
    ground = GROUNDS[rng.integers(len(GROUNDS))]
    picture, label, objects = compose_scene(cutouts, rng, names, ground, size)
    file_name, map_name = f"{index:05d}.png", f"maps/{index:05d}.png"
    Image.fromarray(picture).save(folder / file_name)
    write_map(label, folder / map_name)
    text = caption(objects, ground)
    return dict(file_name=file_name, text=text, texts=[text], objects=objects, ground=ground, map=map_name, split=split)


def choose(rng, count, split):
    """`count` different objects; two or three of them hold a held-out pair exactly if the split is "heldout"."""
    for _ in range(TRIES):
        names = [OBJECTS[i] for i in rng.choice(len(OBJECTS), count, replace=False)]
        if count == 1 or held_out(names) == (split == "heldout"):
            return names
    raise RuntimeError(f"no {count} objects were found for the split {split!r}")
