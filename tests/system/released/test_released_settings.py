"""What a released file, its numbers beside the weights and its configuration say: dtype, prediction, noise schedule."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from saved_files import UNET, saved
from test_load import small

import ldmfast
from ldmfast.released.conversion import convert
from ldmfast.released.families import DENOISERS
from ldmfast.released.noise_schedule import schedule
from ldmfast.released.settings import read_config


@pytest.fixture(scope="module")
def sd1():
    return small()


def test_a_configuration_as_text_as_a_file_and_with_numbers_of_today(tmp_path):
    text = "model:\n  params:\n    linear_start: 1e-4\n    linear_end: 2E-2\n    scale_factor: .5e+1\n    name: e4\n"
    (tmp_path / "a.yaml").write_text(text)
    for config in (text, tmp_path / "a.yaml", str(tmp_path / "a.yaml")):
        assert read_config(config) == {"linear_start": 1e-4, "linear_end": 2e-2, "scale_factor": 5.0, "name": "e4"}
    assert read_config("parameterization: v") == {"parameterization": "v"}
    with pytest.raises(FileNotFoundError, match="none.yaml"):
        read_config(tmp_path / "none.yaml")
    for wrong in ("a:\n  - [", "just\nwords", "x: !!python/object/apply:os.getcwd []\n", b"\x80\x81"):
        path = tmp_path / "b.yaml"
        path.write_bytes(wrong if isinstance(wrong, bytes) else wrong.encode())
        for config in (path, wrong) if isinstance(wrong, str) else (path,):
            with pytest.raises(ValueError, match="config"):
                read_config(config)
    with pytest.raises(ValueError, match="linear_start: 'x', expected a number"):
        schedule({}, {"linear_start": "x"}, None, {})


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float16, torch.bfloat16)])
def test_mixed_dtypes_become_the_one_that_holds_all(dtypes, sd1, tmp_path):
    mixed = {name: value.to(dtypes[i % 2]) for i, (name, value) in enumerate(sd1.items())}
    pipe = ldmfast.load(saved(mixed, tmp_path / "mixed.ckpt"), dtype=None)
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.conditioner.model) for p in part.parameters()} == {
        torch.float32
    }
    halves = ldmfast.load(saved({n: v.half() for n, v in sd1.items()}, tmp_path / "half.ckpt"), dtype=None)
    assert {p.dtype for p in halves.unet.parameters()} == {torch.float16}
    x = torch.zeros(1, 4, 8, 8)
    with torch.no_grad():
        assert pipe.unet(x, 3, torch.zeros(1, 5, 64)).sample.isfinite().all()


def said(path, **options):
    """(prediction type, what was warned of) of a load."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pipe = ldmfast.load(path, **options)
    return pipe, [str(each.message) for each in caught if "is a guess" in str(each.message)]


