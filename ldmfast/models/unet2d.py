"""`UNet2D`: diffusers' UNet2DModel with its own forward, over `ldmfast.ops`.

The denoiser of the latent diffusion models without cross-attention: unconditional ones, and those that are
conditioned by channels joined to the latent (a map, a masked picture, a low resolution).

    unet = UNet2D.from_pretrained("CompVis/ldm-celebahq-256", subfolder="unet")
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.unets.unet_2d import UNet2DOutput

from ldmfast.models.blocks import BlockInputs, down_block, mid_block, up_block
from ldmfast.models.drop_in import DropIn
from ldmfast.models.graph import Graphed, from_graph
from ldmfast.models.input_checks import STEPS, check_sample, check_values, timestep_tensor
from ldmfast.models.layers import activated_conv2d, channels_last, conv2d, in_layout_of, timestep_embedding
from ldmfast.ops.contract.stock_ops import in_fixed_order


class UNet2D(Graphed, DropIn, UNet2DModel):
    """A U-Net without cross-attention: (noisy latents, timestep) -> noise.

    Constructed, configured, loaded and saved as diffusers' UNet2DModel is. `attention_head_dim` may also be a list, the
    width of a head at each level: released models with 8 heads at every level have widths that differ, which
    UNet2DModel cannot say (it refuses such a folder). `explain()` says what does not go through ldmfast's own ops.
    Source: Rombach et al. 2022, section 4.1 and the released configurations.
    """

    stock = UNet2DModel

    @functools.wraps(UNet2DModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        widths = kwargs.get("attention_head_dim")
        several = isinstance(widths, (list, tuple))
        super().__init__(*args, **({**kwargs, "attention_head_dim": None} if several else kwargs))
        if several:
            self._set_head_widths(list(widths))

    def _set_head_widths(self, widths: list[int]) -> None:
        """Each level's attention with heads of its own width. Raises ValueError where they do not divide."""
        channels = self.config.block_out_channels
        if len(widths) != len(channels) or any(c % w for c, w in zip(channels, widths, strict=False)):
            raise ValueError(
                f"UNet2D: attention_head_dim={widths} must name a divisor of the channels of each level, "
                f"block_out_channels={tuple(channels)}"
            )
        levels = [*zip(self.down_blocks, widths, strict=True), (self.mid_block, widths[-1])]
        levels += zip(self.up_blocks, reversed(widths), strict=True)
        for block, width in levels:
            for m in block.modules() if block is not None else ():
                if isinstance(m, Attention):
                    m.heads = m.sliceable_head_dim = m.to_q.out_features // width
                    m.scale = width**-0.5
        self.register_to_config(attention_head_dim=widths)

    @in_fixed_order
    @from_graph(UNet2DOutput)
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple:
        """sample [N, C, H, W], timestep a number or [] or [N], class_labels [N] or None -> [N, C', H, W].

        Any H and W: where a size is odd, the way up takes its sizes from the way down.
        Raises ValueError naming the argument, what came and what was wanted.
        """
        if self.stock_reason():
            return super().forward(sample, timestep, class_labels, return_dict)
        check_sample(self, sample)
        t = self.times(timestep, sample)
        check_values(sample=sample, timestep=t, class_labels=class_labels)
        temb = self._time(t, sample, class_labels)
        cond = BlockInputs(temb=temb, temb_silu=F.silu(temb))

        # down, leaving a skip at every step
        x = 2 * sample - 1 if self.config.center_input_sample else sample
        x = conv2d(self.conv_in, channels_last(x))  # [N, C0, H, W]
        skips = (x,)
        for block in self.down_blocks:
            x, more = down_block(block, x, cond)
            skips += more

        if self.mid_block is not None:
            x = mid_block(self.mid_block, x, cond)

        # up, taking the skips from the last to the first
        for block in self.up_blocks:
            used, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            x = up_block(block, x, used, cond, size=skips[-1].shape[2:] if skips else None)

        x = activated_conv2d(self.conv_out, x, self.conv_norm_out, self.conv_act)
        if self.config.time_embedding_type == "fourier":
            x = x / t[:, None, None, None]
        x = in_layout_of(sample, x)
        return UNet2DOutput(sample=x) if return_dict else (x,)

    def times(self, timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
        """The timestep as the forward reads it: [N], on the sample's device."""
        t = timestep_tensor(timestep, sample, self._steps())
        return t if isinstance(timestep, torch.Tensor) else t.long()  # stock's UNet2DModel drops a number's fraction

    def _steps(self) -> float:
        """How many timesteps it was trained on, or as many as is usual; any number, where they are noise levels."""
        return math.inf if self.config.time_embedding_type == "fourier" else self.config.num_train_timesteps or STEPS

    def _time(self, t: torch.Tensor, sample: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """[N, E]: the timestep's embedding and the class's."""
        temb = timestep_embedding(self.time_proj, self.time_embedding, t, None, sample.dtype)
        if self.class_embedding is None:
            if labels is not None:
                raise ValueError("class_labels were given; this UNet2D has no class embedding")
            return temb
        if labels is None or labels.shape[0] != sample.shape[0]:
            got = "None" if labels is None else f"batch {labels.shape[0]}"
            raise ValueError(
                f"class_labels: this UNet2D is class-conditional and needs {sample.shape[0]} of them; got {got}"
            )
        if self.config.class_embed_type == "timestep":
            labels = self.time_proj(labels).to(sample.dtype)
        return temb + self.class_embedding(labels).to(temb.dtype)

    def stock_reason(self) -> str | None:
        if any(hasattr(block, "skip_conv") for block in (*self.down_blocks, *self.up_blocks)):
            return "its blocks hand the picture along beside the features"
        return super().stock_reason()

    @classmethod
    def from_unet(cls, unet: UNet2DModel) -> UNet2D:
        """The same network under our forward, sharing its parameters. Raises as `DropIn.adopt` does."""
        return cls.adopt(unet)
