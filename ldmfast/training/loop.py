"""The training loop that every stage shares: several processes, mixed precision, resumable at any checkpoint.

A stage gives `fit` a loss: a function of a `Draw` (the step's random draws for this micro-batch) that returns a scalar,
or, where several networks learn from different losses, yields one scalar for each of the run's phases in order (None
where a phase sits a step out). What it may rely on:

    run = Run(model, config)                        # on the run's device; ranks hold the same weights
    def loss_of(draw):
        index = draw.integers(len(pictures))        # [draw.batch]
        x = pictures.batch(index).to(draw.device)
        return model(x, draw.normal(4, 8, 8)).mean()
    history = fit(run, loss_of, folder / "stage.pt")
    model = run.finish()                            # the averaged weights
"""

import contextlib
import dataclasses
import signal
import threading
import time
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ldmfast.training import checkpoint, parallel
from ldmfast.training.scalars import Scalars
from ldmfast.training.step import Draw

# free to differ between the run that wrote a checkpoint and the one that continues it; `batch` and `accumulate` too, as
# long as the global batch is the same
FREE_TO_CHANGE = {
    "accumulate",
    "batch",
    "device",
    "export",
    "gradient_checkpointing",
    "latents",
    "log_every",
    "sample_every",
    "save_every",
    "tensorboard",
}


@dataclasses.dataclass
class Phase:
    """One network's share of a step: its parameters follow one loss, with an optimiser of their own.

    parameters     what this loss changes; its gradients reach nothing else
    learning_rate, weight_decay   None: the run's
    """

    name: str
    parameters: list
    learning_rate: float | None = None
    weight_decay: float | None = None
    betas: tuple = (0.9, 0.99)

    def prepare(self, config):
        """Make the optimiser and its learning-rate schedule."""
        self.parameters = [p for p in self.parameters if p.requires_grad]
        rate = config.learning_rate if self.learning_rate is None else self.learning_rate
        decay = config.weight_decay if self.weight_decay is None else self.weight_decay
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, weight_decay=decay, betas=tuple(self.betas), fused=True
        )
        self.schedule = get_scheduler(
            config.schedule, self.optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps
        )


class Run:
    """Everything that changes while training: weights, their average, optimisers, schedules, step.

    phases    by default one, with all of the model's trainable parameters
    average   the parameters whose average is kept and saved; by default the first phase's
    """

    def __init__(self, model, config, *, phases=None, average=None, accelerator=None):
        self.accelerator = accelerator or parallel.start(config)
        self.device, self.config = self.accelerator.device, config
        self.model = model.to(self.device)
        parallel.same_everywhere(model)
        self.step, self.history, self.pending = 0, [], []
        self.phases = phases or [Phase("loss", list(model.parameters()))]
        for phase in self.phases:
            phase.prepare(config)
        self.average = list(average or self.phases[0].parameters)
        self.ema = EMAModel(
            self.average, decay=config.ema, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=True
        )

    @property
    def main(self):
        """Whether this process writes files and shows progress."""
        return self.accelerator.is_main_process

    @property
    def global_batch(self):
        """Samples in one step of all processes."""
        return self.config.batch * self.config.accumulate * self.accelerator.num_processes

    def _frozen(self):
        """Names of the parameters that no checkpoint needs: they came from elsewhere and do not change."""
        return {name for name, p in self.model.named_parameters() if not p.requires_grad}

    def draws(self):
        """The step's micro-batches on this process; together the processes cover the global batch once."""
        c, rank = self.config, self.accelerator.process_index
        for i in range(rank * c.accumulate, (rank + 1) * c.accumulate):
            yield Draw(c.seed, self.step, i * c.batch, c.batch, self.device)

    def state(self):
        """The checkpoint: plain values and tensors."""
        scaler, frozen = self.accelerator.scaler, self._frozen()
        return dict(
            step=self.step,
            config=_plain(self.config),
            global_batch=self.global_batch,
            model={name: value for name, value in self.model.state_dict().items() if name not in frozen},
            ema=self.ema.state_dict(),
            optimizer=[phase.optimizer.state_dict() for phase in self.phases],
            schedule=[phase.schedule.state_dict() for phase in self.phases],
            scaler=scaler.state_dict() if scaler else {},
            history=self.history,
            pending=self.pending,
        )

    def restore(self, state):
        """Continue from `state`. Raises ValueError if it belongs to another configuration, or an earlier ldmfast."""
        if "global_batch" not in state:
            raise ValueError("the checkpoint was written by an earlier version of ldmfast; see --restart")
        ours, theirs = _plain(self.config), state["config"]
        other = [f"{k} was {theirs[k]!r}, is {v!r}" for k, v in ours.items() if theirs.get(k, v) != v]
        free = FREE_TO_CHANGE | ({"steps"} if self.config.schedule.startswith("constant") else set())
        other = [text for text in other if text.split()[0] not in free]
        if state["global_batch"] != self.global_batch:
            other.append(f"batch * accumulate * processes was {state['global_batch']}, is {self.global_batch}")
        if other:
            raise ValueError(f"the checkpoint belongs to another configuration ({'; '.join(other)}); see --restart")
        missing, unexpected = self.model.load_state_dict(state["model"], strict=False)
        if unexpected or set(missing) - self._frozen():
            raise ValueError(f"the checkpoint is another model's: only one of them has {(unexpected or missing)[0]}")
        self.ema.load_state_dict(state["ema"])
        self.ema.to(self.device)
        for phase, optimizer, schedule in zip(self.phases, state["optimizer"], state["schedule"], strict=True):
            phase.optimizer.load_state_dict(optimizer)
            phase.schedule.load_state_dict(schedule)
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.pending = state["step"], state["history"], state["pending"]

    @contextlib.contextmanager
    def averaged(self):
        """The model carries the averaged weights, in evaluation mode."""
        training = self.model.training
        self.ema.store(self.average)
        self.ema.copy_to(self.average)
        try:
            yield self.model.eval()
        finally:
            self.ema.restore(self.average)
            self.model.train(training)

    def finish(self):
        """Put the averaged weights in place for good. Returns the model in evaluation mode."""
        self.ema.copy_to(self.average)
        return self.model.eval()


def _plain(config):
    """The configuration as values that a weights-only load accepts."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def optimize(run, loss_of):
    """One step: the losses of all micro-batches are differentiated, then averaged, clipped and applied.

    Returns the scalars of the step, tensors among them: "loss", "grad_norm" (one of each a phase) and what was logged.
    """
    scalars, fed = {}, set()
    for draw in run.draws():
        with run.accelerator.autocast():
            losses = loss_of(draw)
            losses = iter([losses]) if isinstance(losses, torch.Tensor) else losses
        for i, phase in enumerate(run.phases):
            with run.accelerator.autocast():
                loss = next(losses)
            if loss is not None:
                fed.add(i)
                run.accelerator.backward(loss, **({"inputs": phase.parameters} if len(run.phases) > 1 else {}))
                name = "loss" if i == 0 else f"loss/{phase.name}"
                scalars.setdefault(name, []).append(loss.detach().float())
        for name, value in draw.scalars.items():
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
                log.add(optimize(run, loss_of))
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
