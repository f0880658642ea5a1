"""`ldmfast sample`: pictures from prompts."""

import sys

from ldmfast.commands.common import add_model_options, command, pipeline


def add(commands):
    made = command(commands, "sample", "draw pictures from prompts", run)
    made.add_argument("prompt", nargs="+", help="what to draw")
    made.add_argument("-o", "--output", required=True, help="the picture to write: .png, .jpg or .webp")
    made.add_argument("-n", "--number", type=int, default=1, help="pictures of each prompt, laid out as a grid")
    made.add_argument("--batch", type=int, default=16, help="pictures drawn at once (default: 16)")
    made.add_argument("--columns", type=int, help="columns of the grid (default: the square-most)")
    made.add_argument("--scale", type=int, default=4, help="enlarge by this factor (default: 4; 1 keeps the pixels)")
    add_model_options(made)


def run(arguments):
    from ldmfast import imagefile

    if arguments.number < 1:
        raise ValueError(f"--number {arguments.number} must be at least 1")
    if arguments.scale < 1:
        raise ValueError(f"--scale {arguments.scale} must be at least 1")
    if arguments.columns is not None and arguments.columns < 1:
        raise ValueError(f"--columns {arguments.columns} must be at least 1")
    with imagefile.writing(arguments.output) as write:
        prompts = [prompt for prompt in arguments.prompt for _ in range(arguments.number)]
        pipe = pipeline(arguments)
        for caption in pipe.encoder.cut(arguments.prompt):
            print(f"ldmfast: only the first {pipe.encoder.tokens} tokens count of: {caption}", file=sys.stderr)
        pictures = pipe(
            prompts, steps=arguments.steps, guidance=arguments.guidance, seeds=arguments.seed,
            batch=arguments.batch, progress=not arguments.quiet,
        )  # fmt: skip
        columns = arguments.columns or (arguments.number if len(arguments.prompt) > 1 else None)
        write(imagefile.grid(pictures, columns, arguments.scale))
    print(arguments.output)
