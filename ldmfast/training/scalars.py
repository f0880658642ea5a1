"""What a run reports: the loss history, TensorBoard scalars, sample grids."""

import math
import time
from pathlib import Path

import numpy as np
import torch

from ldmfast import files
from ldmfast.training import parallel


class Scalars:
    """Gathers each step's scalars without waiting for them; means over steps and processes at every entry.

    Raises ImportError naming the package if config.tensorboard is set and TensorBoard is not installed.
    """

    def __init__(self, run, folder):
        self.run, self.folder, self.window, self.unread = run, Path(folder), [], []
        self.since, self.writer = time.perf_counter(), None
        if run.config.tensorboard and run.main:
            self.writer = _writer(self.folder / "tensorboard", run.step)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.writer:
            self.writer.close()

    def add(self, scalars):
        self.window.append(scalars)
        self.unread.append(scalars["loss"])

    def flush(self):
        """Read the losses since the last call into run.pending. Raises FloatingPointError if one is not finite."""
        if not self.unread:
            return
        values = parallel.mean(torch.stack(self.unread)).tolist()
        first = self.run.step - len(values) + 1
        self.unread = []
        bad = next(((first + i, v) for i, v in enumerate(values) if not math.isfinite(v)), None)
        if bad:
            raise FloatingPointError(f"the loss is {bad[1]} at step {bad[0]}; lower --learning-rate or try fp32")
        self.run.pending += values

    def entry(self):
        """Close an entry of the history. Returns what the progress bar shows."""
        self.flush()
        run, now = self.run, time.perf_counter()
        loss = sum(run.pending) / len(run.pending)
        run.history.append([run.step, loss])
        run.pending = []
        names = sorted({name for scalars in self.window for name in scalars})
        rows = [torch.stack([s[name].float() for s in self.window if name in s]).mean() for name in names]
        values = parallel.mean(torch.stack(rows)).tolist()
        rate = run.phases[0].schedule.get_last_lr()[0]
        speed = len(self.window) * run.global_batch / (now - self.since)
        if self.writer:
            shown = {**dict(zip(names, values, strict=True)), "loss": loss, "lr": rate, "samples_per_second": speed}
            for name, value in shown.items():
                self.writer.add_scalar(name, value, run.step)
        self.window, self.since = [], time.perf_counter()
        return dict(loss=f"{loss:.4f}", lr=f"{rate:.1e}")

    def picture(self, sample):
        """Draw `sample()` with the averaged weights and keep it beside the checkpoint and in TensorBoard."""
        if not self.run.main:
            return
        began = time.perf_counter()
        with self.run.averaged(), torch.no_grad():
            picture = sample()
        target = self.folder / "samples" / f"step-{self.run.step:06d}.png"
        target.parent.mkdir(exist_ok=True)
        with files.replacing(target) as partial:
            picture.save(partial)
        if self.writer:
            self.writer.add_image("samples", np.asarray(picture), self.run.step, dataformats="HWC")
        self.since += time.perf_counter() - began  # the speed is that of training


def _writer(folder, step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"--tensorboard needs the package tensorboard ({error}): pip install tensorboard") from error
    return SummaryWriter(folder, purge_step=step + 1)  # a resumed run overwrites what came after its checkpoint
