"""LoRA files by each method, and a stock network whose weights have their change added by its formula."""

from __future__ import annotations

import copy

import tiny
import torch
from safetensors.torch import save_file

from ldmfast.models.unet import UNet
from ldmfast.pipeline.load_lora import load_lora

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"


LAYERS = (
    f"{ATTENTION}.attn1.to_q",
    f"{ATTENTION}.attn2.to_k",
    f"{ATTENTION}.attn2.to_out.0",
    f"{ATTENTION}.ff.net.0.proj",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.1.conv1",
    "mid_block.resnets.0.time_emb_proj",
    "up_blocks.0.upsamplers.0.conv",
)


RANK, ALPHA = 3, 1.5


def made(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator) * 0.3


# --- one layer's tensors by each method, and what they add to its weight, written as the papers do --------------------


def lora(shape, new):
    down, up = new(RANK, *shape[1:]), new(shape[0], RANK, *(1,) * (len(shape) - 2))
    delta = (up.flatten(1) @ down.flatten(1)).reshape(shape) * ALPHA / RANK
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}, delta


def locon_with_mid(shape, new):
    if len(shape) == 2 or shape[2] == 1:
        return lora(shape, new)
    down, mid, up = new(RANK, shape[1], 1, 1), new(RANK, RANK, *shape[2:]), new(shape[0], RANK, 1, 1)
    delta = torch.einsum("or,rskl,si->oikl", up.flatten(1), mid, down.flatten(1)) * ALPHA / RANK
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}
    return tensors, delta


def loha(shape, new):
    width = shape[1:].numel()
    a1, b1, a2, b2 = new(shape[0], RANK), new(RANK, width), new(shape[0], RANK), new(RANK, width)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(ALPHA)}
    return tensors, ((a1 @ b1) * (a2 @ b2)).reshape(shape) * ALPHA / RANK


def wide_loha(shape, new):
    """A rank whose square exceeds the layer's: kept whole."""
    rank, width = 9, shape[1:].numel()
    a1, b1, a2, b2 = new(shape[0], rank), new(rank, width), new(shape[0], rank), new(rank, width)
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
    return tensors, ((a1 @ b1) * (a2 @ b2)).reshape(shape)


def loha_tucker(shape, new):
    if len(shape) == 2:
        return loha(shape, new)
    parts = [(new(RANK, RANK, *shape[2:]), new(RANK, shape[0]), new(RANK, shape[1])) for _ in range(2)]
    product = [torch.einsum("ijkl,io,jc->ockl", *part) for part in parts]
    names = [(f"hada_t{i}", f"hada_w{i}_a", f"hada_w{i}_b") for i in (1, 2)]
    tensors = {
        name: value for row, part in zip(names, parts, strict=True) for name, value in zip(row, part, strict=True)
    }
    return {**tensors, "alpha": torch.tensor(ALPHA)}, product[0] * product[1] * ALPHA / RANK


def lokr(shape, new):
    """The first factor whole, the second low-rank."""
    a, b = new(shape[0] // 4, RANK), new(RANK, shape[1] // 2 * shape[2:].numel())
    w1 = new(4, 2)
    w2 = (a @ b).reshape(shape[0] // 4, shape[1] // 2, *shape[2:])
    delta = torch.kron(w1.reshape(4, 2, *(1,) * (len(shape) - 2)), w2) * ALPHA / RANK
    return {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}, delta


def lokr_whole(shape, new):
    """Both factors whole: LyCORIS then gives the alpha no say."""
    w1, w2 = new(4, 2), new(shape[0] // 4, shape[1] // 2, *shape[2:])
    delta = torch.kron(w1.reshape(4, 2, *(1,) * (len(shape) - 2)), w2)
    return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(ALPHA)}, delta


def lokr_tucker(shape, new):
    if len(shape) == 2:
        return lokr(shape, new)
    core, a, b = new(RANK, RANK, *shape[2:]), new(RANK, shape[0] // 4), new(RANK, shape[1] // 2)
    w1a, w1b = new(4, RANK), new(RANK, 2)
    w2 = torch.einsum("ijkl,io,jc->ockl", core, a, b)
    delta = torch.kron((w1a @ w1b)[:, :, None, None], w2.contiguous()) * ALPHA / RANK
    names = {"lokr_w1_a": w1a, "lokr_w1_b": w1b, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
    return {**names, "alpha": torch.tensor(ALPHA)}, delta


def whole(shape, new):
    delta = new(*shape)
    return {"diff": delta}, delta


METHODS = (lora, locon_with_mid, loha, wide_loha, loha_tucker, lokr, lokr_whole, lokr_tucker, whole)


def kohya(layer: str) -> str:
    return "lora_unet_" + layer.replace(".", "_")


def lycoris(layer: str) -> str:
    return "lycoris_" + layer.replace(".", "_")


def file_of(stock, method, path, name=kohya, layers=LAYERS, factor: float = 0.3):
    """Write the method's file for the layers, and add its change, `factor` times, to a copy of the network."""
    new, table, changed = made(), {}, copy.deepcopy(stock)
    for layer in layers:
        weight = changed.get_submodule(layer).weight
        tensors, delta = method(weight.shape, new)
        table |= {f"{name(layer)}.{suffix}": value.contiguous() for suffix, value in tensors.items()}
        weight.data += factor * delta
    save_file(table, path)
    return changed


def answer(network, arguments):
    with torch.no_grad():
        return network(**arguments).sample


def check(stock, changed, path, scale: float = 0.3):
    """Ours with the file equals the changed stock network, and without it again the plain one."""
    ours, arguments = UNet.from_unet(copy.deepcopy(stock)), tiny.inputs(stock)
    plain, wanted = answer(stock, arguments), answer(changed, arguments)
    load_lora(ours, (path, scale))
    assert tiny.error(answer(ours, arguments), wanted) < 2e-5 and tiny.error(plain, wanted) > 1e-3
    ours.fuse_lora()
    assert tiny.error(answer(ours, arguments), wanted) < 2e-5
    load_lora(ours)
    ours.load_state_dict(stock.state_dict())  # no adapter's name is left; fused, its weights would have stayed
    assert torch.equal(answer(ours, arguments), answer(UNet.from_unet(copy.deepcopy(stock)), arguments))
