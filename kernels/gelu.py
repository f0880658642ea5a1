"""x Phi(x), in Triton."""

import triton
import triton.language as tl


@triton.jit
def gelu(x):
    """max(x, 0) - |x| Phi(-|x|), of which 1 + erf would leave nothing below -3; NaN for -inf, as torch has it.

    Phi(-u) = 2^p(u), p a minimax polynomial on [0, 5.8]: csrc/cpu/product/epilogue.h.
    """
    u = tl.maximum(-x, tl.minimum(x, 1000.0))
    p = u * -1.8664144e-08 + 5.91338562e-07
    p = p * u - 8.01929946e-06
    p = p * u + 5.87731156e-05
    p = p * u - 2.16855886e-04
    p = p * u - 1.34724876e-04
    p = p * u + 7.11784931e-03
    p = p * u - 5.25619686e-02
    p = p * u - 4.59178954e-01
    p = p * u - 1.15110970e00
    p = p * u - 9.99999881e-01
    return tl.where(x < 0, 0.0, x) - u * tl.exp2(p)
