"""The house in order: which room imports which, what is annotated, how full a folder is, what its files are called."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ldmfast"

# From the bottom up: a room imports its own storey and those below. ldmfast/__init__.py names what users import of all.
STOREYS = (
    {"_version", "files", "pictures", "shipped", "kernels"},
    {"ops"},
    {"models"},
    {"conditioning", "diffusion"},
    {"released"},
    {"pipeline"},
    {"data", "metrics"},
    {"training", "evaluation", "study"},
    {"commands", "__main__"},
)
ANNOTATED = {"ops", "models", "conditioning", "diffusion", "released", "pipeline"}  # the rooms that users call
SHIM = "models/conditioning.py"  # where conditioning was; users import it
LOOSE_FILES, FILES_IN_A_FOLDER = 7, 20
COLLECTIONS = {"tests/data/emoji"}  # pictures, not texts that somebody looks through


# --- what imports what ------------------------------------------------------------------------------------------------


def sources(package: Path) -> dict[str, Path]:
    """{dotted name: file} of the package's modules."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(node: ast.AST, module: str, is_package: bool) -> list[str]:
    """The dotted names that one node of module's tree imports, or names in a string for importlib."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parts = module.split(".")
        above = parts[: len(parts) - (node.level - is_package)] if node.level else []
        home = ".".join([*above, *filter(None, [node.module])])
        return [f"{home}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.findall(r"^ldmfast(?:\.\w+)+\.?$", node.value)  # the dot: the beginning of an f-string
    return []


def resolved(name: str, modules: dict[str, Path]) -> str | None:
    """The module that a dotted name stands for: itself, the home that the front door gives it, or its parent."""
    package = next(iter(modules))
    if name.rpartition(".")[0] == package and name not in modules:
        exported = re.search(rf'"{name.rpartition(".")[2]}": "([\w.]+)"', modules[package].read_text())
        name = exported[1] if exported else package
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def arrows(package: Path, strings: bool = True) -> list[tuple[str, int, str]]:
    """(module, line, module that it imports), by a statement anywhere in it, or by a string if those count."""
    modules, found = sources(package), []
    for module, file in modules.items():
        for node in walk(ast.parse(file.read_text(), str(file))):
            if strings or not isinstance(node, ast.Constant):
                names = imported(node, module, file.name == "__init__.py")
                found += [(module, node.lineno, target) for name in names if (target := resolved(name, modules))]
    return found


def walk(tree: ast.AST):
    """ast.walk without what stands under `if TYPE_CHECKING`, which never runs."""
    yield tree
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield from walk(node)


def storey(module: str) -> int:
    room = module.split(".")[1]
    found = [level for level, rooms in enumerate(STOREYS) if room in rooms]
    assert found, f"{module}: no storey of tests/test_house.py names {room}"
    return found[0]


def upward(package: Path) -> list[str]:
    """Each import of a higher storey, as file:line and what it imports."""
    files = sources(package)
    return [
        f"{files[module].relative_to(package)}:{line} imports {target}"
        for module, line, target in arrows(package)
        if package.name not in (module, target) and files[module] != package / SHIM
        if storey(target) > storey(module)
    ]


def circles(package: Path) -> list[list[str]]:
    """Modules that import each other, at once or when a function is called."""
    targets: dict[str, set[str]] = {}
    for module, _, target in arrows(package, strings=False):
        targets.setdefault(module, set()).add(target)

    def reached(start):
        seen, waiting = set(), [start]
        while waiting:
            new = targets.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    reach = {module: reached(module) for module in targets}
    found = {frozenset(other for other in reach[module] if module in reach.get(other, ())) for module in targets}
    return sorted(sorted(circle) for circle in found if circle)


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in {"ldmfast/__init__.py": "", **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder / "ldmfast"


def test_no_room_imports_one_above_it():
    assert upward(PACKAGE) == []


@pytest.mark.parametrize(
    "text",
    [
        "import ldmfast.models.unet",
        "from ldmfast.models.unet import UNet",
        "from ldmfast import models",
        "from ldmfast import UNet",
        "from ..models import unet",
        "from ..models.unet import UNet",
        "def f():\n    from ldmfast.models import unet",
        "HOMES = {'UNet': 'ldmfast.models.unet'}",
        "def f(name):\n    importlib.import_module(f'ldmfast.models.{name}')",
    ],
)
def test_one_upward_import_is_found(text, tmp_path):
    rooms = {"ldmfast/ops/attention.py": text, "ldmfast/ops/__init__.py": "", "ldmfast/models/__init__.py": ""}
    door = {"ldmfast/__init__.py": '_HOMES = {"UNet": "ldmfast.models.unet"}'}
    package = write(tmp_path, {**door, **rooms, "ldmfast/models/unet.py": "from ldmfast.ops import attention"})
    line = len(text.splitlines())
    assert len(upward(package)) == 1 and upward(package)[0].startswith(
        f"ops/attention.py:{line} imports ldmfast.models"
    )
    (package / "ops" / "attention.py").write_text('"""ldmfast.models.unet is above."""\nimport ldmfast.files')
    assert upward(package) == []


def test_no_import_goes_in_a_circle():
    assert circles(PACKAGE) == []


def test_a_circle_is_found(tmp_path):
    package = write(
        tmp_path,
        {
            "ldmfast/ops/__init__.py": "from ldmfast.ops.a import x",
            "ldmfast/ops/a.py": "from ldmfast.ops import b\nfrom ldmfast.ops import c",
            "ldmfast/ops/b.py": "try:\n    from .a import x\nexcept ImportError:\n    x = 1",
            "ldmfast/ops/c.py": "def f():\n    from ldmfast.ops import d",
            "ldmfast/ops/d.py": "from .c import f",
        },
    )
    assert circles(package) == [["ldmfast.ops.a", "ldmfast.ops.b"], ["ldmfast.ops.c", "ldmfast.ops.d"]]


# --- what is annotated ------------------------------------------------------------------------------------------------


def public_functions(tree: ast.AST, in_class: bool = False):
    """(function, whether it is a method) of those that no name around them, nor their own, calls private."""
    for node in ast.iter_child_nodes(tree):
        named = isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        if named and node.name.startswith("_") and not node.name.endswith("__"):
            continue
        if named and not isinstance(node, ast.ClassDef):
            yield node, in_class  # what is nested in it is its own affair
        else:
            yield from public_functions(node, in_class or named)


def bare(function: ast.FunctionDef, is_method: bool) -> list[str]:
    """The arguments without an annotation, self and cls apart, and "return" where that has none."""
    given, static = function.args, any(ast.unparse(each) == "staticmethod" for each in function.decorator_list)
    places = [*given.posonlyargs, *given.args][is_method and not static :]
    arguments = [*places, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [each.arg for each in arguments if each.annotation is None] + ["return"] * (function.returns is None)


def unannotated(package: Path) -> list[str]:
    """Each public function of the rooms that users call with something bare, as file:line name: what."""
    return [
        f"{file.relative_to(package)}:{function.lineno} {function.name}: {', '.join(missing)}"
        for file in sources(package).values()
        if file.relative_to(package).parts[0] in ANNOTATED
        for function, is_method in public_functions(ast.parse(file.read_text(), str(file)))
        if (missing := bare(function, is_method))
    ]


def test_what_users_call_is_annotated():
    assert unannotated(PACKAGE) == []


@pytest.mark.parametrize(
    "text, missing",
    [
        ("def f(x, /, y, *z, v=1, **w): ...", "f: x, y, v, z, w, return"),
        ("def f(x: int): ...", "f: return"),
        ("async def f(x) -> int: ...", "f: x"),
        ("@register\ndef f(x) -> int: ...", "f: x"),
        ("if True:\n    def f(x) -> int: ...", "f: x"),
        ("class A:\n    def __init__(self): ...", "__init__: return"),
        ("class A:\n    def __call__(self, x) -> int: ...", "__call__: x"),
        ("class A:\n    @property\n    def f(self): ...", "f: return"),
        ("class A:\n    @classmethod\n    def f(cls, x) -> int: ...", "f: x"),
        ("class A:\n    @staticmethod\n    def f(x) -> int: ...", "f: x"),
        ("class A:\n    class B:\n        def f(self, x) -> int: ...", "f: x"),
    ],
)
def test_a_bare_function_is_found(text, missing, tmp_path):
    package = write(tmp_path, {"ldmfast/ops/a.py": text, "ldmfast/training/a.py": text})
    (found,) = unannotated(package)
    assert found.startswith("ops/a.py:") and found.partition(" ")[2] == missing


def test_private_and_nested_functions_need_no_annotation(tmp_path):
    text = """
