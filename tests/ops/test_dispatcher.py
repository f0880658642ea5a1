"""When a call asks PyTorch's dispatcher, and when it leaves it out (ldmfast/ops/dispatcher.py)."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ldmfast import ops
from ldmfast.ops.dispatcher import dispatcher_needed


class Wrapped(torch.Tensor):
    pass


def latents():
    torch.manual_seed(0)
    return torch.randn(1, 4, 6, 6), torch.randn(2, 4, 6, 6)


@contextlib.contextmanager
def dispatch_mode():
    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Passing():
        yield


WATCHERS = {
    "dispatch mode": dispatch_mode,
    "function mode": lambda: torch.device("cpu"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward mode": forward_ad.dual_level,
    "profiler": torch.autograd.profiler.profile,
}


@pytest.mark.parametrize("name", WATCHERS)
def test_who_looks_on_is_noticed(name):
    args = *latents(), None, 1.0
    assert not dispatcher_needed(args)
    with WATCHERS[name]():
        assert dispatcher_needed(args)
    assert not dispatcher_needed(args)


def test_functorch_is_noticed():
    seen = []

    def each(x):
        seen.append(dispatcher_needed((x,)))
        return 2 * x

    torch.func.vmap(each)(torch.randn(3, 4))
    assert seen == [True]


def test_tracing_is_noticed():
    seen = []

    def step(x):
        seen.append(dispatcher_needed((x,)))
        return 2 * x

    torch.jit.trace(step, torch.randn(3), check_trace=False)
    assert seen == [True]


@pytest.mark.parametrize(
    ("make", "with_grad", "without"),
    [
        (lambda x: x, False, False),
        (torch.nn.Parameter, True, False),
        (lambda x: x.requires_grad_(), True, False),
        (lambda x: x.to("meta"), True, True),
        (torch._neg_view, True, True),
        (lambda x: x.as_subclass(Wrapped), True, True),
    ],
    ids=["plain", "parameter", "gradient", "meta", "negated", "subclass"],
)
def test_what_a_tensor_needs(make, with_grad, without):
    args = None, make(torch.randn(3)), "cpu"
    assert dispatcher_needed(args) is with_grad
    with torch.no_grad():
        assert dispatcher_needed(args) is without


@pytest.mark.parametrize("backend", [None, "torch"])
def test_both_ways_give_the_same(backend):
    sample, output = latents()
    direct = ops.ddim_step(sample, output, 0.3, 0.6, guidance=7.5, backend=backend)
    with dispatch_mode():
        asked = ops.ddim_step(sample, output, 0.3, 0.6, guidance=7.5, backend=backend)
    for mine, theirs in zip(direct, asked, strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()


def test_use_backend_is_heard():
    sample, output = latents()
    with ops.use_backend("cuda"), pytest.raises(NotImplementedError, match="backend cuda refuses"):
        ops.ddim_step(sample, output, 0.3, 0.6, guidance=7.5)


def test_gradient_and_inference():
    sample, output = latents()
    ops.ddim_step(sample, output.requires_grad_(), 0.3, 0.6, guidance=7.5)[0].sum().backward()
    assert output.grad.abs().sum() > 0
    with torch.no_grad():
        assert not ops.ddim_step(sample, output, 0.3, 0.6, guidance=7.5)[0].requires_grad
    with torch.inference_mode():
        assert ops.ddim_step(sample, output, 0.3, 0.6, guidance=7.5)[0].is_inference()


def test_compile_sees_one_graph():
    sample, output = latents()

    def step(x, m):
        return ops.ddim_step(x, m, 0.3, 0.6, guidance=7.5)[0]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(sample, output), step(sample, output))
