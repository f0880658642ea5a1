"""How well a model of composed scenes follows its condition: the class, the boxes, the map.

Every sample is read by detect.Detector, which does not know what was asked for.
    class   the object that the detector finds first is the one asked for
    boxes   intersection over union of the box asked for and the box of what is visible of that object, 0 if the object
            is not found; mean over objects, and the share that reaches 0.5
    map     share of the pixels whose class (24 objects, 6 grounds) is the one asked for; also of the objects' pixels
            alone, and what a picture of nothing but the ground would reach
The same scores of the scenes themselves say how much the detector misses.
"""

import random
from pathlib import Path

import numpy as np

from ldmfast.data import scenes
from ldmfast.data.collection import read_rows
from ldmfast.evaluation.detect import Detector, iou
from ldmfast.pictures import read


def class_score(found, names):
    """found  N of detect.Found;   names  what was asked for"""
    first = [each.objects[0]["object"] if each.objects else None for each in found]
    return {"retrieved": _mean(a == b for a, b in zip(first, names, strict=True))}


def boxes_score(found, layouts):
    """layouts  N lists of {"object", "box"}"""
    overlaps = []
    for each, layout in zip(found, layouts, strict=True):
        seen = {o["object"]: o["box"] for o in each.objects}
        overlaps += [iou(seen[o["object"]], o["box"]) if o["object"] in seen else 0.0 for o in layout]
    return {"iou": _mean(overlaps), "iou_above_half": _mean(v >= 0.5 for v in overlaps), "objects": len(overlaps)}


def map_score(found, maps):
    """maps  N of [size, size] indices into scenes.CLASSES"""
    pairs = list(zip((each.label for each in found), map(np.asarray, maps), strict=True))
    objects = [m >= len(scenes.GROUNDS) for _, m in pairs]
    return {
        "agreement": _mean((label == m).mean() for label, m in pairs),
        "objects_agreement": _mean((label == m)[o].mean() for (label, m), o in zip(pairs, objects, strict=True)),
        "ground_alone": _mean((~o).mean() for o in objects),
    }


def _mean(values):
    return round(float(np.mean(list(values))), 4)


def evaluate(pipe, data, cutouts, *, samples=96, steps=25, guidance=3.0, seed=0, batch=32, progress=False, drawn=None):
    """The scores on the collection `data`, of training scenes and of held-out ones (pairs never seen together).

    drawn  a list to which all samples are added, PIL pictures in the order of drawing
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be at least 1")
    bare = next((row["file_name"] for row in read_rows(data) if not {"objects", "map"} <= row.keys()), None)
    if bare:
        raise ValueError(f"{data}: {bare} has no objects and map; a model of scenes is scored on `ldmfast data scenes`")
    detector, known = Detector(cutouts, pipe.vae.config.sample_size), pipe.conditioner.by_option()

    def sampled(kind, values):
        inputs = pipe.conditioner.as_inputs([{kind: value} for value in values])
        pictures = pipe(inputs, steps=steps, guidance=guidance, seeds=seed, batch=batch, progress=progress)
        if drawn is not None:
            drawn.extend(pictures)
        return [detector(picture) for picture in pictures]

    report = {"samples": samples, "steps": steps, "guidance": guidance, "seed": seed}
    if "class" in known:
        names = [scenes.OBJECTS[i % len(scenes.OBJECTS)] for i in range(samples)]
        report["class"] = class_score(sampled("class", names), names)
    rows = [row for row in read_rows(data) if len(row["objects"]) > 1]
    for split in ("train", "heldout"):
        part = [row for row in rows if row["split"] == split]
        part = random.Random(seed).sample(part, min(samples, len(part)))
        layouts = [row["objects"] for row in part]
        maps = [scenes.read_map(Path(data, row["map"])) for row in part]
        found = [detector(read(Path(data, row["file_name"]))) for row in part]
        scores = {"scenes themselves": {"boxes": boxes_score(found, layouts), "map": map_score(found, maps)}}
        if "boxes" in known:
            scores["boxes"] = boxes_score(sampled("boxes", layouts), layouts)
        if "map" in known:
            scores["map"] = map_score(sampled("map", maps), maps)
        report[split] = scores
    return report
