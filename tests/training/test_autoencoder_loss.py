"""Stage 1's loss: each term against a formula written out here, the discriminator's timing, the codebook's lives."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from test_training import CUTOUTS

from ldmfast.data import emoji
from ldmfast.data.collection import load_pictures
from ldmfast.metrics import reconstruction
from ldmfast.training import config, train_autoencoder
from ldmfast.training.loop import train_step
from ldmfast.training.losses import adversarial, autoencoder_loss, codebook
from ldmfast.training.losses.autoencoder_loss import AutoencoderLoss
from ldmfast.training.run import Run
from ldmfast.training.step import Step

TINY = config.AutoencoderConfig(
    steps=6,
    batch=4,
    size=16,
    channels=(8, 16),
    groups=4,
    warmup=1,
    save_every=2,
    log_every=2,
    precision="fp32",
    discriminator_channels=4,
    discriminator_layers=1,
    codebook=32,
    latent_channels=2,
)


def lemons(tmp_path_factory):
    """A collection of one object on every ground."""
    folder = tmp_path_factory.mktemp("emoji") / "collection"
    emoji.build({"lemon": emoji.folder_cutouts(CUTOUTS)["lemon"]}, folder, size=16, count=1)
    return folder


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    return lemons(tmp_path_factory)


def stage(**changes):
    c = dataclasses.replace(TINY, **changes)
    return AutoencoderLoss(train_autoencoder.build(c), c).train()


def step(number=0):
    return Step(0, number, 0, 4)


def pictures(count=4):
    return torch.rand(count, 3, 16, 16) * 2 - 1


# --- terms -----------------------------------------------------------------------------------------------------------


class Distance(torch.nn.Module):
    name = "distance"

    def forward(self, x, y):
        return (x - y).square().mean(dim=(1, 2, 3))


def test_the_gradient_loss_sees_how_strong_edges_are_and_not_where_they_lie():
    """An edge of height 2 is one difference of 2 in each row of a window of 8x8: its strength is sqrt(4 / 8)."""
    at = torch.arange(16.0).expand(1, 3, 16, 16)
    sharp, aside, soft = ((at - edge).mul(slope).clamp(-1, 1) for edge, slope in ((5.5, 9), (6.5, 9), (5.5, 0.5)))
    strengths = autoencoder_loss.gradient_strengths(sharp)
    assert strengths.shape == (1, 6, 2, 2) and (strengths[:, :3] == 1e-3).all()
    torch.testing.assert_close(strengths[:, 3:], torch.full((1, 3, 2, 2), math.sqrt(4 / 8 + 1e-6)))
    assert autoencoder_loss.gradient_loss(sharp, sharp) == 0 == autoencoder_loss.gradient_loss(sharp, sharp.flip(1))
    moved, blurred = (autoencoder_loss.gradient_loss(sharp, y) for y in (aside, soft))
    assert moved == 0 and blurred > 0.1
    both = dict(ssim_weight=0.0, gradient_weight=0.7)
    expected = (sharp - soft).abs().mean() + 0.7 * blurred
    torch.testing.assert_close(autoencoder_loss.reconstruction_loss(sharp, soft, **both), expected)


def test_the_loss_of_a_kl_model_is_the_sum_of_its_terms():
    s = stage(kl_weight=0.1, ssim_weight=0.5, logvar="learned", perceptual_weight=2.0)
    s.__dict__["perceptual"] = Distance()
    s.logvar.data.fill_(-0.7)
    x = pictures()
    total, of_logvar = s.losses_of(x, step(), [])
    posterior = s.vae.encode(x).latent_dist
    y = s.vae.decode(posterior.mean + posterior.std * step().normal(2, 8, 8)).sample
    rec = (x - y).abs().mean() + 0.5 * (1 - reconstruction.ssim(y, x).mean()) + 2.0 * (x - y).square().mean()
    mean, logvar = posterior.mean, posterior.logvar
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    assert torch.allclose(total, rec / math.exp(-0.7) - 0.7 + 0.1 * kl, rtol=1e-5)
    assert torch.allclose(of_logvar, rec / math.exp(-0.7) - 0.7, rtol=1e-5)
    of_logvar.backward()
    assert s.vae.decoder.conv_out.weight.grad is None  # logvar follows a loss of its own
    assert s.logvar.grad == pytest.approx(1 - rec.item() / math.exp(-0.7), rel=1e-5)


def test_logvar_settles_at_the_logarithm_of_the_reconstruction():
    value = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([value], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        autoencoder_loss.nll_loss(torch.tensor(0.05), value).backward()
        optimizer.step()
    assert value.item() == pytest.approx(math.log(0.05), abs=1e-2)


def test_the_loss_of_a_vq_model_is_the_sum_of_its_terms():
    s = stage(family="vq", codebook_weight=0.7, commitment=0.3, ssim_weight=0.0, revive_every=0)
    x = pictures()
    (total,) = s.losses_of(x, step(), [])
    z = s.vae.encode(x).latents
    book = s.vae.quantize.embedding.weight
    rows = z.permute(0, 2, 3, 1).reshape(-1, 2)
    index = (rows[:, None] - book).square().sum(dim=2).argmin(dim=1)
    codes = book[index].view(4, 8, 8, 2).permute(0, 3, 1, 2)
    y = s.vae.decode(codes, force_not_quantize=True).sample
    term = (codes.detach() - z).square().mean() * 0.3 + (codes - z.detach()).square().mean()
    assert torch.allclose(total, (x - y).abs().mean() + 0.7 * term, rtol=1e-5)
    assert s.codebook.counts.sum() == len(rows) and s.codebook.counts.tolist() == index.bincount(minlength=32).tolist()


def test_the_gradient_goes_straight_through_the_codebook():
    model = stage(family="vq").vae
    z = torch.randn(2, 2, 4, 4, requires_grad=True)
    codes, _, index = model.quantise(z)
    assert torch.allclose(codes.permute(0, 2, 3, 1).reshape(-1, 2), model.quantize.embedding.weight[index])
    wanted = torch.randn_like(codes)
    (codes * wanted).sum().backward()
    assert torch.equal(z.grad, wanted) and model.quantize.embedding.weight.grad is None


def test_the_discriminator_starts_late_and_its_term_is_weighed():
    s = stage(adversarial=0.5, adversarial_start=3, kl_weight=0.0, ssim_weight=0.0)
    x = pictures()
    before, none = s.losses_of(x, step(2), [])
    assert none is None
    d = step(3)
    after, of_discriminator = s.losses_of(x, d, [])
    y = s.vae.decode(*_latents(s, x, 3)).sample
    assert before.item() == pytest.approx((s.vae.decode(*_latents(s, x, 2)).sample - x).abs().mean().item(), rel=1e-5)
    term = 0.5 * d.scalars["adaptive_weight"] * adversarial.generator_loss(s.discriminator, y)
    assert after.item() == pytest.approx(((y - x).abs().mean() + term).item(), rel=1e-4)
    wanted = adversarial.hinge(s.discriminator(x), s.discriminator(y))
    assert of_discriminator.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_the_discriminator_learns_before_its_term_counts():
    s = stage(adversarial=0.5, adversarial_start=5, discriminator_lead=2, kl_weight=0.0, ssim_weight=0.0)
    x = pictures()
    assert list(s.losses_of(x, step(2), []))[1] is None
    d = step(3)
    total, of_discriminator = s.losses_of(x, d, [])
    y = s.vae.decode(*_latents(s, x, 3)).sample
    assert total.item() == pytest.approx((y - x).abs().mean().item(), rel=1e-5) and "generator" not in d.scalars
    assert of_discriminator.item() == pytest.approx(adversarial.hinge(s.discriminator(x), s.discriminator(y)).item())
    list(s.losses_of(x, d := step(5), []))
    assert "generator" in d.scalars


def _latents(s, x, number):
    posterior = s.vae.encode(x).latent_dist
    return (posterior.mean + posterior.std * step(number).normal(2, 8, 8),)


def test_each_network_follows_its_own_loss():
    s = stage(adversarial=0.5, logvar="learned")
    run = Run(s, s.config, phases=s.phases())
    before = {name: value.clone() for name, value in s.state_dict().items()}
    x = pictures()
    for _ in range(2):  # the first is the warm-up's, at rate 0
        scalars = train_step(run, lambda d: s.losses_of(x, d, []))
    changed = {name.split(".")[0] for name, value in s.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"vae", "logvar", "discriminator"}
    assert {"loss", "loss/logvar", "loss/discriminator", "kl", "generator", "reconstruction"} <= scalars.keys()
    assert len(run.average) == len(list(s.vae.parameters()))  # neither logvar nor the discriminator is averaged


@torch.no_grad()
def test_weights_of_unit_gain_let_the_picture_through():
    """The share of an untrained model's reconstructions that differs between pictures, and is not drawn for all."""
    share = {}
    x = pictures(32)[:, :, :1, :1].expand(32, 3, 16, 16)  # plain colours
    for start in ("torch", "unit"):
        vae = stage(start=start, channels=(8, 16, 16, 16), groups=1).vae
        assert (vae.quant_conv.bias[2:] == -6).all()
        y = vae.decode(vae.encode(x).latent_dist.mode()).sample
        share[start] = (y.var(dim=0).mean() / y.square().mean()).item()
    assert share["unit"] > 0.3 and share["unit"] > 5 * share["torch"], share


