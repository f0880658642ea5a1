"""What every drop-in model shares: taking over a live stock model, its name in saved files, explain()."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention_processor import Attention
from safetensors import SafetensorError
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ldmfast.files import first_line
from ldmfast.models import guard, originals
from ldmfast.models.checks.head_counts import warn_of_heads, wide_heads
from ldmfast.models.index_names import pass_on_from_pipe, record_stock_names
from ldmfast.models.limits import FUNCTIONS
from ldmfast.models.missing_weights import initialise_missing
from ldmfast.models.weight_files import check_folder, check_loaded
from ldmfast.ops.contract.switch import exact

if TYPE_CHECKING:
    from typing_extensions import Self

record_stock_names()


_EXACT = "The numerical contract is exact: the same bits in any batch and at any number of threads, on a CPU."

# what diffusers and torch raise for a config.json that was damaged
_DAMAGED = (ArithmeticError, AttributeError, LookupError, RuntimeError, SafetensorError, TypeError, ValueError)


class DropIn:
    """Mixed into a subclass of a diffusers model, before it. `stock` is that diffusers class."""

    stock: type
    _entries: tuple  # (name, function) of the stock class's methods that ours stand in for
    _called: originals.Methods  # and as ours has them, those that the stock class's forward calls

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "stock" in vars(cls):
            own = {name: getattr(cls.stock, name, None) for name in vars(cls) if not name.startswith("__")}
            cls._entries = tuple((name, function) for name, function in own.items() if inspect.isfunction(function))
            called = originals.methods(cls.stock)
            cls._called = tuple((name, function and getattr(cls, name)) for name, function in called)
            pass_on_from_pipe(cls.stock, cls)

    @classmethod
    def adopt(cls, model: nn.Module) -> Self:
        """A live stock model under our forward: its very parameters, submodules and configuration, nothing copied.

        Raises TypeError for another class, ValueError for a model whose forward is already wrapped.
        """
        if type(model) is cls:
            return model
        if type(model) is not cls.stock:
            more = "; compile what adopt returns" if hasattr(model, "_orig_mod") else ""
            raise TypeError(f"{cls.__name__} takes over a {cls.stock.__name__}; got {type(model).__name__}{more}")
        if "forward" in model.__dict__:
            raise ValueError(f"this {cls.stock.__name__}'s forward is wrapped: take it over first, then offload it")
        new = cls.__new__(cls)
        new.__dict__.update(model.__dict__)
        warn_of_heads(new, "this model")
        return new

    @classmethod
    def from_pretrained(
        cls, source: str | Path, *, allow_missing: bool = False, output_loading_info: bool = False, **kwargs: Any
    ) -> Self | tuple[Self, dict[str, Any]]:
        """As diffusers' from_pretrained, from a folder or the hub; weights that the checkpoint lacks are an error.

        allow_missing  take them at random, as a new model has them; diffusers' `ignore_mismatched_sizes=True` does so
                       for those that the checkpoint has in another size (`in_channels=9`, to train inpainting)
        Raises ValueError with one sentence for a missing weight, a truncated file, a web page saved in place of one,
        another model's or another family's checkpoint.
        """
        folder = Path(source) / (kwargs.get("subfolder") or "")
        check_folder(folder, cls.stock.__name__, kwargs.get("variant"))
        try:
            model, info = super().from_pretrained(source, output_loading_info=True, **kwargs)
        except _DAMAGED as error:
            if not folder.is_dir():
                raise
            raise ValueError(f"{folder} could not be loaded: {first_line(error)}") from error
        resized = {entry[0] for entry in info.get("mismatched_keys", ()) if kwargs.get("ignore_mismatched_sizes")}
        if not allow_missing:
            check_loaded(cls.stock.__name__, source, info, allowed=resized)
        initialise_missing(model, resized)
        warn_of_heads(model, source)
        return (model, info) if output_loading_info else model

    def patched(self) -> str | None:
        """What of stock's code or torch's is not as it was, so that only stock's own way through obeys it, or None."""
        for name, function in self._entries:
            if getattr(self.stock, name) is not function:
                return f"{self.stock.__name__}.{name} was replaced"
        if _has_any_global_hook():
            return "a global module hook is set"
        if not torch.compiler.is_compiling():  # whose guards see to it
            for space, name, function in FUNCTIONS:
                if space.get(name) is not function:
                    return f"{space['__name__']}.{name} was replaced"
        return None

    def stock_reason(self, *arguments: Any, **named: Any) -> str | None:
        """Why a call with these arguments goes to the stock class's forward as a whole, as a clause, or None."""
        if self.training and self._drops() and any(isinstance(m, Attention) for m in self.modules()):
            return "it drops values, and which ones is decided by how stock's attention leaves a picture in memory"
        return self.patched()

    def _drops(self) -> bool:
        return any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in self.modules())

    def replaced_methods(self) -> list[str]:
        """The methods that stock's forward calls and that are not stock's, on this model or its class."""
        return [known[0] for known in self._called if originals.replaced(self, type(self), (known,))]

    def remarks(self) -> list[str]:
        """Sentences of `explain` that no module shows."""
        return []

    def explain(self, *arguments: Any, **named: Any) -> list[str]:
        """What does not go through ldmfast's ops, and why, a sentence each. Empty: everything that can does.

        While the numerical contract `exact` is on, one sentence more says so; `fast` says nothing.
        arguments, named  of the call in question, where they decide: UNet's cross_attention_kwargs
        """
        contract = [_EXACT] if exact() else []
        if reason := self.stock_reason(*arguments, **named):
            return [f"The whole network runs as {self.stock.__name__}.forward: {reason}.", *contract]
        methods = [f"{name} is called as it is, because it was replaced." for name in self.replaced_methods()]
        return [*methods, *guard.explain(self), *wide_heads(self), *self.remarks(), *contract]

    def to_json_string(self) -> str:
        """The configuration as diffusers writes it, under the name of diffusers' class, so that diffusers loads it."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = self.stock.__name__
        return json.dumps(config, indent=2, sort_keys=True) + "\n"
