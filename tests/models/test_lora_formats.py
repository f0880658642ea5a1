"""LoRA files as people have them, each against a stock network whose weights have the change added by its formula."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

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


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_method_adds_what_its_formula_says(method, family, tmp_path):
    stock, path = tiny.unet(family), tmp_path / "it.safetensors"
    check(stock, file_of(stock, method, path, lycoris if method is lokr else kohya), path)


def test_biases_and_norms(tmp_path):
    stock, new = tiny.unet(), made()
    changed, table = copy.deepcopy(stock), {}
    for layer in ("down_blocks.0.resnets.0.norm1", "conv_norm_out", f"{ATTENTION}.norm2"):
        norm = changed.get_submodule(layer)
        table[f"{kohya(layer)}.w_norm"], table[f"{kohya(layer)}.b_norm"] = (
            new(*norm.weight.shape),
            new(*norm.bias.shape),
        )
        norm.weight.data += 0.3 * table[f"{kohya(layer)}.w_norm"]
        norm.bias.data += 0.3 * table[f"{kohya(layer)}.b_norm"]
    only_norms = copy.deepcopy(changed)
    save_file(table, tmp_path / "norms.safetensors")
    for layer in ("mid_block.resnets.0.conv2", "conv_in"):
        conv = changed.get_submodule(layer)
        tensors, delta = whole(conv.weight.shape, new)
        table[f"{kohya(layer)}.diff"], table[f"{kohya(layer)}.diff_b"] = tensors["diff"], new(*conv.bias.shape)
        conv.weight.data += 0.3 * delta
        conv.bias.data += 0.3 * table[f"{kohya(layer)}.diff_b"]
    bias_alone = kohya(f"{ATTENTION}.attn1.to_out.0")
    table[f"{bias_alone}.diff_b"] = new(32)
    changed.get_submodule(f"{ATTENTION}.attn1.to_out.0").bias.data += 0.3 * table[f"{bias_alone}.diff_b"]
    save_file(table, tmp_path / "all.safetensors")
    check(stock, changed, tmp_path / "all.safetensors")
    check(stock, only_norms, tmp_path / "norms.safetensors")


@pytest.mark.parametrize("method", [lora, loha])
def test_dora(method, tmp_path):
    """The changed weight's rows (a convolution's output channels) have the norms that the file says."""
    stock, new, table = tiny.unet(), made(), {}
    changed = copy.deepcopy(stock)
    for layer in LAYERS:
        weight = changed.get_submodule(layer).weight
        tensors, delta = method(weight.shape, new)
        direction = weight.data + delta
        norms = new(len(weight)).abs() + 0.5
        tensors["dora_scale"] = norms.reshape(-1, *(1,) * (weight.ndim - 1))
        weight.data = direction / direction.flatten(1).norm(dim=1).reshape(tensors["dora_scale"].shape)
        weight.data *= tensors["dora_scale"]
        table |= {f"{kohya(layer)}.{suffix}": value for suffix, value in tensors.items()}
    save_file(table, tmp_path / "dora.safetensors")
    check(stock, changed, tmp_path / "dora.safetensors", scale=1.0)


# --- the names that trainers write ------------------------------------------------------------------------------------


def old_diffusers(layer: str) -> str:
    attention, _, last = layer.rpartition(".attn")
    return f"{attention}.attn{last.replace('.to_', '.processor.to_').replace('to_out.0', 'to_out')}_lora"


SPELLINGS = {
    "kohya": (kohya, "lora_down.weight", "lora_up.weight"),
    "onetrainer": (lambda layer: f"unet.{layer}", "lora_down.weight", "lora_up.weight"),
    "diffusers": (lambda layer: f"unet.{layer}", "lora.down.weight", "lora.up.weight"),
    "peft in diffusers": (lambda layer: f"unet.{layer}", "lora_A.weight", "lora_B.weight"),
    "peft": (lambda layer: f"base_model.model.{layer}", "lora_A.weight", "lora_B.weight"),
    "peft's live keys": (lambda layer: f"unet.{layer}", "lora_A.default.weight", "lora_B.default.weight"),
    "diffusers 0.16": (lambda layer: f"unet.{old_diffusers(layer)}", "down.weight", "up.weight"),
    "diffusers 0.12": (old_diffusers, "down.weight", "up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling(spelling, tmp_path):
    name, down, up = SPELLINGS[spelling]
    stock, path = tiny.unet(), tmp_path / "it.safetensors"

    def spelt(shape, new):
        tensors, delta = lora(shape, new)
        return {down: tensors["lora_down.weight"], up: tensors["lora_up.weight"]}, delta * RANK / ALPHA

    layers = [layer for layer in LAYERS if ".attn" in layer] if "0.1" in spelling else LAYERS
    check(stock, file_of(stock, spelt, path, name, layers), path)


def test_kohyas_sdxl_names_are_read_as_diffusers_reads_them(tmp_path):
    """The released layout's names, every linear layer and convolution of it."""
    torch.manual_seed(0)
    stock, new, table = tiny.unet("sdxl"), made(), {}
    names = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_k": (64, 64),
        "input_blocks_5_1_transformer_blocks_1_attn2_to_v": (64, 64),
        "middle_block_1_transformer_blocks_1_ff_net_2": (64, 256),
        "output_blocks_1_1_transformer_blocks_0_attn2_to_out_0": (64, 64),
        "input_blocks_4_1_proj_in": (64, 64),
        "input_blocks_1_0_in_layers_2": (32, 32, 3, 3),
        "input_blocks_3_0_op": (32, 32, 3, 3),
        "input_blocks_4_0_skip_connection": (64, 32, 1, 1),
        "middle_block_2_out_layers_3": (64, 64, 3, 3),
        "output_blocks_2_2_conv": (64, 64, 3, 3),
        "output_blocks_0_0_emb_layers_1": (64, 128),
        "time_embed_2": (128, 128),
        "out_2": (4, 32, 3, 3),
    }
    for name, shape in names.items():
        tensors, _ = lora(torch.Size(shape), new)
        table |= {f"lora_unet_{name}.{suffix}": value for suffix, value in tensors.items()}
    save_file(table, tmp_path / "xl.safetensors")
    ours, arguments = UNet.from_unet(copy.deepcopy(stock)), tiny.inputs(stock)
    plain = answer(stock, arguments)
    load_lora(ours, tmp_path / "xl.safetensors")
    kind = diffusers.StableDiffusionXLPipeline
    state, alphas = kind.lora_state_dict(dict(table), unet_config=stock.config)
    kind.load_lora_into_unet(state, alphas, stock)
    wanted = answer(stock, arguments)
    assert tiny.error(answer(ours, arguments), wanted) < 2e-5 and tiny.error(plain, wanted) > 1e-3


