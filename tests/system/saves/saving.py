"""Every kind of save, with each of its calls of the system failing once, and ending the process once.

Run under failing_calls.c; prints as JSON {kind: {"calls": how many a save makes, "wrong": sentences}}.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tiny  # noqa: E402

from ldmfast import UNet, files  # noqa: E402
from ldmfast.conditioning import ClassEmbedder  # noqa: E402
from ldmfast.data import emoji  # noqa: E402
from ldmfast.diffusion.schedule import make_scheduler  # noqa: E402
from ldmfast.models import AutoencoderKL  # noqa: E402
from ldmfast.pictures import writing  # noqa: E402
from ldmfast.pipeline import LatentDiffusionPipeline  # noqa: E402
from ldmfast.training import checkpoint  # noqa: E402

SHIM = ctypes.CDLL(None)
SHIM.failing_calls_hit.restype = ctypes.c_char_p
OLD, NEW, NEXT = 1, 2, 3
MOST = 400


def weights(version):
    return {"step": version, "a": torch.full((9000,), float(version)), "b": torch.full((3,), 1.0)}


def picture(path, version):
    with writing(path) as write:
        write(PICTURES[version])


def safetensors(path, version):
    with files.replacing(path) as partial:
        save_file({"a": weights(version)["a"]}, partial)


def by_torch(path, version):
    """torch's own writer, which is C++."""
    with files.replacing(path) as partial:
        torch.save({"state_dict": weights(version)}, partial)


def set_to(module, version):
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(version / 10)
    return module


def pipeline(folder, version):
    set_to(PIPELINE.unet, version)
    PIPELINE.save_pretrained(folder)


def vae(folder, version):
    checkpoint.replace_folder(folder, set_to(PIPELINE.vae, version).save_pretrained)


def two_renames(folder, version):
    exchange, files._exchange = files._exchange, lambda a, b: False
    try:
        with files.replacing_folder(folder, keep=True) as partial:
            for name in ("a", "b"):
                (partial / name).write_text(f"{name} {version}")
    finally:
        files._exchange = exchange


def collection(folder, version):
    """A new folder: there is no old one, and one that is whole is never written over."""
    if version == OLD:
        return
    if version == NEXT:
        shutil.rmtree(folder, ignore_errors=True)
    emoji.build(CUTOUTS, folder, size=8, count=1, seed=version)


KINDS = {
    "checkpoint": ("run.pt", lambda path, version: checkpoint.save(weights(version), path)),
    "torch file": ("model.ckpt", by_torch),
    "safetensors file": ("latents.safetensors", safetensors),
    "png": ("a.png", picture),
    "jpg": ("a.jpg", picture),
    "webp": ("a.webp", picture),
    "report": ("report.html", lambda path, version: files.write_text(path, f"<p>{version}" * 3000)),
    "pipeline": ("pipeline", pipeline),
    "autoencoder": ("vae", vae),
    "two renames": ("model", two_renames),
    "collection": ("pictures", collection),
}


def content(home):
    """{file below home: its bytes}; folders that are empty count."""
    return {str(p.relative_to(home)): p.read_bytes() if p.is_file() else None for p in sorted(home.rglob("*"))}


def attempt(save, path, version, n, number):
    """Save in a child of this process whose n-th call fails: (whether one was hit, its name, what was raised)."""
    reading, saying = os.pipe()
    child = os.fork()
    if not child:
        said = None
        try:
            SHIM.failing_calls_begin(os.fsencode(path.parent), ctypes.c_long(n), number)
            save(path, version)
        except BaseException as error:
            said = [type(error).__name__, isinstance(error, OSError), str(error)]
        SHIM.failing_calls_end()
        os.write(saying, json.dumps([SHIM.failing_calls_hit().decode(), said]).encode())
        os._exit(0)
    os.close(saying)
    with open(reading, "rb") as file:
        answer = file.read()
    os.waitpid(child, 0)
    call, said = json.loads(answer) if answer else ("killed", None)
    return bool(call), call, said


def check(kind, number, home):
    name, save = KINDS[kind]
    path, wrong = home / "work" / name, []
    states = {}
    for version in (OLD, NEW, NEXT):
        apart = home / f"reference {version}" / name
        apart.parent.mkdir()
        save(apart, version)
        states[version] = content(apart.parent)
    for n in range(1, MOST):
        shutil.rmtree(path.parent, ignore_errors=True)
        shutil.copytree(home / f"reference {OLD}", path.parent)
        hit, call, said = attempt(save, path, NEW, n, number)
        where = f"{kind}, call {n} ({call}), errno {number}"
        left = content(path.parent)
        if said and not (said[1] and str(path) in said[2] and "partial" not in said[2] and "\n" not in said[2]):
            wrong.append(f"{where}: raised {said}")
        temporary = {p for p in left if ".partial" in p or ".replaced" in p}
        if number and temporary and call not in ("unlink", "unlinkat", "rmdir"):
            wrong.append(f"{where}: left {sorted(temporary)[:3]}")
        files.recover(path)
        left = {p: data for p, data in content(path.parent).items() if ".partial" not in p and ".replaced" not in p}
        if left not in (states[OLD], states[NEW]) or not hit and left != states[NEW]:
            wrong.append(f"{where}: holds {sorted(left)[:5]}, neither the old nor the new")
        save(path, NEXT)
        if content(path.parent) != states[NEXT]:
            wrong.append(f"{where}: after the next save {sorted(set(content(path.parent)) ^ set(states[NEXT]))[:5]}")
        if not hit:
            return {"calls": n - 1, "wrong": wrong}
    return {"calls": MOST, "wrong": [f"{kind}: {MOST} calls and no end"]}


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    PICTURES = {v: Image.effect_noise((96, 96), 40 * v).convert("RGB") for v in (OLD, NEW, NEXT)}
    CUTOUTS = dict(list(emoji.folder_cutouts(tiny.CUTOUTS).items())[:1])
    small = dict(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, sample_size=8)
    blocks = dict(down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",))
    PIPELINE = LatentDiffusionPipeline(
        UNet(**small, **blocks, cross_attention_dim=8, attention_head_dim=2),
        AutoencoderKL(**small),
        make_scheduler(0.0015, 0.0195, "epsilon"),
        ClassEmbedder(["cat", "dog"], 8),
    )
    found = {}
    for kind in KINDS:
        for fault, number in (("full", errno.ENOSPC), ("killed", 0)):
            with tempfile.TemporaryDirectory() as home:
                found[f"{kind}, {fault}"] = check(kind, number, Path(home).resolve())
    print(json.dumps(found))
