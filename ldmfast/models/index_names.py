"""What a diffusers pipeline writes into model_index.json for a class of ours: diffusers' name, which loads anywhere.

A pipeline records a part's module and class when the part is given to it, and asks nobody. So the one function that
reads them is wrapped here; for anything that is not of our classes it answers as before.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from diffusers.pipelines import pipeline_loading_utils

_NAME = "_fetch_class_library_tuple"


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
