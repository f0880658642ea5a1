"""Milliseconds of `ldmfast.load_lora` on a U-Net of Stable Diffusion 1: the first file, another, and back to one.

    python bench/checks/lora_load.py                 of files in the page cache; median and range of five networks
    python bench/checks/lora_load.py --profile       where the time of the first file and of the second goes

The network is random, in bfloat16, 1.7 GB; a file changes the attentions' four matrices (128 layers), the feed-
forwards' two and the projections in and out (64 more) at rank 16, under kohya's names. Imports are made before. Most
of it is Python's time: on one thread of torch's unless --threads says more.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import ldmfast  # noqa: E402

ENDS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
RANK = 16


def network() -> torch.nn.Module:
    """A U-Net of Stable Diffusion 1's shape; its weights are small random numbers."""
    with torch.device("meta"):
        unet = ldmfast.UNet(cross_attention_dim=768)
    unet = unet.to(torch.bfloat16).to_empty(device="cpu").eval()
    for parameter in unet.parameters():
        parameter.data.fill_(0.01)
    return unet


def write(path: Path, unet: torch.nn.Module, seed: int) -> int:
    """A file for the layers whose names end in ENDS; returns how many those are."""
    generator, table = torch.Generator().manual_seed(seed), {}
    layers = {name: m for name, m in unet.named_modules() if name.endswith(ENDS) and hasattr(m, "weight")}
    for name, module in layers.items():
        rows, columns, *window = module.weight.shape
        key = f"lora_unet_{name.replace('.', '_')}"
        ones = [1] * len(window)
        table[f"{key}.lora_down.weight"] = torch.randn(RANK, columns, *window, generator=generator).half()
        table[f"{key}.lora_up.weight"] = torch.randn(rows, RANK, *ones, generator=generator).half()
        table[f"{key}.alpha"] = torch.tensor(8.0)
    save_file(table, path)
    return len(layers)


def milliseconds(unet, *files) -> tuple[float, float]:
    """(passed, of the processor)"""
    start = time.perf_counter(), time.process_time()
    ldmfast.load_lora(unet, *files)
    return 1000 * (time.perf_counter() - start[0]), 1000 * (time.process_time() - start[1])


def profiled(unet, file) -> None:
    profile = cProfile.Profile()
    profile.runcall(ldmfast.load_lora, unet, file)
    pstats.Stats(profile).sort_stats("cumulative").print_stats(45)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=5)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{i}.safetensors") for i in range(3)]
        unet = network()
        count = [write(file, unet, seed) for seed, file in enumerate(files)][0]
        milliseconds(unet, files[0])  # imports, and the files into the page cache
        ldmfast.load_lora(unet)
        if given.profile:
            profiled(unet, files[0])
            profiled(unet, files[1])
            return 0
        rows = {"first": [], "another": [], "a third": [], "back": [], "none": []}
        for _ in range(given.networks):
            for what, asked in zip(rows, ([files[0]], [files[1]], [files[2]], [files[0]], []), strict=True):
                rows[what].append(milliseconds(unet, *asked))
        print(f"{count} layers, rank {RANK}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for what, times in rows.items():
            passed, used = (sorted(each) for each in zip(*times, strict=True))
            said = f"{statistics.median(passed):7.1f} ms ({passed[0]:.1f} to {passed[-1]:.1f})"
            print(f"{what:8} {said}, of the processor {statistics.median(used):.1f} ({used[0]:.1f} to {used[-1]:.1f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
