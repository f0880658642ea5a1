"""`ldmfast sample`: pictures from prompts, and from pictures."""

import argparse
import contextlib
import math
from pathlib import Path

from ldmfast import shipped
from ldmfast.commands import conditions, text_options
from ldmfast.commands.common import add_model_options, check_model, command, pipeline, say, width_height
from ldmfast.commands.several_processes import on_all_processes

EXAMPLE = "a red apple on a yellow background"
# Steps from which plms is as good as ddim: how far either ends from 80 steps of ddim (norm over norm, four prompts, the
# shipped model, guidance 3, float32) is 0.06 and 0.06 at 16, 0.18 and 0.06 at 14, 0.48 and 0.08 at 10, 1.3 and 0.1 at 8
FEW = 16


def add(commands):
    made = command(commands, "sample", "draw pictures from prompts", run)
    made.add_argument("prompt", nargs="*", help="what to draw; none for a model that takes no prompt")
    made.add_argument("-o", "--output", help="the picture to write: .png, .jpg or .webp")
    made.add_argument("-n", "--number", type=int, default=1, help="pictures of each prompt, laid out as a grid")
    made.add_argument("--batch", type=int, help="pictures drawn at once (default: 16, or what fits into memory)")
    made.add_argument("--columns", type=int, help="columns of the grid (default: the square-most)")
    made.add_argument("--scale", type=int, default=1, help="enlarge by this whole factor (default: 1)")
    made.add_argument("--size", type=width_height, metavar="WxH", help="pixels to draw (default: the model's)")
    made.add_argument(
        "--show",
        action=argparse.BooleanOptionalAction,
        help="show it on the terminal, too (default: where kitty, iTerm2 or sixels are known to be there)",
    )
    _add_helps(made)
    _add_sampler_options(made)
    _add_image_options(made)
    conditions.add_options(made)
    text_options.add_options(made)
    add_model_options(made)


def _add_helps(made):
    group = made.add_argument_group("instead of drawing")
    group.add_argument(
        "--list", nargs="?", const="", metavar="WORD", help="say what the model can draw, or what of it has this word"
    )
    group.add_argument(
        "--example", nargs=2, metavar=("NAME", "DIR"), help="write inputs to try: boxes, map, mask or picture"
    )


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
    group.add_argument("--film", metavar="FILE", help="also write the first picture's steps, as one strip")


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
    if arguments.list is not None or arguments.example:
        return _help(arguments)
    from ldmfast.pictures import grid, writing

    default = shipped.SCENES if conditions.given(arguments) else shipped.TEXT
    model = arguments.model or shipped.ASSETS / default
    _check(arguments, model)
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(writing(arguments.output))
        write_film = stack.enter_context(writing(arguments.film)) if arguments.film else None
        pipe = pipeline(arguments, model)
        drawn_at, image, mask = _pictures(arguments, pipe)
        asked = _inputs(arguments, pipe, drawn_at)
        batch = _room(arguments, _described(pipe), drawn_at, len(asked))
        _check_sampler(arguments, pipe)
        for caption, tokens in text_options.truncated_captions(arguments, pipe, asked):
            say(f"the text encoder reads {tokens} tokens, so the end does not count of: {_shortened(caption)}")
        columns = arguments.columns or (arguments.number if len(asked) > 1 else None)

        def sheet(pictures):
            return grid(pictures, columns, arguments.scale)

        watch, every, film = _watcher(arguments, sheet, stack)
        pictures = pipe(
            [each for each in asked for _ in range(arguments.number)],
            steps=arguments.steps,
            guidance=arguments.guidance,
            guidance_rescale=arguments.guidance_rescale,
            seeds=arguments.seed,
            batch=batch,
            sampler=arguments.sampler,
            eta=arguments.eta,
            size=arguments.size,
            image=image,
            mask=mask,
            strength=arguments.strength,
            progress=not arguments.quiet,
            on_preview=watch,
            preview_every=every,
            **text_options.call_options(arguments),
        )
        result = sheet(pictures)
        write(result)
        strip = film.strip(pictures[0], arguments.scale) if film else None
        if write_film:
            write_film(strip)
    for picture, path in ((result, arguments.output), (strip, arguments.film)):
        if path:
            _show(arguments, picture)
            print(path)


def _help(arguments):
    from ldmfast.commands.drawing import examples, wording

    check_model(arguments.model)
    if arguments.example:
        print(*examples.write(*arguments.example, arguments.model), sep="\n")
        return 0
    lines, found = wording.listing(arguments.model, arguments.list)
    print(*lines, sep="\n")
    return 0 if found else 1


def _check(arguments, model):
    """What can be seen before anything heavy is imported; joins a prompt that was typed without quotation marks."""
    from ldmfast.commands.drawing import bounds, wording
    from ldmfast.commands.drawing.described import described, named

    if not arguments.output:
        raise ValueError(
            f'-o FILE is missing: name the picture to write, as in: ldmfast sample "{EXAMPLE}" -o apple.png'
        )
    bounds.check_numbers(arguments)
    text_options.check(arguments)
    bounds.check_device(arguments.device)
    for output in filter(None, (arguments.output, arguments.film)):
        bounds.check_output(output)
    for file in filter(None, (arguments.image, arguments.mask)):
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file}: no such file")
    if arguments.strength is not None and not arguments.image:
        raise ValueError(f"--strength {arguments.strength} says how much of --image is repainted; give an --image")
    if any(not prompt.strip() for prompt in arguments.prompt):
        raise ValueError(f'the prompt is empty: say what to draw, as in "{EXAMPLE}"')
    check_model(arguments.model)
    conditions.check(arguments, named(model))
    known = wording.of_model(model)
    arguments.prompt, said = wording.joined(arguments.prompt, known)
    say(said)
    say(wording.strange_words(arguments.prompt, known))
    if found := described(model):
        asked = max([len(arguments.prompt), 1, *map(len, conditions.given(arguments).values())])
        _room(arguments, found, arguments.size or found.trained, asked)


