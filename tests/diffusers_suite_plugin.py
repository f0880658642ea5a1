"""The pytest plugin of diffusers_suite.py: our classes in diffusers' places, a tokenizer without the hub, outcomes.

What is patched is diffusers as it is installed, before its tests import it; it must be loaded by `-p`.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import diffusers
import transformers

ROUTE, OUTCOMES, LOCAL = (os.environ[f"DIFFUSERS_SUITE_{name}"] for name in ("ROUTE", "OUTCOMES", "LOCAL"))
HUB = ("hf-internal-testing/", "peft-internal-testing/")  # whose tiny CLIPs the local ones stand in for


def _our_classes() -> None:
    """Every name of diffusers' that ldmfast has a class for is that class, wherever a test or a folder looks it up."""
    from ldmfast.diffusion import catalogue

    for name, kind in {**catalogue.NETWORKS, **catalogue.SCHEDULERS}.items():
        for module in (diffusers, diffusers.models, diffusers.schedulers):
            if hasattr(module, name):
                setattr(module, name, kind)


def _optimized_pipelines() -> None:
    """Every pipeline is put through `ldmfast.optimize` at the end of its construction."""
    from ldmfast.pipeline.optimize import optimize

    def subclass(cls, **kwargs):
        super(diffusers.DiffusionPipeline, cls).__init_subclass__(**kwargs)
        init = cls.__init__

        @functools.wraps(init)
        def constructed(self, *arguments, **named):
            init(self, *arguments, **named)
            if type(self) is cls:
                try:
                    optimize(self)
                except ValueError as error:
                    if "to take over" not in str(error):
                        raise

        cls.__init__ = constructed

    diffusers.DiffusionPipeline.__init_subclass__ = classmethod(subclass)


def _local_clips() -> None:
    """CLIP's tokenizers and text towers of the hub's tiny models are those that diffusers_suite.py wrote."""
    towers = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
    for kind in (transformers.CLIPTokenizer, transformers.AutoTokenizer, *towers):
        original = kind.from_pretrained.__func__
        place = str(Path(LOCAL, kind.__name__)) if kind in towers else LOCAL

        def from_pretrained(cls, name, *arguments, original=original, place=place, **named):
            if isinstance(name, str) and name.startswith(HUB) and "clip" in name:
                name, named = place, {}
            return original(cls, name, *arguments, **named)

        kind.from_pretrained = classmethod(from_pretrained)


_local_clips()
if ROUTE == "classes":
    _our_classes()
elif ROUTE == "optimize":
    _optimized_pipelines()

_outcomes: dict[str, list[str]] = {}


def pytest_runtest_logreport(report) -> None:
    """A test's outcome is the worst of its phases, with the last line of what went wrong."""
    if report.when == "call" or report.outcome != "passed":
        reason = ""
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = " ".join((crash.message if crash else str(report.longrepr)).split())[:300]
        if _outcomes.get(report.nodeid, ["passed"])[0] == "passed":
            _outcomes[report.nodeid] = [report.outcome, reason]


def pytest_sessionfinish() -> None:
    Path(OUTCOMES).write_text(json.dumps(_outcomes))
