"""What a network holds at most: a decode large pictures in halves, and freed memory given back before them."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import diffusers
import pytest
import tiny
import torch

from ldmfast import ops
from ldmfast.models import autoencoder, blocks
from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.unet import UNet
from ldmfast.models.unet2d import UNet2D
from ldmfast.models.vq import VQModel
from ldmfast.ops.planning import memory

CLOSE = 1e-5  # norm of the difference over norm, float32
LAST = "decoder.up_blocks.1"  # of two levels


def pair(**changes):
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    small = {"block_out_channels": (16, 32), "norm_num_groups": 8, "layers_per_block": 1}
    stock = tiny.vae(**{**levels, **small, **changes})
    return stock, AutoencoderKL.adopt(copy.deepcopy(stock))


@pytest.fixture
def in_halves(monkeypatch):
    """How many resnets took a picture in halves, of pictures that are all large."""
    monkeypatch.setattr(autoencoder, "LARGE", 0)
    calls, original = [], autoencoder._resnet_of_halves

    def noted(m, halves):
        calls.append(tuple(halves[0].shape))
        return original(m, halves)

    monkeypatch.setattr(autoencoder, "_resnet_of_halves", noted)
    return calls


def most_held(monkeypatch, run):
    """Bytes of the results of convolutions that were there at the same time, at most."""
    living, most, original = {}, [0], ops.conv2d

    def watched(x, *args, **around):
        y = original(x, *args, **around)
        living[id(y)] = weakref.ref(y)
        tensors = [tensor for tensor in (each() for each in living.values()) if tensor is not None]
        most[0] = max(most[0], sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()))
        return y

    monkeypatch.setattr(ops, "conv2d", watched)
    run()
    return most[0]


@torch.no_grad()
def test_a_large_decode_holds_three_pictures_of_the_last_width(monkeypatch):
    """At 512x512, 32 channels: in halves, hidden; or a resnet's input, hidden and result. Whole it was four."""
    ours = pair(block_out_channels=(32, 64), mid_block_add_attention=False)[1]
    picture = 4 * 32 * 512 * 512
    assert 2 * picture == autoencoder.LARGE
    most = most_held(monkeypatch, lambda: ours.decode(torch.randn(1, 4, 256, 256)))
    assert 2.9 * picture <= most <= 3.1 * picture
    monkeypatch.setattr(autoencoder, "LARGE", 1 << 40)
    assert most_held(monkeypatch, lambda: ours.decode(torch.randn(1, 4, 256, 256))) > 3.9 * picture


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"block_out_channels": (24, 48), "norm_num_groups": 3},  # of 16 channels: the second lies in both halves
        {"block_out_channels": (20, 40), "norm_num_groups": 4, "layers_per_block": 2},
    ],
    ids=["plain", "straddling-group", "odd-widths"],
)
@pytest.mark.parametrize("size", [(1, 16, 16), (2, 9, 7), (3, 1, 5)], ids=str)
@torch.no_grad()
def test_halves_give_stocks_answer(changes, size, in_halves, monkeypatch):
    stock, ours = pair(**changes)
    N, H, W = size
    monkeypatch.setattr(autoencoder, "STRIP", 4 * N * 2 * W * ours.config.block_out_channels[0] * 3)  # three rows
    z = torch.randn(N, 4, H, W)
    got = ours.decode(z).sample
    assert in_halves == [(N, ours.config.block_out_channels[0], 2 * H, 2 * W)]
    assert tiny.error(got, copy.deepcopy(stock).double().decode(z.double()).sample) <= CLOSE
    monkeypatch.setattr(autoencoder, "LARGE", 1 << 40)
    assert tiny.error(ours.decode(z).sample, got) <= 1e-6 and len(in_halves) == 1


@torch.no_grad()
def test_halves_in_bfloat16_and_without_biases(in_halves):
    stock, ours = pair()
    for model in (stock, ours):
        model.get_submodule(f"{LAST[:-1]}0.upsamplers.0.conv").bias = None
        model.get_submodule(f"{LAST}.resnets.0.conv_shortcut").bias = None
    z = torch.randn(2, 4, 8, 8)
    wanted = stock.decode(z).sample
    assert tiny.error(ours.decode(z).sample, wanted) <= CLOSE
    halves = [copy.deepcopy(model).bfloat16().decode(z.bfloat16()).sample for model in (stock, ours)]
    assert tiny.error(halves[1], wanted) <= 1.2 * tiny.error(halves[0], wanted)
    assert len(in_halves) == 2


