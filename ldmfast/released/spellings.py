"""The names of a released file's tensors as their tools left them -> as the released code writes them.

module.  _orig_mod.  ...                   what DDP, torch.compile, FSDP and checkpointing put around a module
anything before model.diffusion_model.     a model inside of another one
the U-Net or the first stage alone         with any prefix, or with none
cond_stage_model.transformer.encoder. ...  CLIP without text_model.
model_ema.diffusion_model...               the averaged U-Net, whose names have no dots
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ldmfast.released.model import AUTOENCODER, UNET

Table = dict[str, Any]

_WRAPPERS = {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_UNET_MARKS = "input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"
_UNET_PLACES = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.")
_STAGE_MARK = "encoder.down.0.block.0.conv1.weight"
_STAGE_PLACES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "quantize.", "loss.")
_BARE_CLIP = re.compile(
    r"^(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(embeddings|encoder\.layers|final_layer_norm)\."
)
AVERAGED = "model_ema.diffusion_model"


def usual_names(table: Table) -> tuple[Table, list[str]]:
    """(the table by the released code's names, a sentence for each kind of change).

    A name that is taken already keeps its spelling.
    """
    notes: list[str] = []
    table = _renamed(table, _unwrapped, "what wraps a module left out (module., _orig_mod.)", notes)
    table = _renamed(table, *_without_outer(table), notes)
    table = _renamed(table, *_one_network(table), notes)
    with_level = _renamed(table, _with_text_model, "text_model. put before CLIP's", notes)
    return with_level, notes


def _renamed(table: Table, rename: Callable[[str], str], what: str, notes: list[str]) -> Table:
    found: Table = {}
    changed = 0
    for name, value in sorted(table.items(), key=lambda item: rename(item[0]) != item[0]):  # the plain ones first
        new = rename(name)
        new = name if new in found or (new != name and new in table) else new
        changed += new != name
        found[new] = value
    if not changed:
        return table
    notes.append(f"{changed} names read with {what}")
    return found


def _unwrapped(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS) or name


def _with_text_model(name: str) -> str:
    return _BARE_CLIP.sub(r"\1.transformer.text_model.\2.", name)


def _without_outer(table: Table) -> tuple[Callable[[str], str], str]:
    """What stands before the whole model, from where its U-Net is."""
    ends = (UNET + _UNET_MARKS[0], AVERAGED + _UNET_MARKS[0].replace(".", ""))
    outer = [name.removesuffix(end) for end in ends for name in table if name.endswith(end)]
    outer = min(outer, key=len, default="")
    return lambda name: name.removeprefix(outer) or name, f"{outer} left out"


def _one_network(table: Table) -> tuple[Callable[[str], str], str]:
    """A U-Net under another prefix than the released one, or, where there is no U-Net, an autoencoder under any."""
    first, last = _UNET_MARKS
    if UNET + first in table or any(name.startswith(AVERAGED) for name in table):
        return _as_it_is, ""
    prefixes = [name.removesuffix(first) for name in table if name.endswith(first)]
    prefixes = [prefix for prefix in prefixes if prefix + last in table and (not prefix or prefix.endswith("."))]
    if prefixes:
        own = min(prefixes, key=len)
        return _moved(own, UNET, _UNET_PLACES), f"{UNET} in place of {own or 'nothing'}"
    stages = [name.removesuffix(_STAGE_MARK) for name in table if name.endswith("." + _STAGE_MARK)]
    if stages and _STAGE_MARK not in table:
        own = AUTOENCODER if AUTOENCODER in stages else min(stages, key=len)
        return _moved(own, "", _STAGE_PLACES), f"{own} left out"
    return _as_it_is, ""


def _as_it_is(name: str) -> str:
    return name


def _moved(own: str, released: str, places: tuple[str, ...]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        inner = name.removeprefix(own)
        return released + inner if name.startswith(own) and inner.startswith(places) else name

    return rename


_WORDS = (  # what the U-Net's names are made of: the number of a block has all digits but the last, which is a layer's
    (r"(input_blocks|output_blocks)(\d+)(\d)", r"\1.\2.\3."),
    (r"(middle_block|transformer_blocks|time_embed|in_layers|emb_layers|out_layers|to_out)(\d+)", r"\1.\2."),
    (r"label_emb(\d)(\d)", r"label_emb.\1.\2."),
    (r"ffnet(\d)proj", r"ff.net.\1.proj."),
    (r"ffnet(\d)", r"ff.net.\1."),
    (r"out(\d)", r"out.\1."),
    (r"(attn[12]|norm[123]?|to_[qkv]|proj_in|proj_out|qkv|skip_connection|label_emb|op|conv)", r"\1."),
    (r"(weight|bias)$", r"\1"),
)


def dotted(name: str) -> str | None:
    """An averaged tensor's name (model_ema.diffusion_modelinput_blocks00weight) as the plain one's; None for another's.

    Source: LitEma in the released code, whose buffers' names are those of the parameters without the dots.
    """
    if not name.startswith(AVERAGED):
        return None
    rest, found = name.removeprefix(AVERAGED), UNET
    while rest:
        for pattern, written in _WORDS:
            if match := re.match(pattern, rest):
                found, rest = found + match.expand(written), rest[match.end() :]
                break
        else:
            return None
    return found