MARKS = {  # metadata, tensors and numbers beside the weights -> the prediction type
    "nothing, Stable Diffusion 2": ("sd-v2", {}, {}, None),
    "nothing, SDXL": ("sdxl", {}, {}, None),
    "nothing, Stable Diffusion 1": ("sd-v1", {}, {}, None),
    "nothing, inpainting": ("sd-v1-inpainting", {}, {}, None),
    "nothing, pix2pix": ("instruct-pix2pix", {}, {}, None),
    "nothing, inpainting by Stable Diffusion 2": ("sd-v2-inpainting", {}, {}, None),
    "nothing, inpainting by SDXL": ("sdxl-inpainting", {}, {}, None),
    "metadata, v, inpainting": ("sd-v1-inpainting", {"modelspec.prediction_type": "v"}, {}, "v_prediction"),
    "a marker, pix2pix": ("instruct-pix2pix", {}, {"v_pred": ()}, "v_prediction"),
    "metadata, epsilon, Stable Diffusion 1": ("sd-v1", {"modelspec.predict_key": "epsilon"}, {}, "epsilon"),
    "metadata, v": ("sd-v1", {"modelspec.prediction_type": "v"}, {}, "v_prediction"),
    "metadata, epsilon": ("sd-v2", {"modelspec.prediction_type": "epsilon"}, {}, "epsilon"),
    "metadata of another tool": ("sdxl", {"modelspec.predict_key": "v"}, {}, "v_prediction"),
    "its architecture": ("sd-v2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, "v_prediction"),
    "metadata before a marker": ("sdxl", {"modelspec.prediction_type": "epsilon"}, {"v_pred": ()}, "epsilon"),
    "a marker, SDXL": ("sdxl", {}, {"v_pred": ()}, "v_prediction"),
    "a marker, Stable Diffusion 1": ("sd-v1", {}, {"v_pred": ()}, "v_prediction"),
    "2.0 in epsilon, by its step": ("sd-v2", {}, {"global_step": 875000}, "epsilon"),
    "2.1 in epsilon, by its step": ("sd-v2", {}, {"global_step": 220000}, "epsilon"),
    "2.1 in v, by its step": ("sd-v2", {}, {"global_step": 110000}, "v_prediction"),
    "a step of nobody's": ("sd-v2", {}, {"global_step": 17}, None),
    "the step in the metadata": ("sd-v2", {"global_step": "875000"}, {}, "epsilon"),
}


def narrow(family):
    """`small`, its first convolution as wide as the family's."""
    base = family.removesuffix("-inpainting").replace("instruct-pix2pix", "sd-v1")
    tensors, name = small(base), f"{UNET}input_blocks.0.0.weight"
    shape = list(tensors[name].shape)
    shape[1] = DENOISERS[family].structure.inputs
    return tensors | {name: torch.randn(shape) * 0.1}


@pytest.mark.parametrize("case", MARKS)
def test_what_the_file_says_decides_what_it_predicts(case, tmp_path):
    family, metadata, beside, wanted = MARKS[case]
    beside = {name: torch.tensor(value or 0) for name, value in beside.items()}
    path = saved(narrow(family) | beside, tmp_path / "file.safetensors", metadata or None)
    pipe, guesses = said(path)
    usual = "v_prediction" if family == "sd-v2" else "epsilon"
    assert pipe.scheduler.config.prediction_type == (wanted or usual)
    assert len(guesses) == (wanted is None)
    if wanted is None:
        assert "config={'parameterization': 'v'}" in guesses[0]
        for word, kind in (("v", "v_prediction"), ("eps", "epsilon")):
            pipe, guesses = said(path, config={"parameterization": word})
            assert pipe.scheduler.config.prediction_type == kind and guesses == []
        assert any("is a guess" in line for line in convert(path, tmp_path / "folder"))
        assert said(tmp_path / "folder")[1] == []
    if family == "sd-v2":  # trained on 512 pixels in epsilon, on 768 in v
        assert pipe.unet.config.sample_size == (64 if pipe.scheduler.config.prediction_type == "epsilon" else 96)


def test_a_build_of_which_all_models_agree_is_no_guess():
    """LDM's own, and Stable Diffusion's that nobody is known to have trained otherwise."""
    line = {"linear_start": 0.00085, "linear_end": 0.012}
    guessed = {name for name, row in DENOISERS.items() if schedule({}, line, row, {})[1]}
    drawn = {name for name, row in DENOISERS.items() if row.condition in ("clip", "openclip", "two")}
    assert guessed == drawn - {"sd-v2-depth", "sdxl-refiner"}


def test_a_pickles_training_step_counts(tmp_path):
    torch.save({"state_dict": small("sd-v2"), "global_step": 875000}, tmp_path / "base.ckpt")
    pipe, guesses = said(tmp_path / "base.ckpt")
    assert pipe.scheduler.config.prediction_type == "epsilon" and guesses == []


def test_zero_terminal_snr(tmp_path):
    marked = small("sdxl") | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}
    path = saved(marked, tmp_path / "file.safetensors")
    pipe, guesses = said(path)
    assert guesses == [] and pipe.scheduler.config.rescale_betas_zero_snr
    assert pipe.scheduler.alphas_cumprod[-1] <= 1e-7 and pipe.scheduler.config.timestep_spacing == "trailing"
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.timesteps[0] == 999
    assert not said(path, config={"zero_snr": False})[0].scheduler.config.rescale_betas_zero_snr
    assert said(path, config={"parameterization": "eps"})[0].scheduler.config.prediction_type == "epsilon"
    path = saved(small(), tmp_path / "sd.safetensors", {"ss_zero_terminal_snr": "True"})
    assert said(path)[0].scheduler.config.rescale_betas_zero_snr


