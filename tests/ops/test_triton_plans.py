"""What a call of Triton kernels leaves for the next one of its signature (ldmfast/ops/triton_plans.py).

Without TRITON_INTERPRET: which binary a plan launches with what, beside Triton's own choice; no GPU is needed, as
nothing is launched. With TRITON_INTERPRET=1: the numbers that a plan gives.
"""

from __future__ import annotations

import ast
import gc
import os
import re
import sys
import weakref
from pathlib import Path

import pytest
import torch
from cases import CASES, SMALL, backward_inputs, tuples

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "bench" / "checks")]

from triton import knobs  # noqa: E402

from ldmfast import ops  # noqa: E402
from ldmfast.ops import triton_plans  # noqa: E402
from ldmfast.ops.registry import BACKWARD_OPS, OPS, choose_anew  # noqa: E402
from ldmfast.ops.triton_backend import refuse  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1: kernels run on the CPU"
)
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces Triton's wrapper")


def calls(cases=CASES):
    """(label, op, what makes its arguments for a dtype) of every case and its gradient that has a Triton kernel."""
    for case in cases:
        op = OPS[case.op]

        def forward(dtype, case=case, op=op, **sizes):
            args, named = case.make(dtype, **sizes)
            return op.normalise(*args, **named)

        def backward(dtype, case=case, op=op, forward=forward, **sizes):
            arguments = forward(dtype, **sizes)
            return tuple(backward_inputs(case.op, arguments, tuples(op.reference(*arguments))))

        if "triton" in op.backends and not case.big:
            yield f"{case.op}-{case.label}", op, forward
            gradient = BACKWARD_OPS.get(f"{case.op}_backward")
            if gradient and "triton" in gradient.backends:
                yield f"{gradient.name}-{case.label}", gradient, backward


def taken(op, args) -> bool:
    conditions = (condition for condition in op.backends["triton"].conditions if condition is not refuse)
    return not any(condition(*args) for condition in conditions)


ALL = [pytest.param(op, make, id=label) for label, op, make in calls()]
# most gradients take the interpreter 20 seconds
SMALL_ONES = [
    pytest.param(op, make, id=label)
    for label, op, make in calls(SMALL.values())
    if op.name in OPS or op.name == "ddim_step_backward"
]


@pytest.fixture(autouse=True)
def without_plans():
    choose_anew()
    yield
    choose_anew()


@pytest.fixture
def launched():
    """A list of what is launched: (all that its binary is made for, the grid, the arguments, the hook before it)."""
    import triton_stand_in

    notes = []

    def note(binary, x, y, z, stream, function, packed, metadata, enter, leave, *args):
        assert function == binary.function and packed == binary.packed_metadata
        notes.append((binary.asked(), (x, y, z), args, enter))

    with triton_stand_in.installed(note):
        yield notes


def moved(args, which):
    """Copies with the same strides; those of these places begin one element past a multiple of 16 bytes."""

    def copied(tensor, offset):
        size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        values = tensor.as_strided((size,), (1,))
        return torch.cat([values.new_zeros(offset), values]).as_strided(tensor.shape, tensor.stride(), offset)

    return tuple(
        copied(value, int(i in which)) if isinstance(value, torch.Tensor) and value.numel() else value
        for i, value in enumerate(args)
    )


def seen(notes, args):
    """The launches since the last look, with addresses by the argument that they are of; what is allocated is alike."""
    places = {value.data_ptr(): i for i, value in enumerate(args) if isinstance(value, torch.Tensor)}
    found = []
    for asked, grid, values, _ in notes:
        addresses = {}
        for j, value in enumerate(values):
            if isinstance(value, torch.Tensor) or type(value) is int and value > 1 << 32:
                address = value.data_ptr() if isinstance(value, torch.Tensor) else value
                addresses[j] = places.get(address, "allocated" if address % 16 == 0 else "odd")
        rest = [value for j, value in enumerate(values) if j not in addresses]
        found.append((asked, grid, addresses, [(type(value), value) for value in rest]))
    notes.clear()
    return found


def assert_same(found, wanted):
    """One part after the other: a failure then says which."""
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        for part, other in zip((*mine[0], *mine[1:]), (*theirs[0], *theirs[1:]), strict=True):
            assert part == other


def through_triton(op, args, notes):
    """What Triton's own wrapper launches for these arguments."""
    op.backends["triton"].run(*args)
    return seen(notes, args)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op, make", ALL)
def test_a_plan_launches_what_triton_would_choose(op, make, dtype, launched):
    """Each argument in turn at an odd address, and all of them: the same binary, grid and arguments, three times."""
    for sizes in ({}, {"N": 1}):
        args = make(dtype, **sizes)
        if not taken(op, args):
            pytest.skip("it refuses this case")
        tensors = [i for i, value in enumerate(args) if isinstance(value, torch.Tensor)]
        with torch.no_grad():
            _, plan = triton_plans.planned(op.backends["triton"].run, args)
            launched.clear()
            if plan is None:
                continue  # test_which_calls_leave_a_plan says which these may be
            for which in ([], *([i] for i in tensors), tensors, []):
                there = moved(args, which)
                wanted = through_triton(op, there, launched)
                for _ in range(2):
                    plan((*there, None))
                    assert_same(seen(launched, there), wanted)


def plan_of(op, args):
    with torch.no_grad():
        return triton_plans.planned(op.backends["triton"].run, args)[1]


