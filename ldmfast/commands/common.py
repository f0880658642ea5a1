"""What several commands share."""


def command(commands, name, text, run):
    """A parser for `name` among `commands`, which calls run(arguments)."""
    made = commands.add_parser(name, help=text, description=text)
    made.set_defaults(run=run)
    return made


def add_model_options(command):
    command.add_argument("--model", help="a saved pipeline's folder (default: the shipped model)")
    command.add_argument("--text-encoder", help="'minilm', a hub name or a folder; default: the one trained with")
    command.add_argument("--steps", type=int, default=25, help="denoising steps (default: 25)")
    command.add_argument("--guidance", type=float, default=3.0, help="guidance scale; 1 turns it off (default: 3)")
    command.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: 0)")
    command.add_argument("--quiet", action="store_true", help="no progress bar")


def pipeline(arguments):
    """The pipeline that --model and --text-encoder name."""
    from ldmfast.pipeline import TextToImagePipeline

    return TextToImagePipeline.from_pretrained(arguments.model, text_encoder=arguments.text_encoder)
