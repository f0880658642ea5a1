"""The versions that README states are the bounds of pyproject.toml, from which `make test-matrix` takes the oldest."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import matrix_run as run

ROOT = Path(__file__).resolve().parents[2]


def test_readme_states_the_bounds():
    stated = re.search(r"Supported: Python ([\d.]+) to [\d.]+, (.+?) and later", (ROOT / "README.md").read_text())
    assert dict(part.split() for part in stated[2].split(", ")) == run.lower_bounds()
    assert f'requires-python = ">={stated[1]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_oldest_are_pinned_and_the_newest_are_not():
    oldest, newest = run.requirements("oldest"), run.requirements("newest")
    assert [f"{name}=={version}.*" for name, version in run.lower_bounds().items()] == oldest[:3]
    assert newest[:3] == list(run.PACKAGES) and oldest[3:] == newest[3:]


def test_the_tests_that_it_names_are_there():
    assert [name for name in run.TESTS if not (ROOT / "tests" / name).exists()] == []


def test_what_is_compiled_asks_for_types_as_the_oldest_torch_takes_it():
    """torch 2.9's compiler knows isinstance(x, (a, b)) and not isinstance(x, a | b)."""
    unions = []
    for file in sorted(path for room in ("ops", "models") for path in (ROOT / "ldmfast" / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            asked = isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass")
            if asked and isinstance(node.args[1], ast.BinOp):
                unions.append(f"{file.relative_to(ROOT)}:{node.lineno}")
    assert unions == []
