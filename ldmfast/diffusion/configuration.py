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


def adopted(kind: type, scheduler: diffusers.SchedulerMixin) -> diffusers.SchedulerMixin:
    """One of class `kind` with a scheduler's configuration as it is.

    It keeps which values are its class's defaults: what others make of its configuration, such as
    `EulerDiscreteScheduler.from_config(pipe.scheduler.config)`, takes their own class's defaults for those.
    """
    new = kind.from_config(as_it_is(scheduler))
    if "_use_default_values" in scheduler.config:
        new.register_to_config(_use_default_values=list(scheduler.config["_use_default_values"]))
    return new


def check_steps(num_inference_steps: int | None) -> None:
    """Raises ValueError for less than one step; None is for a scheduler that is given its timesteps themselves."""
    if num_inference_steps is not None and num_inference_steps < 1:
        raise ValueError(f"num_inference_steps is {num_inference_steps}, expected at least 1")
