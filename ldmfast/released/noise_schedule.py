"""What a released model predicts, and its noise schedule: what the file says decides, then its family.

The prediction type, from the first of these that says it:
    1. the original configuration (config=): parameterization (v, eps, x0) or prediction_type; for SDXL the scaling;
       a whole one that has none of them means epsilon, the default of the released code
    2. what the file says of itself: modelspec.prediction_type, modelspec.predict_key, prediction_type, or
       an architecture modelspec.architecture that ends with -v
    3. the tensors that mark it: edm_vpred.sigma_max, v_pred
    4. the training step (global_step) of Stability's own files of Stable Diffusion 2
    5. the family, where all models of its build agree; else its usual one, which is a guess, and is said to be one

Zero terminal SNR (ztsnr): 1. the configuration's flag; 2. ss_zero_terminal_snr; 3. the tensor ztsnr.
Betas: 1. the configuration's beta_schedule, linear_start, linear_end, timesteps; 2. the file's own; 3. the family's.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ldmfast.released.families import Denoiser
from ldmfast.released.settings import inner, number

_PREDICTIONS = {
    "v_prediction": ("v", "v_prediction", "v-prediction", "vpred", "v_pred", "velocity"),
    "epsilon": ("eps", "epsilon"),
    "sample": ("x0", "sample"),
}
_SAYINGS = ("modelspec.prediction_type", "modelspec.predict_key", "prediction_type", "parameterization")
_STEPS = {875000: "epsilon", 220000: "epsilon", 110000: "v_prediction"}  # 2.0 base, 2.1 base, 2.1: as other readers
_ZERO_SNR = ("rescale_betas_zero_snr", "zero_terminal_snr", "use_ztsnr", "ztsnr", "zero_snr")
# the released code's names (make_beta_schedule) -> diffusers'; None: written out
_BETAS = {"linear": "scaled_linear", "sqrt_linear": "linear", "cosine": "squaredcos_cap_v2", "sqrt": None}
_BETAS |= {name: name for name in ("scaled_linear", "squaredcos_cap_v2")}
_START, _END = 1e-4, 2e-2  # the released code's, where a configuration has one of them alone
_COSINE_S = 8e-3
_LINE = {"linear_start", "linear_end", "beta_schedule"}
_WHOLE = {"unet_config", "first_stage_config", "linear_start"}  # what every original configuration before SDXL's has


def schedule(
    tensors: dict, settings: dict, row: Denoiser | None, said: dict[str, Any], known: dict | None = None
) -> tuple[dict, str | None]:
    """(a scheduler's configuration; a sentence if its prediction type is a guess), in the order at the head.

    said    what the file holds beside its tensors: a safetensors file's metadata, a pickle's numbers
    known   the scheduler_config.json that convert put into the file: only a configuration goes before it
    Raises ValueError where nothing gives the betas, or for a value that is none.
    """
    by_config, zero_snr = _by_config(settings), _flag(settings)
    if known is not None:
        changed = {"prediction_type": by_config} if by_config else {}
        changed |= _zero_terminal_snr() if zero_snr else {}
        changed |= _betas(tensors, settings, row) if _LINE & {*settings} else {}
        return {**known, **changed}, None
    prediction, guess = _prediction(by_config, tensors, row, said)
    if "edm_mean" in tensors:
        raise ValueError(
            "edm_mean marks a Playground 2.5 model, whose latents are normalised, which no pipeline here does; "
            "load it with diffusers' StableDiffusionXLPipeline.from_single_file"
        )
    if "edm_vpred.sigma_max" in tensors and by_config is None:
        return _edm(tensors), None
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": prediction,
        **_betas(tensors, settings, row),
    }
    marked = str(said.get("ss_zero_terminal_snr", "")).lower() == "true" or "ztsnr" in tensors
    return config | (_zero_terminal_snr() if (marked if zero_snr is None else zero_snr) else {}), guess


def _by_config(settings: dict) -> str | None:
    """The prediction type that an original configuration says. Raises ValueError for one that is none."""
    for name in ("parameterization", "prediction_type"):
        if settings.get(name) is not None:
            if found := _prediction_of(settings[name]):
                return found
            raise ValueError(f"config says {name}: {settings[name]!r}, expected v, eps or x0")
    scaling = inner(settings, "denoiser_config").get("scaling_config")
    target = str(scaling.get("target", "") if isinstance(scaling, dict) else "").rpartition(".")[2]
    if target:
        return {"VScaling": "v_prediction", "EpsScaling": "epsilon"}.get(target)
    return "epsilon" if _WHOLE <= {*settings} else None


def _prediction_of(value: Any) -> str | None:
    text = str(value).strip().lower()
    return next((name for name, words in _PREDICTIONS.items() if text in words), None)


def _flag(settings: dict) -> bool | None:
    """Whether a configuration says that the schedule ends in noise alone; None if it says neither."""
    return next((bool(settings[name]) for name in _ZERO_SNR if name in settings), None)


def _prediction(
    by_config: str | None, tensors: dict, row: Denoiser | None, said: dict[str, Any]
) -> tuple[str, str | None]:
    """(the prediction type, a sentence if it is a guess)"""
    found = by_config or next((p for name in _SAYINGS if (p := _prediction_of(said.get(name)))), None)
    if found is None and str(said.get("modelspec.architecture", "")).endswith("-v"):
        found = "v_prediction"
    if found is None and ("v_pred" in tensors or "edm_vpred.sigma_max" in tensors):
        found = "v_prediction"
    usual = row.prediction if row else "epsilon"
    if found is None and row is not None and row.both_predictions:
        found = _STEPS.get(_training_step(tensors, said)) if usual == "v_prediction" else None
        if found is None:
            return usual, (
                f"the prediction type, {usual}, is a guess: models of this build have either, and nothing "
                "in the file says which; config={'parameterization': 'v'} or {'parameterization': 'eps'} settles it "
                "(ldmfast convert --config 'parameterization: v')"
            )
    return found or usual, None


def _training_step(tensors: dict, said: dict[str, Any]) -> int | None:
    value = tensors.get("global_step", said.get("global_step"))
    if isinstance(value, torch.Tensor):
        return int(value) if value.numel() == 1 else None
    return int(value) if str(value).isdigit() else None


def _zero_terminal_snr() -> dict:
    # the last step, which alone has no signal, is left out by any other spacing (Lin et al. 2023, section 3.3)
    return {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def _edm(tensors: dict) -> dict:
    """CosXL's: any noise between two sigmas (Karras et al. 2022)."""
    sigmas = {name: tensors.get(f"edm_vpred.{name}") for name in ("sigma_min", "sigma_max")}
    given = {name: float(f"{float(value):.6g}") for name, value in sigmas.items() if value is not None}
    return {
        "_class_name": "EDMEulerScheduler",
        "sigma_min": 0.002,
        "sigma_data": 1.0,
        "sigma_schedule": "exponential",
        "prediction_type": "v_prediction",
        **given,
    }


def _betas(tensors: dict, settings: dict, row: Denoiser | None) -> dict:
    """beta_start, beta_end, beta_schedule, and what else they need."""
    discretization = inner(settings, "denoiser_config").get("discretization_config")
    settings = {**inner({"found": discretization}, "found"), **settings}
    name = settings.get("beta_schedule", "linear")
    if name not in _BETAS:
        raise ValueError(f"config says beta_schedule: {name!r}, expected one of {', '.join(_BETAS)}")
    steps = {} if "timesteps" not in settings else {"num_train_timesteps": int(number(settings, "timesteps"))}
    first, last = number(settings, "linear_start"), number(settings, "linear_end")
    if first is None and last is None and "beta_schedule" not in settings and "betas" in tensors:
        return _own_betas(tensors["betas"])
    if first is None and last is None:
        if row is None and name not in ("cosine", "squaredcos_cap_v2"):
            raise ValueError(
                "neither the file nor its family gives the noise schedule; give the original YAML as config="
            )
        first, last = row.betas if row else (_START, _END)
    first, last = _START if first is None else first, _END if last is None else last
    found = {**steps, "beta_schedule": _BETAS[name] or "linear", "beta_start": first, "beta_end": last}
    count = steps.get("num_train_timesteps", 1000)
    if name == "sqrt":
        found["trained_betas"] = (torch.linspace(first, last, count, dtype=torch.float64) ** 0.5).tolist()
    shift = number(settings, "cosine_s", _COSINE_S)
    if name == "cosine" and shift != _COSINE_S:
        found["trained_betas"] = _cosine_betas(count, shift)
    return found


def _cosine_betas(count: int, shift: float) -> list[float]:
    """Nichol & Dhariwal 2021 (arXiv 2102.09672), formula 17, its betas at most 0.999."""
    alphas = [math.cos((i / count + shift) / (1 + shift) * math.pi / 2) ** 2 for i in range(count + 1)]
    return [min(1 - after / before, 0.999) for before, after in zip(alphas[:-1], alphas[1:], strict=True)]


def _own_betas(betas: torch.Tensor) -> dict:
    """Those of the file, by the name of their line where they lie on one."""
    betas, written = betas.double(), betas.tolist()
    first, last = (float(f"{value:.6g}") for value in (betas[0], betas[-1]))
    found = {"num_train_timesteps": len(betas), "beta_start": first, "beta_end": last}
    lines = {
        "scaled_linear": torch.linspace(first**0.5, last**0.5, len(betas), dtype=torch.float64) ** 2,
        "linear": torch.linspace(first, last, len(betas), dtype=torch.float64),
    }
    for name, line in lines.items():
        if torch.allclose(line, betas, rtol=1e-5, atol=0):
            return {**found, "beta_schedule": name}
    return {**found, "beta_schedule": "scaled_linear", "trained_betas": written}
