"""`ldmfast` on the command line; `python -m ldmfast` is the same.

    ldmfast sample "a red apple on a yellow background" -o apple.png
    ldmfast data emoji pictures/
    ldmfast train autoencoder --data pictures/ --output run/
    ldmfast train decoder --data pictures/ --autoencoder run/ --output run/
    ldmfast train denoiser --data pictures/ --autoencoder run/ --output run/
    ldmfast sample "a cat on a blue background" --model run/pipeline -o cat.png
    ldmfast evaluate --model run/pipeline --data pictures/
    ldmfast evaluate-autoencoder run/ --data pictures/
    ldmfast recipes
    ldmfast convert model.ckpt model/
    ldmfast verify model/ --html verify.html
    ldmfast study run/study
    ldmfast doctor
    ldmfast tune
    ldmfast profile
    ldmfast report bench1.json bench2.json -o report.html

A mistake in what was asked is answered with one sentence and exit code 2.
"""

import argparse
import contextlib
import os
import sys


def main(argv=None):
    """Run one command.

    Returns the exit code: 0, 1 where `doctor`, `verify` or `data inspect` finds what is wrong, 2 for a mistake in what
    was asked, 130 after Ctrl-C.
    """
    # read when torch loads libgomp: by default its threads spin for milliseconds at every barrier. One picture took
    # 34 to 46 s that way and 3 s with this on two cores that six processes shared (25 steps, shipped model).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    arguments = parser().parse_args(argv)
    try:
        with _contract(arguments):
            return arguments.run(arguments) or 0  # doctor, verify and data inspect return a code
    except (ValueError, OSError, ImportError, FloatingPointError, NotImplementedError) as error:
        print(f"ldmfast: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ldmfast: stopped", file=sys.stderr)
        return 130


def _contract(arguments):
    if not getattr(arguments, "exact", False):
        return contextlib.nullcontext()
    from ldmfast.ops import numerics

    return numerics("exact")


def parser():
    from ldmfast.commands import (
        bench_report,
        convert,
        data,
        doctor,
        evaluate,
        evaluate_autoencoders,
        sample,
        study,
        train,
        verify,
    )
    from ldmfast.commands.measuring import profile, tune

    top = argparse.ArgumentParser("ldmfast", description="Latent diffusion with fused kernels.")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    measuring = (doctor, tune, profile, bench_report)
    for family in (sample, evaluate, evaluate_autoencoders, train, data, convert, study, verify, *measuring):
        family.add(commands)
    return top
