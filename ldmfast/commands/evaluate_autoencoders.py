"""`ldmfast evaluate-autoencoder`: what autoencoders keep of pictures that they have not seen."""

import json

from ldmfast.commands.common import command


def add(commands):
    made = command(commands, "evaluate-autoencoder", "a table of PSNR, SSIM, perceptual distance, codebook use", run)
    made.add_argument("autoencoder", nargs="+", help="outputs of `ldmfast train autoencoder`")
    made.add_argument("--data", required=True, help="a collection of pictures")
    made.add_argument("--split", default="heldout", help="which of its splits (default: heldout)")
    made.add_argument("--count", type=int, default=512, help="pictures at most (default: 512)")
    made.add_argument("--size", type=int, help="pixels a side (default: each model's own)")
    made.add_argument("--distance", help="perceptual distance (default: efficientnet-lite0, which none trained with)")
    made.add_argument("--lpips", default="", help="weights of LPIPS-VGG, as for training")
    made.add_argument("--output", help="also write the figures to this JSON file")


def run(arguments):
    from ldmfast import files
    from ldmfast.evaluation import autoencoders
    from ldmfast.metrics import perceptual

    if arguments.count < 1:
        raise ValueError(f"--count {arguments.count} must be at least 1")
    if arguments.lpips and arguments.distance not in ("auto", "lpips-vgg"):
        raise ValueError(f"--lpips {arguments.lpips} is read only with --distance lpips-vgg")
    scorer = perceptual.make(arguments.distance, arguments.lpips) if arguments.distance else perceptual.make_scorer()
    report = autoencoders.evaluate(
        arguments.autoencoder,
        arguments.data,
        split=arguments.split,
        size=arguments.size,
        count=arguments.count,
        scorer=scorer,
    )
    if arguments.output:
        files.write_text(arguments.output, json.dumps(report, indent=1) + "\n")
    print(autoencoders.markdown(report))
