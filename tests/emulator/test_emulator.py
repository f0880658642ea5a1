"""The CUDA kernels under the adversarial emulator: as much as fits the suite. `python tests/emulator` does the rest."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CASES, SMALL
from emulated import BACKEND, NO_CLUSTERS, SLABS, Call, calls, failure, settings_of
from mutations import SOURCES, WAIT, Site, newer_than, sites

from ldmfast.ops import native
from ldmfast.ops.registry import OPS

pytestmark = pytest.mark.skipif(native.missing(BACKEND) is not None, reason=f"cuda-host: {native.missing(BACKEND)}")

GROUP_NORMS = [case for case in CASES if case.op == "group_norm_silu" and not case.big and "13x13" not in case.label]
OF_OPS = [case for op, case in SMALL.items() if op in ("group_norm_silu", "attention", "timestep_mlp", "ddim_step")]


def small_calls() -> list[Call]:
    return [call for case in OF_OPS for call in calls(case, (torch.float16, torch.float32))]


def named(label: str, op: str) -> Call:
    case = next(case for case in CASES if case.op == op and case.label == label)
    return next(calls(case, (torch.float16,)))


@pytest.mark.parametrize("settings", [{"SEED": "1"}, {"SEED": "2"}, {"RACES": "1"}], ids=str)
@pytest.mark.parametrize("call", small_calls(), ids=str)
def test_any_order_and_without_a_race(call, settings):
    assert failure(call, **settings) is None


@pytest.mark.parametrize("case", GROUP_NORMS, ids=lambda case: case.label)
def test_group_norm_on_a_chip_without_clusters(case):
    """One launch without a cluster, as small slices are, where sm_90 has one with a cluster."""
    for call in calls(case, (torch.bfloat16,), gradient=False):
        assert failure(call, **dict(NO_CLUSTERS)) is None


@pytest.mark.parametrize("case", [case for case in GROUP_NORMS if "C2560" not in case.label], ids=lambda c: c.label)
def test_group_norm_in_two_launches(case):
    """As of pictures whose slices fill more than 24 KB, with slabs of 256 bytes."""
    for call in calls(case, (torch.bfloat16,)):
        assert failure(call, **dict(SLABS)) is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_block_has_several_slabs(layout):
    """As of an autoencoder's pictures: the barrier between one slab and the next is missed."""
    call = replace(named(f"everything-{layout}", "group_norm_silu"), settings=SLABS)
    between = [site for site in sites() if site.file.name == "group_norm_silu.cu"][-2]
    assert failure(call, RACES="1") is None
    assert "race: " in (failure(call, RACES="1", **between.setting) or "")


@pytest.mark.parametrize(
    "name,op,label,backward",
    [
        ("attention.cu", "attention", "cross-50x77x160", False),
        ("attention_backward_mma.cuh", "attention", "cross-50x77x160", True),
        ("group_norm_silu.cu", "group_norm_silu", "C320-8x8-channels_last", False),
    ],
)
def test_a_removed_barrier_is_a_race(name, op, label, backward):
    site = [site for site in sites() if site.file.name == name and site.primitive == "__syncthreads"][:2][-1]
    found = failure(replace(named(label, op), backward=backward), RACES="1", **site.setting)
    assert "race: " in (found or "") and "without a barrier" in found


def test_a_peer_that_exits_too_soon_is_noticed():
    """Its memory is another block's by then; in every order of the blocks, too."""
    last = [site for site in sites() if site.primitive == "cluster_wait"][-1]
    call = named("C320-8x8-channels_last", "group_norm_silu")
    assert "block" in (failure(call, RACES="1", **last.setting) or "")
    assert failure(call, RACES="1") is None


def test_every_kernel_waits_for_those_before():
    """Once, since it may begin before they have ended; one that does not is noticed where global memory is read."""
    found = {}
    for path in sorted(SOURCES.rglob("*.cu*")):
        for kernel in re.findall(r"^__global__.*?^}", path.read_text(), re.DOTALL | re.MULTILINE):
            found[path.name, re.search(r"(\w+)\(const __grid_constant__", kernel)[1]] = kernel.count(f"{WAIT}();")
    assert len(found) > 20 and set(found.values()) == {1}
    call = named("odd", "geglu")
    (site,) = [site for site in sites() if site.file.name == "geglu.cu"]
    assert failure(call, RACES="1") is None
    without = failure(call, RACES="1", **site.setting)
    assert "race: a read of global memory" in without and "does not wait for the kernels before" in without
    assert failure(call, **site.setting) is None


