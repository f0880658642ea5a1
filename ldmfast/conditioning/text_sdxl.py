"""Stable Diffusion XL's two text towers as one conditioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldmfast.conditioning import text_clip
from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.condition import Condition
from ldmfast.conditioning.text import load_tokenizer

if TYPE_CHECKING:
    from ldmfast.conditioning.text_weights import PromptReading


class TwoTextEncoders(Conditioner):
    """Captions to the last but one states of two CLIP towers side by side, and the second's projected pooled state.

    models, tokenizers  two of each; the second model is a CLIPTextModelWithProjection
    zeros               whether the empty caption is all zeros, as SDXL base was trained; else it is encoded
    width               channels of both towers' states together (2048 for SDXL)
    name                the diffusers folder that `from_pretrained` reads; saved in place of the weights
    Source: Podell et al. 2023 (arXiv 2307.01952), section 2.1.
    """

    mode = "crossattn"
    reads_prompts = True

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

    def truncated_captions(self, inputs: list, reading: PromptReading | None = None) -> list[tuple[str, int]]:
        return text_clip.cut(self.tokenizers, inputs, self._tokens(), reading or text_clip.PLAIN)

    def _tokens(self) -> int:
        return min(model.config.max_position_embeddings for model in self.models)

    def forward(self, inputs: list) -> Condition:
        """Captions -> Condition with context [N, L, width] and text_embeds [N, P]."""
        return self.read(inputs)

    @torch.no_grad()
    def read(self, inputs: list, reading: PromptReading | None = None) -> Condition:
        """As forward. Weights leave the states' mean as it becomes; text_embeds is the first chunk's, unweighted."""
        text_clip.check_captions(inputs, "TwoTextEncoders")
        reading, states = reading or text_clip.PLAIN, []
        for model, of in zip(self.models, self._chunks(inputs, reading), strict=True):
            rows, counts = [chunk for each in of for chunk in each], [len(each) for each in of]
            skip = reading.skipped(model.config.num_hidden_layers)
            (out,) = text_clip.run_tower(model, [row.ids for row in rows], self.device, len(rows), hidden=True)
            states.append(text_clip.weighted(out.hidden_states[-(skip + 2)], rows, keep_mean=False))
        context, mask = text_clip.side_by_side(torch.cat(states, dim=-1), counts)
        firsts = [sum(counts[:i]) for i in range(len(counts))]
        return Condition(context=context, context_mask=mask, text_embeds=out.text_embeds[firsts])

    def _chunks(self, captions: list[str], reading: PromptReading) -> list[list[list[text_clip.Chunk]]]:
        """For each tower, each caption's chunks: as many for one as for the other."""
        length = self._tokens()
        both = [[text_clip.chunks(t, caption, length, reading) for caption in captions] for t in self.tokenizers]
        for pair in zip(*both, strict=True):
            most = max(map(len, pair))
            for of, tokenizer in zip(pair, self.tokenizers, strict=True):
                of += text_clip.chunks(tokenizer, "", length) * (most - len(of))
        return both

    def empty(self, n: int) -> Condition:
        found = self([""]).parts()
        if self.zeros:
            found = {name: torch.zeros_like(value) for name, value in found.items()}
        return Condition(**{name: value.expand(n, *value.shape[1:]) for name, value in found.items()})
