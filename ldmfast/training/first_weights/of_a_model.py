"""A denoiser that begins with the weights of a finished one."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ldmfast.shipped import locate


def begin_with(unet: nn.Module, model: str | Path) -> list[str]:
    """Give `unet` the weights of a finished pipeline's U-Net that it has under the same name and in the same shape.

    model  a folder or a shipped model's name
    Returns the names that keep their random first weights. Raises ValueError if nothing agrees.
    """
    found = type(unet).from_pretrained(locate(model), subfolder="unet").state_dict()
    own = unet.state_dict()
    same = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    if not same:
        raise ValueError(f"first_weights={model}: none of its {len(found)} weights has a name and shape of this U-Net")
    unet.load_state_dict(same, strict=False)
    return sorted(set(own) - set(same))
