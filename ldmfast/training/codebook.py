"""What a codebook is used for: counts, perplexity, share of codes, and new lives for dead ones."""

from __future__ import annotations

import torch
import torch.distributed


def use(counts: torch.Tensor) -> dict[str, float]:
    """From how often each code was chosen [K]: `perplexity`, exp of the entropy, and `used`, the share ever chosen."""
    p = counts.double() / counts.sum().clamp_min(1)
    entropy = -(p * p.clamp_min(1e-30).log()).sum()
    return {"perplexity": entropy.exp().item(), "used": (counts > 0).double().mean().item()}


def flat(latents: torch.Tensor) -> torch.Tensor:
    """[N, c, h, w] -> [N h w, c]: one row a code."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


class Codebook(torch.nn.Module):
    """Counts the codes chosen since the last revival, and re-seeds those that were not.

    Dead codes take encodings of the batch at hand; the averaged weights' rows are set too, for an average over two
    lives is neither. Processes count together and take the first one's rows.
    Source: Dhariwal et al. 2020 (Jukebox), section 3.1.
    """

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))

    def count(self, index: torch.Tensor) -> None:
        """Note the indices [M] that a batch chose."""
        chosen = torch.bincount(index.flatten(), minlength=len(self.counts))
        if _several():
            torch.distributed.all_reduce(chosen)
        self.counts += chosen

    @torch.no_grad()
    def revive(self, encodings: torch.Tensor, books: list[torch.Tensor], seed: int) -> int:
        """Replace the unused rows of every book [K, c] by encodings [M, c] of the batch; returns how many there were.

        Where more are dead than there are encodings, they are drawn again with noise of a hundredth of their spread.
        """
        dead = (self.counts == 0).nonzero().flatten()
        self.counts.zero_()
        if not len(dead):
            return 0
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(encodings), generator=generator)
        repeat = -(-len(dead) // len(order))
        rows = encodings.float()[order.repeat(repeat)[: len(dead)].to(encodings.device)]
        if repeat > 1:
            noise = torch.randn(rows.shape, generator=generator).to(rows)
            rows = rows + 0.01 * encodings.float().std(dim=0) * noise
        if _several():
            torch.distributed.broadcast(rows, 0)
        for book in books:
            book[dead] = rows.to(book)
        return len(dead)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
