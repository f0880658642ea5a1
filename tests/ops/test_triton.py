"""The Triton kernels themselves: their numbers under the interpreter, and every shipped configuration compiled.

TRITON_INTERPRET is read when a kernel is decorated, so the two halves need a process each:
    pytest tests/ops/test_triton.py                        compiles for sm_80 and sm_90, no GPU needed
    TRITON_INTERPRET=1 pytest tests/ops/test_triton.py     numbers, float32 and float16 (its bfloat16 is wrong)
tests/ops/test_ops_numbers.py runs them through ldmfast.ops as well; here are the paths that shapes alone decide.
"""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

from ldmfast.kernels import attention, ddim_step, group_norm_silu, timestep_mlp  # noqa: E402
from ldmfast.ops.group_norm_silu import as_ncp  # noqa: E402
from ldmfast.ops.registry import BACKWARD_OPS, OPS  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(
    not INTERPRETED, reason="needs a process with TRITON_INTERPRET=1: kernels run on the CPU"
)
compiled = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 replaces the compiler")
FLOOR = {torch.float32: 1e-6, torch.float16: 2.5e-4}
dtypes = pytest.mark.parametrize("dtype", list(FLOOR), ids=lambda dtype: str(dtype).removeprefix("torch."))


def check(y, reference, *tensors):
    """y is at most twice as far from the float64 reference as the reference in y's dtype is, and a floor."""
    exact = reference(*(t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in tensors))

    def error(value):
        return ((value.double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()

    assert torch.isfinite(y).all(), "not every output was written"
    assert error(y) <= 2 * error(reference(*tensors)) + FLOOR[y.dtype]


def poisoned(*shape, like):
    return torch.full(shape, float("nan"), dtype=like.dtype)


def group_norm_reference(x, weight, bias, add, scale, shift, groups, silu):
    def rows(t):
        return t.reshape(*t.shape, *[1] * (x.ndim - 2))

    y = F.group_norm((x if add is None else x + rows(add)).contiguous(), groups, weight, bias, 1e-5)
    y = y if scale is None else y * (1 + rows(scale))
    y = y if shift is None else y + rows(shift)
    return F.silu(y) if silu else y


def launch_group_norm(x, *others):
    x, channels_last, strides = as_ncp(x)
    group_norm_silu.group_norm_silu(x, strides, channels_last, *others)


GROUP_NORMS = {  # C, groups, H, W, whether it takes two launches: contiguous, channels_last
    "one tile": (1280, 32, 4, 4, False, False),
    "channels loop": (80, 8, 32, 64, False, False),
    "a tile that covers": (640, 32, 17, 31, False, False),
    "two launches": (130, 13, 72, 72, True, True),  # 13 groups: a tile of 12 in channels_last, and one of 1
    "two launches, odd": (16, 4, 125, 125, True, True),
    "1x1": (1920, 32, 1, 1, False, False),
    "80 a group": (2560, 32, 9, 8, False, False),
}


@interpreted
@dtypes
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", GROUP_NORMS)
def test_group_norm_silu(name, last, dtype):
    C, groups, H, W, *split = GROUP_NORMS[name]
    assert group_norm_silu.configuration(1, C, H * W, groups, last).split == split[last]
    mean = 300.0 if dtype is torch.float32 else 3.0
    wide = (torch.randn(1, 2 * C, H, W) + mean).to(dtype)
    wide = wide.contiguous(memory_format=torch.channels_last) if last else wide
    x = wide[:, C:]  # sliced
    weight, bias, add, scale, shift = (torch.randn(*shape).to(dtype) for shape in [(C,)] * 2 + [(1, C)] * 3)
    y = torch.full_like(x, float("nan"), memory_format=torch.channels_last if last else torch.contiguous_format)
    extra, silu = ((None, None, None), True) if dtype is torch.float32 else ((add, scale, shift), H > 4)
    launch_group_norm(x, y, weight, bias, *extra, groups, 1e-5, silu)
    check(y, group_norm_reference, x, weight, bias, *extra, groups, silu)


@interpreted
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_group_norm_keeps_nan_in_its_group(last):
    x = torch.randn(1, 130, 72, 72)
    x[0, 15, 3, 4] = float("nan")  # group 1 of 10 channels
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    y = torch.zeros_like(x)
    launch_group_norm(x, y, None, None, None, None, None, 13, 1e-5, True)
    assert y[:, 10:20].isnan().all() and not y[:, :10].isnan().any() and not y[:, 20:].isnan().any()


@interpreted
def test_group_norm_moments_of_unlike_parts():
    """Half of a group at 0, half at 1000: a lane's first number is far from the mean, and the parts' means differ."""
    x = torch.randn(1, 8, 128, 128)
    x[:, :, 64:] += 1000
    y = torch.full_like(x, float("nan"))
    launch_group_norm(x, y, None, None, None, None, None, 2, 1e-5, False)
    check(y, lambda x: F.group_norm(x, 2), x)


@interpreted
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_strides_past_32_bits_inside_a_tile_are_refused_before_the_choice(backward):
    """In a sentence, so that another backend runs: 40 channels, in a tile of 64, far from each other."""
    for stride, refused in ((1 << 24, False), (1 << 25, True)):
        x = torch.empty_strided((1, 40, 2, 2), (0, stride, 2, 1), device="meta")  # of no memory
        op, args = OPS["group_norm_silu"], (x, None, None, 1, 1e-5, True, None, None, None)
        if backward:
            op, args = BACKWARD_OPS["group_norm_silu_backward"], (x, *args)
        reason = op.backends["triton"].reason(args)
        assert (reason is not None) == refused and (not refused or "reaches past 2^31 inside a tile" in reason)


@interpreted
@pytest.mark.parametrize("name, widest", [("attention", 256), ("attention_backward", 80)])
def test_wider_heads_are_refused_before_the_choice(name, widest):
    for d, refused in ((widest, False), (widest + 1, True)):
        q = torch.randn(1, 2, 1, d)
        op, args = (OPS[name], (q, q, q)) if name in OPS else (BACKWARD_OPS[name], (q, q, q, q, q))
        reason = op.backends["triton"].refusal((*args, 1.0, None))
        assert (reason is not None) == refused and (not refused or f"D={d} is over {widest}" in reason)


def attention_reference(q, k, v, mask, scale):
    scores = torch.einsum("nlhd,nshd->nhls", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return torch.einsum("nhls,nshd->nlhd", scores.softmax(-1).nan_to_num(0.0), v)


def masks(kind, n, h, rows, keys, dtype):
    made = {
        "none": lambda: None,
        "keys": lambda: torch.rand(n, 1, 1, keys) > 0.3,
        "rows": lambda: torch.rand(1, h, rows, keys) > 0.5,
        "added": lambda: torch.randn(n, 1, rows, keys).to(dtype),
        "-inf": lambda: torch.where(torch.rand(n, 1, 1, keys) > 0.3, 0.0, float("-inf")).to(dtype),
        "lowest": lambda: torch.full((1, 1, 1, keys), torch.finfo(dtype).min, dtype=dtype),
    }[kind]()
    return None if made is None else made.expand(n, h, rows, keys)


@interpreted
@dtypes
@pytest.mark.parametrize("mask", ["none", "keys", "rows", "added", "-inf"])
@pytest.mark.parametrize(
    "shape", [(2, 70, 77, 2, 40), (1, 130, 64, 2, 64), (1, 33, 150, 1, 80), (1, 3, 1, 3, 160)], ids=str
)
def test_attention(shape, mask, dtype):
    n, rows, keys, h, d = shape
    q, k, v = (torch.randn(n, length, h, d).to(dtype) for length in (rows, keys, keys))
    bias = masks(mask, n, h, rows, keys, dtype)
    out = poisoned(*q.shape, like=q)
    attention.attention(q, k, v, out, bias, d**-0.5)
    check(out, attention_reference, q, k, v, bias, d**-0.5)


@interpreted
@pytest.mark.parametrize("d", [1, 8, 20, 24, 48, 56, 72, 96, 100, 128, 144, 192, 255, 256])
def test_attention_of_any_width_and_stride(d):
    q, k, v = torch.randn(1, 35, 3, 2, d + 1)[..., :d].unbind(2)  # one projection, with an odd stride
    for scale in (d**-0.5, -0.3, 0.0):  # only a positive scale can be moved past the maximum
        out = poisoned(1, 35, 2, d, like=q)
        attention.attention(q, k, v, out, None, scale)
        check(out, attention_reference, q, k, v, None, scale)


@interpreted
@dtypes
def test_attention_with_nothing_to_attend_to(dtype):
    q, k = torch.randn(1, 5, 2, 40).to(dtype), torch.randn(1, 90, 2, 40).to(dtype)
    dead = torch.ones(1, 2, 5, 90, dtype=torch.bool)
    dead[:, :, 3] = False
    out = poisoned(*q.shape, like=q)
    attention.attention(q, k, k, out, dead, 1.0)
    assert out[:, 3].eq(0).all()
    check(out, attention_reference, q, k, k, dead, 1.0)
    out.fill_(float("nan"))
    attention.attention(q, k[:, :0], k[:, :0], out, None, 1.0)
    assert out.eq(0).all()


@interpreted
def test_attention_takes_the_lowest_number_for_no_infinity():
    q, k = torch.randn(1, 5, 2, 40), torch.randn(1, 90, 2, 40)
    out = poisoned(*q.shape, like=q)
    attention.attention(q, k, k, out, masks("lowest", 1, 2, 5, 90, torch.float32), 1.0)
    torch.testing.assert_close(out, k.mean(1, keepdim=True).expand_as(out))


def timestep_reference(t, w1, b1, w2, b2, freqs, dim, flip, rounded):
    # the sinusoid is float32 by contract and rounded to the weights' dtype, whatever the precision of the rest
    angle = t.float()[:, None] * freqs.float()[None, :]
    parts = [angle.cos(), angle.sin()] if flip else [angle.sin(), angle.cos()]
    x = F.pad(torch.cat(parts, 1), (0, dim % 2)).to(rounded).to(w1.dtype)
    return F.linear(F.silu(F.linear(x, w1, b1)), w2, b2)


@interpreted
@dtypes
@pytest.mark.parametrize(
    "n,dim,f,e,bias", [(1, 320, 1280, 1280, True), (2, 33, 130, 7, False), (5, 256, 1280, 65, True)]
)
@pytest.mark.parametrize("flip", [True, False])
def test_timestep_mlp(n, dim, f, e, bias, flip, dtype):
    t, freqs = torch.rand(n) * 1000, torch.exp(-torch.arange(dim // 2) / (dim // 2) * 9.21)
    w1, w2 = (torch.randn(f, dim) / dim**0.5).to(dtype), (torch.randn(e, f) / f**0.5).to(dtype)
    b1, b2 = (torch.randn(f).to(dtype), torch.randn(e).to(dtype)) if bias else (None, None)
    out, hidden = poisoned(n, e, like=w1), torch.full((n, f), float("nan"))
    timestep_mlp.timestep_mlp(t, freqs, w1, b1, w2, b2, out, flip, hidden)
    check(out, timestep_reference, t, w1, b1, w2, b2, freqs, dim, flip, dtype)


def ddim_reference(sample, output, noise, table, guidance, clip):
    c = table.to(sample.dtype).T.reshape(7, -1, *[1] * (sample.ndim - 1))
    if guidance is not None:
        unconditional, conditional = output.chunk(2)
        output = unconditional + guidance * (conditional - unconditional)
    x0 = c[0] * sample + c[1] * output
    x0 = x0 if clip is None else x0.clamp(-clip, clip)
    prev = c[4] * x0 + c[5] * (c[2] * sample + c[3] * output)
    return torch.stack([prev if noise is None else prev + c[6] * noise, x0])


@interpreted
@dtypes
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 5, 7), (2, 4, 256, 160)], ids=str)
@pytest.mark.parametrize("with_table", [False, True])
@pytest.mark.parametrize("guidance,noise,clip", [(None, False, None), (7.5, False, None), (1, True, 1.0)])
def test_ddim_step(shape, with_table, guidance, noise, clip, dtype):
    sample = torch.randn(shape).to(dtype)
    output = torch.randn(shape[0] * (1 if guidance is None else 2), *shape[1:]).to(dtype)
    noise = torch.randn(shape).to(dtype) if noise else None
    table = torch.randn(shape[0] if with_table else 1, 7)
    both = poisoned(2, *shape, like=sample)
    ddim_step.ddim_step(sample, output, noise, *both, table[0].tolist(), table if with_table else None, guidance, clip)
    check(both, ddim_reference, sample, output, noise, table, guidance, clip)


@pytest.fixture(scope="module")
def resources():
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    import resources

    return resources


@compiled
def test_every_shipped_configuration_compiles_and_fits(resources):
    every = tuple(name for name, op in OPS.items() if "triton" in op.backends)  # triton_calls.py has a row of each
    usages = resources.all_triton_usage((80, 90), every)
    assert {usage.kernel for usage in usages} >= {"group_norm_silu_kernel", "attention_kernel", "ddim_step_kernel"}
    assert not [usage for usage in usages if usage.spill]
    # 99 KB: what sm_86 and sm_89, which run the code of sm_80, have for a block; 227 KB on sm_90
    limits = {80: 99 << 10, 90: 227 << 10}
    assert not [usage for usage in usages if usage.shared > limits[usage.arch]]


@compiled
def test_the_front_end_takes_what_is_one_for_a_constant(resources):
    """A batch of one, one pixel, one key; `python bench/triton_front_end.py` takes every launch of cases.py through."""
    import triton_front_end

    chosen = triton_front_end.representatives(triton_front_end.launches(dtypes=(torch.float16, torch.float32)))
    ones = {name for launch in chosen for name, value in launch.arguments.items() if type(value) is int and value == 1}
    assert ones >= {"N", "P", "L", "S", "H"}
    for launch in chosen:
        triton_front_end.lower(launch)


def self_attention_of_width_40(resources):
    launches = resources.triton_launches(["attention"])
    return next(launch for launch in launches if "40] x 4096 bfloat16" in launch.label)


@compiled
@pytest.mark.parametrize("arch,warps", [(80, 1), (90, 4)], ids=["mma.sync of a warp", "wgmma of four"])
def test_width_40_is_not_padded_to_64(resources, arch, warps):
    """The loop's tensor-core work, counted in the PTX: 48 columns in both products, where padding takes 64."""
    launch = self_attention_of_width_40(resources)
    block_m, block_n = launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"]
    ptx = resources.compile_launch(launch, arch)[0].asm["ptx"]
    shapes = re.findall(r"(?:wgmma\.mma_async|mma)\.sync\.aligned\.m(\d+)n(\d+)k(\d+)", ptx)
    work = sum(int(m) * int(n) * int(k) for m, n, k in shapes) * launch.options["num_warps"] // warps
    assert work == block_m * block_n * (48 + 48)


@compiled
def test_copies_are_wide_though_40_is_no_multiple_of_16(resources):
    """16 bytes; 8 for the narrow tile, which has 4 numbers for each of 256 threads."""
    ptx = resources.compile_launch(self_attention_of_width_40(resources), 80)[0].asm["ptx"]
    copies = [line for line in ptx.splitlines() if "cp.async.c" in line and "shared.global" in line]
    assert copies and all(", 0x10," in line or ", 0x8," in line for line in copies)
