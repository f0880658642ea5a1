"""The training loop both stages share: one optimiser step after another, resumable at any checkpoint."""

import contextlib
import dataclasses
import math
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ldmfast.training import checkpoint

# free to differ between the run that wrote a checkpoint and the one that continues it
FREE_TO_CHANGE = {"save_every", "log_every", "export"}


class Run:
    """Everything that changes while training: weights, their average, optimiser, schedule, randomness, step."""

    def __init__(self, model, config):
        self.model, self.config, self.step, self.history = model, config, 0, []
        self.ema = EMAModel(model.parameters(), decay=config.ema, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.99)
        )
        self.schedule = get_scheduler(
            config.schedule, self.optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps
        )
        # every random draw of a step comes from here, so that a resumed run repeats the uninterrupted one bit for bit
        self.generator = torch.Generator().manual_seed(config.seed)

    def state(self):
        return dict(
            step=self.step,
            config=_plain(self.config),
            model=self.model.state_dict(),
            ema=self.ema.state_dict(),
            optimizer=self.optimizer.state_dict(),
            schedule=self.schedule.state_dict(),
            generator=self.generator.get_state(),
            history=self.history,
        )

    def restore(self, state):
        """Continue from `state`. Raises ValueError if it belongs to another configuration."""
        ours, theirs = _plain(self.config), state["config"]
        other = [f"{k} was {theirs.get(k)!r}, is {v!r}" for k, v in ours.items() if theirs.get(k) != v]
        other = [text for text in other if text.split()[0] not in FREE_TO_CHANGE]
        if other:
            raise ValueError(f"the checkpoint belongs to another configuration ({'; '.join(other)}); see --restart")
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.generator.set_state(state["generator"])
        self.step, self.history = state["step"], state["history"]

    def averaged(self):
        """Context: the model carries the averaged weights."""
        return _averaged(self)


@contextlib.contextmanager
def _averaged(run):
    run.ema.store(run.model.parameters())
    run.ema.copy_to(run.model.parameters())
    try:
        yield run.model
    finally:
        run.ema.restore(run.model.parameters())


def _plain(config):
    """The configuration as values that a weights-only load accepts."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(config).items()}


def optimize(run, loss_of):
    """One step: `loss_of(generator)` is differentiated, clipped and applied. Returns the loss as a float."""
    with torch.autocast("cpu", torch.bfloat16, enabled=run.config.precision == "bf16"):
        loss = loss_of(run.generator)
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at step {run.step + 1}; lower --learning-rate or try fp32")
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip)
    run.optimizer.step()
    run.schedule.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.step(run.model.parameters())
    run.step += 1
    return value


def fit(run, loss_of, path, *, restart=False, quiet=False):
    """Train until config.steps, saving the checkpoint `path` on the way and continuing from it if it is there.

    Ctrl-C saves before it stops. Returns the losses as [[step, mean since the last entry], ...].
    """
    path = Path(path)
    if path.exists() and not restart:
        run.restore(checkpoint.load(path))
    config, recent = run.config, []
    run.model.train()
    with tqdm(total=config.steps, initial=run.step, unit="step", disable=quiet) as bar:
        try:
            while run.step < config.steps:
                recent.append(optimize(run, loss_of))
                bar.update()
                if run.step % config.log_every == 0 or run.step == config.steps:
                    run.history.append([run.step, sum(recent) / len(recent)])
                    bar.set_postfix(loss=f"{run.history[-1][1]:.4f}", lr=f"{run.schedule.get_last_lr()[0]:.1e}")
                    recent = []
                if run.step % config.save_every == 0 or run.step == config.steps:
                    checkpoint.save(run.state(), path)
        except KeyboardInterrupt:
            checkpoint.save(run.state(), path)
            raise
    run.model.eval()
    return run.history
