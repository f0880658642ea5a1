"""An autoencoder that begins as a finished one's of half the size: same latents, the same picture enlarged."""

import pytest
import torch
import torch.nn.functional as F

from ldmfast import UNet
from ldmfast.pictures import to_pil
from ldmfast.pipeline import saved_autoencoder
from ldmfast.training import train_autoencoder
from ldmfast.training.config import AutoencoderConfig
from ldmfast.training.first_weights import grown
from ldmfast.training.first_weights.of_a_model import begin_with
from ldmfast.training.losses.autoencoder_loss import AutoencoderLoss
from ldmfast.training.step import Step

GROWN = dict(size=128, channels=(32, 32, 64, 96), groups=8, start="grown", first_weights="scenes64")


@pytest.fixture(scope="module")
def finished():
    return saved_autoencoder.load("scenes64")


@pytest.fixture(scope="module")
def pictures():
    """Two flat colours with a smooth edge, as objects on grounds have."""
    draw = torch.Generator().manual_seed(0)
    inside = torch.randn(12, 1, 8, 8, generator=draw)
    inside = F.interpolate(inside, size=128, mode="bicubic").mul(8).sigmoid()
    one, other = torch.rand(2, 12, 3, 1, 1, generator=draw) * 2 - 1
    return (inside * one + (1 - inside) * other).clamp(-1, 1)


@pytest.mark.parametrize("layers, channels", [(1, 4), (2, 4), (1, 7)])
@torch.no_grad()
def test_latents_and_pictures_are_the_finished_ones(finished, pictures, layers, channels):
    model = train_autoencoder.build(AutoencoderConfig(**GROWN, layers=layers, latent_channels=channels)).eval()
    grown.begin(model, finished, pictures)
    halves = F.avg_pool2d(pictures, 2)
    ours, theirs = model.encode(pictures).latent_dist, finished.encode(halves).latent_dist
    assert (ours.mode()[:, :4] - theirs.mode()).std() < 0.1 * theirs.mode().std()
    assert (ours.logvar[:, :4] - theirs.logvar).abs().mean() < 0.3
    more = ours.mode()[:, 4:]
    assert ((more.square().mean(dim=(0, 2, 3)) - 1).abs() < 1e-3).all()
    assert torch.allclose(ours.logvar[:, 4:], torch.tensor(grown.LOG_VARIANCE))
    seen = []
    for vae, z in ((model, torch.cat([theirs.mode(), more], dim=1)), (finished, theirs.mode())):
        vae.decoder.conv_norm_out.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        vae.decode(z)
        vae.decoder.conv_norm_out._forward_pre_hooks.clear()
    torch.testing.assert_close(seen[0], F.interpolate(seen[1], scale_factor=2.0), atol=1e-4, rtol=1e-4)
    drawn = model.decode(torch.cat([theirs.mode(), more], dim=1)).sample
    enlarged = F.interpolate(finished.decode(theirs.mode()).sample, scale_factor=2.0)
    assert (drawn - enlarged).abs().mean() < 0.1 * enlarged.abs().mean()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(latent_channels=3), "latent_channels=3 must be at least the finished autoencoder's 4"),
        (dict(groups=4), "norm_num_groups is 4, the finished autoencoder's 8"),
        (dict(channels=(32, 64, 96)), r"channels=\(32, 64, 96\) .* must be \(32, 32, 64, 96\)"),
        (dict(layers=0), "has no such place in this one"),
    ],
)
def test_what_does_not_go_together(finished, pictures, changes, message):
    with pytest.raises(ValueError, match=message):
        grown.begin(train_autoencoder.build(AutoencoderConfig(**GROWN | changes)), finished, pictures)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(start="grown"), "start=grown and first_weights go together"),
        (dict(first_weights="scenes64"), "start=grown and first_weights go together"),
        (dict(start="grown", first_weights="scenes64", family="vq"), "start=grown is for family=kl"),
        (dict(keep_latents=0.1), "keep_latents=0.1 is for start=grown, got start=torch"),
    ],
)
def test_options_that_contradict_each_other(settings, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderConfig(**settings)


def test_latents_are_held_to_the_finished_ones(finished, pictures):
    """The first weights' distance is small; latents that are all doubled are at their mean square."""
    config = AutoencoderConfig(**GROWN, latent_channels=6, keep_latents=0.5, kl_weight=0.0)
    vae = train_autoencoder.build(config)
    grown.begin(vae, finished, pictures)
    loss = AutoencoderLoss(vae, config, finished)
    assert not any(name.startswith("grew_from") for name in loss.state_dict())
    assert distance_of(loss, pictures) < 0.02
    with torch.no_grad():
        vae.quant_conv.weight *= 2
        vae.quant_conv.bias *= 2
        square = finished.encode(F.avg_pool2d(pictures, 2)).latent_dist.mode().square().mean()
    assert distance_of(loss, pictures) == pytest.approx(square.item(), rel=0.1)


def distance_of(loss, pictures):
    step = Step(0, 0, 0, len(pictures))
    with torch.no_grad():
        for total in loss.losses_of(pictures, step, ()):
            assert total.item() == pytest.approx(
                (step.scalars["reconstruction"] + 0.5 * step.scalars["latent_distance"]).item(), rel=1e-4
            )
    return step.scalars["latent_distance"].item()


def test_training_keeps_the_scale_of_the_latents(finished, pictures, tmp_path):
    """A stage writes latents of mean 0 and deviation 1; this one those that denoisers of the finished one know."""
    for i, picture in enumerate(to_pil(pictures)):
        (tmp_path / "data").mkdir(exist_ok=True)
        picture.save(tmp_path / "data" / f"{i}.png")
    config = AutoencoderConfig(**GROWN, latent_channels=6, steps=1, batch=2, learning_rate=1e-6, precision="fp32")
    train_autoencoder.train(tmp_path / "data", tmp_path / "out", config, quiet=True)
    with torch.no_grad():
        ours = saved_autoencoder.load(tmp_path / "out").encode(pictures).latent_dist.mode()
        theirs = finished.encode(F.avg_pool2d(pictures, 2)).latent_dist.mode()
    assert (ours[:, :4] - theirs).std() < 0.1 * theirs.std()
    assert torch.allclose(ours[:, 4:].std(dim=(0, 2, 3)), torch.ones(2), atol=0.02)


@torch.no_grad()
def test_a_denoiser_begins_with_one_of_fewer_channels(tmp_path):
    """What it predicts for the finished one's channels does not depend on the others yet."""
    torch.manual_seed(0)
    finished = UNet(
        sample_size=8,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=16,
        norm_num_groups=8,
    ).eval()
    finished.save_pretrained(tmp_path / "unet")
    wider = UNet.from_config(finished.config, in_channels=6, out_channels=6).eval()
    assert begin_with(wider, tmp_path) == []
    x, context = torch.randn(2, 6, 8, 8), torch.randn(2, 5, 16)
    same = finished(x[:, :4], 500, encoder_hidden_states=context).sample
    found = wider(x, 500, encoder_hidden_states=context).sample
    torch.testing.assert_close(found[:, :4], same, atol=1e-5, rtol=1e-5)
    assert found[:, 4:].std() > 0.01