def test_the_alphas_of_diffusers_metadata_count(tmp_path):
    stock = tiny.unet()
    path, layer = tmp_path / "it.safetensors", LAYERS[0]
    table = {f"unet.{layer}.lora_A.weight": torch.ones(2, 32), f"unet.{layer}.lora_B.weight": torch.ones(32, 2)}
    settings = {
        "unet.r": 2,
        "unet.lora_alpha": 7,
        "unet.alpha_pattern": {"attn1.to_q": 3},
        "unet.target_modules": ["to_q"],
    }
    save_file(table, path, metadata={"lora_adapter_metadata": json.dumps(settings)})
    changed = copy.deepcopy(stock)
    changed.get_submodule(layer).weight.data += 0.3 * 2 * 3 / 2
    check(stock, changed, path)


# --- refused by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), "its method is GLoRA"),
        (("oft_blocks", "alpha"), "its method is OFT"),
        (("weight", "on_input"), r"its method is \(IA\)\^3"),
        (("lora_up.weight",), "has up, which make no whole change"),
        (("lora_down.weight", "lora_up.weight", "strange"), "a key that is not known"),
    ],
)
def test_what_is_no_matrix_is_refused_by_its_name(keys, said, tmp_path):
    unet, path = UNet.from_unet(tiny.unet()), tmp_path / "it.safetensors"
    save_file({f"{kohya(LAYERS[0])}.{key}": torch.zeros(4, 4) for key in keys}, path)
    before = unet.state_dict().keys()
    with pytest.raises(ValueError, match=said) as error:
        load_lora(unet, path)
    assert "holds no LoRA" not in str(error.value) and unet.state_dict().keys() == before


