"""Weights that a checkpoint lacks: refused by name, or a new model's where that was asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ldmfast.models.weight_files import check_loaded, check_single_file

if TYPE_CHECKING:
    from typing_extensions import Self


class SingleFile:
    """Mixed into a model that diffusers reads from a released single file, before DropIn."""

    stock: type

    @classmethod
    def from_single_file(cls, source: str | Path | dict, *, allow_missing: bool = False, **kwargs: Any) -> Self:
        """As diffusers' from_single_file; weights that the file lacks are an error.

        allow_missing  take them at random, as a new model has them
        Raises ValueError with one sentence for a missing weight, a truncated file, a web page saved in place of one.
        """
        if not isinstance(source, dict):
            check_single_file(source)
        path = source if isinstance(source, dict) else str(source)
        filled = {**kwargs, "low_cpu_mem_usage": False}  # a whole new model, into which the file's weights go
        if allow_missing:
            return super().from_single_file(path, **filled)
        try:
            model = super().from_single_file(path, **kwargs)
            missing = without_data(model)
        except NotImplementedError:  # torch's, of a weight without data that was to be moved
            model, missing = None, _missing(cls, path, filled)
            if not missing:
                raise
        named = "the table of tensors" if isinstance(source, dict) else source
        check_loaded(cls.stock.__name__, named, {"missing_keys": missing})
        return model


def _missing(kind: type, path: str | dict, options: dict) -> list[str]:
    """The weights that a single file lacks, which diffusers learns on the way and does not say."""
    found: list[str] = []

    class Listing(kind):
        def load_state_dict(self, *arguments: Any, **named: Any) -> Any:
            keys = super().load_state_dict(*arguments, **named)
            found.extend(keys.missing_keys)
            return keys

    super(SingleFile, Listing).from_single_file(path, **options)
    return found


def without_data(model: nn.Module) -> list[str]:
    """The weights that no checkpoint gave: diffusers makes a model without memory, and fills in what it has."""
    return [name for name, value in model.state_dict().items() if value.is_meta]


def initialise_missing(model: nn.Module, resized: Iterable[str] = ()) -> None:
    """Give each weight without data what a new model of this configuration has in its place.

    resized  more of them: what the checkpoint has in another size diffusers leaves as the memory was, NaN included
    """
    if not (missing := [*without_data(model), *resized]):
        return
    dtype = next((value.dtype for value in model.parameters() if not value.is_meta), None)
    new = type(model).from_config(model.config).to(dtype).state_dict()
    model.load_state_dict({name: new[name] for name in missing}, strict=False, assign=True)
