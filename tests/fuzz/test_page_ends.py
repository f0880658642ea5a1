"""No kernel reads beyond the end of a tensor: page_ends.py, in a process of its own, which a fault would kill."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_is_read_beyond_a_tensor(seed):
    command = [sys.executable, str(HERE / "page_ends.py"), str(seed), "150"]
    found = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-400:] + found.stderr[-2000:]
    assert found.stdout.count("\n") == 150
