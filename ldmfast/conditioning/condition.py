"""`Condition`: what pictures are conditioned on, as tensors, and how a U-Net is called with it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Condition:
    """What N pictures are conditioned on; any part may be None.

    context       [N, S, E]     keys and values of cross-attention
    context_mask  [N, S] bool   False where a token is padding
    concat        [N, c, h, w]  joined to the latent along channels; [N, c, 1, 1] is spread over it
    label         [N] int64 or [N, E]   passed as class_labels ("adm")
    text_embeds   [N, P]        a pooled text state, and
    time_ids      [N, 6]        the picture's sizes, both passed as added_cond_kwargs (SDXL)
    """

    context: torch.Tensor | None = None
    context_mask: torch.Tensor | None = None
    concat: torch.Tensor | None = None
    label: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def parts(self) -> dict[str, torch.Tensor]:
        """{name: tensor} of the parts that are there."""
        return {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) is not None}

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move; `dtype` applies to the floating parts."""
        moved = {k: v.to(device, dtype if v.is_floating_point() else None) for k, v in self.parts().items()}
        return Condition(**moved)

    def __len__(self) -> int:
        """N, or 0 for a condition without parts."""
        return next((len(v) for v in self.parts().values()), 0)

    def __getitem__(self, index: slice | list[int] | torch.Tensor) -> Condition:
        """The condition of the pictures that `index` (slice, list or tensor) selects."""
        return Condition(**{k: v[index] for k, v in self.parts().items()})

    @staticmethod
    def cat(conditions: Iterable[Condition]) -> Condition:
        """One condition for all the pictures of several. Raises ValueError if they do not have the same parts.

        Contexts of different lengths are filled with zeros, which the mask leaves out.
        """
        conditions = _of_one_length(list(conditions))
        kinds = {tuple(c.parts()) for c in conditions}
        if len(kinds) != 1:
            raise ValueError(f"Condition.cat: the conditions have different parts: {sorted(kinds)}")
        return Condition(**{name: _join([getattr(c, name) for c in conditions]) for name in kinds.pop()})

    def dropped(self, drop: torch.Tensor, empty: Condition) -> Condition:
        """This condition with `empty` (of N, or of 1) where `drop` [N] bool is true: guidance dropout."""

        def choose(value, unconditional):
            value, unconditional = _same_size([value, unconditional.to(value.device, value.dtype)])
            return torch.where(drop.to(value.device).view(-1, *[1] * (value.ndim - 1)), unconditional, value)

        other = empty.parts()
        return Condition(**{name: choose(value, other[name]) for name, value in self.parts().items()})

    def predict(self, unet: nn.Module, x: torch.Tensor, t: torch.Tensor | float) -> torch.Tensor:
        """The U-Net's output for the latents x [N, z, h, w] at the times t (a number, [] or [N]).

        unet  UNet or UNet2D, or diffusers' UNet2DConditionModel or UNet2DModel
        """
        if self.concat is not None:
            hint = self.concat.to(x.device, x.dtype)
            x = torch.cat([x, hint.expand(-1, -1, *x.shape[2:]) if hint.shape[2:] == (1, 1) else hint], dim=1)
        if not hasattr(unet.config, "cross_attention_dim"):  # UNet2DModel takes nothing but a label
            return unet(x, t, class_labels=self.label).sample
        more = {} if self.context_mask is None else {"encoder_attention_mask": self.context_mask}
        if self.text_embeds is not None:
            added = {"text_embeds": self.text_embeds, "time_ids": self.time_ids}
            more["added_cond_kwargs"] = {k: v.to(x.device, x.dtype) for k, v in added.items() if v is not None}
        context = None if self.context is None else self.context.to(x.device, x.dtype)
        return unet(x, t, encoder_hidden_states=context, class_labels=self.label, **more).sample


def side_by_side(conditions: Iterable[Condition]) -> Condition:
    """One condition from those that several conditioners give for the same pictures.

    Contexts are joined along the tokens, concats along the channels. Raises ValueError for two labels.
    """
    by_name = {f.name: [] for f in dataclasses.fields(Condition)}
    for condition in conditions:
        for name, value in condition.parts().items():
            by_name[name].append(value)
    if len(by_name["label"]) > 1 or (by_name["context_mask"] and len(by_name["context"]) > 1):
        raise ValueError("Hybrid: only one of the conditioners may give a label, or a context with a mask")
    return Condition(**{name: _join(values, dim=1) for name, values in by_name.items() if values})


def padded(contexts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(context [N, S, E], mask [N, S]) of N contexts [S_i, E], filled with zeros; no mask if all are of one length."""
    lengths = [len(context) for context in contexts]
    if len(set(lengths)) == 1:
        return torch.stack(contexts), None
    places = torch.arange(max(lengths), device=contexts[0].device)
    mask = places < torch.tensor(lengths, device=places.device)[:, None]
    return nn.utils.rnn.pad_sequence(contexts, batch_first=True), mask


def _of_one_length(conditions: list[Condition]) -> list[Condition]:
    if any(c.context is None for c in conditions):
        return conditions
    lengths = [c.context.shape[1] for c in conditions]
    if len(set(lengths)) == 1 and len({c.context_mask is None for c in conditions}) == 1:
        return conditions
    made = []
    for condition, length in zip(conditions, lengths, strict=True):
        context, mask, more = condition.context, condition.context_mask, max(lengths) - length
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device) if mask is None else mask
        pads = nn.functional.pad(context, (0, 0, 0, more)), nn.functional.pad(mask, (0, more))
        made.append(dataclasses.replace(condition, context=pads[0], context_mask=pads[1]))
    return made


def _join(tensors, dim=0):
    return torch.cat(_same_size(tensors), dim=dim) if len(tensors) > 1 else tensors[0]


def _same_size(tensors):
    """Tensors of which some are [N, c, 1, 1], spread to the height and width of the others."""
    if tensors[0].ndim != 4:
        return tensors
    side = max(tuple(t.shape[2:]) for t in tensors)
    return [t.expand(-1, -1, *side) if t.shape[2:] == (1, 1) else t for t in tensors]
