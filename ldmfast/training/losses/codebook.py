"""Which codes of a codebook are used, and new lives for dead ones."""

from __future__ import annotations

import torch
import torch.distributed


def flat(latents: torch.Tensor) -> torch.Tensor:
    """[N, c, h, w] -> [N h w, c]: one row a code."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


class Codebook(torch.nn.Module):
    """Counts the codes chosen since the last revival, and re-seeds those that were not from recent encodings.

    A batch alone may hold far fewer encodings than there are codes (2x2 a picture at f = 16), so the last `size` of
    them are kept: `recent` [K, c], a ring that `seen` of all have passed through. All of it is state, the same on every
    process. The averaged weights' rows are re-seeded too, for an average over two lives is neither.
    Source: Dhariwal et al. 2020 (Jukebox), section 3.1.
    """

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("recent", torch.zeros(size, channels))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def count(self, index: torch.Tensor) -> None:
        """Note the indices [M] that a batch chose."""
        chosen = torch.bincount(index.flatten(), minlength=len(self.counts))
        if _several():
            torch.distributed.all_reduce(chosen)
        self.counts += chosen

    @torch.no_grad()
    def note(self, encodings: torch.Tensor, seed: int) -> None:
        """Keep the encodings [M, c] of a batch, of all processes, in place of the oldest; of too many, K at random."""
        rows = _gathered(encodings.detach().float().contiguous())
        size = len(self.recent)
        if len(rows) > size:
            rows = rows[_order(len(rows), seed)[:size].to(rows.device)]
        places = (self.seen + torch.arange(len(rows), device=rows.device)) % size
        self.recent[places] = rows
        self.seen += len(rows)

    @torch.no_grad()
    def revive(self, books: list[torch.Tensor], seed: int) -> int:
        """Replace the unused rows of every book [K, c] by encodings noted; returns how many there were.

        Where more are dead than encodings are kept, these are drawn again with noise of a hundredth of their spread.
        """
        dead = (self.counts == 0).nonzero().flatten()
        self.counts.zero_()
        if not len(dead):
            return 0
        recent = self.recent[: min(int(self.seen), len(self.recent))]
        order = _order(len(recent), seed)
        repeat = -(-len(dead) // len(order))
        rows = recent[order.repeat(repeat)[: len(dead)].to(recent.device)]
        if repeat > 1:
            noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(seed)).to(rows)
            rows = rows + 0.01 * recent.std(dim=0) * noise
        for book in books:
            book[dead] = rows.to(book)
        return len(dead)


def _order(length: int, seed: int) -> torch.Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def _gathered(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, each of which has as many."""
    if not _several():
        return rows
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows)
    return torch.cat(parts)


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
