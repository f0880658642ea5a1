"""Plain networks over tables in the released layout: torch alone, the published formulas, nothing of ldmfast's.

`unet(table, x, t, heads, ...)` is openaimodel's forward, `encode` and `decode` the autoencoder's.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


class Table:
    """A table of tensors seen from one prefix."""

    def __init__(self, tensors, prefix=""):
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name):
        return Table(self.tensors, f"{self.prefix}{name}.")

    def has(self, name):
        return any(key.startswith(f"{self.prefix}{name}.") for key in self.tensors)

    def value(self, name):
        return self.tensors.get(self.prefix + name)

    def conv(self, x, stride=1, padding=None):
        weight = self.value("weight")
        padding = weight.shape[-1] // 2 if padding is None else padding
        return F.conv2d(x, weight, self.value("bias"), stride, padding)

    def linear(self, x):
        return F.linear(x, self.value("weight"), self.value("bias"))

    def group_norm(self, x, eps):
        return F.group_norm(x, 32, self.value("weight"), self.value("bias"), eps)

    def layer_norm(self, x):
        return F.layer_norm(x, x.shape[-1:], self.value("weight"), self.value("bias"), 1e-5)


def softmax_attention(q, k, v, heads):
    """[N, L, C] each, the channels head by head."""
    n, length, channels = q.shape
    q, k, v = (y.reshape(n, -1, heads, channels // heads).transpose(1, 2) for y in (q, k, v))
    weights = (q @ k.transpose(2, 3) / math.sqrt(channels // heads)).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).reshape(n, length, channels)


def res_block(m, x, emb, up=False, down=False):
    h = F.silu(m["in_layers"]["0"].group_norm(x, 1e-5))
    if up:
        x, h = (F.interpolate(y, scale_factor=2, mode="nearest") for y in (x, h))
    if down:
        x, h = (F.avg_pool2d(y, 2) for y in (x, h))
    h = m["in_layers"]["2"].conv(h)
    e = m["emb_layers"]["1"].linear(F.silu(emb))[:, :, None, None]
    if e.shape[1] == h.shape[1]:
        h = m["out_layers"]["0"].group_norm(h + e, 1e-5)
    else:
        scale, shift = e.chunk(2, dim=1)
        h = m["out_layers"]["0"].group_norm(h, 1e-5) * (1 + scale) + shift
    h = m["out_layers"]["3"].conv(F.silu(h))
    return (m["skip_connection"].conv(x) if m.has("skip_connection") else x) + h


def attention_block(m, x, heads):
    """The legacy order: the rows of qkv are head by head, each with its queries, keys and values."""
    n, c, h, w = x.shape
    y = m["norm"].group_norm(x, 1e-5).reshape(n, c, h * w)
    qkv = F.conv1d(y, m.value("qkv.weight"), m.value("qkv.bias"))
    q, k, v = qkv.reshape(n * heads, 3 * c // heads, h * w).split(c // heads, dim=1)
    weights = torch.einsum("bct,bcs->bts", q, k / math.sqrt(c // heads)).softmax(dim=-1)
    y = torch.einsum("bts,bcs->bct", weights, v).reshape(n, c, h * w)
    return x + F.conv1d(y, m.value("proj_out.weight"), m.value("proj_out.bias")).reshape(n, c, h, w)


def transformer_block(m, x, context, heads):
    for attn, norm, keys in (("attn1", "norm1", None), ("attn2", "norm2", context)):
        y, a = m[norm].layer_norm(x), m[attn]
        k = y if keys is None else keys
        q, k, v = a["to_q"].linear(y), a["to_k"].linear(k), a["to_v"].linear(k)
        x = x + a["to_out"]["0"].linear(softmax_attention(q, k, v, heads))
    value, gate = m["ff"]["net"]["0"]["proj"].linear(m["norm3"].layer_norm(x)).chunk(2, dim=-1)
    return x + m["ff"]["net"]["2"].linear(value * F.gelu(gate))


def spatial_transformer(m, x, context, heads):
    n, c, h, w = x.shape
    y = m["norm"].group_norm(x, 1e-6)
    is_linear = m.value("proj_in.weight").ndim == 2
    if is_linear:
        y = m["proj_in"].linear(y.flatten(2).transpose(1, 2))
    else:
        y = m["proj_in"].conv(y).flatten(2).transpose(1, 2)
    d = 0
    while m.has(f"transformer_blocks.{d}"):
        y = transformer_block(m["transformer_blocks"][str(d)], y, context, heads)
        d += 1
    if is_linear:
        return x + m["proj_out"].linear(y).transpose(1, 2).reshape(n, c, h, w)
    return x + m["proj_out"].conv(y.transpose(1, 2).reshape(n, c, h, w))


def layer(m, x, emb, context, heads, **resample):
    """One entry of a released block, whatever it is; heads(channels) says how many."""
    if m.has("in_layers"):
        return res_block(m, x, emb, **resample)
    if m.has("qkv"):
        return attention_block(m, x, heads(x.shape[1]))
    if m.has("transformer_blocks"):
        return spatial_transformer(m, x, context, heads(x.shape[1]))
    if m.has("op"):
        return m["op"].conv(x, stride=2, padding=1)
    return m["conv"].conv(F.interpolate(x, scale_factor=2, mode="nearest"))


@torch.no_grad()
def unet(tensors, x, t, heads, context=None, vector=None, layers=2):
    """noise [N, outputs, h, w] of x at the times t [N]; `tensors` without prefix, heads(channels) -> heads."""
    m = Table(tensors)
    ch = m.value("input_blocks.0.0.weight").shape[0]
    frequencies = torch.exp(-math.log(10000) * torch.arange(ch // 2).double() / (ch // 2))
    angles = t.double()[:, None] * frequencies
    emb = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
    emb = m["time_embed"]["2"].linear(F.silu(m["time_embed"]["0"].linear(emb)))
    if vector is not None:
        emb = emb + m["label_emb"]["0"]["2"].linear(F.silu(m["label_emb"]["0"]["0"].linear(vector)))
    x = m["input_blocks"]["0"]["0"].conv(x)
    skips, number = [x], 1
    while m.has(f"input_blocks.{number}"):
        block = m["input_blocks"][str(number)]
        down = number % (layers + 1) == 0  # the step to the next level, where it is a residual block
        x = (
            layer(block["0"], x, emb, context, heads, down=down)
            if block["0"].has("in_layers")
            else (layer(block["0"], x, emb, context, heads))
        )
        if block.has("1"):
            x = layer(block["1"], x, emb, context, heads)
        skips.append(x)
        number += 1
    for i in "012":
        x = layer(m["middle_block"][i], x, emb, context, heads)
    number = 0
    while m.has(f"output_blocks.{number}"):
        block = m["output_blocks"][str(number)]
        x = res_block(block["0"], torch.cat([x, skips.pop()], dim=1), emb)
        for i in "12":
            if block.has(i):
                up = {"up": True} if block[i].has("in_layers") else {}
                x = layer(block[i], x, emb, context, heads, **up)
        number += 1
    return m["out"]["2"].conv(F.silu(m["out"]["0"].group_norm(x, 1e-5)))


def _vae_res(m, x):
    h = m["conv1"].conv(F.silu(m["norm1"].group_norm(x, 1e-6)))
    h = m["conv2"].conv(F.silu(m["norm2"].group_norm(h, 1e-6)))
    return (m["nin_shortcut"].conv(x) if m.has("nin_shortcut") else x) + h


def _vae_attention(m, x):
    n, c, h, w = x.shape
    y = m["norm"].group_norm(x, 1e-6)
    q, k, v = (m[name].conv(y).flatten(2).transpose(1, 2) for name in "qkv")
    y = softmax_attention(q, k, v, 1).transpose(1, 2).reshape(n, c, h, w)
    return x + m["proj_out"].conv(y)


def _vae_mid(m, x):
    x = _vae_res(m["block_1"], x)
    x = _vae_attention(m["attn_1"], x) if m.has("attn_1") else x
    return _vae_res(m["block_2"], x)


def _vae_blocks(m, x):
    for i in range(3):
        if m.has(f"block.{i}"):
            x = _vae_res(m["block"][str(i)], x)
        if m.has(f"attn.{i}"):
            x = _vae_attention(m["attn"][str(i)], x)
    return x


@torch.no_grad()
def encode(tensors, x):
    """Moments [N, 2z, h, w], or for a codebook the latents before it [N, z, h, w]."""
    m = Table(tensors)
    e = m["encoder"]
    x, level = e["conv_in"].conv(x), 0
    while e.has(f"down.{level}"):
        x = _vae_blocks(e["down"][str(level)], x)
        if e.has(f"down.{level}.downsample"):
            x = e["down"][str(level)]["downsample"]["conv"].conv(F.pad(x, (0, 1, 0, 1)), stride=2, padding=0)
        level += 1
    x = e["conv_out"].conv(F.silu(e["norm_out"].group_norm(_vae_mid(e["mid"], x), 1e-6)))
    return m["quant_conv"].conv(x)


@torch.no_grad()
def decode(tensors, z):
    """Pictures [N, 3, H, W] of latents; with a codebook, of the nearest codes."""
    m = Table(tensors)
    codes = m.value("quantize.embedding.weight")
    if codes is not None:
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        nearest = ((flat[:, None] - codes[None]) ** 2).sum(dim=2).argmin(dim=1)
        z = codes[nearest].view(len(z), *z.shape[2:], -1).permute(0, 3, 1, 2)
    d = m["decoder"]
    x = _vae_mid(d["mid"], d["conv_in"].conv(m["post_quant_conv"].conv(z)))
    level = max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up."))
    for i in range(level, -1, -1):
        x = _vae_blocks(d["up"][str(i)], x)
        if d.has(f"up.{i}.upsample"):
            x = d["up"][str(i)]["upsample"]["conv"].conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    return d["conv_out"].conv(F.silu(d["norm_out"].group_norm(x, 1e-6)))


@torch.no_grad()
def transformer(tensors, ids):
    """[N, S, width]: token and position embedding, then pre-norm attention (8 heads) and GELU layers, then a norm."""
    m = Table(tensors)["transformer"]
    x = m.value("token_emb.weight")[ids] + m.value("pos_emb.emb.weight")[: ids.shape[1]]
    i = 0
    while m.has(f"attn_layers.layers.{i}"):
        norm, inner = m["attn_layers"]["layers"][str(i)]["0"], m["attn_layers"]["layers"][str(i)]["1"]
        y = norm.layer_norm(x)
        if inner.has("to_q"):
            q, k, v = (inner[f"to_{name}"].linear(y) for name in "qkv")
            x = x + inner["to_out"].linear(softmax_attention(q, k, v, 8))
        else:
            x = x + inner["net"]["2"].linear(F.gelu(inner["net"]["0"]["0"].linear(y)))
        i += 1
    return m["norm"].layer_norm(x)
