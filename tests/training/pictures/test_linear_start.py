"""An autoencoder that begins as a linear one: its codes are principal components, its pictures their mean colours."""

import pytest
import torch
import torch.nn.functional as F

from ldmfast.training import train_autoencoder
from ldmfast.training.config import AutoencoderConfig
from ldmfast.training.first_weights import linear_start


def build(**changes):
    settings = dict(size=32, channels=(32, 32, 48), groups=1, latent_channels=4)
    return train_autoencoder.build(AutoencoderConfig(**settings | changes))


@pytest.fixture(scope="module")
def pictures():
    """Smooth ones: noise at 8x8, enlarged."""
    coarse = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-2, 2) / 2
    return F.interpolate(coarse, size=32, mode="bicubic").clamp(-1, 1)


def explained(codes, x):
    """Share of the variance of f x f patches that a linear map of their codes [N, z, h, w] gives."""
    patches = F.unfold(x, 4, stride=4).transpose(1, 2).reshape(-1, 48)
    rows = codes.permute(0, 2, 3, 1).reshape(len(patches), -1)
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    rest = patches - rows @ torch.linalg.lstsq(rows, patches).solution
    return 1 - (rest.square().sum() / (patches - patches.mean(0)).square().sum()).item()


@pytest.mark.parametrize("channels, groups", [((32, 32, 48), 1), ((32, 48, 96), 4), ((16, 24, 48), 8)])
@torch.no_grad()
def test_codes_are_components_and_pictures_mean_colours(pictures, channels, groups):
    if groups == 8:
        with pytest.raises(ValueError, match="16 channels in groups=8 are too few for 3 of the decoder"):
            linear_start.begin(build(channels=channels, groups=groups), pictures)
        return
    model = build(channels=channels, groups=groups).eval()
    linear_start.begin(model, pictures)
    posterior = model.encode(pictures).latent_dist
    patches = F.unfold(pictures, 4, stride=4).transpose(1, 2).reshape(-1, 48)
    values = torch.linalg.eigvalsh(patches.T.cov(correction=0))
    best = (values[-4:].sum() / values.sum()).item()
    assert explained(posterior.mode(), pictures) > best - 0.03
    assert (posterior.std - torch.tensor(linear_start.LOG_VARIANCE / 2).exp()).abs().max() < 1e-5
    drawn, wanted = model.decode(posterior.mode()).sample, F.avg_pool2d(pictures, 4)
    apart = F.avg_pool2d(drawn, 4) - wanted
    assert apart.square().mean() < 0.05 * wanted.var()
    assert (drawn - F.interpolate(F.avg_pool2d(drawn, 4), scale_factor=4.0)).abs().max() < 1e-4  # a place, one colour


def test_it_begins_better_than_torchs_weights_and_learns(pictures):
    models = [build(), build()]
    linear_start.begin(models[1], pictures)
    loss = lambda model: (model.decode(model.encode(pictures).latent_dist.mode()).sample - pictures).square().mean()  # noqa: E731
    fresh, linear = map(loss, models)
    assert linear < 0.5 * fresh
    optimizer = torch.optim.AdamW(models[1].parameters(), lr=1e-5)
    for _ in range(10):
        now = loss(models[1])
        optimizer.zero_grad()
        now.backward()
        optimizer.step()
    assert now < linear


def test_a_codebook_has_no_linear_start():
    with pytest.raises(ValueError, match="start=linear is for family=kl; this one is family=vq"):
        AutoencoderConfig(start="linear", family="vq")
