"""`UNet` wherever diffusers programs put a U-Net: patched, hooked, offloaded, trained, saved, and in pipelines.

Each test does the same to a stock network and to ours, and wants the same answer.
"""

from __future__ import annotations

import copy
import json

import accelerate
import diffusers
import numpy
import pytest
import tiny
import torch
from diffusers.models import attention_processor
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch import nn

from ldmfast.models.unet import UNet
from ldmfast.models.weight_files import shapes
from ldmfast.pipeline.optimize import optimize

CLOSE = 1e-5


def pair(family="sd1", **changes):
    stock = tiny.unet(family, **changes)
    return stock, UNet.from_unet(copy.deepcopy(stock))


def answers(models, **extra):
    """The answers of the models to one set of arguments."""
    arguments = {**tiny.inputs(models[0]), **extra}
    with torch.no_grad():
        return [model(**arguments).sample for model in models]


# What is done to a network. Every entry must change what stock answers, or (second part) how it gets there.


def randomise(model, scale, mark=""):
    """Random parameters, the same for any layout: randn_like would fill a channels_last one in another order."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if mark in name:
            parameter.data.add_(scale * torch.randn(parameter.shape))


def lora(model, layers=("to_q", "to_v", "ff.net.0.proj", "conv1", "time_emb_proj")):
    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=3, target_modules=list(layers)))
    randomise(model, 0.2, "lora_")


def fused_lora(model):
    lora(model)
    model.fuse_lora()


def lora_on_every_layer(model):
    lora(model, [name for name, module in model.named_modules() if type(module) in (nn.Linear, nn.Conv2d)])


def in_place(model):
    """As EMAModel.copy_to and peft's merging do it: through .data, no version counter moves."""
    randomise(model, 0.05)


def ema(model):
    average = EMAModel(model.parameters(), decay=0.5)
    in_place(model)
    average.step(model.parameters())
    average.copy_to(model.parameters())


def hooks_on_norms_and_linears(model):
    for module in model.modules():
        if isinstance(module, nn.GroupNorm | nn.Linear):
            module.register_forward_hook(lambda module, inputs, output: output * 1.05)


def hooks_on_blocks(model):
    for block in (model.up_blocks[1], model.mid_block.resnets[0], model.down_blocks[0].attentions[0]):
        block.register_forward_pre_hook(lambda module, inputs: None)
        block.register_forward_hook(
            lambda module, inputs, output: tuple(o * 1.1 for o in output) if isinstance(output, tuple) else output * 1.1
        )


def patched_forward(model):
    norm = model.down_blocks[0].resnets[0].norm1
    original = norm.forward
    norm.forward = lambda x: original(x) * 1.5


