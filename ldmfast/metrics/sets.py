"""How alike two sets of pictures are, from one feature vector a picture.

Which network the features come from is part of a figure's name: those of `features.py` are EfficientNet-Lite0's, so
that a distance over them is not FID, whose network is Inception with given weights (`inception_features`).
"""

from __future__ import annotations

from pathlib import Path

import torch

from ldmfast import files


def kid(x: torch.Tensor, y: torch.Tensor) -> float:
    """Kernel Inception distance's estimator: the unbiased squared MMD under (x . y / D + 1)^3. Can be below 0.

    x [N, D], y [M, D] features, at least two of each.   Source: Binkowski et al. 2018 (arXiv 1801.01401), section 3.
    """
    x, y = _pair("kid", x, y)
    (n, d), m = x.shape, len(y)
    xx, yy, xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return (within - 2 * xy.mean()).item()


def precision_recall(real: torch.Tensor, drawn: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """(share of drawn inside the real manifold, share of real inside the drawn one), both of 0 to 1.

    real [N, D], drawn [M, D] features; a manifold is the union of balls around its points that reach their k-th
    neighbour.   Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2.
    Raises ValueError if a set has no k-th neighbour.
    """
    real, drawn = _pair("precision_recall", real, drawn)
    if min(len(real), len(drawn)) <= k:
        raise ValueError(f"precision_recall: {len(real)} and {len(drawn)} pictures; k={k} needs more than {k} of each")
    between = _distances(real, drawn)
    reach_real, reach_drawn = (_distances(a, a).kthvalue(k + 1, dim=1).values for a in (real, drawn))
    precision = (between <= reach_real[:, None]).any(dim=0)
    recall = (between <= reach_drawn).any(dim=1)
    return precision.double().mean().item(), recall.double().mean().item()


def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^1/2): FID where the features are Inception's.

    x [N, D], y [M, D].   Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6.
    """
    x, y = _pair("frechet_distance", x, y)
    cx, cy = (torch.cov(a.T).reshape(a.shape[1], a.shape[1]) for a in (x, y))
    values, vectors = torch.linalg.eigh(cx)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # tr (C_x C_y)^1/2 from the symmetric product, whose eigenvalues are the same and real
    shared = torch.linalg.eigvalsh(root @ cy @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * shared).item()


def retrieval(queries, references, wanted, labels, ranks=(1, 5)) -> dict[str, float]:
    """{"R@1": share of queries whose nearest reference carries the wanted label, "R@5": among the 5 nearest, ...}.

    queries [N, D], references [M, D] features; wanted N labels, labels M. A label counts once, by its nearest picture.
    """
    order = torch.cdist(queries.float(), references.float()).argsort(dim=1).tolist()
    found = {rank: 0 for rank in ranks}
    for row, want in zip(order, wanted, strict=True):
        seen = list(dict.fromkeys(labels[i] for i in row))
        for rank in ranks:
            found[rank] += want in seen[:rank]
    return {f"R@{rank}": count / len(wanted) for rank, count in found.items()}


@torch.no_grad()
def inception_features(pictures: torch.Tensor, weights, batch: int = 32) -> torch.Tensor:
    """Inception's pooled features [N, 2048], what FID and KID were defined over.

    pictures  [N, 3, H, W] in [-1, 1]
    weights   file of the TorchScript network that takes uint8 pictures and `return_features=True`: the published
              inception-2015-12-05.pt
    Raises FileNotFoundError if there is no such file, ValueError if it is no TorchScript.
    """
    if not Path(weights).is_file():
        raise FileNotFoundError(f"{weights}: no such file; FID needs Inception's weights as TorchScript")
    try:
        network = torch.jit.load(str(weights), map_location=pictures.device).eval()
    except RuntimeError as error:
        raise ValueError(f"{weights} is no TorchScript file: {files.first_line(error, 100)}") from error
    pixels = ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return torch.cat([network(part, return_features=True) for part in pixels.split(batch)])


def _pair(name: str, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"{name}: features have shapes {list(x.shape)} and {list(y.shape)}, expected [N, D] and [M, D], two or more"
        )
    return x.double(), y.double()


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """[N, M] exact, so that a point's distance to itself is 0."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
