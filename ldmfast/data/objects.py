"""Pictures of one or two objects: emoji cut-outs on a coloured ground, in three sizes and nine places, with captions.

Synthetic: the cut-outs are real artwork, the arrangement is drawn at random. An object is in the middle of a square: of
the whole picture, of three quarters of it in one of nine places, or of a half of it in one of nine. The corners are
multiples of an eighth or a quarter of the picture's side, so that a denoiser with a few halvings sees an object in
the same way at most of its places. Two objects are in squares of a half that do not overlap. A caption says what is
there in one of many orders and phrasings; what it does not say (size, place) is free. Every object has one ground, and
every eleventh pair of objects, that training never sees: those pictures are marked `"split": "heldout"`.
"""

from itertools import combinations

import numpy as np
from PIL import Image

from ldmfast import files
from ldmfast.data import scenes
from ldmfast.data.collection import write_rows
from ldmfast.data.emoji import COLOURS
from ldmfast.data.emoji_words import catalogue, file_stem, with_article

GROUNDS = COLOURS | {
    "pink": (250, 170, 200),
    "brown": (142, 98, 70),
    "grey": (156, 160, 166),
    "turquoise": (84, 204, 200),
}
EIGHTHS = 8  # of a picture's side
SQUARES = {"small": (4, (0, 2, 4)), "": (6, (0, 1, 2)), "large": (8, (0,))}  # side, corners, in eighths, by the word
SHARES = {"small": 0.2, "": 0.4, "large": 0.4}  # of a lone object
FILLED = 7 / 8  # of a square's side, by the longer side of its object
IN_THE_MIDDLE, AT_A_SIDE = 0.06, 0.12  # how far an object's centre is from the middle: at most, at least; of the side
TRIES = 200
CAPTIONS = 3  # of a picture
GROUNDLESS = 0.1  # share of the captions, but for the plainest, that do not say the ground

