"""`ldmfast convert`: a released single file into a diffusers folder, and back."""

from ldmfast.commands.common import command


def add(commands):
    parser = command(commands, "convert", "a released checkpoint into a diffusers folder, and back", _convert)
    parser.add_argument("source", metavar="IN", help="a .safetensors or .ckpt in the released layout, or a folder")
    parser.add_argument("target", metavar="OUT", help="a folder, or a .safetensors or .ckpt")
    parser.add_argument("--ema", action="store_true", help="the averaged weights of the denoiser")
    parser.add_argument("--config", help="the original YAML, its file or text ('parameterization: v')")
    parser.add_argument("--variant", help="of a folder's weights, such as fp16")
    parser.add_argument("--allow-missing", action="store_true", help="go on without weights that IN should have")


def _convert(arguments):
    from ldmfast.released.conversion import convert

    lines = convert(
        arguments.source,
        arguments.target,
        ema=arguments.ema,
        config=arguments.config,
        allow_missing=arguments.allow_missing,
        variant=arguments.variant,
    )
    print(*lines, arguments.target, sep="\n")
