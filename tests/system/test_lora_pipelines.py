"""LoRA by every door: `load`, `optimize`, the command line, a live pipeline; U-Net and text encoder, SDXL's two too."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import tiny
import torch
from lora_pipelines import stable_diffusion, stable_diffusion_xl, write_kohya
from PIL import Image

import ldmfast
from ldmfast.commands import cli

SIZE = (32, 32)


def drawn(pipe, prompt="a cat"):
    """The pictures of a diffusers pipeline, as numbers in 0 to 1."""
    asked = {"num_inference_steps": 2, "output_type": "np", "height": SIZE[1], "width": SIZE[0]}
    return pipe(prompt, **asked, generator=torch.Generator().manual_seed(3)).images


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("lora")
    pipe = stable_diffusion()
    pipe.save_pretrained(home / "stock")
    write_kohya(pipe, home / "kohya.safetensors", seed=1)
    write_kohya(pipe, home / "loha.safetensors", seed=2, method="loha")
    return home


@pytest.mark.parametrize("name", ["kohya", "loha"])
def test_every_door_draws_the_same_picture(name, home, tmp_path):
    source, file, out = str(home / "stock"), str(home / f"{name}.safetensors"), tmp_path / "a.png"
    loaded = ldmfast.load(source, lora=(file, 0.5))
    later = ldmfast.load(source)
    plain = np.asarray(later("a cat", steps=2, seeds=3, size=SIZE)[0]).astype(int)
    ldmfast.load_lora(later, (file, 0.5))
    options = ["--steps", "2", "--seed", "3", "--scale", "1", "--quiet", "--size", "32x32", "-o", str(out)]
    assert cli.main(["sample", "a cat", "--model", source, "--lora", f"{file}:0.5", *options]) == 0
    pictures = [np.asarray(pipe("a cat", steps=2, seeds=3, size=SIZE)[0]).astype(int) for pipe in (loaded, later)]
    pictures.append(np.asarray(Image.open(out)).astype(int))
    assert all((other == pictures[0]).all() for other in pictures[1:])
    assert abs(pictures[0] - plain).max() > 3
    assert any("lora" in key for key in loaded.conditioner.state_dict())  # the text encoder has its part


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl], ids=["sd", "sdxl"])
def test_an_optimized_pipeline_draws_as_diffusers_with_the_same_file(make, tmp_path):
    """By diffusers' own loader on a stock pipeline, by that on ours, and by ours."""
    stock = make()
    file = write_kohya(stock, tmp_path / "kohya.safetensors", seed=1)
    by_theirs, by_ours = ldmfast.optimize(copy.deepcopy(stock)), ldmfast.optimize(copy.deepcopy(stock), lora=file)
    plain = drawn(stock)
    stock.load_lora_weights(str(file))
    by_theirs.load_lora_weights(str(file))
    wanted = drawn(stock)
    assert abs(wanted - plain).max() > 0.01
    assert abs(drawn(by_theirs) - wanted).max() < 1e-3 and abs(drawn(by_ours) - wanted).max() < 1e-3
    by_ours.unload_lora_weights()
    assert abs(drawn(by_ours) - plain).max() < 1e-3


def test_a_text_encoder_that_is_not_there_is_said(home):
    unet = ldmfast.load(home / "stock").unet
    with pytest.warns(UserWarning, match=r"\d+ layers of text_encoder are left out"):
        ldmfast.load_lora(unet, home / "kohya.safetensors")


def test_what_is_wrong_leaves_the_pipeline_as_it_was(home, tmp_path):
    """The first file fits, the second is another network's."""
    pipe = ldmfast.optimize(stable_diffusion())
    before = drawn(pipe)
    other = write_kohya(stable_diffusion_xl(), tmp_path / "xl.safetensors", seed=1)
    with pytest.raises(ValueError, match="xl.safetensors does not fit this U-Net"):
        ldmfast.load_lora(pipe, home / "kohya.safetensors", other)
    assert (drawn(pipe) == before).all() and not pipe.get_list_adapters().get("unet")


def test_block_scales_mean_what_they_do_to_stock():
    """diffusers looks the rule up by the class's name; ours is not UNet2DConditionModel."""
    from peft import LoraConfig

    from ldmfast.models.unet import UNet

    stock = tiny.unet()
    torch.manual_seed(5)
    stock.add_adapter(LoraConfig(r=3, target_modules=["to_q", "to_v"], init_lora_weights=False))
    ours = UNet.from_unet(copy.deepcopy(stock))
    arguments = tiny.inputs(stock)
    scales = {"down": 0.3, "mid": 2.0, "up": {"block_1": [0.1, 0.9, 0.4]}}
    with torch.no_grad():
        whole = stock(**arguments).sample
        for network in (stock, ours):
            network.set_adapters("default", scales)
        wanted, got = stock(**arguments).sample, ours(**arguments).sample
    assert tiny.error(got, wanted) < 1e-5 and tiny.error(whole, wanted) > 1e-4
