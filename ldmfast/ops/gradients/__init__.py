"""The gradients that are ops of their own, which only autograd calls: importing them registers them."""

from ldmfast.ops.gradients import (  # noqa: F401
    attention_backward,
    conv2d_weight_backward,
    ddim_step_backward,
    group_norm_silu_backward,
    timestep_mlp_backward,
)