def replaced_layer(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    attention = model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    new = Doubled(attention.to_q.in_features, attention.to_q.out_features, bias=False)
    new.load_state_dict(attention.to_q.state_dict())
    attention.to_q = new


def processor(model):
    class Scaled(attention_processor.AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return 0.5 * super().__call__(attn, hidden_states, *args, **kwargs)

    model.set_attn_processor(Scaled())


def freeu(model):
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


CHANGES = [
    lora,
    fused_lora,
    lora_on_every_layer,
    in_place,
    ema,
    hooks_on_norms_and_linears,
    hooks_on_blocks,
    patched_forward,
    replaced_layer,
    processor,
    freeu,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_network_answers_as_stock_changed_likewise(change):
    stock, ours = pair()
    answers([ours])  # a first answer, so that anything kept from it would show
    before = answers([stock])[0]
    torch.manual_seed(11)
    arguments = tiny.inputs(stock)
    for model in (stock, ours):
        change(model)
    wanted, got = answers([stock, ours], **arguments)
    assert tiny.error(got, wanted) <= CLOSE
    with torch.no_grad():
        assert tiny.error(before, wanted) > 1e-2
    unmodified = change in (fused_lora, in_place, ema)
    assert unmodified or ours.explain(), "explain() must say that something is called as it is"


def slicing(model):
    model.set_attention_slice("max")


def fused_qkv(model):
    model.fuse_qkv_projections()


def default_processors(model):
    model.set_default_attn_processor()


def chunked(model):
    for module in model.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(4, 1)


def layerwise_casting(model):
    model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def group_offload_leaves(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def group_offload_blocks(model):
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


def sequential_offload(model):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def hooked_and_unhooked(model):
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)


def contiguous_weights(model):
    model.to(memory_format=torch.contiguous_format)


def channels_last_weights(model):
    model.to(memory_format=torch.channels_last)


def compiled_blocks(model):
    for module in model.modules():
        if type(module).__name__ == "BasicTransformerBlock":
            module.compile(backend="eager")


WAYS = [
    slicing,
    fused_qkv,
    default_processors,
    chunked,
    layerwise_casting,
    group_offload_leaves,
    group_offload_blocks,
    sequential_offload,
    hooked_and_unhooked,
    contiguous_weights,
    channels_last_weights,
    compiled_blocks,
]


@pytest.mark.parametrize("change", WAYS, ids=lambda change: change.__name__)
def test_another_way_to_the_same_answer(change):
    stock, ours = pair()
    arguments = tiny.inputs(stock)
    for model in (stock, ours):
        change(model)
    wanted, got = answers([stock, ours], **arguments)
    assert tiny.error(got, wanted) <= CLOSE
    plain = change in (default_processors, hooked_and_unhooked, contiguous_weights, channels_last_weights)
    assert plain == (ours.explain() == []), ours.explain()


def test_dynamic_quantisation():
    quantization = pytest.importorskip("torch.ao.quantization")
    stock, ours = (quantization.quantize_dynamic(model, {nn.Linear}) for model in pair())
    wanted, got = answers([stock, ours])
    assert tiny.error(got, wanted) <= 2e-2  # the quantised layers round differently after 1e-6
    assert "Linear" in " ".join(ours.explain())


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.7])
def test_lora_scale(scale):
    stock, ours = pair()
    for model in (stock, ours):
        lora(model)
    arguments = tiny.inputs(stock)
    wanted, got = answers([stock, ours], **arguments, cross_attention_kwargs={"scale": scale})
    full = answers([stock], **arguments)[0]
    assert tiny.error(got, wanted) <= CLOSE and tiny.error(full, wanted) > 1e-3
    assert tiny.error(answers([ours], **arguments)[0], full) <= CLOSE  # the scale does not stay


def test_lora_on_one_face_is_seen_by_the_other():
    stock = tiny.unet()
    ours = UNet.from_unet(stock)
    lora(stock)
    wanted, got = answers([stock, ours])
    assert tiny.error(got, wanted) <= CLOSE


def test_freeu_off_again():
    stock, ours = pair()
    freeu(ours)
    assert "FreeU" in " ".join(ours.explain())
    ours.disable_freeu()
    wanted, got = answers([stock, ours])
    assert tiny.error(got, wanted) <= CLOSE and ours.explain() == []


def test_gradient_checkpointing():
    stock, ours = pair()
    arguments, kept = tiny.inputs(stock), {}
    for name, model in (("without", ours), ("stock", stock), ("ours", ours)):
        if name != "without":
            model.enable_gradient_checkpointing()
        model.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            loss = model.train()(**arguments).sample.square().mean()
        kept[name] = sum(sizes)
        loss.backward()
    for name, parameter in stock.named_parameters():
        assert tiny.error(dict(ours.named_parameters())[name].grad, parameter.grad) <= 1e-4, name
    assert ours.explain() == [] and kept["ours"] < 0.7 * kept["without"]


def test_lora_training_reaches_the_adapter_alone():
    _, ours = pair()
    ours.requires_grad_(False)
    lora(ours)
    ours(**tiny.inputs(ours)).sample.square().mean().backward()
    trained = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert trained and all("lora_" in name for name in trained)


def test_gligen_goes_to_the_parent():
    stock, ours = pair(attention_type="gated")
    boxes = {"boxes": torch.rand(2, 3, 4), "positive_embeddings": torch.randn(2, 3, 32), "masks": torch.ones(2, 3)}
    for model in (stock, ours):
        for name, parameter in model.named_parameters():
            if "alpha" in name:
                parameter.data.fill_(0.5)
    extra = {"cross_attention_kwargs": {"gligen": boxes}}
    wanted, got = answers([stock, ours], **extra)
    assert tiny.error(got, wanted) <= CLOSE
    assert "gligen" in ours.explain(extra["cross_attention_kwargs"])[0]


def test_a_global_hook_goes_to_the_parent():
    stock, ours = pair()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output * 1.1 if isinstance(module, nn.GroupNorm) else None
    )
    try:
        wanted, got = answers([stock, ours])
        assert "global module hook" in ours.explain()[0]
    finally:
        handle.remove()
    assert tiny.error(got, wanted) <= CLOSE


def test_accelerate_mixed_precision_training_step():
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    losses = []
    for model in pair():
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        torch.manual_seed(1)
        arguments = tiny.inputs(accelerator.unwrap_model(model))
        for _ in range(2):
            loss = model(**arguments).sample.float().square().mean()
            accelerator.backward(loss)
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_dtype_moves_and_a_replaced_conv_in():
    stock, ours = pair()
    for model in (stock, ours):
        model.to(torch.float64).to(torch.float32)
        model.conv_in = nn.Conv2d(8, 32, 3, padding=1)
    ours.conv_in.load_state_dict(stock.conv_in.state_dict())
    wanted, got = answers([stock, ours], sample=torch.randn(2, 8, 16, 16))
    assert tiny.error(got, wanted) <= CLOSE


