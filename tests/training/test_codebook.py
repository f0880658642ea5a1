"""The codebook's statistics, and how its dead codes come back, without an autoencoder around it."""

from __future__ import annotations

import pytest
import torch

from ldmfast.metrics.reconstruction import codebook_use
from ldmfast.training.losses import codebook


def test_usage_statistics():
    assert codebook_use(torch.tensor([4, 4, 4, 4])) == pytest.approx({"perplexity": 4.0, "used": 1.0})
    assert codebook_use(torch.tensor([9, 0, 0, 0])) == pytest.approx({"perplexity": 1.0, "used": 0.25})
    p = torch.tensor([0.5, 0.25, 0.25, 0.0])
    found = codebook_use((8 * p).long())
    assert found == pytest.approx({"perplexity": 2**1.5, "used": 0.75})


def test_dead_codes_are_revived_from_encodings_and_live_ones_are_left():
    book = codebook.Codebook(6, 2)
    book.count(torch.tensor([0, 0, 2]))
    weight, average = torch.zeros(6, 2), torch.ones(6, 2)
    encodings = torch.randn(50, 2)
    book.note(encodings, seed=3)
    assert book.revive([weight, average], seed=3) == 4
    for rows, left in ((weight, 0.0), (average, 1.0)):
        assert (rows[[0, 2]] == left).all()
        assert all((encodings == row).all(dim=1).any() for row in rows[[1, 3, 4, 5]])
    assert torch.equal(weight[[1, 3, 4, 5]], average[[1, 3, 4, 5]]) and len(weight[[1, 3, 4, 5]].unique(dim=0)) == 4
    assert book.counts.sum() == 0
    again = torch.zeros(6, 2)
    book.count(torch.tensor([0, 0, 2]))
    book.revive([again], seed=3)
    assert torch.equal(again, weight)
    book.count(torch.arange(6))
    assert book.revive([weight], seed=4) == 0


def test_more_dead_codes_than_encodings():
    book, weight = codebook.Codebook(8, 2), torch.zeros(8, 2)
    encodings = torch.randn(3, 2)
    book.note(encodings, seed=0)
    assert book.revive([weight], seed=0) == 8
    assert len(weight.unique(dim=0)) == 8 and torch.cdist(weight, encodings).min(dim=1).values.max() < 0.2


def test_the_latest_encodings_are_kept():
    book, encodings = codebook.Codebook(8, 2), torch.randn(24, 2)
    for rows in encodings.split(6):
        book.note(rows, seed=0)
    assert sorted(book.recent.tolist()) == sorted(encodings[-8:].tolist()) and book.seen == 24
    book.note(encodings, seed=1)  # more than there is room for: some of them, none twice
    assert len(book.recent.unique(dim=0)) == 8 and all((encodings == row).all(dim=1).any() for row in book.recent)


def test_a_collapsed_codebook_recovers_where_a_batch_holds_few_encodings():
    """Four encodings a step, 64 codes in one place: most are chosen again soon, and the error falls with that."""
    torch.manual_seed(0)
    book, weight = codebook.Codebook(64, 2), torch.full((64, 2), 0.1)
    data = torch.randn(512, 2)

    def nearest():
        return torch.cdist(data, weight).min(dim=1)

    before, collapsed = nearest().values.square().mean(), len(nearest().indices.unique())
    for step in range(320):
        rows = data[torch.randint(512, (4,))]
        book.note(rows, seed=step)
        if step % 80 == 0:
            book.revive([weight], seed=step)
        book.count(torch.cdist(rows, weight).argmin(dim=1))
    assert collapsed == 1 and len(nearest().indices.unique()) > 55
    assert nearest().values.square().mean() < 0.1 * before
