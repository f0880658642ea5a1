"""Models in the released layout, built from nothing of ldmfast's: names and shapes, and the plain networks they mean.

`denoiser`, `autoencoder`, `transformer`, `clip` and `openclip` list {name: shape} as the released code's modules would
name them; `UNet` and `Autoencoder` compute from such a table with torch alone, as the published formulas say.
"""

from __future__ import annotations

import torch


def conv(name, inputs, outputs, size=3):
    return {f"{name}.weight": (outputs, inputs, *(size,) * 2), f"{name}.bias": (outputs,)}


def linear(name, inputs, outputs, bias=True):
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def norm(name, channels):
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def res_block(name, inputs, outputs, time, scale_shift):
    table = {**norm(f"{name}.in_layers.0", inputs), **conv(f"{name}.in_layers.2", inputs, outputs)}
    table |= linear(f"{name}.emb_layers.1", time, outputs * (2 if scale_shift else 1))
    table |= {**norm(f"{name}.out_layers.0", outputs), **conv(f"{name}.out_layers.3", outputs, outputs)}
    return table if inputs == outputs else {**table, **conv(f"{name}.skip_connection", inputs, outputs, 1)}


def attention_block(name, channels):
    return {
        **norm(f"{name}.norm", channels),
        f"{name}.qkv.weight": (3 * channels, channels, 1),
        f"{name}.qkv.bias": (3 * channels,),
        f"{name}.proj_out.weight": (channels, channels, 1),
        f"{name}.proj_out.bias": (channels,),
    }


def spatial_transformer(name, channels, context, depth, is_linear):
    table = norm(f"{name}.norm", channels)
    for end in ("proj_in", "proj_out"):
        end = f"{name}.{end}"
        table |= linear(end, channels, channels) if is_linear else conv(end, channels, channels, 1)
    for d in range(depth):
        block = f"{name}.transformer_blocks.{d}"
        for attn, keys in (("attn1", channels), ("attn2", context)):
            table |= linear(f"{block}.{attn}.to_q", channels, channels, False)
            table |= linear(f"{block}.{attn}.to_k", keys, channels, False)
            table |= linear(f"{block}.{attn}.to_v", keys, channels, False)
            table |= linear(f"{block}.{attn}.to_out.0", channels, channels)
        table |= linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
        table |= linear(f"{block}.ff.net.2", 4 * channels, channels)
        for i in (1, 2, 3):
            table |= norm(f"{block}.norm{i}", channels)
    return table


def denoiser(
    inputs,
    outputs,
    ch,
    mult,
    ds,
    *,
    context=None,
    depth=1,
    scale_shift=False,
    updown=False,
    is_linear=False,
    label=None,
    layers=2,
):
    """openaimodel's UNetModel.   ds  the downsampling factors with attention;   depth  an int, or one a level"""
    depths = depth if isinstance(depth, tuple) else (depth,) * len(mult)
    time = 4 * ch

    def attend(name, channels, level):
        if context is None:
            return attention_block(name, channels)
        return spatial_transformer(name, channels, context, depths[level], is_linear)

    table = {**linear("time_embed.0", ch, time), **linear("time_embed.2", time, time)}
    if label:
        table |= {**linear("label_emb.0.0", label, time), **linear("label_emb.0.2", time, time)}
    table |= conv("input_blocks.0.0", inputs, ch)
    stack, now, number = [ch], ch, 1
    for level, m in enumerate(mult):
        for _ in range(layers):
            table |= res_block(f"input_blocks.{number}.0", now, m * ch, time, scale_shift)
            now = m * ch
            if 2**level in ds:
                table |= attend(f"input_blocks.{number}.1", now, level)
            stack.append(now)
            number += 1
        if level < len(mult) - 1:
            name = f"input_blocks.{number}.0"
            table |= res_block(name, now, now, time, scale_shift) if updown else conv(f"{name}.op", now, now)
            stack.append(now)
            number += 1
    for i in (0, 2):
        table |= res_block(f"middle_block.{i}", now, now, time, scale_shift)
    table |= attend("middle_block.1", now, -1)
    number = 0
    for level in reversed(range(len(mult))):
        for i in range(layers + 1):
            place = f"output_blocks.{number}"
            table |= res_block(f"{place}.0", now + stack.pop(), mult[level] * ch, time, scale_shift)
            now, inside = mult[level] * ch, 1
            if 2**level in ds:
                table |= attend(f"{place}.1", now, level)
                inside = 2
            if level and i == layers:
                name = f"{place}.{inside}"
                table |= res_block(name, now, now, time, scale_shift) if updown else conv(f"{name}.conv", now, now)
            number += 1
    return {**table, **norm("out.0", now), **conv("out.2", ch, outputs)}


def _vae_res(name, inputs, outputs):
    table = {**norm(f"{name}.norm1", inputs), **conv(f"{name}.conv1", inputs, outputs)}
    table |= {**norm(f"{name}.norm2", outputs), **conv(f"{name}.conv2", outputs, outputs)}
    return table if inputs == outputs else {**table, **conv(f"{name}.nin_shortcut", inputs, outputs, 1)}


def _vae_attention(name, channels):
    table = norm(f"{name}.norm", channels)
    for part in ("q", "k", "v", "proj_out"):
        table |= conv(f"{name}.{part}", channels, channels, 1)
    return table


