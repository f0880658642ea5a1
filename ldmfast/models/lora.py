"""LoRA files in diffusers' format: put on a U-Net, written from one.

Source: Hu et al. 2021 (arXiv 2106.09685); the layers are peft's.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

from ldmfast.files import first_line, replacing

NAME = "pytorch_lora_weights.safetensors"  # what diffusers' load_lora_weights looks for in a folder


def load_lora(unet: nn.Module, *files: str | Path | tuple[str | Path, float]) -> None:
    """Add LoRAs to `unet`, each a path or (path, scale); a scale of 0 leaves the network as it was.

    path  a file, or a folder that holds NAME
    Raises FileNotFoundError; ValueError for a file that is no LoRA of a U-Net of this shape; ImportError without peft.
    """
    _peft()
    files = [(file, 1.0) if isinstance(file, str | Path) else file for file in files]
    names = [f"lora{i}" for i in range(len(files))]
    for name, (file, _) in zip(names, files, strict=True):
        path = _checked(Path(file))
        try:
            unet.load_lora_adapter(path.parent, weight_name=path.name, prefix="unet", adapter_name=name)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{path} does not fit this U-Net: {first_line(error)}") from error
    if names:
        unet.set_adapters(names, [scale for _, scale in files])


def _checked(path):
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no LoRA file")
    try:
        with safe_open(path, "pt") as file:
            keys = list(file.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if not any(key.startswith("unet.") and "lora" in key for key in keys):
        raise ValueError(f"{path} holds no LoRA of a U-Net: its first key is {next(iter(keys), 'missing')!r:.60}")
    return path


def add_lora(unet: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Freeze `unet` and add an untrained LoRA to the layers whose names end in one of `targets`.

    Raises ValueError for a target that no layer is named by: peft asks only that one of them is.
    """
    _peft()
    from peft import LoraConfig

    targets = [target.strip() for target in targets]
    layers = ["." + name for name, _ in unet.named_modules()]
    if absent := [target for target in targets if not any(layer.endswith("." + target) for layer in layers)]:
        raise ValueError(f"targets: no layer of this U-Net has a name that ends in {absent[0]!r}")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets))


def save_lora(unet: nn.Module, folder: str | Path) -> Path:
    """Write the LoRA that `add_lora` added to folder/NAME, complete or not at all. Returns its path."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    layers = {name: value.detach().cpu().contiguous() for name, value in layers.items()}
    with replacing(Path(folder, NAME)) as partial:
        StableDiffusionPipeline.save_lora_weights(
            folder,
            unet_lora_layers=layers,
            weight_name=partial.name,
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        )
    return Path(folder, NAME)


def _peft():
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(f"LoRA needs the package peft ({error}): pip install peft") from error
