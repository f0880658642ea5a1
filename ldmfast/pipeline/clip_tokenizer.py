"""CLIP's tokenizer from where people have it: a folder, a file of its vocabulary, an installed package, the hub."""

from __future__ import annotations

import gzip
import importlib.util
import json
import tempfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

CLIP = "openai/clip-vit-large-patch14"  # whose tokenizer every Stable Diffusion uses
PACKAGES = {"open_clip": "open_clip_torch", "clip": "clip-anytorch"}  # module -> what pip calls it; both have the file
MERGES = "bpe_simple_vocab_16e6.txt.gz"
_COUNT = 48894  # the merges that CLIP takes of its file: 2 * 256 bytes, these, beginning and end are 49408 words
_START, _END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(where: str | Path, *, hub: bool) -> CLIPTokenizer:
    """CLIP's tokenizer.

    where   a folder with vocab.json and merges.txt or tokenizer.json, or with a tokenizer/ that has; one of these
            files; OpenAI's file of merges, bpe_simple_vocab_16e6.txt.gz; "open_clip" or "clip", an installed package
            that has it; a hub name
    hub     whether a hub name is looked for on the hub, or only among its downloads
    Raises OSError, ValueError or TypeError.
    """
    path = _in_a_package(where) if str(where) in PACKAGES and not Path(where).exists() else Path(where)
    if not path.is_file():
        inner = path / "tokenizer"
        return _read(str(inner if inner.is_dir() else where), hub and not path.is_dir())
    if path.name in ("vocab.json", "tokenizer.json"):
        if path.name == "vocab.json" and not path.with_name("merges.txt").is_file():
            raise OSError("there is no merges.txt beside it")
        return _read(str(path.parent), False)
    return _of_merges(path)


def _in_a_package(module: str | Path) -> Path:
    spec = importlib.util.find_spec(str(module))
    path = Path(spec.origin).parent / MERGES if spec and spec.origin else None
    if path is None or not path.is_file():
        raise OSError(f"the package is not installed: pip install {PACKAGES[str(module)]}")
    return path


def _read(where: str, hub: bool) -> CLIPTokenizer:
    from transformers import CLIPTokenizer

    found = CLIPTokenizer.from_pretrained(where, local_files_only=not hub)
    if len(found) <= len(found.all_special_tokens):  # transformers 5 makes an empty one of nothing
        raise OSError("it has no vocabulary")
    return found


def _of_merges(path: Path) -> CLIPTokenizer:
    """The vocabulary that CLIP makes of its merges: bytes, bytes at a word's end, a word for each merge."""
    lines = _lines(path)
    merges = [line for line in lines[1 : _COUNT + 1] if line]
    if not lines[0].startswith(("#version", '"bpe_simple_vocab')) or any(len(merge.split()) != 2 for merge in merges):
        raise OSError("it is no file of CLIP's merges")
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(m.split()) for m in merges), _START, _END]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        return _read(folder, False)


def _lines(path: Path) -> list[str]:
    try:
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")
        return path.read_text(encoding="utf-8").split("\n")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise OSError(f"it is no file of CLIP's merges ({error})") from error


def _byte_letters() -> list[str]:
    """A printable letter for each byte, in the vocabulary's order.   Source: Radford et al. 2019, GPT-2's encoder."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(others)]