def test_another_family_is_named(tmp_path):
    unet, path = UNet.from_unet(tiny.unet()), tmp_path / "it.safetensors"
    name = kohya(LAYERS[1])
    save_file({f"{name}.lora_down.weight": torch.zeros(2, 768), f"{name}.lora_up.weight": torch.zeros(32, 2)}, path)
    with pytest.raises(ValueError, match=r"does not fit this U-Net: .*the file is made for SD1.x"):
        load_lora(unet, path)
    save_file({f"{kohya('down_blocks.7.conv')}.diff": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match="changes 'down_blocks_7_conv', which is no layer of it"):
        load_lora(unet, path)


# --- swapping ---------------------------------------------------------------------------------------------------------


def test_a_swap_reads_nothing_again_and_takes_a_changed_file_anew(tmp_path, monkeypatch):
    from ldmfast.pipeline import load_lora as pipeline_lora

    stock, first, second = tiny.unet(), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    wanted = {first: file_of(stock, lora, first), second: file_of(stock, whole, second)}
    ours, arguments, reads = UNet.from_unet(copy.deepcopy(stock)), tiny.inputs(stock), []
    real = pipeline_lora.read_lora
    monkeypatch.setattr(pipeline_lora, "read_lora", lambda *a: reads.append(a[0].name) or real(*a))
    for path in (first, second, first, second):
        load_lora(ours, (path, 0.3))
        assert tiny.error(answer(ours, arguments), answer(wanted[path], arguments)) < 2e-5
    assert reads == ["a.safetensors", "b.safetensors"]
    changed = file_of(stock, loha, first)
    ours.fuse_lora()  # what is fused comes out again
    load_lora(ours, (first, 0.3))
    assert tiny.error(answer(ours, arguments), answer(changed, arguments)) < 2e-5
    load_lora(ours)
    assert not any(isinstance(module, nn.ParameterDict) for module in ours.modules())


def refuse(monkeypatch):
    """peft's search for layers to wrap is not to be gone through again."""
    from peft.tuners.tuners_utils import BaseTuner

    def inject_adapter(*arguments, **named):
        raise AssertionError("peft went through the network again")

    monkeypatch.setattr(BaseTuner, "inject_adapter", inject_adapter)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_another_file_for_the_same_layers_is_a_copy_of_the_adapter_that_is_there(method, tmp_path, monkeypatch):
    stock, first, second = tiny.unet(), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    held, wanted = file_of(stock, lora, first), file_of(stock, method, second, layers=LAYERS[1:])
    ours, arguments = UNet.from_unet(copy.deepcopy(stock)), tiny.inputs(stock)
    load_lora(ours, (first, 0.3))
    refuse(monkeypatch)
    load_lora(ours, (second, 0.3))
    assert tiny.error(answer(ours, arguments), answer(wanted, arguments)) < 2e-5
    trained = {name for name, value in ours.named_parameters() if value.requires_grad and ".lora_" in name}
    assert len(trained) == 2 * len(LAYERS[1:])  # as peft has it: the adapters that are on
    ours.fuse_lora()
    assert tiny.error(answer(ours, arguments), answer(wanted, arguments)) < 2e-5
    load_lora(ours, (first, 0.3))
    assert tiny.error(answer(ours, arguments), answer(held, arguments)) < 2e-5
    load_lora(ours)
    assert not getattr(ours, "peft_config", None)
    ours.load_state_dict(stock.state_dict())  # what was fused came out again but for its rounding
    assert torch.equal(answer(ours, arguments), answer(UNet.from_unet(copy.deepcopy(stock)), arguments))


def test_a_copy_has_the_dtype_of_the_network_and_a_hook_of_its_own(tmp_path):
    stock, first, second = tiny.unet(), tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    file_of(stock, lora, first), file_of(stock, loha, second)
    ours, called = UNet.from_unet(copy.deepcopy(stock)).to(torch.bfloat16), []
    load_lora(ours, first)
    down = ours.get_submodule(LAYERS[0]).lora_A
    (before,) = down
    load_lora(ours, second)
    (after,) = set(down) - {before}
    down[after].register_forward_hook(lambda *_: called.append(after))
    assert down[after].weight.dtype == down[before].weight.dtype and not down[before]._forward_hooks
    assert (down[after].in_features, down[after].out_features) == (32, RANK**2)
    answer(ours, tiny.to(tiny.inputs(stock), torch.bfloat16))
    assert called == [after]


def test_what_is_more_than_two_matrices_is_put_on_by_peft(tmp_path):
    """A DoRA over a plain adapter, and a plain one over it."""
    stock, arguments = tiny.unet(), tiny.inputs(tiny.unet())
    layer, new = LAYERS[0], made(3)
    path = {name: tmp_path / f"{name}.safetensors" for name in ("plain", "dora", "another")}
    methods = (("plain", lora), ("another", loha))
    wanted = {name: file_of(stock, way, path[name], layers=LAYERS[:1], factor=1.0) for name, way in methods}
    tensors, delta = lora(stock.get_submodule(layer).weight.shape, new)
    tensors["dora_scale"] = new(32, 1).abs() + 0.5
    save_file({f"{kohya(layer)}.{key}": value for key, value in tensors.items()}, path["dora"])
    wanted["dora"] = copy.deepcopy(stock)
    weight = wanted["dora"].get_submodule(layer).weight
    weight.data += delta
    weight.data *= tensors["dora_scale"] / weight.data.norm(dim=1, keepdim=True)
    ours = UNet.from_unet(copy.deepcopy(stock))
    for name in ("plain", "dora", "another", "plain", "dora"):
        load_lora(ours, path[name])
        assert tiny.error(answer(ours, arguments), answer(wanted[name], arguments)) < 2e-5
