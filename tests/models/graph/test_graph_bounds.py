"""Graph mode: how much is kept, what ends it, and that what it returns belongs to the caller."""

from __future__ import annotations

import threading

import pytest
import torch
from graph_calls import SMALL, call, eager, inputs, network, settle
from launch_recorder import LaunchRecorder
from tiny import unet as tiny_unet
from tiny import unet2d

from ldmfast import UNet, UNet2D
from ldmfast.models.graph.graphs import STATES

MB = 2**20


def ours(capture=None, **options):
    return UNet.from_unet(tiny_unet(**SMALL)).graph(capture=capture or LaunchRecorder(), **options)


def test_the_graph_not_used_for_longest_is_released():
    capture = LaunchRecorder()
    u = ours(capture, entries=2)
    first, second, third = (inputs(u, tokens=n) for n in (3, 4, 5))
    for a in (first, second, first, third):
        settle(u, a)
    assert len(u.graphs) == len(capture.alive) == 2 and u.graphs.captures == 3
    captures = u.graphs.captures
    call(u, first)
    assert u.graphs.captures == captures
    call(u, second)
    assert u.graphs.captures == captures + 1


def test_graphs_that_take_too_much_together_are_captured_again_in_memory_of_their_own():
    capture = LaunchRecorder(bytes=100 * MB)
    u = ours(capture, memory=150 * MB)
    a, b = inputs(u, tokens=3), inputs(u, tokens=4)
    settle(u, a)
    call(u, b)
    assert len(u.graphs) == 1 and capture.renewed == 0
    assert torch.equal(call(u, b), eager(u, b))
    assert len(u.graphs) == 0 and capture.alive == [] and capture.renewed == 1
    settle(u, b)
    assert len(u.graphs) == 1 and 100 * MB < u.graphs.bytes < 150 * MB


def test_a_graph_that_is_too_large_is_not_made_again():
    u = ours(LaunchRecorder(bytes=200 * MB), memory=150 * MB)
    a = inputs(u)
    for _ in range(4):
        assert torch.equal(call(u, a), eager(u, a))
    assert u.graphs.captures == 1 and u.graphs.replays == len(u.graphs) == 0
    (said,) = u.explain()
    assert said == "The last call ran without its graph: its graph takes 200.0 MB, of 150.0 MB that graphs may take."


def test_settings_that_change_at_every_call_end_it():
    u = ours()
    a = inputs(u)
    for i in range(STATES + 2):
        u.mid_block.resnets[0].norm1.eps = 1e-5 * (i + 1)
        assert torch.equal(call(u, a), eager(u, a))
    assert u.graphs.captures == 0 and "changed 16 times without a graph being used" in u.explain()[0]


def test_more_kinds_of_calls_in_turn_than_graphs_end_it():
    u = ours(entries=2)
    kinds = [inputs(u, tokens=n) for n in (3, 4, 5)]
    for a in kinds * 3:
        assert torch.equal(call(u, a), eager(u, a))
    assert u.graphs.captures == 2 and u.graphs.replays == len(u.graphs) == 0
    assert u.explain() == ["Graph mode is off: calls of more kinds take turns than the 2 graphs that are kept."]


class Wrong(LaunchRecorder):
    def record(self, function, device):
        recording = super().record(function, device)
        replay = recording.replay

        def other():
            replay()
            recording.outputs[0][0, 0, 0, 0] += 1

        recording.replay = other
        return recording


class Failing(LaunchRecorder):
    def record(self, function, device):
        return super().record(lambda: (function()[0].sum().item(),), device)


@pytest.mark.parametrize(
    "capture, words",
    [
        (Wrong, "the first replay is not what the call gave: 1 of 512 values differ, by up to 1"),
        (Failing, "a capture failed: RuntimeError: operation not permitted when stream is capturing"),
    ],
)
def test_a_graph_that_is_wrong_or_fails_ends_it_with_a_warning(capture, words):
    capture = capture()
    u = ours(capture)
    a = inputs(u)
    call(u, a)
    with pytest.warns(UserWarning, match="graph mode is off"):
        assert torch.equal(call(u, a), eager(u, a))
    assert words in u.explain()[0] and capture.alive == []
    assert torch.equal(call(u, a), eager(u, a))
    assert u.graph(capture=LaunchRecorder()).explain() == []
    settle(u, a)


