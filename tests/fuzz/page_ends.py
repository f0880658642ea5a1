"""Random calls whose tensors end where an unreadable page begins, each compared with the reference in float64.

python tests/fuzz/page_ends.py SEED COUNT     on the CPU kernels of LDMFAST_CPU_ISA, or the best ones

A kernel that reads beyond the end of a tensor is killed here. Sanitizers do not see what a tile (AMX) or a vector
of an intrinsic loads.
"""

from __future__ import annotations

import ctypes
import mmap
import random
import sys

import torch

from ldmfast import ops

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def at_the_end(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last of a page that none follows."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, pages + PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if LIBC.mprotect(address + pages, PAGE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    bytes_ = (ctypes.c_char * size).from_buffer(memory, pages - size)
    return torch.frombuffer(bytes_, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


class Calls:
    """Random arguments, as dict of tensors by name and dict of the others."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * 0.3

    def linear(self):
        pick = self.random.choice
        M = pick((1, 5, 16, 17, 31, 33, 64, 77, 100, 129, 145, 160, 200))
        K, N = pick((1, 2, 8, 32, 40, 64, 75, 96, 130, 640, 1300)), pick((1, 7, 16, 33, 40, 64, 70, 320))
        activation = pick(("none", "gelu", "silu", "geglu"))
        rows = 2 * N if activation == "geglu" else N
        tensors = {"x": self.normal(M, K), "weight": self.normal(rows, K), "bias": self.normal(rows)}
        tensors["residual"] = self.normal(M, N)
        if pick((True, False)):
            tensors |= {"norm_weight": self.normal(K), "norm_bias": self.normal(K)}
        return ops.linear, tensors, {"activation": activation}

    def conv2d(self):
        pick = self.random.choice
        C, C2, Co = pick((3, 8, 32, 40, 64, 75, 160)), pick((0, 0, 32, 5)), pick((4, 33, 64, 70))
        H, W = pick(((3, 4), (8, 8), (13, 7), (12, 16), (16, 16), (20, 33), (70, 64), (5, 150)))
        N, k = pick((1, 2)), pick((1, 3, 3))
        tensors = {"x": self.normal(N, H, W, C), "weight": self.normal(Co, C + C2, k, k), "bias": self.normal(Co)}
        if C2:
            tensors["x2"] = self.normal(N, H, W, C2)
        return ops.conv2d, tensors, {"padding": k // 2, "stride": pick((1, 1, 2)), "upsample": pick((1, 1, 2))}

    def attention(self):
        pick = self.random.choice
        N, L, S = pick((1, 2)), pick((1, 5, 16, 31, 33, 64, 100)), pick((1, 5, 16, 77, 96, 129, 200, 300))
        H, D = pick((1, 2, 3)), pick((1, 8, 16, 24, 40, 64, 72, 80, 160, 200))
        return (
            ops.attention,
            {"q": self.normal(N, L, H, D), "k": self.normal(N, S, H, D), "v": self.normal(N, S, H, D)},
            {},
        )


def called(op, tensors: dict, others: dict, backend: str) -> torch.Tensor:
    tensors = dict(tensors)
    for name in ("x", "x2"):
        if name in tensors and op is ops.conv2d:
            tensors[name] = tensors[name].permute(0, 3, 1, 2)  # channels_last
    if "norm_weight" in tensors:
        others = others | {"layer_norm": (tensors.pop("norm_weight"), tensors.pop("norm_bias"), 1e-5)}
    return op(**tensors, **others, backend=backend)


def main(seed: int, count: int) -> int:
    calls = Calls(seed)
    for _ in range(count):
        op, tensors, others = calls.random.choice((calls.linear, calls.conv2d, calls.attention))()
        dtype = calls.random.choice((torch.bfloat16, torch.bfloat16, torch.float32, torch.float16))
        given = {name: at_the_end(tensor.to(dtype)) for name, tensor in tensors.items()}
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        print(op.__name__, dtype, shapes, others, flush=True)  # the last line tells which call it was
        got = called(op, given, others, "cpu").double()
        wanted = called(op, {name: tensor.double() for name, tensor in given.items()}, others, "torch")
        error = ((got - wanted).norm() / wanted.norm().clamp_min(1e-9)).item()
        if not error < BOUND[dtype]:
            print(f"differs by {error:.1e}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