def _described(pipe):
    from ldmfast.commands.drawing.described import Described

    return Described.of_configs(pipe.unet.config, pipe.vae.config)


def _room(arguments, model, size, asked):
    """Pictures to draw at once. Raises ValueError for sizes that the model or the memory does not take."""
    from ldmfast.commands.drawing import bounds

    bounds.check_size(size, model)
    count = asked * arguments.number
    columns = arguments.columns or (arguments.number if asked > 1 else None)
    bounds.check_sheet(size, count, columns, arguments.scale, arguments.output)
    wanted = arguments.batch and min(arguments.batch, count)
    return bounds.batch_that_fits(wanted, size, model, arguments.dtype, arguments.device)


def _pictures(arguments, pipe):
    """((width, height) that is drawn, image, mask): the pictures at that size, or None."""
    from ldmfast.commands.drawing import fitting

    model, size = _described(pipe), arguments.size
    if not pipe.conditioner.enlarges:
        size, why = size or model.trained, fitting.ASKED if size else fitting.MODEL
        (image, mask), said = fitting.fit_pictures(arguments.image, arguments.mask, size, why)
    elif size and arguments.image:
        small = tuple(side // model.factor for side in size)
        (image, mask), said = fitting.fit_pictures(arguments.image, arguments.mask, small, "what is enlarged to --size")
    else:
        (image, mask), said = fitting.unfitted(arguments.image, arguments.mask), []
        size = tuple(side * model.factor for side in image.size) if image else model.trained
    for line in said:
        say(line)
    return size, image, mask


def _inputs(arguments, pipe, size):
    """What the model is conditioned on, one entry a prompt, class, file of boxes or map."""
    given, prompts = conditions.inputs(arguments, pipe.conditioner, size), arguments.prompt
    if given is not None:
        return given if not prompts else _with_prompts(given, prompts, pipe.conditioner)
    if not pipe.conditioner.takes_inputs:
        if prompts:
            raise ValueError(f"this model takes no prompt: leave out {prompts[0]!r}")
        return [None]
    known = pipe.conditioner.by_option()
    if known and (not prompts or "text" not in getattr(pipe.conditioner, "members", {})):
        without = f": leave out {prompts[0]!r}" if prompts else ""
        what = "this model takes no prompt" if prompts else "nothing was asked for"
        raise ValueError(f"{what}{without}; it takes --{' or --'.join(known)}")
    if not prompts:
        raise ValueError(f'nothing was asked for: say what to draw, as in "{EXAMPLE}"')
    return prompts


def _with_prompts(given, prompts, conditioner):
    """Prompts beside boxes or a map, one by one, for a model that takes both."""
    if "text" not in getattr(conditioner, "members", {}):
        options = " or ".join(f"--{name}" for name in conditioner.by_option())
        raise ValueError(f"this model takes no prompt beside {options}: leave out {prompts[0]!r}")
    if len(prompts) not in (1, len(given)):
        raise ValueError(f"{len(prompts)} prompts beside {len(given)} other inputs: give one for all, or as many")
    prompts = prompts * len(given) if len(prompts) == 1 else prompts
    return [{"text": prompt, **one} for prompt, one in zip(prompts, given, strict=True)]


def _check_sampler(arguments, pipe):
    own = type(pipe.scheduler).__name__ == "PNDMScheduler" and arguments.sampler is None
    if (own or arguments.sampler == "plms") and arguments.steps < FEW:
        say(f"plms overshoots in {arguments.steps} steps, and is for {FEW} and more: --sampler dpm++ is for few")


def _shortened(caption):
    from ldmfast.commands.drawing.wording import shortened

    return shortened(caption)


def _watcher(arguments, sheet, stack):
    """(a function for the pictures as they are so far, or None; every so many steps; the film, or None).

    It writes previews to a file that is gone once the result is there, and collects the film.
    """
    from ldmfast.commands.drawing.film import Film
    from ldmfast.pictures import writing

    film, wanted = Film(arguments.steps) if arguments.film else None, arguments.preview_every
    if not film and not wanted:
        return None, 1, None
    output = Path(arguments.output)
    path = output.with_name(f"{output.stem}.preview{output.suffix}")
    if wanted:
        stack.callback(path.unlink, missing_ok=True)

    def show(step, steps, pictures):
        if wanted and step % wanted == 0:
            with writing(path) as write:
                write(sheet(pictures))
        if film:
            film.take(step, steps, pictures)

    return show, math.gcd(film.every if film else 0, wanted or 0), film


def _show(arguments, picture):
    """On the terminal, where it can show one."""
    from ldmfast.commands.drawing import terminal

    kind = None if arguments.show is False else terminal.protocol()
    if kind:
        terminal.show(picture, kind)
    elif arguments.show:
        say("this terminal does not say that it can show pictures (kitty's, iTerm2's or sixels)")
