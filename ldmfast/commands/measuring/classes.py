"""What a kernel or an op does, in a word: convolution, linear, attention, norm, elementwise. What is left is gaps.

An op's name says it surely; a kernel in a CUDA graph has no op any more, and is known by its own name, which is a
convention that cuDNN's and cuBLAS' versions keep, not a promise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

CLASSES = ("convolution", "linear", "attention", "norm", "elementwise", "gaps")

# Asked in this order: cuDNN's implicit products have "gemm" in their names, our kernels their op's in a namespace
_KERNELS = (
    ("elementwise", r"elementwise|vectorized_|CUDAFunctor|_functor|cat_|CatArray|copy_kernel|index_|reduce_kernel"),
    ("attention", r"attention|flash|fmha|sdpa"),
    ("norm", r"group_?norm|layer_?norm|rowwise_?moments|compute_fused_params|norm_.*kernel"),
    ("convolution", r"conv|fprop|dgrad|wgrad|winograd|nchw.*nhwc|nhwc.*nchw|cudnn"),
    ("linear", r"gemm|gemv|cutlass|nvjet|cublas|splitk|matmul|linear|timestep_mlp|sinusoid"),
)
_OPS = (
    ("convolution", r"^(aten::(_?conv|.*convolution)|ldmfast::conv2d)"),
    (
        "attention",
        r"^(aten::_?(scaled_dot_product|flash_attention|efficient_attention|cudnn_attention)|ldmfast::attention)",
    ),
    ("linear", r"^(aten::(linear|addmm|mm|bmm|baddbmm|matmul)$|ldmfast::(linear|timestep_mlp))"),
    ("norm", r"^(aten::(native_)?(group|layer)_norm|ldmfast::(group_norm|layer_norm))"),
)
_KERNELS = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in _KERNELS)
_OPS = tuple((name, re.compile(pattern)) for name, pattern in _OPS)


def of_kernel(name: str) -> str:
    """The class of a kernel, by its demangled name; what no pattern knows is elementwise."""
    return next((found for found, pattern in _KERNELS if pattern.search(name)), "elementwise")


def of_op(names: Iterable[str]) -> str | None:
    """The class of an op, by its name and those of the ops that called it, innermost first; None if none has one.

    The outermost counts: a product within attention is attention's.
    """
    classes = [found for name in names for found, pattern in _OPS if pattern.search(name)]
    return classes[-1] if classes else None


def of_launch(kernel: str, ops: Iterable[str]) -> str:
    """The class of a kernel that these ops launched: theirs, but what is elementwise by its name stays so.

    A convolution's bias is a kernel of its own, for one.
    """
    by_name = of_kernel(kernel)
    plain = by_name == "elementwise" and _KERNELS[0][1].search(kernel)
    return by_name if plain else of_op(ops) or by_name
