"""The contract `exact` on whole pictures of the shipped models: the same bits in every batch, thread count and run.

    python bench/checks/exact.py                                    about an hour on one core
    python bench/checks/exact.py --model emoji320 --sampler ddim euler-a
    python bench/checks/exact.py --numerics fast                    how much of it `fast` holds
    python bench/checks/exact.py --cost                             seconds of a batch, fast and exact in turn

Each run is a process of its own, which draws the pictures of the first seeds at once, for each size of batch and each
number of threads. Every latent and every decoded picture (float32, before it is rounded to 255 levels) is compared, bit
for bit, with that of the first run's first batch that has it, in one thread. Exits 1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

PROMPTS = (
    "a red apple on a yellow background",
    "a cat on a blue background",
    "a rocket on a black background",
    "a bee, green background",
    "a crown on a purple background",
    "a snowman on an orange background",
    "a pumpkin on a white background",
    "a crab on a red background",
)
CLASSES = [{"class": name} for name in ("cat", "frog", "pig")]
BOXES = [{"boxes": [{"object": "cat", "box": [0.1, 0.1, 0.4 + 0.1 * i, 0.6]}]} for i in range(3)]
INPUTS = {"emoji320": list(PROMPTS), "scenes64": [*CLASSES, *BOXES, "map", "map"]}


def main() -> int:
    from ldmfast.diffusion.samplers import SAMPLERS

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", nargs="*", choices=tuple(INPUTS), default=tuple(INPUTS))
    parser.add_argument("--sampler", nargs="*", choices=tuple(SAMPLERS), default=tuple(SAMPLERS))
    parser.add_argument("--batch", nargs="*", type=int, default=(1, 2, 5, 8))
    parser.add_argument("--threads", nargs="*", type=int, default=(1, 2, 4))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--numerics", choices=("exact", "fast"), default="exact")
    parser.add_argument("--cost", action="store_true", help="time fast and exact instead")
    parser.add_argument("--one-run", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cost:
        return cost(arguments)
    return one_run(arguments) if arguments.one_run else check(arguments)


def check(arguments) -> int:
    """Starts the runs, and compares their digests."""
    failed = 0
    for model, sampler in itertools.product(arguments.model, arguments.sampler):
        started, runs = time.perf_counter(), [run(arguments, model, sampler) for _ in range(arguments.runs)]
        wanted = {}  # of each picture's first digest
        for key, value in runs[0].items():
            wanted.setdefault(key.split()[2], value)
        wrong = [
            f"run {i + 1}: batch {batch}, {threads} threads, picture {seed}"
            for i, found in enumerate(runs)
            for (batch, threads, seed), value in ((key.split(), value) for key, value in found.items())
            if value != wanted[seed]
        ]
        count = sum(map(len, runs))
        said = (
            f"{len(wrong)} of {count} differ, the first: {wrong[0]}" if wrong else f"{count} pictures, no bit differs"
        )
        print(f"{model:10} {sampler:14} {said}   ({time.perf_counter() - started:.0f} s)", flush=True)
        failed += bool(wrong)
    return 1 if failed else 0


def run(arguments, model: str, sampler: str) -> dict[str, str]:
    """{"batch threads seed": digest} of one process."""
    options = ["--batch", *map(str, arguments.batch), "--threads", *map(str, arguments.threads)]
    options += ["--steps", str(arguments.steps), "--dtype", arguments.dtype, "--model", model, "--sampler", sampler]
    environment = {**os.environ, "LDMFAST_NUMERICS": arguments.numerics, "PYTHONPATH": str(ROOT)}
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, __file__, "--one-run", *options]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"{' '.join(command)}\n{found.stderr}")
    return json.loads(found.stdout.splitlines()[-1])


def one_run(arguments) -> int:
    import torch

    (model,), (sampler,) = arguments.model, arguments.sampler
    draw = drawer(arguments, model, sampler)
    found = {}
    for batch, threads in itertools.product(arguments.batch, arguments.threads):
        torch.set_num_threads(threads)
        latents, pictures = draw(batch)
        for seed, tensors in enumerate(zip(latents, pictures, strict=True)):
            data = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for tensor in tensors)
            found[f"{batch} {threads} {seed}"] = hashlib.sha256(data).hexdigest()
    print(json.dumps(found))
    return 0


def drawer(arguments, model: str, sampler: str):
    """draw(batch) -> (latents, decoded pictures) of the first seeds."""
    import torch

    from ldmfast.diffusion.samplers import make_sampler
    from ldmfast.pipeline import LatentDiffusionPipeline
    from ldmfast.pipeline.call import SamplingOptions

    pipe = LatentDiffusionPipeline.from_pretrained(ROOT / "ldmfast" / "assets" / model)
    pipe.to(getattr(torch, arguments.dtype))
    inputs = [{"map": semantic_map(i)} if one == "map" else one for i, one in enumerate(INPUTS[model])]

    def draw(batch):
        options = SamplingOptions(make_sampler(sampler, pipe.scheduler), arguments.steps, pipe.guidance)
        latents = pipe.denoise(inputs[:batch], list(range(batch)), options)
        return latents, pipe.decode(latents)

    return draw


def semantic_map(i: int):
    """64x64 pixels of ground with a block of class i."""
    import torch

    found = torch.zeros(64, 64, dtype=torch.int64)
    found[10:40, 20 : 30 + i] = i
    return found


def cost(arguments) -> int:
    """Medians of 5, after one to warm up, fast and exact in turn."""
    import torch

    import ldmfast

    for model, sampler in itertools.product(arguments.model, arguments.sampler):
        draw = drawer(arguments, model, sampler)
        for batch, threads in itertools.product(arguments.batch, arguments.threads):
            torch.set_num_threads(threads)
            seconds = {"fast": [], "exact": []}
            for _, contract in itertools.product(range(6), seconds):
                with ldmfast.numerics(contract):
                    started = time.perf_counter()
                    draw(batch)
                    seconds[contract].append(time.perf_counter() - started)
            fast, exact = (statistics.median(times[1:]) for times in seconds.values())
            said = f"fast {fast:.3f} s, exact {exact:.3f} s: {exact / fast:.2f} times"
            print(f"{model:10} {sampler:14} batch {batch}, {threads} threads: {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
