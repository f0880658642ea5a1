"""`ldmfast` on the command line; `python -m ldmfast` is the same.

    ldmfast sample "a red apple on a yellow background" -o apple.png
    ldmfast data emoji pictures/
    ldmfast train autoencoder --data pictures/ --output run/
    ldmfast train decoder --data pictures/ --autoencoder run/ --output run/
    ldmfast train denoiser --data pictures/ --autoencoder run/ --output run/
    ldmfast sample "a cat on a blue background" --model run/pipeline -o cat.png
    ldmfast evaluate --model run/pipeline --data pictures/
    ldmfast recipes
    ldmfast doctor

A mistake in what was asked is answered with one sentence and exit code 2.
"""

import argparse
import ast
import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path


def main(argv=None):
    """Run one command. Returns the exit code: 0, 2 for a mistake in what was asked, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # read when torch loads libgomp: by default its threads spin for milliseconds at every barrier. One picture took
    # 34 to 46 s that way and 3 s with this on two cores that six processes shared (25 steps, shipped model).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if argv[:1] == ["doctor"]:
        from ldmfast.doctor import main as doctor

        return doctor(argv[1:])
    arguments = parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"ldmfast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ldmfast: stopped", file=sys.stderr)
        return 130
    return 0


def parser():
    top = argparse.ArgumentParser("ldmfast", description="Latent diffusion with fused kernels.")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_sample(commands)
    _add_evaluate(commands)
    _add_train(commands)
    command = _command(commands, "recipes", "list the recipes that ship, or print one", _recipes)
    command.add_argument("name", nargs="?", help="the recipe to print")
    _add_data(commands)
    commands.add_parser("doctor", help="what is installed, what runs here, and whether it computes right")
    return top


def _command(commands, name, text, run):
    command = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    return command


def _add_model_options(command):
    command.add_argument("--model", help="a saved pipeline's folder (default: the shipped model)")
    command.add_argument("--text-encoder", help="'minilm', a hub name or a folder; default: the one trained with")
    command.add_argument("--steps", type=int, default=25, help="denoising steps (default: 25)")
    command.add_argument("--guidance", type=float, default=3.0, help="guidance scale; 1 turns it off (default: 3)")
    command.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: 0)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_sample(commands):
    command = _command(commands, "sample", "draw pictures from prompts", _sample)
    command.add_argument("prompt", nargs="+", help="what to draw")
    command.add_argument("-o", "--output", required=True, help="the picture to write: .png, .jpg or .webp")
    command.add_argument("-n", "--number", type=int, default=1, help="pictures of each prompt, laid out as a grid")
    command.add_argument("--batch", type=int, default=16, help="pictures drawn at once (default: 16)")
    command.add_argument("--columns", type=int, help="columns of the grid (default: the square-most)")
    command.add_argument("--scale", type=int, default=4, help="enlarge by this factor (default: 4; 1 keeps the pixels)")
    _add_model_options(command)


def _add_evaluate(commands):
    command = _command(commands, "evaluate", "score a model: PSNR, SSIM, retrieval", _evaluate)
    command.add_argument("--data", help="a labelled collection (default: the emoji, built from the installed font)")
    command.add_argument("--font", help="the Noto Color Emoji font, if it is not in its usual place")
    command.add_argument("--samples", type=int, default=128, help="samples for each split (default: 128)")
    command.add_argument("--output", help="also write the figures to this JSON file")
    _add_model_options(command)


def _add_train(commands):
    from ldmfast.training.config import AutoencoderConfig, DecoderConfig, DenoiserConfig

    stages = commands.add_parser("train", help="train the autoencoder, then the denoiser")
    stages = stages.add_subparsers(title="stages", required=True, metavar="STAGE")
    for name, config, run in (
        ("autoencoder", AutoencoderConfig, _train_autoencoder),
        ("decoder", DecoderConfig, _train_decoder),
        ("denoiser", DenoiserConfig, _train_denoiser),
    ):
        text = config.__doc__.split("\n")[0]
        command = stages.add_parser(name, help=text, description=text)
        command.set_defaults(run=run, config=config)
        command.add_argument("--data", required=True, help="the folder of pictures")
        if name != "autoencoder":
            command.add_argument("--autoencoder", required=True, help="--output of `ldmfast train autoencoder`")
        command.add_argument("--output", required=True, help="the folder for checkpoints and the finished model")
        command.add_argument("--recipe", help="a recipe's name (`ldmfast recipes`) or YAML file; options override it")
        command.add_argument("--restart", action="store_true", help="begin again even if there is a checkpoint")
        command.add_argument("--quiet", action="store_true", help="no progress bar")
        _add_config_options(command, config)


def _add_config_options(command, config):
    group = command.add_argument_group("configuration")
    for f in dataclasses.fields(config):
        if isinstance(f.default, bool):
            group.add_argument(
                "--" + f.name.replace("_", "-"), dest="config_" + f.name, action=argparse.BooleanOptionalAction,
                help=f"{f.metadata['help']} (default: {'on' if f.default else 'off'})", default=argparse.SUPPRESS,
            )  # fmt: skip
            continue
        kind = _numbers if isinstance(f.default, tuple) else type(f.default)
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        group.add_argument(
            "--" + f.name.replace("_", "-"), dest="config_" + f.name, type=kind, choices=f.metadata["choices"],
            help=f"{f.metadata['help']} (default: {default})", metavar=f.name.upper(), default=argparse.SUPPRESS,
        )  # fmt: skip


def _numbers(text):
    """"64,128" -> (64, 128)."""
    try:
        value = ast.literal_eval(f"({text},)")
        return tuple(int(n) for n in value)
    except (ValueError, SyntaxError, TypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 64,128") from None


def _add_data(commands):
    kinds = commands.add_parser("data", help="build a picture collection to train on")
    kinds = kinds.add_subparsers(title="collections", required=True, metavar="COLLECTION")
    command = _command(kinds, "emoji", "Noto emoji on coloured grounds with captions", _data_emoji)
    command.add_argument("output", help="the folder to write")
    command.add_argument("--font", help="the Noto Color Emoji font, if it is not in its usual place")
    command.add_argument("--cutouts", help="a folder of cut-outs to use in place of the font")
    command.add_argument("--size", type=int, default=64, help="pixels a side (default: 64)")
    command.add_argument("--placements", type=int, default=8, help="pictures of each combination (default: 8)")


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


def _sample(arguments):
    from ldmfast import imagefile

    if arguments.number < 1:
        raise ValueError(f"--number {arguments.number} must be at least 1")
    if arguments.scale < 1:
        raise ValueError(f"--scale {arguments.scale} must be at least 1")
    if arguments.columns is not None and arguments.columns < 1:
        raise ValueError(f"--columns {arguments.columns} must be at least 1")
    with imagefile.writing(arguments.output) as write:
        prompts = [prompt for prompt in arguments.prompt for _ in range(arguments.number)]
        pipeline = _pipeline(arguments)
        for caption in pipeline.encoder.cut(arguments.prompt):
            print(f"ldmfast: only the first {pipeline.encoder.tokens} tokens count of: {caption}", file=sys.stderr)
        pictures = pipeline(
            prompts, steps=arguments.steps, guidance=arguments.guidance, seeds=arguments.seed,
            batch=arguments.batch, progress=not arguments.quiet,
        )  # fmt: skip
        columns = arguments.columns or (arguments.number if len(arguments.prompt) > 1 else None)
        write(imagefile.grid(pictures, columns, arguments.scale))
    print(arguments.output)


def _pipeline(arguments):
    from ldmfast.pipeline import TextToImagePipeline

    return TextToImagePipeline.from_pretrained(arguments.model, text_encoder=arguments.text_encoder)


def _evaluate(arguments):
    from ldmfast.training import emoji
    from ldmfast.training.evaluate import evaluate

    pipeline = _pipeline(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data
        if data is None:
            data = Path(scratch, "emoji")
            emoji.build(emoji.font_cutouts(arguments.font), data, size=pipeline.vae.config.sample_size)
        report = evaluate(
            pipeline, data, samples=arguments.samples, steps=arguments.steps, guidance=arguments.guidance,
            seed=arguments.seed, progress=not arguments.quiet,
        )  # fmt: skip
    text = json.dumps(report, indent=2)
    if arguments.output:
        partial = Path(arguments.output + ".partial")
        partial.write_text(text + "\n")
        os.replace(partial, arguments.output)
    print(text)


def _train_autoencoder(arguments):
    from ldmfast.training import autoencoder

    metrics = autoencoder.train(
        arguments.data, arguments.output, _config(arguments), restart=arguments.restart, quiet=arguments.quiet
    )
    print(f"{Path(arguments.output, 'vae')}: reconstruction {json.dumps(metrics['trained'])}")


def _train_decoder(arguments):
    from ldmfast.training import decoder

    metrics = decoder.train(
        arguments.data, arguments.autoencoder, arguments.output, _config(arguments),
        restart=arguments.restart, quiet=arguments.quiet,
    )  # fmt: skip
    print(f"{Path(arguments.output, 'vae')}: reconstruction {json.dumps(metrics['trained'])}")


def _train_denoiser(arguments):
    from ldmfast.training import denoiser

    history = denoiser.train(
        arguments.data, arguments.autoencoder, arguments.output, _config(arguments),
        restart=arguments.restart, quiet=arguments.quiet,
    )  # fmt: skip
    print(f"{Path(arguments.output, 'pipeline')}: loss {history[-1][1]:.4f} at step {history[-1][0]}")


def _data_emoji(arguments):
    from ldmfast.training import emoji

    cutouts = emoji.folder_cutouts(arguments.cutouts) if arguments.cutouts else emoji.font_cutouts(arguments.font)
    count = emoji.build(cutouts, arguments.output, size=arguments.size, count=arguments.placements)
    print(f"{arguments.output}: {count} pictures")
