"""The Triton kernels, one file per op.

In an installed package the files lie beside this one. In a checkout they lie in the top-level folder `kernels/`,
which has no `__init__.py` of its own: it would shadow the package `kernels` that diffusers imports.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if (_checkout / "group_norm_silu.py").is_file():
    __path__.append(str(_checkout))