def _vae_mid(name, channels, attends):
    table = {**_vae_res(f"{name}.block_1", channels, channels), **_vae_res(f"{name}.block_2", channels, channels)}
    return {**table, **_vae_attention(f"{name}.attn_1", channels)} if attends else table


def autoencoder(z, ch, mult, *, codebook=None, at=(), mid=True, resolution=256):
    """The released autoencoders.   at  the resolutions with attention, of a picture of 256"""
    table, now, side = conv("encoder.conv_in", 3, ch), ch, resolution
    for level, m in enumerate(mult):
        for i in range(2):
            table |= _vae_res(f"encoder.down.{level}.block.{i}", now, m * ch)
            now = m * ch
            if side in at:
                table |= _vae_attention(f"encoder.down.{level}.attn.{i}", now)
        if level < len(mult) - 1:
            table |= conv(f"encoder.down.{level}.downsample.conv", now, now)
            side //= 2
    moments = z if codebook else 2 * z
    table |= {**_vae_mid("encoder.mid", now, mid), **norm("encoder.norm_out", now)}
    table |= {**conv("encoder.conv_out", now, moments), **conv("decoder.conv_in", z, now)}
    table |= _vae_mid("decoder.mid", now, mid)
    for level in reversed(range(len(mult))):
        for i in range(3):
            table |= _vae_res(f"decoder.up.{level}.block.{i}", now, mult[level] * ch)
            now = mult[level] * ch
            if side in at:
                table |= _vae_attention(f"decoder.up.{level}.attn.{i}", now)
        if level:
            table |= conv(f"decoder.up.{level}.upsample.conv", now, now)
            side *= 2
    table |= {**norm("decoder.norm_out", now), **conv("decoder.conv_out", now, 3)}
    table |= {**conv("quant_conv", moments, moments, 1), **conv("post_quant_conv", z, z, 1)}
    return {**table, "quantize.embedding.weight": (codebook, z)} if codebook else table


def transformer(vocabulary, width, layers, tokens):
    """The text and layout models' encoder: x-transformers' TransformerWrapper around an Encoder, 8 heads of 64."""
    table = {"transformer.token_emb.weight": (vocabulary, width), "transformer.pos_emb.emb.weight": (tokens, width)}
    for i in range(layers):
        attn, ff = (f"transformer.attn_layers.layers.{2 * i + k}" for k in (0, 1))
        table |= norm(f"{attn}.0", width)
        for part in ("to_q", "to_k", "to_v"):
            table |= linear(f"{attn}.1.{part}", width, 512, False)
        table |= linear(f"{attn}.1.to_out", 512, width)
        table |= {**norm(f"{ff}.0", width), **linear(f"{ff}.1.net.0.0", width, 4 * width)}
        table |= linear(f"{ff}.1.net.2", 4 * width, width)
    return {**table, **norm("transformer.norm", width), **linear("transformer.to_logits", width, vocabulary)}


def clip(width, layers, vocabulary=49408, tokens=77):
    """CLIP's text tower as transformers names it."""
    table = {"embeddings.token_embedding.weight": (vocabulary, width)}
    table |= {"embeddings.position_embedding.weight": (tokens, width), **norm("final_layer_norm", width)}
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            table |= linear(f"{layer}.self_attn.{part}", width, width)
        table |= {**norm(f"{layer}.layer_norm1", width), **norm(f"{layer}.layer_norm2", width)}
        table |= {**linear(f"{layer}.mlp.fc1", width, 4 * width), **linear(f"{layer}.mlp.fc2", 4 * width, width)}
    return {f"text_model.{name}": shape for name, shape in table.items()}


def openclip(width, layers, vocabulary=49408, tokens=77):
    """CLIP's text tower as OpenCLIP names it."""
    table = {"positional_embedding": (tokens, width), "text_projection": (width, width), "logit_scale": ()}
    table |= {"token_embedding.weight": (vocabulary, width), **norm("ln_final", width)}
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        table |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        table |= {**norm(f"{block}.ln_1", width), **norm(f"{block}.ln_2", width)}
        table |= linear(f"{block}.attn.out_proj", width, width)
        table |= {**linear(f"{block}.mlp.c_fc", width, 4 * width), **linear(f"{block}.mlp.c_proj", 4 * width, width)}
    return table


def under(prefix, table):
    return {prefix + name: shape for name, shape in table.items()}


def averaged(table):
    """The names of the averaged copy of `model.` tensors: buffers, whose names have no dots."""
    own = {n: s for n, s in table.items() if n.startswith("model.")}
    names = {"model_ema." + n.removeprefix("model.").replace(".", ""): s for n, s in own.items()}
    return {**names, "model_ema.decay": (), "model_ema.num_updates": ()}


def schedule(first, last, steps=1000):
    """Some of the buffers that a released file has."""
    betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    return {"betas": betas.float(), "alphas_cumprod": alphas.float(), "sqrt_alphas_cumprod": alphas.sqrt().float()}


def weights(table, seed=0, dtype=torch.float32):
    """Random tensors of a table, scaled so that a deep network keeps its size; every one different."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in table.items():
        fan = max(1, torch.Size(shape[1:]).numel())
        value = torch.randn(shape, generator=generator, dtype=torch.float32)
        if len(shape) > 1:
            value = value / fan**0.5
        else:
            value = 0.1 * value + (1.0 if name.endswith("weight") else 0.0)
        made[name] = value.to(dtype)
    return made
