"""A step under torch.profiler, brought to seconds by class and by kernel."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from ldmfast import files
from ldmfast.commands.measuring import classes

STEP = "step"


def recorded(step: Callable, device, steps: int, trace: Path | None) -> dict:
    """{"parts": seconds and launches of each class in one step, "longest": the kernels or ops that take longest}

    trace  where the profiler's trace goes
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.kind == "cuda" else [])]
    with profile(activities=activities) as found:
        for _ in range(steps):
            with record_function(STEP):
                step()
        device.wait()
    if trace is not None:
        with files.replacing(trace) as partial, contextlib.redirect_stderr(io.StringIO()):
            found.export_chrome_trace(str(partial))
    events = list(found.events())
    if device.kind == "cuda":
        launches, whole = list(on_the_gpu(events)), span(events)
    else:
        launches, whole = (
            list(on_the_processor(events)),
            sum(e.time_range.elapsed_us() for e in events if e.name == STEP),
        )
    return summed(launches, whole / 1e6, steps)


def summed(launches: list[tuple[str, str, float, int]], whole: float, steps: int) -> dict:
    """launches: (class, name, seconds, calls) of each; whole: seconds of all steps, of which gaps are what is left."""
    seconds, calls, names = Counter(), Counter(), {}
    for kind, name, took, count in launches:
        seconds[kind] += took
        calls[kind] += count
        one = names.setdefault((kind, name), [0.0, 0])
        one[0], one[1] = one[0] + took, one[1] + count
    seconds["gaps"] = max(0.0, whole - sum(seconds.values()))
    parts = [
        {"part": kind, "calls": round(calls[kind] / steps), "seconds": seconds[kind] / steps}
        for kind in classes.CLASSES
    ]
    longest = [
        {"name": name, "class": kind, "calls": round(count / steps, 2), "seconds": took / steps}
        for (kind, name), (took, count) in sorted(names.items(), key=lambda item: -item[1][0])
    ]
    return {"parts": parts, "longest": longest[:40]}


def callers(event) -> Iterator[str]:
    """The names of an event and of those around it, innermost first."""
    while event is not None:
        yield event.name
        event = event.cpu_parent


def is_kernel(event) -> bool:
    """Whether it ran on the GPU; ranges that were annotated there are no kernels."""
    return event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def on_the_gpu(events: list) -> Iterator[tuple[str, str, float, int]]:
    """(class, kernel, seconds, 1) of every launch: by its op where the trace links one, else by its name alone."""
    linked = Counter()
    for event in events:
        for kernel in event.kernels if event.device_type == DeviceType.CPU else ():
            linked[kernel.name, kernel.duration] += 1
            yield classes.of_launch(kernel.name, callers(event)), kernel.name, kernel.duration / 1e6, 1
    for event in filter(is_kernel, events):
        key = event.name, event.time_range.elapsed_us()
        if linked[key]:
            linked[key] -= 1
        else:
            yield classes.of_kernel(event.name), event.name, key[1] / 1e6, 1


def span(events: list) -> float:
    """Microseconds from the first kernel's start to the last one's end."""
    kernels = [event.time_range for event in events if is_kernel(event)]
    return max(k.end for k in kernels) - min(k.start for k in kernels) if kernels else 0.0


def on_the_processor(events: list) -> Iterator[tuple[str, str, float, int]]:
    """(class, outermost op, seconds, calls) of every event within an op, its own time; the rest of a step is gaps.

    Only the outermost op is a call: what it calls adds to its time alone.
    """
    for event in events:
        ops = [name for name in callers(event) if "::" in name]
        if ops and event.device_type == DeviceType.CPU:
            kind = classes.of_op(ops) or "elementwise"
            yield kind, ops[-1], event.self_cpu_time_total / 1e6, int(len(ops) == 1 and "::" in event.name)
