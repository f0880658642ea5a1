"""`ldmfast sample`: pictures from prompts, and from pictures."""

import contextlib
import sys
from pathlib import Path

from ldmfast import shipped
from ldmfast.commands import conditions, text_options
from ldmfast.commands.common import add_model_options, command, pipeline, width_height
from ldmfast.commands.several_processes import on_all_processes


def add(commands):
    made = command(commands, "sample", "draw pictures from prompts", run)
    made.add_argument("prompt", nargs="*", help="what to draw; none for a model that takes no prompt")
    made.add_argument("-o", "--output", required=True, help="the picture to write: .png, .jpg or .webp")
    made.add_argument("-n", "--number", type=int, default=1, help="pictures of each prompt, laid out as a grid")
    made.add_argument("--batch", type=int, default=16, help="pictures drawn at once (default: 16)")
    made.add_argument("--columns", type=int, help="columns of the grid (default: the square-most)")
    made.add_argument("--scale", type=int, help="enlarge by this factor (default: to about 256 pixels)")
    made.add_argument("--size", type=width_height, metavar="WxH", help="pixels; default: the image's or the model's")
    _add_sampler_options(made)
    _add_image_options(made)
    conditions.add_options(made)
    text_options.add_options(made)
    add_model_options(made)


def _add_sampler_options(made):
    from ldmfast.diffusion.samplers import SAMPLERS

    group = made.add_argument_group("sampler")
    group.add_argument("--sampler", choices=SAMPLERS, metavar="NAME", help=", ".join(SAMPLERS))
    group.add_argument("--eta", type=float, default=0.0, help="how stochastic ddim is, 0 to 1 (default: 0)")
    group.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="PHI",
        help="0 to 1: keep the contrast of the unguided prediction (default: 0)",
    )
    group.add_argument(
        "--preview-every", type=int, metavar="K", help="write NAME.preview.png every K steps while it runs"
    )


def _add_image_options(made):
    group = made.add_argument_group("from a picture")
    group.add_argument("--image", metavar="FILE", help="begin at this picture; or the one that the model enlarges")
    group.add_argument("--mask", metavar="FILE", help="repaint where this picture is white; the rest stays")
    group.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="above 0 to 1: how much of --image is repainted (0.8; with --mask 1)",
    )


@on_all_processes
def run(arguments):
    from ldmfast.pictures import grey, grid, rgb, writing

    for name in ("number", "scale", "columns", "preview_every"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
    text_options.check(arguments)
    image, mask = _read(arguments.image, arguments.size, rgb), _read(arguments.mask, arguments.size, grey)
    with writing(arguments.output) as write, contextlib.ExitStack() as after:
        pipe = pipeline(arguments, shipped.ASSETS / (shipped.SCENES if conditions.given(arguments) else shipped.TEXT))
        asked = _inputs(arguments, pipe)
        for caption, tokens in text_options.truncated_captions(arguments, pipe, asked):
            print(f"ldmfast: only the first {tokens} tokens count of: {caption}", file=sys.stderr)
        columns = arguments.columns or (arguments.number if len(asked) > 1 else None)

        def sheet(pictures):
            return grid(pictures, columns, arguments.scale or max(1, 256 // max(pictures[0].size)))

        pictures = pipe(
            [each for each in asked for _ in range(arguments.number)],
            steps=arguments.steps,
            guidance=arguments.guidance,
            guidance_rescale=arguments.guidance_rescale,
            seeds=arguments.seed,
            batch=arguments.batch,
            sampler=arguments.sampler,
            eta=arguments.eta,
            size=arguments.size,
            image=image,
            mask=mask,
            strength=arguments.strength,
            progress=not arguments.quiet,
            on_preview=_previewer(arguments, sheet, after),
            preview_every=arguments.preview_every or 1,
            **text_options.call_options(arguments),
        )
        write(sheet(pictures))
    print(arguments.output)


def _inputs(arguments, pipe):
    """What the model is conditioned on, one entry a prompt, class, file of boxes or map."""
    given, prompts = conditions.inputs(arguments, pipe.conditioner), arguments.prompt
    if given is not None:
        return given if not prompts else _with_prompts(given, prompts)
    if not pipe.conditioner.takes_inputs:
        if prompts:
            raise ValueError(f"this model takes no prompt: leave out {prompts[0]!r}")
        return [None]
    if not prompts and (known := pipe.conditioner.by_option()):
        raise ValueError(f"nothing was asked for; this model takes --{' or --'.join(known)}")
    return prompts


def _with_prompts(given, prompts):
    """Prompts beside boxes or a map, one by one, for a model that takes both."""
    if not all(isinstance(one, dict) for one in given) or len(prompts) not in (1, len(given)):
        raise ValueError(f"{len(prompts)} prompts beside {len(given)} other inputs: this model cannot pair them")
    prompts = prompts * len(given) if len(prompts) == 1 else prompts
    return [{"text": prompt, **one} for prompt, one in zip(prompts, given, strict=True)]


def _read(path, size, convert=None):
    """The picture in a file, at the size asked for; None for none.   convert  rgb unless given, or grey"""
    from PIL import Image

    from ldmfast.pictures import read

    if path is None:
        return None
    picture = read(path, convert)
    return picture.resize(size, Image.LANCZOS) if size and picture.size != size else picture


def _previewer(arguments, sheet, after):
    """A function that writes the pictures as they are so far, to a file that is gone once the result is there."""
    if not arguments.preview_every:
        return None
    from ldmfast.pictures import writing

    output = Path(arguments.output)
    path = output.with_name(f"{output.stem}.preview{output.suffix}")
    after.callback(path.unlink, missing_ok=True)

    def show(step, steps, pictures):
        with writing(path) as write:
            write(sheet(pictures))

    return show
