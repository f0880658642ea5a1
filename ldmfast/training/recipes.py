"""Recipes: one YAML file for a model, a section for each stage, checked against the stage's dataclass.

    about: one sentence
    autoencoder: {steps: 1300, channels: [32, 64, 96]}
    denoiser:
      steps: 3000
      prediction: v_prediction

The recipes that ship are in ldmfast/recipes; any other file is named by its path. What a section does not set keeps
the dataclass's default, and an option on the command line overrides both.
"""

import difflib
from pathlib import Path

import yaml

from ldmfast.training import options
from ldmfast.training.config import STAGES

FOLDER = Path(__file__).parents[1] / "recipes"
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", tuple: "a list of whole numbers"}


def names():
    """The recipes that ship, {name: path}."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def locate(name):
    """The file that a recipe's name or path stands for. Raises FileNotFoundError listing what there is."""
    known = names()
    if str(name) in known:
        return known[str(name)]
    path = Path(name)
    if path.is_file():
        return path
    if str(name).removesuffix(".yaml") in known:
        return known[str(name).removesuffix(".yaml")]
    raise FileNotFoundError(f"no recipe {str(name)!r}: neither a file nor one of {', '.join(known)}")


def read(name):
    """{stage: {field: value}} and "about". Raises ValueError naming the file, the section and the key that is wrong."""
    path = locate(name)
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path.name}: expected sections such as denoiser, got {type(recipe).__name__}")
    found = {"about": str(recipe.pop("about", ""))}
    for stage, section in recipe.items():
        if stage not in STAGES:
            raise ValueError(f"{path.name}: {_unknown(stage, ['about', *STAGES], 'section')}")
        found[stage] = check(section or {}, STAGES[stage], f"{path.name}, {stage}")
    return found


def settings(name, stage):
    """The fields that a recipe sets for `stage`, in the dataclass's types. Raises ValueError if it has no such part."""
    recipe = read(name)
    if stage not in recipe:
        raise ValueError(f"recipe {name} has no section {stage}; it has {', '.join(k for k in recipe if k != 'about')}")
    return recipe[stage]


def check(section, config, where):
    """`section` with its values in the types of the dataclass `config`."""
    if not isinstance(section, dict):
        raise ValueError(f"{where}: expected fields such as steps, got {section!r}")
    fields, known, found = config.__dataclass_fields__, options.names(config), {}
    for key, value in section.items():
        if key not in known:
            raise ValueError(f"{where}: {_unknown(key, fields, 'key')}")
        name = known[key]
        if name in found:
            earlier = fields[name].metadata["formerly"]
            raise ValueError(f"{where}: {earlier} is an earlier name of {name}; give one of them")
        found[name] = _typed(value, fields[name].default, f"{where}.{key}")
    return found


def _unknown(key, known, kind):
    near = difflib.get_close_matches(str(key), known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
    return f"unknown {kind} {key!r}; {hint}"


def _typed(value, default, where):
    """YAML 1.1 reads 1e-3 as text, and a list where the dataclass has a tuple."""
    kind = type(default)
    whole = lambda v: isinstance(v, int) and not isinstance(v, bool)  # noqa: E731
    if kind is tuple and isinstance(value, list) and all(map(whole, value)):
        return tuple(value)
    if kind is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except ValueError:
            pass
    if (kind is int and whole(value)) or (kind in (bool, str) and isinstance(value, kind)):
        return value
    raise ValueError(f"{where}={value!r} is not {KINDS[kind]}")
