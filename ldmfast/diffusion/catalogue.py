"""Which of our classes stands for which of diffusers': the one table of networks and schedulers.

It stands in diffusion/, the lowest room that sees both. A class of ours names its stock class itself (`stock`), takes
over a live one (`adopt`), and is saved under the stock class's name.
"""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from ldmfast.diffusion.ddim import DDIMScheduler
from ldmfast.diffusion.ddpm import DDPMScheduler
from ldmfast.diffusion.pndm import PNDMScheduler
from ldmfast.models.autoencoder import AutoencoderKL
from ldmfast.models.unet import UNet
from ldmfast.models.unet2d import UNet2D
from ldmfast.models.vq import VQModel

NETWORKS = {kind.stock.__name__: kind for kind in (UNet, UNet2D, AutoencoderKL, VQModel)}
SCHEDULERS = {kind.stock.__name__: kind for kind in (DDIMScheduler, DDPMScheduler, PNDMScheduler)}


def network(name: str | None) -> type:
    """Our class for the network that a config.json names. Raises ValueError for one that we have none for."""
    if name not in NETWORKS:
        raise ValueError(f"a {name} has no place in a latent diffusion model; expected one of {', '.join(NETWORKS)}")
    return NETWORKS[name]


def scheduler(name: str) -> type:
    """Our class for the scheduler of that name, else diffusers' own. Raises ValueError if there is neither."""
    kind = SCHEDULERS.get(name) or getattr(diffusers, name, None)
    if not isinstance(kind, type) or not issubclass(kind, diffusers.SchedulerMixin):
        raise ValueError(f"{name} is not a scheduler of diffusers'")
    return kind


def take_over(component: Any) -> nn.Module | diffusers.SchedulerMixin | None:
    """Ours in place of a live network or scheduler of exactly a stock class; None for anything else.

    The weights are shared, and the pictures stay as they were. Raises ValueError for a network whose forward is
    wrapped already.
    """
    name = type(component).__name__
    kind = NETWORKS.get(name) or SCHEDULERS.get(name)
    return kind.adopt(component) if kind is not None and type(component) is kind.stock else None


def is_ours(component: Any) -> bool:
    """Whether a component of a pipeline is a network or a scheduler of ours."""
    return isinstance(component, (*NETWORKS.values(), *SCHEDULERS.values()))
