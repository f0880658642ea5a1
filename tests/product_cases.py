"""The cases of the products, linear and conv2d, for tests/cases.py.

They have the budget of all ops. The nearest to it is F(2x2, 3x3) in bfloat16 on AVX512-BF16, which rounds transformed
operands: 3.3e-3 of 5.3e-3, twice direct's 1.7e-3. In float32 F(4x4, 3x3) has at most 6.2e-7 of 1.9e-6.
"""

from __future__ import annotations

import torch
from case import Case, channels_last, randn

LI, CV, QKV = "linear", "conv2d", "qkv_projection"


def layer(*rows, K, N, activation="none", plain=False, norm=False, affine=True, sliced=False, **kwargs):
    """rows, K -> N; sliced: rows that lie further apart than they are long, and a weight the other way round"""
    width, outputs, apart = N, 2 * N if activation == "geglu" else N, 3 if sliced else 0

    def make(dtype, N=rows[0]):
        leading = (N, *rows[1:])
        x = randn(*leading, K + apart, dtype=dtype)[..., :K]
        weight = randn(outputs, K, dtype=dtype, std=K**-0.5)
        weight = weight.mT.contiguous().mT if sliced else weight
        named = {"activation": activation, **kwargs}
        if norm:
            named["layer_norm"] = (*(randn(K, dtype=dtype) if affine else None for _ in "wb"), 1e-5)
        if not plain:
            named["residual"] = randn(*leading, width + apart, dtype=dtype)[..., :width]
        return (x, weight, None if plain else randn(outputs, dtype=dtype)), named

    return make


