"""`--class`, `--boxes` and `--map`: what a model other than a text model is conditioned on."""

import difflib
import json
from pathlib import Path

from ldmfast.commands.common import say


def add_options(made):
    group = made.add_argument_group("conditions other than a prompt (--list --model NAME says which)")
    group.add_argument(
        "--class", dest="classes", nargs="+", action="extend", metavar="NAME", help="classes, by name or number"
    )
    group.add_argument(
        "--boxes",
        nargs="+",
        action="extend",
        metavar="FILE.json",
        help='lists of {"object": name, "box": [x0, y0, x1, y1]} in parts of the picture',
    )
    group.add_argument(
        "--map",
        dest="maps",
        nargs="+",
        action="extend",
        metavar="FILE.png",
        help="semantic maps in the model's palette colours",
    )


def given(arguments):
    """{"class" | "boxes" | "map": values} of the options that were given."""
    options = {"class": arguments.classes, "boxes": arguments.boxes, "map": arguments.maps}
    return {kind: values for kind, values in options.items() if values}


def check(arguments, named):
    """What can be seen before the model is loaded. Raises ValueError, or OSError for a file.

    named  {"class" | "boxes" | "map": its names} of a model's folder; empty where nothing is known
    """
    asked = given(arguments)
    _check_kinds(asked, named)
    for text in asked.get("class", ()):
        if named and not text.isdecimal() and text not in named["class"]:
            near = difflib.get_close_matches(text, list(named["class"]), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(named['class'])}"
            raise ValueError(f"--class: no class {text!r}; {hint}")
    for path in asked.get("boxes", ()):
        _listed(path)
    for path in asked.get("map", ()):
        _picture(path)


def _check_kinds(asked, known):
    for kind in asked if known else ():
        if kind not in known:
            raise ValueError(f"this model takes no --{kind}; it takes --{', --'.join(known)}")
    lengths = {len(values) for values in asked.values()}
    if len(lengths) > 1:
        raise ValueError(f"{', '.join(f'--{kind} {len(v)}' for kind, v in asked.items())}: give as many of each")


def inputs(arguments, conditioner, size):
    """The conditioner's inputs, one a picture, or None if none of the three options was given.

    Several classes, files or maps are several pictures; options given together are paired, one by one.
    size  (width, height) that is drawn, to which maps are scaled
    Raises ValueError for an option that the model does not take, FileNotFoundError, or ValueError naming the file.
    """
    asked = given(arguments)
    if not asked:
        return None
    known = conditioner.by_option()
    if not known:
        raise ValueError(f"this model takes no --{next(iter(asked))}; it takes a prompt or nothing")
    _check_kinds(asked, known)
    read = {
        "class": lambda text: _class(text, known["class"]),
        "boxes": lambda path: _boxes(path, known["boxes"]),
        "map": lambda path: _map(path, known["map"], size),
    }
    columns = {kind: [read[kind](value) for value in values] for kind, values in asked.items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return conditioner.as_inputs(rows)


def _class(text, encoder):
    names = encoder.classes.names or ()
    return int(text) if text.isdecimal() and text not in names else text


def _listed(path):
    """What a file of boxes holds, its objects not looked at yet."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    found = found.get("objects", found) if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise ValueError(f'{path}: expected a list of {{"object": name, "box": [x0, y0, x1, y1]}}')
    return found


def _boxes(path, encoder):
    from ldmfast.conditioning.classes_and_boxes import check_objects

    found = _listed(path)
    try:
        check_objects(found, encoder.classes, encoder.objects)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return found


def _picture(path):
    from ldmfast.pictures import read

    return read(path)


def _map(path, encoder, size):
    """The picture in a file at the size that is drawn, in the palette's colours."""
    from ldmfast.commands.drawing import fitting, palette

    picture, said = fitting.fit_map(_picture(path), size, path, "the size that is drawn")
    if encoder.palette is not None:
        names = encoder.classes.names or [f"class {i}" for i in range(encoder.classes.count)]
        said.append(palette.check_colours(picture, path, names, encoder.palette.tolist()))
    for line in said:
        say(line)
    return picture
