"""What is noted of a call that came twice (dispatcher.SeenCalls): found without a signature, and never for another."""

from __future__ import annotations

import functools
import math
import weakref

import pytest
import torch
from test_dispatcher import WATCHERS

import ldmfast
from ldmfast import ops
from ldmfast.ops import dispatcher, operator
from ldmfast.ops.registry import OPS, choose_anew


@pytest.fixture(autouse=True)
def without_plans():
    choose_anew()
    yield
    choose_anew()


def noted(name):
    return sum(map(len, OPS[name].plans.noted.values()))


def test_a_call_that_came_twice_needs_no_signature(monkeypatch):
    """The fourth is found without one; one that differs in a value, a size or a stride is not."""
    x, row = torch.randn(2, 8, 4, 4), torch.randn(8)
    call = functools.partial(ops.group_norm_silu, backend="cpu")
    for _ in range(3):
        wanted = call(x, row, row.clone(), 2)
    assert noted("group_norm_silu") == 1
    asked, signature = [], operator.signature
    monkeypatch.setattr(operator, "signature", lambda args: asked.append(args) or signature(args))
    assert torch.equal(call(x.clone(), row, row.clone(), 2), wanted) and not asked
    others = [
        ((x.contiguous(memory_format=torch.channels_last), row, row.clone(), 2), {}),
        ((x[:, :, :, :3], row, row.clone(), 2), {}),
        ((x, row, row.clone(), 4), {}),
        ((x, row, None, 2), {}),
        ((x, row, row.clone(), 2), {"eps": 1e-2}),
        ((x, row, row.clone(), 2), {"add": torch.randn(2, 8)}),
        ((x.bfloat16(), row, row.clone(), 2), {}),
    ]
    for count, (args, named) in enumerate(others, 1):
        assert torch.equal(call(*args, **named), OPS["group_norm_silu"].run(*arguments(*args, **named), "cpu"))
        assert len(asked) >= count


def calls_in(watcher):
    """How a function of x is called while this watches."""
    if watcher in ("vmap", "grad", "jvp"):
        return {
            "vmap": lambda f: lambda x: torch.func.vmap(f)(x[None]),
            "grad": lambda f: torch.func.grad(lambda x: f(x).sum()),
            "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
        }[watcher]

    def within(f):
        def call(x):
            with WATCHERS[watcher]():
                return f(x)

        return call

    return within


@pytest.mark.parametrize("contract", ["fast", "exact"])
@pytest.mark.parametrize("watcher", [*WATCHERS, "vmap", "grad", "jvp"])
def test_what_is_noted_is_not_for_who_looks_on(watcher, contract, monkeypatch):
    """A call that is noted is found only where nobody watches: under a mode, autocast, a transform, none is."""
    x, row, other = torch.randn(2, 8, 4, 4), torch.randn(8), torch.randn(8)
    found, look = [], dispatcher.SeenCalls.look
    monkeypatch.setattr(dispatcher.SeenCalls, "look", lambda *args: found.append(look(*args)[1]) or look(*args))

    def call(x):
        return ops.group_norm_silu(x, row, other, 2)

    with ldmfast.numerics(contract), ldmfast.fixed_order():
        for _ in range(4):
            call(x)
        assert found[-1] is not None
        found.clear()
        calls_in(watcher)(call)(x)
        assert found == [None] * len(found)
        found.clear()
        call(x)
        assert found[-1] is not None


def arguments(*args, **named):
    return OPS["group_norm_silu"].normalise(*args, **named)


def test_a_list_and_a_nan_are_compared_as_they_are_written():
    """Of a list == would say that [1] is [True]; NaN is not even itself."""
    sample, output = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 6, 6)
    past = [torch.randn(2, 4, 6, 6)]
    for _ in range(3):
        for weights in ((1.5, -0.5), [1.5, -0.5], [1.5, 0.0], [1.5, -0.0], (math.nan, 1.0)):
            named = {"table": (1.1, -0.4, 0.0, 1.0, 0.9, 0.3, 0.0), "weights": weights, "history": past}
            found = ops.ddim_step(sample, output, **named, backend="cpu")[0]
            wanted = ops.ddim_step(sample, output, **named, backend="torch")[0]
            assert torch.allclose(found, wanted, atol=1e-5, equal_nan=True)
    assert len([key for key in OPS["ddim_step"].plans if "cpu" in key[0]]) == 5
    assert sum("cpu" in entry[0] for found in OPS["ddim_step"].plans.noted.values() for entry in found) == 5


def test_a_zero_has_its_sign():
    """0.0 == -0.0, which a kernel may tell apart."""
    sample, output, table = torch.randn(2, 4, 6, 6), torch.randn(4, 4, 6, 6), (1.1, -0.4, 0.0, 1.0, 0.9, 0.3, 0.0)
    for _ in range(3):
        for guidance in (0.0, -0.0, 0.0):
            ops.ddim_step(sample, output, guidance=guidance, table=table, backend="cpu")
    kept = [entry for found in OPS["ddim_step"].plans.noted.values() for entry in found]
    assert len(OPS["ddim_step"].plans) == len(kept) == 2 and len({entry[-1] for entry in kept}) == 2


def test_without_pytorchs_comparison_every_call_has_its_signature_taken(monkeypatch):
    """It is no public part of PyTorch."""
    monkeypatch.setattr(dispatcher, "_compared", None)
    x, row = torch.randn(5, 8), torch.randn(8)
    for _ in range(4):
        assert torch.equal(ops.layer_norm(x, row, None), OPS["layer_norm"].run(x, row, None, 1e-5, None))
    assert len(OPS["layer_norm"].plans) == 1 and noted("layer_norm") == 0


def test_what_is_noted_keeps_no_tensor_and_is_bounded(monkeypatch):
    monkeypatch.setattr(dispatcher, "ALIKE", 3)
    x, row = torch.randn(5, 8), torch.randn(8)
    for eps in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        for _ in range(3):
            assert torch.equal(ops.layer_norm(x, row, None, eps), OPS["layer_norm"].run(x, row, None, eps, None))
        assert noted("layer_norm") <= 3
    gone = weakref.ref(x), weakref.ref(row)
    del x, row
    assert gone[0]() is None and gone[1]() is None
    OPS["layer_norm"].plans.clear()
    assert noted("layer_norm") == 0
