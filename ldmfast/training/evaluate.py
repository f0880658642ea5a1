"""How good is a pipeline: reconstruction of the autoencoder, and retrieval of its samples.

Retrieval asks, for a sample drawn from a caption, which picture of the collection is nearest to it, and whether that
picture carries the caption's labels (object, colour, ...). Nearest means the smallest squared difference of the
pictures at 32x32 RGB; every placement of every object on every ground, held-out ones included, is a candidate.
"""

import random

import numpy as np
import torch
import torch.nn.functional as F

from ldmfast.training.autoencoder import score
from ldmfast.training.data import load_pictures

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


def retrieval(pipeline, pictures, rows, *, steps, guidance, seed, batch=16, progress=False):
    """Draw one sample for each of `rows` and score its nearest picture: {label: share that is right, "all": ...}."""
    drawn = pipeline(
        [row["text"] for row in rows], steps=steps, guidance=guidance, seeds=seed, batch=batch, progress=progress
    )
    size = pictures.pixels.shape[-2:]
    pixels = torch.stack([torch.from_numpy(np.array(p.resize(size[::-1]))).permute(2, 0, 1) for p in drawn])
    found = [pictures.rows[i] for i in nearest(features(pixels), features(pictures.pixels)).tolist()]
    labels = label_names(pictures.rows)
    right = {name: [f[name] == r[name] for f, r in zip(found, rows, strict=True)] for name in labels}
    right["all"] = [all(each) for each in zip(*right.values(), strict=True)]
    return {name: round(sum(hits) / len(hits), 4) for name, hits in right.items()}


def evaluate(pipeline, data, *, samples=128, steps=25, guidance=3.0, seed=0, progress=False):
    """Reconstruction and retrieval, for the trained and the held-out pictures of the folder `data`."""
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    pictures = load_pictures(data, pipeline.vae.config.sample_size, captions=True)
    report = {"samples": samples, "steps": steps, "guidance": guidance, "seed": seed, "pictures": len(pictures)}
    for split in ("train", "heldout"):
        part = pictures.where(split=split)
        if not len(part):
            continue
        some = sorted(random.Random(seed).sample(range(len(part)), min(512, len(part))))
        report[split] = {
            "combinations": len({row["text"] for row in part.rows}),
            "reconstruction": score(pipeline.vae, type(part)(part.pixels[some], tuple(part.rows[i] for i in some))),
            "retrieval": retrieval(
                pipeline, pictures, choose(part.rows, samples, seed),
                steps=steps, guidance=guidance, seed=seed, progress=progress,
            ),
        }  # fmt: skip
    return report
