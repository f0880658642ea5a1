"""The binding (csrc/bind.cpp) fills an op's struct by name, and refuses whatever does not fit csrc/ops.h."""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ldmfast.ops import native, triton_backend
from ldmfast.ops.registry import BACKWARD_OPS, OPS

CSRC = Path(__file__).parents[2] / "csrc"
CPU_ALONE = {"conv2d", "conv2d_weight_backward", "group_norm_affine", "layer_norm", "linear"}
GPU_ALONE = {"bias_residual", "geglu", "residual_layer_norm"}
ATTENTION = importlib.import_module("ldmfast.ops.attention")  # the package has the function under this name


@pytest.fixture(params=native.MODULES)
def extension(request):
    if reason := native.missing(request.param):
        pytest.skip(f"{request.param} {reason}")
    return native.module(request.param)


def structs() -> dict[str, dict[str, str]]:
    """The argument structs of csrc/ops.h as they are written: the fields' names and C types, in order."""
    found = {}
    for name, body in re.findall(r"^struct (\w+)Args \{\n(.*?)^\};", (CSRC / "ops.h").read_text(), re.S | re.M):
        fields = found[re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()] = {}
        for declaration in re.sub(r"//.*", "", body).split(";"):
            *kind, first = declaration.split(",")[0].split()[:-1], declaration.split(",")[0].split()[-1:]
            for field in [*first, *(part.strip() for part in declaration.split(",")[1:])]:
                fields[field] = " ".join(*kind)
    return found


def alone(which: str) -> set[str]:
    """The ops that the CPU's module has alone, or those that the GPU's have."""
    rows = re.search(rf"#define LDMFAST_{which}_OPS\(OP\)((?:.*\\\n)+.*)", (CSRC / "ops.h").read_text())[1]
    return set(re.findall(r"OP\((\w+),", rows))


KINDS = {
    "int64_t": "an integer of 64 bits",
    "float": "a number",
    "bool": "a truth value",
    "DType": "a code of native.DTYPES",
    "Activation": "a code of linear.ACTIVATIONS",
    "ConvForm": "a code of conv2d.FORMS",
    "DdimCoefficients": "seven numbers",
}


def test_the_modules_have_the_structs_as_they_are_written(extension):
    written = {
        op: {field: "a tensor or None" if "*" in kind else KINDS[kind] for field, kind in fields.items()}
        for op, fields in structs().items()
        if op not in alone("GPU" if extension is native.module("cpu") else "CPU")
    }
    assert extension.fields == written


def test_an_op_of_one_kind_of_module_has_no_other_native_backend():
    ops = {name: op for name, op in (OPS | BACKWARD_OPS).items() if {"cpu", "cuda"} & set(op.backends)}
    assert alone("CPU") == {name for name, op in ops.items() if "cuda" not in op.backends} == CPU_ALONE
    assert alone("GPU") == {name for name, op in ops.items() if "cpu" not in op.backends} == GPU_ALONE


@pytest.mark.parametrize(
    ("op", "field", "code", "reason"),
    [
        ("linear", "activation", 4, "expected a code of linear.ACTIVATIONS"),
        ("conv2d", "form", -1, "expected a code of conv2d.FORMS"),
    ],
)
def test_a_code_that_no_enum_has_is_refused(op, field, code, reason):
    extension = native.module("cpu")
    fields = {name: None if kind == "a tensor or None" else 0 for name, kind in extension.fields[op].items()}
    fields.pop("workspace")
    with pytest.raises(TypeError, match=f"^{op}: {field} is int, {reason}$"):
        getattr(extension, op)({**fields, field: code}, *native.place(torch.empty(0)))


def attention_fields():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8)
    return {**ATTENTION.native_fields(q, k, v, 0.3, None), "out": torch.full_like(q, torch.nan)}


def test_the_order_is_free():
    extension, place = native.module("cpu"), native.place(torch.empty(0))
    fields, reversed_fields = attention_fields(), dict(reversed(attention_fields().items()))
    assert list(fields) != list(reversed_fields)
    extension.attention(fields, *place)
    extension.attention(reversed_fields, *place)
    assert fields["out"].isfinite().all() and torch.equal(fields["out"], reversed_fields["out"])


@pytest.mark.parametrize("name", attention_fields())
def test_a_missing_field_is_refused(extension, name):
    fields = attention_fields()
    value = fields.pop(name)
    for others in (fields, {**fields, f"{name}_": value}):  # left out, or misspelt
        with pytest.raises(TypeError, match=rf"^attention: field {name} is missing$"):
            extension.attention(others, *native.place(torch.empty(0)))


