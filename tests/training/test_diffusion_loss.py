"""The denoiser's loss: targets, their weights, and the noise schedule that training and samplers share."""

from __future__ import annotations

import diffusers
import pytest
import torch

from ldmfast.diffusion import loss, schedule


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_target_gives_back_the_picture(prediction):
    x0, noise = torch.randn(2, 5, 4, 3, 3, dtype=torch.float64)
    alphas = schedule.alphas_cumprod(0.0015, 0.0195)[torch.tensor([0, 10, 400, 900, 999])]
    scheduler = schedule.make_scheduler(0.0015, 0.0195, prediction)
    xt, wanted = loss.add_noise(x0, noise, alphas), loss.target(x0, noise, alphas, prediction)
    a, b = (v.view(-1, 1, 1, 1) for v in (alphas.sqrt(), (1 - alphas).sqrt()))
    found = {"epsilon": (xt - b * wanted) / a, "v_prediction": a * xt - b * wanted, "sample": wanted}[prediction]
    assert torch.allclose(found, x0, atol=1e-9) and scheduler.config.prediction_type == prediction


def test_the_weights_agree_on_the_picture():
    # the error of x0 that a unit error of each target stands for, times its weight, is min(snr, gamma) for all three
    alphas = schedule.alphas_cumprod(0.0015, 0.0195)
    snr = alphas / (1 - alphas)
    per_unit = {"sample": torch.ones_like(snr), "epsilon": snr, "v_prediction": snr + 1}
    for prediction, factor in per_unit.items():
        weight = loss.snr_weight(alphas, prediction, 5.0) * factor
        assert torch.allclose(weight, snr.clamp_max(5.0)), prediction
    assert torch.equal(loss.snr_weight(alphas, "epsilon", 0), torch.ones_like(alphas))


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        loss.target(torch.zeros(1), torch.zeros(1), torch.ones(1), "score")


def test_the_schedule_is_the_samplers():
    scheduler = diffusers.DDIMScheduler.from_config(schedule.make_scheduler(0.0015, 0.0195).config)
    assert torch.allclose(scheduler.alphas_cumprod.double(), schedule.alphas_cumprod(0.0015, 0.0195), rtol=1e-4)
    with pytest.raises(ValueError, match="beta_start"):
        schedule.alphas_cumprod(0.02, 0.01)