def test_switched_off_it_releases_what_it_holds():
    capture = LaunchRecorder()
    u = ours(capture)
    a = inputs(u)
    settle(u, a)
    assert len(capture.alive) == 1
    assert u.graph(False).graphs is None and capture.alive == [] and u.explain() == []
    assert torch.equal(call(u, a), eager(u, a))


def test_without_a_gpu_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="graph mode needs an NVIDIA GPU"):
        UNet.from_unet(tiny_unet(**SMALL)).graph()
    with pytest.raises(ValueError, match="entries is 0"):
        ours(entries=0)


def test_results_belong_to_the_caller():
    u = ours()
    a, b = inputs(u), inputs(u, tokens=3)
    settle(u, a)
    settle(u, b)
    found = [call(u, each) for each in (a, b, a)]
    kept = [y.clone() for y in found]
    a["sample"].zero_()
    call(u, a)
    call(u, b)
    u.graph(False)
    assert all(map(torch.equal, found, kept))


def test_inference_mode_and_no_grad_share_a_graph():
    u = ours()
    a = inputs(u)
    for _ in range(3):
        with torch.inference_mode():
            assert u(**a).sample.is_inference()
    replays, captures = u.graphs.replays, u.graphs.captures
    y = call(u, a)
    assert torch.equal(y, eager(u, a)) and not y.is_inference()
    assert (u.graphs.replays, u.graphs.captures) == (replays + 1, captures)


def test_lists_are_emptied_as_without_a_graph():
    u = ours()
    a = inputs(u)
    for _ in range(4):
        residuals = [torch.randn(2, 16, 8, 8), torch.randn(2, 32, 4, 4)]
        a["down_intrablock_additional_residuals"] = list(residuals)
        y = call(u, a)
        assert a["down_intrablock_additional_residuals"] == []
        a["down_intrablock_additional_residuals"] = list(residuals)
        assert torch.equal(y, eager(u, a))
    assert u.graphs.replays == 2


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_network_without_prompts_and_the_form_of_the_result(return_dict):
    u = UNet2D.from_unet(unet2d()).graph(capture=LaunchRecorder())
    kinds = set()
    with torch.no_grad():
        for t in (3, 7.9, torch.tensor([5, 9])):
            x = torch.randn(2, 3, 8, 8)
            y = u(x, t, return_dict=return_dict)
            kinds.add(type(y))
            graphs, u._graphs = u._graphs, None
            assert torch.equal(y[0], u(x, t)[0])
            u._graphs = graphs
    assert u.graphs.replays == 1 and len(kinds) == 1 and (tuple in kinds) is not return_dict


def test_threads_take_turns():
    u = ours()
    a, b = inputs(u), inputs(u, tokens=3)
    settle(u, a)
    settle(u, b)
    wanted, found = {id(x): eager(u, x) for x in (a, b)}, []

    def run(x):
        found.extend((id(x), call(u, x)) for _ in range(5))

    threads = [threading.Thread(target=run, args=(x,)) for x in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10 and all(torch.equal(y, wanted[key]) for key, y in found)


def test_wrong_arguments_are_refused_as_without_a_graph():
    u = ours()
    a = inputs(u)
    settle(u, a)
    for wrong in (
        {**a, "encoder_hidden_states": torch.randn(2, 7, 33)},
        {**a, "sample": torch.randn(2, 5, 8, 8)},
        {**a, "timestep": float("nan")},
        {**a, "no_such": 1},
    ):
        raised = []
        for run in (call, eager):
            with pytest.raises((ValueError, TypeError)) as error:
                run(u, wrong)
            raised.append(str(error.value))
        assert raised[0] == raised[1]
    assert torch.equal(call(u, a), eager(u, a))


def test_hooks_of_the_network_itself_run_around_its_graph():
    u = network(("cpu", LaunchRecorder()))
    a, seen = inputs(u), []
    settle(u, a)
    replays = u.graphs.replays
    handle = u.register_forward_hook(lambda m, args, y: seen.append(y.sample))
    for _ in range(3):
        call(u, a)
    handle.remove()
    assert len(seen) == 3 and u.graphs.replays > replays
