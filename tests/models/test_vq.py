"""`VQModel` against stock diffusers, and the two functions that hide which family an autoencoder is of."""

from __future__ import annotations

import copy

import diffusers
import pytest
import tiny
import torch

import ldmfast
from ldmfast.models.encode_decode import decode_latents, downsampling, encode_pictures
from ldmfast.models.vq import VQModel
from ldmfast.training.config import DecoderConfig
from ldmfast.training.train_decoder import Decoder

CLOSE = 1e-5  # norm of the difference over norm, float32
ATTENTION = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
}


def stock_model(**changes):
    config = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "norm_num_groups": 8,
        "num_vq_embeddings": 64,
        "sample_size": 32,
    }
    model = diffusers.VQModel(**{**config, **changes}).eval()
    model.quantize.embedding.weight.data.normal_()
    return model


def pair(**changes):
    stock = stock_model(**changes)
    return stock, VQModel.adopt(copy.deepcopy(stock))


@pytest.mark.parametrize("size", [(32, 32), (36, 28), (40, 12)])
@pytest.mark.parametrize(
    "changes",
    [{}, ATTENTION, {"mid_block_add_attention": False}, {"vq_embed_dim": 8, "latent_channels": 4}],
    ids=["plain", "attention", "no-attention", "wide-codes"],
)
@torch.no_grad()
def test_equals_stock(changes, size):
    stock, ours = pair(**changes)
    x = torch.randn(2, 3, *size)
    exact = copy.deepcopy(stock).double()
    wanted = exact.encode(x.double()).latents
    assert tiny.error(ours.encode(x).latents, wanted) <= CLOSE
    z = wanted.float()
    assert tiny.error(ours.decode(z, force_not_quantize=True).sample, exact.decode(z.double(), True).sample) <= CLOSE
    got, wanted = ours.decode(z), stock.decode(z)
    assert tiny.error(got.sample, wanted.sample) <= CLOSE and got.sample.is_contiguous()
    assert torch.equal(got.commit_loss, wanted.commit_loss)
    assert tiny.error(ours(x).sample, stock(x).sample) <= CLOSE
    assert torch.equal(ours.decode(z, return_dict=False)[0], got.sample)
    assert ours.explain() == []


@pytest.mark.parametrize(
    "changes", [{"norm_type": "spatial", "block_out_channels": (32, 32, 32)}, {"lookup_from_codebook": True}]
)
@torch.no_grad()
def test_what_our_forward_does_not_know_runs_as_stock(changes):
    stock, ours = pair(**changes)
    if changes.get("norm_type"):
        z = torch.randn(1, 3, 8, 8)
        assert tiny.error(ours.decode(z).sample, stock.decode(z).sample) <= CLOSE
        assert any("norms are spatial" in sentence for sentence in ours.explain())
        return
    index, shape = torch.randint(64, (64,)), (1, 8, 8, 3)
    mine, theirs = (model.quantize.get_codebook_entry(index, shape) for model in (ours, stock))
    assert torch.equal(mine, theirs)
    got, wanted = (model.decode(index, True, shape=shape).sample for model in (ours, stock))
    assert tiny.error(got, wanted) <= CLOSE