ALONE = (
    "{a} on {a_ground} background",
    "{n}, {ground} background",
    "a picture of {a} on {a_ground} background",
    "{n} on {ground}",
    "{a_ground} background with {a}",
    "{a}, {ground} background",
    "on {a_ground} background, {a}",
    "{ground} background, {n}",
    "{n}, on {ground}",
)
TOGETHER = (
    "{a} and {b} on {a_ground} background",
    "{a_ground} background with {a} and {b}",
    "{n} and {m}, {ground} background",
    "a picture of {a} and {b} on {a_ground} background",
    "{a} and {b}, {ground} background",
    "{n} and {m} on {ground}",
    "{a} with {b} on {a_ground} background",
)
RELATED = (
    "{a} {relation} {b} on {a_ground} background",
    "{a_ground} background with {a} {relation} {b}",
    "{n} {relation} {m}, {ground} background",
)
ALONE_BARE = ("{a}", "{n}", "a picture of {a}")
TOGETHER_BARE = ("{a} and {b}", "{n} and {m}", "a picture of {a} and {b}", "{a} with {b}")
RELATED_BARE = ("{a} {relation} {b}", "{n} {relation} {m}")
RELATIONS = {
    "left of": ("left of", "to the left of", "beside", "next to"),
    "right of": ("right of", "to the right of", "beside", "next to"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def names_of(cutouts):
    """The first names of the catalogue's objects that there are cut-outs of, in the catalogue's order."""
    return [names[0] for names in catalogue("all").values() if names[0] in cutouts]


def held_out_ground(index):
    """The ground that object number `index` is never trained on."""
    return list(GROUNDS)[index * 5 % len(GROUNDS)]


def held_out_pair(indices):
    """Whether a pair of the objects `indices` is one that training never sees together."""
    return any((3 * i + 5 * j) % 11 == 0 for i, j in combinations(sorted(indices), 2))


def place_of(box):
    """Where the middle of `box` [x0, y0, x1, y1] in 0..1 is: "on the left", ..., "in the middle", or "" between."""
    dx, dy = ((box[i] + box[i + 2]) / 2 - 0.5 for i in (0, 1))
    if max(abs(dx), abs(dy)) < IN_THE_MIDDLE:
        return "in the middle"
    if abs(dx) >= abs(dy):
        return "" if abs(dx) < AT_A_SIDE else "on the left" if dx < 0 else "on the right"
    return "" if abs(dy) < AT_A_SIDE else "at the top" if dy < 0 else "at the bottom"


def compose(placed, ground, size):
    """The picture, RGB uint8 [size, size, 3], of scenes.Placed objects, later ones in front."""
    picture = np.broadcast_to(np.array(GROUNDS[ground], dtype=float), (size, size, 3))
    for each in placed:
        picture = picture * (1 - each.alpha[..., None]) + each.colour
    return picture.clip(0, 255).round().astype(np.uint8)


def side_of(word, size):
    """The longer side, in pixels, of an object of that size word in a picture of `size` pixels."""
    return round(FILLED * SQUARES[word][0] / EIGHTHS * size)


def arrange(cutouts, rng, names, size):
    """Places for `names` (one or two): (scenes.Placed each, "small", "large" or "" each)."""
    alone = len(names) == 1
    words = [str(rng.choice(list(SHARES), p=list(SHARES.values())))] if alone else ["small"] * 2
    corners = [[int(rng.choice(SQUARES[word][1])) for _ in "xy"] for word in words]
    while not alone and max(abs(a - b) for a, b in zip(*corners, strict=True)) < SQUARES["small"][0]:
        corners[1] = [int(rng.choice(SQUARES["small"][1])) for _ in "xy"]
        if corners[0] == [2, 2]:  # no square beside the one in the middle
            corners[0] = [int(rng.choice(SQUARES["small"][1])) for _ in "xy"]
    placed = [_stand(cutouts[n], n, size, w, c) for n, w, c in zip(names, words, corners, strict=True)]
    return placed, words if alone else [""] * 2


def _stand(cutout, name, size, word, corner):
    """The object in the middle of the square of its size word whose left upper corner is `corner`, in eighths."""
    small, side = scenes.fitted(cutout, side_of(word, size)), SQUARES[word][0] * size // EIGHTHS
    x, y = (c * size // EIGHTHS + (side - s) // 2 for c, s in zip(corner, small.shape[1::-1], strict=True))
    return scenes.put(small, name, size, x, y)


def box_of(placed):
    """The box [x0, y0, x1, y1] in 0..1 of a scenes.Placed."""
    y, x = np.nonzero(placed.alpha >= scenes.OPAQUE / 255)
    return [round(float(v) / len(placed.alpha), 5) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1)]


def captions(rng, objects, ground, aliases):
    """CAPTIONS different ways to say a picture, the plainest first.

    objects  its one or two dicts of object, box and size ("small", "large", "")
    aliases  {name: every name of the object}
    """
    plain = ALONE[0] if len(objects) == 1 else TOGETHER[0]
    first = [objects[i] for i in rng.permutation(len(objects))]
    found = [fill(plain, [each["object"] for each in first], ground)]
    for _ in range(TRIES):
        text = _alone(rng, objects, ground, aliases) if len(objects) == 1 else _together(rng, objects, ground, aliases)
        if text not in found:
            found.append(text)
        if len(found) == CAPTIONS:
            break
    return found


def _alone(rng, objects, ground, aliases):
    """One object in any words, with its size or place in half of them where it has one."""
    each = objects[0]
    name = _alias(rng, each["object"], aliases)
    colour, _, rest = name.partition(" ")
    if colour in GROUNDS and rest and rng.uniform() < 0.3:  # "apple, red, on yellow"
        return f"{rest}, {colour}, on {ground}"
    name = f"{each['size']} {name}" if each["size"] and rng.uniform() < 0.6 else name
    bare = rng.uniform() < GROUNDLESS
    text = fill(str(rng.choice(ALONE_BARE if bare else ALONE)), [name], ground)
    place = place_of(each["box"])
    if place and rng.uniform() < 0.5:
        where = f"{_phrase(name)} {place}"
        if bare:
            return where
        text = str(rng.choice([f"{where}, {ground} background", f"{where} of {with_article(ground)} background"]))
    return text


def _together(rng, objects, ground, aliases):
    """Two objects in any words and order, where one is seen from the other in half of them."""
    one, other = (objects[i] for i in rng.permutation(2))
    names = [_alias(rng, each["object"], aliases) for each in (one, other)]
    bare = rng.uniform() < GROUNDLESS
    if rng.uniform() < 0.5:
        return fill(str(rng.choice(TOGETHER_BARE if bare else TOGETHER)), names, ground)
    relation = str(rng.choice(RELATIONS[scenes.relation(one, other)]))
    return fill(str(rng.choice(RELATED_BARE if bare else RELATED)), names, ground, relation)


def _alias(rng, name, aliases):
    return name if rng.uniform() < 0.6 else str(rng.choice(aliases[name]))


def _phrase(name):
    """ "a small red apple", "large grapes"."""
    size, _, rest = name.partition(" ")
    if size in ("small", "large") and rest:
        return f"a {size} {rest}" if with_article(rest) != rest else name
    return with_article(name)


def fill(template, names, ground, relation=""):
    """A template of this file with its words.   names  of the one or two objects, size words before them"""
    words = dict(zip("nm", names, strict=False)) | dict(zip("ab", map(_phrase, names), strict=False))
    return template.format(**words, ground=ground, a_ground=with_article(ground), relation=relation)


def build(cutouts, folder, *, count=24000, size=128, seed=0, alone=0.65):
    """Write the collection: pictures and metadata.jsonl (file_name, text, texts, objects, ground, split).

    alone  share of pictures with one object; the others have two. One in ten is held out.
    Returns the number of pictures. The folder appears complete or not at all.
    Raises ValueError for a size that is no multiple of 8, a share outside 0..1, and for fewer than two cut-outs.
    """
    if not 0 <= alone <= 1:
        raise ValueError(f"objects: alone={alone} is no share between 0 and 1")
    if size % EIGHTHS:
        raise ValueError(f"objects: size={size} is no multiple of {EIGHTHS}")
    names = names_of(cutouts)
    if len(names) < 2:
        raise ValueError(f"objects: two cut-outs or more are needed, got {len(names)}")
    rng = np.random.default_rng(seed)
    aliases = {each[0]: each for each in catalogue("all").values()}
    with files.new_folder(folder) as partial:
        rows = [_write(cutouts, names, aliases, rng, partial, i, size, alone) for i in range(count)]
        write_rows(rows, partial)
    return len(rows)


def choose(rng, names, count, split):
    """(`count` different names, ground) of the split "train" or "heldout"."""
    for _ in range(TRIES):
        indices = [int(i) for i in rng.choice(len(names), count, replace=False)]
        grounds = [held_out_ground(i) for i in indices]
        if split == "train":
            free = [g for g in GROUNDS if g not in grounds]
            if count == 1 or not held_out_pair(indices):
                return [names[i] for i in indices], str(rng.choice(free))
        elif count == 1:
            return [names[indices[0]]], grounds[0]
        elif held_out_pair(indices):
            return [names[i] for i in indices], str(rng.choice(list(GROUNDS)))
    raise RuntimeError(f"no {count} objects were found for the split {split!r}")


def _described(placed, size, names):
    """What metadata.jsonl says of an object.   names  its other ones"""
    return {"object": placed.name, "names": names, "box": box_of(placed), "size": size}


def _write(cutouts, names, aliases, rng, folder, index, size, alone):
    """Compose and write picture number `index`; returns its row."""
    split = "heldout" if index % 10 == 9 else "train"
    chosen, ground = choose(rng, names, 1 if rng.uniform() < alone else 2, split)
    placed, words = arrange(cutouts, rng, chosen, size)
    objects = [_described(p, word, aliases[p.name][1:]) for p, word in zip(placed, words, strict=True)]
    if len(objects) == 1:
        objects[0]["place"] = place_of(objects[0]["box"])
    file_name = f"{index:05d}-{'-'.join(map(file_stem, chosen))}.png"
    Image.fromarray(compose(placed, ground, size)).save(folder / file_name)
    texts = captions(rng, objects, ground, aliases)
    return dict(file_name=file_name, text=texts[0], texts=texts, objects=objects, ground=ground, split=split)
