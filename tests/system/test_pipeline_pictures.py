"""The pipeline on tiny random networks: any sampler, seeds, sizes, from pictures, saved and loaded."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image

from ldmfast import UNet
from ldmfast.conditioning.base import Unconditional
from ldmfast.conditioning.classes_and_boxes import ClassEmbedder
from ldmfast.conditioning.hybrid import Hybrid
from ldmfast.conditioning.spatial import LowResolution, MapEncoder, MaskedImage
from ldmfast.conditioning.text_sdxl import TwoTextEncoders
from ldmfast.diffusion.samplers import SAMPLERS, make_sampler
from ldmfast.models import AutoencoderKL
from ldmfast.models.encode_decode import encode_pictures
from ldmfast.models.unet2d import UNet2D
from ldmfast.pictures import to_pil
from ldmfast.pipeline import LatentDiffusionPipeline
from ldmfast.pipeline.call import SamplingOptions

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers


def autoencoder(z=4):
    """Its latents of noise pictures have deviation 1, as a trained one's have of its pictures."""
    torch.manual_seed(3)
    vae = AutoencoderKL.adopt(tiny.vae(latent_channels=z))
    with torch.no_grad():
        spread = vae.encode(tensor(picture())[None]).latent_dist.mode().std().item()
    vae.register_to_config(scaling_factor=1 / spread)
    return vae


def scheduler(**config):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return diffusers.DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing", **config)


def class_conditional(channels=4, **members):
    """A class-conditional pipeline of 16x16 pictures; with members, a hybrid of the class and those."""
    torch.manual_seed(4)
    small = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "attention_head_dim": 2,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = UNet.from_unet(tiny.unet(**small, in_channels=channels, cross_attention_dim=8))
    conditioner = ClassEmbedder(3, 8)
    if members:
        conditioner = Hybrid(**{"class": conditioner}, **members)
    return LatentDiffusionPipeline(unet, autoencoder(), scheduler(), conditioner)