def test_every_primitive_is_a_mutant():
    """Of each kernel that has one: a barrier that the pattern does not see would never be removed."""
    found = {(site.file.name, site.line) for site in sites()}
    assert len(found) > 30
    unseen = [
        f"{path.name}:{number}"
        for path in sorted(SOURCES.rglob("*.cu*"))
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if ("__syncthreads(" in line or "__syncwarp(" in line) and (path.name, number) not in found
    ]
    assert not unseen


def test_a_source_that_is_newer_than_the_module_is_seen():
    """Its lines may be others than the module's, and then nothing would notice a mutant."""
    assert newer_than(math.inf) == [] and {site.file.as_posix() for site in sites()} <= set(newer_than(0.0))


def test_a_planted_race_in_global_memory(monkeypatch):
    """The output lies 16 bytes before the input, so that blocks write what their neighbours read."""
    memory = torch.randn(2 * 64 * 64 + 8).half()
    x, y = memory[8:].view(2, 64, 8, 8), memory[:-8].view(2, 64, 8, 8)
    monkeypatch.setattr(sys.modules["ldmfast.ops.group_norm_silu"], "empty_output", lambda x: y)
    arguments = OPS["group_norm_silu"].normalise(x, None, None, 32)
    with settings_of(RACES="1"), pytest.raises(RuntimeError, match=r"race: a (read|write).*block.*group_norm_silu"):
        OPS["group_norm_silu"].backends[BACKEND].run(*arguments)


def test_what_is_skipped_must_exist():
    """A setting for a line without a barrier changes nothing."""
    call = named("C320-8x8-channels_last", "group_norm_silu")
    assert failure(call, **Site(Path("group_norm_silu.cu"), 1, "__syncthreads").setting) is None


def test_the_command_lists_what_ran():
    command = [sys.executable, str(Path(__file__).parent), "races", "--only", "ddim_step odd"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "3 calls (ddim_step 3), 0 fail" in done.stdout, done.stdout + done.stderr


def test_the_command_goes_on_where_it_ended(tmp_path):
    """What failed or was not reached runs again; each call is in the log when it has ended."""
    log = tmp_path / "races.tsv"
    command = [sys.executable, str(Path(__file__).parent), "races", "--only", "geglu", "--jobs", "2", "--log", str(log)]
    first = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = log.read_text().splitlines(keepends=True)
    assert f"{len(lines)} calls (geglu {len(lines)}), 0 fail" in first
    assert len(lines) > 3 and all(line.endswith(" s\tpasses\n") for line in lines)
    log.write_text("".join(lines[2:-1]) + lines[-1].replace("passes", "race: a write and a read"))
    again = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"{len(lines)} calls (geglu {len(lines)}), 0 fail" in again
    added = log.read_text().splitlines(keepends=True)[len(lines) - 2 :]
    assert {line.split("\t")[0] for line in added} == {line.split("\t")[0] for line in (*lines[:2], lines[-1])}


def test_settings_are_put_back(monkeypatch):
    monkeypatch.delenv("LDMFAST_CUDA_HOST_SEED", raising=False)
    with settings_of(SEED="1"), settings_of(SEED=None):
        assert "LDMFAST_CUDA_HOST_SEED" not in os.environ


@pytest.mark.parametrize("source", sorted((SOURCES / "emulator").glob("*.cpp")), ids=lambda path: path.name)
def test_the_emulator_compiles_for_address_sanitizer(source):
    """`make sanitize` is no part of the suite: races.cpp defined functions that the compiler declares itself there."""
    command = [os.environ.get("CXX", "g++"), "-std=c++17", "-fsyntax-only", "-fsanitize=address,undefined"]
    made = subprocess.run([*command, f"-I{SOURCES.parent}", str(source)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
