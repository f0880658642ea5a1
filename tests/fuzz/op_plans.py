"""Random valid calls of the ops, as plans: dicts of plain values, from which the same tensors are made every time.

    {"op": "attention", "dtype": "bfloat16", "seed": 7, "lies": 3, "threads": 2, "N": 1, "L": 5, ...}

dtype    of the tensors; seed, of their values
lies     how they lie in memory: 0, dense; else the seed of dimensions in another order, gaps, offsets, repeated slices.
         What lies between the elements is NaN
threads  of torch and of the CPU kernels
"""

from __future__ import annotations

import math
import random

import torch
from hypothesis import strategies as st

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IN_D = {"attention": {"q", "k", "v"}}  # of these the last dimension has stride 1, as the op's docstring wants it


def sizes(largest, *usual, least=1):
    """A size from `least` to `largest`, or one of the usual ones; small ones are drawn first when a case is shrunk."""
    return st.one_of(
        st.integers(least, min(8, largest)), st.integers(least, largest), st.sampled_from(usual or (least,))
    )


def few(*values):
    return st.sampled_from(values)


def _attention():
    return {
        "N": few(1, 2, 3, 0),
        "L": sizes(150, 64, 77, least=0),
        "S": sizes(200, 64, 77, least=0),
        "H": st.integers(1, 4),
        "D": sizes(80, 8, 40, 64, 80, 96, 128, 160, 256, 300),
        "mask": few(None, "keys", "boolean", "additive", "float32"),
        "over": st.integers(0, 15),  # a bit for each dimension that the mask is broadcast over
        "dims": st.integers(1, 4),  # of the mask: leading ones of size 1 may be left out
        "dead": st.booleans(),
        "scale": few(None, 0.5, 0.0, -1.0, 3.0),
        "spread": few(1.0, 12.0, 1e-3, 300.0),
    }


def _norm():
    return {
        "N": few(1, 2, 3, 0),
        "groups": few(1, 2, 4, 7, 32),
        "width": sizes(24, 10, 40, 80),  # channels a group
        "space": st.lists(sizes(14, 16, least=0), max_size=3),
        "affine": few(None, "weight", "bias", "both"),
        "float_params": st.booleans(),
        "silu": st.booleans(),
        "add": st.booleans(),
        "modulated": few(None, "scale", "shift", "both"),
        "eps": few(1e-5, 1e-6, 1e-3, 1.0),
        "mean": few(0.0, 3.0, 300.0),
        "std": few(1.0, 0.01, 30.0),
        "outlier": few(None, 100.0),
    }


def _layer_norm():
    norm = {name: _norm()[name] for name in ("affine", "eps", "mean", "std")}
    return {**norm, "rows": st.lists(sizes(20, least=0), max_size=3), "K": sizes(300, 320, 640)}


def _linear():
    return {
        "rows": st.one_of(st.lists(sizes(9, least=0), max_size=3), st.lists(sizes(70, 77), max_size=1)),
        "K": sizes(200, 64, 320, 1300),
        "N": sizes(150, 64, 320, least=0),
        "activation": few("none", "silu", "gelu", "geglu"),
        "bias": st.booleans(),
        "residual": st.booleans(),
        "output_scale": few(1.0, 0.7, -1.5),
        "norm": few(None, "none", "weight", "bias", "both"),
        "mean": few(0.0, 3.0),
    }


def _qkv_projection():
    return {name: _linear()[name] for name in ("rows", "K", "N", "norm", "mean")} | {"parts": few(2, 3)}


def _geglu():
    return {"rows": _layer_norm()["rows"], "F": sizes(300, 64, 320, least=0)}


def _bias_residual():
    from_conv2d = {name: _conv2d()[name] for name in ("N", "bias", "add", "residual", "output_scale")}
    return {**from_conv2d, "C": sizes(70, 64, 320), "pixels": _norm()["space"]}


def _residual_layer_norm():
    return {**_layer_norm(), "K": sizes(300, 320, 640, 1280, 2592)}


def _conv2d():
    return {
        "N": few(1, 2, 3, 0),
        "C1": sizes(70, 32, 64, 320),
        "C2": few(None, 1, 3, 16, 33),
        "Co": sizes(70, 32, 64, 320),
        "H": sizes(30, 16),
        "W": sizes(30, 16),
        "k": few(3, 1, 3, 3, 1, 3, 2, 4, 5, 7),  # the kernels take 3 and 1
        "stride": few(1, 2, 3),
        "padding": few(1, 0, 2, 3),
        "upsample": few(1, 2),
        "norm": few(None, "affine", "silu"),
        "bias": st.booleans(),
        "add": st.booleans(),
        "residual": st.booleans(),
        "output_scale": few(1.0, 0.7, -1.5),
        "exact": st.booleans(),
    }


def _conv2d_weight():
    return {name: _conv2d()[name] for name in ("N", "C1", "Co", "H", "W")} | {"padding": few(1, 0, 2)}


def _timestep_mlp():
    return {
        "N": sizes(20, least=0),
        "dim": sizes(70, 64, 320, least=2),
        "F": sizes(100, 64, 320, least=0),
        "E": sizes(100, 64, least=0),
        "kind": few("int64", "int32", "uint8", "float32", "float16", "bfloat16", "float64"),
        "biases": st.integers(0, 3),
        "flip_sin_to_cos": st.booleans(),
        "downscale_freq_shift": few(0.0, 0.5, -1.0),
        "max_period": few(10000.0, 100.0, 1.0),
    }


