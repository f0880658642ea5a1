"""Where a diffusers pipeline looks at a part's very class, ours stands for the diffusers class that it subclasses.

There are two such places, and neither asks the part. What is written into model_index.json, a part's module and class:
diffusers' names, which load anywhere. And `SomePipeline.from_pipe`, which leaves out a model whose class is not one of
those that the new pipeline's parameters name, subclasses included. So the one function behind each is wrapped here; for
anything that is not of our classes it answers as before.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.pipelines import pipeline_loading_utils

_NAME = "_fetch_class_library_tuple"
_OURS: dict[type, type] = {}  # a model class of diffusers', and ours that may stand in its place


def record_stock_names() -> None:
    """From now on a pipeline that is given a model or scheduler of ours records its `stock` class. Once is enough."""
    asked = getattr(pipeline_loading_utils, _NAME)
    if hasattr(asked, "ldmfast"):
        return

    @functools.wraps(asked)
    def fetch(module: Any) -> tuple[str, str]:
        # of exactly our class: what somebody derives from it has a name and a forward of its own
        own = vars(type(pipeline_loading_utils._unwrap_model(module)))
        ours = own.get("__module__", "").partition(".")[0] == __name__.partition(".")[0]
        return asked(own["stock"] if ours and "stock" in own else module)

    fetch.ldmfast = True
    for module in list(sys.modules.values()):  # those that imported it by name before
        if getattr(module, "__name__", "").startswith("diffusers.") and vars(module).get(_NAME) is asked:
            setattr(module, _NAME, fetch)


def pass_on_from_pipe(stock: type, ours: type) -> None:
    """From now on diffusers' `from_pipe` takes over a model that is exactly `ours` wherever it takes over a `stock`."""
    _OURS[stock] = ours
    asked = DiffusionPipeline._get_signature_types.__func__
    if hasattr(asked, "ldmfast"):
        return

    @functools.wraps(asked)
    def signature_types(cls: type) -> dict[str, tuple]:
        # stock's names stay first: from_single_file reads that one
        return {name: (*kinds, *(_OURS[kind] for kind in kinds if kind in _OURS)) for name, kinds in asked(cls).items()}

    signature_types.ldmfast = True
    DiffusionPipeline._get_signature_types = classmethod(signature_types)
