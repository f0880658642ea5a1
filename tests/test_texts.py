"""The paths and make targets that README, CONTRIBUTING, recipes and scripts name are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ("*.md", "Makefile", ".ci/*", "bench/gpu.sh", "bench/*.md", "ldmfast/**/*.md", "ldmfast/**/*.yaml")
ROOMS = "csrc|kernels|ldmfast|tests|bench|\\.ci"
CODE = "py|cpp|cu|h|sh"


def named_paths(text: str) -> set[str]:
    """Paths of the repository: anywhere with a room in front, and in backticks any file of code."""
    anywhere = re.findall(rf"(?<![\w/.~-])((?:{ROOMS})/[\w./*<>-]*)", text)
    quoted = [word for quote in re.findall(r"`([^`\n]+)`", text) for word in quote.split()]
    files = [word for word in quoted if re.fullmatch(rf"[\w./*<>-]+\.(?:{CODE})", word)]
    return {path.rstrip(".,:;") for path in [*anywhere, *files]}


def missing_paths(text: str, root: Path) -> list[str]:
    """Those that neither the root nor the package has; a bare name may be anywhere, <op> stands for any name."""

    def exists(path):
        glob = re.sub(r"<\w+>", "*", path).rstrip("/")
        folders = ("", "ldmfast/") if "/" in glob else ("", "bench/", "csrc/**/", "ldmfast/**/", "tests/**/")
        return any(any(root.glob(folder + glob)) for folder in folders)

    return sorted(path for path in named_paths(text) if not exists(path))


def texts() -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for glob in TEXTS for path in ROOT.glob(glob))


@pytest.mark.parametrize("name", texts())
def test_the_paths_that_a_text_names_exist(name):
    assert missing_paths((ROOT / name).read_text(), ROOT) == []


def test_a_path_that_is_gone_is_found(tmp_path):
    for name in ("csrc/cpu/attention.cpp", "ldmfast/pipeline/call.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    text = "`csrc/cpu/<op>.cpp`, `pipeline/call.py --x`, `mine.json`, https://x.org/csrc/none.cpp, in csrc/cpu/."
    assert missing_paths(text, tmp_path) == []
    assert missing_paths(f"{text} `request.py`, python bench/none.py", tmp_path) == ["bench/none.py", "request.py"]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", ".ci/run"])
def test_the_make_targets_that_a_text_names_exist(name):
    if not (ROOT / name).exists():
        pytest.skip(f"{name} is not here")
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`| {4})make ([a-z.][\w./-]*)", (ROOT / name).read_text(), re.MULTILINE)
    assert named and set(named) <= targets
