"""`ldmfast train`: the autoencoder, its decoder again, the denoiser; `ldmfast recipes`."""

import argparse
import dataclasses
import json
from pathlib import Path

from ldmfast.commands.common import command, numbers


def add(commands):
    from ldmfast.training.config import AutoencoderConfig, DecoderConfig, DenoiserConfig, LoraConfig, ScenesConfig

    stages = commands.add_parser("train", help="train the autoencoder, then the denoiser")
    stages = stages.add_subparsers(title="stages", required=True, metavar="STAGE")
    for name, config, run in (
        ("autoencoder", AutoencoderConfig, _train_autoencoder),
        ("decoder", DecoderConfig, _train_decoder),
        ("denoiser", DenoiserConfig, _train_denoiser),
        ("scenes", ScenesConfig, _train_scenes),
        ("lora", LoraConfig, _train_lora),
    ):
        text = config.__doc__.split("\n")[0]
        made = stages.add_parser(name, help=text, description=text)
        made.set_defaults(run=run, config=config)
        made.add_argument("--data", required=True, help="the folder of pictures")
        if name == "lora":
            made.add_argument("--model", help="the saved pipeline to finetune (default: the shipped model)")
        elif name != "autoencoder":
            made.add_argument("--autoencoder", required=True,
                              help="--output of `ldmfast train autoencoder`, or a model that ships")  # fmt: skip
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
                "--" + f.name.replace("_", "-"), dest="config_" + f.name, action=argparse.BooleanOptionalAction,
                help=f"{f.metadata['help']} (default: {'on' if f.default else 'off'})", default=argparse.SUPPRESS,
            )  # fmt: skip
            continue
        kind = numbers if isinstance(f.default, tuple) else type(f.default)
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        choices = f"; one of {', '.join(f.metadata['choices'])}" if f.metadata["choices"] else ""
        group.add_argument(
            "--" + f.name.replace("_", "-"), dest="config_" + f.name, type=kind, choices=f.metadata["choices"],
            help=f"{f.metadata['help']}{choices} (default: {default})", metavar=f.name.upper(),
            default=argparse.SUPPRESS,
        )  # fmt: skip


def _config(arguments):
    """The dataclass: its defaults, then the recipe, then the options."""
    from ldmfast.training import recipes
    from ldmfast.training.config import STAGES

    stage = next(name for name, config in STAGES.items() if config is arguments.config)
    given = {k.removeprefix("config_"): v for k, v in vars(arguments).items() if k.startswith("config_")}
    return arguments.config(**{**(recipes.settings(arguments.recipe, stage) if arguments.recipe else {}), **given})


def _recipes(arguments):
    from ldmfast.training import recipes

    if arguments.name:
        print(recipes.locate(arguments.name).read_text(encoding="utf-8"), end="")
        return
    for name in recipes.names():
        found = recipes.read(name)
        print(f"{name:16} {found.pop('about')} ({', '.join(found)})")


def _train_autoencoder(arguments):
    from ldmfast.training import autoencoder, parallel

    metrics = autoencoder.train(
        arguments.data, arguments.output, _config(arguments), restart=arguments.restart, quiet=arguments.quiet
    )
    if parallel.leave():
        print(f"{Path(arguments.output, 'vae')}: reconstruction {json.dumps(metrics['trained'])}")


def _train_decoder(arguments):
    from ldmfast.training import decoder, parallel

    metrics = decoder.train(
        arguments.data, arguments.autoencoder, arguments.output, _config(arguments),
        restart=arguments.restart, quiet=arguments.quiet,
    )  # fmt: skip
    if parallel.leave():
        print(f"{Path(arguments.output, 'vae')}: reconstruction {json.dumps(metrics['trained'])}")


def _train_denoiser(arguments):
    from ldmfast.training import denoiser, parallel

    history = denoiser.train(
        arguments.data, arguments.autoencoder, arguments.output, _config(arguments),
        restart=arguments.restart, quiet=arguments.quiet,
    )  # fmt: skip
    if parallel.leave():
        print(f"{Path(arguments.output, 'pipeline')}: loss {history[-1][1]:.4f} at step {history[-1][0]}")


def _train_scenes(arguments):
    from ldmfast.training import parallel, scene_denoiser

    history = scene_denoiser.train(
        arguments.data, arguments.autoencoder, arguments.output, _config(arguments),
        restart=arguments.restart, quiet=arguments.quiet,
    )  # fmt: skip
    if parallel.leave():
        print(f"{Path(arguments.output, 'pipeline')}: loss {history[-1][1]:.4f} at step {history[-1][0]}")


def _train_lora(arguments):
    from ldmfast.training import lora, parallel

    history = lora.train(
        arguments.data, arguments.model, arguments.output, _config(arguments),
        restart=arguments.restart, quiet=arguments.quiet,
    )  # fmt: skip
    if parallel.leave():
        print(f"{Path(arguments.output, 'pytorch_lora_weights.safetensors')}: loss {history[-1][1]:.4f}")
