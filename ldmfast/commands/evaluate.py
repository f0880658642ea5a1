"""`ldmfast evaluate`: the scores of a model."""

import contextlib
import json
import tempfile
from pathlib import Path

from ldmfast.commands import text_options
from ldmfast.commands.common import add_model_options, command, pipeline
from ldmfast.commands.several_processes import on_all_processes


def add(commands):
    made = command(commands, "evaluate", "score a model: reconstruction, what its samples show, variety", run)
    made.add_argument("--data", help="a labelled collection (default: emoji, objects or scenes, built from the font)")
    made.add_argument("--cutouts", help="a folder of cut-outs to use in place of the font")
    made.add_argument("--font", help="the Noto Color Emoji font, if it is not in its usual place")
    made.add_argument("--samples", type=int, default=128, help="samples for each split (default: 128)")
    made.add_argument(
        "--objects", choices=("64", "320", "all"), default="320", help="the emoji to build (default: 320)"
    )
    made.add_argument("--distances", action="store_true", help="also KID, precision, recall")
    made.add_argument("--inception", metavar="FILE", help="also FID: Inception's weights as TorchScript")
    made.add_argument("--output", help="also write the figures to this JSON file")
    made.add_argument("--sheet", metavar="FILE", help="also write all samples, unpicked, as one picture, 8 or 16 a row")
    add_model_options(made)


@on_all_processes
def run(arguments):
    from ldmfast import files
    from ldmfast.evaluation.object_samples import evaluate as evaluate_objects
    from ldmfast.evaluation.samples import evaluate
    from ldmfast.evaluation.scene_samples import evaluate as evaluate_scenes
    from ldmfast.pictures import grid, writing

    text_options.check(arguments)
    pipe = pipeline(arguments)
    composed = bool(pipe.conditioner.by_option())
    _require_sense(arguments, pipe.conditioner, composed)
    drawn = [] if arguments.sheet else None
    settings = dict(
        samples=arguments.samples,
        steps=arguments.steps,
        seed=arguments.seed,
        progress=not arguments.quiet,
        guidance=pipe.guidance if arguments.guidance is None else arguments.guidance,
        drawn=drawn,
    )
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        write = stack.enter_context(writing(arguments.sheet)) if arguments.sheet else None
        data = arguments.data or Path(scratch, "pictures")
        kind = "scenes" if composed else _kind(arguments)
        cutouts = _cutouts(arguments) if kind != "captions" or not arguments.data else None
        if not arguments.data:
            _build(kind, cutouts, data, pipe.vae.config.sample_size)
        if kind == "scenes":
            report = evaluate_scenes(pipe, data, cutouts, **settings)
        elif kind == "objects":
            report = evaluate_objects(pipe, data, cutouts, **settings)
        else:
            report = evaluate(pipe, data, **settings, extractors=_extractors(arguments))
        if write:
            write(grid(drawn, 8 if len(drawn) <= 64 else 16))
    text = json.dumps(report, indent=2)
    if arguments.output:
        files.write_text(arguments.output, text + "\n")
    print(text)


def _kind(arguments):
    """ "objects" for a collection of one or two objects (data/objects.py), else "captions"."""
    from ldmfast.data.collection import read_rows

    if not arguments.data:
        return "objects" if arguments.objects == "320" else "captions"
    rows = read_rows(arguments.data)
    return "objects" if rows and all({"objects", "ground"} <= row.keys() for row in rows) else "captions"


def _cutouts(arguments):
    from ldmfast.data import emoji

    folder, font = arguments.cutouts, arguments.font
    return emoji.folder_cutouts(folder) if folder else emoji.font_cutouts(font, arguments.objects)


def _build(kind, cutouts, folder, size):
    from ldmfast.data import emoji, objects, scenes

    if kind == "captions":
        emoji.build(cutouts, folder, size=size)
    else:
        {"scenes": scenes, "objects": objects}[kind].build(cutouts, folder, size=size, count=1000)


def _require_sense(arguments, conditioner, composed):
    if composed and (arguments.distances or arguments.inception):
        option = "--distances" if arguments.distances else "--inception"
        raise ValueError(f"{option} is for models of captions; this one is scored by its classes, boxes and maps")
    if not conditioner.takes_inputs:
        raise ValueError(
            "evaluate draws from captions, classes, boxes or maps, and this model takes none of them; "
            "in Python, ldmfast.evaluation.samples.distances compares pictures that were drawn"
        )


def _extractors(arguments):
    from ldmfast.metrics import features, sets

    found = {features.NAME: features.features} if arguments.distances else {}
    if arguments.inception:
        if not Path(arguments.inception).is_file():  # before anything is drawn
            raise FileNotFoundError(f"--inception {arguments.inception}: no such file")
        found["inception"] = lambda pictures: sets.inception_features(pictures, arguments.inception)
    return found
