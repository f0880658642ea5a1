"""Several processes train as one does: the same loss curve, and a rank that is killed costs only the last steps.

Two real processes over gloo, forked from a server that has imported torch once.
"""

from __future__ import annotations

import dataclasses
import io
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch

from ldmfast.conditioning.base import Unconditional
from ldmfast.training import checkpoint, condition_sources, parallel, train_denoiser
from ldmfast.training.config import DenoiserConfig
from ldmfast.training.latents import Latents
from ldmfast.training.loop import fit
from ldmfast.training.losses import codebook
from ldmfast.training.run import Phase, Run
from ldmfast.training.step import Step

CONFIG = DenoiserConfig(
    steps=8,
    batch=4,
    channels=(16, 32),
    attention=(0, 1),
    groups=8,
    head_width=16,
    warmup=1,
    save_every=2,
    log_every=1,
    precision="fp32",
    prediction="v_prediction",
    device="cpu",
)
HALF = dataclasses.replace(CONFIG, batch=2)


def train(folder, config, spoil=lambda loss_of: loss_of):
    """A tiny unconditional denoiser on random latents; a checkpoint every 2 steps in folder/run.pt."""
    mean = torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    codes = Latents(mean, torch.full_like(mean, 0.1))
    unet = train_denoiser.build(config, 4, 8, None)
    loss_of = train_denoiser.loss_of(
        unet, codes, condition_sources.gather(Unconditional(), [[None]] * 16, config), config
    )
    return fit(Run(unet, config), spoil(loss_of), Path(folder, "run.pt"), quiet=True)


def killed_in_step_6(loss_of):
    """SIGKILL for rank 1, three steps after the checkpoint of step 4 was begun: no handler runs."""

    def interrupted(step):
        if step.number == 5 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_of(step)

    return interrupted


