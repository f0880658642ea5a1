"""How every kernel of this folder is launched: in one place, where what a call launches can be noted."""

import contextlib
import threading

_of_thread = threading.local()


def launch_kernel(kernel, grid, *args, **named):
    """kernel[grid](*args, **named), for a Triton kernel and a grid of one to three numbers."""
    watcher = getattr(_of_thread, "watcher", None)
    if watcher is None:
        kernel[grid](*args, **named)
    else:
        watcher(kernel, grid, args, named)


@contextlib.contextmanager
def watched(watcher):
    """Within it, this thread's launches are calls of watcher(kernel, grid, args, named) instead."""
    before = getattr(_of_thread, "watcher", None)
    _of_thread.watcher = watcher
    try:
        yield
    finally:
        _of_thread.watcher = before
