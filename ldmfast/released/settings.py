"""What shapes do not say: the original configuration's settings, or else the family's.

Heads, the latents' scale and the noise schedule of a released model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ldmfast.files import first_line
from ldmfast.released.families import DENOISERS, Denoiser, Structure


def read_config(config: dict | str | Path | None) -> dict:
    """model.params of an original configuration: a YAML file's path, its content, or {} for None."""
    if config is None:
        return {}
    if not isinstance(config, dict):
        import yaml

        try:
            config = yaml.safe_load(Path(config).read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"config={config} is not YAML: {first_line(error)}") from error
    found = config.get("model", config) if isinstance(config, dict) else None
    found = found.get("params", found) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise ValueError("config must be an original YAML file, with model: params:, or that as a dict")
    return found


def unet_settings(settings: dict) -> dict:
    found = settings.get("unet_config", {})
    return found.get("params", found)


def heads_rule(structure: Structure, names: list[str], settings: dict) -> Callable[[int], int]:
    """channels -> heads, from the original configuration or the family. Raises ValueError where neither says."""
    given = unet_settings(settings)
    if (width := given.get("num_head_channels", -1)) != -1:
        return lambda channels: channels // width
    if (count := given.get("num_heads", -1)) != -1:
        return lambda channels: count
    rules = {(DENOISERS[name].heads, DENOISERS[name].width) for name in names}
    if len(rules) == 1:
        return DENOISERS[names[0]].heads_at
    channels = tuple(structure.ch * m for m in structure.mult)
    found = f"may be {' or '.join(names)}" if names else "is none of the released ones"
    raise ValueError(
        f"a U-Net of {structure.inputs} -> {structure.outputs} channels with levels {channels} and context "
        f"{structure.context} {found}, and its heads cannot be read from its shapes; give its original YAML as "
        "config=, or config={'unet_config': {'num_heads': N}} or {'num_head_channels': width}"
    )


def scale_factor(tensors: dict, settings: dict, row: Denoiser | None) -> float:
    """Of the latents: the original configuration's, the file's own, the family's."""
    if "scale_factor" not in settings and "scale_factor" in tensors:
        return float(tensors["scale_factor"])
    return settings.get("scale_factor", row.scale_factor if row else 1.0)


def schedule(tensors: dict, settings: dict, row: Denoiser | None) -> dict:
    """A DDIMScheduler as the released sampler steps. Betas: the original configuration's, the file's, the family's."""
    config = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": settings.get("timesteps", 1000),
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "prediction_type": {"v": "v_prediction", "eps": "epsilon"}.get(settings.get("parameterization"))
        or (row.prediction if row else "epsilon"),
    }
    if "linear_start" in settings:
        return {**config, "beta_start": settings["linear_start"], "beta_end": settings["linear_end"]}
    if "betas" not in tensors:
        if row is None:
            raise ValueError(
                "neither the file nor its family gives the noise schedule; give the original YAML as config="
            )
        return {**config, "beta_start": row.betas[0], "beta_end": row.betas[1]}
    betas = tensors["betas"].double()
    first, last = (float(f"{value:.6g}") for value in (betas[0], betas[-1]))
    line = torch.linspace(first**0.5, last**0.5, len(betas), dtype=torch.float64) ** 2
    config["num_train_timesteps"] = len(betas)
    if torch.allclose(line, betas, rtol=1e-5, atol=0):
        return {**config, "beta_start": first, "beta_end": last}
    return {**config, "beta_start": first, "beta_end": last, "trained_betas": tensors["betas"].tolist()}
