"""`ldmfast` on the command line; `python -m ldmfast` is the same.

    ldmfast sample "a red apple on a yellow background" -o apple.png
    ldmfast sample --list
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

A mistake in what was asked is answered with one sentence and exit code 2, and Ctrl-C with one line and 130.
"""

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
import warnings
from pathlib import Path

PACKAGE = str(Path(__file__).resolve().parents[1])
GROUPS = ([], ["data"], ["train"])  # what names no command yet is answered with what there is
STOPPED = 130  # 128 + SIGINT, as shells say it
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # of the errors that torch raises as RuntimeError


def main(argv=None):
    """Run one command.

    Returns the exit code: 0, 1 where `doctor`, `verify`, `data inspect` or `sample --list` finds what is wrong, 2 for a
    mistake in what was asked, 130 after Ctrl-C.
    """
    # read when torch loads libgomp: by default its threads spin for milliseconds at every barrier. One picture took
    # 34 to 46 s that way and 3 s with this on two cores that six processes shared (25 steps, shipped model).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    argv = list(sys.argv[1:] if argv is None else argv)
    with Interrupts() as interrupts:
        try:
            arguments = parser().parse_args([*argv, "--help"] if argv in GROUPS else argv)
            with _contract(arguments):
                return arguments.run(arguments) or 0  # doctor, verify, data inspect and sample --list return a code
        except BrokenPipeError:  # of a reader such as `head`, which has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except BaseException as error:
            if interrupts.stopping or isinstance(error, KeyboardInterrupt):  # an import makes other errors of it
                print("ldmfast: stopped", file=sys.stderr)
                return STOPPED
            if (said := _sentence(error)) is None:
                raise
            print(f"ldmfast: {said}", file=sys.stderr)
            return 2


def entry():
    """`main` for a process of its own. What ldmfast warns of is a line there, without the place in its code.

    After Ctrl-C it ends at once: what was being imported is half there, and complains while Python winds up (nanobind's
    list of leaks, 32 lines). Ctrl-C while Python winds up anyway ends it, too.
    """
    warnings.formatwarning = _warned
    code = main()
    signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    if code == STOPPED:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)
    sys.exit(code)


def _warned(message, category, filename, lineno, line=None, python=warnings.formatwarning):
    """Python's text of a warning, if it is not one of ours."""
    ours = not issubclass(category, DeprecationWarning) and str(Path(filename).resolve()).startswith(PACKAGE + os.sep)
    return f"ldmfast: {message}\n" if ours else python(message, category, filename, lineno, line)


def _sentence(error):
    """What is said of an error that answers what was asked; None for one that is a fault of the program."""
    if isinstance(error, ValueError | OSError | ImportError | FloatingPointError | NotImplementedError):
        return str(error)
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return "the memory is full; a smaller --size or --batch, or --dtype bfloat16, takes less"
    return None


class Interrupts:
    """While it lasts the first Ctrl-C raises KeyboardInterrupt, so that files are put in order, and a second ends it.

    Python's own handler does the first; but what is imported just then may make another error of it, or complain on
    standard error of what it cannot raise. `stopping` says that this is why.
    """

    def __init__(self):
        self.stopping = False

    def __enter__(self):
        self.own = threading.current_thread() is threading.main_thread()  # only there may a handler be set
        if self.own:
            self.before = signal.signal(signal.SIGINT, self._stop), sys.unraisablehook
            sys.unraisablehook = self._unraisable
        return self

    def __exit__(self, *_):
        if self.own:
            signal.signal(signal.SIGINT, self.before[0])
            sys.unraisablehook = self.before[1]

    def _stop(self, *_):
        if self.stopping:
            os._exit(STOPPED)
        self.stopping = True
        raise KeyboardInterrupt

    def _unraisable(self, found):
        if not self.stopping:
            self.before[1](found)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and what was meant, where a word or an option is nearly one that there is."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {self._nearly(message)}; `{self.prog} --help` lists what there is\n")

    def _nearly(self, message):
        import difflib

        if found := re.fullmatch(r"argument [\w ]+: invalid choice: '(.*)' \(choose from (.*)\)", message):
            word, known = found[1], [each.strip("' ") for each in found[2].split(",")]
            message = f"{word} is none of {', '.join(known)}"
        elif found := re.fullmatch(r"unrecognized arguments: (-\S+).*", message):
            word, known = found[1], self._options()
        else:
            return message
        meant = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
        return message + (f"; did you mean {meant[0]}?" if meant else "")

    def _options(self):
        """Every option of this parser and of those below it."""
        found = set()
        for action in self._actions:
            found.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                for below in action.choices.values():
                    found.update(below._options())
        return sorted(found)


class Version(argparse.Action):
    """Looked up when it is asked for."""

    def __call__(self, made, *_):
        from importlib import metadata

        from ldmfast import __version__

        beside = [f"{name} {metadata.version(name)}" for name in ("torch", "diffusers", "transformers")]
        print(f"ldmfast {__version__} ({', '.join(beside)}, Python {sys.version.split()[0]})")
        made.exit()


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

    top = Parser("ldmfast", description="Latent diffusion with fused kernels.")
    top.add_argument("--version", action=Version, nargs=0, help="show the versions of ldmfast and what it runs on")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    measuring = (doctor, tune, profile, bench_report)
    for family in (sample, evaluate, evaluate_autoencoders, train, data, convert, study, verify, *measuring):
        family.add(commands)
    return top
