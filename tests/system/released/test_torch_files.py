"""Files of torch, in every kind that it has written, read as data: bit by bit, with no code run; damage is named."""

from __future__ import annotations

import collections
import os
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save
from saved_files import equal

from ldmfast.released.weights import read_weights


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def lightning(names=("pytorch_lightning", "callbacks", "model_checkpoint")):
    """A class of a package that is gone when its pickle is read."""
    modules = [".".join(names[: i + 1]) for i in range(len(names))]
    for module in modules:
        sys.modules[module] = types.ModuleType(module)
    kind = type("ModelCheckpoint", (dict,), {"__module__": modules[-1]})
    sys.modules[modules[-1]].ModelCheckpoint = kind
    return kind, modules


@pytest.fixture
def table():
    base = torch.randn(6, 4)
    shared = base[1:3].t()
    return collections.OrderedDict(
        {"a": base, "b": shared, "c": torch.arange(5), "d": torch.tensor(2.0), "e": torch.empty(0, 3).half()}
        | {"f": torch.nn.Parameter(torch.randn(3).bfloat16()), "g": torch.randn(2).to(torch.float8_e4m3fn)}
    )


WAYS = {
    "zip": {},
    "older": {"_use_new_zipfile_serialization": False},
    "protocol 4": {"pickle_protocol": 4},
    "older, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("ending", [".ckpt", ".pt", ".bin", ".safetensors", ""])
def test_every_kind_of_torch_file_is_read_bit_by_bit(way, ending, table, tmp_path):
    if "older" in way:
        table.pop("g")  # a type that the older files have no name for
    path = tmp_path / f"file{ending}"
    torch.save({"state_dict": table, "global_step": 7}, path, **WAYS[way])
    got, others = read_weights(path)
    assert got.keys() == table.keys() and others["global_step"] == 7
    for name, value in table.items():
        assert got[name].dtype == value.dtype and got[name].stride() == value.stride()
        assert torch.equal(got[name].float(), value.detach().float()), name


def test_a_plain_pickle_and_a_whole_module_are_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm2d(2))
    wanted = {name: value.clone() for name, value in module.state_dict().items()}
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(dict(module.state_dict())))
    torch.save(module, tmp_path / "module.pt")
    for name in ("plain.pkl", "module.pt"):
        assert equal(read_weights(tmp_path / name)[0], wanted)


def test_classes_and_numpy_numbers_beside_the_weights_are_left_where_they_are(tmp_path, table):
    kind, modules = lightning()
    beside = {"callbacks": {kind: {"best": np.float64(0.5)}, "x": kind(monitor="val/loss")}, "lr": np.float32(1e-4)}
    beside |= {"array": np.arange(3), "when": collections.Counter("ab"), "sizes": {torch.Size([1]), (2, 3)}}
    beside |= {"runs": Runs(str(tmp_path / "made")), "global_step": np.int64(5), "dtype": torch.float16}
    table.pop("g")
    for way in WAYS:
        torch.save({**beside, "state_dict": table}, tmp_path / "file.ckpt", **WAYS[way])
        present = {module: sys.modules.pop(module) for module in modules}
        assert read_weights(tmp_path / "file.ckpt")[0].keys() == table.keys()
        assert not set(modules) & set(sys.modules)
        sys.modules.update(present)
    for module in modules:
        del sys.modules[module]
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("place", [(), ("model",), ("state_dict", "model"), ("a", "b", "module"), ("state_dict",)])
def test_the_table_is_found_where_it_is(place, tmp_path):
    table = {"x": torch.ones(2), "y": torch.zeros(3)}
    ema, content = {"x": torch.zeros(2), "y": torch.zeros(3)}, table
    for name in reversed(place):
        content = {name: content}
    if place:
        content = {
            "model_ema": ema,
            "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}},
            **content,
            "z": torch.ones(1),
        }
    torch.save(content, tmp_path / "file.pt")
    assert equal(read_weights(tmp_path / "file.pt")[0], table)


def damage(path, kind):
    """What the sentence about the damaged file must say."""
    content = path.read_bytes()
    if kind == "empty":
        path.write_bytes(b"")
        return "is empty; download it again"
    if kind == "half":
        path.write_bytes(content[: len(content) // 2])
        return "download it again"
    if kind == "short storage":  # a length that the file does not have
        path.write_bytes(content.replace(b"K\x06K\x04\x86", b"K\x06K\xff\x86", 1))
        return "a is damaged|Bad CRC-32"
    path.write_bytes({"text": b"not a model", "stack": b"\x80\x02R.", "page": b"<html>"}[kind])
    return {"text": "begins with", "stack": "truncated or damaged", "page": "failed download"}[kind]


@pytest.mark.parametrize("kind", ["empty", "half", "short storage", "text", "stack", "page"])
@pytest.mark.parametrize("way", ["zip", "older"])
def test_a_damaged_file_is_refused_in_one_sentence(kind, way, tmp_path):
    path = tmp_path / "file.ckpt"
    torch.save({"a": torch.zeros(6, 4)}, path, **WAYS[way])
    message = damage(path, kind)
    with pytest.raises(ValueError, match=message) as error:
        read_weights(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_call_that_makes_much_of_little_is_refused(tmp_path):
    """A stride of zero: a tensor of more elements than the file has."""
    torch.save({"a": torch.zeros(1).expand(1000)}, tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match="it needs 1000 elements of a storage of 1"):
        read_weights(tmp_path / "file.ckpt")
    deep = b"\x80\x02" + b"}q\x00" + b"".join(b"}(U\x01ah\x00U\x01bh\x00u0" for _ in range(50)) + b"."
    (tmp_path / "deep.ckpt").write_bytes(deep + struct.pack("<q", 0))
    with pytest.raises(ValueError, match="no table of tensors"):
        read_weights(tmp_path / "deep.ckpt")


@pytest.mark.parametrize("padding", range(9))
def test_a_safetensors_files_tensors_are_as_its_own_reader_gives_them(padding, tmp_path):
    """Wherever its data begin, of every dtype, without elements too; and writing to one leaves the file as it is."""
    table = {
        "a": torch.randn(3, 5),
        "half": torch.randn(7).half(),
        "scalar": torch.tensor(8.0),
        "bfloat16": torch.randn(()).bfloat16(),
        "empty": torch.zeros(0, 3),
        "double": torch.randn(3).double(),
        "whole": torch.arange(5),
        "float8": torch.randn(3).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "file.safetensors"
    content = save(table, {"padding": ""})
    end = 8 + int.from_bytes(content[:8], "little")
    header = content[8:end] + b" " * padding  # usual ones are padded so that the data begin at a multiple of 8
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    wanted = load_file(path)
    got, others = read_weights(path)
    assert others == {"padding": ""} and got.keys() == wanted.keys() == table.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype and got[name].shape == value.shape
        assert torch.equal(got[name].double(), value.double()) and torch.equal(value.double(), table[name].double())
    got["a"].zero_()
    assert torch.equal(load_file(path)["a"], table["a"])


def test_the_metadata_of_a_safetensors_file_may_be_null(tmp_path):
    path = tmp_path / "file.safetensors"
    content = save({"a": torch.ones(2)})
    end = 8 + int.from_bytes(content[:8], "little")
    header = b'{"__metadata__": null, ' + content[9:end]
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])
    got, others = read_weights(path)
    assert torch.equal(got["a"], torch.ones(2)) and others == {}