def _ddim_step():
    return {
        "N": few(1, 2, 3, 0),
        "shape": st.lists(sizes(12, 64, least=0), max_size=4),
        "alphas": st.tuples(st.floats(0.001, 0.999), st.floats(0.0, 1.0)).map(list),
        "table": few(None, "0-d", "alpha_t", "all", "numbers", "rows", "row", "row for each", "no such row"),
        "terms": few(0, 0, 1, 2, 3, 4),  # of a multistep method
        "guidance": few(None, 7.5, 1.0, 0.0, -2.0),
        "sigma": few(None, 0.0, 0.2),
        "prediction": few("epsilon", "v_prediction", "sample"),
        "clip": few(None, 1.0, 0.1),
        "output_dtype": few(None, "float32", "float16", "bfloat16"),
    }


OPTIONS = {
    "attention": _attention,
    "group_norm_silu": _norm,
    "group_norm_affine": lambda: {**_norm(), "C2": sizes(40), "space": st.tuples(*[sizes(20, 16)] * 2).map(list)},
    "layer_norm": _layer_norm,
    "linear": _linear,
    "conv2d": _conv2d,
    "qkv_projection": _qkv_projection,
    "geglu": _geglu,
    "bias_residual": _bias_residual,
    "residual_layer_norm": _residual_layer_norm,
    "timestep_mlp": _timestep_mlp,
    "ddim_step": _ddim_step,
    "conv2d_weight": _conv2d_weight,  # of conv2d_weight_backward, which is an op, too
}
NAMES = [f"{name}_backward" for name in OPTIONS] + [name for name in OPTIONS if name != "conv2d_weight"]


def plans(op: str):
    """The strategy of plans for an op, or, as `<op>_backward`, for its gradient."""
    common = {
        "op": st.just(op),
        "dtype": few(*DTYPES),
        "seed": st.integers(0, 2**16),
        "lies": st.integers(0, 2**16),
        "threads": st.integers(1, 3),
    }
    return st.fixed_dictionaries({**common, **OPTIONS[op.removesuffix("_backward")]()}).map(fitting)


def fitting(plan: dict) -> dict:
    """The plan with fewer pixels, where it would take seconds: a few large plans say no more than many small ones."""

    def less(sides, each, most, least=1):
        sides = list(sides)
        while each * math.prod(sides) > most and max(sides) > least:
            sides[sides.index(max(sides))] = max(max(sides) // 2, least)
        return sides

    if "space" in plan:
        return {**plan, "space": less(plan["space"], plan["groups"] * plan["width"], 1 << 16)}
    if "pixels" in plan:
        return {**plan, "pixels": less(plan["pixels"], plan["C"], 1 << 16)}
    if "shape" in plan:
        return {**plan, "shape": less(plan["shape"], 1, 1 << 15)}
    if plan["op"].startswith("conv2d"):
        width = plan.get("k", 3) * plan.get("upsample", 1) / plan.get("stride", 1)
        each = (plan["C1"] + (plan.get("C2") or 0)) * plan["Co"] * width**2
        return {**plan, **dict(zip("HW", less((plan["H"], plan["W"]), each, 1 << 25, least=5), strict=True))}
    return plan


def lie(tensor, rng: random.Random, *, unit: bool = False):
    """The same values elsewhere in memory. unit: the last dimension keeps stride 1."""
    dims = tensor.dim()
    if not dims or rng.random() < 0.3:
        return tensor
    order = list(range(dims - unit))
    channels_last = dims > 2 and rng.random() < 0.3  # which kernels of pictures have forms for
    if channels_last:
        order.append(order.pop(1))
    elif rng.random() < 0.7:
        rng.shuffle(order)
    order += [dims - 1] * unit
    gaps = [rng.choice((0, 0, 1, 2, 5)) for _ in order]
    gaps = [0] * dims if channels_last and rng.random() < 0.7 else gaps
    room = torch.full([tensor.shape[d] + gap for d, gap in zip(order, gaps, strict=True)], 1, dtype=tensor.dtype)
    room = room * float("nan") if room.is_floating_point() else room
    for place, (d, gap) in enumerate(zip(order, gaps, strict=True)):
        room = room.narrow(place, rng.randint(0, gap), tensor.shape[d])
    moved = room.permute([order.index(d) for d in range(dims)])
    moved.copy_(tensor)
    first = rng.randrange(dims - unit) if dims > unit else None
    if first is not None and rng.random() < 0.15 and tensor.shape[first]:  # one slice for all: stride 0
        moved = moved.narrow(first, 0, 1).expand_as(tensor)
    return moved


def laid(plan: dict, args, kwargs):
    """The arguments, each tensor where the plan's `lies` puts it."""
    if not plan["lies"]:
        return args, kwargs
    rng, units = random.Random(plan["lies"]), IN_D.get(plan["op"].removesuffix("_backward"), set())

    def move(value, name=""):
        if isinstance(value, tuple):
            return tuple(map(move, value))
        return lie(value, rng, unit=name in units) if isinstance(value, torch.Tensor) else value

    names = ("q", "k", "v") if units else ("",) * len(args)
    moved = tuple(move(value, name) for value, name in zip(args, names, strict=True))
    return moved, {name: move(value, name) for name, value in kwargs.items()}
