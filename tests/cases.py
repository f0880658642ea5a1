"""Shapes and inputs on which every backend of every op is checked, and the error budget.

An output passes when its error against the float64 reference is at most twice that of the reference computed in the
output's own dtype, plus a floor: err(y) <= 2 * err(reference(x)) + floor[dtype], errors as ||y - exact|| / ||exact||
and the exact value computed from the inputs as rounded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from around_cases import around_cases
from case import Case, channels_last, randn
from norm_cases import norm_cases
from product_cases import convolution_cases, linear_cases, projection_cases

from ldmfast import ops
from ldmfast.ops.registry import BACKWARD_OPS, OPS, RANKS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}


def heads(N, L, S, H, D, *, mask=None, fused=False, scale=None, spread=1.0):
    def make(dtype, N=N):
        if fused:  # q, k, v as slices of one projection
            q, k, v = randn(N, L, 3 * H * D, dtype=dtype).view(N, L, 3, H, D).unbind(2)
        else:
            q, k, v = randn(N, L, H, D, dtype=dtype, std=spread), *(randn(N, S, H, D, dtype=dtype) for _ in "kv")
        kwargs = {} if scale is None else {"scale": scale}
        if mask == "keys":
            kwargs["mask"] = torch.rand(N, S) > 0.3
        elif mask == "dead":
            kwargs["mask"] = torch.rand(N, S) > 0.3
            kwargs["mask"][0] = False
        elif mask == "additive":
            kwargs["mask"] = randn(N, H, L, S, dtype=dtype, std=3.0)
        elif mask == "bias":  # what diffusers' UNet makes of an attention mask
            kwargs["mask"] = (torch.rand(N, 1, 1, S) > 0.5).to(dtype) * -10000.0
        elif mask == "causal":
            kwargs["mask"] = torch.ones(L, S).tril().bool()[None, None]
        return (q, k, v), kwargs

    return make


def no_keys(dtype, N=2):
    """Queries whose layout the zeros that come out must not have."""
    return (randn(N, 2, 16, 40, dtype=dtype).transpose(1, 2), *(randn(N, 0, 2, 40, dtype=dtype) for _ in "kv")), {}


def timesteps(N, dim, F, E, *, kind=torch.int64, bias=True, **kwargs):
    def make(dtype, N=N):
        t = torch.randint(0, 1000, (N,)) if kind is torch.int64 else torch.rand(N) * 999
        b1, b2 = (randn(F, dtype=dtype), randn(E, dtype=dtype)) if bias else (None, None)
        w1, w2 = randn(F, dim, dtype=dtype, std=dim**-0.5), randn(E, F, dtype=dtype, std=max(F, 1) ** -0.5)
        return (t.to(kind), w1, b1, w2, b2), {"dim": dim, **kwargs}

    return make


def latents(*shape, guided=True, layout=None, alphas=(0.3, 0.5), noise=False, **kwargs):
    def make(dtype, N=shape[0]):
        sample = randn(N, *shape[1:], dtype=dtype)
        output = randn((2 if guided else 1) * N, *shape[1:], dtype=dtype)
        if layout:
            sample, output = layout(sample), layout(output)
        named = {"guidance": 7.5 if guided else None, **kwargs}
        if noise:
            named |= {"noise": randn(N, *shape[1:], dtype=dtype), "sigma": 0.2}
        alpha_t, alpha_prev = alphas
        if alphas[0] == "table":
            alpha_t, alpha_prev = torch.linspace(0.2, 0.5, N), torch.linspace(0.5, 0.9, N)
        return (sample, output, alpha_t, alpha_prev), named

    return make


def rows(*shape, picked=(3,), terms=0, noise=False, **kwargs):
    """The rows of a table that are named, one for all or one a sample; terms: of a multistep method."""

    def make(dtype, N=shape[0]):
        table = torch.rand(7, 7).to(torch.promote_types(dtype, torch.float32)) + 0.2
        named = {"guidance": 7.5, "table": table, "row": torch.tensor(picked[:N]), **kwargs}
        named |= {"noise": randn(N, *shape[1:], dtype=dtype)} if noise else {}
        if terms:
            named |= {"weights": (1.9, -0.7, 0.4, -0.3)[:terms]}
            named |= {"history": [randn(N, *shape[1:], dtype=dtype) for _ in range(terms - 1)]}
        return (randn(N, *shape[1:], dtype=dtype), randn(2 * N, *shape[1:], dtype=dtype)), named

    return make


def _cases():
    AT, TM, DD = "attention", "timestep_mlp", "ddim_step"
    yield Case(AT, "self-4096x40", heads(1, 4096, 4096, 2, 40), big=True)
    yield Case(AT, "self-1024x80", heads(2, 1024, 1024, 2, 80), big=True)
    yield Case(AT, "cross-4096x77x40", heads(2, 4096, 77, 2, 40), big=True)
    for D in (8, 24, 32, 40, 48, 64, 80, 96, 128, 160, 256):
        yield Case(AT, f"self-67x{D}", heads(1, 67, 67, 2, D))
        yield Case(AT, f"cross-50x77x{D}", heads(2, 50, 77, 1, D))
    for D in (20, 33, 384, 512):
        yield Case(AT, f"width-{D}", heads(1, 19, 35, 1, D))
    yield Case(AT, "1x1", heads(2, 1, 1, 3, 40))
    yield Case(AT, "one-key", heads(2, 33, 1, 3, 40))
    yield Case(AT, "fused-qkv", heads(2, 64, 64, 2, 40, fused=True))
    yield Case(AT, "empty-batch", heads(0, 16, 16, 2, 40))
    yield Case(AT, "no-queries", heads(2, 0, 16, 2, 40))
    yield Case(AT, "no-keys", heads(2, 16, 0, 2, 40))
    yield Case(AT, "no-keys-heads-first", no_keys)
    for scale, name in (
        (0.5, "scaled"),
        (0.0, "scale-0"),
        (-0.5, "scale-negative"),
    ):  # 65 keys: the last block is padded
        yield Case(AT, name, heads(1, 33, 65, 2, 40, scale=scale))
    yield Case(AT, "peaked", heads(1, 33, 130, 2, 64, spread=12.0))
    for L, S, D in ((33, 300, 40), (47, 24, 32), (16, 1, 32), (130, 77, 64)):  # each query needs its own maximum
        yield Case(AT, f"sharp-{L}x{S}x{D}", heads(2, L, S, 2, D, spread=300.0))
    yield Case(AT, "sharp-additive", heads(2, 35, 77, 2, 40, mask="additive", spread=300.0))
    for mask in ("keys", "dead", "additive", "bias", "causal"):
        yield Case(AT, f"mask-{mask}", heads(2, 35, 77, 2, 40, mask=mask))
    # several blocks of keys, whose maxima differ; panels and tiles with 16 rows or keys, and one more or fewer
    for L, S, D in ((97, 300, 40), (49, 145, 33), (47, 144, 96), (16, 272, 15), (15, 129, 16), (129, 257, 17)):
        yield Case(AT, f"blocks-{L}x{S}x{D}", heads(1, L, S, 2, D, spread=4.0))
    yield Case(AT, "shared-queries-520x20x16", heads(1, 520, 20, 1, 16))  # by two blocks, in the gradient of CUDA C++
    yield Case(AT, "blocks-causal", heads(1, 300, 300, 2, 40, mask="causal"))
    yield Case(AT, "blocks-additive", heads(2, 70, 300, 2, 48, mask="additive"))
    yield Case(AT, "blocks-scale-negative", heads(1, 33, 290, 2, 40, scale=-0.5))

    yield Case(TM, "sd15", timesteps(2, 320, 1280, 1280))
    yield Case(TM, "float-t", timesteps(3, 320, 640, 320, kind=torch.float32))
    yield Case(TM, "batch-17", timesteps(17, 64, 96, 80))
    yield Case(TM, "odd", timesteps(2, 33, 45, 27, flip_sin_to_cos=False, downscale_freq_shift=1.0))
    yield Case(TM, "wide", timesteps(2, 32, 2304, 8))  # more inputs than a block stages at a time
    yield Case(TM, "no-bias", timesteps(2, 32, 64, 64, bias=False, max_period=100.0))
    yield Case(TM, "no-hidden-layer", timesteps(2, 32, 0, 64))
    yield Case(TM, "empty", timesteps(0, 32, 64, 64))

    yield Case(DD, "sd15", latents(1, 4, 64, 64))
    yield Case(DD, "odd", latents(3, 4, 7, 5))
    yield Case(DD, "unguided", latents(2, 4, 9, 9, guided=False))
    yield Case(DD, "channels-last", latents(2, 4, 8, 8, layout=channels_last))
    yield Case(DD, "noise", latents(2, 4, 8, 8, noise=True))
    yield Case(DD, "clip", latents(2, 4, 8, 8, clip=1.0))
    yield Case(DD, "table", latents(3, 4, 8, 8, alphas=("table", None)))
    yield Case(DD, "row", rows(2, 4, 8, 8, noise=True))
    yield Case(DD, "rows", rows(3, 4, 7, 5, picked=(6, 0, 4), clip=1.0))
    for terms in (1, 2, 4):
        yield Case(DD, f"multistep-{terms}", rows(2, 4, 7, 5, terms=terms, noise=terms == 2, clip=2.0))
    yield Case(DD, "last-step", latents(2, 4, 8, 8, alphas=(0.998, 1.0)))
    yield Case(DD, "empty", latents(0, 4, 8, 8))
    for prediction in ("v_prediction", "sample"):
        yield Case(DD, prediction, latents(2, 4, 8, 8, prediction=prediction, noise=True))


CASES = (*norm_cases(), *_cases(), *linear_cases(), *projection_cases(), *convolution_cases(), *around_cases())

# What the tests of the contract take: a small case of each op, with most of its optional arguments, ...
SMALL_LABELS = {
    "group_norm_silu": "everything-contiguous",
    "attention": "mask-additive",
    "timestep_mlp": "odd",
    "ddim_step": "noise",
    "group_norm_affine": "slices",
    "layer_norm": "odd",
    "linear": "everything-geglu",
    "conv2d": "everything-13x7",
    "qkv_projection": "odd-3",
    "geglu": "odd",
    "bias_residual": "everything-last",
    "residual_layer_norm": "odd",
}
SMALL = {case.op: case for case in CASES if SMALL_LABELS.get(case.op) == case.label}
# ... and for gradcheck, which differentiates by differences, a tiny one in float64
TINY: dict[str, Callable[[], tuple[tuple, dict]]] = {
    "group_norm_silu": lambda: ((f64(2, 4, 2, 2), f64(4), f64(4), 2), {"add": f64(2, 4), "scale": f64(2, 4)}),
    "attention": lambda: ((f64(1, 3, 2, 4), f64(1, 2, 2, 4), f64(1, 2, 2, 4)), {"mask": f64(3, 2)}),
    "timestep_mlp": lambda: ((f64(2), f64(4, 4), f64(4), f64(3, 4), f64(3)), {"dim": 4}),
    "ddim_step": lambda: ((f64(2, 3), f64(4, 3), 0.3, 0.6), {"guidance": 3.0, "noise": f64(2, 3), "sigma": 0.2}),
    "group_norm_affine": lambda: ((f64(2, 3, 2, 2), f64(4), f64(4), 2), {"x2": f64(2, 1, 2, 2), "scale": f64(2, 4)}),
    "layer_norm": lambda: ((f64(3, 4), f64(4), f64(4)), {}),
    "linear": lambda: ((f64(3, 4), f64(2, 4), f64(2)), {"output_scale": 0.7}),
    "conv2d": lambda: ((f64(2, 3, 4, 3), f64(2, 3, 3, 3), f64(2)), {"padding": 1, "stride": 2}),
    "qkv_projection": lambda: ((f64(3, 4), f64(2, 4), f64(2, 4)), {"layer_norm": (f64(4), None, 1e-5)}),
    "geglu": lambda: ((f64(3, 8),), {}),
    "bias_residual": lambda: ((f64(2, 3, 2, 2), f64(3)), {"residual": f64(2, 3, 2, 2), "output_scale": 0.7}),
    "residual_layer_norm": lambda: ((f64(3, 4), f64(3, 4), f64(4), f64(4)), {}),
}
# arguments, by their place, whose gradient the backward op does not give: the reference does
WITHOUT_GRADIENT = {"attention": {4}, "timestep_mlp": {0}, "ddim_step": {3}}


def f64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def names(op):
    """Of the operator's arguments, without the backend's."""
    return [argument.name for argument in getattr(torch.ops.ldmfast, op.name).default._schema.arguments][:-1]


def backward_inputs(name, arguments, grads):
    """The arguments of the gradient's op: the outputs' gradients, the forward's arguments, and outputs that it kept."""
    op = OPS[name]
    forward, grads = dict(zip(names(op), arguments, strict=True)), iter(grads)
    outputs = iter(()) if not op._keeps_output else iter(tuples(op.reference(*arguments)))
    missing = itertools.chain(grads, outputs)
    return [forward[n] if n in forward else next(missing) for n in names(BACKWARD_OPS[f"{name}_backward"])]


