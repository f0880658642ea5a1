"""`ldmfast profile` without a GPU: its files, its command lines, the names it gives, and the classes of kernels."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.autograd import DeviceType

from ldmfast import UNet, ops
from ldmfast.commands import bench_files, cli
from ldmfast.commands.measuring import classes, trace
from ldmfast.models import blocks
from ldmfast.models import unet as unet_file
from ldmfast.ops.measured import ranges as ranges_file
from ldmfast.ops.measured.ranges import ranges
from ldmfast.ops.registry import OPS


@pytest.fixture
def pushed(monkeypatch):
    """The NVTX ranges that a GPU's profiler would see, and how deep each was."""
    found, open_ranges = [], []

    def push(name):
        found.append((name, len(open_ranges)))
        open_ranges.append(name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", open_ranges.pop)
    yield found
    assert open_ranges == []


def test_a_step_is_profiled_into_a_table_a_trace_and_command_lines(tmp_path, capsys):
    command = ["profile", "--tiny", "--device", "cpu", "--steps", "1", "-o", str(tmp_path)]
    assert cli.main([*command, "--row", "ours", "--row", "stock"]) == 0
    said = capsys.readouterr().out
    for tool in ("nsys profile --trace cuda,nvtx", "ncu --profile-from-start off"):
        assert tool in said
    assert "--row stock --steps 1 --window --tiny" in said
    for row, op in (("ours", "ldmfast::conv2d"), ("stock", "aten::conv2d")):
        found = json.loads((tmp_path / f"{row}.json").read_text())
        parts = {part["part"]: part for part in found["parts"]}
        assert tuple(parts) == classes.CLASSES
        assert all(parts[name]["seconds"] > 0 for name in classes.CLASSES), parts
        assert any(one["name"] == op and one["class"] == "convolution" for one in found["longest"])
        assert bench_files.read(tmp_path / f"{row}.json")["kind"] == "parts"  # `ldmfast report` draws it
        names = {event["name"] for event in json.loads((tmp_path / f"{row}.trace.json").read_text())["traceEvents"]}
        assert op in names and ("down_blocks.0.resnets.0" in names) == (row == "ours")


def test_the_window_runs_the_steps_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["profile", "--tiny", "--device", "cpu", "--window", "--steps", "2", "--work", "vae"]) == 0
    assert capsys.readouterr().out == "ldmfast: 2 steps\n" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--steps", "0"], "--steps is 0, expected 1 or more"),
        (["--row", "ours-graph", "--work", "train", "--device", "cpu", "--tiny"], "ours-graph is no row of train"),
    ],
)
def test_what_cannot_be_profiled_is_said(options, sentence, capsys):
    assert cli.main(["profile", *options]) == 2 and sentence in capsys.readouterr().err


def test_ranges_name_each_block_and_op(pushed):
    model = UNet.from_unet(tiny.unet())
    inputs = tiny.inputs(model)
    with torch.inference_mode():
        without = model(**inputs).sample
        assert pushed == []
        with ranges(model):
            assert torch.equal(model(**inputs).sample, without)
        names = dict(pushed)
        count = len(pushed)
        model(**inputs)
        assert len(pushed) == count  # off again
    assert {
        "mid_block",
        "down_blocks.0.resnets.1",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    } <= names.keys()
    assert names["ldmfast.attention"] > names["mid_block"] and "ldmfast.conv2d" in names
    blocks_of_ours = {name for name, module in model.named_modules() if name.endswith(("resnets.0", "resnets.1"))}
    assert blocks_of_ours <= names.keys()


def test_a_gradient_is_named_too(pushed):
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    with ranges():
        ops.attention(q, q, q, backend="cpu").sum().backward()
    assert [name for name, _ in pushed] == ["ldmfast.attention", "ldmfast.attention_backward"]


def test_ranges_leave_everything_as_it_was(pushed):
    before = (blocks.resnet, unet_file.down_block, [vars(op).get("run") for op in OPS.values()])
    with pytest.raises(RuntimeError), ranges():
        assert blocks.resnet is not before[0] and unet_file.down_block is not before[1]
        raise RuntimeError
    assert (blocks.resnet, unet_file.down_block, [vars(op).get("run") for op in OPS.values()]) == before


def test_ranges_can_be_asked_for_from_the_start(pushed, monkeypatch):
    monkeypatch.setenv(ranges_file.VARIABLE, "1")
    named = ranges_file.block(lambda m: m)
    named(torch.nn.Conv2d(1, 1, 1))
    assert pushed == [("Conv2d", 0)]


@pytest.mark.parametrize(
    "name, kind",
    [
        ("void ldmfast::group_norm::fused_kernel<__half, 8>(ldmfast::GroupNormSiluArgs)", "norm"),
        ("void ldmfast::attention_detail::rows_kernel<...>(...)", "attention"),
        ("pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_f16_knob_7_64x128x128_4x1x1_kernel0_0", "attention"),
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__half, __half, float>", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "linear"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", "linear"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::Half>>", "elementwise"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "elementwise"),
        ("void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<c10::Half>(...)", "norm"),
        ("Memcpy DtoD (Device -> Device)", "elementwise"),
        ("group_norm_silu_kernel", "norm"),
    ],
)
def test_a_kernels_class_is_read_off_its_name(name, kind):
    assert classes.of_kernel(name) == kind


def event(name, device=DeviceType.CPU, kernels=(), parent=None, begin=0.0, took=1.0):
    of_time = SimpleNamespace(start=begin, end=begin + took, elapsed_us=lambda: took)
    kernels = [SimpleNamespace(name=name, duration=duration) for name, duration in kernels]
    return SimpleNamespace(
        name=name, device_type=device, kernels=kernels, cpu_parent=parent, time_range=of_time, is_user_annotation=False
    )


def test_on_a_gpu_a_kernel_is_counted_once_by_its_op_or_its_name():
    """An eager convolution with its bias, which is a kernel of its own; then a graph's kernels, which have no op."""
    conv = event("aten::conv2d")
    gemm, bias = ("cutlass_80_gemm", 30.0), ("vectorized_elementwise_kernel<CUDAFunctor_add>", 2.0)
    events = [
        conv,
        event("aten::cudnn_convolution", kernels=[gemm], parent=conv),
        event("aten::add_", kernels=[bias], parent=conv),
        event(gemm[0], DeviceType.CUDA, begin=0.0, took=30.0),
        event(bias[0], DeviceType.CUDA, begin=40.0, took=2.0),
        event("nvjet_hsh", DeviceType.CUDA, begin=50.0, took=10.0),
    ]
    found = trace.summed(list(trace.on_the_gpu(events)), trace.span(events) / 1e6, 1)
    parts = {part["part"]: (part["calls"], round(1e6 * part["seconds"], 3)) for part in found["parts"]}
    assert parts == {
        "convolution": (1, 30.0),
        "linear": (1, 10.0),
        "attention": (0, 0.0),
        "norm": (0, 0.0),
        "elementwise": (1, 2.0),
        "gaps": (0, 18.0),
    }
    assert [one["name"] for one in found["longest"]] == ["cutlass_80_gemm", "nvjet_hsh", bias[0]]
