"""One training step of the shipped recipes' networks: ours and stock diffusers modules, in turn.

pytest bench/bench_training.py --benchmark-only
A step is forward, loss, backward, gradient clipping and AdamW, at the recipes' default sizes and batches, in bfloat16
autocast and in float32. Both start from the same weights and meet the same inputs; a round runs stock, then ours.
"""

from __future__ import annotations

import copy

import diffusers
import pytest
import torch
import torch.nn.functional as F
from timing import Row, add_row, borne, device, measure_in_turn, name_of, rows_of
from torch.utils.flop_counter import FlopCounterMode

from ldmfast.training import train_autoencoder, train_denoiser
from ldmfast.training.config import AutoencoderConfig, DenoiserConfig

DTYPES = (torch.bfloat16, torch.float32)
TOKENS, WIDTH = 16, 384  # of the recipes' text encoder
SECONDS = 8
PATIENCE = 6  # seconds of one step; a few samples of its batch show beforehand whether it takes longer


def stock_of(kind, model):
    """The same network of diffusers' own class, with a copy of the weights in diffusers' layout."""
    stock = kind.from_config(model.config)
    stock.load_state_dict({name: value.contiguous() for name, value in model.state_dict().items()})
    return stock


def denoising(config):
    """(ours, stock's class, loss of a model): noise prediction on 16x16 latents, conditioned by cross-attention."""
    ours = train_denoiser.build(config, latent_channels=4, latent_size=16, context_width=WIDTH)
    torch.manual_seed(1)
    x, noise = (torch.randn(config.batch, 4, 16, 16, device=device()) for _ in "xn")
    t = torch.randint(1000, (config.batch,), device=device())
    context = torch.randn(config.batch, TOKENS, WIDTH, device=device())

    def loss(model, batch=None):
        return F.mse_loss(model(x[:batch], t[:batch], context[:batch]).sample.float(), noise[:batch])

    return ours, diffusers.UNet2DConditionModel, loss


def reconstructing(config):
    """(ours, stock's class, loss of a model): L1 through the mean latent."""
    ours = train_autoencoder.build(config)
    torch.manual_seed(1)
    x = torch.rand(config.batch, 3, config.size, config.size, device=device()) * 2 - 1

    def loss(model, batch=None):
        return F.l1_loss(model.decode(model.encode(x[:batch]).latent_dist.mean).sample.float(), x[:batch])

    return ours, diffusers.AutoencoderKL, loss


def step_of(model, loss, dtype):
    model.to(device()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(batch=None):
        with torch.autocast(device(), dtype, enabled=dtype is not torch.float32):
            value = loss(model, batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def operations(model, loss) -> int:
    """Floating-point operations of the forward and the backward pass."""
    with FlopCounterMode(display=False) as counter:
        loss(model).backward()
    model.zero_grad()
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    "make, config",
    [(denoising, DenoiserConfig()), (reconstructing, AutoencoderConfig())],
    ids=["denoiser", "autoencoder"],
)
def test_step(benchmark, make, config, dtype):
    ours, kind, loss = make(config)
    stock = stock_of(kind, ours)
    amount = operations(copy.deepcopy(stock).to(device()), loss)
    first, second = step_of(ours, loss, dtype), step_of(stock, loss, dtype)
    with torch.no_grad():
        torch.testing.assert_close(loss(ours, 1), loss(stock, 1), rtol=2e-2, atol=0)
    shape, name = f"{'x'.join(map(str, config.channels))} batch {config.batch}", f"train {make.__name__}"
    parts = rows_of(config.batch)
    if note := borne(first, parts, PATIENCE, sure=2):
        add_row(benchmark, Row(name, "ldmfast", shape, name_of(dtype), None, amount, "TFLOP/s", note=note))
        pytest.skip(note)
    note = borne(second, parts, PATIENCE, sure=2)
    seconds, eager, once = measure_in_turn(benchmark, first, None if note else second, seconds=SECONDS)
    add_row(benchmark, Row(name, "diffusers", shape, name_of(dtype), eager, amount, "TFLOP/s", note=note or once))
    add_row(benchmark, Row(name, "ldmfast", shape, name_of(dtype), seconds, amount, "TFLOP/s", eager=eager))