def home(backend: str) -> str:
    """The kind of device to run it on here."""
    return next(op.backends[backend].home for op in OPS.values() if backend in op.backends)


def emulated(backend: str) -> bool:
    """Whether it runs on the CPU here what was written for a GPU."""
    found = next(op.backends[backend] for op in OPS.values() if backend in op.backends)
    return RANKS[backend] < 0 or bool(found.devices) and "cuda" in found.devices and found.home == "cpu"


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    norm = exact.norm().item()
    return (y.double() - exact).norm().item() / norm if norm else y.double().norm().item()


def exactly(arguments):
    """The arguments in float64: what they say after rounding."""
    return [
        value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in arguments
    ]


def tuples(value):
    return value if isinstance(value, tuple) else (value,)


def errors(case: Case, dtype: torch.dtype, backend: str) -> tuple[float, float]:
    """(worst error over the outputs, its budget). Raises AssertionError if an output's shape or dtype is wrong."""
    torch.manual_seed(sum(map(ord, case.label)))
    args, kwargs = case.make(dtype)
    op = OPS[case.op]
    arguments = op.normalise(*args, **kwargs)
    wanted = tuples(op.reference(*arguments))
    exact = tuples(op.reference(*exactly(arguments)))
    outputs = tuples(getattr(ops, case.op)(*args, **kwargs, backend=backend))
    worst = (0.0, 1.0)
    for y, same, true in zip(outputs, wanted, exact, strict=True):
        assert y.shape == true.shape and y.dtype == same.dtype, (y.shape, y.dtype)
        assert y.stride() == same.stride() or y.numel() < 2, f"strides {y.stride()}, expected {same.stride()}"
        pair = relative_error(y, true), 2 * relative_error(same, true) + FLOOR[dtype]
        worst = max(worst, pair, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else float("inf"))
    return worst
