"""Every kind of save leaves the old or the new content, whichever of its calls of the system fails or is the last."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ldmfast import files

HERE = Path(__file__).parent
KINDS = [
    "checkpoint",
    "torch file",
    "safetensors file",
    "png",
    "jpg",
    "webp",
    "report",
    "pipeline",
    "autoencoder",
    "two renames",
    "collection",
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What saving.py prints: {"kind, fault": {"calls", "wrong"}}."""
    compiler = shutil.which("cc") or shutil.which("c++")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("failing the C library's calls takes Linux and a C compiler")
    library = tmp_path_factory.mktemp("library") / "failing_calls.so"
    source = HERE / "failing_calls.c"
    subprocess.run([compiler, "-x", "c", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    path = os.pathsep.join([str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / "saving.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("fault", ["full", "killed"])
@pytest.mark.parametrize("kind", KINDS)
def test_whichever_call_fails_the_old_or_the_new_is_there(outcomes, kind, fault):
    found = outcomes[f"{kind}, {fault}"]
    assert found["wrong"] == [] and found["calls"] >= 5


def test_what_another_process_is_writing_stays(tmp_path):
    reading, telling = os.pipe()
    os.mkfifo(tmp_path / "go on")
    child = os.fork()
    if not child:
        with files.replacing(tmp_path / "a.txt") as partial, files.replacing_folder(tmp_path / "model") as folder:
            partial.write_text("theirs")
            (folder / "a").write_text("theirs")
            os.write(telling, b"ready")
            os.read(os.open(tmp_path / "go on", os.O_RDONLY), 1)
        os._exit(0)
    assert os.read(reading, 5) == b"ready"
    files.write_text(tmp_path / "a.txt", "ours")
    with files.replacing_folder(tmp_path / "model") as folder:
        (folder / "a").write_text("ours")
    with open(tmp_path / "go on", "w") as release:
        release.write("!")
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "a.txt").read_text() == (tmp_path / "model" / "a").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "go on", "model"]


def test_a_second_thread_at_one_file_is_refused(tmp_path):
    with files.replacing(tmp_path / "a.txt") as partial:
        partial.write_text("first")
        with pytest.raises(OSError, match="a.txt cannot be written: it is being written already"):
            files.write_text(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "first"


def test_a_folder_whose_second_rename_fails_is_put_back(tmp_path, monkeypatch):
    def failing(a, b, real=os.replace):
        if str(a).endswith(".partial"):
            raise OSError(28, "No space left on device", str(a))
        return real(a, b)

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("old")
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="model cannot be written: No space left on device$"):
        with files.replacing_folder(tmp_path / "model") as folder:
            (folder / "a").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["model"] and (tmp_path / "model" / "a").read_text() == "old"


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OSError) as error:
        files.write_text(tmp_path / "report.html", "")
    assert str(error.value) == f"{tmp_path / 'report.html'} cannot be written: Permission denied"
