"""What one training step of a denoiser costs: operations, time and memory, counted rather than guessed."""

from __future__ import annotations

import contextlib

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch.utils.flop_counter import FlopCounterMode

OPTIMISER_BYTES = 20  # of a parameter: its value, its gradient, AdamW's two moments and the average, float32 each


def step_flops(unet, shape, context) -> int:
    """Floating-point operations of one sample's forward and backward pass.

    unet     a UNet or UNet2DConditionModel; only its configuration is read
    shape    (z, h, w) of a latent;   context  (S, E) of its condition

    Counted on the stock class with attention in plain products, on no device: multiplications and additions of
    convolutions and matrix products, as torch's FlopCounterMode counts them.
    """
    with torch.device("meta"):
        stock = diffusers.UNet2DConditionModel.from_config(unet.config)
        stock.set_attn_processor(AttnProcessor())
        x, states = torch.empty(1, *shape), torch.empty(1, *context)
        t = torch.zeros(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            stock(x, t, encoder_hidden_states=states).sample.sum().backward()
    return counter.get_total_flops()


@contextlib.contextmanager
def kept_for_backward(model):
    """Context giving a function: bytes that autograd has kept since it began, the model's own parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(size for size, _ in kept.values())


def largest_batch(unet, activations: int, memory: int) -> int:
    """How many samples fit `memory` bytes beside the weights and the optimiser; activations  bytes of one sample."""
    weights = OPTIMISER_BYTES * sum(p.numel() for p in unet.parameters())
    return max(0, memory - weights) // activations
