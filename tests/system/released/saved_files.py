"""Released single files written for a test."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

UNET, STAGE = "model.diffusion_model.", "first_stage_model."


def saved(tensors, path, metadata=None):
    if path.suffix == ".safetensors":
        save_file({name: value.clone() for name, value in tensors.items()}, path, metadata)
    else:
        torch.save({"state_dict": tensors}, path)
    return path


def equal(got, wanted):
    return got.keys() == wanted.keys() and all(torch.equal(got[name], value) for name, value in wanted.items())
