"""`UNet` against stock diffusers: the same answer, the same gradients, and a sentence for a wrong argument."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel

from ldmfast.models.unet import UNet

CLOSE = 1e-5  # norm of the difference over norm, float32


def pair(family="sd1", **changes):
    """(stock, ours), with parameters of their own."""
    stock = tiny.unet(family, **changes)
    return stock, UNet.from_unet(copy.deepcopy(stock))


def both(stock, ours, arguments):
    with torch.no_grad():
        return stock(**arguments).sample, ours(**arguments).sample


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request):
    torch.manual_seed(0)
    return pair(request.param)


@pytest.mark.parametrize("size", [(16, 16), (13, 11), (8, 20), (1, 1), (4, 1)])
def test_equals_stock(family, size):
    stock, ours = family
    arguments = tiny.inputs(stock, size)
    wanted, got = both(stock, ours, arguments)
    assert tiny.error(got, wanted) <= CLOSE
    assert got.shape == wanted.shape and got.is_contiguous()
    assert ours.explain() == []


def test_bfloat16_is_as_near_to_float32_as_stock_bfloat16(family):
    stock, ours = family
    halves = [copy.deepcopy(model).bfloat16() for model in (stock, ours)]
    theirs, mine = [], []
    for _ in range(3):
        arguments = tiny.inputs(stock)
        exact = stock(**arguments).sample
        for model, errors in zip(halves, (theirs, mine), strict=True):
            with torch.no_grad():
                errors.append(tiny.error(model(**tiny.to(arguments, torch.bfloat16)).sample, exact))
    assert sum(mine) <= 1.1 * sum(theirs)


def test_gradients_equal_stock(family):
    for model, arguments in zip(family, [tiny.inputs(family[0])] * 2, strict=True):
        model.zero_grad()
        arguments = {**arguments, "sample": arguments["sample"].clone().requires_grad_()}
        model(**arguments).sample.square().mean().backward()
    stock, ours = (dict(model.named_parameters()) for model in family)
    for name, parameter in stock.items():
        assert tiny.error(ours[name].grad, parameter.grad) <= 1e-4, name


@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded"])
def test_any_layout(family, layout):
    stock, ours = family
    arguments = tiny.inputs(stock)
    x = arguments["sample"]
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.randn(4, x.shape[1] + 1, 20, 33)[::2, 1:, 2:18, 1::2]
    else:
        x = x[:1].expand(2, -1, -1, -1)
    wanted, got = both(stock, ours, {**arguments, "sample": x})
    assert tiny.error(got, wanted) <= CLOSE and (layout == "channels_last" or got.is_contiguous())


@pytest.mark.parametrize("timestep", [0, 17, 3.5, torch.tensor(9), torch.tensor([9]), torch.tensor([1.5, 700.0])])
def test_every_kind_of_timestep(timestep):
    stock, ours = pair()
    wanted, got = both(stock, ours, {**tiny.inputs(stock), "timestep": timestep})
    assert tiny.error(got, wanted) <= CLOSE


@pytest.mark.parametrize(
    "changes, extra",
    [
        ({"num_class_embeds": 5}, {"class_labels": torch.tensor([1, 4])}),
        ({"class_embed_type": "timestep"}, {"class_labels": torch.tensor([1, 4])}),
        (
            {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 6},
            {"class_labels": torch.ones(2, 6)},
        ),
        (
            {
                "class_embed_type": "simple_projection",
                "projection_class_embeddings_input_dim": 6,
                "class_embeddings_concat": True,
            },
            {"class_labels": torch.ones(2, 6)},
        ),
        ({"time_cond_proj_dim": 12}, {"timestep_cond": torch.ones(2, 12)}),
        ({"time_cond_proj_dim": 12}, {}),
        ({"resnet_time_scale_shift": "scale_shift"}, {}),
        ({"center_input_sample": True}, {}),
        ({"time_embedding_act_fn": "silu"}, {}),
        ({"time_embedding_type": "fourier"}, {}),
        ({"timestep_post_act": "silu"}, {}),
        ({"only_cross_attention": (True, False, False)}, {}),
        ({"act_fn": "gelu"}, {}),
        ({"mid_block_type": None}, {}),
        ({"mid_block_type": "UNetMidBlock2D"}, {}),
        ({"mid_block_scale_factor": 1.5}, {}),
        ({"downsample_padding": 0}, {}),
        ({"flip_sin_to_cos": False, "freq_shift": 1}, {}),
        ({"dropout": 0.1}, {}),
        ({"conv_in_kernel": 1, "conv_out_kernel": 1}, {}),
        ({"encoder_hid_dim": 32}, {}),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 4}, {}),
        (
            {
                "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D", "KDownBlock2D"),
                "up_block_types": ("ResnetUpsampleBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            },
            {},
        ),
        ({}, {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 1, 1, 0]])}),
    ],
)
def test_every_configuration_and_condition(changes, extra):
    stock, ours = pair(**changes)
    wanted, got = both(stock, ours, {**tiny.inputs(stock), **extra})
    assert tiny.error(got, wanted) <= CLOSE


def test_dropout_in_training_drops():
    _, ours = pair(dropout=0.5)
    arguments = tiny.inputs(ours)
    with torch.no_grad():
        assert tiny.error(ours.train()(**arguments).sample, ours.eval()(**arguments).sample) > 1e-2


def controlnet_residuals(stock, size=(16, 16), batch=2):
    seen = []
    hooks = [block.register_forward_hook(lambda m, i, o: seen.extend(o[1])) for block in stock.down_blocks]
    hooks.append(stock.conv_in.register_forward_hook(lambda m, i, o: seen.append(o)))
    hooks.append(stock.mid_block.register_forward_hook(lambda m, i, o: seen.append(o)))
    with torch.no_grad():
        stock(**tiny.inputs(stock, size, batch))
    for hook in hooks:
        hook.remove()
    return [torch.randn_like(x) for x in seen[:-1]], torch.randn_like(seen[-1])


@pytest.mark.parametrize("size", [(16, 16), (13, 11)])
def test_controlnet_residuals(family, size):
    stock, ours = family
    down, mid = controlnet_residuals(stock, size)
    control = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    arguments = tiny.inputs(stock, size)
    wanted, got = both(stock, ours, {**arguments, **control})
    plain, _ = both(stock, ours, arguments)
    assert tiny.error(got, wanted) <= CLOSE and tiny.error(plain, wanted) > 0.1


def test_t2i_adapter_residuals(family):
    stock, ours = family
    sizes = [(c, 16 >> i) for i, c in enumerate(stock.config.block_out_channels)]
    adapters = [torch.randn(2, c, side, side) for c, side in sizes]
    if stock.config.down_block_types[-1] == "DownBlock2D":  # the last level adds after its (absent) downsampler
        sizes[-1] = (sizes[-1][0], adapters[-1].shape[-1])
    if stock.config.down_block_types[0] == "DownBlock2D":  # and the first one after its downsampler
        adapters[0] = torch.randn(2, sizes[0][0], 8, 8)
    arguments = tiny.inputs(stock)
    lists = [list(adapters), list(adapters)]
    with torch.no_grad():
        wanted, got = (
            model(**arguments, down_intrablock_additional_residuals=left).sample
            for model, left in zip((stock, ours), lists, strict=True)
        )
        plain = stock(**arguments).sample
    assert tiny.error(got, wanted) <= CLOSE and tiny.error(plain, wanted) > 0.1
    assert len(lists[0]) == len(lists[1]) == 0


@pytest.mark.parametrize("further", [[1], [2], [1, 2], [2, 1]])
def test_residuals_of_more_levels_than_the_network_has(further):
    """The first one after the last level's is the mid block's, if it has its shape; T2I-Adapter's light ones have not.

    further  how many times less than a side of the last level's
    """
    stock, ours = pair()
    arguments = tiny.inputs(stock)
    channels, side = stock.config.block_out_channels, arguments["sample"].shape[-1]
    residuals = [torch.randn(2, c, side >> i, side >> i) for i, c in enumerate(channels)]
    least = residuals[-1].shape[-1]
    residuals += [torch.randn(2, channels[-1], least // times, least // times) for times in further]
    lists = [list(residuals), list(residuals)]
    with torch.no_grad():
        wanted, got, plain = (
            model(**arguments, down_intrablock_additional_residuals=left).sample
            for model, left in ((stock, lists[0]), (ours, lists[1]), (stock, residuals[: len(channels)]))
        )
    assert tiny.error(got, wanted) <= CLOSE and len(lists[0]) == len(lists[1])
    assert (tiny.error(plain, wanted) > 0.01) == (further[0] == 1)


def test_autocast():
    stock, ours = pair()
    arguments = tiny.inputs(stock)
    exact = stock(**arguments).sample
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs, mine = (tiny.error(model(**arguments).sample, exact) for model in (stock, ours))
    assert 1e-4 < mine <= 1.1 * theirs


def test_empty_batch_and_one():
    stock, ours = pair()
    wanted, got = both(stock, ours, tiny.inputs(stock, batch=1))
    assert tiny.error(got, wanted) <= CLOSE
    none = {**tiny.inputs(stock, batch=0), "timestep": 3}
    assert ours(**none).sample.shape == (0, 4, 16, 16)
    with torch.no_grad():
        assert ours(**none).sample.shape == (0, 4, 16, 16)


def test_returns_a_tuple_or_an_output():
    _, ours = pair()
    arguments = tiny.inputs(ours)
    with torch.no_grad():
        assert torch.equal(ours(**arguments, return_dict=False)[0], ours(**arguments)["sample"])


def test_compiles_without_a_graph_break():
    stock, ours = pair(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
    )
    arguments = tiny.inputs(stock)
    with torch.no_grad():
        got = torch.compile(ours, backend="eager", fullgraph=True)(**arguments).sample
        assert tiny.error(got, stock(**arguments).sample) <= CLOSE


def test_masked_keys_do_not_count():
    stock, ours = pair()
    arguments = tiny.inputs(stock)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[:, 4:] = 0
    with torch.no_grad():
        masked = ours(**arguments, encoder_attention_mask=mask).sample
        short = ours(**{**arguments, "encoder_hidden_states": arguments["encoder_hidden_states"][:, :4]}).sample
    assert tiny.error(masked, short) <= CLOSE


WRONG = {
    "width": ({"encoder_hidden_states": torch.zeros(2, 7, 2048)}, "width 2048.*expects 32.*SDXL"),
    "no tokens": ({"encoder_hidden_states": torch.zeros(2, 0, 32)}, "at least one token"),
    "no context": ({"encoder_hidden_states": None}, "got NoneType"),
    "context batch": ({"encoder_hidden_states": torch.zeros(3, 7, 32)}, "batch 3.*batch 2"),
    "context rank": ({"encoder_hidden_states": torch.zeros(7, 32)}, r"\(7, 32\)"),
    "context dtype": ({"encoder_hidden_states": torch.zeros(2, 7, 32).half()}, "encoder_hidden_states is float16"),
    "sample dtype": ({"sample": torch.zeros(2, 4, 8, 8).half()}, r"sample is float16.*sample.to\(torch.float32\)"),
    "channels": ({"sample": torch.zeros(2, 9, 8, 8)}, "9 channels; this UNet expects 4"),
    "sample rank": ({"sample": torch.zeros(4, 8, 8)}, r"\[N, C, H, W\]"),
    "timestep list": ({"timestep": [1, 2]}, "int, a float or a tensor.*got list"),
    "timestep shape": ({"timestep": torch.zeros(3)}, r"\(3,\); expected \(\) or \(2,\)"),
    "timestep nan": ({"timestep": float("nan")}, "timestep is nan"),
    "mask rank": ({"encoder_attention_mask": torch.ones(2, 1, 7)}, "expected .batch, keys."),
    "mask keys": ({"encoder_attention_mask": torch.ones(2, 6)}, "covers 6 keys; the context has 7"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_argument_is_refused_with_a_sentence(case):
    _, ours = pair()
    change, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        ours(**{**tiny.inputs(ours), **change})


WRONG_ADDED = {
    "nothing": (None, "needs text_embeds and time_ids"),
    "no ids": ({"text_embeds": torch.zeros(2, 32)}, "needs time_ids"),
    "ids": ({"text_embeds": torch.zeros(2, 32), "time_ids": torch.zeros(2, 5)}, r"time_ids: expected \(2, 6\)"),
    "text": ({"text_embeds": torch.zeros(2, 30), "time_ids": torch.zeros(2, 6)}, r"text_embeds: expected \(2, 32\)"),
    "batch": ({"text_embeds": torch.zeros(1, 32), "time_ids": torch.zeros(2, 6)}, "B = 2"),
}


@pytest.mark.parametrize("case", WRONG_ADDED)
def test_wrong_added_conditions(case):
    _, ours = pair("sdxl")
    added, message = WRONG_ADDED[case]
    with pytest.raises(ValueError, match=message):
        ours(**{**tiny.inputs(ours), "added_cond_kwargs": added})


def test_wrong_controlnet_residuals():
    stock, ours = pair()
    down, mid = controlnet_residuals(stock)
    arguments = tiny.inputs(stock)
    with pytest.raises(ValueError, match="has 8 tensors; this UNet has 9 skips"):
        ours(**arguments, down_block_additional_residuals=down[:-1], mid_block_additional_residual=mid)
    with pytest.raises(ValueError, match=r"mid_block_additional_residual has shape \(2, 64, 2, 2\)"):
        ours(**arguments, down_block_additional_residuals=down, mid_block_additional_residual=mid[..., :2, :2])
    down[3] = down[3][:, :5]
    with pytest.raises(ValueError, match=r"down_block_additional_residuals\[3\]"):
        ours(**arguments, down_block_additional_residuals=down, mid_block_additional_residual=mid)


def test_debug_mode_looks_at_values(monkeypatch):
    _, ours = pair()
    arguments = tiny.inputs(ours)
    arguments["sample"][0, 0, 0, 0] = float("nan")
    ours(**arguments)
    monkeypatch.setenv("LDMFAST_DEBUG", "1")
    with pytest.raises(ValueError, match="sample has values that are not finite"):
        ours(**arguments)


def test_an_impossible_timestep_is_warned_of():
    _, ours = pair()
    with pytest.warns(UserWarning, match="timestep -5"):
        ours(**{**tiny.inputs(ours), "timestep": -5})


def test_made_from_its_configuration():
    stock, _ = pair()
    ours = UNet(**tiny.SD1)
    ours.load_state_dict(stock.state_dict())
    wanted, got = both(stock, ours, tiny.inputs(stock))
    assert tiny.error(got, wanted) <= CLOSE
    assert ours.config.cross_attention_dim == 32 and dict(ours.config).keys() == dict(stock.config).keys()
    assert all(p.is_contiguous() for p in ours.parameters())  # as stock has them


def test_from_unet_shares_the_parameters():
    stock = tiny.unet()
    ours = UNet.from_unet(stock)
    assert isinstance(ours, UNet2DConditionModel) and UNet.from_unet(ours) is ours
    assert all(a is b for a, b in zip(stock.parameters(), ours.parameters(), strict=True))
    assert ours.state_dict().keys() == stock.state_dict().keys() and ours.config == stock.config
    with pytest.raises(TypeError, match="got Linear"):
        UNet.from_unet(torch.nn.Linear(1, 1))
