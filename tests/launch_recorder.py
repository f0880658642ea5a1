"""A stand-in for CUDA graphs that needs no GPU, as strict as they are: it replays operations, never the Python around.

Each operation below autograd is noted with its tensors' memory and its numbers as they were. A replay runs them again
over that very memory. So what Python would do differently by now is not done, a weight that was replaced is read where
it was, and a value that was not copied into the buffers is the old one. What CUDA refuses during a capture is refused:
reading a value, making a tensor of Python numbers. Memory is shared as a graph's pool is: a replay spoils the results
of all other recordings, and its own before it begins.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
FORBIDDEN = {aten._local_scalar_dense, aten.lift_fresh, aten.equal, aten.nonzero, aten.is_nonzero}


class LaunchRecorder:
    """`Capture` of ldmfast.models.graph.cuda_capture.   bytes  what each recording is said to take; None: as counted"""

    def __init__(self, bytes=None):
        self.bytes, self.alive, self.renewed, self.warmed = bytes, [], 0, 0

    def refusal(self, device):
        return None if device.type == "cpu" else f"it is on {device}"

    def busy(self, device):
        return False

    def memory(self, device):
        return 2**62

    def warm_up(self, function, device):
        self.warmed += 1
        function()

    def record(self, function, device):
        with _Launches() as launches:
            outputs = function()
        recording = _Recording(self, launches.noted, outputs)
        self.alive.append(recording)
        return recording

    def renew(self):
        assert not self.alive
        self.renewed += 1


class _Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        args, kwargs = tree_map(_where_it_is, (args, kwargs))
        result = func(*args, **kwargs)
        inputs = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        made = [x.detach() for x in _tensors(result)]
        in_place = func._schema.is_mutable
        fresh = [] if in_place else [x for x in made if x.untyped_storage().data_ptr() not in inputs or not x.numel()]
        if in_place or fresh:  # else it is a view
            assert in_place or len(fresh) == len(made), func
            self.noted.append((func, args, kwargs, fresh))
        return result


class _Recording:
    def __init__(self, pool, noted, outputs):
        self._pool, self._noted, self.outputs = pool, noted, outputs
        self.bytes = sum(x.nbytes for *_, made in noted for x in made) if pool.bytes is None else pool.bytes

    def replay(self):
        for recording in self._pool.alive:
            recording.spoil()
        for func, args, kwargs, made in self._noted:
            for x, y in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                x.copy_(y)

    def release(self):
        self.spoil()
        self._pool.alive.remove(self)
        self.outputs, self._noted = (), []

    def spoil(self):
        for *_, made in self._noted:
            for x in made:
                if x.is_floating_point():
                    x.fill_(torch.nan)


def _where_it_is(x):
    """The tensor's memory, whatever becomes of the tensor (`.data = ...`)."""
    return x.detach() if isinstance(x, torch.Tensor) else x


def _tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]
