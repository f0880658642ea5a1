"""PSNR, SSIM and the scores of an autoencoder."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_autoencoder_loss import Distance, lemons, stage

from ldmfast.data.collection import load_pictures
from ldmfast.evaluation import autoencoders
from ldmfast.metrics import columns, reconstruction
from ldmfast.study import report


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return lemons(tmp_path_factory)


def test_metrics_of_known_pictures():
    x = torch.rand(2, 3, 24, 24) * 2 - 1
    assert torch.allclose(reconstruction.ssim(x, x), torch.ones(2))
    assert torch.allclose(reconstruction.psnr(x, x + 0.2), torch.full((2,), 20.0), atol=1e-3)  # 20 log10(2 / 0.2)
    noisy = x + 0.3 * torch.randn_like(x)
    assert (reconstruction.ssim(noisy, x) < 0.95).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(reconstruction.ssim(noisy, x), reconstruction.ssim(x, noisy), atol=1e-5)


@pytest.mark.parametrize("family", ["kl", "vq"])
def test_an_autoencoder_in_16_bits_is_scored(collection, family):
    """`evaluate --dtype bfloat16` asks for it."""
    some, vae = load_pictures(collection, 16), stage(family=family).vae.eval()
    whole = reconstruction.score(vae, some)
    found = reconstruction.score(vae.bfloat16(), some)
    assert found["psnr"] == pytest.approx(whole["psnr"], abs=0.5)
    assert reconstruction.reconstruct(vae, some.batch(slice(2)))[0].dtype is torch.float32


def test_scores_are_of_the_quantised_pictures(collection):
    s = stage(family="vq")
    some = load_pictures(collection, 16)
    x = some.batch(slice(None))
    with torch.no_grad():
        y = s.vae.eval().decode(s.vae.encode(x).latents).sample.clamp(-1, 1)
    found = reconstruction.score(s.vae, some, scorer=Distance())
    assert found["psnr"] == pytest.approx(reconstruction.psnr(y, x).mean().item(), abs=0.01)
    assert found["distance"] == pytest.approx(F.mse_loss(y, x).item(), abs=1e-4)


def test_a_metric_and_its_column_reach_every_table(collection, monkeypatch):
    """A row of COMPARED and one of COLUMNS are all that a new one needs."""
    monkeypatch.setitem(reconstruction.COMPARED, "mse", lambda x, y: (x - y).square().mean(dim=(1, 2, 3)))
    monkeypatch.setitem(columns.COLUMNS, "mse", columns.Column("squared error", ".5f", perfect=0.0))
    found = reconstruction.score(stage().vae.eval(), load_pictures(collection, 16))
    assert found["mse"] > 0
    row = dict(name="kl", f=2, channels=2, codes=None, steps=1, adversarial=0, **found, distance=0.5)
    head, _, line = autoencoders.markdown({"distance": "distance", "rows": [row]}).splitlines()
    assert "| squared error |" in head and f"| {found['mse']:.5f} |" in line
    shown = {name: show for name, show in report.columns() if name == "squared error of reconstructions"}
    assert [show({"reconstruction": found}) for show in shown.values()] == [f"{found['mse']:.5f}"]
