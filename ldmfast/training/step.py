"""Every random number of a training step, as a function of (seed, step, index of the sample in the global batch) alone.

So a run that was stopped repeats the uninterrupted one bit for bit, and how the global batch is split over processes
and micro-batches changes nothing but rounding.
"""

import torch

_MASK = 2**64 - 1


def mixed(*numbers):
    """One 64-bit seed from whole numbers that may be close together.   Source: Steele et al. 2014 (SplitMix64)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


class Step:
    """One micro-batch of a step: its random numbers, and what the loss logs. Row i of what is drawn continues the
    stream of sample `first + i` of the global batch.

    seed    of the run
    number  steps done so far
    first   global index of this micro-batch's first sample
    batch   B, samples in this micro-batch
    device  where the drawn noise is wanted; indices stay on the CPU, where the pictures are
    """

    def __init__(self, seed, number, first, batch, device="cpu"):
        self.number, self.batch, self.device, self.scalars = number, batch, torch.device(device), {}
        self._rows = [torch.Generator().manual_seed(mixed(seed, number, first + i)) for i in range(batch)]

    def integers(self, high):
        """int64 [B] on the CPU, each at least 0 and below `high`."""
        return torch.cat([torch.randint(high, (1,), generator=row) for row in self._rows])

    def uniform(self, *shape):
        """float32 [B, *shape] on the CPU, each at least 0 and below 1."""
        return torch.stack([torch.rand(shape, generator=row) for row in self._rows])

    def normal(self, *shape):
        """float32 [B, *shape] on `device`, mean 0 and deviation 1."""
        out = torch.empty(self.batch, *shape)
        for part, row in zip(out, self._rows, strict=True):
            part.normal_(generator=row)
        return out.to(self.device)

    def log(self, name, value):
        """Note a scalar of this step for TensorBoard; a tensor is not waited for."""
        self.scalars[name] = value.detach() if isinstance(value, torch.Tensor) else value
