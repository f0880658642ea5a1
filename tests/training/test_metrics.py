"""Distances between sets of pictures against slow, direct formulas."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ldmfast.evaluation import samples
from ldmfast.metrics import sets as metrics


@pytest.fixture
def sets():
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(9, 5, generator=draw), torch.randn(12, 5, generator=draw) * 1.5 + 0.3
    return x, y


def test_kid_is_the_mean_over_pairs(sets):
    x, y = (a.double() for a in sets)

    def kernel(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    within = sum(np.mean([kernel(a[i], a[j]) for i, j in itertools.permutations(range(len(a)), 2)]) for a in (x, y))
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert metrics.kid(*sets) == pytest.approx(within - 2 * between, rel=1e-9)


def test_kid_of_halves_of_one_set_is_near_nothing():
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    assert abs(metrics.kid(x[:200], x[200:])) < 0.05 < metrics.kid(x[:200], x[200:] + 1)


def test_precision_and_recall_by_hand(sets):
    real, drawn = sets

    def inside(point, manifold, k=3):
        for centre in manifold:
            reach = sorted(torch.dist(centre, other).item() for other in manifold)[k]
            if torch.dist(centre, point).item() <= reach:
                return True
        return False

    precision, recall = metrics.precision_recall(real, drawn)
    assert precision == pytest.approx(np.mean([inside(p, real) for p in drawn]))
    assert recall == pytest.approx(np.mean([inside(p, drawn) for p in real]))


def test_precision_and_recall_at_the_ends(sets):
    x, _ = sets
    assert metrics.precision_recall(x, x) == (1.0, 1.0)
    assert metrics.precision_recall(x, x + 1000) == (0.0, 0.0)
    one_mode = x[:1] + 1e-4 * torch.randn(9, 5, generator=torch.Generator().manual_seed(3))
    precision, recall = metrics.precision_recall(x, one_mode)
    assert precision == 1.0 and recall < 0.2  # good pictures of one kind


def test_frechet_distance_of_two_normals_on_a_line():
    x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([[0.0], [4.0]])  # deviations sqrt 2 and 2 sqrt 2, means 0 and 2
    assert metrics.frechet_distance(x, y) == pytest.approx(4 + (8**0.5 - 2**0.5) ** 2)


def test_frechet_distance_against_a_matrix_root(sets):
    x, y = (a.double().numpy() for a in sets)
    cx, cy = np.cov(x.T), np.cov(y.T)
    values, vectors = np.linalg.eig(cx @ cy)
    root = (vectors * np.sqrt(values)) @ np.linalg.inv(vectors)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cx + cy - 2 * root.real)
    assert metrics.frechet_distance(*sets) == pytest.approx(expected, rel=1e-8)
    assert metrics.frechet_distance(sets[0], sets[0]) == pytest.approx(0, abs=1e-9)


def test_retrieval_counts_labels_not_pictures():
    references = torch.tensor([[0.0], [0.1], [1.0], [2.0]])
    labels = ["a", "a", "b", "c"]
    found = metrics.retrieval(torch.tensor([[0.4], [0.0]]), references, ["b", "c"], labels, ranks=(1, 2, 3))
    assert found == {"R@1": 0.0, "R@2": 0.5, "R@3": 1.0}


def test_inception_is_read_from_a_torchscript_file(tmp_path):
    class Pooled(torch.nn.Module):
        def forward(self, x: torch.Tensor, return_features: bool = False):
            return x.float().mean(dim=[2, 3]) if return_features else x.float()

    torch.jit.script(Pooled()).save(str(tmp_path / "net.pt"))
    pictures = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 3, 4, 4)
    features = metrics.inception_features(pictures, tmp_path / "net.pt", batch=2)
    assert torch.equal(features[:, 0], ((pictures[:, 0, 0, 0] + 1) * 127.5).round())
    (tmp_path / "page.pt").write_text("<html>")
    with pytest.raises(ValueError, match="page.pt is no TorchScript file"):
        metrics.inception_features(pictures, tmp_path / "page.pt")
    with pytest.raises(FileNotFoundError, match="none.pt: no such file"):
        metrics.inception_features(pictures, tmp_path / "none.pt")


def test_bad_features_are_refused(sets):
    with pytest.raises(ValueError, match=r"kid: features have shapes \[9, 5\] and \[12, 4\]"):
        metrics.kid(sets[0], sets[1][:, :4])
    with pytest.raises(ValueError, match="k=9 needs more than 9"):
        metrics.precision_recall(*sets, k=9)


def test_distances_of_samples_from_pictures():
    draw = torch.Generator().manual_seed(0)
    real, other = (torch.randint(0, 256, (12, 3, 4, 4), generator=draw, dtype=torch.uint8) for _ in range(2))
    extractors = {"flat": lambda x: x.flatten(1), "inception": lambda x: x.mean(dim=(2, 3))}
    same, apart = (samples.distances(pixels, real, extractors) for pixels in (real, other // 4))
    assert same["flat"]["precision"] == same["flat"]["recall"] == 1.0 and same["inception"]["fid"] == 0
    assert apart["flat"]["kid"] > same["flat"]["kid"] and apart["inception"]["fid"] > 0.1
    assert set(same["flat"]) == {"kid", "precision", "recall"}
