"""bench/layers.py: its list of the U-Net's layers, and a run on a few small ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch

from ldmfast.ops import native

BENCH = Path(__file__).resolve().parents[2] / "bench"
sys.path.insert(0, str(BENCH))

import layers  # noqa: E402


def test_every_shape_stands_once():
    found = [*layers.unet(), *layers.decoder()]
    assert len({layer.label for layer in found}) == len(found)


def test_the_unets_layers_are_those_of_the_model():
    """Every convolution and linear layer of diffusers' SD1.5 U-Net on the meta device, and no other linear shape."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        seen = set()

        def see(module, inputs, out):
            if isinstance(module, torch.nn.Conv2d):
                k, stride = module.kernel_size[0], module.stride[0]
                seen.add((module.in_channels, module.out_channels, inputs[0].shape[2], k, stride))
            else:
                seen.add((inputs[0].shape[:-1].numel(), module.in_features, module.out_features))

        for module in unet.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                module.register_forward_hook(see)
        unet(torch.empty(1, 4, 64, 64), torch.tensor(1.0), torch.empty(1, 77, 768))
    listed = {
        (layer.Ci, layer.Co, layer.side * layer.upsample, layer.k, layer.stride)
        if isinstance(layer, layers.Convolution)
        else (layer.M, layer.K, layer.N)
        for layer in layers.unet()
    }
    assert seen - listed == set()
    assert {row for row in listed - seen if len(row) == 3} == set()


def test_a_run_writes_its_rows(tmp_path):
    if reason := native.missing("cpu"):
        pytest.skip(f"cpu {reason}")
    file = tmp_path / "layers.json"
    command = [sys.executable, str(BENCH / "layers.py"), "--small", "--seconds", "0.01", "--json", str(file)]
    done = subprocess.run([*command, "--dtype", "float32"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["machine"]["commit"] and found["peak_gflops"]["float32"] > 0
    assert len(found["rows"]) == len([*layers.small()])
    for row in found["rows"]:
        assert row["layer"] in done.stdout and row["ours_ms"] > 0 and row["eager_ms"] > 0 and row["packed_ms"] > 0
