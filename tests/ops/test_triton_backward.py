"""The Triton kernels of the gradients: their numbers under the interpreter, and the U-Net's configurations compiled.

pytest tests/ops/test_triton_backward.py                       compiles; bench/resources.py compiles all the others
TRITON_INTERPRET=1 pytest tests/ops/test_triton_backward.py    float32 and float16, against the reference in float64
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from ldmfast.kernels import attention_backward, group_norm_silu_backward  # noqa: E402
from ldmfast.ops.attention import op as attention_op  # noqa: E402
from ldmfast.ops.gradients.attention_backward import op as attention_backward_op  # noqa: E402
from ldmfast.ops.gradients.group_norm_silu_backward import op as group_norm_silu_backward_op  # noqa: E402
from ldmfast.ops.group_norm_silu import as_ncp  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1: kernels run on the CPU"
)
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")
FLOOR = {torch.float32: 1e-6, torch.float16: 2.5e-4}
NEGLIGIBLE = 0.01  # a gradient smaller than this share of the largest one is held to that share's size


def exactly(args):
    return [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]


def check(found, reference, exact, dtype):
    """Each output is at most twice as far from the float64 gradient as the reference is, and a floor.

    A gradient that is zero but for roundings (of a query with one key) is held to the largest of the others.
    """
    largest = max(value.norm().item() for value in exact)
    for y, same, true in zip(found, reference, exact, strict=True):
        assert torch.isfinite(y).all(), "not every output was written"
        norm = max(true.norm().item(), NEGLIGIBLE * largest) or 1.0
        errors = [(value.double() - true).norm().item() / norm for value in (y, same)]
        assert errors[0] <= 2 * errors[1] + FLOOR[dtype], errors


def poisoned(like, dtype=None):
    return torch.full_like(like, float("nan"), dtype=dtype)


GROUP_NORMS = {  # C, groups, H, W, channels_last, launches, dtype, with add, scale and shift
    "one tile": (80, 8, 4, 5, True, 1, torch.float16, True),
    "channels loop": (80, 8, 32, 64, False, 1, torch.float32, False),
    "split, contiguous": (40, 2, 56, 48, False, 4, torch.float16, True),
    "split, channels_last": (99, 3, 29, 29, True, 4, torch.float32, True),
}


@interpreted
@pytest.mark.parametrize("name", GROUP_NORMS)
def test_group_norm_silu_backward(name):
    C, groups, H, W, last, launches, dtype, modulated = GROUP_NORMS[name]
    config = group_norm_silu_backward.configuration(1, C, H * W, groups, last)
    assert config.split == (launches == 4)
    layout = torch.channels_last if last else torch.contiguous_format
    x = (torch.randn(1, C + 3, H, W) + 2).to(dtype).contiguous(memory_format=layout)[:, 3:]  # sliced
    dy = torch.randn(1, C, H, W).to(dtype).contiguous(memory_format=layout)
    weight, bias, *rows = (torch.randn(*shape).to(dtype) for shape in [(C,)] * 2 + [(1, C)] * 3)
    rows = rows if modulated else [None] * 3
    dx, sums = poisoned(dy), torch.full((3, 1, C), float("nan"))
    x, channels_last, strides = as_ncp(x)
    others = dx, sums, weight, bias, *rows, groups, 1e-5, True
    group_norm_silu_backward.group_norm_silu_backward(dy, x, strides, channels_last, *others)
    args = (dy, x, weight, bias, groups, 1e-5, True, *rows)
    reference = group_norm_silu_backward_op.reference
    check((dx, *sums), unstack(reference(*args)), unstack(reference(*exactly(args))), dtype)


def unstack(found):
    dx, sums = found
    return dx, *sums


def masks(kind, n, h, rows, keys, dtype):
    return {
        "none": lambda: None,
        "keys": lambda: torch.rand(n, 1, 1, keys) > 0.3,
        "dead rows": lambda: (torch.rand(1, h, rows, keys) > 0.5) & (torch.arange(rows)[:, None] % 3 > 0),
        "added": lambda: torch.randn(n, 1, rows, keys).to(dtype),
        "lowest": lambda: torch.full((1, 1, 1, keys), torch.finfo(dtype).min, dtype=dtype),
    }[kind]()


@interpreted
@pytest.mark.parametrize(
    "shape, mask, dtype, scale",
    [
        ((2, 70, 37, 2, 40), "none", torch.float16, None),
        ((1, 35, 33, 2, 40), "dead rows", torch.float16, None),
        ((1, 35, 33, 2, 40), "dead rows", torch.float32, None),
        ((2, 5, 19, 2, 40), "keys", torch.float16, -0.3),
        ((1, 20, 33, 2, 24), "added", torch.float32, None),
        ((1, 33, 7, 2, 64), "lowest", torch.float32, None),
        ((1, 3, 1, 3, 160), "none", torch.float16, None),
        ((1, 33, 35, 1, 80), "none", torch.float32, None),
        ((1, 600, 3, 1, 24), "added", torch.float16, None),  # two programs share the queries
    ],
    ids=str,
)
def test_attention_backward(shape, mask, dtype, scale):
    n, rows, keys, h, d = shape
    scale = d**-0.5 if scale is None else scale
    projected = torch.randn(n, keys, 2, h, d + 1)[..., :d].to(dtype)  # one projection, with an odd stride
    q, dout, (k, v) = torch.randn(n, rows, h, d).to(dtype), torch.randn(n, rows, h, d).to(dtype), projected.unbind(2)
    mask = masks(mask, n, h, rows, keys, dtype)
    out = attention_op.reference(q, k, v, scale, mask)
    found = [poisoned(torch.empty(like.shape, dtype=dtype)) for like in (q, k, v)]
    expanded = None if mask is None else mask.expand(n, h, rows, keys)
    attention_backward.attention_backward(dout, q, k, v, out, *found, expanded, scale)
    reference = attention_backward_op.reference(dout, q, k, v, out, scale, mask)
    exact = exactly((dout, q, k, v))
    exact_mask = mask if mask is None or mask.dtype is torch.bool else mask.double()
    exact_out = attention_op.reference(*exact[1:], scale, exact_mask)
    check(found, reference, attention_backward_op.reference(*exact, exact_out, scale, exact_mask), dtype)


@compiled
@pytest.mark.parametrize(
    "op, label, arch, kernels",
    [
        ("group_norm_silu_backward", "[2, 320, 64, 64] bfloat16", 90, 5),  # contiguous in one launch, the other in four
        ("attention_backward", "40] x 4096 bfloat16", 80, 3),
        ("attention_backward", "[2, 256, 8, 160] x 256 bfloat16", 80, 4),
        ("attention_backward", "[2, 4096, 8, 160] x 77 bfloat16 key mask", 80, 4),
    ],
)
def test_the_unets_configurations_compile_and_fit(op, label, arch, kernels):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    import resources

    launches = [launch for launch in resources.triton_launches([op]) if label in launch.label]
    usages = [resources.triton_usage(launch, arch) for launch in launches]
    assert len(usages) == kernels
    assert not [usage for usage in usages if usage.spill]
    assert all(usage.shared <= {80: 99, 90: 227}[arch] << 10 for usage in usages)
