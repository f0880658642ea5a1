"""LoRA on a U-Net: untrained layers to train, and the file that they are saved to. pipeline/load_lora.py loads files.

Source: Hu et al. 2021 (arXiv 2106.09685); the layers are peft's.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ldmfast.files import replacing

NAME = "pytorch_lora_weights.safetensors"  # what diffusers' load_lora_weights looks for in a folder


def add_lora(unet: nn.Module, rank: int, alpha: float, targets: list[str]) -> None:
    """Freeze `unet` and add an untrained LoRA to the layers whose names end in one of `targets`.

    Raises ValueError for a target that no layer is named by: peft asks only that one of them is.
    """
    require_peft()
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
            partial.parent,
            unet_lora_layers=layers,
            weight_name=partial.name,
            unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
        )
    return Path(folder, NAME)


def require_peft() -> None:
    """Raises ImportError, saying what to install, where peft is not."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ImportError(f"LoRA needs the package peft ({error}): pip install peft") from error