def killed_in_the_second_save(loss_of):
    """SIGKILL for rank 0 with half of the checkpoint of step 4 written."""
    write, saves = torch.save, []

    def half(state, file):
        saves.append(1)
        if len(saves) == 1:
            return write(state, file)
        buffer = io.BytesIO()
        write(state, buffer)
        file.write(buffer.getvalue()[: buffer.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = half
    return loss_of


def rank(index, port, job, *arguments):
    """What each of the two processes runs; accelerate reads these variables, as torchrun and its launcher set them."""
    os.environ.update(
        RANK=str(index),
        LOCAL_RANK=str(index),
        WORLD_SIZE="2",
        LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    job(*arguments)
    parallel.leave()


def revive(folder, encodings):
    """Each process notes and counts its half of the encodings, then re-seeds its own book."""
    process = parallel.start(CONFIG).process_index
    book, weight = codebook.Codebook(8, 2), torch.zeros(8, 2)
    book.note(encodings.chunk(2)[process], seed=0)
    book.count(torch.tensor([process]))
    revived = book.revive([weight], seed=1)
    torch.save((revived, weight, book.state_dict()), Path(folder, f"{process}.pt"))


@pytest.fixture(scope="module")
def pair():
    """Runs two processes and gives their exit codes."""
    context = multiprocessing.get_context("forkserver")
    # an installed name: the server lacks pytest's path
    context.set_forkserver_preload(["ldmfast.training.train_denoiser"])

    def run(*arguments, job=train):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        both = [context.Process(target=rank, args=(i, port, job, *arguments)) for i in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(120)
            if process.is_alive():
                process.kill()
        return [process.exitcode for process in both]

    return run


def curve(folder):
    return torch.tensor(checkpoint.load(Path(folder, "run.pt"))["history"])[:, 1]


@pytest.fixture(scope="module")
def two(pair, tmp_path_factory):
    """A finished run of two processes with half the batch each."""
    folder = tmp_path_factory.mktemp("two")
    assert pair(folder, HALF) == [0, 0]
    return folder


def test_two_processes_follow_the_curve_of_one_with_twice_the_batch(two, tmp_path):
    train(tmp_path, CONFIG)
    one, split = curve(tmp_path), curve(two)
    # the same pictures, times and noise; only the order of float32 sums differs (seen: 1e-7 to 3e-6)
    assert one.shape == (8,) and torch.allclose(split, one, rtol=3e-5, atol=0)
    other = Path(tmp_path, "other")
    other.mkdir()
    train(other, dataclasses.replace(CONFIG, seed=1))
    assert not torch.allclose(curve(other), one, rtol=3e-3)  # the bound is far below what other draws give


def test_two_processes_revive_the_codes_that_one_would(pair, tmp_path):
    encodings = torch.randn(6, 2)
    assert pair(tmp_path, encodings, job=revive) == [0, 0]
    alone, weight = codebook.Codebook(8, 2), torch.zeros(8, 2)
    alone.note(encodings, seed=0)
    alone.count(torch.tensor([0, 1]))
    assert alone.revive([weight], seed=1) == 6
    for process in range(2):
        revived, other, state = torch.load(tmp_path / f"{process}.pt", weights_only=True)
        assert revived == 6 and torch.equal(other, weight)
        assert all(torch.equal(value, state[name]) for name, value in alone.state_dict().items())


@pytest.mark.parametrize(
    ("spoil", "left"), [(killed_in_step_6, 4), (killed_in_the_second_save, 2)], ids=["in a step", "in a save"]
)
def test_sigkill_of_one_rank_costs_only_the_steps_since_the_checkpoint(pair, two, tmp_path, spoil, left):
    codes = pair(tmp_path, HALF, spoil)
    assert -signal.SIGKILL in codes and 0 not in codes  # the survivor does not go on alone
    assert checkpoint.load(tmp_path / "run.pt")["step"] == left
    assert pair(tmp_path, HALF) == [0, 0]
    whole, resumed = (checkpoint.load(Path(folder, "run.pt")) for folder in (two, tmp_path))
    assert resumed["step"] == 8 and resumed["history"] == whole["history"]
    assert all(torch.equal(whole["model"][name], value) for name, value in resumed["model"].items())


def test_two_processes_can_be_continued_by_one(two, tmp_path):
    # the same global batch; a different one is refused
    state = checkpoint.load(two / "run.pt")
    checkpoint.save(state, tmp_path / "run.pt")
    assert len(train(tmp_path, CONFIG)) == 8
    with pytest.raises(ValueError, match=r"batch \* accumulate \* processes was 4, is 2"):
        train(tmp_path, HALF)


def test_accumulation_gives_the_whole_batchs_curve(tmp_path):
    for name, config in (("whole", CONFIG), ("parts", dataclasses.replace(HALF, accumulate=2))):
        Path(tmp_path, name).mkdir()
        train(tmp_path / name, config)
    assert torch.allclose(curve(tmp_path / "parts"), curve(tmp_path / "whole"), rtol=3e-5, atol=0)


def test_a_draw_depends_on_the_sample_not_on_the_split():
    whole = Step(7, 3, 0, 6)
    parts = [Step(7, 3, first, 2) for first in (0, 2, 4)]
    for name, arguments in (("integers", (50,)), ("uniform", (3,)), ("normal", (4, 5))):
        drawn = getattr(whole, name)(*arguments)
        assert torch.equal(drawn, torch.cat([getattr(part, name)(*arguments) for part in parts])), name
        assert len(torch.unique(drawn)) > 3
    again, later = Step(7, 3, 0, 6).normal(4), Step(7, 4, 0, 6).normal(4)
    assert not torch.equal(again, later) and torch.equal(again, Step(7, 3, 0, 6).normal(4))


def test_draws_are_spread_as_they_should_be():
    rows = torch.cat([Step(0, step, 0, 32).normal(4) for step in range(100)])
    assert abs(rows.mean()) < 0.03 and abs(rows.std() - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([rows[:-1, 0], rows[1:, 0]]))[0, 1]) < 0.06  # neighbours in the batch
    counts = torch.bincount(torch.cat([Step(0, step, 0, 32).integers(10) for step in range(100)]), minlength=10)
    assert (counts / counts.sum() - 0.1).abs().max() < 0.03


def test_phases_follow_their_own_losses(tmp_path):
    first, second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)
    both = torch.nn.ModuleList([first, second])
    config = dataclasses.replace(HALF, warmup=0, accumulate=2)
    run = Run(both, config, phases=[Phase("one", list(first.parameters())), Phase("two", list(second.parameters()))])
    before = [p.clone() for p in both.parameters()]
    moved = lambda: [not torch.equal(a, b) for a, b in zip(before, both.parameters(), strict=True)]  # noqa: E731

    def loss_of(step):
        made = first(step.normal(3))
        yield second(made).square().mean()  # reaches the second network too, and must not change it
        yield None if step.number < 8 else second(made.detach()).mean()

    fit(run, loss_of, tmp_path / "run.pt", quiet=True)
    assert moved() == [True, True, False, False] and len(run.average) == 2


def test_a_launch_of_several_that_started_one_is_refused(monkeypatch):
    for name in parallel.RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(ValueError, match="started one.*--multi_gpu"):
        parallel.start(CONFIG)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("wrong", [{"device": "cuda"}, {"precision": "fp16"}])
def test_what_a_machine_without_a_gpu_cannot_do_is_said(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        parallel.start(dataclasses.replace(CONFIG, **wrong))
