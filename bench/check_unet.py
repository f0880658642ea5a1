"""How far the SD1.5-size U-Net and autoencoder are from stock diffusers, with random weights, on the CPU.

    python bench/check_unet.py            about 2 minutes on two cores, 9 GB

Float32: norm of the difference over norm, at most 1e-5. Bfloat16: the distance to stock float32, at most 1.1 times
that of stock bfloat16. Exits 1 where a figure is over its limit.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import networks  # noqa: E402
import torch  # noqa: E402

from ldmfast import UNet  # noqa: E402
from ldmfast.models.autoencoder import AutoencoderKL  # noqa: E402

LIMITS = {"float32": 1e-5, "bfloat16": 1.1}


def figures(name: str, stock, take_over: Callable, run: Callable) -> bool:
    """Print one network's figures; whether they are within the limits. run(model, dtype) -> its answer."""
    exact = run(stock, torch.float32)
    half = copy.deepcopy(stock).bfloat16()
    theirs = networks.error(run(half, torch.bfloat16), exact)
    mine = networks.error(run(take_over(half), torch.bfloat16), exact)
    del half
    single = networks.error(run(take_over(stock), torch.float32), exact)
    print(
        f"{name:16} float32 {single:.2e} (limit {LIMITS['float32']:.0e})   bfloat16 {mine:.3e}, stock {theirs:.3e}"
        f": {mine / theirs:.3f} times (limit {LIMITS['bfloat16']})",
        flush=True,
    )
    return single <= LIMITS["float32"] and mine <= LIMITS["bfloat16"] * theirs


@torch.inference_mode()
def main() -> int:
    def unet(model, dtype):
        return model(**networks.inputs(1, dtype)).sample

    def encode(model, dtype):
        x = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(2))
        return model.encode(x.to(dtype)).latent_dist.parameters

    def decode(model, dtype):
        z = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(3))
        return model.decode(z.to(dtype)).sample

    good = figures("U-Net 64x64", networks.sd15(torch.float32), UNet.from_unet, unet)
    good &= figures("encode 256x256", networks.sd15_vae(torch.float32), AutoencoderKL.adopt, encode)
    good &= figures("decode 32x32", networks.sd15_vae(torch.float32), AutoencoderKL.adopt, decode)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
