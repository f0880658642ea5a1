"""PyTorch's own operations in a fixed order, for what `exact` does not find among our ops.

On a CPU, PyTorch's kernels choose by the size of the batch and the number of threads: MKL sums a product of 1 to 3
rows in another order than one of 8; a vector of SiLU and the elements that fill no vector come from two different
exponentials, and the threads decide where a vector ends; a sum over everything is split among the threads. So while a
`fixed_order` block runs, a dispatch mode sees every operation of PyTorch below autograd, and runs

    matrix products               by our linear layer's kernel, whose rows do not know of each other
    elementwise functions         in one thread on a dense copy that is filled up to whole vectors
    what sums within a sample     sample by sample (the first dimension), each on a copy of its own, in one thread:
                                  MKL and oneDNN may also choose by alignment
    the rest                      as it is: it copies, compares, or rounds once for each element
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ldmfast.ops.contract.switch import exact, modes
from ldmfast.ops.registry import OPS

aten = torch.ops.aten
VECTORS = 256  # elements: whole vectors, two at a time, of every dtype and instruction set


@contextlib.contextmanager
def fixed_order() -> Iterator[None]:
    """PyTorch's operations of this thread obey `exact` in the block, where that is on; otherwise nothing happens.

    Models and pipelines open it themselves; it is for other parts, such as a diffusers pipeline's text encoder:

        with ldmfast.numerics("exact"), ldmfast.fixed_order():
            pictures = pipe(prompts, generator=generators).images
    """
    if not exact() or modes.count or torch.compiler.is_compiling():
        yield
        return
    with _FixedOrder():
        modes.count += 1
        try:
            yield
        finally:
            modes.count -= 1


def in_fixed_order(function: Callable) -> Callable:
    """Decorator: `function` runs in a `fixed_order` block while `exact` is on."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not exact() or modes.count:
            return function(*args, **kwargs)
        with fixed_order():
            return function(*args, **kwargs)

    return run


