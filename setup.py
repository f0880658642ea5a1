"""Builds the C++ modules with CMake and copies kernels/ into the package. Everything else is in pyproject.toml.

Without a C++ compiler the package still installs; the ops then say that the backend was not built
(`python -m ldmfast doctor`). A compiler that is there and fails is an error.

LDMFAST_CUDA=OFF leaves the CUDA module out where nvcc is found, LDMFAST_CUDA_BLACKWELL=OFF its code for sm_100 and
up. LDMFAST_SANITIZE=address or thread builds for that sanitizer; `make sanitize` puts such modules beside the package.
A checkout (`pip install -e .`, `build_ext --inplace`) is always built in the same folder under build/, so that only
what changed is compiled.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def compiler() -> str | None:
    """The C++ compiler that CMake will use, or None."""
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else ["c++", "g++", "clang++"])), None)


def jobs() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


def wants_cuda() -> bool:
    """Raises SystemExit for a LDMFAST_CUDA that is neither ON nor OFF."""
    value = os.environ.get("LDMFAST_CUDA") or "ON"
    if value not in ("ON", "OFF"):
        raise SystemExit(f"ldmfast: LDMFAST_CUDA is {value!r}, expected ON or OFF")
    return value == "ON"


class BuildKernels(build_py):
    """ldmfast.kernels: in a checkout its __path__ reaches kernels/; in a wheel the files lie in the package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "ldmfast" / "kernels"
            for source in sorted((ROOT / "kernels").glob("*.py")):
                shutil.copyfile(source, target / source.name)


class BuildModules(build_ext):
    """One CMake run for all modules, or for those that --targets names (see CMakeLists.txt)."""

    user_options = [*build_ext.user_options, ("targets=", None, "CMake targets, by commas (default: all)")]

    def initialize_options(self):
        super().initialize_options()
        self.targets = None

    def run(self):
        if compiler() is None:
            print("ldmfast: no C++ compiler on PATH: the cpu and cuda backends are not built", file=sys.stderr)
            return
        inplace = self.inplace or self.editable_mode
        if inplace and os.environ.get("LDMFAST_SANITIZE"):
            raise SystemExit(
                "ldmfast: LDMFAST_SANITIZE builds beside the package only: give build_ext --build-lib FOLDER"
            )
        output = ROOT / "ldmfast" if inplace else Path(self.build_lib).resolve() / "ldmfast"
        build = self.folder(inplace)
        build.mkdir(parents=True, exist_ok=True)
        self.configure(build, output, ["-DCMAKE_CXX_FLAGS_RELEASE=-O3 -DNDEBUG -g1"] if inplace else [])
        targets = ["--target", *self.targets.split(",")] if self.targets else []
        self.spawn(["cmake", "--build", str(build), "--parallel", str(jobs()), *targets])

    def folder(self, inplace: bool) -> Path:
        """One for each interpreter and for CUDA on or off: changing a setting of CMake's compiles anew."""
        name = sys.implementation.cache_tag + ("-cuda" if wants_cuda() else "")
        return ROOT / "build" / name if inplace else Path(self.build_temp).resolve() / f"cmake-{name}"

    def configure(self, build: Path, output: Path, options: list) -> None:
        import pybind11

        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        settings = {
            "LDMFAST_OUTPUT": output,
            "LDMFAST_CUDA": "ON" if wants_cuda() else "OFF",
            "LDMFAST_CUDA_BLACKWELL": os.environ.get("LDMFAST_CUDA_BLACKWELL", "ON"),
            "LDMFAST_SANITIZE": os.environ.get("LDMFAST_SANITIZE", ""),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        options = [*options, *(f"-D{name}={value}" for name, value in settings.items())]
        self.spawn(["cmake", "-S", str(ROOT), "-B", str(build), *generator, *options])

    def spawn(self, command):
        try:
            subprocess.run(command, check=True)
        except FileNotFoundError as error:
            raise SystemExit(f"ldmfast: {command[0]} is needed to build: pip install {command[0]}") from error
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"ldmfast: the build failed: {' '.join(command)}") from error

    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


setup(
    # sources are CMake's business; one entry makes the wheel a platform wheel
    ext_modules=[Extension("ldmfast._cpu", [])],
    cmdclass={"build_py": BuildKernels, "build_ext": BuildModules},
)
