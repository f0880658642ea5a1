"""The most memory that training on many pictures takes, stage by stage: each is a process of its own.

    python bench/checks/many_pictures.py FOLDER                   20,000 of 256x256, each with a caption of its own
    python bench/checks/many_pictures.py FOLDER --most 2000       exits 1 where a stage takes more MB than that

FOLDER holds the pictures, which are made once, and what is trained. A stage takes a few steps: what it holds of all the
pictures (decoded, their latents, the states of their captions) is held from the first step on. The networks are small;
what larger ones take comes on top. What is printed is the process's peak of resident memory, as /usr/bin/time -v has
it, and the seconds that it took.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
BRIEF = ["--steps", "4", "--warmup", "0", "--quiet"]


def stages(home, size):
    """(name, arguments of `ldmfast train`). All write to one folder, so that the pictures are decoded once."""
    data, out = ["--data", str(home / "pictures")], ["--output", str(home / "run")]
    shape = ["--size", str(size), "--channels", "16,16,16,16", "--layers", "0", "--groups", "4", "--batch", "4"]
    small = ["--autoencoder", str(home / "run"), "--channels", "32,64", "--attention", "0,1", "--groups", "16"]
    latents = ["--latents", str(home / "latents.safetensors")]
    yield "autoencoder", ["autoencoder", *data, *shape, "--start", "linear", *out]
    yield "denoiser", ["denoiser", *data, *small, "--batch", "8", *out]
    yield "denoiser, latents in a file", ["denoiser", *data, *small, "--batch", "8", *latents, *out]
    yield "decoder", ["decoder", *data, "--autoencoder", str(home / "run"), "--batch", "4", *out]
    yield "lora", ["lora", *data, "--model", str(home / "run" / "pipeline"), "--batch", "8", *out]


def make(folder, count, size):
    """`count` pictures of smooth noise as JPEG, each with a caption of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        path = folder / f"{i:06d}.jpg"
        if not path.exists():
            small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            small.resize((size, size), Image.BICUBIC).save(path, quality=80)
        rows.append({"file_name": path.name, "text": f"picture number {i} of many, in its own colours"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def measure(arguments):
    """(MB of peak resident memory, seconds). Raises CalledProcessError."""
    command = [sys.executable, "-m", "ldmfast", "train", *arguments, *BRIEF, "--device", "cpu", "--restart"]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return usage.ru_maxrss / 1024, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="for the pictures and what is trained")
    parser.add_argument("--count", type=int, default=20000, help="pictures (default: 20000)")
    parser.add_argument("--size", type=int, default=256, help="pixels a side (default: 256)")
    parser.add_argument("--only", help="the stages whose name begins so")
    parser.add_argument("--most", type=float, help="MB that no stage may exceed")
    asked = parser.parse_args()
    home, worst = asked.folder.resolve(), 0.0
    make(home / "pictures", asked.count, asked.size)
    for name, arguments in stages(home, asked.size):
        if name.startswith(asked.only or ""):
            found, seconds = measure(arguments)
            worst = max(worst, found)
            print(f"{name:30} {found:6.0f} MB {seconds:6.1f} s", flush=True)
    return int(asked.most is not None and worst > asked.most)


if __name__ == "__main__":
    sys.exit(main())
