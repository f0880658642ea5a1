"""softmax(q k^T) v, flash-style: the L x S scores never reach memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldmfast.ops import native, speeds, triton_backend
from ldmfast.ops.checks import require_device, require_dtype, require_float, require_tensors, short
from ldmfast.ops.dispatcher import transformed
from ldmfast.ops.operator import Op

NAME = "attention"


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    mask: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T + mask) v, head by head.

    q        [N, L, H, D]  float16 | bfloat16 | float32 (float64: the reference); any strides with unit stride in D
    k, v     [N, S, H, D]  likewise; S = 77 and S = 4096 are both ordinary
    scale    float         None: 1 / sqrt(D)
    mask     boolean, [N, S] or broadcastable to [N, H, L, S]: True attends;
             or additive, broadcastable to [N, H, L, S], dtype of q or float32
    returns  [N, L, H, D]  dense, dtype of q; the softmax is float32. A row with every key masked gives zeros.

    Raises TypeError for what is no tensor; ValueError naming the argument for a wrong shape, dtype, device or layout,
    or an unknown backend; NotImplementedError with the reason of each backend that refuses.
    Traffic: (2 L + 2 S) * N * H * D elements; 4 * N * H * L * S * D FLOP.
    Source: Dao et al. 2022 (arXiv 2205.14135), algorithm 1; Dao 2023 (arXiv 2307.08691).
    """
    return op(*_arguments(q, k, v, scale=scale, mask=mask), backend)


def _arguments(q, k, v, *, scale=None, mask=None):
    if mask is not None or not (type(q) is type(k) is type(v) is torch.Tensor):
        require_tensors(NAME, q=q, k=k, v=v, mask_=mask)
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    if mask is not None and mask.dtype is torch.bool and mask.dim() == 2:
        mask = mask[:, None, None, :]
    return q, k, v, scale, mask


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None) -> None:
    for name, tensor, meaning in (("q", q, "[N, L, H, D]"), ("k", k, "[N, S, H, D]"), ("v", v, "[N, S, H, D]")):
        if tensor.dim() != 4:
            raise ValueError(f"{NAME}: {name} has shape {list(tensor.shape)}, expected {meaning}")
        if tensor.stride(3) != 1 and tensor.shape[3] > 1 and not transformed():
            raise ValueError(f"{NAME}: {name} has stride {tensor.stride(3)} in D, expected 1; call .contiguous()")
    require_float(NAME, "q", q)
    require_dtype(NAME, (q.dtype,), k=k, v=v)
    require_device(NAME, "q", q.device, k=k, v=v, mask=mask)
    N, L, H, D = q.shape
    if (k.shape[0], k.shape[2], k.shape[3]) != (N, H, D):
        raise ValueError(f"{NAME}: k has shape {list(k.shape)}, expected [N, S, H, D] = [{N}, S, {H}, {D}] as q")
    if v.shape != k.shape:
        raise ValueError(f"{NAME}: v has shape {list(v.shape)}, expected {list(k.shape)} as k")
    if mask is not None:
        _check_mask(mask, q.dtype, (N, H, L, k.shape[1]))


def _check_mask(mask, dtype, wanted):
    if mask.dtype not in (torch.bool, torch.float32, dtype):
        raise ValueError(f"{NAME}: mask is {short(mask.dtype)}, expected bool, float32 or {short(dtype)}")
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    if mask.dim() > 4 or any(size not in (1, full) for size, full in zip(sizes, wanted, strict=False)):
        raise ValueError(
            f"{NAME}: mask has shape {list(mask.shape)}, expected broadcastable to [N, H, L, S] = {list(wanted)}, "
            "or a boolean [N, S]"
        )


