"""`ldmfast study`: pixels against latents, as a table and one HTML file."""

import dataclasses
from pathlib import Path

from ldmfast.commands.common import command, numbers


def add(commands):
    made = command(commands, "study", "train the same denoiser on pixels and latents and compare", run)
    made.add_argument("output", help="the folder for the table, study.html and what was trained")
    made.add_argument("--data", help="a captioned collection (default: 64 emoji, built from the installed font)")
    made.add_argument("--font", help="the Noto Color Emoji font, if it is not in its usual place")
    made.add_argument("--autoencoders", help="a folder with f4/, f8/, f16/ already trained, each with its vae/")
    made.add_argument("--full", action="store_true", help="hours instead of minutes: longer training, more samples")
    made.add_argument("--seconds", type=float, help="training time of each denoiser")
    made.add_argument("--autoencoder-steps", type=int, help="training steps of each autoencoder")
    made.add_argument("--factors", type=numbers, help="which f, as in 1,4,8,16")
    made.add_argument("--quiet", action="store_true", help="no progress bars")


def run(arguments):
    from ldmfast.study import report, trials

    config = _config(arguments, trials)
    data = arguments.data or _emoji(Path(arguments.output, "pictures"), arguments.font, config.size)
    found = trials.run(data, arguments.output, config, autoencoders=arguments.autoencoders, quiet=arguments.quiet)
    for claim in found["claims"]:
        print(f"{'held' if claim['held'] else 'did not hold'}: {claim['claim']} ({claim['figures']})")
    print(report.write(found, arguments.output))


def _config(arguments, trials):
    given = {"seconds": arguments.seconds, "autoencoder_steps": arguments.autoencoder_steps}
    if arguments.factors:
        given["factors"] = arguments.factors
        unknown = sorted(set(given["factors"]) - {1, *trials.LATENT_CHANNELS})
        if unknown:
            raise ValueError(f"--factors: {unknown[0]} is none of 1, 4, 8, 16")
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name != "factors" and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0, and finite")
    return dataclasses.replace(trials.FULL if arguments.full else trials.QUICK, **given)


def _emoji(folder, font, size):
    from ldmfast.data import emoji

    if not folder.is_dir():
        emoji.build(emoji.font_cutouts(font), folder, size=size, count=4)
    return folder
