"""A few seconds of the fuzzing that `python tests/fuzz` does for hours, always the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

from damage import FILES, bounded, edited, outcome
from op_calls import faults, misfit
from search import kinds, prepare, search, verdict

from ldmfast.ops import native

HERE = Path(__file__).resolve().parent
OPS = [kind for kind in kinds() if kind.startswith("op ")]
NETWORKS = [kind for kind in kinds() if kind.startswith("network ")]


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    threads = torch.get_num_threads()
    prepare(monkeypatch.setattr)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("op", OPS)
def test_random_calls(op):
    strategy, check = kinds()[op]
    found = search(strategy, check, 30, 0)
    assert found.findings == []
    assert found.checked == 30 and found.calls >= 40


@pytest.mark.parametrize("network", NETWORKS)
def test_random_configurations(network):
    strategy, check = kinds()[network]
    found = search(strategy, check, 15, 0)
    assert found.findings == []
    assert found.checked == 15 and found.calls >= 3


def other_instruction_sets():
    """Those older than the one of every other test, which is the fastest that this processor has."""
    compiled, active = native.module("cpu").compiled_isas().split(), native.module("cpu").active_isa()
    return compiled[compiled.index(active) + 1 :]


@pytest.mark.parametrize("isa", other_instruction_sets())
def test_random_calls_of_an_older_instruction_set(isa, tmp_path):
    environment = {**os.environ, "LDMFAST_CPU_ISA": isa}
    log = tmp_path / "log.jsonl"
    command = [sys.executable, str(HERE), "--calls", "8", "--seed", "1", "--log", str(log)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and not log.exists(), ran.stdout + ran.stderr


@pytest.mark.parametrize("kind", FILES)
def test_damaged_files(kind):
    strategy, check = kinds()[f"file {kind}"]
    assert search(strategy, check, 60, 0).findings == []


FOUND = {  # damage that was an error without a name, or another type's
    "a config with null as its norm's groups": ("unet config", ["json", 0.5, None]),
    "a block's name": ("unet config", ["drop", 0.3359375, 1]),
    "a place before the file": ("ckpt", ["drop", 0.25, 1]),
    "three numbers as a box": ("boxes", ["remove", 1.0, None]),
    "a list as a width": ("unet weights", ["json", 0.109375, []]),
    "a prompt of 2^31 numbers": ("unet config", ["json", 0.296875, [2**31]]),
    "a PNG that says that 3 GB follow": ("map", ["bytes", 0.3515625, "c1"]),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_mended(name):
    kind, edit = FOUND[name]
    assert outcome({"kind": kind, "edits": [edit]}) == (1, [])


@pytest.mark.parametrize("seed", (74, 78, 82))
def test_like_pixels_and_one_far_away(seed):
    """Found in the moments: float32 rounds each of many like squares the same way beside a large one."""
    plan = {"op": "group_norm_affine", "dtype": "float32", "threads": 1, "lies": 0, "seed": seed, "N": 1, "C2": 1}
    plan |= {"groups": 1, "width": 1, "space": [16, 8], "affine": None, "float_params": False, "modulated": None}
    plan |= {"add": False, "eps": 1e-5, "mean": 300.0, "std": 0.01, "outlier": 100.0}
    assert faults(plan, ("cpu",)) == (2, [])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [64, 128])
def test_as_much_of_a_larger_picture(side, layout):
    """The same of lanes of 4096 pixels, and of the sums of many chunks: up to 1.9e-6."""
    from ldmfast.ops import group_norm_silu

    for seed in range(10):
        x = 300 + 0.01 * torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(seed))
        x[:, :, 0, 0] *= 100
        x = x.contiguous(memory_format=layout)
        true = torch.nn.functional.group_norm(x.double(), 4, eps=1e-5)
        y = group_norm_silu(x, None, None, 4, silu=False, backend="cpu")
        assert (y.double() - true).norm() <= 5e-7 * true.norm()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [64, 128])
def test_the_gradients_of_like_pixels_and_one_far_away(side, layout):
    """Likewise: up to 5e-6, where torch's own, contiguous, is 1e-7 off."""
    from ldmfast.ops import group_norm_silu

    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 4, 1, 1, generator=generator).expand(1, 4, side, side).clone()
        x[:, :, 0, 0] = 100
        x = x.contiguous(memory_format=layout)
        weight, dy = 0.5 + torch.rand(4, generator=generator), torch.randn(x.shape, generator=generator)

        def gradients(norm, x, weight, dy=dy):
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            return torch.autograd.grad(norm(x, weight), (x, weight), dy.to(x.dtype))

        ours = gradients(lambda x, w: group_norm_silu(x, w, None, 2, silu=False, backend="cpu"), x, weight)
        true = gradients(lambda x, w: torch.nn.functional.group_norm(x, 2, w), x.double(), weight.double())
        for y, exact in zip(ours, true, strict=True):
            assert (y.double() - exact).norm() <= 8e-7 * exact.norm()


@pytest.mark.parametrize("kind", FILES)
def test_the_files_are_right_before_they_are_damaged(kind, tmp_path):
    name, content, read = FILES[kind]
    if kind in ("safetensors", "ckpt"):  # tables of tensors, no model's
        with pytest.raises(ValueError, match=name):
            write_and_read(tmp_path, kind)
    else:
        write_and_read(tmp_path, kind)


def write_and_read(folder, kind):
    from damage import _unet_files

    name, content, read = FILES[kind]
    if kind.startswith("unet"):
        for other, its in _unet_files().items():
            (folder / other).write_bytes(its)
    (folder / name).write_bytes(content())
    read(folder / name)


def test_a_header_that_claims_a_huge_tensor_is_refused_in_little_memory(tmp_path):
    from ldmfast.models.weight_files import shapes

    name, content, _ = FILES["unet weights"]
    path = tmp_path / name
    path.write_bytes(edited(content(), name, [["json", 1.0, 2**62]]))
    with bounded(64 << 20), pytest.raises(ValueError, match=f"{name}: truncated"):
        shapes(path)


# --- the search itself sees what is wrong ----------------------------------------------------------------------------


def test_a_wrong_kernel_is_found_and_made_small(monkeypatch):
    """One that leaves out the last row, where there are more than five."""
    from ldmfast.ops.registry import OPS

    backend = OPS["layer_norm"].backends["cpu"]
    right = backend.run

    def wrong(x, *others):
        y = right(x, *others)
        if x.dim() > 1 and x.shape[-2] > 5:
            y[..., -1, :] = float("nan")
        return y

    monkeypatch.setattr(backend, "run", wrong)
    strategy, _ = kinds()["op layer_norm"]
    found = search(strategy, lambda plan: faults(plan, ("cpu",)), 300, 0)
    assert [finding["plan"]["rows"][-1] for finding in found.findings] == [6]
    assert "error nan" in found.findings[0]["what"]


def test_an_error_that_is_not_caught_is_a_finding():
    def check(plan):
        raise KeyError("x")

    calls, what = verdict(check, {})
    assert what.startswith("KeyError: 'x' (test_fuzz.py:")


def test_another_layout_or_dtype_is_a_finding():
    a = torch.zeros(2, 3)
    assert misfit(a, a, a) is None
    assert "strides" in misfit(torch.zeros(3, 2).mT, a, a)
    assert "float16" in misfit(a.half(), a, a)


def test_memory_beyond_the_bound_is_a_finding(monkeypatch):
    monkeypatch.setitem(FILES, "boxes", ("boxes.json", lambda: b"[]", lambda path: torch.zeros(1 << 40)))
    _, found = outcome({"kind": "boxes", "edits": []})
    assert found and "memory" in found[0]
