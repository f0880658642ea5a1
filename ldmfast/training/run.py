"""Everything that changes while a stage is trained, and the checkpoint that holds it."""

import contextlib
import dataclasses

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from ldmfast.training import options, parallel
from ldmfast.training.step import Step


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

    def micro_batches(self):
        """The Steps of the next step on this process; together the processes cover the global batch once."""
        c, rank = self.config, self.accelerator.process_index
        for i in range(rank * c.accumulate, (rank + 1) * c.accumulate):
            yield Step(c.seed, self.step, i * c.batch, c.batch, self.device)

    def state(self):
        """The checkpoint: plain values and tensors."""
        scaler, frozen = self.accelerator.scaler, self._frozen()
        return dict(
            step=self.step,
            config=options.plain(self.config),
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
        other = options.differences(self.config, state["config"])
        if state["global_batch"] != self.global_batch:
            other.append(f"batch * accumulate * processes was {state['global_batch']}, is {self.global_batch}")
        if other:
            raise ValueError(f"the checkpoint belongs to another configuration ({'; '.join(other)}); see --restart")
        missing, unexpected = self.model.load_state_dict(state["model"], strict=False)
        if unexpected or set(missing) - self._frozen():
            raise ValueError(f"the checkpoint is another model's: only one of them has {(unexpected or missing)[0]}")
        self._restore_average(state["ema"])
        for phase, optimizer, schedule in zip(self.phases, state["optimizer"], state["schedule"], strict=True):
            phase.optimizer.load_state_dict(optimizer)
            phase.schedule.load_state_dict(schedule)
        if self.accelerator.scaler and state["scaler"]:  # another precision has none
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.history, self.pending = state["step"], state["history"], state["pending"]

    @torch.no_grad()
    def _restore_average(self, state):
        """The average's tensors stay the same ones, with other values: a loss may hold them."""
        ours = self.ema.shadow_params
        self.ema.load_state_dict(state)
        for mine, theirs in zip(ours, self.ema.shadow_params, strict=True):
            mine.copy_(theirs)
        self.ema.shadow_params = ours

    def average_of(self, parameter):
        """The tensor that holds the average of `parameter`, one of `average`; the same one until the run ends."""
        place = next(i for i, each in enumerate(self.average) if each is parameter)
        return self.ema.shadow_params[place]

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
