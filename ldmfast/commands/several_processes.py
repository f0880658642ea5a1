"""`accelerate launch -m ldmfast sample | evaluate`: the pictures of a call, drawn by several processes.

The main process runs the command as it would alone: it alone reads inputs, writes, scores and speaks. The others load
the same model and draw what they are sent. A picture comes from its own seed, so it is the one that a single process
draws; each process draws a run of neighbours, as many as the others.

    accelerate launch --multi_gpu --num_processes 4 -m ldmfast sample "a cat" -n 64 -o cats.png
    torchrun --nproc-per-node 2 -m ldmfast evaluate --device cpu
"""

import argparse
import functools
import os
import warnings
from datetime import timedelta

from ldmfast.files import first_line

WAIT = timedelta(days=7)  # for the main process, which may score for hours between two calls
OF_EACH = ("image", "mask", "negative")  # beside inputs and seeds: one a picture where they are lists
ALONE = {"on_preview": None, "callback_on_step_end": None, "progress": False}  # what only the main process does
_open = []  # the processes of the command that runs


def on_all_processes(run):
    """A command's run(arguments), whose pictures all processes draw where several were started."""

    @functools.wraps(run)
    def started(arguments):
        if not _launched():
            return run(arguments)
        processes = _Processes(arguments)
        if not processes.main:
            return processes.serve()
        _open.append(processes)
        try:
            result = run(arguments)
        except Exception:
            processes.leave()
            raise
        finally:
            _open.remove(processes)
        processes.leave()
        return result

    return started


def loaded_everywhere(load):
    """load(arguments, default) -> a pipeline, which all processes then have."""

    @functools.wraps(load)
    def loaded(arguments, *default):
        return _open[-1].load(loaded, arguments, *default) if _open else load(arguments, *default)

    return loaded


def _launched():
    """Whether this is one of several. Raises ValueError for a launcher that was asked for several and started one."""
    sizes = [os.environ.get(name, "1") for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")]
    if any(size.isdecimal() and int(size) > 1 for size in sizes):
        return True
    if "ACCELERATE_MIXED_PRECISION" in os.environ:
        from ldmfast.training.parallel import refuse_a_lone_process

        refuse_a_lone_process()
    return False


class _Processes:
    """main   whether this is the one that runs the command.   count   how many there are"""

    def __init__(self, arguments):
        import torch
        import torch.distributed as dist
        from accelerate import PartialState

        asked = arguments.device or "auto"
        if asked not in ("auto", "cpu", "cuda"):
            raise ValueError(f"--device {asked}: each of several processes has a device of its own; give cpu or cuda")
        cpu = asked == "cpu" or not torch.cuda.is_available()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # one thread each, then
            state = PartialState(cpu=cpu)
        self.device = "cpu" if cpu else f"cuda:{state.local_process_index}"
        self.main, self.index, self.count = state.is_main_process, state.process_index, state.num_processes
        self.pipe = None
        self._group = dist.new_group(backend="gloo", timeout=WAIT)
        arguments.device = self.device if asked != "cuda" or not cpu else asked

    def load(self, loaded, arguments, *default):
        """The main process: a pipeline that all processes have.   loaded  as `loaded_everywhere` makes it"""
        sent = argparse.Namespace(**{name: value for name, value in vars(arguments).items() if name != "run"})
        self._send(("load", loaded, sent, default))
        self._each(lambda: self._load(loaded, arguments, default))
        return _SpreadPipeline(self.pipe, self)

    def draw(self, shares, own):
        """The main process: the pictures of all shares, [(inputs, options)], its own drawn with the options `own`."""
        self._send(("draw", shares))
        inputs, options = shares[0]
        return self._each(lambda: self._draw(inputs, options | own))

    def serve(self):
        """Another process: do what the main one sends, until it says to stop. Returns the exit code."""
        warnings.simplefilter("ignore")  # the main process says it
        while (message := self._send(None))[0] != "stop":
            self._gather(self._answer(*message))
        self._leave()
        return 0

    def leave(self):
        self._send(("stop",))
        self._leave()

    def _answer(self, kind, *content):
        try:
            if kind == "draw":
                return self._draw(*content[0][self.index]), None
            loaded, arguments, default = content
            arguments.device = self.device
            return self._load(loaded, arguments, default), None
        except Exception as error:
            return [], f"process {self.index}: {type(error).__name__}: {first_line(error)}"

    def _load(self, loaded, arguments, default):
        self.pipe = loaded.__wrapped__(arguments, *default)
        return []

    def _draw(self, inputs, options):
        return self.pipe(inputs, **options) if inputs else []

    def _each(self, work):
        """This process' results and the others', in their order. Raises what went wrong, here first."""
        try:
            own, wrong = work(), None
        except Exception as error:
            own, wrong = [], error
        answers = self._gather((own, None))
        if wrong:
            raise wrong
        if said := next((said for _, said in answers if said), None):
            raise ChildProcessError(said)
        return [each for found, _ in answers for each in found]

    def _send(self, message):
        """The main process' message, which the others get."""
        import torch.distributed as dist

        held = [message]
        dist.broadcast_object_list(held, src=0, group=self._group)
        return held[0]

    def _gather(self, answer):
        import torch.distributed as dist

        answers = [None] * self.count if self.main else None
        dist.gather_object(answer, answers, dst=0, group=self._group)
        return answers

    def _leave(self):
        from ldmfast.training.parallel import leave

        leave()


class _SpreadPipeline:
    """A pipeline whose pictures all processes draw; in all else it is the main process' own."""

    def __init__(self, pipe, processes):
        self._pipe, self._processes = pipe, processes

    def __getattr__(self, name):
        return getattr(self._pipe, name)

    def __call__(self, inputs=None, *, seeds=0, **options):
        from ldmfast.pipeline.call import listed, seed_list

        inputs = listed(inputs, self.conditioner.takes_inputs)
        seeds, count = seed_list(seeds, len(inputs)), self._processes.count
        shares = []
        for i in range(count):
            part = slice(len(inputs) * i // count, len(inputs) * (i + 1) // count)
            of_each = {name: options[name][part] for name in OF_EACH if isinstance(options.get(name), list | tuple)}
            shares.append((inputs[part], options | ALONE | of_each | {"seeds": seeds[part]}))
        own = {name: options[name] for name in ALONE if name in options}
        return self._processes.draw(shares, own)
