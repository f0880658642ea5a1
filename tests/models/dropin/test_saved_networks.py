"""`UNet` saved and loaded as stock is, and what a user may have in place of a checkpoint."""

from __future__ import annotations

import json

import diffusers
import pytest
import tiny
import torch
from both_networks import CLOSE, answers, pair
from diffusers.training_utils import EMAModel

from ldmfast.models.unet import UNet
from ldmfast.models.weight_files import shapes


def test_saved_files_are_stock(tmp_path):
    stock, ours = pair("sdxl")
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    for kind in (diffusers.UNet2DConditionModel, diffusers.AutoModel, UNet):
        loaded = kind.from_pretrained(str(tmp_path))
        assert type(loaded) is (UNet if kind is UNet else diffusers.UNet2DConditionModel)
        wanted, got = answers([stock, loaded])
        assert tiny.error(got, wanted) <= CLOSE
    assert set(shapes(tmp_path / "diffusion_pytorch_model.safetensors")) == set(stock.state_dict())


def test_from_config_and_ema_from_pretrained(tmp_path):
    _, ours = pair()
    again = UNet.from_config(ours.config)
    again.load_state_dict(ours.state_dict())
    wanted, got = answers([ours, again])
    assert tiny.error(got, wanted) <= CLOSE
    EMAModel(ours.parameters(), model_cls=UNet, model_config=ours.config).save_pretrained(tmp_path)
    assert EMAModel.from_pretrained(tmp_path, UNet).decay == 0.9999


def damaged(folder, name):
    """What a user may have in place of the weights, and the sentence it earns."""
    weights = folder / "diffusion_pytorch_model.safetensors"
    if name == "web page":
        weights.write_text("<html><body>Not found</body></html>" * 9)
        return "starts with `<html`: a failed download"
    if name == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
        return "git-lfs pointer"
    if name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return "truncated.*download it again"
    if name == "pickle":
        torch.save({}, weights)
        return "is a pickle"
    config = json.loads((folder / "config.json").read_text())
    if name == "another class":
        config["_class_name"] = "AutoencoderKL"
        message = "holds a AutoencoderKL, not a UNet2DConditionModel"
    elif name == "another family":
        config["cross_attention_dim"] = 2048
        message = "prompts of width 32, its config.json says 2048 .SDXL."
    else:
        tiny.vae().save_pretrained(folder)
        message = "its weights are an autoencoder"
    (folder / "config.json").write_text(json.dumps(config))
    return message


@pytest.mark.parametrize(
    "name", ["web page", "pointer", "truncated", "pickle", "another class", "another family", "another model"]
)
def test_a_wrong_checkpoint_is_refused_in_one_line(tmp_path, name):
    tiny.unet().save_pretrained(tmp_path)
    message = damaged(tmp_path, name)
    with pytest.raises(ValueError, match=message) as raised:
        UNet.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)


def test_weights_of_another_size_are_taken_at_random_where_that_was_asked_for(tmp_path):
    """As people start an inpainting network from a plain one."""
    stock = tiny.unet()
    stock.save_pretrained(tmp_path)
    wider = {"in_channels": 9, "low_cpu_mem_usage": False}
    with pytest.raises(ValueError, match="could not be loaded"):
        UNet.from_pretrained(tmp_path, **wider)
    made = UNet.from_pretrained(tmp_path, **wider, ignore_mismatched_sizes=True)
    assert made.conv_in.weight.shape[1] == 9 and made.conv_in.weight.isfinite().all()
    kept = {name: value for name, value in made.state_dict().items() if not name.startswith("conv_in.weight")}
    assert kept and all(torch.equal(value, stock.state_dict()[name]) for name, value in kept.items())


def test_a_missing_weight_is_an_error_unless_opted_in(tmp_path):
    from safetensors.torch import load_file, save_file

    tiny.unet().save_pretrained(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    del state["mid_block.resnets.0.conv1.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 of .*mid_block.resnets.0.conv1.weight.*allow_missing=True"):
        UNet.from_pretrained(tmp_path)
    model, info = UNet.from_pretrained(tmp_path, allow_missing=True, output_loading_info=True)
    assert info["missing_keys"] == ["mid_block.resnets.0.conv1.weight"] and isinstance(model, UNet)


def test_a_whole_pipeline_is_not_a_unet(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="name the part, such as subfolder='unet'"):
        UNet.from_pretrained(tmp_path)


# In pipelines, with prompts already encoded
