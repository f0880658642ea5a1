"""The training loop by itself: Ctrl-C, checkpoints of others, precision, recomputed activations."""

from __future__ import annotations

import dataclasses
import os
import signal

import pytest
import torch
from diffusers.training_utils import EMAModel
from test_denoiser import CONFIG

from ldmfast.conditioning.base import Unconditional
from ldmfast.training import checkpoint, condition_sources, latents, train_denoiser
from ldmfast.training.loop import fit
from ldmfast.training.run import Run


def bare(config, path, spoil=None):
    """A run on random latents, without pictures."""
    mean = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    unet = train_denoiser.build(config, 4, 8, None)
    source = condition_sources.gather(Unconditional(), [[None]] * 8, config)
    step = train_denoiser.loss_of(unet, latents.Latents(mean, torch.zeros_like(mean)), source, config)
    run = Run(train_denoiser.learner(unet, Unconditional(), config), config)
    return run, fit(run, spoil(step) if spoil else step, path, quiet=True)


def test_ctrl_c_lets_the_step_finish(tmp_path):
    def spoil(step):
        def interrupted(s):
            if s.number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return step(s)

        return interrupted

    with pytest.raises(KeyboardInterrupt):
        bare(CONFIG, tmp_path / "run.pt", spoil)
    assert checkpoint.load(tmp_path / "run.pt")["step"] == 3
    _, resumed = bare(CONFIG, tmp_path / "run.pt")
    _, whole = bare(CONFIG, tmp_path / "whole.pt")
    assert resumed == whole  # the history, too: its entry's losses are kept with the checkpoint


def test_a_second_ctrl_c_saves_no_half_applied_step(tmp_path, monkeypatch):
    """The weights have moved, the step is not counted yet: what was saved before is what counts."""
    real = EMAModel.step

    def interrupted(ema, parameters):
        if ema.optimization_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        real(ema, parameters)

    monkeypatch.setattr(EMAModel, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bare(dataclasses.replace(CONFIG, save_every=1), tmp_path / "run.pt")
    monkeypatch.undo()
    _, resumed = bare(CONFIG, tmp_path / "run.pt")
    _, whole = bare(CONFIG, tmp_path / "whole.pt")
    assert resumed == whole


def test_an_earlier_versions_checkpoint_is_refused(tmp_path):
    checkpoint.save({"step": 3, "config": {}, "generator": torch.zeros(1)}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="earlier version.*--restart"):
        bare(CONFIG, tmp_path / "run.pt")


def test_gradient_checkpointing_changes_no_loss(tmp_path):
    config = dataclasses.replace(CONFIG, gradient_checkpointing=True)
    run, history = bare(config, tmp_path / "a.pt")
    _, plain = bare(CONFIG, tmp_path / "b.pt")
    assert run.model.is_gradient_checkpointing and run.model.explain() == []
    assert torch.allclose(torch.tensor(history), torch.tensor(plain), rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_forward_runs_in_the_precision_asked_for(precision, tmp_path):
    seen = set()

    def spoil(step):
        def watched(s):
            seen.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            return step(s)

        return watched

    run, _ = bare(dataclasses.replace(CONFIG, precision=precision), tmp_path / "run.pt", spoil)
    assert {enabled for enabled, _ in seen} == {precision == "bf16"} and all(d is torch.bfloat16 for _, d in seen)
    assert all(p.dtype is torch.float32 for p in run.model.parameters())


@pytest.mark.parametrize("multiplied", [False, True])
def test_a_run_is_in_bfloat16_where_the_processor_multiplies_it(multiplied, tmp_path, monkeypatch):
    monkeypatch.setattr("ldmfast.ops.native.pairs", lambda: int(multiplied))
    monkeypatch.setattr("ldmfast.ops.native.tiles", lambda dtype: 0)
    seen = []

    def watched(step):
        return lambda s: (seen.append(torch.is_autocast_enabled("cpu")), step(s))[1]

    automatic = dataclasses.replace(CONFIG, precision="auto", device="cpu", steps=1)
    bare(automatic, tmp_path / "run.pt", watched)
    assert seen == [multiplied]


def test_a_run_goes_on_in_another_precision(tmp_path):
    """The weights and the optimiser are float32 in each: another machine may have another best one."""
    half = dataclasses.replace(CONFIG, precision="bf16", schedule="constant_with_warmup")
    bare(dataclasses.replace(half, steps=2), tmp_path / "run.pt")
    run, history = bare(dataclasses.replace(half, steps=4, precision="fp32"), tmp_path / "run.pt")
    assert run.step == 4 and torch.tensor(history).isfinite().all()
