"""The gradient of timestep_mlp with regard to its weights and biases."""

from __future__ import annotations

import torch

from ldmfast.ops import native, triton_backend
from ldmfast.ops.checks import require_device, require_dtype, require_shape, require_tensors
from ldmfast.ops.operator import Op
from ldmfast.ops.timestep_mlp import check as check_forward
from ldmfast.ops.timestep_mlp import kernel_inputs, native_fields, sinusoid
from ldmfast.ops.timestep_mlp import op as forward

NAME = "timestep_mlp_backward"

# With e the sinusoid, a = w1 e + b1 and h = silu(a):
#
# dout     [N, E]   dtype of w1
# returns  dw1 [F, dim], db1 [F], dw2 [E, F], db2 [E]   dtype of w1, also where a bias is None; sums are float32
#
#   dw2 = dout^T h,   db2 = sum over N of dout,   da = (dout w2) * silu'(a),   dw1 = da^T e,   db1 = sum over N of da
#
# A timestep that is itself to be learned has its gradient from the reference.
# Traffic: the weights, and their gradients.


def _check(dout, t, w1, b1, w2, b2, *others):
    require_tensors(NAME, dout=dout)
    check_forward(t, w1, b1, w2, b2, *others)
    require_shape(NAME, "dout", dout, (t.shape[0], w2.shape[0]), "[N, E]")
    require_dtype(NAME, (w1.dtype,), dout=dout)
    require_device(NAME, "w1", w1.device, dout=dout)


def _outputs(w1, w2):
    return tuple(w1.new_empty(shape) for shape in (w1.shape, w1.shape[:1], w2.shape, w2.shape[:1]))


def _fake(dout, t, w1, b1, w2, *others):
    return _outputs(w1, w2)


op = Op(
    NAME,
    "(Tensor dout, Tensor t, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int dim, bool flip_sin_to_cos, "
    "float downscale_freq_shift, float max_period) -> (Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast=lambda dtype, *args: args,
)


@op.backend("torch")
def _reference(dout, t, w1, b1, w2, b2, dim, flip_sin_to_cos, downscale_freq_shift, max_period):
    dtype = torch.float64 if w1.dtype is torch.float64 else torch.float32
    # rounded as the layers' input is
    e = sinusoid(t, dtype, dim, flip_sin_to_cos, downscale_freq_shift, max_period).to(w1.dtype).to(dtype)
    dout, w1_, w2_ = dout.to(dtype), w1.to(dtype), w2.to(dtype)
    a = e @ w1_.mT + (0.0 if b1 is None else b1.to(dtype))
    sigmoid = a.sigmoid()
    da = (dout @ w2_) * sigmoid * (1 + a * (1 - sigmoid))
    found = da.mT @ e, da.sum(0), dout.mT @ (a * sigmoid), dout.sum(0)
    return tuple(into.copy_(value) for into, value in zip(_outputs(w1, w2), found, strict=True))


def _without_kernel(dout, gradients):
    """Where there is nothing to launch for: with no hidden layer (F = 0) the last bias still has a gradient."""
    *others, db2 = gradients
    return *(gradient.zero_() for gradient in others), db2.copy_(dout.float().sum(0))


def _native(extension, dout, t, w1, b1, w2, b2, dim, flip_sin_to_cos, downscale_freq_shift, max_period):
    dw1, db1, dw2, db2 = gradients = _outputs(w1, w2)
    if dout.numel() == 0 or w1.numel() == 0:
        return _without_kernel(dout, gradients)
    t, freqs, w1, b1, w2, _ = kernel_inputs(t, w1, b1, w2, None, dim, downscale_freq_shift, max_period)
    fields = native_fields(t, freqs, w1, b1, w2, dim, flip_sin_to_cos)
    fields |= {"dout": dout.contiguous(), "dw1": dw1, "db1": db1, "dw2": dw2, "db2": db2}
    extension.timestep_mlp_backward(fields, *native.place(w1))
    return gradients


native.register(op, _native, lead=2)


def _triton(kernel, dout, t, w1, b1, w2, b2, dim, flip_sin_to_cos, downscale_freq_shift, max_period):
    gradients = _outputs(w1, w2)
    if dout.numel() == 0 or w1.numel() == 0:
        return _without_kernel(dout, gradients)
    t, freqs, w1, b1, w2, _ = kernel_inputs(t, w1, b1, w2, None, dim, downscale_freq_shift, max_period)
    kernel(dout.contiguous(), t, freqs, w1, b1, w2, *gradients, flip_sin_to_cos)
    return gradients


triton_backend.register(op, _triton)


@forward.gradient()
def _gradient(grads, args, outputs, needed, backend):
    if needed[0] or not op.fused((*grads, *args), backend):
        return None
    found = op(*grads, *args, backend)
    return None, *(value if wanted else None for value, wanted in zip(found, needed[1:], strict=False)), *[None] * 4