def _f(x): ...
def f(x: int) -> int:
    def g(y): ...
class _A:
    def f(self, x): ...
class A:
    def __init__(self, x: int) -> None: ...
    def _f(self, x): ...
    @property
    def g(self) -> int: ...
"""
    assert unannotated(write(tmp_path, {"ldmfast/ops/a.py": text})) == []


# --- files and names --------------------------------------------------------------------------------------------------


def ignored(path: Path, patterns: list[str]) -> bool:
    """Whether a .gitignore of plain patterns leaves the path (relative to its folder) out."""
    for pattern in patterns:
        if pattern.startswith("/"):
            if fnmatch.fnmatch(path.parts[0], pattern.strip("/")):
                return True
        elif any(fnmatch.fnmatch(part, pattern.strip("/")) for part in path.parts):
            return True
    return False


def repository() -> list[Path]:
    """Its files, relative: as git has them, or in a copy without git, all that .gitignore does not name."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if (ROOT / ".git").exists() and listed.returncode == 0:
        return [Path(line) for line in listed.stdout.splitlines() if (ROOT / line).exists()]
    patterns = (ROOT / ".gitignore").read_text().split()
    found = (file.relative_to(ROOT) for file in ROOT.rglob("*") if file.is_file())
    return [file for file in found if not ignored(file, patterns)]


def test_no_folder_holds_more_files_than_one_looks_through():
    counts = Counter(file.parent.as_posix() for file in repository() if file.name != "README.md")
    assert {
        folder: count for folder, count in counts.items() if count > FILES_IN_A_FOLDER and folder not in COLLECTIONS
    } == {}


def test_few_files_lie_loose_in_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= LOOSE_FILES


def test_no_two_files_of_the_package_share_a_name():
    counts = Counter(file.name for file in PACKAGE.rglob("*.py") if file.name != "__init__.py")
    assert [name for name, count in counts.items() if count > 1] == []


def test_the_package_speaks_the_fields_words():
    """Conditioned on, condition, prompt: the word that stood for all of them is gone."""
    word = re.compile(rb"\btold\b")
    files = [path for path in PACKAGE.rglob("*") if path.suffix in {".py", ".md", ".yaml", ".json", ".txt", ".sh"}]
    assert [path.relative_to(ROOT).as_posix() for path in files if word.search(path.read_bytes())] == []
