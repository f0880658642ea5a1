"""`--class`, `--boxes` and `--map`: what a model other than a text model is conditioned on."""

import json
from pathlib import Path


def add_options(made):
    group = made.add_argument_group("conditions other than a prompt")
    group.add_argument("--class", dest="classes", nargs="+", metavar="NAME", help="classes, by name or number")
    group.add_argument(
        "--boxes",
        nargs="+",
        metavar="FILE.json",
        help='lists of {"object": name, "box": [x0, y0, x1, y1]} in parts of the picture',
    )
    group.add_argument(
        "--map", dest="maps", nargs="+", metavar="FILE.png", help="semantic maps in the model's palette colours"
    )


def given(arguments):
    """{"class" | "boxes" | "map": values} of the options that were given."""
    options = {"class": arguments.classes, "boxes": arguments.boxes, "map": arguments.maps}
    return {kind: values for kind, values in options.items() if values}


def inputs(arguments, conditioner):
    """The conditioner's inputs, one a picture, or None if none of the three options was given.

    Several classes, files or maps are several pictures; options given together are paired, one by one.
    Raises ValueError for an option that the model does not take, FileNotFoundError, or ValueError naming the file.
    """
    asked = given(arguments)
    if not asked:
        return None
    known = conditioner.by_option()
    for kind in asked:
        if kind not in known:
            taken = ", ".join(f"--{k}" for k in known) or "a prompt or nothing"
            raise ValueError(f"this model takes no --{kind}; it takes {taken}")
    lengths = {len(values) for values in asked.values()}
    if len(lengths) > 1:
        raise ValueError(f"{', '.join(f'--{kind} {len(v)}' for kind, v in asked.items())}: give as many of each")
    read = {
        "class": lambda text: _class(text, known["class"]),
        "boxes": lambda path: _boxes(path, known["boxes"]),
        "map": _map,
    }
    columns = {kind: [read[kind](value) for value in values] for kind, values in asked.items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return conditioner.as_inputs(rows)


def _class(text, encoder):
    names = encoder.classes.names or ()
    return int(text) if text.isdecimal() and text not in names else text


def _boxes(path, encoder):
    from ldmfast.conditioning.classes_and_boxes import check_objects

    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    found = found.get("objects", found) if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise ValueError(f'{path}: expected a list of {{"object": name, "box": [x0, y0, x1, y1]}}')
    try:
        check_objects(found, encoder.classes, encoder.objects)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return found


def _map(path):
    from ldmfast.pictures import read

    return read(path)
