"""From a plan (op_plans.py) to the op's arguments, and the verdict on every backend that runs here."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for a run as a script
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "ops"))

from case import randn
from cases import FLOOR, backward_inputs, emulated, exactly, home, tuples
from op_plans import DTYPES, laid
from test_backward import NEGLIGIBLE, differentiable

from ldmfast.ops.registry import BACKWARD_OPS, OPS, RANKS

# Triton's kernels are interpreted where TRITON_INTERPRET=1 asks for it: tens of milliseconds a call
BACKENDS = ("cpu", "torch", "cuda", "cuda-host", *["triton"] * bool(os.environ.get("TRITON_INTERPRET")))
EMULATED = 60_000  # multiplications, about, that a plan may take where a GPU is emulated

ROUNDINGS = {torch.float32: 32, torch.bfloat16: 4, torch.float16: 4}  # a sum of n numbers makes some sqrt(n) of them


def maybe(wanted, *shape, dtype, mean=0.0):
    return randn(*shape, dtype=dtype, mean=mean) if wanted else None


def _attention(p, dtype):
    N, L, S, H, D = (p[name] for name in "NLSHD")
    q, k, v = randn(N, L, H, D, dtype=dtype, std=p["spread"]), *(randn(N, S, H, D, dtype=dtype) for _ in "kv")
    shape = [1 if p["over"] >> i & 1 else size for i, size in enumerate((N, H, L, S))]
    shape = shape[4 - p["dims"] :] if all(size == 1 for size in shape[: 4 - p["dims"]]) else shape
    if p["mask"] == "keys":
        mask = torch.rand(N, S) > 0.3
    elif p["mask"] == "boolean":
        mask = torch.rand(shape) > 0.3 if len(shape) != 2 else torch.rand(1, *shape) > 0.3
    else:
        mask = None if p["mask"] is None else randn(*shape, dtype=dtype if p["mask"] == "additive" else torch.float32)
    if mask is not None and p["dead"] and mask.shape[0]:
        mask[0] = False if mask.dtype is torch.bool else -torch.inf
    return (q, k, v), {"scale": p["scale"], "mask": mask}


def _picture(p, C, dtype):
    x = randn(p["N"], C, *p["space"], dtype=dtype, mean=p["mean"], std=p["std"])
    if p["outlier"] and x.numel():
        x.reshape(p["N"], C, -1)[:, :, 0] *= p["outlier"]
    return x


def _group_norm(p, dtype, C, **more):
    params = torch.float32 if p["float_params"] else dtype
    weight, bias = (maybe(p["affine"] in (name, "both"), C, dtype=params) for name in ("weight", "bias"))
    modulated = {n: maybe(p["modulated"] in (n, "both"), p["N"], C, dtype=dtype) for n in ("scale", "shift")}
    return weight, bias, p["groups"], {"eps": p["eps"], **modulated, **more}


def _group_norm_silu(p, dtype):
    C = p["groups"] * p["width"]
    *params, named = _group_norm(p, dtype, C, silu=p["silu"], add=maybe(p["add"], p["N"], C, dtype=dtype))
    return (_picture(p, C, dtype), *params), named


def _group_norm_affine(p, dtype):
    C = p["groups"] * p["width"]
    C2 = min(p["C2"], C - 1)
    x2 = _picture(p, C2, dtype) if p["add"] and C2 else None
    *params, named = _group_norm(p, dtype, C, x2=x2)
    return (_picture(p, C if x2 is None else C - C2, dtype), *params), named


def _layer_norm(p, dtype):
    weight, bias = (maybe(p["affine"] in (name, "both"), p["K"], dtype=dtype) for name in ("weight", "bias"))
    return (randn(*p["rows"], p["K"], dtype=dtype, mean=p["mean"], std=p["std"]), weight, bias, p["eps"]), {}


def _linear(p, dtype):
    K, N = p["K"], p["N"]
    outputs = 2 * N if p["activation"] == "geglu" else N
    named = {"activation": p["activation"], "output_scale": p["output_scale"]}
    if p["norm"]:
        named["layer_norm"] = *(maybe(p["norm"] in (n, "both"), K, dtype=dtype) for n in ("weight", "bias")), 1e-5
    named["residual"] = maybe(p["residual"], *p["rows"], N, dtype=dtype)
    x, weight = randn(*p["rows"], K, dtype=dtype, mean=p["mean"]), randn(outputs, K, dtype=dtype, std=K**-0.5)
    return (x, weight, maybe(p["bias"], outputs, dtype=dtype)), named


def _qkv_projection(p, dtype):
    (x, weight, _), named = _linear({**p, "activation": "none", "output_scale": 1, "residual": 0, "bias": 0}, dtype)
    others = (randn(*weight.shape, dtype=dtype, std=p["K"] ** -0.5) for _ in range(p["parts"] - 1))
    return (x, weight, *others), {name: value for name, value in named.items() if name == "layer_norm"}


def _geglu(p, dtype):
    return (randn(*p["rows"], 2 * p["F"], dtype=dtype),), {}


def _bias_residual(p, dtype):
    shape = p["N"], p["C"], *p["pixels"]
    named = {"add": maybe(p["add"], *shape[:2], dtype=dtype), "residual": maybe(p["residual"], *shape, dtype=dtype)}
    bias = maybe(p["bias"], p["C"], dtype=dtype)
    return (randn(*shape, dtype=dtype), bias), {**named, "output_scale": p["output_scale"]}


def _residual_layer_norm(p, dtype):
    (x, *others), named = _layer_norm(p, dtype)
    return (x, randn(*x.shape, dtype=dtype), *others), named


def _conv2d(p, dtype):
    N, C1, H, W, Co, k, stride, padding, upsample = (
        p[name] for name in ("N", "C1", "H", "W", "Co", "k", "stride", "padding", "upsample")
    )
    H, W = (max(side, -(-(k - 2 * padding) // upsample)) for side in (H, W))  # at least one output
    Ci = C1 + (p["C2"] or 0)
    out = [(upsample * side + 2 * padding - k) // stride + 1 for side in (H, W)]
    named = {name: p[name] for name in ("stride", "padding", "upsample", "output_scale", "exact")}
    if p["norm"]:
        named |= {"norm_scale": 1 + randn(N, Ci, dtype=torch.float32, std=0.3), "norm_silu": p["norm"] == "silu"}
        named["norm_shift"] = randn(N, Ci, dtype=torch.float32)
    named["x2"] = maybe(p["C2"], N, p["C2"] or 0, H, W, dtype=dtype)
    named["add"] = maybe(p["add"], N, Co, dtype=dtype)
    named["residual"] = maybe(p["residual"], N, Co, *out, dtype=dtype)
    weight = randn(Co, Ci, k, k, dtype=dtype, std=(Ci * k * k) ** -0.5)
    return (randn(N, C1, H, W, dtype=dtype), weight, maybe(p["bias"], Co, dtype=dtype)), named


def _conv2d_weight(p, dtype):
    H, W = (max(p[side], 3 - 2 * p["padding"]) for side in "HW")
    dy = randn(p["N"], p["Co"], H + 2 * p["padding"] - 2, W + 2 * p["padding"] - 2, dtype=dtype)
    return (dy, randn(p["N"], p["C1"], H, W, dtype=dtype), p["padding"]), {}


def _timestep_mlp(p, dtype):
    dim, F, E = (p[name] for name in ("dim", "F", "E"))
    t = (torch.rand(p["N"]) * (250 if p["kind"] == "uint8" else 999)).to(getattr(torch, p["kind"]))
    w1, w2 = randn(F, dim, dtype=dtype, std=dim**-0.5), randn(E, F, dtype=dtype, std=max(F, 1) ** -0.5)
    b1, b2 = maybe(p["biases"] & 1, F, dtype=dtype), maybe(p["biases"] & 2, E, dtype=dtype)
    return (t, w1, b1, w2, b2), {n: p[n] for n in ("dim", "flip_sin_to_cos", "downscale_freq_shift", "max_period")}


def _ddim_step(p, dtype):
    N, shape, other = p["N"], p["shape"], DTYPES[p["output_dtype"] or p["dtype"]]
    output = randn(N if p["guidance"] is None else 2 * N, *shape, dtype=other)
    alphas, table = p["alphas"], p["table"]
    rows = _rows(p)
    if table and not rows:
        alphas = [torch.tensor(alpha) if table == "0-d" else torch.full((N,), alpha) for alpha in alphas]
        alphas = [alphas[0], p["alphas"][1]] if table == "alpha_t" else alphas
    named = {name: p[name] for name in ("guidance", "prediction", "clip")}
    if p["terms"]:
        named |= {"weights": (1.9, -0.7, 0.4, -0.3)[: p["terms"]]}
        named |= {"history": tuple(randn(N, *shape, dtype=other) for _ in range(p["terms"] - 1))}
    if p["sigma"] is not None:
        alphas = [alphas[0], alphas[1] * 0.9]  # sigma is at most sqrt(1 - alpha_prev)
        named |= {"noise": randn(N, *shape, dtype=dtype)} | ({} if rows else {"sigma": p["sigma"]})
    return (randn(N, *shape, dtype=dtype), output, *([] if rows else alphas)), named | rows


def _rows(p):
    """The coefficients as a table of their own, where the plan has one."""
    N, row = p["N"], torch.randint(7, (p["N"],))
    numbers = torch.rand(7, 7) + 0.2
    if p["table"] == "numbers":
        numbers[0, 6] *= p["sigma"] is not None  # sigma needs noise
        return {"table": numbers[0].tolist()}
    if p["table"] == "rows":
        return {"table": numbers[torch.arange(N) % 7]}
    found = {"row": row[:1] if N else row.new_zeros(1), "row for each": row, "no such row": row - 3}
    return {"table": numbers, "row": found[p["table"]]} if p["table"] in found else {}


MAKERS = {
    "attention": _attention,
    "group_norm_silu": _group_norm_silu,
    "group_norm_affine": _group_norm_affine,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "conv2d": _conv2d,
    "qkv_projection": _qkv_projection,
    "geglu": _geglu,
    "bias_residual": _bias_residual,
    "residual_layer_norm": _residual_layer_norm,
    "timestep_mlp": _timestep_mlp,
    "ddim_step": _ddim_step,
    "conv2d_weight": _conv2d_weight,
}


def arguments(plan: dict):
    """(args, kwargs) of the public function."""
    torch.default_generator.manual_seed(plan["seed"])  # without a stack for each device, which takes 1 ms
    if "space" in plan and plan["width"] * math.prod(plan["space"]) == 1:
        plan = {**plan, "width": 2}  # one number a group: torch's group_norm, so the reference, refuses it
    if plan["op"] == "group_norm_silu_backward":
        plan = {
            **plan,
            "space": [max(side, 1) for side in plan["space"]],
        }  # torch leaves the gradients of none unwritten
        if plan["width"] * math.prod(plan["space"]) < 8:  # of two numbers, +-1 is left: the gradient is a difference
            plan = {**plan, "width": 8}
        if plan["affine"] == "bias":  # torch's own gradient refuses a bias without a weight
            plan = {**plan, "affine": "both"}
    if plan["op"] == "ddim_step_backward":
        plan = {**plan, "clip": None}  # at the clip the gradient jumps: the last bit of a number decides
    return laid(plan, *MAKERS[plan["op"].removesuffix("_backward")](plan, DTYPES[plan["dtype"]]))


def work(args) -> int:
    """Multiplications, roughly: the product of the two largest tensors' sizes under a root, or the largest size."""
    counts = sorted(value.numel() for value in args if isinstance(value, torch.Tensor))
    return max(counts[-1], int((counts[-1] * counts[-2]) ** 0.5) * 8) if len(counts) > 1 else counts[-1]


