"""The ordinary call in C++ (csrc/plain_call.cpp): the same as the long way, and out of the way where it should be."""

from __future__ import annotations

import contextlib
import importlib
import sys

import pytest
import torch
from torch.autograd import forward_ad

from ldmfast import ops
from ldmfast.ops import dispatcher

module = importlib.import_module("ldmfast.ops.ddim_step")
NUMBERS = (0.3, 0.6, 0.0, "epsilon")

pytestmark = pytest.mark.skipif(
    dispatcher.EXTENSION is None or not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
    reason="the cpu module was not built, or torch is older than 2.10 (no DLPack exchange interface)",
)


def latents(*shape, dtype=torch.float32, guided=True):
    torch.manual_seed(0)
    return torch.randn(*shape).to(dtype), torch.randn((2 if guided else 1) * shape[0], *shape[1:]).to(dtype)


def plain(sample, output, *, numbers=NUMBERS, guidance=7.5, noise=None, clip=None, backend=None):
    return module._plain(module._packed, *numbers, sample, output, guidance, noise, clip, backend)


def last(tensor):
    return tensor.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 5, 7), (2, 3), (5,), (2, 3, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("prediction", module.PREDICTIONS)
def test_equals_the_long_way(monkeypatch, dtype, shape, prediction):
    sample, output = latents(*shape, dtype=dtype)
    arguments = {"guidance": 4, "sigma": 0.2, "noise": torch.randn_like(sample), "clip": 1.5, "prediction": prediction}
    for keep in ((), ("guidance",), ("noise", "sigma"), tuple(arguments)):
        kwargs = {"prediction": prediction} | {name: arguments[name] for name in keep}
        out = output if "guidance" in keep else output[: shape[0]]
        numbers = (0.3, 0.6, kwargs.get("sigma", 0.0), prediction)
        rest = {"guidance": None} | {n: arguments[n] for n in keep if n in ("guidance", "noise", "clip")}
        assert plain(sample, out, numbers=numbers, **rest) is not None
        quick = ops.ddim_step(sample, out, 0.3, 0.6, **kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_plain", None)
            slow = ops.ddim_step(sample, out, 0.3, 0.6, **kwargs, backend="cpu")
        for mine, theirs in zip(quick, slow, strict=True):
            assert torch.equal(mine, theirs) and mine.stride() == theirs.stride() and mine.dtype is dtype


def test_channels_last_stays():
    sample, output = latents(2, 4, 6, 6)
    wanted = ops.ddim_step(sample, output, 0.3, 0.6, guidance=7.5)
    for found, same in zip(plain(last(sample), last(output)), wanted, strict=True):
        assert torch.equal(found, same) and found.stride() == last(same).stride()
    assert plain(last(sample), output) is None and plain(sample, last(output)) is None


class Wrapped(torch.Tensor):
    pass


UNUSUAL = {
    "transposed": lambda x, m: plain(x.mT, m.mT),
    "sliced": lambda x, m: plain(x[..., ::2], m[..., ::2]),
    "dtypes": lambda x, m: plain(x, m.half()),
    "float64": lambda x, m: plain(x.double(), m.double()),
    "integers": lambda x, m: plain(x.int(), m.int()),
    "shape": lambda x, m: plain(x, m[:2]),
    "dimensions": lambda x, m: plain(x, m[0]),
    "scalar": lambda x, m: plain(x[0, 0, 0, 0], m[0, 0, 0, 0], guidance=None),
    "empty": lambda x, m: plain(x[:0], m[:0]),
    "meta": lambda x, m: plain(x.to("meta"), m.to("meta")),
    "sparse": lambda x, m: plain(x.to_sparse(), m),
    "list": lambda x, m: plain([1.0], m),
    "subclass": lambda x, m: plain(x.as_subclass(Wrapped), m),
    "negated": lambda x, m: plain(torch._neg_view(x), m),
    "noise": lambda x, m: plain(x, m, numbers=(0.3, 0.6, 0.1, "epsilon")),
    "noise's shape": lambda x, m: plain(x, m, noise=m),
    "alpha": lambda x, m: plain(x, m, numbers=(1.5, 0.6, 0.0, "epsilon")),
    "alpha as a tensor": lambda x, m: plain(x, m, numbers=(torch.tensor(0.3), 0.6, 0.0, "epsilon")),
    "alpha too large": lambda x, m: plain(x, m, numbers=(10**400, 0.6, 0.0, "epsilon")),
    "prediction": lambda x, m: plain(x, m, numbers=(0.3, 0.6, 0.0, "eps")),
    "prediction as a list": lambda x, m: plain(x, m, numbers=(0.3, 0.6, 0.0, ["epsilon"])),
    "guidance": lambda x, m: plain(x, m, guidance=float("nan")),
    "clip": lambda x, m: plain(x, m, clip=-1.0),
    "backend": lambda x, m: plain(x, m, backend="torch"),
    "gradient": lambda x, m: plain(x.requires_grad_(), m),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_goes_the_long_way(name):
    assert plain(*latents(2, 4, 6, 6)) is not None
    assert UNUSUAL[name](*latents(2, 4, 6, 6)) is None


def test_use_backend_is_heard():
    sample, output = latents(1, 4, 6, 6)
    with ops.use_backend("cuda"), pytest.raises(NotImplementedError, match="backend cuda refuses"):
        ops.ddim_step(sample, output, 0.3, 0.6, guidance=7.5)


def test_gradient_and_inference():
    sample, output = latents(1, 4, 6, 6)
    ops.ddim_step(sample, output.requires_grad_(), 0.3, 0.6, guidance=7.5)[0].sum().backward()
    assert output.grad.abs().sum() > 0
    with torch.no_grad():
        assert not ops.ddim_step(sample, output, 0.3, 0.6, guidance=7.5)[0].requires_grad
    with torch.inference_mode():
        assert ops.ddim_step(sample, output, 0.3, 0.6, guidance=7.5)[0].is_inference()


def test_compile_sees_one_graph():
    sample, output = latents(1, 4, 6, 6)

    def step(x, m):
        return ops.ddim_step(x, m, 0.3, 0.6, guidance=7.5)[0]

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(sample, output), step(sample, output))


@contextlib.contextmanager
def dispatch_mode():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Passing():
        yield


WATCHED = {
    "dispatch mode": dispatch_mode,
    "function mode": lambda: torch.device("cpu"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward mode": forward_ad.dual_level,
    "profiler": torch.autograd.profiler.profile,
}


@pytest.mark.parametrize("name", WATCHED)
def test_who_looks_on_is_noticed(name):
    x, m = latents(1, 4, 6, 6)
    assert dispatcher.nothing_watches((x, m, None, 1.0)) and dispatcher.nothing_watches_in_python((x, m, None, 1.0))
    with WATCHED[name]():
        assert not dispatcher.nothing_watches((x, m)) and not dispatcher.nothing_watches_in_python((x, m))
        assert plain(x, m) is None
    assert plain(x, m) is not None


def test_functorch_is_noticed():
    x, m = latents(3, 4, 6, 6)
    seen = []

    def each(sample, unconditional, conditional):
        output = torch.stack([unconditional, conditional])
        seen.append((dispatcher.nothing_watches((sample,)), dispatcher.nothing_watches_in_python((sample,))))
        return sample + output.sum(0)

    torch.func.vmap(each)(x, m[:3], m[3:])
    assert seen == [(False, False)]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        torch.nn.Parameter,
        lambda x: x.requires_grad_(),
        lambda x: x.to("meta"),
        torch._neg_view,
        lambda x: x.as_subclass(Wrapped),
    ],
)
def test_both_watchers_agree_on_tensors(make):
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            tensor = make(torch.randn(3))
            args = None, tensor, "cpu"
            assert dispatcher.nothing_watches(args) == dispatcher.nothing_watches_in_python(args)


def test_nothing_leaks():
    sample, output = latents(1, 4, 6, 6)
    before = sys.getrefcount(sample), sys.getrefcount(output)
    for _ in range(10):
        results = plain(sample, output)
        plain(sample, output, clip=-1.0)
    assert (sys.getrefcount(sample), sys.getrefcount(output)) == before
    counts = sys.getrefcount(results), sys.getrefcount(results[0])  # not in the assert, which pytest rewrites
    assert counts == (2, 2)
