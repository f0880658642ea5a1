"""What a GPU machine without a network is brought: modules built for its Python, and wheels of what it lacks.

    python bench/gpu/carry.py build/carry --python python3.12
    bench/gpu.sh OUT A --carried build/carry                      there

FOLDER/modules/ldmfast holds _cpu and _cuda (nvcc is needed, a GPU is not); FOLDER/wheels the pure-Python packages of
PACKAGES, which torch's usual images lack. Both are for the Python that is named; its tools go into FOLDER/venv, which
need not travel. glibc must be no newer here than there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("setuptools>=77", "wheel", "pybind11>=2.13", "cmake>=3.25", "ninja")
PACKAGES = ("diffusers==0.42.1", "importlib_metadata", "zipp")  # huggingface_hub >= 1.32 is taken to be there


def run(*command, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], cwd=ROOT, env={**os.environ, **environment}, check=True)


def modules(folder: Path, python: str) -> None:
    """Builds _cpu and _cuda for `python`, with build tools of its own."""
    venv = folder / "venv"
    if not (venv / "bin" / "python").exists():
        run(python, "-m", "venv", venv)
    run(venv / "bin" / "python", "-m", "pip", "install", "-q", *TOOLS)
    built = "setup.py", "-q", "build_ext", "--build-lib", folder / "modules", "--build-temp", folder / "objects"
    path = f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"
    run(venv / "bin" / "python", *built, "--targets", "_cpu,_cuda", LDMFAST_CUDA="ON", PATH=path)


def wheels(folder: Path, packages: list[str]) -> None:
    wanted = ["-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", folder / "wheels", *packages]
    shutil.rmtree(folder / "wheels", ignore_errors=True)  # two versions of one package stop an installation
    run(folder / "venv" / "bin" / "python", *wanted)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--python", default="python3.12", help="an interpreter of the other machine's version")
    parser.add_argument("--packages", nargs="*", default=PACKAGES, help=f"(default: {' '.join(PACKAGES)})")
    options = parser.parse_args(argv)
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    modules(folder, options.python)
    wheels(folder, options.packages)
    carried = [*sorted(folder.glob("modules/ldmfast/*.so")), *sorted(folder.glob("wheels/*.whl"))]
    for file in carried:
        print(f"{file.stat().st_size / 2**20:7.1f} MiB  {file.relative_to(folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
