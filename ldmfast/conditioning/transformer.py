"""Token sequences through a small transformer that is trained with the denoiser: text, and boxes as tokens.

The network is that of the released text and layout models: token and position embeddings, pre-LayerNorm blocks of
self-attention (8 heads of 64) and a GELU feed-forward of four times the width, one LayerNorm at the end.
Source: Rombach et al. 2022, text-to-image and layout-to-image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldmfast import ops
from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.classes_and_boxes import ClassNames, check_objects
from ldmfast.conditioning.condition import Condition
from ldmfast.conditioning.text import load_tokenizer, locate, too_long

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ldmfast.conditioning.text_weights import PromptReading


class Attention(nn.Module):
    """x [N, S, E] -> [N, S, E]; queries, keys and values without bias."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)) for project in (self.to_q, self.to_k, self.to_v))
        return self.to_out(ops.attention(q, k, v).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads, head_width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class TransformerEmbedder(nn.Module):
    """ids [N, S] int64, S at most `tokens` -> [N, S, width]."""

    def __init__(
        self, vocabulary: int, tokens: int, width: int, layers: int, *, heads: int = 8, head_width: int = 64
    ) -> None:
        super().__init__()
        self.token_embedding, self.position_embedding = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, head_width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] > self.position_embedding.num_embeddings:
            raise ValueError(
                f"TransformerEmbedder: {ids.shape[1]} tokens, at most {self.position_embedding.num_embeddings} fit"
            )
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class TransformerText(Conditioner):
    """Captions to tokens by a transformer that is trained with the denoiser.

    tokenizer  a transformers tokenizer's name or folder; "minilm" has BERT's uncased vocabulary of 30522, which the
               released models read
    The released models: width 1280 or 640, 32 layers, 77 tokens.
    """

    mode = "crossattn"
    trainable = True

    def __init__(
        self,
        width: int = 1280,
        *,
        layers: int = 32,
        tokens: int = 77,
        vocabulary: int = 30522,
        heads: int = 8,
        head_width: int = 64,
        tokenizer: str = "minilm",
    ) -> None:
        super().__init__(
            width=width,
            layers=layers,
            tokens=tokens,
            vocabulary=vocabulary,
            heads=heads,
            head_width=head_width,
            tokenizer=tokenizer,
        )
        self.width, self.tokens, self.tokenizer_name, self._tokenizer = width, tokens, tokenizer, None
        self.transformer = TransformerEmbedder(vocabulary, tokens, width, layers, heads=heads, head_width=head_width)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Read when it is first needed: an architecture can be built without it."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(locate(self.tokenizer_name), self.tokenizer_name)
        return self._tokenizer

    def truncated_captions(self, inputs: list, reading: PromptReading | None = None) -> list[tuple[str, int]]:
        return too_long(self.tokenizer, inputs, self.tokens)

    def forward(self, inputs: list) -> Condition:
        wrong = next((c for c in inputs if not isinstance(c, str)), None)
        if wrong is not None:
            raise ValueError(f"TransformerText: a caption must be a string; got {wrong!r:.80}")
        found = self.tokenizer(
            list(inputs), padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
        )
        return Condition(context=self.transformer(found["input_ids"].to(self.device)))

    def empty(self, n: int) -> Condition:
        return Condition(context=self([""]).context.expand(n, -1, -1))


class LayoutEncoder(Conditioner):
    """Objects with boxes as a sequence of tokens: for each the class and the box's two corners on a grid.

    An input is a list of {"object": name or number, "box": [x0, y0, x1, y1] in 0..1}. Classes and corners share one
    vocabulary, its last entry stands for "none"; a corner is row * sections + column of a grid of sections x sections,
    the largest that fits. With `crop` two corners more say which part of the original picture is seen: all of it.

    The defaults are the released layout model's (OpenImages): vocabulary 8192, 30 objects, so 92 tokens, 16 layers.
    """

    option = "boxes"
    mode = "crossattn"
    trainable = True

    def __init__(
        self,
        classes: int | Sequence[str] = 601,
        width: int = 512,
        *,
        layers: int = 16,
        vocabulary: int = 8192,
        objects: int = 30,
        heads: int = 8,
        head_width: int = 64,
        crop: bool = True,
    ) -> None:
        super().__init__(
            classes=classes,
            width=width,
            layers=layers,
            vocabulary=vocabulary,
            objects=objects,
            heads=heads,
            head_width=head_width,
            crop=crop,
        )
        self.width, self.objects, self.crop = width, objects, crop
        self.none, self.sections = vocabulary - 1, int(vocabulary**0.5)
        self.classes = ClassNames(classes, "LayoutEncoder")
        if self.classes.count > self.none:
            raise ValueError(f"LayoutEncoder: {self.classes.count} classes do not fit a vocabulary of {vocabulary}")
        self.tokens = 3 * objects + 2 * crop
        self.transformer = TransformerEmbedder(
            vocabulary, self.tokens, width, layers, heads=heads, head_width=head_width
        )

    def ids(self, value: Sequence[dict[str, Any]]) -> list[int]:
        """One input as a list of `tokens` numbers. Raises ValueError for an object without a box."""
        found = []
        for index, box in check_objects(value, self.classes, self.objects):
            if box is None:
                raise ValueError("LayoutEncoder: every object needs a box")
            found += [index, self._corner(box[0], box[1]), self._corner(box[2], box[3])]
        found += [self.none] * (3 * self.objects - len(found))
        return found + [self._corner(0, 0), self._corner(1, 1)] * self.crop

    def _corner(self, x, y):
        last = self.sections - 1
        return round(y * last) * self.sections + round(x * last)

    def forward(self, inputs: list) -> Condition:
        ids = torch.tensor([self.ids(value) for value in inputs], dtype=torch.int64, device=self.device)
        return Condition(context=self.transformer(ids.view(-1, self.tokens)))

    def empty(self, n: int) -> Condition:
        return Condition(context=self([[]]).context.expand(n, -1, -1))
