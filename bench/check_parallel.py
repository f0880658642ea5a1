"""Two processes against one with twice the batch, and a rank that is killed: `python bench/check_parallel.py`.

Trains a small denoiser of the test emoji three times, through the command line and `accelerate launch`:

    one process, batch 2B        two processes, batch B        two, rank 1 killed with SIGKILL on the way, started again

and prints how far the loss curves are apart, and whether the third run's weights are the second's, bit for bit.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch

from ldmfast.data import emoji
from ldmfast.training import checkpoint

CUTOUTS = Path(__file__).parents[1] / "tests" / "data" / "emoji"
TRAIN = ["-m", "ldmfast", "train"]
LAUNCH = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]
NETWORK = ["--channels", "32,64", "--attention", "0,1", "--groups", "8", "--head-width", "32", "--condition", "none"]


def main():
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--steps", type=int, default=40)
    options.add_argument("--batch", type=int, default=8, help="of each of the two processes")
    options.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cuda needs two GPUs")
    options = options.parse_args()
    with tempfile.TemporaryDirectory() as home:
        compare(Path(home), options)


def compare(home, options):
    few = ("lemon", "rocket", "cat", "whale")
    emoji.build({name: emoji.folder_cutouts(CUTOUTS)[name] for name in few}, home / "pictures", size=32, count=2)
    small = ["--size", "32", "--channels", "16,32", "--groups", "8", "--steps", "30", "--output", str(home / "vae")]
    run([*TRAIN, "autoencoder", "--data", str(home / "pictures"), *small, "--warmup", "2", "--quiet"])
    denoiser = [
        "denoiser",
        "--data",
        str(home / "pictures"),
        "--autoencoder",
        str(home / "vae"),
        *NETWORK,
        "--warmup",
        "5",
        "--steps",
        str(options.steps),
        "--precision",
        options.precision,
        "--device",
        options.device,
        "--log-every",
        "1",
        "--save-every",
        "5",
        "--quiet",
    ]
    run([*TRAIN, *denoiser, "--batch", str(2 * options.batch), "--output", str(home / "one")])
    two = lambda name: [*LAUNCH, *TRAIN, *denoiser, "--batch", str(options.batch), "--output", str(home / name)]  # noqa: E731
    run(two("two"))
    report_curves(*(checkpoint.load(home / name / "denoiser.pt")["history"] for name in ("one", "two")))
    left, seconds = killed(two("killed"), home / "killed" / "denoiser.pt", at=options.steps // 2)
    print(f"rank 1 killed; the launch ended {seconds:.1f} s later, its checkpoint holds step {left}")
    run(two("killed"))
    whole, resumed = (checkpoint.load(home / name / "denoiser.pt") for name in ("two", "killed"))
    same = all(torch.equal(value, resumed["model"][name]) for name, value in whole["model"].items())
    print(
        f"started again: step {resumed['step']}, weights {'equal' if same else 'DIFFER from'} those of the run that "
        f"was not killed, histories {'equal' if whole['history'] == resumed['history'] else 'DIFFER'}"
    )


def run(arguments):
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def report_curves(one, two):
    print(f"{'step':>6} {'one process':>14} {'two processes':>14} {'difference':>12}")
    apart = [abs(b[1] - a[1]) / a[1] for a, b in zip(one, two, strict=True)]
    for i in range(0, len(one), max(1, len(one) // 8)):
        print(f"{one[i][0]:>6} {one[i][1]:>14.8f} {two[i][1]:>14.8f} {apart[i]:>12.1e}")
    steps = [abs(b[1] - a[1]) / a[1] for a, b in zip(one, one[1:], strict=False)]
    print(f"largest relative difference {max(apart):.1e}; from a step to the next the loss changes by {max(steps):.1e}")


def killed(arguments, path, at):
    """Start, wait for the checkpoint of step `at`, kill rank 1. Returns the checkpoint's step and how long it took."""
    launch = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while launch.poll() is None and not (path.exists() and checkpoint.load(path)["step"] >= at):
        time.sleep(0.1)
    rank = next(p for p in psutil.Process(launch.pid).children(recursive=True) if p.environ().get("RANK") == "1")
    rank.kill()
    began = time.monotonic()
    if launch.wait() == 0:
        raise SystemExit("the launch ended well although rank 1 was killed: it was too late; try more --steps")
    return checkpoint.load(path)["step"], time.monotonic() - began


if __name__ == "__main__":
    main()
