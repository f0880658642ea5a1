"""An option of a training stage: a dataclass field whose metadata says what it may be.

The command line, the recipes, the check of a value and the check of a checkpoint all read the same metadata.
"""

import dataclasses
import math
from dataclasses import field, fields

BOUNDS = {
    "least": ("at least", lambda value, bound: value >= bound),
    "above": ("above", lambda value, bound: value > bound),
    "most": ("at most", lambda value, bound: value <= bound),
    "below": ("below", lambda value, bound: value < bound),
}


def option(default, text, choices=None, *, least=None, above=None, most=None, below=None, free=False, formerly=None):
    """A field of a stage's dataclass.

    text      one line, the help of the option
    choices   the values that it may have; None for any
    least, above, most, below   bounds of a number, or of each in a list
    free      whether it may differ between the run that wrote a checkpoint and the one that continues it; a function
              of the configuration where that depends on another option
    formerly  the name that it has in the recipes and checkpoints of earlier versions
    """
    bounds = dict(least=least, above=above, most=most, below=below)
    return field(
        default=default, metadata={"help": text, "choices": choices, **bounds, "free": free, "formerly": formerly}
    )


def again(config, name, default, text=None):
    """The option `name` of the dataclass `config` in one derived from it, with another default; all else stays."""
    metadata = config.__dataclass_fields__[name].metadata
    return field(default=default, metadata={**metadata, "help": text or metadata["help"]})


def check(config):
    """Raise ValueError naming the first field of `config` whose value is not among its choices or within its bounds."""
    for f in fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        if choices and value not in choices:
            raise ValueError(f"{f.name}={value!r} is none of {', '.join(map(str, choices))}")
        for number in value if isinstance(value, tuple) else (value,):
            _check_number(f, value, number)


def _check_number(f, value, number):
    for bound, (words, holds) in BOUNDS.items():
        limit = f.metadata[bound]
        if limit is not None and not holds(number, limit):
            raise ValueError(f"{f.name}={value} must be {words} {limit}")
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{f.name}={value} must be a finite number")


def names(config):
    """{what a saved file may call it: its name today} of every option of the dataclass `config`."""
    earlier = {f.metadata["formerly"]: f.name for f in fields(config) if f.metadata["formerly"]}
    return {**earlier, **{f.name: f.name for f in fields(config)}}


def plain(config):
    """The configuration as values that a weights-only load accepts."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def differences(config, saved):
    """Sentences on what keeps `config` from continuing a run whose `plain` configuration is `saved`."""
    known = names(config)
    saved = {known.get(name, name): value for name, value in saved.items()}
    ours = plain(config)
    other = [f for f in fields(config) if saved.get(f.name, ours[f.name]) != ours[f.name] and not _is_free(f, config)]
    return [f"{f.name} was {saved[f.name]!r}, is {ours[f.name]!r}" for f in other]


def _is_free(f, config):
    free = f.metadata["free"]
    return free(config) if callable(free) else free
