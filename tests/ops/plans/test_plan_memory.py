"""Where a plan has the memory of its outputs and workspaces from, and which device and stream a launch is given."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from ldmfast import ops
from ldmfast.ops import native
from ldmfast.ops.planning import memory as planning
from ldmfast.ops.planning.memory import Memory, written
from ldmfast.ops.registry import OPS, choose_anew


@pytest.fixture(autouse=True)
def without_plans():
    choose_anew()
    yield
    choose_anew()


def test_fresh_memory_is_poisoned_as_ever(monkeypatch):
    """`fill_uninitialized_memory` reaches the outputs and the workspace of a plan."""
    x, w = torch.randn(5, 8), torch.randn(3, 8)
    ops.linear(x, w, backend="cpu")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    native.module("cpu").set_launching(False)
    try:
        assert ops.linear(x, w, backend="cpu").isnan().all()
    finally:
        native.module("cpu").set_launching(True)
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(2, 8, 4, 6), (0, 8, 4, 6), (2, 8, 1, 1)], ids=str)
@pytest.mark.parametrize("inference", [False, True])
def test_memory_is_as_torch_makes_it(shape, inference):
    """The lines that a plan makes its tensors by, and those for when they will not do."""
    x = torch.empty(shape, dtype=torch.bfloat16)
    for layout in (torch.contiguous_format, torch.channels_last):
        like = x.contiguous(memory_format=layout)
        memory = Memory((like,), (torch.empty_like(like), like.new_empty(3, 5, dtype=torch.float32)), (like,))
        with torch.inference_mode(inference):
            made, wanted = (
                written([*lines, "return made0, made1, made2"], memory.known)((like,))
                for lines in (memory.lines, memory.slow_lines)
            )
        for tensor, other in zip(made, wanted, strict=True):
            assert (tensor.shape, tensor.stride(), tensor.dtype) == (other.shape, other.stride(), other.dtype)
            assert torch._C._dispatch_keys(tensor) == torch._C._dispatch_keys(other)
            assert tensor.is_inference() == inference == other.is_inference()
        assert made[0].stride() == like.stride() and made[2].nbytes == like.nbytes


def test_memory_on_another_device_than_the_current_one(monkeypatch):
    """Torch's quick function knows the current device alone."""
    memory = Memory((SimpleNamespace(device=torch.device("cuda", 1)),), ())
    plan = written([f"return {memory.plainly}"], memory.known | {"current_device": lambda: current})
    for current in (0, 1):
        assert plan(()) == (current != 1)
    monkeypatch.setitem(memory.known, "deterministic", lambda: True)
    assert written([f"return {memory.plainly}"], memory.known)(())


@pytest.fixture
def second_gpu(monkeypatch):
    """What stands for a tensor on cuda:1, beside [the device that is current now] and [those that were entered]."""
    current, entered, device = [1], [], torch.device("cuda", 1)

    @contextlib.contextmanager
    def on(index):
        before, current[0] = current[0], index
        entered.append(index)
        yield
        current[0] = before

    def quickly(*laid):
        return torch.empty_strided(*laid[:2], dtype=laid[2]).fill_(current[0])

    bytes_there = torch.empty(0, dtype=torch.uint8).new_empty
    for module in (native, planning):
        monkeypatch.setattr(module, "current_device", lambda: current[0])
        monkeypatch.setattr(module, "raw_stream", lambda index: 70 + index)
        monkeypatch.setattr(module, "allocator", lambda device: bytes_there)
    monkeypatch.setattr(torch.cuda, "device", on)
    monkeypatch.setitem(planning._EMPTY, "cuda", quickly)
    planning.quick_allocator.cache_clear()
    like = SimpleNamespace(
        is_cuda=True,
        device=device,
        new_empty_strided=lambda *sizes, dtype: torch.empty_strided(*sizes, dtype=dtype).fill_(-1),
    )
    yield like, current, entered
    planning.quick_allocator.cache_clear()


def test_a_plan_of_a_gpus_tensors(second_gpu):
    """Without one: which memory, device and stream a launch is given."""
    like, current, entered = second_gpu
    x, out, launched = torch.randn(3).double(), torch.empty(2, 4), []

    def prepared(values, index, stream, allocate):
        launched.append((values, index, stream, current[0], allocate(5)))

    plan = native._again(prepared, (1, 3), (like, x), (out,), [], several=False)
    for device, value, turns in ((1, 1, []), (0, -1, [1])):  # made quickly, or by torch, and launched where they are
        current[0] = device
        made = plan((like, x, None))
        (values, *where, workspace) = launched.pop()
        assert values[0] is x and values[1] is made and where == [1, 71, 1] and workspace.nbytes == 5
        assert (made == value).all() and made.shape == out.shape and entered == turns and current == [device]


def test_a_triton_plan_of_a_gpus_tensors(second_gpu):
    pytest.importorskip("triton", reason="triton is not installed")
    from ldmfast.ops import triton_plans

    like, current, entered = second_gpu
    x, out, launched = torch.randn(4).double(), torch.empty(2, 4), []

    class Kernel:  # what Triton's wrapper is to the plan
        def __getitem__(self, grid):
            return lambda *values: launched.append(("wrapper", current[0], values))

    launch = triton_plans._Launch(Kernel(), (6,), [x, out, 7], {})
    plan = triton_plans._plan(SimpleNamespace(launches=[launch], made=[out]), (like, x), (out,), False)
    made = plan((like, x, None))
    ((kind, device, values),) = launched
    assert kind == "wrapper" and device == 1 and values[0].data_ptr() == x.data_ptr() and values[2] == 7
    assert values[1].data_ptr() == made.data_ptr() and (made == 1).all()
    current[0] = 0
    assert (plan((like, x, None)) == -1).all() and launched[1][1] == 1 and entered[-1] == 1


@pytest.mark.parametrize("name", ["layer_norm", "attention"])
def test_a_torch_without_the_quick_function(name, monkeypatch):
    op = OPS[name]
    args = op.example(torch.float32, "cpu")
    plain = op.run(*args, "cpu")
    monkeypatch.setattr(planning, "_EMPTY", {})
    op.plans.clear()
    try:
        for _ in range(3):
            assert torch.equal(op(*args, "cpu"), plain)
        assert len(op.plans) == 1
    finally:
        op.plans.clear()
