"""The gradient of guidance and one DDIM step in one pass, in Triton; the formulas are those of DdimStepBackwardArgs.

Traffic: 2 reads (4 or 5 where x0 was clamped) and 2 to 4 writes of the sample's bytes.
"""

import torch
import triton
import triton.language as tl
from ldmfast.kernels.ddim_step import configuration, place, row_of_table, scalars, split
from ldmfast.kernels.launch_kernel import launch_kernel


@triton.jit(do_not_specialize=["blocks"])
def ddim_step_backward_kernel(
    dprev_ptr, dx0_ptr,  # [N, M]
    sample_ptr, output_ptr,  # [N, M]; read where CLIPPED
    dsample_ptr,  # [N, M]
    doutput_ptr,  # [N, M], or [2N, M] when GUIDED, unconditional half first
    dnoise_ptr,  # [N, M] or None
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
    dprev = tl.load(dprev_ptr + offs, mask).to(tl.float32)
    d0 = tl.load(dx0_ptr + offs, mask).to(tl.float32) + prev_x0 * dprev
    if CLIPPED:
        model = tl.load(output_ptr + offs, mask).to(tl.float32)
        if GUIDED:
            model += guidance * (tl.load(output_ptr + total + offs, mask).to(tl.float32) - model)
        x0 = x0_sample * tl.load(sample_ptr + offs, mask).to(tl.float32) + x0_model * model
        d0 = tl.where((x0 >= -clip) & (x0 <= clip), d0, 0.0)
    de = prev_eps * dprev
    dsample = x0_sample * d0 + eps_sample * de
    doutput = x0_model * d0 + eps_model * de
    tl.store(dsample_ptr + offs, dsample.to(dsample_ptr.dtype.element_ty), mask)
    if GUIDED:
        tl.store(doutput_ptr + total + offs, (guidance * doutput).to(doutput_ptr.dtype.element_ty), mask)
        doutput *= 1.0 - guidance
    tl.store(doutput_ptr + offs, doutput.to(doutput_ptr.dtype.element_ty), mask)
    if dnoise_ptr is not None:
        tl.store(dnoise_ptr + offs, (sigma * dprev).to(dnoise_ptr.dtype.element_ty), mask)


def ddim_step_backward(dprev, dx0, sample, model_output, dsample, doutput, dnoise, coefficients, table, guidance, clip):
    """Writes dsample and dnoise [N, ...] and doutput, as model_output; every tensor dense, as sample is, not empty.

    dnoise        None where it is not wanted
    model_output  [N, ...], or [2N, ...] with `guidance`
    coefficients  7 floats for every sample; ignored where table, [N, 7] float32, is given
    """
    config = configuration(sample.numel())
    programs, sizes = split(sample, table, config)
    with torch.cuda.device_of(sample):
        launch_kernel(
            ddim_step_backward_kernel, (programs,),
            dprev, dx0, sample, model_output, dsample, doutput, dnoise, table, *sizes,
            *scalars(coefficients, table, guidance, clip),
            GUIDED=guidance is not None, CLIPPED=clip is not None, BLOCK_M=config.block_m,
            num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
        )  # fmt: skip