def unconditional(channels=4, conditioner=None):
    torch.manual_seed(5)
    unet = UNet2D(
        sample_size=4,
        in_channels=channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return LatentDiffusionPipeline(unet, autoencoder(), scheduler(), conditioner)


@pytest.fixture(scope="module")
def pipeline():
    return class_conditional()


def picture(seed=0, width=16, height=16):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def half_mask(width=16, height=16):
    mask = Image.new("L", (width, height))
    mask.paste(255, (width // 2, 0, width, height))
    return mask


def array(picture):
    return np.asarray(picture).astype(int)


def batch_difference(pipeline, name, steps=6):
    """Relative difference (norms) of three pictures' latents from the same seeds drawn one by one, noise included."""
    options = SamplingOptions(make_sampler(name, pipeline.scheduler), steps, guidance=3.0)
    inputs, seeds = [0, 2, 1], [7, 1, 4]
    together = pipeline.denoise(inputs, seeds, options)
    alone = torch.cat([pipeline.denoise([i], [s], options) for i, s in zip(inputs, seeds, strict=True)])
    assert not torch.equal(together[:1], together[1:2])
    return ((together - alone).norm() / alone.norm()).item()


@pytest.mark.parametrize("name", SAMPLERS)
def test_seeds_in_a_batch_equal_the_seeds_one_by_one(pipeline, name):
    """To 1e-6 of the latents' norm: a matrix product of a batch may add in another order."""
    assert batch_difference(pipeline, name) <= 1e-6


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler", "dpm++", "unipc"])
def test_a_zero_terminal_snr_of_the_model_s_configuration_is_kept(name):
    """The first step sees pure noise at the last time; a sampler that would take another schedule is refused."""
    pipe = class_conditional()
    pipe.scheduler = scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction")
    made = make_sampler(name, pipe.scheduler)
    assert made.config.prediction_type == "v_prediction" and made.alphas_cumprod[-1] <= 1e-6
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[:2]), with_kwargs=True)
    latents = pipe.denoise([0], [5], SamplingOptions(made, 4, guidance=3.0, rescale=0.7))
    assert torch.isfinite(latents).all() and float(seen[0][1]) == 999
    torch.testing.assert_close(seen[0][0][:1], pipe.noise([5]), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="PNDMScheduler has no rescale_betas_zero_snr"):
        pipe([0], sampler="plms")


def test_eta_draws_noise_of_each_picture_s_own_seed(pipeline):
    options = SamplingOptions(make_sampler("ddim", pipeline.scheduler), 5, guidance=3.0, eta=1.0)
    together = pipeline.denoise([0, 1], [7, 1], options)
    alone = pipeline.denoise([1], [1], options)
    assert (together[1:] - alone).norm() <= 1e-6 * alone.norm()
    ancestral = SamplingOptions(make_sampler("ddpm", pipeline.scheduler), 5, guidance=3.0)
    assert (pipeline.denoise([1], [1], ancestral) - alone).norm() <= 1e-5 * alone.norm()  # eta 1 is DDPM
    still = SamplingOptions(make_sampler("ddim", pipeline.scheduler), 5, guidance=3.0)
    assert (pipeline.denoise([1], [1], still) - alone).norm() > 0.01 * alone.norm()


def test_batches_previews_and_progress(pipeline, capsys):
    shown = []
    drawn = pipeline(
        [0, 1, 2],
        steps=5,
        seeds=3,
        batch=2,
        progress=True,
        preview_every=2,
        on_preview=lambda step, steps, pictures: shown.append((step, steps, len(pictures), pictures[0].size)),
    )
    assert shown == [(2, 5, 2, (16, 16)), (4, 5, 2, (16, 16)), (2, 5, 1, (16, 16)), (4, 5, 1, (16, 16))]
    assert "10/10" in capsys.readouterr().err
    assert np.abs(array(drawn[2]) - array(pipeline(2, steps=5, seeds=5)[0])).max() <= 1


@pytest.mark.parametrize("name", ["ddim", "plms", "dpm++", "heun", "unipc"])
def test_the_last_preview_is_nearly_the_result(pipeline, name):
    shown = []
    drawn = pipeline([1], steps=10, sampler=name, preview_every=1, on_preview=lambda i, n, p: shown.append(p[0]))
    far = [np.abs(array(p) - array(drawn[0])).mean() for p in (shown[0], shown[-1])]
    assert far[1] <= 0.5 * far[0], far


def test_sizes_other_than_trained(pipeline):
    assert pipeline([0], steps=1, size=(24, 8))[0].size == (24, 8)
    assert pipeline([0], steps=2, image=picture(width=8, height=20))[0].size == (8, 20)


def test_guidance_and_its_rescaling_change_the_picture(pipeline):
    plain, guided, rescaled = (
        array(pipeline([0], steps=4, guidance=g, guidance_rescale=phi)[0]) for g, phi in ((1, 0), (9, 0), (9, 0.7))
    )
    assert (plain != guided).any() and (guided != rescaled).any()
    assert (array(pipeline([0], steps=4)[0]) == array(pipeline([0], steps=4, guidance=3.0)[0])).all()


@pytest.mark.parametrize("name", ["ddim", "plms", "euler", "dpm2", "dpm++-sde"])
def test_a_little_strength_stays_near_the_image(pipeline, name):
    with torch.no_grad():
        reference = array(to_pil(pipeline.decode(encode_pictures(pipeline.vae, tensor(picture())[None])))[0])
    far = [
        np.abs(array(pipeline([0], guidance=1, steps=10, sampler=name, image=picture(), strength=s)[0]) - reference)
        for s in (0.1, 0.9)
    ]
    assert far[0].mean() < 0.6 * far[1].mean()


def tensor(picture):
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "plms", "euler", "heun"])
def test_inpainting_with_a_model_that_knows_no_masks(pipeline, name):
    image, mask = picture(), half_mask()
    first, second = (
        array(pipeline([0], steps=4, sampler=name, image=image, mask=mask, seeds=seed)[0]) for seed in (1, 2)
    )
    for drawn in (first, second):  # what is not masked is the image's own pixels
        assert (drawn[:, :8] == array(image)[:, :8]).all()
    assert np.abs(first[:, 8:] - second[:, 8:]).mean() > 1
    other = array(pipeline([0], steps=4, sampler=name, image=picture(9), mask=mask, seeds=1)[0])
    assert (other[:, 8:] != first[:, 8:]).any()  # the drawn part sees the known part


def test_masks_by_tensor_and_one_for_each(pipeline):
    image, mask = picture(), half_mask()
    by_picture = array(pipeline([0], steps=2, image=image, mask=mask)[0])
    half = torch.cat([torch.zeros(1, 16, 8), torch.ones(1, 16, 8)], dim=2)
    by_tensor = array(pipeline([0], steps=2, image=tensor(image), mask=half)[0])
    assert (by_picture == by_tensor).all()
    several = pipeline([0, 0], steps=2, seeds=[0, 0], batch=1, image=[picture(2), image], mask=[mask, mask])
    assert (array(several[1]) == by_picture).all()


