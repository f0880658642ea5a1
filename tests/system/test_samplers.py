"""Our samplers against diffusers' on the same model outputs; `python tests/system/test_samplers.py` prints a table."""

from __future__ import annotations

import diffusers
import pytest
import torch

from ldmfast.diffusion import catalogue
from ldmfast.diffusion.guidance import guide
from ldmfast.diffusion.samplers import SAMPLERS, make_sampler
from ldmfast.diffusion.sampling import begin_at, keep_known, sample, starting_point

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers
LIMIT, STEPS, SHAPE = 1e-5, 50, (2, 4, 16, 16)
CASES = [
    (name, prediction, guidance, eta)
    for name, eta in (("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("plms", 0.0), ("ddpm", 0.0))
    for prediction in ("epsilon", "v_prediction")
    for guidance in (None, 7.5)
]


def model_scheduler(**config):
    return diffusers.DDIMScheduler(**{**SD, "clip_sample": False, "steps_offset": 1, **config})


def difference(name, prediction="epsilon", guidance=None, eta=0.0, steps=STEPS, dtype=torch.float32, **config):
    """Relative difference (norms) of the samples that `steps` steps of ours and of diffusers' end at.

    Both are given the same outputs at each step, and draw the same noise. PLMS keeps its history as diffusers does.
    """
    scheduler = model_scheduler(prediction_type=prediction, **config)
    kind, settings = SAMPLERS[name]
    stock = getattr(diffusers, kind).from_config(scheduler.config, **settings)
    drawn = torch.Generator().manual_seed(1)
    start = torch.randn(SHAPE, generator=drawn).to(dtype)
    outputs = torch.randn(2 * STEPS, 2 * SHAPE[0], *SHAPE[1:], generator=drawn).to(dtype)

    def run(sampler, fused):
        given = iter(outputs)

        def predict(x, t):
            output = next(given)
            return output if fused else output[: len(x)] if guidance is None else guide(output, guidance)

        generators = [torch.Generator().manual_seed(seed) for seed in range(SHAPE[0])]
        times = begin_at(sampler, steps, 0)
        scale = guidance if fused else None
        return sample(predict, start, sampler, times, guidance=scale, eta=eta, generators=generators)

    ours = make_sampler(name, scheduler)
    if name == "plms":
        ours.history = prediction
    assert type(ours).__module__.startswith("ldmfast") and type(stock).__module__.startswith("diffusers")
    wanted, got = run(stock, False).double(), run(ours, guidance is not None).double()
    return ((got - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize(("name", "prediction", "guidance", "eta"), CASES)
def test_fifty_steps_end_where_stock_does(name, prediction, guidance, eta):
    assert difference(name, prediction, guidance, eta) <= LIMIT


@pytest.mark.parametrize("name", ["plms", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_few_steps_and_every_spacing(name, steps, spacing):
    assert difference(name, steps=steps, timestep_spacing=spacing, set_alpha_to_one=False) <= LIMIT


@pytest.mark.parametrize(
    "config",
    [
        {"variance_type": "fixed_large"},
        {"clip_sample": True},
        {"thresholding": True},
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    ],
    ids=["large", "clip", "threshold", "zero-snr"],
)
def test_ddpm_with_other_settings(config):
    from ldmfast.diffusion.ddpm import DDPMScheduler

    stock, ours = (kind(**{**SD, "clip_sample": False, **config}) for kind in (diffusers.DDPMScheduler, DDPMScheduler))
    x, output = torch.randn(2, *SHAPE)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(5)
    for t in stock.timesteps:
        wanted, got = (s.step(output, t, x, generator=torch.Generator().manual_seed(3)) for s in (stock, ours))
        for each in ("prev_sample", "pred_original_sample"):
            assert (got[each] - wanted[each]).norm() <= 1e-6 * wanted[each].norm(), (each, t)


def test_pndm_with_its_runge_kutta_steps():
    from ldmfast.diffusion.pndm import PNDMScheduler

    ends = []
    for kind in (diffusers.PNDMScheduler, PNDMScheduler):
        scheduler = kind(**SD)
        times, given = begin_at(scheduler, 10, 0), torch.Generator().manual_seed(5)
        ends.append(
            sample(lambda x, t: torch.randn(SHAPE, generator=given), torch.ones(SHAPE), scheduler, times)  # noqa: B023
        )
    assert (ends[0] - ends[1]).norm() <= LIMIT * ends[0].norm()
    scheduler = PNDMScheduler(**SD)
    with pytest.raises(ValueError, match="call set_timesteps first"):
        scheduler.step_plms(torch.ones(1), 1, torch.ones(1))


def test_ours_save_and_load_as_diffusers(tmp_path):
    for name in ("ddpm", "plms"):
        ours = make_sampler(name, model_scheduler(prediction_type="v_prediction"))
        ours.save_pretrained(tmp_path / name)
        kind, settings = SAMPLERS[name]
        stock = getattr(diffusers, kind).from_pretrained(tmp_path / name)
        assert stock.config.prediction_type == "v_prediction" and settings.items() <= dict(stock.config).items()


# a denoiser that is exact: of a Gaussian with deviation 0.5 around a mean, x0 is known for any x_t
MEAN, DEVIATION = 0.7, 0.5


def exact(scheduler):
    """The epsilon of that Gaussian at the time t, for the VP form of x that every scheduler hands over."""

    def predict(x, t):
        alpha = scheduler.alphas_cumprod[round(float(t))].double()
        a, variance = alpha.sqrt(), 1 - alpha
        x0 = MEAN + a * DEVIATION**2 / (a * a * DEVIATION**2 + variance) * (x - a * MEAN)
        return ((x - a * x0) / variance.sqrt()).to(x.dtype)

    return predict


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("first", [0, 10])
def test_every_sampler_reaches_the_distribution(name, first):
    scheduler = make_sampler(name, model_scheduler(timestep_spacing="trailing"))
    times = begin_at(scheduler, 40, first)
    noise = torch.randn(1, 1, 64, 64)
    start = torch.full_like(noise, MEAN) + DEVIATION * torch.randn_like(noise)
    generators = [torch.Generator().manual_seed(0)]
    x = starting_point(scheduler, times, noise, start if first else None)
    x = sample(exact(scheduler), x, scheduler, times, generators=generators)
    assert abs(x.mean() - MEAN) <= 0.06 and abs(x.std() - DEVIATION) <= 0.06, (x.mean(), x.std())


def test_plms_of_a_model_that_predicts_v_is_as_good_as_of_one_that_predicts_epsilon():
    """One model put in both ways ends at the same sample; mixing v as it is ends further from many DDIM steps."""
    start = torch.randn(1, 1, 16, 16)

    def run(prediction, history="epsilon", name="plms", steps=8):
        scheduler = make_sampler(name, model_scheduler(timestep_spacing="trailing", prediction_type=prediction))
        scheduler.history = history
        epsilon = exact(scheduler)

        def predict(x, t):
            if prediction == "epsilon":
                return epsilon(x, t)
            alpha = scheduler.alphas_cumprod[int(t)]
            return (epsilon(x, t) - (1 - alpha).sqrt() * x) / alpha.sqrt()

        return sample(predict, start, scheduler, begin_at(scheduler, steps, 0))

    wanted = run("epsilon", name="ddim", steps=500)
    ends = {"epsilon": run("epsilon"), "v": run("v_prediction"), "mixed": run("v_prediction", "v_prediction")}
    far = {name: ((end - wanted).norm() / wanted.norm()).item() for name, end in ends.items()}
    assert (ends["v"] - ends["epsilon"]).norm() <= 1e-5 * wanted.norm()
    assert far["v"] < 0.5 * far["mixed"], far


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_known_stays_at_every_noise_level(name):
    """With the known part held, the rest is drawn as before, and the noise of the part matches its time."""
    scheduler = make_sampler(name, model_scheduler(timestep_spacing="trailing"))
    times, latents = begin_at(scheduler, 12, 0), torch.full((1, 1, 32, 64), 5.0)
    noise, mask = torch.randn(1, 1, 32, 64), torch.zeros(1, 1, 32, 64)
    mask[..., 32:] = 1
    keep, seen = keep_known(scheduler, times, latents, noise, mask), []

    def after(x, i):
        x = keep(x, i)
        if i + 1 < len(times):
            seen.append((float(times[i + 1]), scheduler.scale_model_input(x, times[i + 1])[..., :32]))
        return x

    x = starting_point(scheduler, times, noise)
    x = sample(exact(scheduler), x, scheduler, times, generators=[torch.Generator().manual_seed(0)], after=after)
    assert torch.equal(x[..., :32], latents[..., :32]) and abs(x[..., 32:].mean() - MEAN) <= 0.1
    for t, known in seen:
        alpha = scheduler.alphas_cumprod[round(t)]
        wanted = alpha.sqrt() * 5 + (1 - alpha).sqrt() * noise[..., :32]
        assert (known - wanted).abs().max() <= 0.02, t


def test_guidance_rescale_gives_the_deviation_of_the_conditional_half():
    output = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    conditional, plain = output[2:], guide(output, 7.5)
    full, half = guide(output, 7.5, 1.0), guide(output, 7.5, 0.5)
    torch.testing.assert_close(full.flatten(1).std(dim=1), conditional.flatten(1).std(dim=1))
    torch.testing.assert_close(half, (plain + full) / 2)
    torch.testing.assert_close(guide(output, 1.0, 1.0), conditional)
    assert torch.isfinite(guide(torch.zeros(2, 3), 3.0, 1.0)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_guidance_does_not_depend_on_the_batch(dtype):
    output = torch.randn(2, 5, 4, 7, 9).to(dtype)
    together = guide(output.flatten(0, 1), 3.3)
    for i in range(5):
        assert torch.equal(guide(output[:, i : i + 1].flatten(0, 1), 3.3), together[i : i + 1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_is_the_same_by_every_way(name):
    """Fused where the sampler takes it, combined before where it does not: as if the model gave the combination."""
    outputs = torch.randn(30, 4, 4, 8, 8)

    def run(guidance, combine):
        scheduler = make_sampler(name, model_scheduler())
        given, times = iter(outputs), begin_at(scheduler, 5, 0)
        x = starting_point(scheduler, times, torch.ones(2, 4, 8, 8))
        return sample(
            lambda x, t: combine(next(given)),
            x,
            scheduler,
            times,
            guidance=guidance,
            generators=[torch.Generator().manual_seed(s) for s in (1, 2)],
        )

    wanted, got = run(None, lambda output: guide(output, 3.0)), run(3.0, lambda output: output)
    assert (got - wanted).norm() <= 1e-5 * wanted.norm()


def test_an_unknown_sampler_and_an_unfit_one():
    with pytest.raises(ValueError, match="sampler='ddmi' is none of ddim, ddpm, plms"):
        make_sampler("ddmi", model_scheduler())
    with pytest.raises(ValueError, match="PNDMScheduler has no rescale_betas_zero_snr"):
        make_sampler("plms", model_scheduler(rescale_betas_zero_snr=True))
    given = diffusers.EulerDiscreteScheduler(**SD)
    assert make_sampler(given, model_scheduler()) is given and make_sampler(None, given) is given
    made = make_sampler(diffusers.LCMScheduler, model_scheduler(prediction_type="v_prediction"))
    assert type(made) is diffusers.LCMScheduler and made.config.prediction_type == "v_prediction"
    # a schedule that does not say whether to clip is a latent model's
    assert make_sampler("ddpm", given).config.clip_sample is False
    with pytest.raises(ValueError, match="eta=0.5: EulerDiscreteScheduler takes none"):
        sample(None, torch.ones(1), given, [], eta=0.5)


def main():
    print(f"relative difference from diffusers' scheduler on the same outputs, {STEPS} steps, float32, {list(SHAPE)}")
    print(f"{'sampler':8} {'eta':>4} {'prediction':14} {'guidance':>8} {'difference':>11}   (at most {LIMIT})")
    for case in CASES:
        name, prediction, guidance, eta = case
        print(f"{name:8} {eta:4} {prediction:14} {guidance or '-':>8} {difference(*case):11.2e}")
    from tiny_pipelines import batch_difference, class_conditional

    print("\nthree seeds in a batch from the seeds one by one, 10 steps of a tiny network   (at most 1e-06)")
    for name in SAMPLERS:
        print(f"{name:14} {batch_difference(class_conditional(), name, 10):11.2e}")


if __name__ == "__main__":
    main()


@pytest.mark.parametrize("kind", ["PNDMScheduler", "DDPMScheduler", "DDIMScheduler"])
def test_no_steps(kind):
    for steps in (0, -3):
        with pytest.raises(ValueError, match=f"num_inference_steps is {steps}, expected at least 1"):
            catalogue.scheduler(kind)().set_timesteps(steps)
