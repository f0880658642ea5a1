"""bench/layers.py: its list of the U-Net's layers, and a run on a few small ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from ldmfast.commands.measuring.works import SDXL
from ldmfast.ops import native

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

from roofs import shapes  # noqa: E402

UNETS = {"unet": dict(cross_attention_dim=768, attention_head_dim=8), "sdxl": SDXL}


def test_every_shape_stands_once():
    found = [*shapes.unet(), *shapes.sdxl(), *shapes.decoder()]
    assert len({layer.label for layer in found}) == len(found)


@pytest.mark.parametrize("name", UNETS)
def test_the_unets_layers_are_those_of_the_model(name):
    """Every convolution, linear layer and attention of diffusers' U-Net on the meta device, and no other."""
    seen = set()

    def see(module, inputs, out):
        if isinstance(module, torch.nn.Conv2d):
            k, stride = module.kernel_size[0], module.stride[0]
            seen.add((module.in_channels, module.out_channels, inputs[0].shape[2], k, stride))
        else:
            seen.add((inputs[0].shape[:-1].numel(), module.in_features, module.out_features))

    def attend(q, k, v, **named):
        seen.add(("attention", q.shape[2], k.shape[2], q.shape[1], q.shape[3]))
        return q

    with torch.device("meta"), pytest.MonkeyPatch.context() as patched:
        unet = diffusers.UNet2DConditionModel(**{**UNETS[name], "sample_size": 64})
        for module in unet.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.register_forward_hook(see)
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        width = unet.config.cross_attention_dim
        unet(torch.empty(1, 4, 64, 64), torch.tensor(1.0), torch.empty(1, 77, width), added_cond_kwargs=added)
    listed = {_key(layer) for layer in getattr(shapes, name)()}
    small = {row for row in seen if row[0] == 1 and len(row) == 3}  # of the time and the sizes, one row each
    assert seen - listed - (small if name == "sdxl" else set()) == set()
    assert {row for row in listed - seen if len(row) == 3 or row[0] == "attention"} == set()


def _key(layer):
    if isinstance(layer, shapes.Attention):
        return "attention", layer.L, layer.S, layer.H, layer.D
    if isinstance(layer, shapes.Convolution):
        return layer.Ci, layer.Co, layer.side * layer.upsample, layer.k, layer.stride
    return layer.M, layer.K, layer.N


def test_a_run_writes_its_rows(tmp_path):
    if reason := native.missing("cpu"):
        pytest.skip(f"cpu {reason}")
    file = tmp_path / "layers.json"
    command = [sys.executable, str(BENCH / "layers.py"), "--small", "--seconds", "0.01", "--json", str(file)]
    done = subprocess.run([*command, "--dtype", "float32"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["machine"]["commit"] and found["peak_gflops"]["float32"] > 0
    assert len(found["rows"]) == len([*shapes.small()])
    for row in found["rows"]:
        assert row["layer"] in done.stdout and row["ours_ms"] > 0 and row["eager_ms"] > 0
        assert row["class"] == "attention" or row["packed_ms"] > 0
    assert {each["class"] for each in found["classes"]} == {row["class"] for row in found["rows"]}
    assert sum(each["rows"] for each in found["classes"]) == len(found["rows"])


def test_the_roof_is_measured_in_both_dtypes():
    if reason := native.missing("cpu"):
        pytest.skip(f"cpu {reason}")
    command = [sys.executable, str(BENCH / "roofs" / "roof.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert figures["float32"] > 0 and figures["bfloat16"] > 0.5 * figures["float32"]
