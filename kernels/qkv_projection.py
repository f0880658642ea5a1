"""Two or three linear layers of one input in one launch of the linear layer's kernel, whose programs share its rows."""

from ldmfast.kernels.linear import launch, linear_fused_kernel  # noqa: F401 - bench/resources.py looks for kernels here


def qkv_projection(x, weights, out, norm_weight, norm_bias, eps):
    """out [M, weights * N] = LayerNorm(x [M, K]) times each of two or three weights [N, K], side by side.

    x, weights               unit stride in K, one dtype; out dense, not empty
    norm_weight, norm_bias   [K], dense, or None; eps: None without LayerNorm
    """
    launch(x, weights, None, None, out, "none", 1.0, norm_weight, norm_bias, eps)
