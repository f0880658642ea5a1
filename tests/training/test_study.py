"""The study on a few pictures, and what it counts."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny import CUTOUTS

from ldmfast.commands.cli import main
from ldmfast.data import emoji
from ldmfast.metrics import features
from ldmfast.models import UNet
from ldmfast.study import cost, trials
from ldmfast.study.claims import claims


def tiny_unet(**changes):
    settings = dict(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
    )
    return UNet(**settings | changes)


def test_operations_grow_with_the_latents_area():
    unet = tiny_unet()
    small, large = (cost.step_flops(unet, (4, side, side), (3, 16)) for side in (8, 32))
    assert 10 * small < large < 24 * small  # 16 times the convolutions, more of the attention, the same time embedding


def test_operations_of_one_convolution_by_hand():
    unet, wide = tiny_unet(), tiny_unet(in_channels=5)
    more = cost.step_flops(wide, (5, 8, 8), (3, 16)) - cost.step_flops(unet, (4, 8, 8), (3, 16))
    # conv_in has one input channel more: 2 * 9 * 8 a pixel, forward and for its weight; the input needs no gradient
    assert more == 2 * 9 * 8 * 64 * 2


def test_what_the_backward_pass_keeps():
    layer = torch.nn.Linear(10, 20)
    x = torch.randn(7, 10)
    with cost.kept_for_backward(layer) as kept:
        y = layer(x).sigmoid()
        y.sum()
        assert kept() == x.nbytes + y.nbytes  # sigmoid keeps its result; the weight is the layer's own
        (y * y).sum()
        assert kept() == x.nbytes + y.nbytes  # nothing is counted twice


def test_the_largest_batch_leaves_room_for_the_optimiser():
    unet = tiny_unet()
    weights = 20 * sum(p.numel() for p in unet.parameters())
    assert cost.largest_batch(unet, 1000, weights + 2999) == 2
    assert cost.largest_batch(unet, 1000, weights - 1) == 0


def test_claims_are_read_from_the_figures():
    def row(f, gflop, ms, batch, kid, psnr):
        figures = {"f": f, "gflop": gflop, "ms": ms, "largest_batch": batch, "points": [{"kid": kid}]}
        return figures | {"reconstruction": {"psnr": psnr}}

    latent = [row(4, 3, 30, 8, 0.1, 30), row(8, 1, 10, 20, 0.2, 25), row(16, 1, 9, 40, 0.3, 20)]
    rows = [row(1, 9, 90, 1, 0.5, None), *latent]
    held = [claim["held"] for claim in claims(rows)]
    assert held == [False, True, True, True, True, True]  # f = 8 and 16 take the same operations
    rows[3]["points"][0]["kid"] = 0.05
    assert not claims(rows)[3]["held"]


@pytest.fixture
def collection(tmp_path):
    cutouts = emoji.folder_cutouts(CUTOUTS)
    emoji.build({name: cutouts[name] for name in ("cat", "rocket", "red apple")}, tmp_path / "data", size=32, count=1)
    return tmp_path / "data"


def test_the_command_writes_one_html_file(collection, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features, "features", lambda x, side: x.flatten(1)[:, ::97])  # the network takes seconds
    quick = trials.StudyConfig(
        size=32, autoencoder_steps=2, seconds=0.1, points=2, batch=2, samples=4, steps=2, channels=(8, 16)
    )
    monkeypatch.setattr(trials, "QUICK", quick)
    out = tmp_path / "out"
    command = ["study", str(out), "--data", str(collection), "--factors", "1,4", "--quiet"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.count("held") + printed.count("did not hold") >= 6 and printed.endswith("study.html\n")
    report = json.loads((out / "study.json").read_text())
    assert [row["f"] for row in report["rows"]] == [1, 4]
    assert report["rows"][0]["reconstruction"]["psnr"] is None and report["rows"][1]["reconstruction"]["psnr"] > 0
    assert all(len(row["points"]) == 2 and row["points"][-1]["steps"] >= 1 for row in report["rows"])
    page = (out / "study.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "src='http" not in page and page.count("<svg") == 4
    before = (out / "f1.json").stat().st_mtime_ns
    assert main(command) == 0  # finished rows are kept
    assert (out / "f1.json").stat().st_mtime_ns == before
    shutil.copytree(collection, tmp_path / "other")
    for other in (["--seconds", "7"], ["--data", str(tmp_path / "other")], ["--autoencoders", str(out)]):
        assert main([*command, *other]) == 2
        assert "f1.json is a row of another study" in capsys.readouterr().err


def test_bad_options_are_refused(tmp_path, capsys):
    assert main(["study", str(tmp_path), "--factors", "1,5"]) == 2
    assert "5 is none of 1, 4, 8, 16" in capsys.readouterr().err
    for seconds in ("0.0", "nan", "inf"):
        assert main(["study", str(tmp_path), "--seconds", seconds]) == 2
        assert f"--seconds {seconds} must be above 0" in capsys.readouterr().err
