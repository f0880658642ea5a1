"""What a call leaves for the next one of its signature (Op._run_seen): the same numbers, and nothing overlooked."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from cases import CASES, SMALL
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from ldmfast import numerics, ops
from ldmfast.ops import native, operator
from ldmfast.ops.planning import memory as planning
from ldmfast.ops.registry import BACKWARD_OPS, OPS, Plans, choose_anew

BACKENDS = ("cpu", "cuda-host")


@pytest.fixture(autouse=True)
def without_plans():
    choose_anew()
    yield
    choose_anew()


def tuples(result):
    return result if isinstance(result, tuple) else (result,)


def calls():
    for case in CASES:
        for backend in BACKENDS:
            if not case.big and (backend == "cpu" or SMALL[case.op] is case):
                yield pytest.param(case, backend, id=f"{case.op}-{case.label}-{backend}")


@pytest.mark.parametrize("case, backend", list(calls()))
def test_other_numbers_in_the_same_places(case, backend):
    """The second call has other tensors of the same shapes and strides: it gives what a call without plans gives."""
    op = OPS[case.op]
    if backend not in op.backends:
        pytest.skip("it has no such kernel")
    torch.manual_seed(0)
    (first, named), (second, others) = case.make(torch.float32), case.make(torch.float32)
    if op.backends[backend].refusal(op.normalise(*first, **named)):
        pytest.skip("it refuses this case")
    call = functools.partial(getattr(ops, case.op), backend=backend)
    with torch.no_grad():
        before = [value.clone() for value in tuples(call(*first, **named))]
        assert len(op.plans) == 1
        found = call(*second, **others)
        assert len(op.plans) == 1  # nothing new was seen in it
        wanted = op.run(*op.normalise(*second, **others), backend)
        again = call(*first, **named)  # as it was noted, or anew where an address was not an argument's
    for mine, theirs in zip(tuples(found), tuples(wanted), strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride() and mine.dtype is theirs.dtype
    for mine, theirs in zip(tuples(again), before, strict=True):
        assert torch.equal(mine, theirs)


def is_native(op):
    """Whether the op's one plan launches without its Python."""
    (plan,) = op.plans.values()
    return plan.__module__ == planning.__name__


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_calls_of_a_network_launch_from_their_plans(backend, monkeypatch):
    """Those whose time bench/checks/host_time.py measures; here as well, nothing is launched."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "bench" / "checks"))
    import host_time

    native.module(backend).set_launching(False)
    try:
        for name, what, call in host_time.calls():
            if backend in OPS[name].backends:
                OPS[name].plans.clear()
                call(backend)
                assert is_native(OPS[name]), (name, what)
    finally:
        native.module(backend).set_launching(True)


def test_what_shares_memory_leaves_no_addresses():
    """Two arguments that begin at one address: which of them a field is of cannot be told."""
    op, (q, k) = OPS["attention"], torch.randn(2, 1, 8, 2, 16)
    with torch.no_grad():
        ops.attention(q, k, k, backend="cpu")
        assert not is_native(op)
        v = torch.randn_like(k)
        assert torch.equal(ops.attention(q, k, v, backend="cpu"), op.run(*op.normalise(q, k, v), "cpu"))
        choose_anew()
        ops.attention(q, k, v, backend="cpu")
        assert is_native(op)
        assert torch.equal(ops.attention(q, k, k, backend="cpu"), op.run(*op.normalise(q, k, k), "cpu"))


def test_a_copy_is_made_every_time():
    """A table with gaps has to be laid out anew: the copy's address is no argument's."""
    x, table = torch.randn(3, 4, 6, 6), torch.rand(3, 14)[:, ::2]
    op = OPS["ddim_step"]
    args = op.normalise(x, torch.randn(3, 4, 6, 6), table=table)
    first = op(*args, "cpu")[0].clone()
    assert not is_native(op)
    table *= 0.5
    assert not torch.equal(op(*args, "cpu")[0], first)
    assert torch.equal(op(*args, "cpu")[0], op.run(*args, "cpu")[0])


@pytest.mark.parametrize("op", list(OPS.values()), ids=lambda op: op.name)
def test_what_is_no_tensor_is_refused_beside_a_plan(op):
    """Of a call with a plan nothing is asked but its signature, in which a tensor is unlike anything else."""
    args, named = SMALL[op.name].make(torch.float32)
    arguments = [*op.normalise(*args, **named), None]
    with torch.no_grad():
        op(*arguments)
        count = len(op.plans)
        for place in [i for i, value in enumerate(arguments) if isinstance(value, torch.Tensor)]:
            for other in (3, 1.5, "x", [1.0], {}, object()):
                with pytest.raises(TypeError, match=rf"{op.name}: \w+ is {type(other).__name__}, expected a tensor"):
                    op(*arguments[:place], other, *arguments[place + 1 :])
    assert count == len(op.plans) == 1


SIGNED = [(0.0, -0.0), (1.0, 1), (True, 1), (2.0, 2.5)]


@pytest.mark.parametrize("one, other", SIGNED)
def test_numbers_that_are_equal_and_not_the_same(one, other):
    x, w = torch.randn(5, 8), torch.randn(3, 8)
    for scale in (one, other, one, other, one, other):
        y = OPS["linear"](x, w, None, None, "none", scale, None, None, None, "cpu")
        assert torch.equal(y.signbit(), ((x @ w.T) * scale).signbit())
    assert len(OPS["linear"].plans) == 2
    assert noted("linear") == 2


def noted(name):
    return sum(map(len, OPS[name].plans.noted.values()))


def test_coefficients_are_no_part_of_the_signature():
    x, output = torch.randn(1, 4, 6, 6), torch.randn(2, 4, 6, 6)
    for alpha in (0.1, 0.3, 0.9):
        found = ops.ddim_step(x, output, alpha, 0.95, guidance=7.5, backend="cpu")
        wanted = ops.ddim_step(x, output, alpha, 0.95, guidance=7.5, backend="torch")
        assert (found[0] - wanted[0]).abs().max() <= 1e-5 * wanted[0].abs().max()
    assert len([key for key in OPS["ddim_step"].plans if "cpu" in key[0]]) == 1


def test_the_choice_of_a_backend_is_heard():
    x, row = torch.randn(2, 8, 4, 4), torch.randn(8)
    call = functools.partial(ops.group_norm_silu, x, row, row.clone(), 2)
    plain = call()
    with ops.use_backend("torch"):
        assert torch.equal(call(), call(backend="torch"))
    with ops.use_backend("cuda"), pytest.raises(NotImplementedError, match="backend cuda refuses"):
        call()
    with pytest.raises(ValueError, match="unknown backend 'best'"):
        call(backend="best")
    assert torch.equal(call(), plain)


def test_the_contract_is_heard():
    x, w = torch.randn(1, 8, 8, 8).contiguous(memory_format=torch.channels_last), torch.randn(8, 8, 3, 3)
    fast = ops.conv2d(x, w, padding=1, backend="cpu")
    direct = ops.conv2d(x, w, padding=1, exact=True, backend="cpu")
    with numerics("exact"):
        assert torch.equal(ops.conv2d(x, w, padding=1, backend="cpu"), direct)
    assert torch.equal(ops.conv2d(x, w, padding=1, backend="cpu"), fast)


WRONG = [
    (lambda x, w: (x, w[:, :7]), ValueError),
    (lambda x, w: (x, w.double()), ValueError),
    (lambda x, w: (x, w.to("meta")), ValueError),
    (lambda x, w: (x, w.numpy()), TypeError),
    (lambda x, w: (x, None), TypeError),
]


@pytest.mark.parametrize("change, error", WRONG)
def test_a_wrong_call_after_a_right_one(change, error):
    x, w = torch.randn(5, 8), torch.randn(3, 8)
    ops.linear(x, w)
    with pytest.raises(error, match=r"^linear: weight"):
        ops.linear(*change(x, w))


def test_a_sparse_tensor_after_a_dense_one():
    x, w = torch.randn(5, 8), torch.randn(3, 8)
    ops.linear(x, w, backend="cpu")
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        ops.linear(x.to_sparse(), w, backend="cpu")


class Wrapped(torch.Tensor):
    pass


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def vmapped(x, w):
    return torch.func.vmap(lambda row: ops.linear(row[None], w))(x)[:, 0]


def dual(x, w):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(ops.linear(forward_ad.make_dual(x, torch.ones_like(x)), w)).primal


def within(context):
    def call(x, w):
        with context():
            return ops.linear(x, w)

    return call


def traced(x, w):
    return torch.jit.trace(ops.linear, (x, w), check_trace=False)(x, w)


LONG_WAYS = {
    "vmap": vmapped,
    "tracing": traced,
    "function mode": within(lambda: torch.device("cpu")),
    "forward mode": dual,
    "dispatch mode": within(Passing),
    "autocast": within(lambda: torch.autocast("cpu", torch.bfloat16)),
    "profiler": within(torch.autograd.profiler.profile),
    "subclass": lambda x, w: ops.linear(x.as_subclass(Wrapped), w),
    "negated": lambda x, w: -ops.linear(torch._neg_view(x), w),
}


@pytest.mark.parametrize("name", LONG_WAYS)
def test_who_watches_gets_the_long_way(name, monkeypatch):
    """A plan for these arguments is there; it is not taken, and the numbers are the same."""
    x, w = torch.randn(5, 8), torch.randn(3, 8)
    for _ in range(3):
        wanted = ops.linear(x, w)

    def taken(*args):
        raise AssertionError("a plan was taken")

    class Locked(Plans):
        get = taken

    locked, plans = Locked(), OPS["linear"].plans
    locked.update(plans)
    locked.noted = {key: [(*found, taken) for *found, _ in entries] for key, entries in plans.noted.items()}
    assert locked and locked.noted
    monkeypatch.setattr(OPS["linear"], "plans", locked)
    bound = 2e-2 if name == "autocast" else 1e-5
    assert (LONG_WAYS[name](x, w) - wanted).abs().max() <= bound * wanted.abs().max()


def test_a_meta_tensor_runs_nothing():
    x, w = torch.randn(5, 8), torch.randn(3, 8)
    ops.linear(x, w)
    assert ops.linear(x.to("meta"), w.to("meta")).is_meta


def test_autograd_and_inference_after_a_plan():
    x, w = torch.randn(5, 8), torch.randn(3, 8)
    with torch.no_grad():
        plain = ops.linear(x, w)
    with torch.inference_mode():
        assert ops.linear(x, w).is_inference()
    w.requires_grad_()
    found = ops.linear(x, w)
    assert torch.equal(found, plain)
    found.sum().backward()
    assert torch.allclose(w.grad, x.sum(0).expand(3, 8), atol=1e-5)
    assert not ops.linear(x, w.detach()).requires_grad


def test_what_is_replaced_is_asked_again(monkeypatch):
    op = OPS["layer_norm"]
    x, row = torch.randn(5, 8), torch.randn(8)
    assert not ops.layer_norm(x, row, row.clone()).isnan().any()
    monkeypatch.setattr(op.backends["cpu"], "run", lambda *args: "another kernel")
    assert ops.layer_norm(x, row, row.clone()) == "another kernel"
    monkeypatch.undo()
    assert isinstance(ops.layer_norm(x, row, row.clone()), torch.Tensor)
    monkeypatch.setattr(op, "run", lambda *args: "another run")
    assert ops.layer_norm(x, row, row.clone()) == "another run"
    monkeypatch.undo()
    condition = op.backends["cpu"].refuses(lambda *args: "not today")
    try:
        with pytest.raises(NotImplementedError, match="not today"):
            ops.layer_norm(x, row, row.clone(), backend="cpu")
    finally:
        op.backends["cpu"].conditions.remove(condition)


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(operator, "PLANS", 3)
    row = torch.randn(8)
    for count in range(1, 9):
        x = torch.randn(count, 8)
        assert torch.equal(ops.layer_norm(x, row, None), OPS["layer_norm"].run(x, row, None, 1e-5, None))
        assert len(OPS["layer_norm"].plans) <= 3


def test_every_op_has_its_own_plans():
    plans = [op.plans for op in (*OPS.values(), *BACKWARD_OPS.values())]
    assert len(set(map(id, plans))) == len(plans)
    assert all(backend.plans is op.plans for op in OPS.values() for backend in op.backends.values())


def layer_norm_fields():
    x = torch.randn(5, 8)
    common = {"M": 5, "K": 8, "stride_x": 8, "eps": 1e-5, "dtype": native.DTYPES[x.dtype]}
    return {"x": x, "y": torch.empty_like(x), "weight": None, "bias": None, **common}


def test_the_binding_of_a_prepared_call():
    extension, fields = native.module("cpu"), layer_norm_fields()
    again = extension.prepare_layer_norm(fields, ("y", "x", "eps"))
    other, out = torch.randn(5, 8), torch.empty(5, 8)
    again((out, other, 1e-3), *native.place(other))
    assert torch.allclose(out, torch.layer_norm(other, (8,), eps=1e-3), atol=1e-6)
    with pytest.raises(TypeError, match="^layer_norm: takes 3 values$"):
        again((out, other), *native.place(other))
    with pytest.raises(TypeError, match="^layer_norm: eps is of a wrong kind, expected a number$"):
        again((out, other, "small"), *native.place(other))
    with pytest.raises(TypeError, match="^layer_norm: x is an address, and is not to vary$"):
        extension.prepare_layer_norm(fields, ("y",))
    with pytest.raises(TypeError, match="^layer_norm: a field that is to vary is unknown$"):
        extension.prepare_layer_norm(fields, ("x", "y", "z"))
    with pytest.raises(TypeError, match="^layer_norm: field M is missing$"):
        extension.prepare_layer_norm({name: value for name, value in fields.items() if name != "M"}, ("x", "y"))