def _applied(outputs, values):
    """Of group_norm_affine: a shift, a mean are as good as what is made of them, however near to zero they are."""
    scale, shift, moments = outputs
    x = values[0] if values[5] is None else torch.cat([values[0], values[5]], 1)
    y = x.to(scale.dtype) * scale[:, :, None, None] + shift[:, :, None, None]
    return scale, y, moments[..., 1]


def before_the_difference(given, grad) -> float:
    """Of attention's gradients: the larger norm of those of q and k before softmax's gradient takes their mean away.

    Where one key has all the weight, the difference is zero, but for roundings of this.
    """
    q, k, v, scale, mask = exactly(given)
    S, D = k.shape[1], q.shape[3]
    if not (q.numel() and S):
        return 0.0
    each = torch.eye(S, dtype=q.dtype)[None, :, None].expand(q.shape[0], S, q.shape[2], S)
    weights = OPS["attention"].reference(q, k, each, scale, mask)  # [N, L, H, S]
    sizes = weights * torch.einsum("nlhd,nshd->nlhs", grad.double(), v).abs() * abs(scale or D**-0.5)
    of_q, of_k = torch.einsum("nlhs,nshd->nlhd", sizes, k.abs()), torch.einsum("nlhs,nlhd->nshd", sizes, q.abs())
    return max(of_q.nan_to_num().norm().item(), of_k.nan_to_num().norm().item())


