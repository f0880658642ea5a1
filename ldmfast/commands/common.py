"""What several commands share."""

import argparse
import atexit
import contextlib
import gc
import sys

from ldmfast import shipped
from ldmfast.commands import text_options
from ldmfast.commands.drawing.bounds import check_device
from ldmfast.commands.several_processes import loaded_everywhere
from ldmfast.files import first_line


def command(commands, name, text, run):
    """A parser for `name` among `commands`, which calls run(arguments)."""
    made = commands.add_parser(name, help=text, description=text)
    made.set_defaults(run=run)
    return made


def add_model_options(command):
    command.add_argument(
        "--model",
        help="a pipeline's folder, a released file, or a model that ships: "
        f"{', '.join(shipped.names())} (default: {shipped.TEXT})",
    )
    command.add_argument("--variant", help="of the weights in --model's folder, such as fp16")
    command.add_argument("--text-encoder", help="'minilm', a hub name or a folder; default: the one trained with")
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        type=_lora,
        metavar="FILE[:SCALE]",
        help="add this LoRA: kohya's, LyCORIS', diffusers', or what `ldmfast train lora` writes; may be given again",
    )
    text_options.add_model_options(command)
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the networks (default: float32)",
    )
    command.add_argument(
        "--exact",
        action="store_true",
        help="the same bits in any batch and at any number of threads, on a CPU; slower (LDMFAST_NUMERICS=exact)",
    )
    command.add_argument(
        "--graph", action="store_true", help="replay the denoiser's steps as CUDA graphs; needs an NVIDIA GPU"
    )
    command.add_argument("--steps", type=int, default=25, help="denoising steps (default: 25)")
    command.add_argument("--guidance", type=float, help="guidance scale; 1 turns it off (default: the model's)")
    command.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: 0)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def numbers(text):
    """ "64,128" -> (64, 128)."""
    try:
        return tuple(int(n) for n in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 64,128") from None


def width_height(text):
    """ "96x64" -> (96, 64), and "64" -> (64, 64)."""
    sides = text.lower().split("x")
    if not all(side.isascii() and side.isdigit() for side in sides) or len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size in pixels such as 96x64")
    return int(sides[0]), int(sides[-1])


def _lora(text):
    """ "FILE" or "FILE:0.8" -> (file, scale)."""
    file, colon, scale = text.rpartition(":")
    try:
        return (file, float(scale)) if colon else (text, 1.0)
    except ValueError:
        return text, 1.0


def say(line):
    """What a person should know, beside what a program reads from standard output. "" says nothing."""
    if line:
        print(f"ldmfast: {line}", file=sys.stderr)


def check_model(model):
    """Raises FileNotFoundError for a model that is not there."""
    if model is not None and not shipped.locate(model).exists():
        known = ", ".join(shipped.names())
        raise FileNotFoundError(f"{model} is neither a file nor a folder; the models that ship are {known}")


@contextlib.contextmanager
def imports():
    """Around what imports torch, diffusers and transformers: their objects stay, so none is looked for to be freed.

    Python's collector goes through all of them again and again while they are made: 2.6 to 3.1 s from the start of
    Python to the first step instead of 3.3 to 3.7 (the shipped model, two quiet cores of an AMD EPYC, torch 2.13).
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # else they are never freed, which Triton's bindings report as leaks, in 32 lines
        gc.enable()


@loaded_everywhere
def pipeline(arguments, default=shipped.ASSETS / shipped.TEXT):
    """The pipeline that --model (else `default`) and the other options of a model name."""
    check_device(arguments.device)
    check_model(arguments.model)
    with imports():
        import torch

        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
            raise ValueError(f"--device {device} cannot be used: {first_line(error)}") from error

        from ldmfast.pipeline import LatentDiffusionPipeline

        dtype, model = getattr(torch, arguments.dtype), default if arguments.model is None else arguments.model
        options = {"text_encoder": arguments.text_encoder, "dtype": dtype, "variant": arguments.variant}
        options["tokenizer"] = arguments.tokenizer
        pipe = LatentDiffusionPipeline.from_pretrained(model, **options)
    text_options.add_embeddings(arguments, pipe)
    if arguments.lora:
        from ldmfast.pipeline.load_lora import load_lora

        load_lora(pipe, *arguments.lora)
    if arguments.graph:
        pipe.unet.graph()
    return pipe.to(device)
