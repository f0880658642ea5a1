"""Files with random bytes and random edits: each is read as it stands, or refused in a sentence that names it.

A plan is {"kind": ..., "edits": [[what, where, value], ...]}: `where` is a share of the file, or of its JSON values.

    cut      what follows is gone           bytes    these (hexadecimal) in place of as many
    insert   these bytes                    drop     so many bytes are gone
    json     a value in place of one in the file's JSON: a safetensors header, a line of metadata.jsonl, a config
    remove   a JSON value is gone
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import resource
import struct
import tempfile
import warnings
from pathlib import Path

import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save as safetensors_bytes

MOST = 512 << 20  # bytes of address space that reading one of these small files may take ...
MOST_PICTURE = (
    3 << 30
)  # ... and a picture: Pillow refuses more than 179 million pixels, and a small file may have those
WEIGHTS = "diffusion_pytorch_model.safetensors"
LONGEST = 1500  # of a sentence


def _unet():
    import tiny

    return tiny.unet("sd1", block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), norm_num_groups=4,
                     up_block_types=("CrossAttnUpBlock2D",), layers_per_block=1, cross_attention_dim=8)  # fmt: skip


@functools.cache
def _unet_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        _unet().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((12, 9)).convert("RGB").save(file, kind)
    return file.getvalue()


def _tensors():
    return {"a.weight": torch.arange(12.0).view(3, 4), "b": torch.ones(5, dtype=torch.float16)}


def _torch_file(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _read_unet(path):
    from ldmfast import UNet

    UNet.from_pretrained(path.parent)


def _read_weights(path):
    from ldmfast.released.read import read

    read(path)


def _read_lora(path):
    from ldmfast.pipeline.load_lora import load_lora

    load_lora(_unet(), path)


def _read_captions(path):
    from ldmfast.data.collection import load_pictures

    (path.parent / "a.png").write_bytes(_picture("PNG"))
    load_pictures(path.parent, 8)


def _read_boxes(path):
    from ldmfast.commands.conditions import _boxes
    from ldmfast.conditioning import BoxEncoder

    encoder = BoxEncoder(["dog", "cat"], width=8, objects=4)
    encoder(encoder.as_inputs([{"boxes": _boxes(path, encoder)}]))


def _read_map(path):
    from ldmfast.commands.conditions import _map
    from ldmfast.conditioning.spatial import MapEncoder

    _map(path, MapEncoder(2, 2), (8, 8))


def _read_picture(path):
    from ldmfast.data.collection import read_picture

    read_picture(path, 8)


def _read_recipe(path):
    from ldmfast.training import recipes

    recipes.read(path)


def _read_checkpoint(path):
    from ldmfast.training import checkpoint

    checkpoint.load(path)


def _lora_bytes():
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_"
    return safetensors_bytes({f"{name}A.weight": torch.ones(2, 8), f"{name}B.weight": torch.ones(8, 2)})


CAPTIONS = (
    b'{"file_name": "a.png", "text": "a red dog", "texts": ["a dog"], "split": "train"}\n{"file_name": "a.png"}\n'
)
BOXES = b'[{"object": "dog", "box": [0.1, 0.2, 0.5, 0.6]}, {"object": "cat", "box": [0, 0, 1, 1]}]'
RECIPE = b"about: a model\nautoencoder: {steps: 1300, channels: [32, 64, 96]}\ndenoiser:\n  prediction: v_prediction\n"
FILES = {  # kind: (file name, its content, what reads it)
    "unet weights": (WEIGHTS, lambda: _unet_files()[WEIGHTS], _read_unet),
    "unet config": ("config.json", lambda: _unet_files()["config.json"], _read_unet),
    "safetensors": ("model.safetensors", lambda: safetensors_bytes(_tensors(), {"format": "pt"}), _read_weights),
    "ckpt": ("model.ckpt", lambda: _torch_file({"state_dict": _tensors(), "global_step": 3}), _read_weights),
    "checkpoint": ("state.pt", lambda: _torch_file({"model": _tensors(), "step": 3}), _read_checkpoint),
    "lora": ("lora.safetensors", _lora_bytes, _read_lora),
    "captions": ("metadata.jsonl", lambda: CAPTIONS, _read_captions),
    "boxes": ("boxes.json", lambda: BOXES, _read_boxes),
    "map": ("map.png", lambda: _picture("PNG"), _read_map),
    "png": ("a.png", lambda: _picture("PNG"), _read_picture),
    "jpeg": ("a.jpg", lambda: _picture("JPEG"), _read_picture),
    "webp": ("a.webp", lambda: _picture("WEBP"), _read_picture),
    "gif": ("a.gif", lambda: _picture("GIF"), _read_picture),
    "bmp": ("a.bmp", lambda: _picture("BMP"), _read_picture),
    "recipe": ("recipe.yaml", lambda: RECIPE, _read_recipe),
}  # fmt: skip
PICTURES = (".png", ".jpg", ".webp", ".gif", ".bmp")
BYTES = ("cut", "bytes", "insert", "drop")


def plans(kind: str):
    """The strategy of plans for a kind of file."""
    numbers = st.one_of(st.integers(-3, 9), st.sampled_from([2**31, 2**40, 2**62, -(2**63), 2**64, 10**30]))
    words = st.sampled_from(["", "F32", "I8", "F64", "a", "dog", "train", "UNet2DConditionModel", "\u2028", "x" * 300])
    plain = st.one_of(st.none(), st.booleans(), numbers, st.floats(allow_nan=False), words)
    values = st.recursive(
        plain,
        lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(words, inner, max_size=3)),
        max_leaves=5,
    )
    where, data = st.floats(0, 1), st.binary(min_size=1, max_size=12).map(bytes.hex)
    edits = [st.tuples(st.just("cut"), where, st.none()), st.tuples(st.just("drop"), where, st.integers(1, 64))]
    edits += [st.tuples(st.sampled_from(["bytes", "insert"]), where, data)]
    if FILES[kind][0].endswith((".json", ".jsonl", ".safetensors")):
        edits += [st.tuples(st.just("json"), where, values)] * 3 + [st.tuples(st.just("remove"), where, st.none())]
    edit = st.one_of(*edits).map(list)
    return st.fixed_dictionaries({"kind": st.just(kind), "edits": st.lists(edit, min_size=1, max_size=3)})


def places(tree) -> list[tuple]:
    """(container, key) of every value in a JSON tree but the root."""
    items = list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)) if isinstance(tree, list) else []
    return [place for key, value in items for place in ((tree, key), *places(value))]


def _edit_json(text: bytes, what: str, where: float, value) -> bytes:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return text
    every = places(tree)
    if not every:
        return json.dumps(value).encode()
    container, key = every[min(int(where * len(every)), len(every) - 1)]
    if what == "remove":
        del container[key]
    else:
        container[key] = copy.deepcopy(value)
    return json.dumps(tree).encode()


def edited(content: bytes, name: str, edits) -> bytes:
    """The file's content after the edits."""
    for what, where, value in edits:
        at = int(where * len(content))
        if what == "cut":
            content = content[:at]
        elif what == "drop":
            content = content[:at] + content[at + value :]
        elif what in BYTES:
            data = bytes.fromhex(value)
            content = content[:at] + data + content[at + (len(data) if what == "bytes" else 0) :]
        elif name.endswith(".safetensors"):
            length = struct.unpack("<Q", content[:8].ljust(8, b"\0"))[0]
            header = _edit_json(content[8 : 8 + length], what, where, value)
            content = struct.pack("<Q", len(header)) + header + content[8 + length :]
        elif name.endswith(".jsonl"):
            lines = content.split(b"\n")
            place = min(int(where * len(lines)), len(lines) - 1)
            lines[place] = _edit_json(lines[place], what, where * 7 % 1, value)
            content = b"\n".join(lines)
        else:
            content = _edit_json(content, what, where, value)
    return content


@contextlib.contextmanager
def bounded(more: int):
    """No more than so many bytes of address space beyond what the process has."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(plan: dict) -> tuple[int, list[str]]:
    """(1, what is wrong): an error that is neither ValueError nor OSError in one line with the file's name."""
    name, content, read = FILES[plan["kind"]]
    with tempfile.TemporaryDirectory(prefix="damage") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if plan["kind"].startswith("unet"):
            for other, its in _unet_files().items():
                Path(folder, other).write_bytes(its)
        path = Path(folder, name)
        path.write_bytes(edited(content(), name, plan["edits"]))
        try:
            with bounded(MOST_PICTURE if name.endswith(PICTURES) else MOST):
                read(path)
        except Exception as error:
            text = str(error)
            if isinstance(error, MemoryError) or "allocate" in text:
                return 1, [f"memory: {text[:LONGEST]}"]
            if not isinstance(error, ValueError | OSError):
                raise
            lines = text.strip().split("\n")  # a collection has a line for each file that cannot be read
            if not all(folder in line or name in line for line in lines) or len(text.replace(folder, "")) > LONGEST:
                return 1, [
                    f"{type(error).__name__} without the name, or long: {text[:LONGEST]!r}".replace(folder, "...")
                ]
    return 1, []