def gradients(call, name, arguments, grads) -> tuple:
    """Of call(*arguments) with regard to each differentiable argument; zeros where no output depends on one."""
    leaves = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments]
    chosen = [leaves[i].requires_grad_() for i in differentiable(name, leaves)]
    pairs = zip(tuples(call(*leaves)), grads, strict=True)
    outputs, grads = zip(*((y, g) for y, g in pairs if y.requires_grad), strict=True)
    return torch.autograd.grad(outputs, chosen, grads, allow_unused=True, materialize_grads=True)


def nearby(arguments, dtype):
    """The arguments in float64, a rounding of `dtype` away."""
    shift = torch.finfo(dtype).eps / 2
    return [
        value * (1 + shift * (2 * torch.rand_like(value) - 1))
        if isinstance(value, torch.Tensor) and value.dtype is torch.float64
        else value
        for value in exactly(arguments)
    ]


def misfit(y, same, true) -> str | None:
    """What is wrong with the output but its values."""
    if y.shape != true.shape or y.dtype != same.dtype:
        return f"{y.dtype} {list(y.shape)}, expected {same.dtype} {list(true.shape)}"
    strides = [[s for s, size in zip(tensor.stride(), y.shape, strict=True) if size > 1] for tensor in (y, same)]
    if strides[0] != strides[1] and y.numel() > 1:
        return f"strides {y.stride()}, expected {same.stride()}"
    return None


