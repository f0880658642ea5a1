"""The fused ops. One file per op: contract, checks, reference, backends, gradient.

>>> from ldmfast import ops
>>> y = ops.group_norm_silu(x, norm.weight, norm.bias, 32)
>>> print(ops.explain(ops.attention, q, k, v))
"""

from ldmfast.ops import gradients  # noqa: F401, I001
from ldmfast.ops.attention import attention
from ldmfast.ops.contract.stock_ops import fixed_order
from ldmfast.ops.contract.switch import chosen_numerics, numerics
from ldmfast.ops.conv2d import conv2d
from ldmfast.ops.ddim_step import ddim_step
from ldmfast.ops.gpu.bias_residual import bias_residual
from ldmfast.ops.gpu.geglu import geglu
from ldmfast.ops.gpu.qkv_projection import qkv_projection
from ldmfast.ops.gpu.residual_layer_norm import residual_layer_norm
from ldmfast.ops.group_norm_affine import group_norm_affine
from ldmfast.ops.group_norm_silu import group_norm_silu
from ldmfast.ops.layer_norm import layer_norm
from ldmfast.ops.linear import linear
from ldmfast.ops.measured import ranges as _ranges
from ldmfast.ops.registry import explain, use_backend
from ldmfast.ops.timestep_mlp import timestep_mlp

__all__ = [
    "attention",
    "bias_residual",
    "chosen_numerics",
    "conv2d",
    "ddim_step",
    "explain",
    "fixed_order",
    "geglu",
    "group_norm_affine",
    "group_norm_silu",
    "layer_norm",
    "linear",
    "numerics",
    "qkv_projection",
    "residual_layer_norm",
    "timestep_mlp",
    "use_backend",
]

if _ranges.asked_for():
    _ranges.name_ops()