def _fake(q, *others):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def _example(dtype, device):
    """Cross-attention with a prompt's 77 keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, size, 8, 40, generator=generator).to(device, dtype) for size in (1024, 77, 77))
    return _arguments(q, k, v)


def _autocast(dtype, q, k, v, scale, mask):
    if q.dtype is torch.float64:
        return q, k, v, scale, mask
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.float()
    return q.to(dtype), k.to(dtype), v.to(dtype), scale, mask


op = Op(
    NAME,
    "(Tensor q, Tensor k, Tensor v, float scale, Tensor? mask) -> Tensor",
    check=check,
    fake=_fake,
    autocast=_autocast,
    normalise=_arguments,
    example=_example,
)
attention.op = op


@op.backend("torch")
def _reference(q, k, v, scale, mask):
    if q.numel() == 0 or k.numel() == 0:
        return (q * 0 + v.sum(1, keepdim=True)).contiguous()  # zeros that keep the way back for autograd
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    if mask is None:
        return F.scaled_dot_product_attention(*heads_first, scale=scale).transpose(1, 2).contiguous()
    if mask.dtype is torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -torch.inf)
    dead = (mask == -torch.inf).all(-1, keepdim=True)  # softmax has no answer there; ours is zero
    mask = mask.to(q.dtype).masked_fill(dead, 0)
    # SDPA's CPU kernel takes masks of [N or 1, H or 1, L, S or 1] only
    mask = mask.broadcast_to(*mask.shape[:-2], q.shape[1], k.shape[1])
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, scale=scale)
    return out.masked_fill(dead, 0).transpose(1, 2).contiguous()


def expanded_mask(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """The mask as [N, H, L, S] by strides, nothing copied."""
    return None if mask is None else mask.expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])


def _native(extension, q, k, v, scale, mask):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or k.shape[1] == 0:
        return out.zero_()
    fields = native_fields(q, k, v, scale, mask)
    fields["out"] = out
    extension.attention(fields, *native.place(q))
    return out


def native_fields(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None) -> dict:
    """AttentionArgs of csrc/ops.h but for out; the gradient's struct has these fields, too."""
    N, L, H, D = q.shape
    stride_qn, stride_ql, stride_qh, _ = q.stride()  # unit stride in D
    stride_kn, stride_ks, stride_kh, _ = k.stride()
    stride_vn, stride_vs, stride_vh, _ = v.stride()
    mask = expanded_mask(mask, q, k)
    stride_mn, stride_mh, stride_ml, stride_ms = (0, 0, 0, 0) if mask is None else mask.stride()
    return {
        "q": q,
        "k": k,
        "v": v,
        "mask": mask,
        "stride_qn": stride_qn,
        "stride_ql": stride_ql,
        "stride_qh": stride_qh,
        "stride_kn": stride_kn,
        "stride_ks": stride_ks,
        "stride_kh": stride_kh,
        "stride_vn": stride_vn,
        "stride_vs": stride_vs,
        "stride_vh": stride_vh,
        "stride_mn": stride_mn,
        "stride_mh": stride_mh,
        "stride_ml": stride_ml,
        "stride_ms": stride_ms,
        "mask_dtype": 0 if mask is None else native.DTYPES[mask.dtype],
        "N": N,
        "L": L,
        "S": k.shape[1],
        "H": H,
        "D": D,
        "scale": scale,
        "dtype": native.DTYPES[q.dtype],
    }


native.register(op, _native)


def _triton(kernel, q, k, v, scale, mask):
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or k.shape[1] == 0:
        return out.zero_()
    kernel(q, k, v, out, expanded_mask(mask, q, k), scale)
    return out


@triton_backend.register(op, _triton).refuses
def _wide(q, *others):
    from ldmfast.kernels.attention import WIDEST

    return f"head width D={q.shape[3]} is over {WIDEST}" if q.shape[3] > WIDEST else None


# PyTorch's fused kernels are vendor kernels like others: `sdpa` is whichever of them torch takes, `cudnn` cuDNN's
_sdpa = op.backend("sdpa", devices={"cuda"})(_reference.run)


@_sdpa.refuses
def _unfused(q, k, *others):
    if q.dtype is torch.float64:
        return "no fused kernel of PyTorch's has float64"
    return "there is nothing to attend to" if q.numel() == 0 or k.shape[1] == 0 else None


@op.backend("cudnn", devices={"cuda"})
def _cudnn(q, k, v, scale, mask):
    heads_first = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads_first, None, False, scale=scale)[0]
    return out.transpose(1, 2).contiguous()


_cudnn.refuses(_unfused)


@_cudnn.refuses
def _not_cudnns(q, k, v, scale, mask):
    if q.dtype is torch.float32:
        return "cuDNN's attention has no float32"
    if mask is not None:
        return "it is called without a mask only"
    if q.shape[3] % 8 or q.shape[3] > 128:
        return f"head width D={q.shape[3]}; cuDNN's attention takes multiples of 8 up to 128"
    major, minor = torch.cuda.get_device_capability(q.device)
    return f"cuDNN's attention needs sm_80, this GPU is sm_{major}{minor}" if major < 8 else None


def _sizes(q, k, *others):
    return {"L": q.shape[1], "S": k.shape[1], "D": q.shape[3], "heads": q.shape[0] * q.shape[2]}


speeds.register(op, _sizes)
