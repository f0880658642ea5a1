"""The one guard: may a module be read and expanded, or must it be called?

A model's modules are diffusers' own, and our functions stand in for their `forward`. LoRA, hooks, offloading,
layerwise casting, compiling of blocks, attention processors, tiling and quantisation all work by replacing, wrapping or
reconfiguring modules, their methods or their classes' methods. So every function in `layers.py` and `blocks.py` asks
`obstacle(module)` first, and where there is one it calls the module, which then does all that its owner meant it to do.
A parent answers for the children that our function for it never calls: activations, and what stands in another's place.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ldmfast.models.limits import ALWAYS_CALLED, LIMITS, PLACES, misplaced, modified

_LOOK_INSIDE = (nn.ModuleList,)


def obstacle(module: nn.Module) -> str | None:
    """Why `module` must be called as it is, as a clause; None if it is plain."""
    kind = type(module)
    limit = LIMITS.get(kind)
    if limit is None:
        return f"{kind.__module__.partition('.')[0]}'s {kind.__name__} is not a layer that ldmfast knows"
    return modified(module, kind) or (misplaced(module, kind) if kind in PLACES else None) or limit(module)


def plain(module: nn.Module) -> bool:
    """Whether `module` does what its class says and no more, so that its parameters may be read in its place."""
    return obstacle(module) is None


def obstacles(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, reason) of the outermost modules inside `model` that would be called rather than expanded."""
    for name, child in model.named_children():
        kind = type(child)
        reason = modified(child, kind) if kind in ALWAYS_CALLED else obstacle(child)
        if kind in _LOOK_INSIDE or reason is None:
            for inner, why in obstacles(child):
                yield f"{name}.{inner}", why
        else:
            yield name, reason


def explain(model: nn.Module) -> list[str]:
    """A sentence for each reason why some of the model's modules are called rather than expanded."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in obstacles(model):
        by_reason.setdefault(reason, []).append(name)
    sentences = []
    for reason, names in by_reason.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        sentences.append(f"{shown}: called as it is, because {reason}.")
    return sentences
