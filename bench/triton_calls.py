"""Calls of the Triton launchers, on tensors of no device, whose launches are the shipped configurations.

bench/resources.py records what they launch; tests/ops/test_triton.py compiles it.
"""

import torch

from ldmfast.ops.group_norm_silu import as_ncp

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _empty(*shape, dtype=torch.float32, layout=torch.contiguous_format):
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def _name(*parts) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in parts)


def group_norm_silu():
    """SD1.5's levels, the autoencoder's largest, and an odd size with every modulation."""
    for channels, side in ((320, 64), (640, 32), (1280, 8), (960, 64), (1920, 32), (128, 512), (320, 63)):
        for layout in (torch.contiguous_format, torch.channels_last):
            for dtype in (torch.float32, torch.bfloat16):
                x = _empty(2, channels, side, side, dtype=dtype, layout=layout)
                row, rows = _empty(channels, dtype=dtype), _empty(2, channels, dtype=dtype) if side == 63 else None
                x, last, strides = as_ncp(x)
                call = (x, strides, last, x, row, row, rows, rows, rows, 32, 1e-5, True)
                yield _name(list(x.shape), dtype, layout), call


def group_norm_silu_backward():
    """The forward's shapes."""
    for label, (x, strides, last, _, *others) in group_norm_silu():
        yield label, (x, x, strides, last, x, _empty(3, *x.shape[:2]), *others)


def attention():
    """Self- and cross-attention of every tile that configuration() can choose, each kind of mask, an odd length."""
    cases = [(4096, 4096, 40), (4096, 77, 40), (1024, 1024, 64), (1024, 1024, 80), (4096, 4096, 80)]
    cases += [(4096, 4096, 128), (256, 256, 160), (4096, 77, 160), (256, 77, 256), (1023, 1023, 80)]
    for length, keys, d in cases:
        for dtype in (torch.float32, torch.bfloat16):
            q, k = (_empty(2, size, 8, d, dtype=dtype) for size in (length, keys))
            masks = {"": None}
            if keys == 77:
                masks["key mask"] = _empty(2, 1, 1, keys, dtype=torch.bool).expand(2, 8, length, keys)
                masks["added mask"] = _empty(2, 8, length, keys, dtype=dtype)
            for name, mask in masks.items():
                yield _name(list(q.shape), "x", keys, dtype, name), (q, k, k, q, mask, d**-0.5)


def attention_backward():
    """The forward's shapes up to the widest heads that it takes."""
    for label, (q, k, v, out, mask, scale) in attention():
        if q.shape[3] <= (80 if q.dtype is torch.float32 else 160):
            yield label, (q, q, k, v, out, q, k, k, mask, scale)


def timestep_mlp():
    """SD1.5's, for one, two and more timesteps."""
    for dtype in FLOATS:
        for n in (1, 2, 4):
            w1, w2, bias = _empty(1280, 320, dtype=dtype), _empty(1280, 1280, dtype=dtype), _empty(1280, dtype=dtype)
            hidden, out = _empty(n, 1280), _empty(n, 1280, dtype=dtype)
            yield _name([n], "320 -> 1280", dtype), (_empty(n), _empty(160), w1, bias, w2, bias, out, True, hidden)


def ddim_step():
    """A latent and a batch of pictures; guided; plain, with everything, by a row, and of a multistep method."""
    for side in (64, 1024):
        for dtype in FLOATS:
            x, output = (_empty(n, 4, side, side, dtype=dtype) for n in (2, 4))
            table = _empty(2, 7)
            name = _name(list(x.shape), dtype, "guided")
            yield name, (x, output, None, x, x, [0.5] * 7, None, 7.5, None)
            yield name + " noise table clip", (x, output, x, x, x, None, table, 7.5, 1.0)
            row = _empty(1, dtype=torch.int64)
            yield name + " row of a table", (x, output, None, x, x, None, table, 7.5, None, row)
            yield name + " multistep", (x, output, x, x, x, None, table, 7.5, None, row, [1.0] * 4, [x, x, x])


