"""`AutoencoderKL` against stock diffusers."""

from __future__ import annotations

import copy
import warnings

import diffusers
import pytest
import tiny
import torch

from ldmfast import ops
from ldmfast.models import tiled_decode
from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.encode_decode import encode_pictures

CLOSE = 1e-5  # norm of the difference over norm, float32


def pair(**changes):
    stock = tiny.vae(**changes)
    return stock, AutoencoderKL.adopt(copy.deepcopy(stock))


def encoded(model, x):
    return model.encode(x).latent_dist.parameters


@pytest.mark.parametrize("size", [(32, 32), (36, 28), (40, 12)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mid_block_add_attention": False},
        {"use_quant_conv": False, "use_post_quant_conv": False},
        {"latent_channels": 16, "block_out_channels": (16, 32, 512), "norm_num_groups": 16},
    ],
    ids=["plain", "no-attention", "no-quant-conv", "wide-head"],
)
@torch.no_grad()
def test_equals_stock(changes, size):
    stock, ours = pair(**changes)
    x = torch.randn(2, 3, *size)
    exact = copy.deepcopy(stock).double()  # stock float32 itself is up to 5e-6 from it at width 512
    moments = encoded(exact, x.double())
    assert tiny.error(encoded(ours, x), moments) <= CLOSE
    z = moments.float().chunk(2, dim=1)[0]
    wanted, got = exact.decode(z.double()).sample, ours.decode(z).sample
    assert tiny.error(got, wanted) <= CLOSE and got.is_contiguous()
    assert tiny.error(ours(x).sample, exact(x.double()).sample) <= CLOSE
    assert ours.explain() == []


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_stock_bfloat16():
    stock, ours = pair()
    halves = [copy.deepcopy(model).bfloat16() for model in (stock, ours)]
    errors = [[], []]
    for _ in range(4):
        x, z = torch.randn(2, 3, 32, 32), torch.randn(2, 4, 8, 8)
        for model, found in zip(halves, errors, strict=True):
            found.append(tiny.error(encoded(model, x.bfloat16()), encoded(stock, x)))
            found.append(tiny.error(model.decode(z.bfloat16()).sample, stock.decode(z).sample))
    assert sum(errors[1]) <= 1.1 * sum(errors[0])


