"""Forward-mode AD and torch.func's transforms through every op and backend.

The right values come without any transform: differences and reverse-mode gradients in float64, and calls one by one.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import TINY, tuples
from torch.autograd import forward_ad

from ldmfast import ops
from ldmfast.ops.registry import OPS

BACKENDS = (None, "torch", "cpu")
B = 3  # samples, where there is a batch of them
H = 1e-6


class Call:
    """An op as one function of its floating tensors, [n] of them, to one vector: every output, flattened."""

    def __init__(self, name, arguments, backend=None):
        self.op, self.arguments, self.backend = OPS[name], list(arguments), backend
        tensors = enumerate(self.arguments)
        self.places = [i for i, a in tensors if isinstance(a, torch.Tensor) and a.is_floating_point()]

    @property
    def inputs(self):
        return [self.arguments[i] for i in self.places]

    def __call__(self, *inputs):
        arguments = list(self.arguments)
        for i, value in zip(self.places, inputs, strict=True):
            arguments[i] = value
        return torch.cat([out.reshape(-1).to(inputs[0].dtype) for out in tuples(self.op(*arguments, self.backend))])


def loss(f):
    """A scalar whose gradient knows of every output, and whose second derivative is not zero."""

    def scalar(*inputs):
        y = f(*inputs)
        return (y.square() * torch.arange(1, y.numel() + 1, dtype=y.dtype)).sum()

    return scalar


def each(inputs):
    return tuple(range(len(inputs)))


def difference(f, x, v):
    """The derivative of f at x along v."""
    up, down = (f(*(a + h * b for a, b in zip(x, v, strict=True))) for h in (H, -H))
    if isinstance(up, tuple):
        return tuple((a - b) / (2 * H) for a, b in zip(up, down, strict=True))
    return (up - down) / (2 * H)


def gradient(f, x):
    """Of the loss, by plain reverse mode."""
    leaves = [a.detach().requires_grad_() for a in x]
    return torch.autograd.grad(loss(f)(*leaves), leaves)


def dual(f, x, v):
    with forward_ad.dual_level():
        out = f(*(forward_ad.make_dual(a, b) for a, b in zip(x, v, strict=True)))
        tangent = forward_ad.unpack_dual(out).tangent
        assert tangent is not None
        return tangent.detach()


def dual_and_recorded(f, x, v):
    """Forward over reverse by hand: the tangent of the gradient."""
    leaves = [a.detach().requires_grad_() for a in x]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, b) for a, b in zip(leaves, v, strict=True)]
        grads = torch.autograd.grad(loss(f)(*duals), duals, create_graph=True)
        return tuple(forward_ad.unpack_dual(g).tangent for g in grads)


def tangent_of_a_recorded_backward(f, x, v):
    """The derivative of the backward pass along its own gradient, recorded before there was a dual level."""
    leaves = [a.detach().requires_grad_() for a in x]
    y = f(*leaves)
    with forward_ad.dual_level():
        grads = torch.autograd.grad(y, leaves, forward_ad.make_dual(torch.ones_like(y), torch.cos(torch.ones_like(y))))
        return tuple(forward_ad.unpack_dual(g).tangent for g in grads)


def plain_backward(f, x, v):
    leaves = [a.detach().requires_grad_() for a in x]
    y = f(*leaves)
    return torch.autograd.grad(y, leaves, torch.cos(torch.ones_like(y)))


def without_grad(transform):
    return lambda *args: torch.no_grad()(transform)(*args)


def stacked(x, v, dim=0):
    """[B] samples of x along v."""
    return [torch.stack([a + 0.1 * i * b for i in range(B)], dim) for a, b in zip(x, v, strict=True)]


def batched(f, dim):
    """vmap beside one call after the other."""

    def by_vmap(x, v):
        return torch.func.vmap(f, in_dims=dim)(*stacked(x, v, dim))

    def one_by_one(x, v):
        return torch.stack([f(*(a.select(dim, i).contiguous() for a in stacked(x, v, dim))) for i in range(B)])

    return by_vmap, one_by_one


def first_batched(f, x, v):
    return torch.func.vmap(f, in_dims=(0, *[None] * (len(x) - 1)))(stacked(x, v)[0], *x[1:])


def first_one_by_one(f, x, v):
    return torch.stack([f(a, *x[1:]) for a in stacked(x, v)[0]])


def per_sample(f, x, v):
    return torch.func.vmap(torch.func.grad(loss(f), argnums=each(x)))(*stacked(x, v))


def per_sample_one_by_one(f, x, v):
    grads = [gradient(f, sample) for sample in zip(*stacked(x, v), strict=True)]
    return tuple(map(torch.stack, zip(*grads, strict=True)))


def jacobian(f, x, v):
    """By differences, column by column, with regard to the first input."""
    columns = []
    for i in range(x[0].numel()):
        one = torch.zeros_like(x[0]).view(-1)
        one[i] = 1
        columns.append(difference(f, x, [one.view_as(x[0]), *map(torch.zeros_like, x[1:])]))
    return torch.stack(columns, -1).view(-1, *x[0].shape)


# name -> (the transform, the same values without it), each (f, inputs, tangents) -> tensors
TRANSFORMS = {
    "jvp": (lambda f, x, v: torch.func.jvp(f, tuple(x), tuple(v))[1], difference),
    "dual": (without_grad(dual), difference),
    "dual, grad enabled": (dual, difference),
    "dual, recorded": (dual_and_recorded, lambda f, x, v: difference(lambda *x: gradient(f, x), x, v)),
    "dual backward": (tangent_of_a_recorded_backward, plain_backward),
    "jacfwd": (lambda f, x, v: torch.func.jacfwd(f)(*x), jacobian),
    "grad": (lambda f, x, v: torch.func.grad(loss(f), argnums=each(x))(*x), lambda f, x, v: gradient(f, x)),
    "vjp": (lambda f, x, v: torch.func.vjp(f, *x)[1](torch.cos(torch.ones_like(f(*x)))), plain_backward),
    "jacrev": (lambda f, x, v: torch.func.jacrev(f)(*x), jacobian),
    "vectorised jacobian": (
        lambda f, x, v: torch.autograd.functional.jacobian(lambda a: f(a, *x[1:]), x[0], vectorize=True),
        jacobian,
    ),
    "hessian-vector product": (
        lambda f, x, v: torch.func.jvp(torch.func.grad(loss(f), argnums=each(x)), tuple(x), tuple(v))[1],
        lambda f, x, v: difference(lambda *x: gradient(f, x), x, v),
    ),
    "vmap": (lambda f, x, v: batched(f, 0)[0](x, v), lambda f, x, v: batched(f, 0)[1](x, v)),
    "vmap, last": (lambda f, x, v: batched(f, -1)[0](x, v), lambda f, x, v: batched(f, -1)[1](x, v)),
    "vmap of one": (first_batched, first_one_by_one),
    "per-sample gradients": (per_sample, per_sample_one_by_one),
    "jvp of vmap": (
        lambda f, x, v: torch.func.jvp(lambda *x: batched(f, 0)[0](x, v), tuple(x), tuple(v))[1],
        lambda f, x, v: difference(lambda *x: batched(f, 0)[1](x, v), x, v),
    ),
}


def tiny(name):
    torch.manual_seed(0)
    args, kwargs = TINY[name]()
    return OPS[name].normalise(*args, **kwargs)


def single(arguments):
    return [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def check(got, wanted):
    assert len(tuples(got)) == len(tuples(wanted))
    for mine, right in zip(tuples(got), tuples(wanted), strict=True):
        scale = max(right.abs().max().item(), 1e-3)
        torch.testing.assert_close(mine.double(), right.double(), rtol=1e-3, atol=1e-4 * scale)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", OPS)
def test_every_op(name, transform, backend):
    arguments = tiny(name)
    exact, ours = Call(name, arguments), Call(name, single(arguments), backend)
    if backend and backend not in ours.op.backends:
        pytest.skip(f"{backend}: it has no such kernel")
    if backend and (reason := ours.op.backends[backend].refusal(ours.arguments)):
        pytest.skip(f"{backend}: {reason}")
    tangents = [torch.randn_like(a) for a in exact.inputs]
    mine, right = TRANSFORMS[transform]
    if transform == "dual backward" and name in ("group_norm_silu", "timestep_mlp"):  # as the stock model
        with pytest.raises(NotImplementedError, match="forward AD with aten::silu_backward that does not support it"):
            mine(ours, ours.inputs, single(tangents))
        return
    check(mine(ours, ours.inputs, single(tangents)), right(exact, exact.inputs, tangents))


@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "hessian-vector product"])
@pytest.mark.parametrize("name", ["layer_norm", "attention", "ddim_step"])
def test_compiled(name, transform):
    """torch.compile of a transform: the graph holds the op, which is transformed there."""
    exact = Call(name, tiny(name))
    tangents = [torch.randn_like(a) for a in exact.inputs]
    mine, right = TRANSFORMS[transform]
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, v: mine(exact, x, v), backend="aot_eager")
    check(compiled(exact.inputs, tangents), right(exact, exact.inputs, tangents))


def test_a_compiled_op_called_under_a_transform():
    """Compiled before there is one: another graph is made for it, and the first is kept."""
    x, v = torch.randn(3, 8), torch.randn(3, 8)
    wanted = difference(lambda x: ops.layer_norm(x, None, None), [x.double()], [v.double()])
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.layer_norm(x, None, None), backend="aot_eager")
    plain = compiled(x)
    check(dual(compiled, [x], [v]), wanted)
    assert torch.equal(compiled(x), plain)


def test_an_exported_op_called_under_a_transform():
    class Norm(torch.nn.Module):
        def forward(self, x):
            return ops.layer_norm(x, None, None)

    x, v = torch.randn(3, 8), torch.randn(3, 8)
    wanted = difference(lambda x: ops.layer_norm(x, None, None), [x.double()], [v.double()])
    exported = torch.export.export(Norm(), (x,)).module()
    check(torch.func.jvp(exported, (x,), (v,))[1], wanted)


@pytest.mark.parametrize("place", [2, 3], ids=["alpha_t", "alpha_prev"])
def test_the_schedule_has_a_tangent(place):
    """A 0-d tensor is read on the host only where nothing is lost by that."""
    sample, output = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    alphas = [torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)]

    def step(alpha):
        mine = [*alphas]
        mine[place - 2] = alpha
        return ops.ddim_step(sample, output, *mine)[0]

    at, one = alphas[place - 2], torch.ones((), dtype=torch.float64)
    check(torch.func.jvp(step, (at,), (one,))[1], difference(step, [at], [one]))
    many = torch.tensor([0.2, 0.4], dtype=torch.float64)
    check(torch.func.vmap(step)(many), torch.stack([step(alpha) for alpha in many]))


@pytest.mark.parametrize("name", OPS)
def test_autocast(name):
    """The formula computes in the dtypes that autocast gives the op."""
    call = Call(name, single(tiny(name)))
    ones = [torch.ones_like(a) for a in call.inputs]
    with torch.autocast("cpu", torch.bfloat16):
        plain, (value, tangent) = call(*call.inputs), torch.func.jvp(call, tuple(call.inputs), tuple(ones))
        assert [a.dtype for a in tuples(call.op(*call.arguments, None))] == _dtypes_under_vmap(call)
    torch.testing.assert_close(value, plain, rtol=0.05, atol=0.05)
    assert tangent.abs().sum() > 0


def _dtypes_under_vmap(call):
    seen = []

    def each_sample(*inputs):
        arguments = list(call.arguments)
        for i, value in zip(call.places, inputs, strict=True):
            arguments[i] = value
        out = call.op(*arguments, None)
        seen.extend(a.dtype for a in tuples(out))
        return out

    torch.func.vmap(each_sample)(*(a[None] for a in call.inputs))
    return seen


def test_a_named_backend_still_refuses():
    x = torch.randn(2, 8)
    with ops.use_backend("cuda"), pytest.raises(NotImplementedError, match="backend cuda refuses"):
        torch.func.jvp(lambda x: ops.group_norm_silu(x, None, None, 4), (x,), (x,))
    with pytest.raises(ValueError, match="unknown backend"):
        torch.func.vmap(lambda x: ops.layer_norm(x, None, None, backend="none"))(x)


def test_wrong_arguments_are_refused_as_ever():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match=r"layer_norm: weight has shape \[3\]"):
        torch.func.vmap(lambda x: ops.layer_norm(x, torch.ones(3), None))(x)


def test_no_kernel_runs_under_a_transform_and_one_does_without(monkeypatch):
    chosen = []
    op = OPS["layer_norm"]
    monkeypatch.setattr(op, "run", lambda *args: chosen.append(op.name) or op.reference(*args[:-1]))
    x = torch.randn(2, 8)
    torch.func.jvp(lambda x: ops.layer_norm(x, None, None), (x,), (x,))
    assert not chosen
    ops.layer_norm(x, None, None)
    assert chosen == ["layer_norm"]
