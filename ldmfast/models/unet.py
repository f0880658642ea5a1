"""`UNet`: diffusers' UNet2DConditionModel with its own forward, over `ldmfast.ops`.

Parameters, keys, configuration, saved files, LoRA, hooks and isinstance checks are diffusers'. Only the way through
the network is ours (blocks.py), and whatever was attached to a part of it is still called (guard.py).

    unet = UNet.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5", subfolder="unet")
    pipe.unet = UNet.from_unet(pipe.unet)       # or: the parameters of a live one, shared
    print(*unet.explain(), sep="\n")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.loaders.unet_loader_utils import _maybe_expand_lora_scales
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.utils import apply_lora_scale

from ldmfast.models.blocks import BlockInputs, down_block, has_cross_attention, mid_block, up_block
from ldmfast.models.checks.head_counts import warn_of_heads
from ldmfast.models.checks.residuals import add_residual, add_residuals, check_residuals
from ldmfast.models.drop_in import DropIn
from ldmfast.models.graph import Graphed, from_graph
from ldmfast.models.input_checks import STEPS, check_inputs, check_values, timestep_tensor
from ldmfast.models.layers import activated_conv2d, channels_last, conv2d, in_layout_of, timestep_embedding
from ldmfast.models.missing_weights import SingleFile
from ldmfast.ops.contract.stock_ops import in_fixed_order


class UNet(SingleFile, Graphed, DropIn, UNet2DConditionModel):
    """A conditional U-Net: (noisy latents, timestep, prompt) -> noise.

    Constructed, configured, loaded and saved as diffusers' UNet2DConditionModel is; a folder that it saved is one
    that diffusers loads. `explain()` says what does not go through ldmfast's own ops, and why.
    Source: Rombach et al. 2022, section 3.
    """

    stock = UNet2DConditionModel

    @in_fixed_order
    @apply_lora_scale("cross_attention_kwargs")
    @from_graph(UNet2DConditionOutput)
    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        timestep_cond: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, torch.Tensor] | None = None,
        down_block_additional_residuals: tuple[torch.Tensor] | None = None,
        mid_block_additional_residual: torch.Tensor | None = None,
        down_intrablock_additional_residuals: tuple[torch.Tensor] | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple:
        """sample [N, C, H, W], timestep a number or [] or [N], encoder_hidden_states [N, S, width] -> [N, C', H, W].

        The other arguments are UNet2DConditionModel.forward's, with its meaning.
        Raises ValueError naming the argument, what came and what was wanted.
        """
        extras = (down_block_additional_residuals, mid_block_additional_residual, down_intrablock_additional_residuals)
        masks = {"attention_mask": attention_mask, "encoder_attention_mask": encoder_attention_mask}
        patched = self.patched()
        if not patched:  # else it is for the patch to say what it takes
            check_inputs(self, sample, encoder_hidden_states, class_labels, added_cond_kwargs, masks)
            check_residuals(self, sample, *extras)
            check_values(timestep=timestep, timestep_cond=timestep_cond)
        if patched or self._stock_arguments(cross_attention_kwargs, *extras):
            return super().forward(
                sample,
                timestep,
                encoder_hidden_states,
                class_labels,
                timestep_cond,
                attention_mask,
                cross_attention_kwargs,
                added_cond_kwargs,
                *extras,
                encoder_attention_mask,
                return_dict,
            )

        # the time, and what is added to it
        x = 2 * sample - 1 if self.config.center_input_sample else sample
        temb = self._time(x, timestep, timestep_cond, class_labels)  # [N, E]
        temb, x = self._added(temb, x, encoder_hidden_states, added_cond_kwargs)
        cond = BlockInputs(
            temb=temb,
            temb_silu=F.silu(temb),
            context=self.process_encoder_hidden_states(encoder_hidden_states, added_cond_kwargs),
            self_mask=_bias(attention_mask, sample.dtype),
            context_mask=_bias(encoder_attention_mask, sample.dtype),
        )

        # down, leaving a skip at every step
        x = conv2d(self.conv_in, channels_last(x))  # [N, C0, H, W]
        adapters = down_intrablock_additional_residuals
        adapters = list(adapters) if isinstance(adapters, tuple) else adapters
        x, skips = self._down(x, cond, adapters)
        if down_block_additional_residuals is not None:  # ControlNet's
            skips = add_residuals(skips, down_block_additional_residuals)

        # mid, at the lowest level's size
        if self.mid_block is not None:
            x = mid_block(self.mid_block, x, cond)
        x = self._after_mid(x, mid_block_additional_residual, adapters)

        # up, taking the skips from the last to the first; odd sizes do not double back, so the next skip's is passed
        for block in self.up_blocks:
            used, skips = skips[-len(block.resnets) :], skips[: -len(block.resnets)]
            x = up_block(block, x, used, cond, size=skips[-1].shape[2:] if skips else None)

        # out, in the layout that came in
        x = activated_conv2d(self.conv_out, x, self.conv_norm_out, self.conv_act)  # [N, C', H, W]
        x = in_layout_of(sample, x)
        return UNet2DConditionOutput(sample=x) if return_dict else (x,)

    def _time(self, sample, timestep, timestep_cond, class_labels) -> torch.Tensor:
        """[N, E]: the timestep's embedding and the class's."""
        if "get_time_embed" in self.replaced_methods():
            temb = self.time_embedding(self.get_time_embed(sample=sample, timestep=timestep), timestep_cond)
        else:
            t = self.times(timestep, sample)
            temb = timestep_embedding(self.time_proj, self.time_embedding, t, timestep_cond, sample.dtype)
        label = self.get_class_embed(sample=sample, class_labels=class_labels)
        if label is None:
            return temb
        return torch.cat([temb, label], dim=-1) if self.config.class_embeddings_concat else temb + label

    def times(self, timestep: torch.Tensor | float | int, sample: torch.Tensor) -> torch.Tensor:
        """The timestep as the forward reads it: [N], on the sample's device."""
        return timestep_tensor(timestep, sample, math.inf if self.config.time_embedding_type == "fourier" else STEPS)

    def _added(self, temb, x, context, added) -> tuple[torch.Tensor, torch.Tensor]:
        """(temb with the additional embeddings, such as SDXL's; the sample x as conv_in takes it)"""
        more = self.get_aug_embed(emb=temb, encoder_hidden_states=context, added_cond_kwargs=added)
        if self.config.addition_embed_type == "image_hint":
            more, hint = more
            x = torch.cat([x, hint], dim=1)
        temb = temb if more is None else temb + more
        return temb if self.time_embed_act is None else self.time_embed_act(temb), x

    def _down(self, x, cond: BlockInputs, adapters: list | None) -> tuple[torch.Tensor, tuple]:
        """(x, the skips). T2I-Adapter's residuals are popped as they are used, as the parent does."""
        skips = (x,)
        for block in self.down_blocks:
            residual = adapters.pop(0) if adapters else None
            crosses = has_cross_attention(block)
            x, more = down_block(block, x, cond, residual if crosses else None)
            if residual is not None and not crosses:
                x = add_residual("down_intrablock_additional_residuals", x, residual)
                more = (*more[:-1], x)  # the parent adds in place, so the last skip has it too
            skips += more
        return x, skips

    def _after_mid(self, x, control, adapters: list | None) -> torch.Tensor:
        """x with T2I-Adapter-XL's last residual, then ControlNet's."""
        if adapters and self.mid_block is not None and x.shape == adapters[0].shape:
            x = x + adapters.pop(0)
        return x if control is None else add_residual("mid_block_additional_residual", x, control)

    def stock_reason(
        self,
        cross_attention_kwargs: dict[str, Any] | None = None,
        controls: Sequence[torch.Tensor] | None = None,
        mid_control: torch.Tensor | None = None,
        adapters: Sequence[torch.Tensor] | None = None,
    ) -> str | None:
        return self.patched() or self._stock_arguments(cross_attention_kwargs, controls, mid_control, adapters)

    def _stock_arguments(self, cross_attention_kwargs, controls, mid_control, adapters) -> str | None:
        if cross_attention_kwargs and (names := sorted(set(cross_attention_kwargs) - {"scale"})):
            return f"cross_attention_kwargs has {', '.join(names)}"
        if (controls is None) != (mid_control is None):
            return "only one of ControlNet's two residual arguments was given"
        if controls is not None and adapters is not None:
            return "ControlNet's and T2I-Adapter's residuals came together"
        return None

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict: str | dict | None = None, **kwargs: Any) -> UNet:
        """As diffusers' from_single_file. Warns of heads that are not those of the family whose shapes the file has."""
        model = super().from_single_file(pretrained_model_link_or_path_or_dict, **kwargs)
        named = isinstance(pretrained_model_link_or_path_or_dict, str)
        warn_of_heads(model, pretrained_model_link_or_path_or_dict if named else "this file")
        return model

    def set_adapters(self, adapter_names: list[str] | str, weights: Any = None) -> None:
        """As the parent's, which knows by the class's name that scales by block ({"down": 0.3, ...}) are a U-Net's."""
        given = weights if isinstance(weights, list) else [weights]
        expanded = _maybe_expand_lora_scales(self, [1.0 if weight is None else weight for weight in given])
        super().set_adapters(adapter_names, expanded if isinstance(weights, list) else expanded[0])

    @classmethod
    def from_unet(cls, unet: UNet2DConditionModel) -> UNet:
        """The same network under our forward, sharing its parameters. Raises as `DropIn.adopt` does."""
        return cls.adopt(unet)


def _bias(mask: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask [N, S] of ones (attend) and zeros as [N, 1, S], added to the scores."""
    return None if mask is None else ((1 - mask.to(dtype)) * -10000.0)[:, None]
