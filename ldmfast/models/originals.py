"""What torch's and diffusers' code was when ldmfast was imported, so that what somebody put in its place shows.

A function of ours stands in for a module's `forward` and for all that this `forward` calls. Which functions those are
is read from the compiled code itself, so that another version of diffusers needs no list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch.nn.functional as F
from torch import nn

_CALL = ("__call__", "_call_impl")  # what leads from m(x) to m.forward(x)

Methods = tuple[tuple[str, Callable | None], ...]


def names_in(function: Callable) -> tuple[str, ...]:
    """The attributes and globals that a function's code names, in their order."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_names


def methods(kind: type, *entries: Callable) -> Methods:
    """(name, function) of the methods of `kind` that its forward, or one of `entries`, comes to, itself first.

    The function is None where it is not the package's own: it was replaced before ldmfast was imported.
    """
    found: dict[str, Callable] = {}
    waiting = [name for entry in entries for name in names_in(entry)]
    waiting = [*waiting, "forward"] if hasattr(kind, "forward") else waiting
    while waiting:
        name = waiting.pop()
        function = _method(kind, name)
        if function is not None and name not in found:
            found[name] = function
            waiting += names_in(function)
    found = {"forward": found.pop("forward"), **found} if "forward" in found else found
    found |= {name: getattr(kind, name) for name in _CALL if hasattr(kind, name)}
    return tuple((name, function if _own(function) else None) for name, function in found.items())


def _method(kind: type, name: str) -> Callable | None:
    """A function of the class itself or of a base that its own file defines; a tensor's `to` is not a model's."""
    for owner in kind.__mro__:
        function = owner.__dict__.get(name)
        if owner.__module__ == kind.__module__ and inspect.isfunction(function):
            return function
    return None


def _own(function: Callable) -> bool:
    """Whether the function was defined in torch or in diffusers; its own name of a module can be borrowed."""
    if inspect.isbuiltin(function):
        return True
    return getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] in ("torch", "diffusers")


def functions(kinds: Iterator[type]) -> tuple[tuple[dict, str, Callable | None], ...]:
    """(namespace, name, function) of what the forwards of `kinds` call that is no method: F's, diffusers.models'.

    The function is None where it is not the package's own: it was replaced before ldmfast was imported. Counters of
    operations wrap F.linear and F.conv2d in order to watch: then stock's forward is what they see.
    """
    found = {}
    for kind in kinds:
        for _, function in methods(kind):
            space = getattr(inspect.unwrap(function), "__globals__", {}) if function else {}
            for name in names_in(function) if function else ():
                if callable(F.__dict__.get(name)):
                    found["F", name] = F.__dict__, name, F.__dict__[name]
                elif getattr(space.get(name), "__module__", "").startswith("diffusers.models"):
                    if inspect.isfunction(space[name]):
                        found[space["__name__"], name] = space, name, space[name]
    return tuple((space, name, function if _own(function) else None) for space, name, function in found.values())


def replaced(module: nn.Module, kind: type, known: Methods) -> str | None:
    """Which of the `known` methods of `kind` is not what it was, on the class or on `module`; None if all are."""
    state = module.__dict__
    for name, function in known:
        if getattr(kind, name) is not function:
            return name
        # a hook that was removed leaves the class's own function behind, bound
        if name in state and getattr(state[name], "__func__", None) is not function:
            return name
    return None