class _FixedOrder(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        rule = None if types or "out" in kwargs else RULES.get(func.overloadpacket)  # types: subclasses of Tensor
        x = next((a for a in args if isinstance(a, Tensor)), None)
        ruled = rule and x is not None and x.device.type == "cpu" and x.is_floating_point() and x.numel()
        modes.count -= 1  # this mode is off the stack meanwhile
        try:
            return rule(func, *args, **kwargs) if ruled else func(*args, **kwargs)
        finally:
            modes.count += 1


@contextlib.contextmanager
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- matrix products ----


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N], each row by itself."""
    op, weight = OPS["linear"], b.t()
    args = op.normalise(a, weight)
    if op.backends["cpu"].refusal(args) is None:
        op.check(*args)
        return op.backends["cpu"].run(*args)
    with _one_thread():  # float64, or no columns to sum over
        return torch.cat([aten.mm(row.clone(), b) for row in a.split(1)]) if len(a) else aten.mm(a, b)


def _added(beta, add, alpha, product):
    product = product if alpha == 1 else product * alpha
    return product if beta == 0 else product + (add if beta == 1 else add * beta)


def _mm(func, a, b):
    return _product(a, b)


def _addmm(func, add, a, b, *, beta=1, alpha=1):
    return _added(beta, add, alpha, _product(a, b))


def _bmm(func, a, b):
    return torch.stack([_product(*pair) for pair in zip(a, b, strict=True)])


def _baddbmm(func, add, a, b, *, beta=1, alpha=1):
    return _added(beta, add, alpha, _bmm(func, a, b))


def _mv(func, a, b):
    return _product(a, b[:, None])[:, 0]


def _dot(func, a, b):
    return _product(a[None], b[:, None])[0, 0]


def _distances(func, a, b, p=2.0, mode=None):
    """Never by a matrix product, which torch.cdist takes from 26 rows on."""
    with _one_thread():
        return aten._cdist_forward(a, b, p, 2)


# ---- one element at a time ----


def _elementwise(func, *args, **kwargs):
    """func on dense copies that are filled up to whole vectors with ones."""
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.dim()]
    if not places:
        return func(*args, **kwargs)
    shape = torch.broadcast_shapes(*(args[i].shape for i in places))
    like = next((args[i] for i in places if args[i].shape == shape), None)
    strides = (torch.empty(shape) if like is None else torch.empty_like(like)).stride()
    count = shape.numel()
    filled = list(args)
    for i in places:
        filled[i] = args[i].new_ones(-(-count // VECTORS) * VECTORS)
        filled[i].as_strided(shape, strides).copy_(args[i])
    with _one_thread():
        return func(*filled, **kwargs).as_strided(shape, strides)


def _in_place(rule, packet):
    return lambda func, x, *args, **kwargs: x.copy_(rule(getattr(packet, func._overloadname), x, *args, **kwargs))


def _scaled_sum(func, *args, alpha=1):
    """a + alpha * b, which a vector computes with one rounding and a single element of 16 bits with two."""
    return func(*args, alpha=alpha) if alpha in (1, -1) else _elementwise(func, *args, alpha=alpha)


# ---- a sample at a time ----


def _by_sample(func, args: tuple, kwargs: dict, places: tuple[int, ...] = (0,)) -> Any:
    """func for each index of the first dimension of args[places], on copies; the results joined along theirs."""
    with _one_thread():
        found = []
        for i in range(len(args[places[0]])):
            part = list(args)
            for place in places:
                part[place] = args[place][i : i + 1].clone()
            found.append(func(*part, **kwargs))
        if isinstance(found[0], Tensor):
            return torch.cat(found)
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def _samples(*places: int) -> Callable:
    return lambda func, *args, **kwargs: _by_sample(func, args, kwargs, places or (0,))


def _whole(func, args, kwargs):
    with _one_thread():
        return func(*args, **kwargs)


def _group_norm(func, x, weight, bias, N, C, pixels, groups, eps):
    return _by_sample(func, (x, weight, bias, 1, C, pixels, groups, eps), {})


def _layer_norm(func, x, shape, *others):
    return (_by_sample if x.dim() > len(shape) else _whole)(func, (x, shape, *others), {})


def _reduction(func, *args, **kwargs):
    """Over what is named `dim`, or everything where nothing is."""
    x, names = args[0], [argument.name for argument in func._schema.arguments]
    named = dict(zip(names, args, strict=False)) | kwargs
    dims = named.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    within = bool(dims) and x.dim() > 1 and all(dim % x.dim() for dim in dims)
    return (_by_sample if within else _whole)(func, args, kwargs)


def _attention(func, q, k, v, *others, attn_mask=None, **kwargs):
    if attn_mask is None or attn_mask.dim() < 4 or len(attn_mask) < len(q):  # none of a sample's own
        return _by_sample(func, (q, k, v, *others), {"attn_mask": attn_mask, **kwargs}, (0, 1, 2))

    def masked(q, k, v, mask):
        return func(q, k, v, *others, attn_mask=mask, **kwargs)

    return _by_sample(masked, (q, k, v, attn_mask), {}, (0, 1, 2, 3))


RULES = {
    aten.mm: _mm,
    aten.addmm: _addmm,
    aten.bmm: _bmm,
    aten.baddbmm: _baddbmm,
    aten.mv: _mv,
    aten.dot: _dot,
    aten._cdist_forward: _distances,
    aten._euclidean_dist: _distances,
    aten.add: _scaled_sum,
    aten.sub: _scaled_sum,
    aten.convolution: _samples(),
    aten.native_group_norm: _group_norm,
    aten.native_layer_norm: _layer_norm,
    aten._fused_rms_norm: _layer_norm,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten.grid_sampler_2d: _samples(0, 1),
}
_FUNCTIONS = """silu gelu sigmoid tanh exp exp2 expm1 log log2 log10 log1p sin cos tan sinh cosh asin acos atan erf erfc
erfinv pow rsqrt sqrt reciprocal softplus mish elu celu hardswish hardsigmoid leaky_relu lerp addcmul addcdiv
atan2 xlogy logaddexp""".split()
_SUMS = "sum mean prod var std var_mean std_mean linalg_vector_norm norm logsumexp _softmax _log_softmax".split()
_WITHIN = """log_sigmoid_forward upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa avg_pool2d _adaptive_avg_pool2d""".split()
for _names, _rule in ((_FUNCTIONS, _elementwise), (_SUMS, _reduction), (_WITHIN, _samples())):
    RULES |= {getattr(aten, name): _rule for name in _names}
RULES |= {
    getattr(aten, f"{name}_"): _in_place(RULES[getattr(aten, name)], getattr(aten, name))
    for name in (*_FUNCTIONS, "add", "sub")
    if hasattr(aten, f"{name}_")
}