@pytest.mark.parametrize("style", ["ldm", "sd"])
@pytest.mark.parametrize("text", [False, True])
def test_inpainting_with_a_model_that_takes_the_masked_latent(style, text):
    masked = MaskedImage(5, style=style)
    pipe = class_conditional(9, pictures=masked) if text else unconditional(9, masked)
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    image, mask = picture(), half_mask()
    drawn = pipe([1] if text else None, steps=2, image=image, mask=mask)[0]
    assert (array(drawn)[:, :8] == array(image)[:, :8]).all()
    beside = seen[0][:, 4:]
    assert len(beside) == (2 if text else 1) and torch.equal(beside[:1], beside[-1:])  # guided or not, the same picture
    hole = -1.0 if style == "ldm" else 0.0
    without = tensor(image).clone()
    without[:, :, 8:] = hole
    with torch.no_grad():
        z = encode_pictures(pipe.vae, without[None])
    small = torch.cat([torch.zeros(1, 1, 4, 2), torch.ones(1, 1, 4, 2)], dim=3)
    wanted = torch.cat([z, 2 * small - 1], dim=1) if style == "ldm" else torch.cat([small, z], dim=1)
    torch.testing.assert_close(beside[:1], wanted)
    again = pipe([1] if text else None, steps=4, image=image, mask=mask, strength=0.5)[0]
    assert (array(again) != array(drawn)).any()


def test_super_resolution():
    pipe = unconditional(7, LowResolution(3))
    seen = []
    pipe.unet.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    small = picture(width=6, height=5)
    assert pipe(None, steps=1, image=small)[0].size == (24, 20)
    torch.testing.assert_close(seen[0][0, 4:], tensor(small))
    with pytest.raises(ValueError, match="image is missing: this model takes image beside the latent"):
        pipe(None, steps=1)
    with pytest.raises(ValueError, match="strength and mask belong to models that begin at an image"):
        pipe(None, steps=1, image=small, strength=0.5)
    with pytest.raises(ValueError, match="image is 6x5 pixels; for size 32x32 it must be 8x8"):
        pipe(None, steps=1, image=small, size=(32, 32))


def test_what_is_joined_to_the_latents_must_fit():
    pipe = unconditional(7, MapEncoder(2, 3, stages=2))
    assert pipe([torch.zeros(16, 16, dtype=torch.int64)], steps=1, guidance=2.0)[0].size == (16, 16)
    with pytest.raises(ValueError, match="the condition beside the latents is 2x4, the latents are 4x4"):
        pipe([torch.zeros(16, 8, dtype=torch.int64)], steps=1)
    with pytest.raises(ValueError, match="takes 4 channels; the latents have 4 and the condition beside them 3"):
        unconditional(4, MapEncoder(2, 3, stages=2))([torch.zeros(16, 16, dtype=torch.int64)], steps=1)


def test_an_unconditional_model_draws_as_many_as_are_asked_for():
    pipe = unconditional()
    assert len(pipe(2, steps=1)) == 2 and len(pipe(steps=1)) == 1
    with pytest.raises(ValueError, match="guidance=2.0: this model is unconditional"):
        pipe(1, steps=1, guidance=2.0)


