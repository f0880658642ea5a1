"""Steps by a table on the device: the numbers of the steps by the host's, one launch, and nothing read back."""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldmfast.diffusion import DDIMScheduler, DDPMScheduler, PNDMScheduler
from ldmfast.diffusion.step_tables import StepTables, place_of

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PLMS = {**SD, "skip_prk_steps": True, "steps_offset": 1}
SETTINGS = {
    "ddim": (DDIMScheduler, {**SD, "clip_sample": False}, {}),
    "ddim clip": (DDIMScheduler, {**SD, "clip_sample_range": 0.8}, {}),
    "ddim final alpha": (DDIMScheduler, {**SD, "clip_sample": False, "set_alpha_to_one": False}, {}),
    "ddim eta": (DDIMScheduler, {**SD, "clip_sample": False}, {"eta": 0.7}),
    "ddim v": (DDIMScheduler, {**SD, "prediction_type": "v_prediction", "clip_sample": False}, {"eta": 1.0}),
    "ddim sample": (DDIMScheduler, {**SD, "prediction_type": "sample", "clip_sample": False}, {}),
    "plms": (PNDMScheduler, PLMS, {}),
    "plms v": (PNDMScheduler, {**PLMS, "prediction_type": "v_prediction"}, {}),
    "ddpm": (DDPMScheduler, {**SD, "clip_sample": False}, {}),
    "ddpm v": (DDPMScheduler, {**SD, "prediction_type": "v_prediction", "clip_sample": False}, {}),
}


@pytest.fixture
def unread(monkeypatch):
    """Timesteps that are tensors count as a device's, whose value nobody may read."""
    number = StepTables._time
    monkeypatch.setattr(
        StepTables, "_time", lambda self, t: None if isinstance(t, torch.Tensor) else number(self, t), raising=True
    )


class Launches(TorchDispatchMode):
    """Counts what would be launched: operations that make no view."""

    VIEWS = ("view", "reshape", "_unsafe_view", "as_strided", "select", "slice", "expand", "detach", "alias", "unbind")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item"), "a value was read back"
        if name not in self.VIEWS and not name.startswith("empty"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def loop(scheduler, options, timesteps, device="cpu", guidance=7.5, before=lambda: None):
    """The samples after each step, from the same numbers."""
    torch.manual_seed(0)
    x, found = torch.randn(2, 4, 6, 5, device=device), []
    if "ddpm" in str(type(scheduler)).lower() or options:
        options = {**options, "generator": torch.Generator().manual_seed(1)} if device == "cpu" else options
    for t in timesteps:
        output = torch.randn(4, 4, 6, 5, device=device)
        before()
        x = scheduler.step(output, t, x, guidance=guidance, **options).prev_sample
        found.append(x)
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_a_table_gives_the_numbers_of_the_host(name, unread):
    kind, config, options = SETTINGS[name]
    host, device = kind(**config), kind(**config)
    for scheduler in (host, device):
        scheduler.set_timesteps(7)
    numbers = loop(host, options, [int(t) for t in host.timesteps])
    for mine, theirs in zip(loop(device, options, device.timesteps), numbers, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_is_one_launch_beside_its_noise(name):
    """On meta tensors, whose values cannot be read. set_timesteps makes the table, or with eta the first step does."""
    kind, config, options = SETTINGS[name]
    scheduler = kind(**config)
    scheduler.set_timesteps(7, "meta")
    made = [scheduler.timesteps[i] for i in range(len(scheduler.timesteps))]
    counts = []
    for t in made:
        sample, output = torch.empty(2, 4, 6, 5, device="meta"), torch.empty(4, 4, 6, 5, device="meta")
        with Launches() as launches:
            scheduler.step(output, t, sample, guidance=7.5, **options)
        counts.append([name for name in launches.names if name not in ("randn", "normal_")])
    assert counts[bool(options) :] == [["ddim_step"]] * (len(made) - bool(options))


@pytest.mark.parametrize("name", ["ddim", "ddim eta", "plms v", "ddpm"])
def test_what_changes_is_seen(name, unread):
    """The schedule replaced, changed in place, and another number of steps: as a scheduler that is made so."""
    kind, config, options = SETTINGS[name]
    scheduler, fresh = kind(**config), kind(**config)
    scheduler.set_timesteps(7)
    loop(scheduler, options, scheduler.timesteps)
    for change in ("replaced", "in place", "steps", "device's copy"):
        for each in (scheduler, fresh):
            if change == "replaced":
                each.alphas_cumprod = each.alphas_cumprod**1.5
            elif change == "in place":
                each.alphas_cumprod.mul_(0.9)
            each.set_timesteps(5 if change == "steps" else 7)
        if change == "device's copy":
            scheduler = copy.deepcopy(scheduler)
            scheduler.add_noise(torch.randn(1, 4), torch.randn(1, 4), torch.tensor([3]))
        wanted = loop(fresh, options, [int(t) for t in fresh.timesteps])
        found = loop(scheduler, options, scheduler.timesteps)
        assert all(map(torch.equal, found, wanted)), change


def test_prediction_and_eta_may_change_between_steps(unread):
    scheduler = DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(4)
    x, output, t = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 6, 6), scheduler.timesteps[1]
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler.register_to_config(prediction_type=kind)
        for eta in (0.0, 0.5):
            both = [
                scheduler.step(output, time, x, eta=eta, variance_noise=-x if eta else None) for time in (t, int(t))
            ]
            assert torch.equal(both[0].prev_sample, both[1].prev_sample), (kind, eta)


def test_timesteps_of_a_batch(unread):
    """[N] timesteps: each sample takes its own row."""
    scheduler = DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(4)
    x, output, times = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6), scheduler.timesteps[:2]
    found = scheduler.step(output, times, x).prev_sample
    for i, t in enumerate(times.tolist()):
        assert torch.equal(found[i : i + 1], scheduler.step(output[i : i + 1], t, x[i : i + 1]).prev_sample)


