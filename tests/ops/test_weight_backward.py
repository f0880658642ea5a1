"""conv2d_weight_backward: the gradient of a 3x3 weight within the error budget of every op's, and where it is asked.

The other instruction sets run this file, too (test_instruction_sets.py).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import FLOOR
from torch.library import opcheck

from ldmfast import ops
from ldmfast.ops import native
from ldmfast.ops.gradients import conv2d_weight_backward
from ldmfast.ops.gradients.products import SLOW
from ldmfast.ops.registry import BACKWARD_OPS

op = conv2d_weight_backward.op
SHAPES = [  # N, Ci, Co, H, W, padding
    (2, 64, 96, 16, 16, 1),  # as in training: a block of 128 tiles and no more
    (5, 48, 40, 13, 9, 1),  # several blocks, the last one short; outputs that no 2x2 fills up
    (3, 37, 41, 7, 5, 0),
    (2, 20, 70, 5, 6, 2),
    (1, 128, 16, 4, 4, 1),
    (1, 1, 1, 3, 3, 0),
    (1, 3, 5, 1, 1, 1),
]


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def sliced(x):
    """Out of a larger picture, in channels and in width."""
    larger = channels_last(F.pad(x, (1, 1, 0, 0, 1, 2), value=float("nan")))
    return larger[:, 1 : x.shape[1] + 1, :, 1 : x.shape[3] + 1]


LAYOUTS = {"contiguous": torch.Tensor.contiguous, "channels_last": channels_last, "sliced": sliced}


def given(N, Ci, Co, H, W, padding, layout=channels_last):
    torch.manual_seed(N + Ci + Co + H + W)
    around = 2 * padding - 2
    return layout(torch.randn(N, Co, H + around, W + around)), layout(torch.randn(N, Ci, H, W)), padding


def relative_error(got, true):
    return ((got.double() - true).norm() / true.norm()).item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_cpu_within_budget(shape, layout):
    dy, x, padding = given(*shape, LAYOUTS[layout])
    if reason := op.backends["cpu"].refusal((dy, x, padding)):
        pytest.skip(reason)
    true = op(dy.double(), x.double(), padding, "torch")
    got, same = op(dy, x, padding, "cpu"), op(dy, x, padding, "torch")
    assert got.shape == true.shape and got.is_contiguous()
    assert relative_error(got, true) <= 2 * relative_error(same, true) + FLOOR[torch.float32]


def test_cpu_has_one_order_of_sums():
    """Nothing of it depends on how many threads share the work."""
    threads, arguments = torch.get_num_threads(), given(3, 70, 50, 12, 12, 1)
    if reason := op.backends["cpu"].refusal(arguments):
        pytest.skip(reason)
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(op(*arguments, "cpu"))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_cpu_without_pictures_is_zero():
    dy, x = torch.empty(0, 8, 4, 4), torch.empty(0, 16, 4, 4)
    if reason := op.backends["cpu"].refusal((dy, x, 1)):
        pytest.skip(reason)
    assert torch.equal(op(dy, x, 1, "cpu"), torch.zeros(8, 16, 3, 3))


@pytest.mark.parametrize(
    "k, stride, dtype, backend, asked",
    [
        (3, 1, torch.float32, None, True),
        (3, 1, torch.float32, "cpu", True),
        (3, 1, torch.float32, "torch", False),
        (3, 2, torch.float32, None, False),
        (1, 1, torch.float32, None, False),
        (3, 1, torch.bfloat16, "cpu", torch.bfloat16 in SLOW),  # whose gradients are computed in float32
    ],
)
def test_cpu_convolutions_ask_for_it(k, stride, dtype, backend, asked, monkeypatch):
    x = channels_last(torch.randn(2, 64, 8, 8)).to(dtype)
    weight = torch.randn(64, 64, k, k, dtype=dtype, requires_grad=True)
    if reason := ops.conv2d.op.backends["cpu"].refusal(ops.conv2d.op.normalise(x, weight)):
        pytest.skip(reason)
    seen, run = [], op.backends["cpu"].run
    monkeypatch.setattr(op.backends["cpu"], "run", lambda *args: seen.append(args) or run(*args))
    y = ops.conv2d(x, weight, stride=stride, padding=k // 2, backend=backend)
    dy = channels_last(torch.randn_like(y))
    (found,) = torch.autograd.grad(y, weight, dy)
    assert bool(seen) == (asked and native.lanes() > 4)  # without vectors torch's is faster
    double = weight.detach().double().requires_grad_()
    wanted = torch.autograd.grad(F.conv2d(x.double(), double, None, stride, k // 2), double, dy.double())[0]
    assert found.dtype is dtype and relative_error(found, wanted) < 0.02


def test_cpu_leaves_pictures_to_torch():
    """Of 3 and 4 channels, that is: most of a vector would be empty."""
    dy, x = channels_last(torch.randn(2, 64, 8, 8)), channels_last(torch.randn(2, 3, 8, 8))
    assert not conv2d_weight_backward.runs(dy, x, 1)


def test_opcheck():
    opcheck(torch.ops.ldmfast.conv2d_weight_backward.default, (*given(2, 16, 24, 6, 6, 1), None))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.ones(2, 4, 8, 8), torch.ones(2, 3, 8, 8), 0), "dy has shape"),
        ((torch.ones(4, 8, 8), torch.ones(2, 3, 8, 8), 1), "expected 4 of each"),
        ((torch.ones(2, 4, 8, 8).double(), torch.ones(2, 3, 8, 8), 1), "dy"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, said):
    assert BACKWARD_OPS["conv2d_weight_backward"] is op
    with pytest.raises(ValueError, match=said):
        op(*arguments, None)