# Saving and loading


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


def components(family="sd1", **changes):
    return {
        "vae": tiny.vae(),
        "unet": tiny.unet(family, **changes),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, beta_schedule="scaled_linear"),
        "text_encoder": None,
        "tokenizer": None,
    }


def stable_diffusion(kind=diffusers.StableDiffusionPipeline, family="sd1", extra=None, **changes):
    parts = {**components(family, **changes), **(extra or {})}
    if kind not in (diffusers.StableDiffusionXLPipeline,):
        parts |= {"safety_checker": None, "feature_extractor": None}
    if kind in (diffusers.StableDiffusionPipeline, diffusers.StableDiffusionPAGPipeline):
        parts |= {"requires_safety_checker": False, "image_encoder": None}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompt(width=32):
    generator = torch.Generator().manual_seed(2)
    embeds = torch.randn(2, 1, 7, width, generator=generator)
    return {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}


def draw(pipe, **arguments):
    arguments = {"num_inference_steps": 3, "output_type": "np", **prompt(), **arguments}
    return pipe(**arguments, generator=torch.Generator().manual_seed(4)).images


def picture(channels=3):
    return torch.rand(1, channels, 32, 32, generator=torch.Generator().manual_seed(3))


def with_ours(pipe):
    """A copy of the pipeline's parts under ours."""
    return optimize(copy.deepcopy(pipe))


PIPELINES = {
    "text to image": (lambda: stable_diffusion(), {"height": 64, "width": 48}),
    "image to image": (
        lambda: stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline, extra={"image_encoder": None}),
        {"image": picture(), "strength": 0.9},
    ),
    "inpainting, 4 channels": (
        lambda: stable_diffusion(diffusers.StableDiffusionInpaintPipeline, extra={"image_encoder": None}),
        {"image": picture(), "mask_image": picture(1), "height": 32, "width": 32, "strength": 0.9},
    ),
    "inpainting, 9 channels": (
        lambda: stable_diffusion(diffusers.StableDiffusionInpaintPipeline, "inpainting", {"image_encoder": None}),
        {"image": picture(), "mask_image": picture(1), "height": 32, "width": 32},
    ),
    "instruct pix2pix": (
        lambda: stable_diffusion(
            diffusers.StableDiffusionInstructPix2PixPipeline, extra={"image_encoder": None}, in_channels=8
        ),
        {"image": picture()},
    ),
    "latent consistency": (
        lambda: stable_diffusion(
            diffusers.LatentConsistencyModelPipeline,
            extra={"scheduler": diffusers.LCMScheduler(), "image_encoder": None},
            time_cond_proj_dim=12,
        ),
        {"height": 32, "width": 32},
    ),
    "perturbed attention guidance": (
        lambda: stable_diffusion(diffusers.StableDiffusionPAGPipeline),
        {"height": 32, "width": 32, "pag_scale": 3.0},
    ),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_draws_the_same_picture(name):
    make, arguments = PIPELINES[name]
    pipe = make()
    ours = with_ours(pipe)
    assert type(ours.unet) is UNet and type(ours.vae).__module__.startswith("ldmfast")
    wanted, got = draw(pipe, **arguments), draw(ours, **arguments)
    assert numpy.abs(got - wanted).max() <= 1e-3 and wanted.std() > 0.01


def test_controlnet():
    torch.manual_seed(0)
    parts = components()
    control = diffusers.ControlNetModel.from_unet(
        UNet.from_unet(parts["unet"]), conditioning_embedding_out_channels=(16, 32, 32)
    )
    randomise(control, 0.05)
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **parts, controlnet=control, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    arguments = {"image": torch.rand(1, 3, 64, 64), "height": 64, "width": 64}
    for guess_mode in (False, True):
        wanted, got = (draw(p, **arguments, guess_mode=guess_mode) for p in (pipe, with_ours(pipe)))
        assert numpy.abs(got - wanted).max() <= 1e-3


def test_sdxl():
    absent = {"text_encoder_2": None, "tokenizer_2": None, "image_encoder": None}
    pipe = stable_diffusion(diffusers.StableDiffusionXLPipeline, "sdxl", absent)
    arguments = {
        **prompt(64),
        "pooled_prompt_embeds": torch.ones(1, 32),
        "negative_pooled_prompt_embeds": torch.zeros(1, 32),
        "height": 32,
        "width": 32,
    }
    wanted, got = draw(pipe, **arguments), draw(with_ours(pipe), **arguments)
    assert numpy.abs(got - wanted).max() <= 1e-3