# nothing to launch or zeros in its place; copies of what has gaps or another layout; timesteps that are ints;
# over 512 queries, whose parts of the gradients of k and v are added by torch
WITHOUT = r".*-(empty.*|no-(queries|keys.*|outputs|hidden-layer)|width-slice|sliced|another-layout)"
WITHOUT += r"|timestep_mlp.*(?<!float-t)|linear-(everything|narrow)-.*|qkv_projection-odd-.*"
WITHOUT += r"|attention_backward-shared-queries-.*"


@compiled
def test_which_calls_leave_a_plan(launched):
    """All but those that do more than allocate and launch."""
    kept, without = [], []
    for label, op, make in calls():
        args = make(torch.bfloat16)
        if taken(op, args):
            (without if plan_of(op, args) is None else kept).append(label)
    assert [label for label in without if not re.fullmatch(WITHOUT, label)] == []
    assert [label for label in kept if re.fullmatch(WITHOUT, label)] == [] and len(kept) > 100


@compiled
def test_the_second_call_does_without_tritons_wrapper(launched, monkeypatch):
    """A binary is kept when a call has gone through the wrapper once with addresses that are divisible like these."""
    import triton

    wrapped, run = [], triton.JITFunction.run
    monkeypatch.setattr(triton.JITFunction, "run", lambda self, *a, **k: wrapped.append(self) or run(self, *a, **k))
    x, row = torch.randn(2, 8, 4, 4), torch.randn(8)
    odd = moved((x,), [0])[0]
    for tensor, times in ((x, 1), (x, 1), (x, 0), (odd, 1), (odd, 0), (x, 0), (odd, 0)):
        ops.group_norm_silu(tensor, row, row.clone(), 2, backend="triton")
        assert len(wrapped) == times
        wrapped.clear()


@compiled
def test_numbers_are_no_part_of_a_plan(launched):
    """Coefficients that are equal to each other in the first call, and ints, one of them 1, later."""
    op, x, output = OPS["ddim_step"], torch.randn(1, 4, 6, 6), torch.randn(2, 4, 6, 6)
    for numbers in ([0.5] * 7, [1, 0, 16, 1.0, 0.0, -0.0, 3.0], [float("nan")] * 6 + [0.0]):
        args = op.normalise(x, output, guidance=7.5, table=tuple(numbers[:6]) + (0.0,))
        launched.clear()
        op(*args, "triton")
        found = seen(launched, args)
        wanted = through_triton(op, args, launched)
        assert repr(found) == repr(wanted)  # of NaN as well
    assert len(op.plans) == 1


@compiled
def test_who_watches_launches_is_called(launched):
    """By Triton's wrapper, which hands the hooks and what they ask for to the launcher."""
    x, row, hooks = torch.randn(2, 8, 4, 4), torch.randn(8), knobs.runtime.launch_enter_hook

    def hook(metadata):
        raise AssertionError("nothing is launched here")

    found = []
    for watched in (False, False, False, True, True, False):
        (hooks.add if watched else hooks.remove)(hook)
        launched.clear()
        ops.group_norm_silu(x, row, row.clone(), 2, backend="triton")
        found.append(launched[0][3] is hooks)
    assert found == [True, True, False, True, True, False]  # the first two go through it as well


@compiled
def test_debug_mode_gets_its_own_binary(launched, monkeypatch):
    x, row = torch.randn(2, 8, 4, 4), torch.randn(8)
    found = []
    for debug in (False, False, False, True, True, False):
        monkeypatch.setattr(knobs.runtime, "debug", debug)
        launched.clear()
        ops.group_norm_silu(x, row, row.clone(), 2, backend="triton")
        found.append(launched[0][0][-1]["debug"])
    assert found == [False, False, False, True, True, False]


@compiled
def test_a_plan_keeps_no_tensor(launched):
    x, row = torch.randn(2, 320, 64, 64).contiguous(memory_format=torch.channels_last), torch.randn(320)
    kept = [weakref.ref(x)]
    for _ in range(3):
        kept.append(weakref.ref(ops.group_norm_silu(x, row, row.clone(), 32, backend="triton")))
        launched.clear()
    assert OPS["group_norm_silu"].plans
    del x
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4


@compiled
def test_what_cannot_be_told_leaves_no_plan(launched):
    q, k = torch.randn(2, 1, 8, 2, 16)
    assert plan_of(OPS["attention"], OPS["attention"].normalise(q, k, k)) is None
    assert plan_of(OPS["attention"], OPS["attention"].normalise(q, k, k.clone())) is not None
    x, row = torch.randn(2, 8, 4, 4).transpose(2, 3), torch.randn(16)[::2]  # both are read as copies
    assert plan_of(OPS["group_norm_silu"], OPS["group_norm_silu"].normalise(x, row, None, 2)) is None


def test_every_launch_can_be_noted():
    """A kernel that is launched by kernel[grid](...) would be missing in a plan."""
    for path in sorted((ROOT / "kernels").glob("*.py")):
        tree = ast.parse(path.read_text())
        found = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)]
        assert path.name == "launch_kernel.py" or not found, f"{path.name}: {found}"


@interpreted
@pytest.mark.parametrize("op, make", SMALL_ONES)
def test_other_numbers_in_the_same_places_triton(op, make):
    """The second call has other tensors of the same shapes and strides: it gives what a call without plans gives."""
    torch.manual_seed(0)
    first, second = make(torch.float32), make(torch.float32)
    with torch.no_grad():
        before = [value.clone() for value in tuples(op(*first, "triton"))]
        assert len(op.plans) == 1
        found, wanted = op(*second, "triton"), op.run(*second, "triton")
        again = op(*first, "triton")
    assert len(op.plans) == 1
    for mine, theirs in zip(tuples(found) + tuples(again), tuples(wanted) + tuple(before), strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride() and mine.dtype is theirs.dtype
