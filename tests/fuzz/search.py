"""Draws plans with hypothesis, checks each, and gives the smallest plan of every failure that a part of them met."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis
from hypothesis import HealthCheck, Phase

QUIET = dict(
    database=None, deadline=None, suppress_health_check=list(HealthCheck), verbosity=hypothesis.Verbosity.quiet
)


class Found(Exception):
    """A plan that fails: what is wrong with it."""


@dataclass
class Search:
    """checked: plans; calls: what they ran; findings: {"plan": ..., "what": ...}, each as small as it could be made."""

    checked: int = 0
    calls: int = 0
    findings: list = field(default_factory=list)


def verdict(check: Callable[[dict], tuple[int, list[str]]], plan: dict) -> tuple[int, str | None]:
    """(calls that it made, what is wrong in a line): an error that is not caught is wrong, too."""
    try:
        calls, found = check(plan)
    except (hypothesis.errors.HypothesisException, KeyboardInterrupt):
        raise
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        first = (str(error).strip().splitlines() or [""])[0]
        return 1, f"{type(error).__name__}: {first[:300]} ({last.filename.rsplit('/', 1)[-1]}:{last.lineno})"
    return calls, "; ".join(found) or None


def search(strategy, check, count: int, seed: int, *, shrink: bool = True) -> Search:
    """Check `count` plans of the strategy. After a failure the search ends, its plan made small."""
    found = Search()
    failing: list[tuple[dict, str]] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
        report_multiple_bugs=False,
        **QUIET,
    )
    @hypothesis.given(strategy)
    def test(plan):
        if not failing:
            found.checked += 1
        calls, what = verdict(check, plan)
        found.calls += 0 if failing else calls
        if what:
            failing.append((plan, what))
            raise Found(what)

    try:
        test()
    except (Found, hypothesis.errors.Flaky):
        plan, what = failing[-1]  # hypothesis runs the smallest last
        found.findings.append({"plan": plan, "what": what})
    return found


def prepare(setattr) -> None:
    """Fresh memory is NaN, so that an element which a kernel leaves out is seen; `torch` is an op's closed gradient."""
    import torch

    from ldmfast.ops.operator import Op

    fused = Op.fused
    setattr(Op, "fused", lambda op, args, name: fused(op, args, name) or True)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)


def kinds() -> dict[str, tuple]:
    """{name: (strategy, check)} of all that is searched: "op ...", "network ..." and "file ...", each by its name."""
    import damage
    import op_calls
    import op_plans
    import random_networks as networks

    return {
        **{f"op {name}": (op_plans.plans(name), op_calls.faults) for name in op_plans.NAMES},
        **{f"network {name}": (networks.plans(name), networks.faults) for name in networks.OPTIONS},
        **{f"file {name}": (damage.plans(name), damage.outcome) for name in damage.FILES},
    }
