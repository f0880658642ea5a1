"""The table of autoencoders: what each keeps of pictures that it was never trained on."""

from __future__ import annotations

import json
from pathlib import Path

from ldmfast.data.collection import load_pictures
from ldmfast.metrics import perceptual
from ldmfast.metrics.columns import CODEBOOK, column
from ldmfast.metrics.reconstruction import COMPARED, score
from ldmfast.models import VQModel
from ldmfast.models.encode_decode import downsampling
from ldmfast.pipeline import saved_autoencoder


def evaluate(folders, data, *, split="heldout", size=None, count=512, seed=0, scorer=None) -> dict:
    """Score the autoencoder in each of `folders` (what `ldmfast train autoencoder --output` wrote).

    split   of the collection `data`; `count` of its pictures at most
    size    pixels a side; None: what each model says it was made for
    scorer  a distance of metrics/perceptual.py. None: `make_scorer`, which must suit every model: one that was
            trained with the scoring network, in the loss or in the discriminator, is refused: its own teacher would
            mark it.
    Returns {"split", "pictures", "distance", "rows": [...]}. Raises ValueError, FileNotFoundError.
    """
    scorer = scorer or perceptual.make_scorer()
    rows = []
    for folder in folders:
        model, trainings = saved_autoencoder.load(folder), _trainings(folder)
        if any(scorer.name in (t.get("perceptual"), t.get("discriminator_features")) for t in trainings):
            raise ValueError(f"{folder} was trained with {scorer.name}; score it with another distance")
        pictures = load_pictures(data, size or model.config.sample_size, split=split).sample(count, seed)
        rows.append(_row(folder, model, trainings[0] if trainings else {}) | score(model, pictures, scorer=scorer))
    return {"split": split, "pictures": len(pictures), "distance": scorer.name, "rows": rows}


def _trainings(folder) -> list[dict]:
    """How it was trained, the last training first, where its folder says so: its decoder again, the whole stage."""
    paths = [Path(folder, name) for name in ("decoder.json", "autoencoder.json")]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def _row(folder, model, trained) -> dict:
    vq = isinstance(model, VQModel)
    return {
        "name": Path(folder).name,
        "family": "vq" if vq else "kl",
        "f": downsampling(model),
        "channels": model.config.latent_channels,
        "codes": model.config.num_vq_embeddings if vq else None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_with": trained.get("perceptual", "unknown"),
        "adversarial": trained.get("adversarial"),
        "discriminator_features": trained.get("discriminator_features"),
        "steps": trained.get("steps"),
    }


def markdown(report: dict) -> str:
    """The report as a table."""
    figures = [*COMPARED, report["distance"], *CODEBOOK]
    lines = [_line("name", "f", "latent", "steps", "discriminator", *(column(name).head for name in figures))]
    lines.append(_line(*["---"] * (5 + len(figures))))
    for row in report["rows"]:
        latent = f"{row['channels']} channels" + (f", {row['codes']} codes" if row["codes"] else "")
        how = row["steps"] or "-", "on" if row["adversarial"] else "off"
        shown = (column(name).show(row.get(name)) for name in figures)
        lines.append(_line(row["name"], row["f"], latent, *how, *shown))
    return "\n".join(lines)


def _line(*cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"
