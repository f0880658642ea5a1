"""`ldmfast train`: the autoencoder, its decoder again, the denoiser; `ldmfast recipes`."""

import argparse
import dataclasses
import importlib
import json
import os
from pathlib import Path

from ldmfast.commands.common import command, numbers

MADE = {  # by a stage, in its folder
    "autoencoder": "vae",
    "decoder": "vae",
    "denoiser": "pipeline",
    "scenes": "pipeline",
    "lora": "pytorch_lora_weights.safetensors",
}


def add(commands):
    from ldmfast.training.config import STAGES

    stages = commands.add_parser("train", help="train the autoencoder, then the denoiser")
    stages = stages.add_subparsers(title="stages", required=True, metavar="STAGE")
    for name, config in STAGES.items():
        text = config.__doc__.split("\n")[0]
        made = stages.add_parser(name, help=text, description=text)
        made.set_defaults(run=_train, config=config, stage=name)
        made.add_argument("--data", required=True, help="the folder of pictures")
        if name == "lora":
            made.add_argument("--model", help="the saved pipeline to finetune (default: the shipped model)")
        elif name != "autoencoder":
            made.add_argument(
                "--autoencoder", required=True, help="--output of `ldmfast train autoencoder`, or a model that ships"
            )
        made.add_argument("--output", required=True, help="the folder for checkpoints and the finished model")
        made.add_argument("--recipe", help="a recipe's name (`ldmfast recipes`) or YAML file; options override it")
        made.add_argument("--restart", action="store_true", help="begin again even if there is a checkpoint")
        made.add_argument("--quiet", action="store_true", help="no progress bar")
        _add_config_options(made, config)
    made = command(commands, "recipes", "list the recipes that ship, or print one", _recipes)
    made.add_argument("name", nargs="?", help="the recipe to print")


def _add_config_options(made, config):
    group = made.add_argument_group("configuration")
    for f in dataclasses.fields(config):
        if isinstance(f.default, bool):
            group.add_argument(
                "--" + f.name.replace("_", "-"),
                dest="config_" + f.name,
                action=argparse.BooleanOptionalAction,
                help=f"{f.metadata['help']} (default: {'on' if f.default else 'off'})",
                default=argparse.SUPPRESS,
            )
            continue
        kind = numbers if isinstance(f.default, tuple) else type(f.default)
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        choices = f"; one of {', '.join(f.metadata['choices'])}" if f.metadata["choices"] else ""
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            dest="config_" + f.name,
            type=kind,
            choices=f.metadata["choices"],
            help=f"{f.metadata['help']}{choices} (default: {default})",
            metavar=f.name.upper(),
            default=argparse.SUPPRESS,
        )


def _config(arguments):
    """The dataclass: its defaults, then the recipe, then the options."""
    from ldmfast.training import recipes

    given = {k.removeprefix("config_"): v for k, v in vars(arguments).items() if k.startswith("config_")}
    recipe = recipes.settings(arguments.recipe, arguments.stage) if arguments.recipe else {}
    return arguments.config(**{**recipe, **given})


def _recipes(arguments):
    from ldmfast.training import recipes

    if arguments.name:
        print(recipes.locate(arguments.name).read_text(encoding="utf-8"), end="")
        return
    for name in recipes.names():
        found = recipes.read(name)
        print(f"{name:16} {found.pop('about')} ({', '.join(found)})")


def _check_folders(data, output):
    """That --data is there and --output can be. Raises OSError; what trains tries both, after its imports."""
    if not Path(data).is_dir():
        raise FileNotFoundError(f"{data} is not a folder of pictures")
    there = next(each for each in (Path(output).absolute(), *Path(output).absolute().parents) if each.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"--output {output} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"--output {output} cannot be written: no permission to write to {there}")


def _train(arguments):
    _check_folders(arguments.data, arguments.output)
    config = _config(arguments)

    from ldmfast.training import parallel

    stage = importlib.import_module(f"ldmfast.training.train_{arguments.stage}")
    source = [getattr(arguments, name) for name in ("autoencoder", "model") if hasattr(arguments, name)]
    result = stage.train(
        arguments.data, *source, arguments.output, config, restart=arguments.restart, quiet=arguments.quiet
    )
    if parallel.leave():
        print(f"{Path(arguments.output, MADE[arguments.stage])}: {_said(result)}")


def _said(result):
    """What a stage returns, in a line: an autoencoder's metrics, or the loss's history of (step, loss)."""
    if isinstance(result, dict):
        return f"reconstruction {json.dumps(result['trained'])}"
    return f"loss {result[-1][1]:.4f} at step {result[-1][0]}"
