"""What shapes do not say: the original configuration's settings, or else the family's.

Heads and the latents' scale of a released model; its noise schedule is in noise_schedule.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ldmfast.files import first_line
from ldmfast.released.families import DENOISERS, Denoiser, Structure


def read_config(config: dict | str | Path | None) -> dict:
    """model.params of an original configuration: a YAML file's path, its text or content, or {} for None.

    Raises ValueError for what is no YAML, FileNotFoundError for a path where nothing is.
    """
    if config is None:
        return {}
    found = config if isinstance(config, dict) else _read_yaml(config)
    found = found.get("model", found) if isinstance(found, dict) else None
    found = found.get("params", found) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise ValueError("config must be an original YAML file, with model: params:, or that as a dict")
    return found


def _read_yaml(config: str | Path) -> Any:
    text, name = str(config), f"config={config}"
    if isinstance(config, str) and ("\n" in config or not Path(config).exists() and ": " in config):
        name = "config"
    else:
        try:
            text = Path(config).read_text(encoding="utf-8")
        except (UnicodeDecodeError, IsADirectoryError) as error:
            raise ValueError(f"{name} is not YAML: {first_line(error)}") from error
    try:
        return yaml.load(text, Loader=_Yaml)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{name} is not YAML: {first_line(error)}") from error


class _Yaml(yaml.SafeLoader):
    """YAML's plain types, with the numbers of YAML 1.2: in 1.1, which PyYAML reads, 1e-4 is a string."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def number(settings: dict, name: str, default: float | None = None) -> float | None:
    """A number of the original configuration. Raises ValueError for anything else under its name."""
    value = settings.get(name, default)
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config says {name}: {value!r}, expected a number") from error


def unet_settings(settings: dict) -> dict:
    """The U-Net's: unet_config of the released code, network_config of the one for SDXL."""
    return inner(settings, "unet_config") or inner(settings, "network_config")


def inner(settings: dict, name: str) -> dict:
    """The params of a part that a configuration describes; {} where it does not."""
    found = settings.get(name)
    found = found.get("params", found) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


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
    return number(settings, "scale_factor", row.scale_factor if row else 1.0)
