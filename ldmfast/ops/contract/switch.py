"""Which numerical contract is on.

fast   the default: whatever measures faster, Winograd's forms and PyTorch's kernels included. Results may differ in
       their last bits between batch sizes.
exact  every sum in an order that the shape of one sample alone decides: a picture has the same bits in a batch of any
       size, at any number of threads and in every run, on one machine's CPU and in one build. Direct kernels only.
"""

from __future__ import annotations

import os
import threading
from typing import Any

CONTRACTS = ("fast", "exact")
VARIABLE = "LDMFAST_NUMERICS"

_chosen: list[str] = ["fast"]  # LDMFAST_NUMERICS at import comes second, if set; the innermost `numerics` is last


class numerics:  # noqa: N801 - used as a function and as a context manager, as torch.set_grad_enabled is
    """Choose the numerical contract, "fast" or "exact": for a `with` block, or for good when called as a statement.

        with ldmfast.numerics("exact"):
            pictures = pipe(prompts, seeds=seeds)

    The choice is process-wide, as `use_backend` is: a picture that a server draws in a thread of its own obeys it, too.
    So do not open blocks of different contracts in several threads at once. LDMFAST_NUMERICS=exact is the same from the
    start. `exact` holds for ldmfast's ops, models, autoencoders and pipelines on a CPU, and in them for PyTorch's own
    operations (stock_ops.py), such as a text encoder's; other code is brought in by `ldmfast.fixed_order()`.
    torch.compile and quantised weights are outside of it, and so is every GPU.

    Raises ValueError for another name.
    """

    def __init__(self, contract: str) -> None:
        require_contract(contract, "numerics")
        self.contract = contract
        _chosen.append(contract)

    def __enter__(self) -> numerics:
        return self

    def __exit__(self, *exc: Any) -> None:
        del _chosen[len(_chosen) - 1 - _chosen[::-1].index(self.contract)]


def require_contract(name: str, where: str) -> None:
    if name not in CONTRACTS:
        raise ValueError(f"{where}: {name!r} is no numerical contract; there are {' and '.join(CONTRACTS)}")


def chosen_numerics() -> str:
    """The contract that is on, "fast" or "exact"."""
    return _chosen[-1]


def exact() -> bool:
    return _chosen[-1] == "exact"


if _name := os.environ.get(VARIABLE):  # read once, as LDMFAST_BACKEND is
    require_contract(_name, VARIABLE)
    _chosen.append(_name)


class _Modes(threading.local):
    """How many modes of stock_ops.py stand on this thread's stack of dispatch modes."""

    count = 0


modes = _Modes()