def test_pictures_too_small_for_the_discriminator_are_refused():
    with pytest.raises(ValueError, match="16 pixels: a discriminator of 3 layers needs 24"):
        stage(adversarial=0.5, discriminator_layers=3)


# --- the codebook ----------------------------------------------------------------------------------------------------


def test_latents_pass_unquantised_until_the_codebook_starts():
    s = stage(family="vq", codebook_start=2, revive_every=0, ssim_weight=0.0)
    x, weight = pictures(), s.vae.quantize.embedding.weight
    first = weight.detach().clone()
    (total,) = s.losses_of(x, step(1), [weight.data])
    z = s.vae.encode(x).latents
    assert total.item() == pytest.approx((s.vae.decode_quantised(z) - x).abs().mean().item(), rel=1e-5)
    assert torch.equal(weight, first) and s.codebook.counts.sum() == 0 and s.codebook.seen > 0
    total.backward()
    assert s.vae.encoder.conv_in.weight.grad.abs().sum() > 0
    list(s.losses_of(x, step(2), [weight.data]))
    distance = (weight.detach()[:, None] - codebook.flat(z).detach()).abs().amax(dim=2)  # exact, unlike cdist's
    assert distance.min(dim=1).values.max() < 1e-6 and len(weight.unique(dim=0)) == 32 and s.codebook.counts.sum() > 0


def test_a_codebook_comes_to_life_in_training(collection, tmp_path):
    """Codes that start far from every encoding are never chosen without revival, and are with it."""
    used = {}
    for revive in (0, 2):
        c = dataclasses.replace(TINY, family="vq", revive_every=revive, export="fp32")
        used[revive] = train_autoencoder.train(collection, tmp_path / str(revive), c, quiet=True)["trained"]["used"]
    assert used[2] > 0.5 and used[2] > 2 * used[0]


def test_revived_codes_reach_the_average(collection):
    s = stage(family="vq", revive_every=1)
    run = Run(s, s.config, phases=s.phases())
    some = load_pictures(collection, 16)
    losses_of = train_autoencoder.loss_of(s, some, s.config, train_autoencoder.books_of(run))
    weight, average = train_autoencoder.books_of(run)
    assert weight.data_ptr() == s.vae.quantize.embedding.weight.data_ptr()
    average.fill_(100.0)
    next(iter(losses_of(step())))
    assert average.abs().max() < 100 and torch.equal(average, weight)