def timestep_mlp_backward():
    """SD1.5's, for four timesteps."""
    for dtype in FLOATS:
        w1, w2, bias = _empty(1280, 320, dtype=dtype), _empty(1280, 1280, dtype=dtype), _empty(1280, dtype=dtype)
        dout = _empty(4, 1280, dtype=dtype)
        yield _name([4], "320 -> 1280", dtype), (dout, _empty(4), _empty(160), w1, bias, w2, w1, bias, w2, bias, True)


def ddim_step_backward():
    """A latent, guided: plain, and with everything."""
    for dtype in FLOATS:
        x, output = (_empty(n, 4, 64, 64, dtype=dtype) for n in (2, 4))
        name = _name(list(x.shape), dtype, "guided")
        yield name, (x, x, x, output, x, output, None, [0.5] * 7, None, 7.5, None)
        yield name + " noise table clip", (x, x, x, output, x, output, x, None, _empty(2, 7), 7.5, 1.0)


def linear():
    """What a block folds, at SD1.5's first and last level: residual; LayerNorm and GEGLU; a time projection."""
    for rows, k, dtypes in ((8192, 320, (torch.float32, torch.bfloat16)), (128, 1280, (torch.bfloat16,))):
        for dtype in dtypes:
            x, norm, weight = _empty(rows, k, dtype=dtype), _empty(k, dtype=dtype), _empty(k, k, dtype=dtype)
            wide, hidden, bias = (_empty(*shape, dtype=dtype) for shape in ((8 * k, k), (rows, 4 * k), (8 * k,)))
            name = _name([rows, k], dtype)
            yield name + " residual", (x, weight, norm, x, x, "none", 1.0, None, None, None)
            yield name + " norm geglu", (x, wide, bias, None, hidden, "geglu", 1.0, norm, norm, 1e-5)
    x, weight, bias = (_empty(*shape, dtype=torch.bfloat16) for shape in ((2, 1280), (640, 1280), (640,)))
    rows, out = bias.expand(2, -1), _empty(2, 640, dtype=torch.bfloat16)
    yield "[2, 1280] 640 bfloat16", (x, weight, bias, rows, out, "none", 1.0, None, None, None)


def qkv_projection():
    """Self-attention behind its LayerNorm at SD1.5's first level, and a prompt's keys and values."""
    x, norm, weight = (_empty(*shape, dtype=torch.bfloat16) for shape in ((8192, 320), (320,), (320, 320)))
    yield "[8192, 320] bfloat16", (x, [weight] * 3, _empty(8192, 960, dtype=torch.bfloat16), norm, norm, 1e-5)
    x, weight, out = (_empty(*shape, dtype=torch.bfloat16) for shape in ((154, 768), (1280, 768), (154, 2560)))
    yield "[154, 768] 1280 bfloat16", (x, [weight] * 2, out, None, None, None)


def geglu():
    """SD1.5's first level."""
    for dtype in (torch.float32, torch.bfloat16):
        yield _name([8192, 2560], dtype), (_empty(8192, 2560, dtype=dtype), _empty(8192, 1280, dtype=dtype))


def bias_residual():
    """The end of a residual block of SD1.5's first level, in both layouts."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x, bias = _empty(2, 320, 64, 64, dtype=torch.bfloat16, layout=layout), _empty(320, dtype=torch.bfloat16)
        add = _empty(2, 320, dtype=torch.bfloat16)
        yield _name(list(x.shape), layout), (x, bias, add, x, layout is torch.channels_last, x, 1.0)


def residual_layer_norm():
    """The tokens of SD1.5's first and third level."""
    for rows, k in ((8192, 320), (512, 1280)):
        for dtype in (torch.float32, torch.bfloat16):
            x, norm = _empty(rows, k, dtype=dtype), _empty(k, dtype=dtype)
            yield _name([rows, k], dtype), (x, x, norm, norm, x, x, 1e-5)


FORWARD = (group_norm_silu, attention, timestep_mlp, ddim_step)
AROUND = (linear, qkv_projection, geglu, bias_residual, residual_layer_norm)  # what stands around a product
BACKWARD = (group_norm_silu_backward, attention_backward, timestep_mlp_backward, ddim_step_backward)
CALLS = {call.__name__: call for call in FORWARD + AROUND + BACKWARD}
