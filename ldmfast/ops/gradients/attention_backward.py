"""The gradient of attention, flash-style: scores and weights are recomputed, and never reach memory."""

from __future__ import annotations

import torch

from ldmfast.ops import native, triton_backend
from ldmfast.ops.attention import check as check_forward
from ldmfast.ops.attention import expanded_mask, native_fields
from ldmfast.ops.attention import op as forward
from ldmfast.ops.checks import require_device, require_dtype, require_shape, require_tensors, short
from ldmfast.ops.operator import Op

NAME = "attention_backward"

# With P = softmax(scale * q k^T + mask), out = P v and delta = sum over D of dout * out:
#
# dout, out  [N, L, H, D]   dtype of q
# returns    dq [N, L, H, D], dk [N, S, H, D], dv [N, S, H, D]   dense, dtype of q; sums are float32
#
#   dv = P^T dout,   dS = P * (dout v^T - delta),   dq = scale * dS k,   dk = scale * dS^T q
#
# A row with every key masked gives zeros. A mask that is itself to be learned has its gradient from the reference.
# Work: 10 * N * H * L * S * D FLOP, and 2 more for the log of each row's sum, which is recomputed.
# Source: Dao et al. 2022 (arXiv 2205.14135), algorithm 4.


def _check(dout, q, k, v, out, scale, mask):
    require_tensors(NAME, dout=dout, out=out)
    check_forward(q, k, v, scale, mask)
    for name, tensor in (("dout", dout), ("out", out)):
        require_shape(NAME, name, tensor, tuple(q.shape), "q's shape")
    require_dtype(NAME, (q.dtype,), dout=dout, out=out)
    require_device(NAME, "q", q.device, dout=dout, out=out)


def _outputs(q, k):
    return tuple(torch.empty(like.shape, dtype=q.dtype, device=q.device) for like in (q, k, k))


def _fake(dout, q, k, *others):
    return _outputs(q, k)


op = Op(
    NAME,
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, float scale, Tensor? mask) -> (Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    autocast=lambda dtype, *args: args,
)


@op.backend("torch")
def _reference(dout, q, k, v, out, scale, mask):
    dq, dk, dv = (gradient.zero_() for gradient in _outputs(q, k))
    dtype = torch.float64 if q.dtype is torch.float64 else torch.float32
    mask = expanded_mask(mask, q, k)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq, dk, dv
    for n in range(q.shape[0]):
        for h in range(q.shape[2]):  # one head at a time, since this holds its L x S scores
            do, qh, kh, vh, o = (tensor[n, :, h].to(dtype) for tensor in (dout, q, k, v, out))
            p = _weights(scale * (qh @ kh.mT), None if mask is None else mask[n, h])
            ds = p * (do @ vh.mT - (do * o).sum(1, keepdim=True))
            dq[n, :, h], dk[n, :, h], dv[n, :, h] = scale * (ds @ kh), scale * (ds.mT @ qh), p.mT @ do
    return dq, dk, dv


def _weights(scores, mask):
    """softmax(scores + mask) over the keys, [L, S]; zeros for a row with every key masked."""
    if mask is None:
        return scores.softmax(1)
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    dead = (scores == -torch.inf).all(1, keepdim=True)
    return scores.masked_fill(dead, 0).softmax(1).masked_fill(dead, 0)


def _native(extension, dout, q, k, v, out, scale, mask):
    dq, dk, dv = _outputs(q, k)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    fields = native_fields(q, k, v, scale, mask)
    fields |= {"dout": dout.contiguous(), "out": out.contiguous(), "dq": dq, "dk": dk, "dv": dv}
    extension.attention_backward(fields, *native.place(q))
    return dq, dk, dv


native.register(op, _native, lead=1)


def _triton(kernel, dout, q, k, v, out, scale, mask):
    dq, dk, dv = _outputs(q, k)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    kernel(dout.contiguous(), q, k, v, out.contiguous(), dq, dk, dv, expanded_mask(mask, q, k), scale)
    return dq, dk, dv


@triton_backend.register(op, _triton).refuses
def _wide(dout, q, *others):
    from ldmfast.kernels.attention_backward import WIDEST

    widest = WIDEST[q.element_size()]
    return f"head width D={q.shape[3]} is over {widest} in {short(q.dtype)}" if q.shape[3] > widest else None


@forward.gradient(keeps_output=True)
def _gradient(grads, args, outputs, needed, backend):
    q, k, v, scale, mask = args
    inputs = (*grads, q, k, v, *outputs, scale, mask)
    if needed[4] or backend in ("sdpa", "cudnn") or not op.fused(inputs, backend):
        return None  # SDPA's own gradient, by autograd, where SDPA was asked for
    found = op(*inputs, backend)
    return *(gradient if wanted else None for gradient, wanted in zip(found, needed, strict=False)), None, None
