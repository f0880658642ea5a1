"""`ldmfast verify`: a model's own weights, ours beside stock diffusers and an exact run, as a table and as a page."""

from __future__ import annotations

from ldmfast import files
from ldmfast.commands.common import command, width_height


def add(commands):
    made = command(commands, "verify", "compare ours with stock diffusers on a model's own weights", run)
    made.description = (
        "Compare ours with stock diffusers and with an exact run on a model's own weights, by block and in a picture "
        "of a few steps. The exit code is 1 where they differ by more than rounding."
    )
    made.add_argument("model", help="a pipeline's folder, a released file, or a model that ships")
    made.add_argument(
        "--against", metavar="MODEL", help="whose weights stock's classes take (default: the same model's)"
    )
    made.add_argument("--html", metavar="FILE", help="also write a page with the pictures and a bar for each block")
    made.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="(default: float32)"
    )
    made.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    made.add_argument("--text-encoder", help="'minilm', a hub name or a folder; default: the one trained with")
    made.add_argument("--prompt", help="of the picture, where the model takes one and its text encoder is there")
    made.add_argument("--steps", type=int, default=4, help="denoising steps of the picture (default: 4)")
    made.add_argument("--seed", type=int, default=0, help="(default: 0)")
    made.add_argument(
        "--size", type=width_height, metavar="WxH", help="of the picture (default: as trained, 64 latents at most)"
    )


def run(arguments) -> int:
    import torch

    from ldmfast.commands.verify_page import page
    from ldmfast.evaluation.verify_models import PROMPT, verify

    found = verify(
        arguments.model,
        against=arguments.against,
        prompt=arguments.prompt or PROMPT,
        steps=arguments.steps,
        seed=arguments.seed,
        size=arguments.size,
        dtype=getattr(torch, arguments.dtype),
        text_encoder=arguments.text_encoder,
        device=arguments.device,
    )
    print(found)
    if arguments.html:
        files.write_text(arguments.html, page(found))
        print(arguments.html)
    return 0 if found.right else 1
