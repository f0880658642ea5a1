"""The cases of the norms, group_norm_silu, group_norm_affine and layer_norm, for tests/cases.py."""

from __future__ import annotations

import torch
from case import Case, channels_last, randn

GN, GA, LN = "group_norm_silu", "group_norm_affine", "layer_norm"


def group_norm(
    C,
    H,
    W,
    *,
    N=2,
    groups=32,
    layout=None,
    mean=0.0,
    add=False,
    modulate=False,
    float_params=False,
    affine=True,
    silu=True,
    sliced=None,
    eps=1e-5,
    outlier=None,
):
    def make(dtype, N=N):
        x = randn(N, C, H, W, dtype=dtype, mean=mean)
        if sliced == "channels":
            wide = randn(N, 2 * C, H, W, dtype=dtype, mean=mean)
            x = (layout(wide) if layout else wide)[:, C // 2 : C // 2 + C]
        elif sliced == "odd":  # channels that begin where no access of 4 or 16 bytes can
            wide = randn(N, C + 2, H, W, dtype=dtype, mean=mean)
            x = (layout(wide) if layout else wide)[:, 1 : C + 1]
        elif sliced == "column":  # a row, transposed: it is contiguous, and the stride of its one column is not 1
            x = randn(N, C, W, H, dtype=dtype, mean=mean).transpose(2, 3)
        elif sliced == "batch":
            x = randn(2 * N, C, H, W, dtype=dtype, mean=mean)[::2]
        elif sliced == "width":
            x = randn(N, C, H, W + 3, dtype=dtype, mean=mean)[..., 1 : W + 1]
        elif layout:
            x = layout(x)
        if outlier:  # in each first pixel, about which a kernel might sum
            x[:, :, 0, 0] *= outlier
        param = torch.float32 if float_params else dtype
        weight, bias = (randn(C, dtype=param), randn(C, dtype=param)) if affine else (None, None)
        kwargs = {"silu": silu, "eps": eps}
        if add:
            kwargs["add"] = randn(N, C, dtype=dtype)
        if modulate:  # as chunk(2, dim=1) of one projection gives them
            kwargs["scale"], kwargs["shift"] = randn(N, 2 * C, dtype=dtype).chunk(2, dim=1)
        return (x, weight, bias, groups), kwargs

    return make


def group_norm_parts(C, H, W, *, C2=0, N=2, groups=4, modulate=False, layout=channels_last, sliced=False, outlier=None):
    def make(dtype, N=N):
        def picture(C):
            x = layout(randn(N, C + sliced, H, W + 3 * sliced, dtype=dtype, mean=0.5))
            return x[:, sliced:, :, : W or None]

        x, C_ = picture(C), C + C2
        if outlier:  # in each first pixel, about which a kernel might sum
            x[:, :, 0, 0] *= outlier
        named = {"eps": 1e-3, **({"x2": picture(C2)} if C2 else {})}
        if modulate:
            named["scale"], named["shift"] = randn(N, 2 * C_, dtype=dtype).chunk(2, dim=1)
        return (x, randn(C_, dtype=dtype), randn(C_, dtype=dtype), groups), named

    return make


def rows(*leading, K, affine=True, sliced=0, mean=0.0):
    def make(dtype, N=leading[0]):
        x = randn(N, *leading[1:], K + sliced, dtype=dtype, mean=mean)[..., :K]
        return (x, *(randn(K, dtype=dtype) if affine else None for _ in "wb")), {}

    return make


def norm_cases():
    for C, size in ((320, 64), (640, 32), (960, 32), (1280, 16), (1920, 16), (2560, 8)):
        for name, layout in (("contiguous", None), ("channels_last", channels_last)):
            yield Case(GN, f"C{C}-{size}x{size}-{name}", group_norm(C, size, size, layout=layout), big=size > 8)
            small = 8 if C <= 640 else 4
            yield Case(GN, f"C{C}-{small}x{small}-{name}", group_norm(C, small, small, layout=layout))
    for name, layout in (("contiguous", None), ("channels_last", channels_last)):
        yield Case(GN, f"odd-13x7-{name}", group_norm(320, 13, 7, layout=layout))
        yield Case(GN, f"1x1-{name}", group_norm(320, 1, 1, layout=layout))
        yield Case(GN, f"off-centre-{name}", group_norm(320, 8, 8, layout=layout, mean=300.0))
        yield Case(GN, f"off-centre-large-{name}", group_norm(320, 64, 64, layout=layout, mean=300.0), big=True)
        yield Case(GN, f"outlier-{name}", group_norm(320, 12, 13, layout=layout, outlier=1000.0))
        far = group_norm(32, 48, 48, N=1, layout=layout, mean=3.0, outlier=100.0)  # one channel a group
        yield Case(GN, f"first-pixel-{name}", far)
        yield Case(GN, f"add-{name}", group_norm(640, 5, 5, layout=layout, add=True))
        yield Case(GN, f"modulated-{name}", group_norm(320, 6, 7, layout=layout, modulate=True))
        yield Case(GN, f"everything-{name}", group_norm(96, 9, 5, layout=layout, add=True, modulate=True, eps=1e-6))
        yield Case(GN, f"float-params-{name}", group_norm(320, 8, 8, layout=layout, float_params=True))
        yield Case(GN, f"no-affine-no-silu-{name}", group_norm(64, 8, 8, layout=layout, affine=False, silu=False))
        yield Case(GN, f"channel-slice-{name}", group_norm(320, 7, 9, layout=layout, sliced="channels"))
        yield Case(GN, f"empty-{name}", group_norm(320, 8, 8, N=0, layout=layout))
        yield Case(GN, f"odd-group-{name}", group_norm(21, 5, 3, groups=7, layout=layout))
        yield Case(GN, f"one-group-{name}", group_norm(24, 5, 3, groups=1, layout=layout))
        for side in (4, 13):
            wide = group_norm(1280, side, side, groups=1, layout=layout, sliced="odd")
            yield Case(GN, f"one-group-odd-slice-{side}x{side}-{name}", wide)
    yield Case(GN, "batch-slice", group_norm(320, 8, 8, sliced="batch"))
    yield Case(GN, "width-slice", group_norm(320, 8, 8, sliced="width"))
    yield Case(GN, "transposed-row", group_norm(64, 9, 1, sliced="column"))
    yield from _parts()
    yield from _rows()


def _parts():
    yield Case(GA, "up-block-32x32", group_norm_parts(640, 32, 32, C2=320, groups=32), big=True)
    yield Case(GA, "alone", group_norm_parts(64, 9, 7))
    yield Case(GA, "parts", group_norm_parts(40, 20, 11, C2=24, modulate=True))
    yield Case(GA, "slices", group_norm_parts(35, 6, 5, C2=9, modulate=True, sliced=True))
    yield Case(GA, "contiguous", group_norm_parts(20, 6, 5, C2=4, layout=torch.Tensor.contiguous))
    yield Case(GA, "one-pixel", group_norm_parts(32, 1, 1, C2=32))
    yield Case(GA, "one-channel", group_norm_parts(1, 5, 4, C2=1, groups=1))
    yield Case(GA, "outlier", group_norm_parts(48, 16, 17, outlier=30.0))
    yield Case(GA, "empty", group_norm_parts(16, 4, 4, N=0))


def _rows():
    yield Case(LN, "tokens-1024x640", rows(2, 1024, K=640), big=True)
    yield Case(LN, "odd", rows(3, 7, K=45, sliced=3))
    yield Case(LN, "no-affine", rows(2, 5, K=96, affine=False))
    yield Case(LN, "large-mean", rows(2, 9, K=100, mean=20.0))
    yield Case(LN, "one-element", rows(4, 3, K=1))
    yield Case(LN, "empty", rows(0, 3, K=32))