def test_an_optimized_pipeline_saves_as_a_stock_one(tmp_path):
    ours = with_ours(stable_diffusion())
    ours.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"] and index["vae"] == ["diffusers", "AutoencoderKL"]
    absent = {"safety_checker": None, "feature_extractor": None, "text_encoder": None, "tokenizer": None}
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, **absent)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.unet) is diffusers.UNet2DConditionModel
    arguments = {"height": 32, "width": 32}
    assert numpy.abs(draw(loaded, **arguments) - draw(ours, **arguments)).max() <= 1e-3
    again = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path, **absent, unet=UNet.from_pretrained(tmp_path, subfolder="unet")
    )
    assert type(again.unet) is UNet


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_optimized_plms_draws_the_same_picture(prediction):
    pipe = stable_diffusion()
    pipe.scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, prediction_type=prediction)
    ours = with_ours(pipe)
    assert type(ours.scheduler).__module__ == "ldmfast.diffusion.pndm"
    arguments = {"height": 32, "width": 32, "num_inference_steps": 6}
    assert numpy.abs(draw(ours, **arguments) - draw(pipe, **arguments)).max() <= 1e-3


@pytest.mark.parametrize("kind", [diffusers.DDIMScheduler, diffusers.DDPMScheduler, diffusers.PNDMScheduler])
def test_another_scheduler_made_of_an_optimized_ones_configuration_is_that_made_of_stocks(kind):
    """Values that were not named are the other class's defaults again: Euler's spacing is not DDIM's."""
    pipe = stable_diffusion()
    pipe.scheduler = kind(beta_schedule="scaled_linear")
    ours = with_ours(pipe)
    made = [diffusers.EulerDiscreteScheduler.from_config(p.scheduler.config).config for p in (pipe, ours)]
    assert type(ours.scheduler) is not kind and dict(made[0]) == dict(made[1])
    assert json.loads(ours.scheduler.to_json_string())["_class_name"] == kind.__name__


def test_components_and_other_pipelines_of_the_same_parts():
    ours = with_ours(stable_diffusion())
    other = diffusers.StableDiffusionImg2ImgPipeline(**ours.components, requires_safety_checker=False)
    assert other.unet is ours.unet
    passed = diffusers.StableDiffusionPAGPipeline.from_pipe(ours, unet=ours.unet, vae=ours.vae)
    assert passed.unet is ours.unet
    there = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(ours)  # nothing handed over
    assert (there.unet, there.vae, there.scheduler) == (ours.unet, ours.vae, ours.scheduler)
    back = diffusers.StableDiffusionPipeline.from_pipe(there)
    assert back.unet is ours.unet and dict(back.config) == dict(ours.config)
    optimize(stable_diffusion())
    with pytest.raises(ValueError, match="has no UNet2DConditionModel.* to take over"):
        optimize(ours)


def test_animatediff_and_register_to_config():
    _, ours = pair()
    motion = diffusers.UNetMotionModel.from_unet2d(ours, load_weights=True)
    assert torch.equal(motion.conv_in.weight, ours.conv_in.weight)
    ours.register_to_config(sample_size=24)
    assert ours.config.sample_size == 24


def test_ip_adapter():
    stock, ours = pair()
    for model in (stock, ours):
        torch.manual_seed(8)
        projection = {
            "proj.weight": torch.randn(4 * 32, 16),
            "proj.bias": torch.randn(4 * 32),
            "norm.weight": torch.ones(32),
            "norm.bias": torch.zeros(32),
        }
        state = {"image_proj": projection, "ip_adapter": {}}
        key = 1
        for name, attention in model.named_modules():
            if name.endswith("attn2"):
                for part in ("k", "v"):
                    state["ip_adapter"][f"{key}.to_{part}_ip.weight"] = 0.3 * torch.randn(attention.inner_dim, 32)
                key += 2
        model._load_ip_adapter_weights([state])
    added = {"image_embeds": [torch.randn(2, 1, 16)]}
    wanted, got = answers([stock, ours], added_cond_kwargs=added)
    assert tiny.error(got, wanted) <= CLOSE
    assert "IPAdapter" in " ".join(ours.explain())


def test_offloaded_networks_are_not_taken_over():
    stock = tiny.unet()
    sequential_offload(stock)
    with pytest.raises(ValueError, match="forward is wrapped: take it over first"):
        UNet.from_unet(stock)
    with pytest.raises(TypeError, match="compile what adopt returns"):
        UNet.from_unet(torch.compile(tiny.unet(), backend="eager"))
