"""Stable Diffusion XL's two text towers as one conditioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.condition import Condition
from ldmfast.conditioning.text import load_tokenizer, too_long


class TwoTextEncoders(Conditioner):
    """Captions to the last but one states of two CLIP towers side by side, and the second's projected pooled state.

    models, tokenizers  two of each; the second model is a CLIPTextModelWithProjection
    zeros               whether the empty caption is all zeros, as SDXL base was trained; else it is encoded
    width               channels of both towers' states together (2048 for SDXL)
    name                the diffusers folder that `from_pretrained` reads; saved in place of the weights
    Source: Podell et al. 2023 (arXiv 2307.01952), section 2.1.
    """

    mode = "crossattn"

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        tokenizers: Sequence[Callable[..., Any]],
        *,
        name: str,
        zeros: bool = True,
    ) -> None:
        super().__init__(name=name, zeros=zeros)
        self.models = torch.nn.ModuleList(models).eval().requires_grad_(False)
        self.tokenizers, self.zeros = list(tokenizers), zeros
        self.width = sum(model.config.hidden_size for model in models)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, zeros: bool = True) -> TwoTextEncoders:
        """From a folder with text_encoder/, text_encoder_2/, tokenizer/ and tokenizer_2/. Raises FileNotFoundError."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        parts = [Path(name, part) for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")]
        if missing := [part.name for part in parts if not part.is_dir()]:
            raise FileNotFoundError(f"{name} has no {', '.join(missing)}: the two text encoders of SDXL")
        kinds = zip((CLIPTextModel, CLIPTextModelWithProjection), parts[:2], strict=True)
        models = [kind.from_pretrained(part, local_files_only=True) for kind, part in kinds]
        return cls(models, [load_tokenizer(p) for p in parts[2:]], name=str(name), zeros=zeros)

    @classmethod
    def from_settings(cls, settings: dict) -> TwoTextEncoders:
        return cls.from_pretrained(**settings)

    def own_weights(self) -> dict[str, torch.Tensor]:
        return {}

    def train(self, mode: bool = True) -> TwoTextEncoders:
        """It stays in eval mode: it is frozen."""
        return super().train(False)

    def truncated_captions(self, inputs: list) -> list[tuple[str, int]]:
        most = min(model.config.max_position_embeddings for model in self.models)
        return too_long(self.tokenizers[0], inputs, most)

    @torch.no_grad()
    def forward(self, inputs: list) -> Condition:
        """Captions -> Condition with context [N, L, width] and text_embeds [N, P]."""
        wrong = next((c for c in inputs if not isinstance(c, str)), None)
        if wrong is not None:
            raise ValueError(f"TwoTextEncoders: a caption must be a string; got {wrong!r:.80}")
        states = []
        for model, tokenizer in zip(self.models, self.tokenizers, strict=True):
            ids = tokenizer(
                list(inputs),
                padding="max_length",
                max_length=model.config.max_position_embeddings,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            out = model(ids.to(self.device), output_hidden_states=True)
            states.append(out.hidden_states[-2])
        return Condition(context=torch.cat(states, dim=-1), text_embeds=out.text_embeds)

    def empty(self, n: int) -> Condition:
        found = self([""]).parts()
        if self.zeros:
            found = {name: torch.zeros_like(value) for name, value in found.items()}
        return Condition(**{name: value.expand(n, *value.shape[1:]) for name, value in found.items()})
