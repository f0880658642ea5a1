"""A function of the user's after each step, as diffusers calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

StepCallback = Callable[[Any, int, torch.Tensor, dict[str, torch.Tensor]], dict[str, Any] | None]
GIVEN = ("latents",)


def as_step(
    callback: StepCallback | None, pipeline: Any
) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor] | None:
    """(x, i, time) -> x, which calls callback(pipeline, i, time, {"latents": x}); None for none.

    Raises TypeError for what cannot be called, ValueError for one of diffusers' PipelineCallbacks that wants more than
    the latents, and for latents of another shape that it returns.
    """
    if callback is None:
        return None
    if not callable(callback):
        raise TypeError(f"callback_on_step_end={callback!r:.80}, expected a function")
    more = [name for name in getattr(callback, "tensor_inputs", ()) if name not in GIVEN]
    if more:
        raise ValueError(f"{type(callback).__name__} wants {', '.join(more)}; a callback gets the latents alone here")

    def step(x: torch.Tensor, i: int, time: torch.Tensor) -> torch.Tensor:
        given = {"latents": x}
        found = callback(pipeline, i, time, given)
        if found is not None and not isinstance(found, dict):
            raise TypeError(f"callback_on_step_end gave a {type(found).__name__}, expected a dict or None")
        latents = (found or given).get("latents", x)
        if latents.shape != x.shape:
            raise ValueError(f"callback_on_step_end gave latents {list(latents.shape)}, expected {list(x.shape)}")
        return latents.to(x)

    return step
