"""How good is a pipeline: reconstruction of the autoencoder, retrieval of its samples, their distance from real ones.

Retrieval asks, for a sample drawn from a caption, which picture of the collection is nearest to it, and whether that
picture carries the caption's labels (object, colour, ...). Nearest means the smallest squared difference of the
pictures at 32x32 RGB; every placement of every object on every ground, held-out ones included, is a candidate.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ldmfast.data.collection import load_pictures
from ldmfast.metrics import sets
from ldmfast.metrics.reconstruction import score

NOT_LABELS = {"file_name", "text", "texts", "split"}
SIDE = 32


def features(pixels):
    """uint8 [N, 3, H, W] -> float32 [N, 3 * 32 * 32] in [0, 1]."""
    return F.adaptive_avg_pool2d(pixels.float() / 255, SIDE).flatten(1)


def nearest(queries, references):
    """Index of the nearest reference for each query [N].   queries [N, D], references [M, D]"""
    return torch.cdist(queries, references).argmin(dim=1)


def choose(rows, count, seed):
    """`count` rows, one a caption before any caption comes twice."""
    by_caption = {row["text"]: row for row in rows}
    order = sorted(by_caption)
    random.Random(seed).shuffle(order)
    return [by_caption[order[i % len(order)]] for i in range(count)]


def label_names(rows):
    """The labels that every row has; without any, the caption itself is the label."""
    common = set.intersection(*(set(row) for row in rows)) - NOT_LABELS
    return sorted(common) or ["text"]


def sample_rows(pipeline, pictures, rows, **settings):
    """One sample for each of `rows`, uint8 [N, 3, H, W] in the size of `pictures`. settings  the pipeline's"""
    drawn = pipeline([row["text"] for row in rows], **settings)
    size = pictures.pixels.shape[-2:]
    return torch.stack([torch.from_numpy(np.array(p.resize(size[::-1]))).permute(2, 0, 1) for p in drawn])


def retrieved(pixels, pictures, rows):
    """Score each sample's nearest picture: {label: share that is right, "all": all of them, "all, R@5": ...}.

    R@5 is the share whose labels are among the five different ones that come nearest.
    """
    labels = label_names(pictures.rows)
    small, references = features(pixels), features(pictures.pixels)
    found = [pictures.rows[i] for i in nearest(small, references).tolist()]
    right = {name: sum(f[name] == r[name] for f, r in zip(found, rows, strict=True)) / len(rows) for name in labels}
    wanted, known = ([tuple(row[name] for name in labels) for row in each] for each in (rows, pictures.rows))
    ranked = sets.retrieval(small, references, wanted, known)
    right |= {"all": ranked["R@1"], "all, R@5": ranked["R@5"]}
    return {name: round(share, 4) for name, share in right.items()}


def retrieval(pipeline, pictures, rows, *, seed, **settings):
    """Draw one sample for each of `rows` and score its nearest picture, as `retrieved` does.

    settings  the pipeline's
    """
    return retrieved(sample_rows(pipeline, pictures, rows, seeds=seed, **settings), pictures, rows)


def distances(pixels, real, extractors):
    """{name: {"kid", "precision", "recall", ...}} of samples against real pictures, uint8 [N, 3, H, W] both.

    extractors  {name: function from pictures in [-1, 1] to features}; those of "inception" also give "fid"
    """
    found = {}
    for name, extract in extractors.items():
        x, y = (extract(each.float() / 127.5 - 1) for each in (real, pixels))
        precision, recall = sets.precision_recall(x, y)
        found[name] = {"kid": round(sets.kid(x, y), 6), "precision": round(precision, 4), "recall": round(recall, 4)}
        if name == "inception":
            found[name]["fid"] = round(sets.frechet_distance(x, y), 3)
    return found


def evaluate(
    pipeline, data, *, samples=128, steps=25, guidance=3.0, seed=0, progress=False, extractors=None, drawn=None
):
    """Reconstruction, retrieval and distances, for the trained and the held-out pictures of the folder `data`.

    extractors  as `distances` takes them; None: no distances
    drawn       a list to which all samples are added, PIL pictures in the order of drawing
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    pictures = load_pictures(data, pipeline.vae.config.sample_size, captions=True)
    report = {"samples": samples, "steps": steps, "guidance": guidance, "seed": seed, "pictures": len(pictures)}
    for split in ("train", "heldout"):
        part = pictures.where(split=split)
        if not len(part):
            continue
        some = part.sample(512, seed)
        asked = choose(part.rows, samples, seed)
        pixels = sample_rows(pipeline, pictures, asked, steps=steps, guidance=guidance, seeds=seed, progress=progress)
        if drawn is not None:
            drawn.extend(Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels)
        report[split] = {
            "combinations": len({row["text"] for row in part.rows}),
            "reconstruction": score(pipeline.vae, some),
            "retrieval": retrieved(pixels, pictures, asked),
            **({"distances": distances(pixels, some.pixels, extractors)} if extractors else {}),
        }
    return report