def convolution(
    C, Co, H, W, *, N=1, k=3, C2=0, plain=True, norm=None, layout=channels_last, weights=None, sliced=False, **kwargs
):
    """plain: no add, no residual, no scale; sliced: pictures cut out of larger ones, in channels and in width"""

    def make(dtype, N=N):
        def picture(C, H, W):
            x = randn(N, C + 3, H, W + 2, dtype=dtype) if sliced else randn(N, C, H, W, dtype=dtype)
            x = layout(x) if layout else x
            return x[:, 1 : C + 1, :, 1 : W + 1] if sliced else x

        Ci, named = C + C2, {"padding": k // 2, **kwargs}
        weight = randn(Co, Ci, k, k, dtype=dtype, std=(Ci * k * k) ** -0.5)
        if C2:
            named["x2"] = picture(C2, H, W)
        if norm:
            named |= {"norm_scale": 1 + randn(N, Ci, dtype=torch.float32, std=0.3), "norm_silu": norm == "silu"}
            named["norm_shift"] = randn(N, Ci, dtype=torch.float32)
        if not plain:
            enlarged, around = named.get("upsample", 1), 2 * named["padding"] - k
            out = [(enlarged * side + around) // named.get("stride", 1) + 1 for side in (H, W)]
            named |= {"add": randn(N, 2 * Co, dtype=dtype)[:, Co:], "residual": picture(Co, *out), "output_scale": 0.7}
        return (picture(C, H, W), weights(weight) if weights else weight, randn(Co, dtype=dtype)), named

    return make


def linear_cases():
    feed_forward = layer(2, 128, K=320, N=1280, activation="geglu", plain=True, norm=True)
    yield Case(LI, "to-out-1024x320", layer(1024, K=320, N=320), big=True)
    yield Case(LI, "geglu-256x320x1280", feed_forward, big=True)
    yield Case(LI, "prompt-77x768x320", layer(2, 77, K=768, N=320, plain=True))
    yield Case(LI, "one-row-1280x320", layer(1, K=1280, N=320, activation="silu"))
    for M in (1, 2, 3, 4):
        yield Case(LI, f"{M}-rows", layer(M, K=75, N=45, activation="silu", output_scale=0.7))
    yield Case(LI, "long-rows", layer(2, 19, K=1300, N=70, activation="gelu"))
    for M, K in ((145, 1300), (160, 96), (177, 75)):  # panels of 32 rows that end early, read in place or not
        around = {"activation": "silu", "output_scale": 0.7}
        yield Case(LI, f"panels-{M}x{K}", layer(M, K=K, N=70, **around))
        yield Case(LI, f"panels-{M}x{K}-geglu", layer(M, K=K, N=70, activation="geglu", norm=True))
    yield Case(LI, "rows-in-groups", layer(2, 113, K=130, N=260, activation="geglu", norm=True))
    yield Case(LI, "vector", lambda dtype, N=1: ((randn(40, dtype=dtype), randn(24, 40, dtype=dtype)), {}))
    yield Case(LI, "empty", layer(0, 7, K=40, N=24))
    yield Case(LI, "no-outputs", layer(3, K=4, N=0))
    yield Case(LI, "one-output", layer(5, K=9, N=1))
    yield Case(LI, "one-input", layer(5, K=1, N=9, plain=True))
    for rows, K, N in ((1, 3, 4), (70, 4, 4), (65, 8, 8), (131, 5, 3)):  # a form of its own, by 64 rows
        around = {"activation": "gelu", "sliced": True, "output_scale": 0.7}
        yield Case(LI, f"narrow-{rows}x{K}x{N}", layer(2, rows, K=K, N=N, **around))
    yield Case(LI, "normed-no-affine", layer(9, K=100, N=20, norm=True, affine=False))
    for activation in ("none", "silu", "gelu", "geglu"):
        everything = layer(2, 9, K=45, N=33, activation=activation, sliced=True, norm=True, output_scale=-1.5)
        yield Case(LI, f"odd-{activation}", layer(3, 11, K=37, N=29, activation=activation))
        yield Case(LI, f"scaled-{activation}", layer(17, K=64, N=48, activation=activation, output_scale=0.7))
        yield Case(LI, f"normed-{activation}", layer(2, 13, K=96, N=80, activation=activation, norm=True))
        yield Case(LI, f"everything-{activation}", everything)


def projections(*rows, K, N, parts=3, norm=True, affine=True, sliced=False):
    """rows, K -> parts of N; sliced: rows that lie further apart than they are long, and weights the other way round"""

    def make(dtype, N=rows[0]):
        x = randn(N, *rows[1:], K + (3 if sliced else 0), dtype=dtype)[..., :K]
        weights = (randn(outputs, K, dtype=dtype, std=K**-0.5) for _ in range(parts))
        weights = [weight.mT.contiguous().mT for weight in weights] if sliced else weights
        affine_ = (randn(K, dtype=dtype) if affine else None for _ in "wb")
        return (x, *weights), {"layer_norm": (*affine_, 1e-5)} if norm else {}

    outputs = N
    return make


def projection_cases():
    yield Case(QKV, "self-256x320", projections(2, 256, K=320, N=320), big=True)
    yield Case(QKV, "prompt-77x768", projections(2, 77, K=768, N=320, parts=2, norm=False), big=True)
    for parts in (2, 3):
        yield Case(QKV, f"odd-{parts}", projections(3, 11, K=37, N=29, parts=parts, sliced=True))
        yield Case(QKV, f"plain-{parts}", projections(2, 13, K=64, N=48, parts=parts, norm=False))
    yield Case(QKV, "long-rows", projections(1, 19, K=300, N=70))
    yield Case(QKV, "no-affine", projections(9, K=100, N=20, affine=False))
    yield Case(QKV, "one-input", projections(5, K=1, N=9, norm=False))
    yield Case(QKV, "empty", projections(0, 7, K=40, N=24))


def convolution_cases():
    yield Case(CV, "C320-16x16", convolution(320, 320, 16, 16, plain=False), big=True)
    yield Case(CV, "up-block-8x8", convolution(320, 320, 8, 8, C2=320, norm="silu", plain=False), big=True)
    yield Case(CV, "decoder-64x48", convolution(64, 64, 64, 48, norm="silu"), big=True)
    yield Case(CV, "in-4-to-320", convolution(4, 320, 8, 8))
    yield Case(CV, "out-320-to-4", convolution(320, 4, 8, 8, norm="silu"))
    for Co in (1, 2, 3, 6, 8):  # to few channels; the last strip of pixels is of 5
        everything = convolution(35, Co, 11, 37, N=2, C2=5, norm="silu", plain=False, padding=Co % 3)
        yield Case(CV, f"few-out-{Co}", everything)
    yield Case(CV, "few-out-enlarged", convolution(24, 4, 5, 18, N=2, upsample=2, norm="affine", sliced=True))
    for Ci in (1, 3, 8, 40):
        yield Case(CV, f"few-in-{Ci}", convolution(Ci, 41, 9, 13, N=2, stride=1 + Ci % 2, plain=False, padding=Ci % 3))
    yield Case(CV, "few-in-and-out", convolution(3, 5, 7, 9, N=2, upsample=2, plain=False))
    yield Case(CV, "1280-2x2", convolution(1280, 32, 2, 2))
    # a few pixels: the weight is read where it lies; both parts of the input are in one block of it
    few = {"plain": {}, "normed": {"norm": "silu"}, "wide": {"padding": 2, "stride": 2}}
    few |= {"pixels": {"k": 1, "norm": "affine"}, "enlarged": {"stride": 2, "upsample": 2}}
    for name, named in few.items():
        yield Case(CV, f"few-{name}-2x3", convolution(32, 90, 2, 3, **{"N": 5, "C2": 64, "plain": False} | named))
    # from direct over F(2x2, 3x3) to F(4x4, 3x3), as the pictures grow
    for name, exact in (("", False), ("-exact", True)):
        for H, W in ((1, 1), (4, 4), (8, 8), (13, 7), (9, 22), (20, 33)):
            everything = convolution(40, 35, H, W, C2=24, plain=False, norm="silu", exact=exact)
            yield Case(CV, f"odd-{H}x{W}{name}", convolution(37, 41, H, W, N=2, exact=exact))
            yield Case(CV, f"everything-{H}x{W}{name}", everything)
    # Winograd's forms of an enlarged picture and of stride 2, with blocks of a thread's own
    yield Case(CV, "enlarged-37x45", convolution(40, 35, 37, 45, N=2, C2=24, upsample=2, norm="silu", plain=False))
    for padding in (0, 2):
        strided = convolution(40, 35, 81, 75, N=2, C2=24, stride=2, padding=padding, sliced=True, plain=False)
        yield Case(CV, f"strided-padding-{padding}", strided)
    # by tiles: regions of a thread's own, several images a region, blocks of the depth
    yield Case(CV, "regions-70x150", convolution(40, 35, 70, 150, C2=24, norm="silu", plain=False))
    yield Case(CV, "regions-stride-2", convolution(33, 35, 150, 130, stride=2, plain=False))
    yield Case(CV, "images-40x37", convolution(1152, 64, 40, 37, N=3, norm="affine"), big=True)
    yield Case(CV, "deep-12x13", convolution(1824, 33, 12, 13, C2=3, plain=False))
    for sliced in (False, True):  # a 1x1 with nothing folded into it is a linear layer where pixels lie close
        pixels = convolution(40, 35, 9, 7, N=2, k=1, output_scale=0.7, sliced=sliced)
        yield Case(CV, f"pixels-{'sliced' if sliced else 'dense'}", pixels)
        yield Case(CV, f"latents-{'sliced' if sliced else 'dense'}", convolution(4, 4, 9, 13, N=2, k=1, sliced=sliced))
    for k in (1, 3):
        yield from _of_kernel(k)


def _of_kernel(k):
    for name, weights in (("stock", None), ("last", channels_last), ("other", lambda w: w.mT.contiguous().mT)):
        yield Case(CV, f"weight-{name}-{k}x{k}", convolution(33, 48, 9, 10, k=k, weights=weights, C2=7, plain=False))
    for stride in (2, 3):
        yield Case(CV, f"stride-{stride}-{k}x{k}", convolution(48, 40, 11, 14, k=k, stride=stride, plain=False))
    for padding in (0, 1, 2):
        yield Case(CV, f"padding-{padding}-{k}x{k}", convolution(32, 40, 7, 12, k=k, padding=padding))
    enlarged = convolution(40, 33, 6, 7, k=k, upsample=2, C2=24, norm="affine", plain=False)
    yield Case(CV, f"upsample-{k}x{k}", enlarged)
    yield Case(CV, f"upsample-stride-2-{k}x{k}", convolution(32, 32, 5, 6, k=k, upsample=2, stride=2, norm="silu"))
    yield Case(CV, f"norm-{k}x{k}", convolution(64, 48, 8, 9, N=2, k=k, norm="affine"))
    yield Case(CV, f"slices-{k}x{k}", convolution(35, 37, 9, 8, N=2, k=k, C2=5, sliced=True, plain=False))
    yield Case(CV, f"contiguous-{k}x{k}", convolution(35, 37, 9, 8, N=2, k=k, C2=5, layout=None, plain=False))
    yield Case(CV, f"one-channel-{k}x{k}", convolution(1, 1, 9, 8, k=k, C2=1, plain=False))
    yield Case(CV, f"empty-{k}x{k}", convolution(16, 8, 4, 4, N=0, k=k, plain=False, norm="silu"))
