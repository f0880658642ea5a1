"""The gradient of ddim_step with regard to its latents, in one pass."""

from __future__ import annotations

import torch

from ldmfast.ops import native, triton_backend
from ldmfast.ops.checks import require_device, require_dtype, require_shape, require_tensors
from ldmfast.ops.ddim_step import check as check_forward
from ldmfast.ops.ddim_step import dense, empty_output, memory_layout, native_fields, rows_of
from ldmfast.ops.ddim_step import op as forward
from ldmfast.ops.operator import Op

NAME = "ddim_step_backward"

# dprev, dx0  [N, ...]   dtype of sample
# returns     dsample [N, ...], dmodel_output [N, ...] or with guidance [2N, ...], dnoise [N, ...] or [0] without noise;
#             dtype and layout of sample
#
# With c = 1, or 0 where the clamp held x0:   d0 = c * (dx0 + prev_x0 * dprev),   de = prev_eps * dprev,
#   dsample = x0_sample * d0 + eps_sample * de,   dm = x0_model * d0 + eps_model * de,   dnoise = sigma * dprev,
#   dmodel_output = dm, or with guidance s:  (1 - s) * dm for the unconditional half, s * dm for the other
#
# A table of coefficients that is itself to be learned has its gradient from the reference; so has a multistep method.
# Traffic: 5 * sample bytes, 7 with guidance.


def _check(dprev, dx0, sample, *others):
    require_tensors(NAME, dprev=dprev, dx0=dx0)
    check_forward(sample, *others)
    for name, tensor in (("dprev", dprev), ("dx0", dx0)):
        require_shape(NAME, name, tensor, tuple(sample.shape), "sample's shape")
    require_dtype(NAME, (sample.dtype,), dprev=dprev, dx0=dx0)
    require_device(NAME, "sample", sample.device, dprev=dprev, dx0=dx0)


def _outputs(sample, model_output, noise):
    like_model = torch.empty(
        model_output.shape, dtype=sample.dtype, device=sample.device, memory_format=memory_layout(sample)
    )
    return empty_output(sample), like_model, sample.new_empty(0) if noise is None else empty_output(sample)


def _fake(dprev, dx0, sample, model_output, coefficients, table, guidance, noise, clip):
    return _outputs(sample, model_output, noise)


op = Op(
    NAME,
    "(Tensor dprev, Tensor dx0, Tensor sample, Tensor model_output, float[] coefficients, Tensor? table, "
    "float? guidance, Tensor? noise, float? clip) -> (Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast=lambda dtype, *args: args,
    numbers=4,
)


@op.backend("torch")
def _reference(dprev, dx0, sample, model_output, coefficients, table, guidance, noise, clip):
    dtype = torch.float64 if sample.dtype is torch.float64 else torch.float32
    outputs = _outputs(sample, model_output, noise)
    dprev, d0, x, m = (tensor.to(dtype) for tensor in (dprev, dx0, sample, model_output))
    if table is not None:
        coefficients = table.to(dtype).reshape(-1, 7, *[1] * (x.dim() - 1)).unbind(1)
    x0_x, x0_m, eps_x, eps_m, prev_x0, prev_eps, sigma = coefficients
    d0 = d0 + prev_x0 * dprev
    if clip is not None:
        if guidance is not None:
            unconditional, conditional = m.chunk(2)
            m = unconditional + guidance * (conditional - unconditional)
        d0 = d0 * ((x0_x * x + x0_m * m).abs() <= clip)
    de = prev_eps * dprev
    dm = x0_m * d0 + eps_m * de
    found = [x0_x * d0 + eps_x * de, dm if guidance is None else torch.cat([(1 - guidance) * dm, guidance * dm])]
    if noise is not None:
        found.append(sigma * dprev)
    for into, value in zip(outputs, found, strict=False):
        into.copy_(value)
    return outputs


def _native(extension, dprev, dx0, sample, model_output, coefficients, table, guidance, noise, clip):
    dsample, dmodel_output, dnoise = gradients = _outputs(sample, model_output, noise)
    if sample.numel() == 0:
        return gradients
    sample, model_output, dprev, dx0 = dense(sample, model_output, dprev, dx0)
    fields = native_fields(sample, model_output, coefficients, table, guidance, clip)
    fields |= {"dprev": dprev, "dx0": dx0, "dsample": dsample, "dmodel_output": dmodel_output}
    fields |= {"dnoise": None if noise is None else dnoise}
    extension.ddim_step_backward(fields, *native.place(sample))
    return gradients


native.register(op, _native, lead=2)


def _triton(kernel, dprev, dx0, sample, model_output, coefficients, table, guidance, noise, clip):
    gradients = _outputs(sample, model_output, noise)
    if sample.numel():
        sample, model_output, dprev, dx0 = dense(sample, model_output, dprev, dx0)
        table = None if table is None else table.contiguous()
        dnoise = None if noise is None else gradients[2]
        kernel(dprev, dx0, sample, model_output, *gradients[:2], dnoise, coefficients, table, guidance, clip)
    return gradients


triton_backend.register(op, _triton)


@forward.gradient()
def _gradient(grads, args, outputs, needed, backend):
    sample, model_output, coefficients, table, guidance, noise, clip, row, weights, *_ = args
    table = table if row is None else rows_of(table, row).expand(sample.shape[0], 7)
    args = sample, model_output, coefficients, table, guidance, noise, clip
    if needed[3] or weights or not op.fused((*grads, *args), backend):
        return None
    dsample, dmodel_output, dnoise = op(*grads, *args, backend)
    return (
        dsample if needed[0] else None,
        dmodel_output.to(model_output.dtype) if needed[1] else None,
        None,
        None,
        None,
        dnoise.to(noise.dtype) if needed[5] else None,
        *[None] * 6,
    )