@torch.no_grad()
def test_bfloat16_is_as_near_to_float32_as_stock_bfloat16():
    stock, ours = pair()
    halves = [copy.deepcopy(model).bfloat16() for model in (stock, ours)]
    errors = [[], []]
    for _ in range(4):
        x, z = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 8, 8)
        for model, found in zip(halves, errors, strict=True):
            found.append(tiny.error(model.encode(x.bfloat16()).latents, stock.encode(x).latents))
            found.append(tiny.error(model.decode(z.bfloat16(), True).sample, stock.decode(z, True).sample))
    assert sum(errors[1]) <= 1.1 * sum(errors[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_the_halves_are_quantised_in_float32(dtype):
    ours = pair()[1].to(dtype)
    z = torch.randn(2, 3, 8, 8, dtype=dtype)
    codes, loss, index = ours.quantise(z)
    book = ours.quantize.embedding.weight.float()
    wanted = torch.cdist(z.float().permute(0, 2, 3, 1).reshape(-1, 3), book).argmin(dim=1)
    assert torch.equal(index, wanted) and codes.dtype is loss.dtype is dtype
    assert ours.decode(z).sample.dtype is dtype


@pytest.mark.parametrize("way", ["encode", "decode"])
@torch.no_grad()
def test_a_float16_overflow_is_repeated_in_float32(way):
    _, ours = pair()
    (ours.encoder if way == "encode" else ours.decoder).conv_in.weight *= 2e5
    ours, x = ours.half(), torch.rand(1, 3 if way == "encode" else ours.config.latent_channels, 16, 16).half()
    with pytest.warns(UserWarning, match=f"float16 autoencoder overflowed; {way}d again in float32$"):
        got = getattr(ours, way)(x)[0]
    assert got.dtype is torch.float16 and torch.isfinite(got).all()
    assert tiny.error(got, getattr(copy.deepcopy(ours).float(), way)(x.float())[0]) <= 1e-3


def test_gradients_equal_stock():
    stock, ours = pair(**ATTENTION)
    x = torch.randn(1, 3, 16, 16)
    for model in (stock, ours):
        out = model(x)
        (out.sample.square().mean() + out.commit_loss).backward()
    mine = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        assert (mine[name].grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-8, name


@torch.no_grad()
def test_slicing_as_stock_has_it():
    stock, ours = pair()
    assert hasattr(stock, "use_slicing") == hasattr(ours, "use_slicing")
    ours.encoder.conv_in.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 3, 16, 16)
    assert tiny.error(ours(x).sample, stock(x).sample) <= CLOSE
    assert any("encoder.conv_in" in sentence and "it has hooks" in sentence for sentence in ours.explain())


def test_saved_files_are_stock(tmp_path):
    stock, ours = pair(**ATTENTION)
    ours.save_pretrained(tmp_path / "vq")
    loaded = diffusers.VQModel.from_pretrained(tmp_path / "vq")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, stock.state_dict()[name])
    again = VQModel.from_pretrained(tmp_path / "vq")
    assert type(again) is ldmfast.VQModel and again.config.num_vq_embeddings == 64
    with pytest.raises(ValueError, match="holds a VQModel, not a AutoencoderKL"):
        ldmfast.AutoencoderKL.from_pretrained(tmp_path / "vq")


@torch.no_grad()
def test_both_families_through_one_pair_of_functions():
    x = torch.randn(2, 3, 32, 32)
    kl, vq = tiny.vae(scaling_factor=0.5), pair(scaling_factor=0.25)[1]
    assert torch.equal(encode_pictures(kl, x), kl.encode(x).latent_dist.mean * 0.5)
    drawn = [encode_pictures(kl, x, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], encode_pictures(kl, x))
    z = encode_pictures(vq, x)
    assert torch.equal(z, vq.encode(x).latents * 0.25)
    assert torch.equal(decode_latents(vq, z), vq.decode(vq.encode(x).latents).sample)
    z = encode_pictures(kl, x)
    assert tiny.error(decode_latents(kl, z), kl.decode(kl.encode(x).latent_dist.mean).sample) <= 1e-6
    assert downsampling(kl) == downsampling(vq) == 4


def test_another_model_is_refused():
    for function in (encode_pictures, decode_latents):
        with pytest.raises(TypeError, match=f"{function.__name__}: vae is a Linear; expected"):
            function(torch.nn.Linear(1, 1), torch.zeros(1))


def test_the_decoder_stage_takes_the_codebook_along_frozen():
    """It is read there, so that it has to be on the same device; trained it would move the latents."""
    model = pair()[1]
    stage = Decoder(model, DecoderConfig())
    assert any(p is model.quantize.embedding.weight for p in stage.parameters())
    stage.decode(torch.randn(1, 3, 8, 8)).sample.sum().backward()
    assert model.quantize.embedding.weight.grad is None and model.decoder.conv_in.weight.grad is not None
