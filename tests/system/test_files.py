"""Files and folders are whole or absent, also where the process is killed between any two of its calls."""

from __future__ import annotations

import os

import pytest

from ldmfast import files

CALLS = ("replace", "link", "mkdir", "fsync", "rmdir", "unlink", "open")


def killed_at(number, function, *arguments):
    """Runs `function` in a child that is gone at its `number`th call of the system. Whether it was killed."""
    child = os.fork()
    if child:
        return os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 9
    seen = 0
    try:

        def dying(real):
            def call(*args, **kwargs):
                nonlocal seen
                seen += 1
                if seen == number:
                    os._exit(9)
                return real(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, dying(getattr(os, name)))
        files._exchange = dying(files._exchange)
        function(*arguments)
    finally:
        os._exit(0)


def write_folder(folder, text, keep=False):
    with files.replacing_folder(folder, keep=keep) as partial:
        for name in ("a", "b"):
            (partial / name).write_text(text)


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_folder_that_is_replaced_survives_a_kill_at_any_moment(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    seen = set()
    for number in range(1, 60):
        home = tmp_path / str(number)
        folder = home / "model"
        write_folder(folder, "old")
        (folder / "notes").write_text("mine")
        killed = killed_at(number, write_folder, folder, "new", True)
        files.recover(folder)
        found = content(folder)
        assert found in ({"a": t, "b": t, "notes": "mine"} for t in ("old", "new")), number
        seen.add(found["a"])
        write_folder(folder, "next", keep=True)  # leftovers are in nobody's way
        assert content(folder) == {"a": "next", "b": "next", "notes": "mine"}
        if not killed:
            break
    assert seen == {"old", "new"} and not killed and number > 5


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_copy_that_a_person_put_aside_stays(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    folder, aside = tmp_path / "model", tmp_path / "model.old"
    write_folder(folder, "first")
    os.rename(folder, aside)
    files.recover(folder)
    assert not folder.exists()
    for text in ("second", "third"):
        write_folder(folder, text, keep=True)
    assert content(aside) == {"a": "first", "b": "first"} and content(folder) == {"a": "third", "b": "third"}


@pytest.mark.parametrize("keep", [True, False])
def test_the_working_directory_is_replaced_by_its_entries(tmp_path, monkeypatch, keep):
    folder = tmp_path / "model"
    write_folder(folder, "old")
    for name in ("notes", "more/deep"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    monkeypatch.chdir(folder)
    write_folder(".", "new", keep)
    kept = {"notes", "more"} if keep else set()
    assert {p.name for p in folder.iterdir()} == {"a", "b"} | kept and os.path.samefile(os.getcwd(), folder)
    assert (folder / "a").read_text() == "new" and (not keep or (folder / "more/deep").read_text() == "mine")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_file_that_is_replaced_survives_a_kill_at_any_moment(tmp_path):
    path = tmp_path / "weights.json"
    for number in range(1, 20):
        path.write_text("old")
        killed = killed_at(number, files.write_text, path, "new")
        assert path.read_text() in ("old", "new")
        if not killed:
            break
    assert not killed and path.read_text() == "new"


def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path):
    path, folder = tmp_path / "file.txt", tmp_path / "folder"
    path.write_text("old")
    write_folder(folder, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    with pytest.raises(RuntimeError), files.replacing_folder(folder) as partial:
        (partial / "a").write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and content(folder) == {"a": "old", "b": "old"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.txt", "folder"]


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match=r"report\.json cannot be written: No space left on device"):
        with files.replacing(tmp_path / "report.json"), open("/dev/full", "w") as full:
            full.write("x" * 10000)
    assert not list(tmp_path.iterdir())


def test_a_file_as_a_parent_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/new\.json cannot be written: Not a directory"):
        files.write_text(tmp_path / "file" / "new.json", "")


def test_a_new_folder_takes_an_empty_one_and_no_other(tmp_path):
    (tmp_path / "made").mkdir()
    with files.new_folder(tmp_path / "made") as partial:
        (partial / "a").write_text("1")
    assert content(tmp_path / "made") == {"a": "1"}
    with pytest.raises(FileExistsError, match="exists and is not empty"), files.new_folder(tmp_path / "made"):
        pass


def test_first_line():
    assert files.first_line(ValueError("\n one \n two")) == "one"
    assert files.first_line(ValueError()) == "ValueError"
    said = "Error(s) in loading state_dict for UNet:\n\tsize mismatch for conv_in.weight: [4] and [9].\n\tsize mismatch"
    assert files.first_line(RuntimeError(said)).endswith("for UNet: size mismatch for conv_in.weight: [4] and [9].")
    assert files.first_line("x" * 300, longest=10) == "x" * 10
