"""What a LoRA file holds for one layer, as W + up down: LoRA, LoHa, LoKr and whole differences alike.

Everything is exact: a product of two low-rank matrices element by element (LoHa) has rank r^2 at most, and its factors
are the products of theirs, row by row; what has no lower rank than the layer is that difference times the identity.
Sources: Hu et al. 2021 (arXiv 2106.09685); Hyeon-Woo et al. 2021 (2108.06098), LoHa; Yeh et al. 2023 (2309.14859), LoKr
and the scale alpha / rank; Liu et al. 2024 (2402.09353), DoRA.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Change:
    """A layer's weight W and bias b become W + scale up down and b + bias, W then of norms `magnitude` (DoRA).

    down [r, *W.shape[1:]], up [O, r] with trailing ones for a convolution: float32, or plain matrices as the file has
    them, which saves a copy of the whole file. `scaled_up()` is to be used, and `down` converted by who uses it.
    bias [O], magnitude [O]; or norm_weight, norm_bias [C], added to a normalisation's: all float32
    """

    down: torch.Tensor | None = None
    up: torch.Tensor | None = None
    scale: float = 1.0
    bias: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    norm_weight: torch.Tensor | None = None
    norm_bias: torch.Tensor | None = None

    def scaled_up(self) -> torch.Tensor:
        """scale up: rounded once, in float32."""
        return self.up if self.scale == 1 else self.up.float() * self.scale


def change(tensors: dict[str, torch.Tensor], shape: tuple[int, ...], scale: float | None = None) -> Change:
    """One layer's tensors, by role (lora_names.py) -> the change of a weight of that shape.

    scale  of up down, where the file has no alpha and its metadata say; None: alpha / rank, 1 without an alpha
    Raises ValueError, as a clause, for tensors that are no whole change or of another shape.
    """
    plain = "down" in tensors and "up" in tensors and "mid" not in tensors
    kept = ("down", "up", "alpha") if plain else ()
    t = {role: value if role in kept else value.float() for role, value in tensors.items()}
    if set(t) <= {"norm_weight", "norm_bias"}:
        return _of_norm(t, shape)
    found = [kind for role, kind in (("down", _lora), ("w1_a", _loha), ("diff", _full)) if role in t]
    found += [_lokr] * any(role.startswith("lokr_") for role in t)
    if len(found) != 1 and set(t) - {"alpha"} != {"bias"}:
        raise ValueError(f"has {', '.join(sorted(t))}, which make no whole change")
    try:
        nothing = torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1), 1.0
        down, up, factor = found[0](t, shape, scale) if found else nothing
        down = down.reshape(len(down), *shape[1:])
        up = up.reshape(shape[0], len(down), *(1,) * (len(shape) - 2))
    except (KeyError, RuntimeError) as error:
        lacking = f"lacks {error.args[0]}" if isinstance(error, KeyError) else f"is {_shapes(t)}"
        raise ValueError(f"{lacking}, where the layer's weight is {list(shape)}") from error
    bias = t["bias"].flatten() if "bias" in t else None
    if bias is not None and len(bias) != shape[0]:
        raise ValueError(f"changes a bias of {len(bias)}, where the layer has {shape[0]} channels")
    return Change(down, up, factor, bias=bias, magnitude=_magnitude(t, shape))


def _shapes(tensors) -> str:
    return ", ".join(f"{role} {list(value.shape)}" for role, value in tensors.items() if value.ndim > 1)


def _of_norm(t, shape) -> Change:
    if any(value.shape != shape for value in t.values()):
        raise ValueError(f"is {', '.join(str(list(value.shape)) for value in t.values())}, where the norm's is {shape}")
    return Change(norm_weight=t.get("norm_weight"), norm_bias=t.get("norm_bias"))


def _magnitude(t, shape) -> torch.Tensor | None:
    if "magnitude" not in t:
        return None
    value = t["magnitude"]
    if value.shape[0] != shape[0] or value.numel() != shape[0]:
        raise ValueError(
            f"is a DoRA whose norms are taken over the outputs ({list(value.shape)}); only rows' are known"
        )
    return value.flatten()


def _scale(t, rank: int, scale: float | None) -> float:
    return t["alpha"].item() / rank if "alpha" in t else 1.0 if scale is None else scale


def _lora(t, shape, scale):
    """up [O, r], down [r, I]; with mid [r, r, k, k] (CP) the convolution is down 1x1, mid k x k, up 1x1."""
    down, up = t["down"], t["up"].flatten(1)
    scale = _scale(t, len(down), scale)
    if "mid" in t:
        down = torch.einsum("omkl,mi->oikl", t["mid"], down.flatten(1))
    return down, up, scale


def _loha(t, shape, scale):
    """(w1_a w1_b) * (w2_a w2_b), element by element; with t1, t2 each is a Tucker product."""
    rank = t["w1_b"].shape[0]
    scale = _scale(t, rank, scale)
    if "t1" in t:
        return _factors(_tucker(t["t1"], t["w1_a"], t["w1_b"]) * _tucker(t["t2"], t["w2_a"], t["w2_b"]) * scale)
    if rank * t["w2_b"].shape[0] >= min(shape[0], shape[1:].numel()):
        return _factors((t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"]) * scale)
    down = (t["w1_b"][:, None] * t["w2_b"][None]).flatten(0, 1)  # [r1 r2, I]
    up = (t["w1_a"][:, :, None] * t["w2_a"][:, None]).flatten(1)  # [O, r1 r2]
    return down, up, scale


def _lokr(t, shape, scale):
    """The Kronecker product of w1 and w2, each whole or as a product."""
    ranks = [t[f"lokr_{w}_b"].shape[0] for w in ("w1", "w2") if f"lokr_{w}_b" in t]
    w1 = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        w2 = t["lokr_w2"]
    elif "lokr_t2" in t:
        w2 = _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        w2 = t["lokr_w2_a"] @ t["lokr_w2_b"].flatten(1)
    if w2.ndim == 2 and len(shape) > 2:  # [o, i k k] of a convolution
        w2 = w2.reshape(len(w2), -1, *shape[2:])
    w1 = w1.reshape(*w1.shape, *(1,) * (w2.ndim - 2))
    whole = torch.kron(w1, w2.contiguous()).reshape(shape)
    return _factors(whole * (_scale(t, ranks[0], scale) if ranks else 1.0))  # two whole factors take no alpha


def _full(t, shape, scale):
    return _factors(t["diff"].reshape(shape))


def _tucker(core, a, b) -> torch.Tensor:
    """core [r, s, k, k], a [r, O], b [s, I] -> [O, I, k, k]"""
    return torch.einsum("ij...,ip,jr->pr...", core, a, b)


def _factors(whole: torch.Tensor):
    """(down, up, 1) of a difference [O, ...] that is kept whole, beside the smaller identity."""
    rows = whole.flatten(1)
    if rows.shape[0] <= rows.shape[1]:
        return rows, torch.eye(rows.shape[0]), 1.0
    return torch.eye(rows.shape[1]), rows, 1.0
