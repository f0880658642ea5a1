"""The patch discriminators of stage 1 by themselves: their networks, the hinge losses, the adaptive weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldmfast.metrics import backbones
from ldmfast.training.losses import adversarial


def test_hinge_losses():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    assert adversarial.hinge(real, fake).item() == pytest.approx(0.5 * (0.5 / 2 + 1.25 / 2))
    net = adversarial.Discriminator(4, 2).eval()
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(adversarial.generator_loss(net, x), -net(x).mean())
    y = x.clone().requires_grad_(True)
    adversarial.discriminator_loss(net, x, y).backward()
    assert y.grad is None and net[0].weight.grad is not None


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_discriminator_is_isolas(layers):
    net = adversarial.Discriminator(8, layers)
    widths = [m.out_channels for m in net if isinstance(m, torch.nn.Conv2d)]
    assert widths == [8, 16, 32, 64][: layers + 1] + [1]
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in net) == layers
    side = net.smallest()
    assert min(net(torch.rand(2, 3, side, side)).shape[2:]) >= 1
    with pytest.raises(RuntimeError):
        net(torch.rand(2, 3, side // 2, side // 2))


def test_a_spectrally_normalised_discriminator_sees_how_strong_a_picture_is():
    net = adversarial.Discriminator(8, 2, "spectral")
    convolutions = [m for m in net if isinstance(m, torch.nn.Conv2d)]
    for _ in range(50):  # each forward improves its estimate of the largest singular value
        net(torch.rand(2, 3, 32, 32))
    for convolution in convolutions:
        assert torch.linalg.matrix_norm(convolution.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():  # batch norm divides a factor out; here the logits' spread follows it
        spread = [net(x * factor).std().item() for factor in (1.0, 0.5)]
    assert spread[1] < 0.7 * spread[0]


class Steps(torch.nn.Module):
    """A backbone of two maps: the picture at half and at a quarter of its size."""

    name = "steps"

    def stages(self, x):
        return [F.avg_pool2d(x, 2), F.avg_pool2d(x, 4)]


def test_a_discriminator_of_features_has_a_head_on_each_map():
    net = adversarial.FeatureDiscriminator(Steps(), 8, 2)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits = net(x)
    assert logits.shape == (2, 2, 16, 16)
    coarse = net.heads[1](F.avg_pool2d(x, 4))
    assert torch.allclose(logits[:, 1], coarse[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2), atol=1e-3)
    adversarial.generator_loss(net, x).backward()
    assert x.grad.abs().sum() > 0 and all(name.startswith("heads.") for name in net.state_dict())
    with pytest.raises(ValueError, match="discriminator_layers=3: steps has 2 feature maps"):
        adversarial.FeatureDiscriminator(Steps(), 8, 3)


def test_a_discriminator_of_features_learns_what_a_blur_is():
    net = adversarial.FeatureDiscriminator(backbones.squeezenet(), maps=2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    x = torch.rand(8, 3, 32, 32) * 2 - 1
    losses = []
    for _ in range(30):
        loss = adversarial.discriminator_loss(net, x, F.avg_pool2d(x, 3, stride=1, padding=1))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert not any("fire" in name for name in net.state_dict())  # SqueezeNet is not ours to save


def test_the_released_discriminator_sees_70_pixels():
    net = adversarial.Discriminator()
    assert net(torch.rand(2, 3, 256, 256)).shape == (2, 1, 30, 30)
    assert sum(p.numel() for p in net.parameters()) == 2_765_633  # as pix2pix's 70x70 patch discriminator on 3 channels


def test_the_adaptive_weight_is_a_ratio_of_gradients():
    last = torch.randn(3, 5, requires_grad=True)
    x = torch.randn(5)
    nll, g = 3 * (last @ x).sum(), 0.5 * (last @ x).sum()
    size = (3**0.5) * x.norm()
    weight = adversarial.adaptive_weight(nll, g, last)
    assert weight.item() == pytest.approx((3 * size / (0.5 * size + 1e-4)).item(), rel=1e-5)
    assert not weight.requires_grad and last.grad is None
    assert adversarial.adaptive_weight(nll * 1e6, g * 1e-6, last).item() == 1e4
