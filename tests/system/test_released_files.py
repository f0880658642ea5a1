"""Released single files as tools have written them: read as data, by whatever names, with what the file says."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_load import small

import ldmfast
from ldmfast.released.conversion import convert
from ldmfast.released.noise_schedule import schedule
from ldmfast.released.parts import ema_name
from ldmfast.released.settings import read_config
from ldmfast.released.spellings import dotted
from ldmfast.released.weights import read_weights

UNET, STAGE = "model.diffusion_model.", "first_stage_model."


@pytest.fixture(scope="module")
def sd1():
    return small()


def saved(tensors, path, metadata=None):
    if path.suffix == ".safetensors":
        save_file({name: value.clone() for name, value in tensors.items()}, path, metadata)
    else:
        torch.save({"state_dict": tensors}, path)
    return path


def equal(got, wanted):
    return got.keys() == wanted.keys() and all(torch.equal(got[name], value) for name, value in wanted.items())


# --- pickles ----------------------------------------------------------------------------------------------------------


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def lightning(names=("pytorch_lightning", "callbacks", "model_checkpoint")):
    """A class of a package that is gone when its pickle is read."""
    modules = [".".join(names[: i + 1]) for i in range(len(names))]
    for module in modules:
        sys.modules[module] = types.ModuleType(module)
    kind = type("ModelCheckpoint", (dict,), {"__module__": modules[-1]})
    sys.modules[modules[-1]].ModelCheckpoint = kind
    return kind, modules


@pytest.fixture
def table():
    base = torch.randn(6, 4)
    shared = base[1:3].t()
    return collections.OrderedDict(
        {"a": base, "b": shared, "c": torch.arange(5), "d": torch.tensor(2.0), "e": torch.empty(0, 3).half()}
        | {"f": torch.nn.Parameter(torch.randn(3).bfloat16()), "g": torch.randn(2).to(torch.float8_e4m3fn)}
    )


WAYS = {
    "zip": {},
    "older": {"_use_new_zipfile_serialization": False},
    "protocol 4": {"pickle_protocol": 4},
    "older, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin", ".safetensors", ""])
def test_every_kind_of_torch_file_is_read_bit_by_bit(way, ending, table, tmp_path):
    if "older" in way:
        table.pop("g")  # a type that the older files have no name for
    path = tmp_path / f"file{ending}"
    torch.save({"state_dict": table, "global_step": 7}, path, **WAYS[way])
    got, others = read_weights(path)
    assert got.keys() == table.keys() and others["global_step"] == 7
    for name, value in table.items():
        assert got[name].dtype == value.dtype and got[name].stride() == value.stride()
        assert torch.equal(got[name].float(), value.detach().float()), name


def test_a_plain_pickle_and_a_whole_module_are_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm2d(2))
    wanted = {name: value.clone() for name, value in module.state_dict().items()}
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(dict(module.state_dict())))
    torch.save(module, tmp_path / "module.pt")
    for name in ("plain.pkl", "module.pt"):
        assert equal(read_weights(tmp_path / name)[0], wanted)


def test_classes_and_numpy_numbers_beside_the_weights_are_left_where_they_are(tmp_path, table):
    kind, modules = lightning()
    beside = {"callbacks": {kind: {"best": np.float64(0.5)}, "x": kind(monitor="val/loss")}, "lr": np.float32(1e-4)}
    beside |= {"array": np.arange(3), "when": collections.Counter("ab"), "sizes": {torch.Size([1]), (2, 3)}}
    beside |= {"runs": Runs(str(tmp_path / "made")), "global_step": np.int64(5), "dtype": torch.float16}
    table.pop("g")
    for way in WAYS:
        torch.save({**beside, "state_dict": table}, tmp_path / "file.ckpt", **WAYS[way])
        present = {module: sys.modules.pop(module) for module in modules}
        assert read_weights(tmp_path / "file.ckpt")[0].keys() == table.keys()
        assert not set(modules) & set(sys.modules)
        sys.modules.update(present)
    for module in modules:
        del sys.modules[module]
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("place", [(), ("model",), ("state_dict", "model"), ("a", "b", "module"), ("state_dict",)])
def test_the_table_is_found_where_it_is(place, tmp_path):
    table = {"x": torch.ones(2), "y": torch.zeros(3)}
    ema, content = {"x": torch.zeros(2), "y": torch.zeros(3)}, table
    for name in reversed(place):
        content = {name: content}
    if place:
        content = {
            "model_ema": ema,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
            **content,
            "z": torch.ones(1),
        }
    torch.save(content, tmp_path / "file.pt")
    assert equal(read_weights(tmp_path / "file.pt")[0], table)


def damage(path, kind):
    """What the sentence about the damaged file must say."""
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
        return "is empty; download it again"
    if kind == "half":
        path.write_bytes(content[: len(content) // 2])
        return "download it again"
    if kind == "short storage":  # a length that the file does not have
        path.write_bytes(content.replace(b"K\x06K\x04\x86", b"K\x06K\xff\x86", 1))
        return "a is damaged|Bad CRC-32"
    path.write_bytes({"text": b"not a model", "stack": b"\x80\x02R.", "page": b"<html>"}[kind])
    return {"text": "begins with", "stack": "truncated or damaged", "page": "failed download"}[kind]


@pytest.mark.parametrize("kind", ["empty", "half", "short storage", "text", "stack", "page"])
@pytest.mark.parametrize("way", ["zip", "older"])
def test_a_damaged_file_is_refused_in_one_sentence(kind, way, tmp_path):
    path = tmp_path / "file.ckpt"
    torch.save({"a": torch.zeros(6, 4)}, path, **WAYS[way])
    message = damage(path, kind)
    with pytest.raises(ValueError, match=message) as error:
        read_weights(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_call_that_makes_much_of_little_is_refused(tmp_path):
    """A stride of zero: a tensor of more elements than the file has."""
    torch.save({"a": torch.zeros(1).expand(1000)}, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match="it needs 1000 elements of a storage of 1"):
        read_weights(tmp_path / "file.ckpt")
    deep = b"\x80\x02" + b"}q\x00" + b"".join(b"}(U\x01ah\x00U\x01bh\x00u0" for _ in range(50)) + b"."
    (tmp_path / "deep.ckpt").write_bytes(deep + struct.pack("<q", 0))
    with pytest.raises(ValueError, match="no table of tensors"):
        read_weights(tmp_path / "deep.ckpt")


# --- names ------------------------------------------------------------------------------------------------------------


def clip_bare(name):
    return name.replace("transformer.text_model.", "transformer.")


def wrapped(*segments):
    """Something in a name, and what stands there in the tool's."""
    return lambda name: name.replace(*segments) if segments[0] else segments[1] + name


