"""The cases of geglu, bias_residual and residual_layer_norm, which stand around a GPU's products, for cases.py."""

from __future__ import annotations

from case import Case, channels_last, randn

GG, BR, RL = "geglu", "bias_residual", "residual_layer_norm"


def halves(*leading, F, sliced=0):
    def make(dtype, N=leading[0]):
        return (randn(N, *leading[1:], 2 * F + sliced, dtype=dtype)[..., : 2 * F],), {}

    return make


def picture(N, C, *pixels, layout=None, bias=True, add=True, residual=True, other=None, **kwargs):
    """layout: of x and of the residual, which has `other` where that is given"""

    def make(dtype, N=N):
        x = randn(N, C, *pixels, dtype=dtype)
        named = dict(kwargs)
        if add:
            named["add"] = randn(N, 2 * C, dtype=dtype)[:, C:]
        if residual:
            value = randn(N, C, *pixels, dtype=dtype)
            named["residual"] = (other or layout or (lambda y: y))(value)
        return (layout(x) if layout else x, randn(C, dtype=dtype) if bias else None), named

    return make


def tokens(*leading, K, affine=True, mean=0.0, sliced=0):
    def make(dtype, N=leading[0]):
        x, residual = (randn(N, *leading[1:], K + sliced, dtype=dtype, mean=mean)[..., :K] for _ in "xr")
        weight, bias = (randn(K, dtype=dtype) if affine else None for _ in "wb")
        return (x, residual, weight, bias), {}

    return make


def sliced(x):
    """A part of a larger picture in channels_last."""
    return channels_last(randn(*x.shape[:1], x.shape[1] + 8, *x.shape[2:], dtype=x.dtype))[:, 8:]


def around_cases():
    yield Case(GG, "rows-256x1280", halves(2, 128, F=1280), big=True)
    yield Case(GG, "rows-9x64", halves(3, 3, F=64))
    yield Case(GG, "odd", halves(3, 7, F=37, sliced=3))
    yield Case(GG, "vector", halves(24, F=1))
    yield Case(GG, "long", halves(2, F=2051))
    yield Case(GG, "empty", halves(0, 5, F=8))

    yield Case(BR, "C320-16x16", picture(2, 320, 16, 16, layout=channels_last, add=False), big=True)
    for name, layout in (("contiguous", None), ("last", channels_last)):
        yield Case(BR, f"everything-{name}", picture(2, 37, 5, 7, layout=layout, output_scale=0.7))
        yield Case(BR, f"even-{name}", picture(2, 64, 4, 8, layout=layout, output_scale=-1.5))
        yield Case(BR, f"no-bias-{name}", picture(2, 16, 4, 4, layout=layout, bias=False, add=False))
        yield Case(BR, f"no-residual-{name}", picture(3, 24, 3, 4, layout=layout, residual=False))
        yield Case(BR, f"1x1-{name}", picture(2, 40, 1, 1, layout=layout))
        yield Case(BR, f"one-channel-{name}", picture(2, 1, 4, 5, layout=layout))
        yield Case(BR, f"empty-{name}", picture(0, 8, 4, 4, layout=layout))
    yield Case(BR, "another-layout", picture(2, 24, 6, 4, other=channels_last))
    yield Case(BR, "sliced", picture(2, 24, 6, 4, layout=sliced))
    yield Case(BR, "nothing", picture(2, 24, 6, 4, bias=False, add=False, residual=False))
    yield Case(BR, "rows", picture(3, 40))
    yield Case(BR, "long", picture(1, 3, 41, 53))

    yield Case(RL, "tokens-1024x640", tokens(2, 512, K=640), big=True)
    yield Case(RL, "odd", tokens(3, 7, K=45, sliced=3))
    yield Case(RL, "no-affine", tokens(2, 5, K=96, affine=False))
    yield Case(RL, "large-mean", tokens(2, 9, K=100, mean=20.0))
    for K in (320, 1280, 2592):  # in registers: 2 or 5, 5 or 10 vectors a lane; read again
        yield Case(RL, f"K{K}", tokens(5, K=K))
    yield Case(RL, "one-element", tokens(4, 3, K=1))
    yield Case(RL, "empty", tokens(0, 3, K=32))