def faults(plan: dict, backends=BACKENDS) -> tuple[int, list[str]]:
    """(calls, what is wrong: a sentence for each output outside its budget, each error).

    Each backend that runs is called twice, with other numbers in tensors of the same shapes and layouts: the first call
    leaves a plan, by which the second is run.
    """
    torch.set_num_threads(plan["threads"])
    calls, found = _compared(plan, backends)
    if found:
        return calls, found
    others = {"seed": plan["seed"] + 1, "alphas": [(1 + alpha) / 2.1 for alpha in plan.get("alphas", ())]}
    again, found = _compared(plan | others, backends)
    return calls + again, [f"called again: {sentence}" for sentence in found]


def _compared(plan: dict, backends) -> tuple[int, list[str]]:
    """(backends that ran, what is wrong)

    The budget is that of cases.py. A result that nearly cancels has a large relative error by any route: where the
    budget is exceeded, what some ROUNDINGS of the inputs do to the exact result is allowed beside it, and to a gradient
    the floor of the largest one: that of a single key is zero, as a difference.
    """
    dtype, name = DTYPES[plan["dtype"]], plan["op"].removesuffix("_backward")
    args, kwargs = arguments(plan)
    op, backward = (OPS[name], plan["op"] != name) if name in OPS else (BACKWARD_OPS[plan["op"]], False)
    given = op.normalise(*args, **kwargs) if op.normalise else args
    op.check(*given)
    grads = tuple(torch.randn_like(out) for out in tuples(op.reference(*given))) if backward else ()

    def run(function, values, gs=grads):
        if backward:
            return gradients(function, name, values, gs)
        return _applied(tuples(function(*values)), values) if name == "group_norm_affine" else tuples(function(*values))

    same, exact = run(op.reference, given), run(op.reference, exactly(given), exactly(grads))
    largest = max((true.norm().item() for true in exact), default=0.0) if backward else 0.0
    roundings = max(largest, before_the_difference(given, grads[0])) if plan["op"] == "attention_backward" else largest
    ran, found = 0, []
    for backend in backends:
        if backend not in op.backends or backend not in RANKS or home(backend) != "cpu":
            continue
        if op.backends[backend].refusal(given) or emulated(backend) and work(given) > EMULATED:
            continue
        fused = BACKWARD_OPS.get(plan["op"]) if backward else None
        if fused and _refuses(fused, backend, backward_inputs(name, given, grads)):
            continue
        ran += 1
        outputs = run(lambda *values, b=backend: op(*values, b), given)
        for i, triple in enumerate(zip(outputs, same, exact, strict=True)):
            sentence = None if backward else misfit(*triple)
            shifted = lambda i=i: run(op.reference, nearby(given, dtype), nearby(grads, dtype))[i]  # noqa: E731
            sentence = sentence or _too_far(*triple, dtype, largest, roundings, shifted)
            if sentence:
                found.append(f"{backend}, output {i}: {sentence}")
    return ran, found


def _refuses(op, backend, arguments):
    return backend not in op.backends or op.backends[backend].refusal(arguments)


def _too_far(y, same, true, dtype, largest, roundings, shifted) -> str | None:
    """largest: of the gradients, the norm of the largest; roundings: of what they are made of; 0 for an op's results"""
    norm = max(true.norm().item(), NEGLIGIBLE * largest) or 1.0

    def error(value):
        return (value.double() - true).norm().item() / norm

    mine, budget = error(y), 2 * error(same) + FLOOR[dtype]
    if mine <= budget or not true.isfinite().all() and torch.equal(y.isfinite(), same.isfinite()):
        return None
    budget += ROUNDINGS[dtype] * max(error(shifted()) for _ in range(3)) + 8 * FLOOR[dtype] * roundings / norm
    return None if mine <= budget else f"error {mine:.3g}, budget {budget:.3g}"