WRONG = [
    ({"strength": 0.5}, "strength=0.5 is given without image"),
    ({"mask": half_mask()}, "mask is given without image"),
    ({"image": picture(), "strength": 0.0}, "strength=0.0 must lie between 0 and 1"),
    ({"image": picture(), "strength": 1.5}, "strength=1.5 must lie"),
    ({"image": picture(), "strength": 0.1, "steps": 5}, "strength=0.1 of 5 steps is less than one step"),
    ({"image": picture(width=18)}, "size 18x16: both sides must be multiples of 4"),
    ({"image": picture(), "size": (8, 8)}, "image is 16x16 pixels; for size 8x8 it must be 8x8"),
    ({"image": picture(), "mask": half_mask(8)}, "mask is 8x16 pixels, image is 16x16"),
    ({"image": picture(), "mask": Image.new("L", (16, 16))}, "mask is empty"),
    ({"image": torch.full((3, 16, 16), 200.0)}, "image has values from 200 to 200, expected -1 to 1"),
    ({"image": torch.zeros(1, 16, 16)}, r"image has shape \[1, 16, 16\], expected \[3, H, W\]"),
    ({"image": [picture(), picture()]}, "2 pictures as image for 1 inputs"),
    ({"image": [picture(), picture(width=8)]}, "the pictures differ in size: 8x16, 16x16"),
    ({"size": (0, 8)}, "size 0x8"),
    ({"eta": 2.0}, "eta=2.0 must lie between 0 and 1"),
    ({"eta": 0.5, "sampler": "euler"}, "eta=0.5: EulerDiscreteScheduler takes none"),
    ({"guidance_rescale": -1}, "guidance_rescale=-1 must lie"),
    ({"sampler": "best"}, "sampler='best' is none of ddim"),
    ({"preview_every": 0}, "preview_every=0 must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[m[:40] for _, m in WRONG])
def test_a_wrong_argument_is_explained(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline([0], **arguments)


def test_a_picture_of_another_kind_is_a_type_error(pipeline):
    with pytest.raises(TypeError, match="image is a str, expected a PIL picture or a tensor"):
        pipeline([0], image="a.png")


@pytest.mark.parametrize("kind", ["class", "nothing", "masked", "small"])
def test_saving_and_loading_keeps_the_picture(tmp_path, kind):
    pipe, inputs, given = {
        "class": (class_conditional, 2, {}),
        "nothing": (unconditional, None, {}),
        "masked": (
            lambda: class_conditional(9, pictures=MaskedImage(5, style="sd")),
            1,
            {"image": picture(), "mask": half_mask()},
        ),
        "small": (lambda: unconditional(7, LowResolution(3)), None, {"image": picture(width=4, height=4)}),
    }[kind]
    pipe = pipe()
    pipe.guidance, pipe.scheduler = 2.5, make_sampler("plms", pipe.scheduler)
    pipe.save_pretrained(tmp_path)
    again = LatentDiffusionPipeline.from_pretrained(tmp_path)
    assert again.guidance == 2.5 and type(again.scheduler) is type(pipe.scheduler)
    assert (array(pipe(inputs, steps=3, **given)[0]) == array(again(inputs, steps=3, **given)[0])).all()
    assert not any("_name_or_path" in p.read_text() for p in tmp_path.glob("*/config.json"))
    with pytest.raises(ValueError, match="text_encoder='minilm', but .* has no other to replace"):
        LatentDiffusionPipeline.from_pretrained(tmp_path, text_encoder="minilm")


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    home, pipe = tmp_path / "saved", class_conditional()
    pipe.save_pretrained(home)
    (home / "README.md").write_text("mine")
    before = {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.vae), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            class_conditional().save_pretrained(home)
    assert before == {p: p.read_bytes() for p in home.rglob("*") if p.is_file()}
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]
    pipe.save_pretrained(home, dtype=torch.float16)
    assert (home / "README.md").read_text() == "mine" and not any(home.rglob("*.old"))
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (home / weights).stat().st_size < 0.7 * len(before[home / weights])


def test_sdxl_by_a_conditioner_of_two_text_towers():
    """As diffusers' own pipeline: the same context, pooled state and sizes, the empty caption all zeros."""
    pipe = stable_diffusion_xl()
    ours = LatentDiffusionPipeline(
        UNet.from_unet(pipe.unet),
        AutoencoderKL.adopt(pipe.vae),
        pipe.scheduler,
        TwoTextEncoders([pipe.text_encoder, pipe.text_encoder_2], [pipe.tokenizer, pipe.tokenizer_2], name="tiny"),
    )
    wanted = pipe(
        "a b", num_inference_steps=3, guidance_scale=4.0, latents=ours.noise([5]), height=32, width=32
    ).images[0]
    got = ours("a b", steps=3, guidance=4.0, seeds=5)[0]
    assert got.size == (32, 32) and np.abs(array(got) - array(wanted)).max() <= 2
    with pytest.raises(ValueError, match="a caption must be a string; got 3"):
        ours([3], steps=1)
    most = min(tower.config.max_position_embeddings for tower in (pipe.text_encoder, pipe.text_encoder_2))
    long = "a " * most
    assert ours.conditioner.truncated_captions(["a b", long]) == [(long, most)]
    beside = Hybrid(text=ours.conditioner, label=Unconditional())
    assert beside.truncated_captions([{"text": long}, {"label": None}, {"text": "a"}, "a text", None]) == [(long, most)]


class Words:
    """A tokenizer of one token a letter."""

    model_max_length, added_tokens_encoder, tokenize = 7, {}, staticmethod(list)
    bos_token_id, eos_token_id, pad_token_id = 0, 51, 51

    def __call__(self, captions, add_special_tokens=True, **_):
        if not add_special_tokens:
            return {"input_ids": [ord(c) % 50 for c in captions]}
        ids = [([0] + [ord(c) % 50 for c in text] + [51] * 7)[:6] + [51] for text in captions]
        return transformers.BatchEncoding({"input_ids": torch.tensor(ids)})


def stable_diffusion_xl():
    torch.manual_seed(6)
    text = dict(
        hidden_size=32,
        intermediate_size=32,
        projection_dim=32,
        num_attention_heads=2,
        num_hidden_layers=3,
        vocab_size=52,
        max_position_embeddings=7,
        bos_token_id=0,
        eos_token_id=51,
    )
    config = transformers.CLIPTextConfig(**text)
    towers = transformers.CLIPTextModel(config), transformers.CLIPTextModelWithProjection(config)
    unet = tiny.unet("sdxl", sample_size=8)
    pipe = diffusers.StableDiffusionXLPipeline(
        tiny.vae(), *(tower.eval() for tower in towers), Words(), Words(), unet, scheduler(), add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
