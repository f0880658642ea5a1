"""Each row of the table in ldmfast/models/graph/__init__.py: what is seen, what makes another graph, what ends it."""

from __future__ import annotations

import contextlib
import copy
import warnings

import pytest
import torch
from graph_calls import add_lora, call, eager, inputs, network, settle
from graph_changes import AGAIN, ANOTHER, SEEN, fused
from graph_reasons import OFF, dropping, hooked_lora, with_gradients
from launch_recorder import LaunchRecorder

import ldmfast
from ldmfast.models import graph
from ldmfast.models.graph.cuda_capture import CudaCapture

PLACES = {"recorder": ("cpu", LaunchRecorder), "cuda": ("cuda", CudaCapture)}


@pytest.fixture(params=PLACES)
def place(request):
    device, capture = PLACES[request.param]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("a CUDA graph needs an NVIDIA GPU")
    return device, capture()


@pytest.mark.parametrize("row, change", [(row, change) for row, changes in SEEN.items() for change in changes])
def test_a_change_is_seen_by_the_graph(row, change, place):
    u = network(place)
    if row.startswith("LoRA"):
        add_lora(u)
    a = inputs(u)
    before = settle(u, a)
    captures, replays = u.graphs.captures, u.graphs.replays
    change(u, a)
    y = call(u, a)
    assert torch.equal(y, eager(u, a)) and not torch.equal(y, before)
    assert (u.graphs.captures, u.graphs.replays) == (captures, replays + 1)


def test_fused_lora_is_seen_once_its_layers_are_gone(place):
    u = network(place)
    a = inputs(u)
    before = settle(u, a)
    add_lora(u)
    fused(u, a)
    replays, y = u.graphs.replays, call(u, a)
    assert torch.equal(y, eager(u, a)) and not torch.equal(y, before)
    assert u.graphs.replays == replays + 1  # the layers are the ones of the first graph, the values new


@pytest.mark.parametrize("row, change, back", [(row, *pair) for row, pairs in ANOTHER.items() for pair in pairs])
def test_a_change_makes_another_graph(row, change, back, place):
    u = network(place)
    if row.startswith("LoRA"):
        add_lora(u)
    a = inputs(u)
    settle(u, a)
    first = dict(a)
    change(u, a)
    captures, replays = u.graphs.captures, u.graphs.replays
    y = call(u, a)
    assert torch.equal(y, eager(u, a)) and u.graphs.replays == replays
    settle(u, a)
    assert u.graphs.captures == captures + 1 == len(u.graphs)
    if back:
        back(u, a)
    else:
        a = first
    replays = u.graphs.replays
    assert torch.equal(call(u, a), eager(u, a))
    assert (u.graphs.captures, u.graphs.replays) == (captures + 1, replays + 1)  # the older one was kept


def test_loaded_and_removed_lora_makes_another_graph(place):
    u = network(place)
    a = inputs(u)
    plain = settle(u, a)
    add_lora(u)
    with_lora = settle(u, a)
    assert not torch.equal(plain, with_lora) and len(u.graphs) == 2
    u.unload_lora()
    captures = u.graphs.captures
    assert torch.equal(call(u, a), plain) and u.graphs.captures == captures
    add_lora(u)
    call(u, a)
    assert len(u.graphs) == 1  # the first adapter's layers are gone, and their graph with them


def test_a_switch_that_chooses_kernels_makes_another_graph(place):
    u = network(place)
    a = inputs(u)
    settle(u, a)
    for switch in (lambda: ldmfast.use_backend("torch"), lambda: torch.backends.cudnn.flags(benchmark=True)):
        captures, replays = u.graphs.captures, u.graphs.replays
        with switch():
            assert torch.equal(call(u, a), eager(u, a)) and u.graphs.replays == replays
            settle(u, a)
        call(u, a)
        assert u.graphs.captures == captures + 1 == len(u.graphs)


@pytest.mark.parametrize("row, change", [(row, change) for row, changes in AGAIN.items() for change in changes])
def test_a_replaced_weight_is_captured_again(row, change, place):
    u = network(place)
    a = inputs(u)
    before = settle(u, a)
    change(u, a)
    replays, y = u.graphs.replays, call(u, a)
    assert torch.equal(y, eager(u, a)) and not torch.equal(y, before)
    assert len(u.graphs) == 0 and u.graphs.replays == replays
    settle(u, a)
    assert u.graphs.captures == 2


@pytest.mark.parametrize("row, change, reason", [(row, *pair) for row, pairs in OFF.items() for pair in pairs])
def test_a_reason_turns_it_off_and_is_said(row, change, reason, place):
    u = network(place)
    a = inputs(u)
    settle(u, a)
    first, replays, captures = dict(a), u.graphs.replays, u.graphs.captures
    with change(u, a), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            torch.manual_seed(1)
            y = u(**a).sample if torch.is_grad_enabled() and change is with_gradients else call(u, a)
            graphs, u._graphs = u._graphs, None
            torch.manual_seed(1)
            with contextlib.nullcontext() if change is with_gradients else torch.no_grad():
                wanted = u(**a).sample
            u._graphs = graphs
            assert torch.equal(y, wanted) and type(y) is type(wanted)
        said = [line for line in u.explain() if line.startswith(("Graph mode is off", "The last call ran without"))]
        assert len(said) == 1 and reason in said[0], said
    assert (u.graphs.replays, u.graphs.captures) == (replays, captures)
    if row not in ("quantised weights, DoRA",) and change not in (hooked_lora, dropping):
        settle(u, first)
        assert u.explain() == []


def test_a_network_elsewhere_than_on_one_gpu_has_no_graph(place):
    device, capture = place
    other = {"cpu": "meta", "cuda": "cpu"}[device]
    u = network(place)
    a = inputs(u)
    settle(u, a)
    u.to(other)
    assert [line for line in u.explain() if f"it is on {other}" in line]
    u.to_empty(device=device)
    u.mid_block.to(other)
    with pytest.raises((RuntimeError, ValueError)):
        call(u, a)
    assert f"some of its weights are on {other}" in u.graphs.eager


ELSEWHERE = {  # rows whose tests stand beside this file, or above with a test of their own
    "LoRA loaded or removed",
    "use_backend, TF32, cuDNN's and SDPA's",
    "guidance, the sampler's configuration",
    "more graphs than `entries`",
    "more memory than `memory`",
    "the network on a CPU, or in parts",
    "one graph larger than `memory`",
    "settings that change at every call",
    "more kinds of calls in turn than entries",
    "a first replay that differs, a failure",
}


def test_every_row_of_the_table_is_tested():
    lines = graph.__doc__.rpartition("-----\n")[2].splitlines()
    rows = [line[4:46].strip() for line in lines if line.strip()]
    assert len(rows) > 25 and sorted(rows) == sorted([*SEEN, *ANOTHER, *AGAIN, *OFF, *ELSEWHERE])


def test_a_copy_of_the_network_has_graphs_of_its_own(place):
    u = network(place)
    a = inputs(u)
    settle(u, a)
    other = copy.deepcopy(u)
    assert other.graphs is not u.graphs and len(other.graphs) == 0 and other.graphs.entries == 8
    assert torch.equal(call(other, a), call(u, a))
