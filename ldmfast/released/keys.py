"""The names of the released layout and of diffusers', as a table of entries that goes both ways exactly.

An entry says which released tensor holds which of diffusers' tensors, and how: as it is, as a 1x1 convolution for a
linear layer, as queries, keys and values in one, or transposed. Nothing is computed, so there and back is bit-equal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Entry:
    """One released tensor and the tensors of a part that it holds.

    ndim    of the released weight where that is a convolution for a linear layer, else None
    heads   with three keys: the released rows are [heads, 3, width]; 1 if they are [3, channels]
    """

    released: str
    keys: tuple[str, ...]
    ndim: int | None = None
    heads: int = 1
    transpose: bool = False

    def apply(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The released tensor -> one for each key."""
        if self.ndim is not None and value.ndim > 2:
            value = value.flatten(1)
        if self.transpose:
            value = value.t()
        if len(self.keys) == 1:
            return [value]
        rows = value.unflatten(0, (self.heads, len(self.keys), -1))
        return [rows[:, i].flatten(0, 1) for i in range(len(self.keys))]

    def undo(self, values: list[torch.Tensor]) -> torch.Tensor:
        """One tensor for each key -> the released tensor."""
        value = values[0]
        if len(self.keys) > 1:
            rows = [v.unflatten(0, (self.heads, -1)) for v in values]
            value = torch.stack(rows, dim=1).flatten(0, 2)
        if self.transpose:
            value = value.t()
        if self.ndim is not None and value.ndim == 2:
            value = value.view(*value.shape, *(1,) * (self.ndim - 2))
        return value.contiguous()


_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_PLAIN_ATTENTION = {"group_norm": "norm", "to_out.0": "proj_out"}


def unet_entries(shapes: dict[str, tuple], config: dict, *, legacy: bool = True) -> list[Entry]:
    """The U-Net's table, from the names and shapes of diffusers' module and its configuration.

    legacy   the order of an attention block's rows: head by head; else queries, keys, values
    """
    return _joined(shapes, lambda key: _unet_name(key, config), 3, _heads(config) if legacy else lambda key: 1)


def _unet_name(key: str, config: dict) -> str:
    """A U-Net's tensor in the released layout; of queries, keys and values the common one."""
    outside, _, last = key.rpartition(".")
    if outside in _OUTSIDE:
        return f"{_OUTSIDE[outside]}.{last}"
    step = config["layers_per_block"] + 1
    where, kind, index, inner = _split(key)
    if where == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * index}.{_inner(kind, inner)}"
    side, level = where
    if side == "down":
        number = (level + 1) * step if kind == "downsamplers" else 1 + level * step + index
        place = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
        return f"input_blocks.{number}.{place}.{_inner(kind, inner)}"
    number = level * step + (step - 1 if kind == "upsamplers" else index)
    attends = "Attn" in config["up_block_types"][level]
    place = {"resnets": "0", "attentions": "1", "upsamplers": "2" if attends else "1"}[kind]
    return f"output_blocks.{number}.{place}.{_inner(kind, inner)}"


def _split(key: str):
    """ "down_blocks.1.resnets.0.conv1.weight" -> (("down", 1), "resnets", 0, "conv1.weight")."""
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", key):
        side, level, kind, index, inner = found.groups()
        return (side, int(level)), kind, int(index), inner
    if found := re.fullmatch(r"mid_block\.(\w+)\.(\d+)\.(.+)", key):
        kind, index, inner = found.groups()
        return "mid", kind, int(index), inner
    raise ValueError(f"{key} has no place in the released layout of a U-Net")


def _inner(kind: str, inner: str) -> str:
    """The name inside a residual block, an attention block, a transformer or a resampling convolution."""
    module, _, last = inner.rpartition(".")
    if kind in ("downsamplers", "upsamplers") and module == "conv":
        return f"{'op' if kind == 'downsamplers' else 'conv'}.{last}"
    if kind != "attentions":
        return f"{_RESNET[module]}.{last}"
    if module in ("to_q", "to_k", "to_v"):
        return f"qkv.{last}"
    return f"{_PLAIN_ATTENTION.get(module, module)}.{last}"


def _heads(config: dict):
    """key of an attention block -> its heads."""
    widths, channels = config.get("attention_head_dim"), config["block_out_channels"]
    widths = widths if isinstance(widths, list | tuple) else [widths] * len(channels)

    def heads(key: str) -> int:
        where, *_ = _split(key)
        level = -1 if where == "mid" else where[1] if where[0] == "down" else len(channels) - 1 - where[1]
        return channels[level] // (widths[level] or channels[level])

    return heads


def _joined(shapes: dict, name_of, ndim: int, heads_of) -> list[Entry]:
    """One entry a released name: three keys where they share it."""
    groups: dict[str, list[str]] = {}
    for key in shapes:
        groups.setdefault(name_of(key), []).append(key)
    entries = []
    for name, keys in groups.items():
        attention = ".qkv." in name or (".proj_out." in name and ".to_out." in keys[0])
        linear = attention and len(shapes[keys[0]]) == 2
        heads = heads_of(keys[0]) if len(keys) == 3 else 1
        entries.append(Entry(name, tuple(sorted(keys)) if len(keys) == 1 else _qkv(keys), ndim * linear or None, heads))
    return entries


def _qkv(keys: list[str]) -> tuple[str, ...]:
    return tuple(next(k for k in keys if f".to_{letter}." in k) for letter in "qkv")


_AUTOENCODER = (
    (r"\.down_blocks\.(\d+)\.resnets\.", r".down.\1.block."),
    (r"\.down_blocks\.(\d+)\.attentions\.", r".down.\1.attn."),
    (r"\.down_blocks\.(\d+)\.downsamplers\.0\.", r".down.\1.downsample."),
    (r"\.up_blocks\.(\d+)\.resnets\.", r".up.\1.block."),
    (r"\.up_blocks\.(\d+)\.attentions\.", r".up.\1.attn."),
    (r"\.up_blocks\.(\d+)\.upsamplers\.0\.", r".up.\1.upsample."),
    (r"\.mid_block\.attentions\.0\.", r".mid.attn_1."),
    (r"\.mid_block\.resnets\.0\.", r".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", r".mid.block_2."),
    (r"\.conv_shortcut\.", r".nin_shortcut."),
    (r"\.conv_norm_out\.", r".norm_out."),
    (r"\.group_norm\.", r".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", r".proj_out."),
)


def autoencoder_entries(shapes: dict[str, tuple], config: dict) -> list[Entry]:
    """The autoencoder's table; released, its attention is 1x1 convolutions and its `up` counts from the top."""
    last = len(config["block_out_channels"]) - 1
    entries = []
    for key, shape in shapes.items():
        name = key
        for pattern, written in _AUTOENCODER:
            name = re.sub(pattern, written, name)
        name = re.sub(r"decoder\.up\.(\d+)", lambda found: f"decoder.up.{last - int(found[1])}", name)
        attention = ".attentions." in key and len(shape) == 2
        entries.append(Entry(name, (key,), 4 if attention else None))
    return entries