def test_models_of_a_continuous_noise_schedule(tmp_path):
    marks = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
    pipe, guesses = said(saved(small("sdxl") | marks, tmp_path / "cos.safetensors"))
    config = pipe.scheduler.config
    assert guesses == [] and type(pipe.scheduler).__name__ == "EDMEulerScheduler"
    assert (config.sigma_min, config.sigma_max, config.prediction_type) == (0.002, 120.0, "v_prediction")
    marks = {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)}
    with pytest.raises(ValueError, match="edm_mean marks a Playground 2.5 model"):
        ldmfast.load(saved(small("sdxl") | marks, tmp_path / "playground.safetensors"))


def released_betas(name, first=0.001, last=0.02, count=1000, shift=8e-3):
    """make_beta_schedule of the released code, by its formulas."""
    if name == "linear":
        return np.linspace(first**0.5, last**0.5, count) ** 2
    if name == "cosine":
        angles = (np.arange(count + 1) / count + shift) / (1 + shift) * np.pi / 2
        return np.clip(1 - np.cos(angles[1:]) ** 2 / np.cos(angles[:-1]) ** 2, 0, 0.999)
    return np.linspace(first, last, count) ** (0.5 if name == "sqrt" else 1)


@pytest.mark.parametrize("more", [{}, {"timesteps": 500}, {"cosine_s": 0.02}])
@pytest.mark.parametrize("name", ["linear", "sqrt_linear", "cosine", "sqrt"])
def test_a_configurations_beta_schedule(name, more, sd1, tmp_path):
    path = saved(sd1, tmp_path / "file.safetensors")
    params = {"linear_start": 0.001, "linear_end": 0.02, "beta_schedule": name, **more}
    pipe = ldmfast.load(path, config={"model": {"params": params}})
    wanted = released_betas(name, count=more.get("timesteps", 1000), shift=more.get("cosine_s", 8e-3))
    assert len(pipe.scheduler.betas) == len(wanted)
    assert np.allclose(pipe.scheduler.betas.numpy(), wanted, rtol=1e-4, atol=1e-8)


def test_what_else_a_configuration_says(sd1, tmp_path):
    path = saved(sd1, tmp_path / "file.safetensors")
    with pytest.raises(ValueError, match="beta_schedule: 'wavy', expected one of linear"):
        ldmfast.load(path, config={"beta_schedule": "wavy"})
    with pytest.raises(ValueError, match="parameterization: 'w', expected v, eps or x0"):
        ldmfast.load(path, config={"parameterization": "w"})
    half = ldmfast.load(path, config={"linear_start": 0.001}).scheduler.config
    assert (half.beta_start, half.beta_end) == (0.001, 0.02)
    scaling = {"target": "sgm.modules.diffusionmodules.denoiser_scaling.VScaling"}
    sgm = {"denoiser_config": {"target": "x.DiscreteDenoiser", "params": {"scaling_config": scaling}}}
    assert ldmfast.load(path, config=sgm).scheduler.config.prediction_type == "v_prediction"
    betas = torch.linspace(0.001, 0.02, 1000)
    own = ldmfast.load(saved(sd1 | {"betas": betas}, tmp_path / "own.safetensors")).scheduler.config
    assert own.beta_schedule == "linear" and own.trained_betas is None


@pytest.mark.parametrize("family", ["sd-v1", "sd-v2"])
def test_a_whole_original_configuration_that_names_no_prediction_means_epsilon(family, tmp_path):
    """v2-inference.yaml differs from v2-inference-v.yaml in `parameterization: "v"`, which it has not."""
    path = saved(small(family), tmp_path / "file.safetensors")
    line = {"linear_start": 0.00085, "linear_end": 0.012, "timesteps": 1000}
    pipe, guesses = said(path, config={"model": {"params": {**line, "unet_config": {}, "first_stage_config": {}}}})
    assert pipe.scheduler.config.prediction_type == "epsilon" and guesses == []


def test_a_configuration_goes_before_what_convert_wrote(sd1, tmp_path):
    convert(saved(sd1, tmp_path / "a.safetensors"), tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "b.safetensors")
    options = {"parameterization": "v", "beta_schedule": "cosine"}
    config = ldmfast.load(tmp_path / "b.safetensors", config=options).scheduler.config
    assert (config.prediction_type, config.beta_schedule) == ("v_prediction", "squaredcos_cap_v2")
    assert ldmfast.load(tmp_path / "b.safetensors").scheduler.config.prediction_type == "epsilon"
