"""Guidance and one DDIM step in one pass, in Triton.

The arithmetic is that of `DdimStepArgs` in csrc/ops.h; tensors are read once and written once, maths is float32.
Traffic: (2 + guided) reads and 2 writes of the sample's bytes, and the noise.   Source: Song et al. 2020, equation 12.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


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


@triton.jit(do_not_specialize=["blocks"])
def ddim_step_kernel(
    sample_ptr,  # [N, M]
    output_ptr,  # [N, M], or [2N, M] when GUIDED, unconditional half first
    noise_ptr,  # [N, M] or None
    prev_ptr,  # [N, M]
    x0_ptr,  # [N, M]
    table_ptr,  # [N, 7] float32 or None
    total, M, blocks,  # N * M, elements of a row, blocks of a row
    x0_sample, x0_model, eps_sample, eps_model, prev_x0, prev_eps, sigma,  # used without a table
    guidance, clip,
    GUIDED: tl.constexpr,
    CLIPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    row, offs, mask = place(M, blocks, BLOCK_M)
    if table_ptr is not None:
        x0_sample, x0_model, eps_sample, eps_model, prev_x0, prev_eps, sigma = row_of_table(table_ptr, row)
    sample = tl.load(sample_ptr + offs, mask).to(tl.float32)
    model = tl.load(output_ptr + offs, mask).to(tl.float32)
    if GUIDED:
        conditional = tl.load(output_ptr + total + offs, mask).to(tl.float32)
        model += guidance * (conditional - model)
    x0 = x0_sample * sample + x0_model * model
    if CLIPPED:
        x0 = tl.minimum(tl.maximum(x0, -clip, tl.PropagateNan.ALL), clip, tl.PropagateNan.ALL)
    prev = prev_x0 * x0 + prev_eps * (eps_sample * sample + eps_model * model)
    if noise_ptr is not None:
        prev += sigma * tl.load(noise_ptr + offs, mask).to(tl.float32)
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


def ddim_step(sample, model_output, noise, prev, x0, coefficients, table, guidance, clip):
    """Writes prev and x0 [N, ...], dense as sample is, not empty; see DdimStepArgs in csrc/ops.h.

    model_output  [N, ...], or [2N, ...] with `guidance`; noise as sample, or None
    coefficients  7 floats for every sample; ignored where table, [N, 7] float32, is given
    guidance, clip  float or None
    """
    config = configuration(sample.numel())
    programs, sizes = split(sample, table, config)
    with torch.cuda.device_of(sample):
        ddim_step_kernel[(programs,)](
            sample, model_output, noise, prev, x0, table, *sizes, *scalars(coefficients, table, guidance, clip),
            GUIDED=guidance is not None, CLIPPED=clip is not None, BLOCK_M=config.block_m,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
