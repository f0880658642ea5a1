"""How well a model of one or two objects (data/objects.py) draws what a caption says.

Every sample is read by detect.Detector, which does not know what was asked for.
    one object   `object`: the one that the detector finds first is the one asked for; `ground`: so is the ground
    two objects  `both`: the two that are found are the two asked for; `one`: at least one of them is
    phrasings    `object` of the same requests said in six ways, and how far the best and the worst are apart
    variety      mean perceptual distance between nine seeds of a caption, as a share of that between nine pictures of
                 the collection's own for that caption
    autoencoder  PSNR, SSIM and the perceptual distance of reconstructions, and their `crispness`: the gradient energy,
                 as a share of the pictures' own
The same scores of the pictures themselves say how much the detector misses.
"""

import random
from itertools import combinations

import numpy as np
import torch

from ldmfast.data import objects
from ldmfast.data.collection import load_pictures
from ldmfast.evaluation.detect import Detector
from ldmfast.metrics import perceptual
from ldmfast.metrics.reconstruction import reconstruct, score

PHRASINGS = (
    "{a} on {a_ground} background",
    "{n}, {ground} background",
    "a picture of {a} on {a_ground} background",
    "{n} on {ground}",
    "{a_ground} background with {a}",
    "{ground} background, {n}",
)
REQUESTS = 48  # that are said in each of them
SEEDS, PROMPTS = 9, 12  # of variety
RECONSTRUCTED = 256


def gradient_energy(pictures):
    """Mean squared difference of neighbouring pixels, a scalar.   pictures [N, 3, H, W]"""
    down, across = pictures.diff(dim=2), pictures.diff(dim=3)
    return (down.square().mean() + across.square().mean()).item()


def spread(pictures, distance):
    """Mean distance over all pairs of pictures [N, 3, H, W] in [-1, 1]."""
    pairs = list(combinations(range(len(pictures)), 2))
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    return distance(pictures[first], pictures[second]).mean().item()


def object_score(found, rows):
    """found  N of detect.Found;   rows  the collection's, of one object each"""
    asked = [row["objects"][0]["object"] for row in rows]
    first = [each.objects[0]["object"] if each.objects else None for each in found]
    return {"object": _share(map(str.__eq__, map(str, first), asked)), "ground": _grounds(found, rows)}


def pair_score(found, rows):
    """found  N of detect.Found;   rows  the collection's, of two objects each"""
    seen = [{each["object"] for each in picture.objects} for picture in found]
    hits = [len(s & {each["object"] for each in row["objects"]}) for s, row in zip(seen, rows, strict=True)]
    return {"both": _share(h == 2 for h in hits), "one": _share(h >= 1 for h in hits), "ground": _grounds(found, rows)}


def _grounds(found, rows):
    return _share(each.ground == row["ground"] for each, row in zip(found, rows, strict=True))


def _share(values):
    return round(float(np.mean(list(values))), 4)


class _Drawing:
    """The pipeline with its settings, and the detector that reads what it draws."""

    def __init__(self, pipe, cutouts, **settings):
        self.pipe, self.settings, self.size = pipe, settings, pipe.vae.config.sample_size
        names = objects.names_of(cutouts)
        reader = lambda words: Detector(  # noqa: E731
            cutouts,
            self.size,
            names=names,
            grounds=objects.GROUNDS,
            sides=[objects.side_of(word, self.size) for word in words],
        )
        self.readers = {1: reader(objects.SQUARES), 2: reader(["small"])}

    def __call__(self, texts, seeds):
        return self.pipe(texts, seeds=seeds, **self.settings)

    def read(self, pictures, count):
        return [self.readers[count](picture, most=count) for picture in pictures]

    def score(self, pictures, rows):
        """The scores of one picture for each row; all rows have as many objects."""
        count = len(rows[0]["objects"])
        return (object_score, pair_score)[count - 1](self.read(pictures, count), rows)


def evaluate(pipe, data, cutouts, *, samples=128, steps=25, guidance=3.0, seed=0, progress=False, drawn=None):
    """The scores on the collection `data`, of training pictures and of held-out ones (grounds and pairs never seen).

    drawn  a list to which the samples of both splits are added, PIL pictures: of one object, then of two
    Raises ValueError for a collection without objects and grounds.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    pictures = load_pictures(data, pipe.vae.config.sample_size, captions=True)
    bare = next((row["file_name"] for row in pictures.rows if not {"objects", "ground"} <= row.keys()), None)
    if bare:
        raise ValueError(f"{data}: {bare} has no objects and ground; this is scored on `ldmfast data objects`")
    draw = _Drawing(pipe, cutouts, steps=steps, guidance=guidance, progress=progress)
    report = {"samples": samples, "steps": steps, "guidance": guidance, "seed": seed, "pictures": len(pictures)}
    for split in ("train", "heldout"):
        report[split] = {
            kind: _split(draw, pictures.where(split=split), count, samples, seed, drawn)
            for kind, count in (("one object", 1), ("two objects", 2))
        }
    report["phrasings"] = _phrasings(draw, pictures.where(split="train").rows, seed)
    report["variety"] = _variety(draw, cutouts, seed)
    report["autoencoder"] = _autoencoder(pipe.vae, pictures.sample(RECONSTRUCTED, seed))
    return report


def _split(draw, pictures, count, samples, seed, drawn):
    chosen = [i for i, row in enumerate(pictures.rows) if len(row["objects"]) == count]
    chosen = random.Random(seed).sample(chosen, min(samples, len(chosen)))
    rows = [pictures.rows[i] for i in chosen]
    made = draw([row["text"] for row in rows], seed)
    if drawn is not None:
        drawn.extend(made)
    own = [p.permute(1, 2, 0).numpy() for p in pictures.pixels[chosen]]
    return {**draw.score(made, rows), "pictures themselves": draw.score(own, rows)}


def _phrasings(draw, rows, seed):
    alone = [row for row in rows if len(row["objects"]) == 1]
    alone = random.Random(seed).sample(alone, min(REQUESTS, len(alone)))
    found = {}
    for phrasing in PHRASINGS:
        texts = [objects.fill(phrasing, [row["objects"][0]["object"]], row["ground"]) for row in alone]
        found[phrasing] = draw.score(draw(texts, seed), alone)["object"]
    return {**found, "apart": round(max(found.values()) - min(found.values()), 4)}


def _variety(draw, cutouts, seed):
    rng = np.random.default_rng(seed)
    distance = perceptual.make_scorer()
    ours, own = [], []
    for _ in range(PROMPTS):
        (name,), ground = objects.choose(rng, objects.names_of(cutouts), 1, "train")
        text = objects.fill(PHRASINGS[0], [name], ground)
        ours.append(spread(_tensors(map(np.asarray, draw([text] * SEEDS, list(range(SEEDS))))), distance))
        made = (objects.arrange(cutouts, rng, [name], draw.size)[0] for _ in range(SEEDS))
        own.append(spread(_tensors(objects.compose(placed, ground, draw.size) for placed in made), distance))
    return {"judge": distance.name, "share of the collection's": round(float(np.mean(ours) / np.mean(own)), 4)}


def _tensors(pictures):
    """uint8 [H, W, 3] each -> float [N, 3, H, W] in [-1, 1]"""
    return torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) for p in pictures]).float() / 127.5 - 1


def _autoencoder(vae, pictures):
    x = pictures.batch(slice(None))
    y = torch.cat([reconstruct(vae, part)[0] for part in x.split(32)])
    return {
        **score(vae, pictures, scorer=perceptual.make_scorer()),
        "crispness": round(gradient_energy(y) / gradient_energy(x), 4),
    }