SPELLINGS = {
    "CLIP without text_model.": clip_bare,
    "DDP": wrapped("", "module."),
    "torch.compile of all": wrapped("", "_orig_mod."),
    "torch.compile of the U-Net": wrapped(UNET, UNET + "_orig_mod."),
    "DDP of the U-Net": wrapped("model.diffusion_model.", "model.diffusion_model.module."),
    "both": wrapped("", "module._orig_mod."),
    "inside of another model": wrapped("", "ldm.inner."),
    "all of it": lambda name: "module.net._orig_mod." + clip_bare(name),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_names_as_tools_leave_them(spelling, sd1, tmp_path):
    path = saved({SPELLINGS[spelling](name): value for name, value in sd1.items()}, tmp_path / "file.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = ldmfast.load(path, config={"parameterization": "eps"})
    assert torch.equal(pipe.unet.conv_in.weight, sd1[UNET + "input_blocks.0.0.weight"])
    assert torch.equal(pipe.vae.encoder.conv_in.weight, sd1[STAGE + "encoder.conv_in.weight"])
    report = convert(path, tmp_path / "folder")
    assert any(line.split()[1:3] == ["names", "read"] for line in report)


@pytest.mark.parametrize("prefix", [STAGE, "vae.", "module.first_stage_model.", "autoencoder.model."])
def test_a_first_stage_with_its_prefix(prefix, sd1, tmp_path):
    stage = {name.removeprefix(STAGE): value for name, value in sd1.items() if name.startswith(STAGE)}
    vae = ldmfast.load(saved({prefix + name: value for name, value in stage.items()}, tmp_path / "vae.safetensors"))
    assert type(vae) is ldmfast.AutoencoderKL
    assert torch.equal(vae.decoder.conv_out.weight, stage["decoder.conv_out.weight"])


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "unet."])
def test_a_denoiser_under_another_prefix(prefix, sd1, tmp_path):
    own = {prefix + name.removeprefix(UNET): value for name, value in sd1.items() if name.startswith(UNET)}
    stage = {name: value for name, value in sd1.items() if name.startswith(STAGE)}
    pipe = ldmfast.load(
        saved(own, tmp_path / "unet.pt"),
        autoencoder=saved(stage, tmp_path / "vae.pt"),
        conditioner=ldmfast.load(saved(sd1, tmp_path / "whole.pt")).conditioner,
    )
    assert torch.equal(pipe.unet.conv_out.bias, sd1[UNET + "out.2.bias"])


def test_averaged_weights_alone(sd1, tmp_path):
    plain = [name for name in sd1 if name.startswith(UNET)]
    assert all(dotted(ema_name(name)) == name for name in plain)
    assert dotted("model_ema.decay") is None and dotted("model_ema.diffusion_modelmystery") is None
    tensors = {ema_name(name) if name.startswith(UNET) else name: value for name, value in sd1.items()}
    path = saved(tensors | {"model_ema.num_updates": torch.tensor(3)}, tmp_path / "ema.safetensors")
    unet = ldmfast.load(path, ema=True).unet
    assert torch.equal(unet.conv_out.bias, sd1[UNET + "out.2.bias"])
    with pytest.raises(ValueError, match="averaged weights of a denoiser alone.*ema=True"):
        ldmfast.load(path)


def test_averaged_names_of_every_released_build():
    import test_load

    for unet, *_ in test_load.FULL.values():
        assert all(dotted(ema_name(UNET + name)) == UNET + name for name in unet)


def test_safetensors_under_another_ending(sd1, tmp_path):
    path = saved(sd1, tmp_path / "file.safetensors")
    for ending in (".ckpt", ".pt", ""):
        other = path.rename(tmp_path / f"other{ending}")
        assert equal(read_weights(other)[0], sd1)
        path = other


# --- settings ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("case", MARKS)
def test_what_the_file_says_decides_what_it_predicts(case, tmp_path):
    family, metadata, beside, wanted = MARKS[case]
    beside = {name: torch.tensor(value or 0) for name, value in beside.items()}
    path = saved(small(family) | beside, tmp_path / "file.safetensors", metadata or None)
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