def test_gradients_equal_stock():
    stock, ours = pair()
    x = torch.randn(1, 3, 16, 16)
    for model in (stock, ours):
        model(x).sample.square().mean().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        assert (mine[name].grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-8, name


@pytest.mark.parametrize("mode", ["slicing", "tiling"])
@torch.no_grad()
def test_slicing_and_tiling(mode):
    stock, ours = pair()
    for model in (stock, ours):
        getattr(model, f"enable_{mode}")()
    x = torch.randn(2, 3, 48, 48)
    assert tiny.error(encoded(ours, x), encoded(stock, x)) <= CLOSE
    z = torch.randn(2, 4, 12, 12)
    assert tiny.error(ours.decode(z).sample, stock.decode(z).sample) <= CLOSE
    assert any("tiling is on" in sentence for sentence in ours.explain()) == (mode == "tiling")


def overflowing():
    """A float16 autoencoder whose decoder passes 65504 inside, and ends finite in float32."""
    stock, ours = pair()
    with torch.no_grad():
        ours.decoder.conv_in.weight *= 3e5
    return ours.half()


@torch.no_grad()
def test_an_overflowing_float16_decoding_is_repeated_in_float32_and_warned_of_once():
    ours = overflowing()
    weights = {name: (value.data_ptr(), value.clone()) for name, value in ours.state_dict().items()}
    z = torch.randn(1, 4, 8, 8).half()
    with pytest.warns(UserWarning, match="float16 autoencoder overflowed; decoded again in float32"):
        x = ours.decode(z).sample
    assert x.dtype is torch.float16 and torch.isfinite(x).all()
    assert tiny.error(x, copy.deepcopy(ours).float().decode(z.float()).sample) <= 1e-3
    for name, value in ours.state_dict().items():
        assert value.data_ptr() == weights[name][0] and torch.equal(value, weights[name][1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.decode(z)


@torch.no_grad()
def test_an_overflowing_float16_encoding_is_repeated_in_float32_and_warned_of_once():
    _, ours = pair()
    ours.encoder.conv_in.weight *= 3e5
    ours, x = ours.half(), torch.rand(1, 3, 32, 32).half()
    with pytest.warns(UserWarning, match="float16 autoencoder overflowed; encoded again in float32$"):
        z = ours.encode(x).latent_dist.mode()
    assert z.dtype is torch.float16 and torch.isfinite(z).all()
    assert tiny.error(z, copy.deepcopy(ours).float().encode(x.float()).latent_dist.mode()) <= 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.encode(x)


@torch.no_grad()
def test_latents_beyond_float16_are_said_and_refused():
    _, ours = pair()
    ours.quant_conv.weight *= 1e6
    ours, x = ours.half(), torch.rand(1, 3, 32, 32).half()
    with pytest.warns(UserWarning, match="encoded again in float32, and the result is beyond float16 itself"):
        with pytest.raises(FloatingPointError, match="encode_pictures: the latents are not finite"):
            encode_pictures(ours, x)


@torch.no_grad()
def test_what_is_not_finite_itself_is_no_overflow():
    ours, z = overflowing(), torch.full((1, 4, 8, 8), float("nan")).half()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.decode(z).sample.isnan().any()


@torch.no_grad()
def test_an_overflow_under_offloading_is_only_warned_of():
    ours = overflowing()
    ours.decoder.conv_in.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="left so, because of decoder.conv_in: it has hooks"):
        assert not torch.isfinite(ours.decode(torch.randn(1, 4, 8, 8).half()).sample).all()


def test_saved_files_are_stock(tmp_path):
    stock, ours = pair()
    ours.save_pretrained(tmp_path)
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, stock.state_dict()[name])
    again = AutoencoderKL.from_pretrained(tmp_path)
    assert type(again) is AutoencoderKL and again.config.scaling_factor == stock.config.scaling_factor


# --- a strip at a time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1, 5, 16, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(48, 32), (37, 16), (33, 7)])
@torch.no_grad()
def test_strips_give_the_whole_pictures_answer(size, dtype, tile):
    ours = pair()[1].to(dtype)
    z = torch.randn(2, 4, *size).to(dtype)
    wanted, got = ours.decode(z).sample, ours.decode(z, tile=tile).sample
    assert got.shape == wanted.shape and got.dtype == dtype and got.is_contiguous()
    assert tiny.error(got, wanted) <= (1e-6 if size[1] % 4 == 0 else 5e-6 if dtype is torch.float32 else 2e-2)


@torch.no_grad()
def test_strips_where_nothing_is_folded():
    ours, z = pair()[1], torch.randn(1, 4, 24, 16)
    wanted = ours.decode(z).sample
    with ops.use_backend("torch"):
        assert tiny.error(ours.decode(z, tile=4).sample, wanted) <= CLOSE


def test_strips_need_no_whole_picture_between_levels(monkeypatch):
    """What a convolution leaves has at most the rows of a strip and of its surroundings."""
    ours, heights = pair()[1], []
    original = tiled_decode.conv2d

    def noted(m, x, **around):
        y = original(m, x, **around)
        heights.append(y.shape[2] / (2 if around.get("upsample") else 1))
        return y

    monkeypatch.setattr(tiled_decode, "conv2d", noted)
    levels = 2 ** (len(ours.config.block_out_channels) - 1)
    ours.decode(torch.randn(1, 4, 64, 32), tile=8)
    inside = [height for height in heights[1:]]  # but for the first, at the latents' size
    assert max(inside) <= 8 * levels + 4 * tiled_decode.REACH < 64 * levels


def test_a_wrong_tile_is_refused():
    ours, z = pair()[1], torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="decode: tile is 0, expected 1 or more rows"):
        ours.decode(z, tile=0)
    ours.decoder.up_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="up_blocks.0.resnets.0.conv1 cannot be run in strips, because it has hooks"):
        ours.decode(z, tile=4)


@torch.no_grad()
def test_an_overflow_in_strips_is_decoded_again():
    ours, z = overflowing(), torch.randn(1, 4, 8, 8).half()
    with pytest.warns(UserWarning, match="overflowed; decoded again in float32"):
        got = ours.decode(z, tile=4).sample
    assert torch.isfinite(got).all() and got.dtype == torch.float16