def test_custom_timesteps_of_ddpm(unread):
    stock, ours = (kind(**SD, clip_sample=False) for kind in (diffusers.DDPMScheduler, DDPMScheduler))
    for scheduler in (stock, ours):
        scheduler.set_timesteps(timesteps=[900, 333, 40, 3])
    x, output = torch.randn(2, 1, 4, 6, 6)
    for t in ours.timesteps:
        wanted = stock.step(output, t, x, generator=torch.Generator().manual_seed(2)).prev_sample
        found = ours.step(output, t, x, generator=torch.Generator().manual_seed(2)).prev_sample
        assert (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    with pytest.raises(IndexError, match="timestep 5 is none of the scheduler's timesteps"):
        ours.step(output, 5, x)
    assert ours.step(output, torch.tensor(5), x).prev_sample.isnan().all()  # nobody may read it


def test_ddpm_draws_as_often_as_stock():
    """A generator stands after a picture where it stands after stock's: the last step of all draws nothing."""
    generators = [torch.Generator().manual_seed(4) for _ in range(2)]
    for kind, generator in zip((diffusers.DDPMScheduler, DDPMScheduler), generators, strict=True):
        scheduler = kind(**SD, clip_sample=False)
        scheduler.set_timesteps(5)
        for t in scheduler.timesteps:
            scheduler.step(torch.zeros(1, 4, 2, 2), t, torch.zeros(1, 4, 2, 2), generator=generator)
    assert torch.equal(*(generator.get_state() for generator in generators))


def test_the_place_of_a_timestep_is_its_address():
    times = torch.arange(9, -1, -1)
    assert [place_of(t, times) for t in times] == list(range(10))
    assert place_of(times[3].clone(), times) is None
    assert place_of(times[3].int(), times) is None
    assert place_of(torch.arange(20)[5:][2], times) is None
    assert place_of(times[2:4], times) is None


@pytest.mark.parametrize("name", ["ddim eta", "plms", "ddpm"])
def test_inference_mode_leaves_nothing_behind(name, unread):
    """What the first picture made in inference mode serves a gradient after it."""
    kind, config, options = SETTINGS[name]
    scheduler = kind(**config)
    with torch.inference_mode():
        scheduler.set_timesteps(3)
        scheduler.add_noise(torch.randn(1, 4), torch.randn(1, 4), torch.tensor([3]))
        loop(scheduler, options, scheduler.timesteps)
    scheduler.set_timesteps(3)
    x = torch.randn(2, 4, 6, 5, requires_grad=True)
    scheduler.step(torch.randn(2, 4, 6, 5), scheduler.timesteps[0], x).prev_sample.sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_schedule_can_be_learned(unread):
    scheduler = DDIMScheduler(**SD, clip_sample=False)
    scheduler.set_timesteps(3)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone().requires_grad_()
    for _ in range(2):  # no graph is kept from the first
        x = scheduler.step(torch.ones(1, 4), scheduler.timesteps[0], torch.ones(1, 4)).prev_sample
        x.sum().backward()
    assert scheduler.alphas_cumprod.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler, PNDMScheduler])
def test_ours_offer_what_stock_offers(kind):
    """Code asks a scheduler what it can do by hasattr."""
    asked = ("add_noise", "get_velocity", "scale_model_input", "set_begin_index", "set_timesteps", "step")
    assert [hasattr(kind(), name) for name in asked] == [hasattr(kind.stock(), name) for name in asked]