@pytest.mark.parametrize("name", ["stride_qx", "workspace"])
def test_a_surplus_field_is_refused(extension, name):
    fields = {**attention_fields(), name: 0}
    with pytest.raises(TypeError, match=f"^attention: has no field {name} to be given$"):
        extension.attention(fields, *native.place(torch.empty(0)))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("q", 3, "q is int, expected a tensor or None"),
        ("mask", [1.0], "mask is list, expected a tensor or None"),
        ("N", 2.0, "N is float, expected an integer of 64 bits"),
        ("N", None, "N is NoneType, expected an integer of 64 bits"),
        ("L", 1 << 63, "L is int, expected an integer of 64 bits"),
        ("scale", "x", "scale is str, expected a number"),
        ("dtype", 4, "dtype is int, expected a code of native.DTYPES"),
        ("dtype", -1, "dtype is int, expected a code of native.DTYPES"),
        ("dtype", torch.float32, "dtype is torch.dtype, expected a code of native.DTYPES"),
    ],
)
def test_a_value_of_another_kind_is_refused(extension, name, value, reason):
    fields = {**attention_fields(), name: value}
    with pytest.raises(TypeError, match=f"^attention: {reason}$"):
        extension.attention(fields, *native.place(torch.empty(0)))


@pytest.mark.parametrize("coefficients", [[1.0] * 6, [1.0] * 8, [1.0] * 6 + ["x"], 1.0])
def test_coefficients_are_seven_numbers(extension, coefficients):
    x = torch.randn(1, 4)
    fields = importlib.import_module("ldmfast.ops.ddim_step").native_fields(x, x, coefficients, None, None, None)
    with pytest.raises(TypeError, match="^ddim_step: coefficients is .*, expected seven numbers$"):
        extension.ddim_step({**fields, "noise": None, "prev": x, "x0": x}, *native.place(x))


LISTS = {
    "another order": ("stride, x, wide, N", True),
    "one too few": ("x, N, stride", False),
    "one twice": ("x, N, stride, N", False),
    "one too many": ("x, N, stride, wide, wide", False),
    "no field": ("x, N, stride, width", False),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_fields_that_is_wrong_does_not_compile(tmp_path, name):
    """LDMFAST_FIELDS pairs a name with the field of that name; it cannot be swapped, and a wrong list is an error."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler is on PATH")
    names, compiles = LISTS[name]
    source = tmp_path / "list.cpp"
    source.write_text(
        """#include <string_view>
        #include "fields.h"
        namespace ldmfast {
        struct ToyArgs { const void* x; long N, stride; bool wide; };
        LDMFAST_FIELDS(ToyArgs, NAMES)
        constexpr bool right(std::string_view name, const ToyArgs& a, const void* at) {
          if (name == "x") return at == &a.x;
          if (name == "N") return at == &a.N;
          return name == "stride" ? at == &a.stride : at == &a.wide;
        }
        constexpr int wrong() {
          ToyArgs args{};
          int count = 0;
          Fields<ToyArgs>::each(args, [&](const char* name, auto& field) { count += !right(name, args, &field); });
          return count;
        }
        static_assert(wrong() == 0);
        }""".replace("NAMES", names)
    )
    done = subprocess.run(
        [compiler, "-std=c++17", "-fsyntax-only", f"-I{CSRC}", str(source)], capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) is compiles, done.stderr


@pytest.mark.parametrize(
    "capability,versions,sentence",
    [
        ((7, 5), (12080, 12080), "needs compute capability 8.0 (Ampere), this GPU has 7.5"),
        ((9, 0), (13000, 12040), "was built with CUDA 13.0, which needs a newer driver than this one for CUDA 12.4"),
        ((8, 0), (12080, 12020), None),
        ((12, 0), (12080, 13000), None),
    ],
    ids=str,
)
def test_a_gpu_or_driver_that_is_too_old_is_refused(monkeypatch, capability, versions, sentence):
    """T4 and V100 have no image of the kernels; torch may come with an older CUDA than nvcc's."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(native, "module", lambda backend: SimpleNamespace(versions=lambda: versions))
    found = native.unsupported.__wrapped__(0)
    assert found is None if sentence is None else found.startswith(sentence)


@pytest.mark.parametrize("index, entered", [(0, []), (1, [1])])
def test_a_launch_is_made_where_its_tensors_are(monkeypatch, index, entered):
    """Beside a current device 0: cudaSetDevice's way back to it would make a context there."""
    seen = []

    @contextlib.contextmanager
    def device(index):
        seen.append(index)
        yield

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(native, "current_device", lambda: 0)
    with native.there(SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))):
        assert seen == entered
    native._on(index, lambda *args: seen.append(args))("values", index)
    assert seen == [*entered, *entered, ("values", index)]


@pytest.mark.parametrize("module, backend", [(native, "cpu"), (native, "cuda-host"), (triton_backend, "triton")])
def test_every_way_to_a_kernel_asks_where_its_tensors_are(monkeypatch, module, backend):
    """The first call, of which the plan is made, and a call through the operator."""
    op, seen = OPS["timestep_mlp"], []

    class Asked(Exception):
        pass

    def there(tensor):
        seen.append(tensor)
        raise Asked

    monkeypatch.setattr(module, "there", there)
    args = op.example(torch.float32, "cpu")
    for call in (op.backends[backend].first, lambda args: op.backends[backend].run(*args)):
        with pytest.raises(Asked):
            call(args)
    assert len(seen) == 2 and all(tensor is args[0] for tensor in seen)
