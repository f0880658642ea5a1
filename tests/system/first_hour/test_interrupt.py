"""Ctrl-C: one line, whenever it comes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from ldmfast.commands import cli
from ldmfast.commands.cli import Interrupts


def interrupted(after, folder):
    """A real run, interrupted so many seconds after its parser was there."""
    code = "import sys; from ldmfast.commands import cli; print('ready', flush=True); cli.entry()"
    asked = ["sample", "a cat", "-o", str(folder / "a.png"), "--steps", "1000", "--quiet"]
    command = [sys.executable, "-c", code, *asked]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize("after", [0.15, 0.6, 1.3, 2.2, 6])
def test_at_any_moment_it_is_one_line(after, tmp_path):
    assert interrupted(after, tmp_path) == (130, "ldmfast: stopped\n")
    assert list(tmp_path.iterdir()) == []


def test_what_an_import_makes_of_it_is_still_that(monkeypatch, capsys):
    def run(_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ImportError("numpy could not be imported") from error

    monkeypatch.setattr("ldmfast.commands.sample.run", run)
    assert cli.main(["sample", "a cat"]) == 130
    assert capsys.readouterr().err == "ldmfast: stopped\n"


def test_complaints_of_what_cannot_be_raised_are_held_back_only_then(monkeypatch):
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    with Interrupts() as interrupts:
        sys.unraisablehook("before")
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        sys.unraisablehook("after")
    assert interrupts.stopping and heard == ["before"]


def test_the_handlers_that_were_there_come_back():
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before


def test_a_reader_that_has_seen_enough_is_no_mistake():
    command = f"{sys.executable} -m ldmfast sample --list | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.startswith("what ")
