"""Guidance and one DDIM step in one pass, in Triton.

The arithmetic is that of `DdimStepArgs` in csrc/ops.h; tensors are read once and written once, maths is float32.
Traffic: (2 + guided) reads and 2 writes of the sample's bytes, and the noise.   Source: Song et al. 2020, equation 12.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from ldmfast.kernels.launch_kernel import launch_kernel


@triton.jit
def place(M, blocks, BLOCK_M: tl.constexpr):
    # this program's row of [N, M], the offsets of its elements, and which of them exist
    pid = tl.program_id(0)
    row = (pid // blocks).to(tl.int64)
    offs_row = (pid % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return row, row * M + offs_row, offs_row < M


@triton.jit
def row_of_table(table_ptr, row):
    # x0_sample, x0_model, eps_sample, eps_model, prev_x0, prev_eps and sigma of a sample
    table_ptr += row * 7
    return (
        tl.load(table_ptr), tl.load(table_ptr + 1), tl.load(table_ptr + 2), tl.load(table_ptr + 3),
        tl.load(table_ptr + 4), tl.load(table_ptr + 5), tl.load(table_ptr + 6),
    )  # fmt: skip


@triton.jit
def picked_row(table_ptr, row_ptr, row, rows, stride_row):
    # as above, of the row of the table that row_ptr names for this sample; NaN where there is none
    picked = tl.load(row_ptr + row * stride_row)
    known = (picked >= 0) & (picked < rows)
    table_ptr += tl.where(known, picked, 0) * 7
    nan = float("nan")
    return (
        tl.load(table_ptr, known, nan), tl.load(table_ptr + 1, known, nan), tl.load(table_ptr + 2, known, nan),
        tl.load(table_ptr + 3, known, nan), tl.load(table_ptr + 4, known, nan), tl.load(table_ptr + 5, known, nan),
        tl.load(table_ptr + 6, known, nan),
    )  # fmt: skip


@triton.jit(do_not_specialize=["blocks", "rows", "stride_row"])
def ddim_step_kernel(
    sample_ptr,  # [N, M]
    output_ptr,  # [N, M], or [2N, M] when GUIDED, unconditional half first
    noise_ptr,  # [N, M] or None
    prev_ptr,  # [N, M]
    x0_ptr,  # [N, M]
    table_ptr,  # [rows, 7] float32 or None
    row_ptr,  # [N] int64, stride stride_row, or None: row n of the table is that of sample n
    history1_ptr, history2_ptr, history3_ptr,  # [N, M] or None; of a multistep method
    total, M, blocks,  # N * M, elements of a row, blocks of a row
    x0_sample, x0_model, eps_sample, eps_model, prev_x0, prev_eps, sigma,  # used without a table
    guidance, clip, rows, stride_row, weight0, weight1, weight2, weight3,
    GUIDED: tl.constexpr,
    CLIPPED: tl.constexpr,
    MULTISTEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    row, offs, mask = place(M, blocks, BLOCK_M)
    if row_ptr is not None:
        x0_sample, x0_model, eps_sample, eps_model, prev_x0, prev_eps, sigma = picked_row(
            table_ptr, row_ptr, row, rows, stride_row
        )
    elif table_ptr is not None:
        x0_sample, x0_model, eps_sample, eps_model, prev_x0, prev_eps, sigma = row_of_table(table_ptr, row)
    sample = tl.load(sample_ptr + offs, mask).to(tl.float32)
    model = tl.load(output_ptr + offs, mask).to(tl.float32)
    if GUIDED:
        conditional = tl.load(output_ptr + total + offs, mask).to(tl.float32)
        model += guidance * (conditional - model)
    eps = eps_sample * sample + eps_model * model
    if MULTISTEP:
        tl.store(x0_ptr + offs, eps.to(x0_ptr.dtype.element_ty), mask)
        eps *= weight0
        if history1_ptr is not None:
            eps += weight1 * tl.load(history1_ptr + offs, mask).to(tl.float32)
        if history2_ptr is not None:
            eps += weight2 * tl.load(history2_ptr + offs, mask).to(tl.float32)
        if history3_ptr is not None:
            eps += weight3 * tl.load(history3_ptr + offs, mask).to(tl.float32)
        model = eps
    x0 = x0_sample * sample + x0_model * model
    if CLIPPED:
        x0 = tl.minimum(tl.maximum(x0, -clip, tl.PropagateNan.ALL), clip, tl.PropagateNan.ALL)
    prev = prev_x0 * x0 + prev_eps * eps
    if noise_ptr is not None:
        prev += sigma * tl.load(noise_ptr + offs, mask).to(tl.float32)
    if not MULTISTEP:
        tl.store(x0_ptr + offs, x0.to(x0_ptr.dtype.element_ty), mask)
    tl.store(prev_ptr + offs, prev.to(prev_ptr.dtype.element_ty), mask)


@dataclass(frozen=True)
class Configuration:
    block_m: int
    num_warps: int
    num_stages: int = 1  # no loop to pipeline


def configuration(total: int) -> Configuration:
    """A latent is small (16,384 numbers at 512x512): many small blocks, so that most of the chip takes part."""
    # 8 numbers a thread are one 16-byte access in 16 bits
    return Configuration(256, 1) if total <= 1 << 18 else Configuration(1024, 4)


def split(sample, table, config: Configuration) -> tuple[int, tuple[int, int, int]]:
    """How many programs; and N * M, M and the blocks of a row: one row for all, or one for each of a table."""
    total = sample.numel()
    row = total if table is None else total // sample.shape[0]
    blocks = triton.cdiv(row, config.block_m)
    return total // row * blocks, (total, row, blocks)


def scalars(coefficients, table, guidance, clip) -> list[float]:
    """Floats, never ints: Triton specialises a kernel on an int that is 1 or a multiple of 16."""
    return [*([0.0] * 7 if table is not None else map(float, coefficients)), float(guidance or 0), float(clip or 0)]


def ddim_step(
    sample, model_output, noise, prev, x0, coefficients, table, guidance, clip, row=None, weights=(), history=()
):
    """Writes prev and x0 [N, ...], dense as sample is, not empty; see DdimStepArgs in csrc/ops.h.

    model_output  [N, ...], or [2N, ...] with `guidance`; noise as sample, or None
    coefficients  7 floats for every sample; ignored where table is given: [N, 7] float32, or [rows, 7] with
    row           [1] or [N], int64: the table's row of each sample
    guidance, clip  float or None
    weights, history  of a multistep method, one weight more than tensors; x0 then takes what joins the history
    """
    config = configuration(sample.numel())
    programs, sizes = split(sample, table, config)
    past = (*history, None, None, None)[:3]
    places = (0, 0) if row is None else (table.shape[0], row.stride(0) if row.shape[0] > 1 else 0)
    factors = map(float, (*weights, 0, 0, 0, 0)[:4])
    with torch.cuda.device_of(sample):
        launch_kernel(
            ddim_step_kernel, (programs,),
            sample, model_output, noise, prev, x0, table, row, *past, *sizes,
            *scalars(coefficients, table, guidance, clip), *places, *factors,
            GUIDED=guidance is not None, CLIPPED=clip is not None, MULTISTEP=len(weights) > 0, BLOCK_M=config.block_m,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
