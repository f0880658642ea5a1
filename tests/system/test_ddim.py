"""`DDIMScheduler` against stock diffusers."""

from __future__ import annotations

import diffusers
import pytest
import torch

from ldmfast.diffusion.ddim import DDIMScheduler

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def pair(steps=7, **config):
    both = [kind(**{**SD, **config}) for kind in (diffusers.DDIMScheduler, DDIMScheduler)]
    for scheduler in both:
        scheduler.set_timesteps(steps)
    return both


def far(got, wanted) -> float:
    return ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(
    "config",
    [
        {"clip_sample": False},
        {"clip_sample": True, "clip_sample_range": 0.8},
        {"set_alpha_to_one": False},
        {"thresholding": True},
        {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    ],
    ids=["plain", "clip", "final-alpha", "thresholding", "zero-snr"],
)
def test_equals_stock(prediction, eta, config):
    if prediction == "epsilon" and "rescale_betas_zero_snr" in config:
        pytest.skip("epsilon does not determine x0 where alpha is 0")
    stock, ours = pair(prediction_type=prediction, **config)
    sample, output = torch.randn(2, 4, 9, 5), torch.randn(2, 4, 9, 5)
    for t in stock.timesteps:
        answers = [
            scheduler.step(output, t, sample, eta=eta, generator=torch.Generator().manual_seed(3))
            for scheduler in (stock, ours)
        ]
        for name in ("prev_sample", "pred_original_sample"):
            wanted, got = answers[0][name], answers[1][name]
            assert torch.isfinite(got).all()
            # at alpha 0 and eta 1 stock takes the root of a rounding error of 1: of either sign, by the processor
            root = "rescale_betas_zero_snr" in config and eta == 1.0 and name == "prev_sample"
            near = torch.finfo(torch.float32).eps ** 0.5 if root else 1e-6
            assert far(got, wanted) <= near or (root and wanted.isnan().all()), (name, t)


def test_a_whole_loop_equals_stock():
    stock, ours = pair(20, clip_sample=False)
    samples = [torch.randn(1, 4, 8, 8)] * 2
    for t in stock.timesteps:
        output = torch.randn(1, 4, 8, 8)
        samples = [s.step(output, t, x, return_dict=False)[0] for s, x in zip((stock, ours), samples, strict=True)]
    assert far(samples[1], samples[0]) <= 5e-6


@pytest.mark.parametrize("thresholding", [False, True])
def test_guidance_in_the_same_pass(thresholding):
    stock, ours = pair(prediction_type="v_prediction", thresholding=thresholding)
    sample, output = torch.randn(2, 4, 8, 8), torch.randn(4, 4, 8, 8)
    unconditional, conditional = output.chunk(2)
    t = stock.timesteps[2]
    wanted = stock.step(unconditional + 7.5 * (conditional - unconditional), t, sample).prev_sample
    assert far(ours.step(output, t, sample, guidance=7.5).prev_sample, wanted) <= 1e-6


def test_given_noise_and_clipped_output():
    stock, ours = pair(clip_sample=True)
    sample, output, noise = torch.randn(3, 2, 4, 8, 8)
    t = int(stock.timesteps[1])
    for extra in ({"eta": 1.0, "variance_noise": noise}, {"use_clipped_model_output": True}):
        wanted, got = (s.step(output, t, sample, **extra).prev_sample for s in (stock, ours))
        assert far(got, wanted) <= 1e-6
    with pytest.raises(ValueError, match="both generator and variance_noise"):
        ours.step(output, t, sample, eta=1.0, variance_noise=noise, generator=torch.Generator())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_nearer_than_stock(dtype):
    stock, ours = pair(clip_sample=False)
    sample, output = torch.randn(2, 2, 4, 8, 8)
    t = stock.timesteps[3]
    exact = stock.step(output.to(dtype).double(), t, sample.to(dtype).double()).prev_sample
    theirs, mine = (s.step(output.to(dtype), t, sample.to(dtype)).prev_sample for s in (stock, ours))
    assert mine.dtype is dtype and far(mine, exact) <= far(theirs, exact)


def test_wrong_counts_of_steps():
    scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step(torch.zeros(1), 1, torch.zeros(1))
    for steps in (0, -1):
        with pytest.raises(ValueError, match="expected at least 1"):
            scheduler.set_timesteps(steps)
    with pytest.raises(ValueError, match="larger than"):
        scheduler.set_timesteps(2000)


def test_changes_of_the_schedule_are_seen():
    stock, ours = pair(clip_sample=False)
    sample, output = torch.randn(2, 1, 4, 8, 8)
    t = stock.timesteps[2]
    ours.step(output, t, sample)
    for scheduler in (stock, ours):
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.5
    wanted, got = (s.step(output, t, sample).prev_sample for s in (stock, ours))
    assert far(got, wanted) <= 1e-6


def test_saves_and_loads_with_stock(tmp_path):
    _, ours = pair(prediction_type="v_prediction")
    ours.save_pretrained(tmp_path)
    assert diffusers.DDIMScheduler.from_pretrained(tmp_path).config.prediction_type == "v_prediction"
    stock = diffusers.EulerDiscreteScheduler(**SD)
    assert DDIMScheduler.from_config(stock.config).config.beta_end == SD["beta_end"]
