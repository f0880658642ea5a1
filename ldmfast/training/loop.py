"""The training loop that every stage shares: several processes, mixed precision, resumable at any checkpoint.

A stage gives `fit` a loss: a function of a `Step` (one micro-batch's random numbers and log) that returns a scalar, or,
where several networks learn from different losses, yields one scalar for each of the run's phases in order (None where
a phase sits a step out). What it may rely on:

    run = Run(model, config)                        # on the run's device; ranks hold the same weights
    def loss(step):
        index = step.integers(len(pictures))        # [step.batch]
        x = pictures.batch(index).to(step.device)
        return model(x, step.normal(4, 8, 8)).mean()
    history = fit(run, loss, folder / "stage.pt")
    model = run.finish()                            # the averaged weights
"""

import contextlib
import signal
import threading
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ldmfast.training import checkpoint, parallel
from ldmfast.training.scalars import Scalars


def train_step(run, loss_of):
    """One step: the losses of all micro-batches are differentiated, then averaged, clipped and applied.

    Returns the scalars of the step, tensors among them: "loss", "grad_norm" (one of each a phase) and what was logged.
    """
    scalars, fed = {}, set()
    for step in run.micro_batches():
        with run.accelerator.autocast():
            losses = loss_of(step)
            losses = iter([losses]) if isinstance(losses, torch.Tensor) else losses
        for i, phase in enumerate(run.phases):
            with run.accelerator.autocast():
                loss = next(losses)
            if loss is not None:
                fed.add(i)
                run.accelerator.backward(loss, **({"inputs": phase.parameters} if len(run.phases) > 1 else {}))
                name = "loss" if i == 0 else f"loss/{phase.name}"
                scalars.setdefault(name, []).append(loss.detach().float())
        for name, value in step.scalars.items():
            scalars.setdefault(name, []).append(torch.as_tensor(value, dtype=torch.float32, device=run.device))
    scalars = {name: torch.stack(values).mean() for name, values in scalars.items()}
    _apply(run, [phase for i, phase in enumerate(run.phases) if i in fed], scalars)
    run.step += 1
    return scalars


def _apply(run, phases, scalars):
    scaler = run.accelerator.scaler
    for phase in phases:
        parallel.average_gradients(phase.parameters)
        if scaler:
            scaler.unscale_(phase.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(phase.parameters, run.config.clip)
        scalars["grad_norm" if phase is run.phases[0] else f"grad_norm/{phase.name}"] = norm
    scale = scaler.get_scale() if scaler else 1.0
    for phase in phases:
        scaler.step(phase.optimizer) if scaler else phase.optimizer.step()
    if scaler:
        scaler.update()
    overflowed = scaler is not None and scaler.get_scale() < scale  # float16: the step was left out
    for phase in phases:
        phase.optimizer.zero_grad(set_to_none=True)
        if not overflowed:
            phase.schedule.step()
    if not overflowed:
        run.ema.step(run.average)


def fit(run, loss_of, path, *, restart=False, quiet=False, sample=None):
    """Train until config.steps, saving the checkpoint `path` on the way and continuing from it if it is there.

    sample   called every config.sample_every steps on the main process with the averaged weights in place; returns a
             PIL picture, written to samples/ beside the checkpoint and to TensorBoard

    Ctrl-C lets the step finish and saves before it stops; of several processes none saves then, for they need not be
    at the same step. A second Ctrl-C stops at once, and what was saved last stays.

    Returns the losses as [[step, mean since the last entry], ...]. Raises FloatingPointError at the next entry of the
    log if a loss was not finite.
    """
    path, config = Path(path), run.config
    _continue(run, path, restart)
    run.model.train()
    bar = tqdm(total=config.steps, initial=run.step, unit="step", disable=quiet or not run.main)
    with bar, Scalars(run, path.parent) as log, _finishing_the_step() as stopped:
        try:
            while run.step < config.steps and not stopped:
                log.add(train_step(run, loss_of))
                bar.update()
                last = run.step == config.steps
                if run.step % config.log_every == 0 or last:
                    bar.set_postfix(log.entry())
                if run.step % config.save_every == 0 or last:
                    _save(run, log, path)
                if sample and config.sample_every and (run.step % config.sample_every == 0 or last):
                    log.picture(sample)
            if stopped:
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            if run.accelerator.num_processes == 1 and len(stopped) < 2:
                _save(run, log, path)
            raise
    run.model.eval()
    return run.history


def _continue(run, path, restart):
    if path.exists() and not restart:
        run.restore(checkpoint.load(path))
    parallel.agree(run.step, "the step of the checkpoint that they continue")


def _save(run, log, path):
    log.flush()
    if run.main:
        checkpoint.save(run.state(), path)


@contextlib.contextmanager
def _finishing_the_step():
    """The first Ctrl-C is only noted, the second one interrupts; this gives the list of their times."""
    stopped = []
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def note(*_):
        stopped.append(time.time())
        if len(stopped) > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
