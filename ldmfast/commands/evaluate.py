"""`ldmfast evaluate`: the scores of a model."""

import json
import os
import tempfile
from pathlib import Path

from ldmfast.commands.common import add_model_options, command, pipeline


def add(commands):
    made = command(commands, "evaluate", "score a model: PSNR, SSIM, retrieval", run)
    made.add_argument("--data", help="a labelled collection (default: the emoji, built from the installed font)")
    made.add_argument("--font", help="the Noto Color Emoji font, if it is not in its usual place")
    made.add_argument("--samples", type=int, default=128, help="samples for each split (default: 128)")
    made.add_argument("--output", help="also write the figures to this JSON file")
    add_model_options(made)


def run(arguments):
    from ldmfast.training import emoji
    from ldmfast.training.evaluate import evaluate

    pipe = pipeline(arguments)
    guidance = pipe.guidance if arguments.guidance is None else arguments.guidance
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.data
        if data is None:
            data = Path(scratch, "emoji")
            emoji.build(emoji.font_cutouts(arguments.font), data, size=pipe.vae.config.sample_size)
        report = evaluate(
            pipe, data, samples=arguments.samples, steps=arguments.steps, guidance=guidance,
            seed=arguments.seed, progress=not arguments.quiet,
        )  # fmt: skip
    text = json.dumps(report, indent=2)
    if arguments.output:
        partial = Path(arguments.output + ".partial")
        partial.write_text(text + "\n")
        os.replace(partial, arguments.output)
    print(text)
