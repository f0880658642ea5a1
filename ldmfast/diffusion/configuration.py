"""A scheduler's configuration, to make another one of."""

from __future__ import annotations

from typing import Any

import diffusers

from ldmfast.models.index_names import record_stock_names

record_stock_names()  # every scheduler of ours imports this file


def as_it_is(scheduler: diffusers.SchedulerMixin) -> dict[str, Any]:
    """The configuration with what was changed since it was made.

    `from_config(scheduler.config)` takes the class's default again for what was not named at first, also where it has
    another value by now: diffusers' StableDiffusionPipeline sets clip_sample and steps_offset in what it is given.
    """
    return {name: value for name, value in scheduler.config.items() if name != "_use_default_values"}
