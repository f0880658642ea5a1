"""Classifier-free guidance, and the rescaling that keeps its contrast."""

from __future__ import annotations

import torch


def guide(output: torch.Tensor, guidance: float, rescale: float = 0.0) -> torch.Tensor:
    """The guided prediction [N, ...] from a model output [2N, ...], its unconditional half u first, c after it.

    guidance  s in  g = u + s (c - u)
    rescale   phi in [0, 1]: g is moved that far towards g std(c) / std(g), the deviations being each sample's own
    Source: Ho & Salimans 2022 (arXiv 2207.12598); Lin et al. 2023 (arXiv 2305.08891), section 3.4.
    """
    unconditional, conditional = output.chunk(2)
    # two roundings, as stock: torch.add(alpha=) takes one in a vector and two in what fills none, so batches differed
    guided = unconditional + guidance * (conditional - unconditional)
    return rescaled(guided, conditional, rescale) if rescale else guided


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, rescale: float) -> torch.Tensor:
    """`guided` [N, ...] with its deviation moved towards that of `conditional`."""
    dims = tuple(range(1, guided.ndim))
    wanted, found = (x.float().std(dim=dims, keepdim=True) for x in (conditional, guided))
    ratio = torch.where(found > 0, wanted / found, 1.0)  # a constant prediction has no contrast to keep
    return guided * (rescale * ratio + (1 - rescale)).to(guided.dtype)
