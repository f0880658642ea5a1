"""The pipeline on tiny random networks: any sampler, seeds, sizes, from pictures, saved and loaded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import (
    array,
    batch_difference,
    class_conditional,
    half_mask,
    picture,
    scheduler,
    tensor,
    unconditional,
)

from ldmfast.conditioning.spatial import LowResolution, MapEncoder, MaskedImage
from ldmfast.diffusion.samplers import SAMPLERS, make_sampler
from ldmfast.models.encode_decode import encode_pictures
from ldmfast.pictures import to_pil
from ldmfast.pipeline.call import SamplingOptions

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # numpy's, about diffusers


@pytest.fixture(scope="module")
def pipeline():
    return class_conditional()


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
