"""What `ldmfast sample` asks of Stable Diffusion's text towers: negative prompt, weights, clip skip, embeddings."""

import argparse
import sys
import warnings
from pathlib import Path

STAYS = (
    "IP-Adapter, ControlNet, offloading, second prompts of SDXL and what else is not here stays with diffusers: in "
    "Python, ldmfast.optimize(pipeline) puts ldmfast's networks under its pipelines."
)


def add_options(made):
    """The options of a call."""
    group = made.add_argument_group("prompts", STAYS)
    group.add_argument("--negative", metavar="PROMPT", help="guide away from this, in all pictures")
    group.add_argument(
        "--prompt-weights",
        action=argparse.BooleanOptionalAction,
        help="read (word), [word], (word:1.3) as weights, or nothing as one (default: where a prompt has a (word:1.3))",
    )
    group.add_argument(
        "--clip-skip", type=int, metavar="K", help="leave out the text tower's last K layers, in diffusers' counting"
    )
    group.add_argument(
        "--long-prompts", action="store_true", help="read prompts beyond 75 tokens, in chunks; BREAK begins another"
    )


def add_model_options(made):
    """The options of a model."""
    made.add_argument(
        "--tokenizer",
        metavar="WHERE",
        help="CLIP's, for a single file: a folder, a file of its vocabulary, 'open_clip' (installed), or a hub name",
    )
    made.add_argument(
        "--embedding",
        action="append",
        default=[],
        type=_embedding,
        metavar="FILE[=WORD]",
        help="add this word of textual inversion, as --lora adds a LoRA; the word is the file's own or its name",
    )


def _embedding(text):
    """ "FILE" or "FILE=WORD" -> (file, word or None)."""
    ends = [i for i, sign in enumerate(text) if sign == "=" and text[i + 1 :]]  # a path and a word may have one, too
    if Path(text).exists() or not ends:
        return text, None
    end = next((i for i in ends if Path(text[:i]).exists()), ends[-1])
    return text[:end], text[end + 1 :]


def check(arguments):
    """What can be seen before anything heavy is imported. Raises ValueError, FileNotFoundError."""
    for option, files in (("--embedding", arguments.embedding), ("--lora", arguments.lora)):
        for file, _ in files:
            if not Path(file).exists():
                raise FileNotFoundError(f"{option} {file}: no such file")
    if (skip := getattr(arguments, "clip_skip", None)) is not None and skip < 0:
        raise ValueError(f"--clip-skip {skip} must be 0 or more")
    if getattr(arguments, "negative", None) is not None and arguments.guidance == 1:
        raise ValueError("--negative does nothing with --guidance 1, which is no guidance")


def add_embeddings(arguments, pipe):
    """Put --embedding's words on the pipeline; says which of them no prompt has."""
    if not arguments.embedding:
        return
    from ldmfast.pipeline.load_embedding import load_embedding

    asked = [file if word is None else (file, word) for file, word in arguments.embedding]
    for file in asked:
        words = load_embedding(pipe, file)
        texts = [*arguments.prompt, arguments.negative or ""] if hasattr(arguments, "negative") else words
        for word in words:
            if not any(word in text for text in texts):
                name = file if isinstance(file, str) else file[0]
                print(f"ldmfast: no prompt has {word!r}, the word of {name}", file=sys.stderr)


def call_options(arguments):
    """The arguments of a call of the pipeline."""
    return {
        "negative": arguments.negative,
        "prompt_weights": arguments.prompt_weights,
        "clip_skip": arguments.clip_skip,
        "long_prompts": arguments.long_prompts,
    }


def truncated_captions(arguments, pipe, asked):
    """[(caption, tokens)] of the prompts, the negative one among them, that lose their end; the pipeline is quiet."""
    from ldmfast.conditioning.text_weights import PromptReading
    from ldmfast.pipeline.prompts import PromptCut

    warnings.simplefilter("ignore", PromptCut)
    negative = [] if arguments.negative is None else [arguments.negative]
    reading = PromptReading(arguments.clip_skip, arguments.prompt_weights, arguments.long_prompts)
    return pipe.conditioner.truncated_captions([*asked, *negative], reading)