@pytest.mark.parametrize(
    "name",
    [
        f"{LAST[:-1]}0.upsamplers.0",
        f"{LAST[:-1]}0.upsamplers.0.conv",
        LAST,
        *(f"{LAST}.resnets.0{part}" for part in ("", ".norm1", ".conv1", ".norm2", ".conv2", ".conv_shortcut")),
    ],
)
@torch.no_grad()
def test_what_is_attached_to_a_layer_sees_whole_pictures(name, in_halves):
    stock, ours = pair()
    seen = []
    for model in (stock, ours):
        model.get_submodule(name).register_forward_hook(lambda m, given, y: seen.append((given[0].shape, y.shape)))
    z = torch.randn(1, 4, 8, 8)
    wanted, got = stock.decode(z).sample, ours.decode(z).sample
    assert tiny.error(got, wanted) <= CLOSE
    assert len(seen) == 2 and seen[0] == seen[1] and not in_halves


def test_no_halves_where_a_gradient_is_asked_for_or_autocast_is_on(in_halves):
    stock, ours = pair()
    z = torch.randn(1, 4, 8, 8)
    for model in (stock, ours):
        model.decode(z).sample.square().mean().backward()
    mine = dict(ours.named_parameters())
    for name, parameter in stock.named_parameters():
        if parameter.grad is not None:
            assert (mine[name].grad - parameter.grad).norm() <= 1e-4 * parameter.grad.norm() + 1e-8, name
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert tiny.error(ours.decode(z).sample, stock.decode(z).sample) <= 2e-2
    assert not in_halves


@torch.no_grad()
def test_a_vq_models_decoder_takes_halves_too(in_halves):
    stock = diffusers.VQModel(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("AttnUpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    ).eval()
    ours, z = VQModel.adopt(copy.deepcopy(stock)), torch.randn(2, 3, 8, 8)
    assert tiny.error(ours.decode(z, True).sample, stock.decode(z, True).sample) <= CLOSE
    assert in_halves == [(2, 16, 16, 16)]


@torch.no_grad()
def test_a_last_level_of_the_same_width_stays_whole(in_halves):
    stock, ours = pair(block_out_channels=(32, 32))
    z = torch.randn(1, 4, 8, 8)
    assert tiny.error(ours.decode(z).sample, stock.decode(z).sample) <= CLOSE and not in_halves


# --- what malloc keeps ------------------------------------------------------------------------------------------------


def resident():
    """Bytes of this process in memory."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0])


@pytest.mark.skipif(memory._malloc_trim() is None, reason="this C library cannot give freed memory back (malloc_trim)")
def test_freed_memory_goes_back_to_the_system():
    torch.ones(1 << 22)  # 16 MiB: malloc now has blocks of up to that many from its heap
    blocks = [torch.ones(1 << 18) for _ in range(200)]
    del blocks[:-1]  # the last stays, at the heap's end
    before = resident()
    memory.give_back_freed()
    assert before - resident() >= 150 << 20


@torch.no_grad()
def test_memory_is_given_back_before_large_pictures_alone(monkeypatch):
    ours, calls = pair()[1], []
    monkeypatch.setattr(autoencoder, "give_back_freed", lambda: calls.append(1))
    ours(torch.randn(1, 3, 16, 16))
    assert not calls
    monkeypatch.setattr(autoencoder, "LARGE", 4 * 16 * 32 * 32)  # the first level's of 32x32
    ours.encode(torch.randn(1, 3, 32, 32))
    assert len(calls) == 1
    ours.decode(torch.randn(1, 4, 16, 16))
    assert len(calls) == 2
    with torch.enable_grad():
        ours(torch.randn(1, 3, 32, 32))
    assert len(calls) == 2


@pytest.mark.parametrize("make, adopt", [(tiny.unet, UNet), (tiny.unet2d, UNet2D)])
def test_a_network_gives_freed_memory_back_before_each_large_level(make, adopt, monkeypatch):
    """Beside a gradient nothing was freed; the answer is the same, and nothing changes at usual sizes."""
    ours, given = adopt.adopt(make()), []
    arguments = tiny.inputs(ours) if adopt is UNet else {"sample": torch.randn(2, 3, 16, 16), "timestep": 5}
    monkeypatch.setattr(blocks, "give_back_freed", lambda: given.append(True) or memory.give_back_freed())
    with torch.no_grad():
        wanted = ours(**arguments).sample
        assert not given
        largest = 4 * 2 * ours.config.block_out_channels[0] * 16 * 16  # bytes, of the first level's picture
        monkeypatch.setattr(blocks, "LARGE", largest)
        assert torch.equal(ours(**arguments).sample, wanted)
        assert 1 <= len(given) < len(ours.down_blocks) + len(ours.up_blocks)
        monkeypatch.setattr(blocks, "LARGE", 0)
        given.clear()
        assert torch.equal(ours(**arguments).sample, wanted)
        assert len(given) == len(ours.down_blocks) + len(ours.up_blocks)
    given.clear()
    ours(**arguments)
    assert not given
