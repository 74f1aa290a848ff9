"""What a reaped rank has started: torchrun's agent leaves it alone, `--kill-tree` does not."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import pytest

from tests.interop.conftest import MARK
from tests.interop.recovery import RECOMMENDED, Training
from tests.support import eventually, kill_marked, marked_processes

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")

# The processes that left_behind.py starts.
STARTED = 6


def recover(folder: Path, port: int, *options: str) -> str:
    """Run the job with a rank that hangs, is reaped, and is started anew; its output."""
    way = RECOMMENDED["standalone"]
    job = Training(way, "outside", folder, port, *options, job="left_behind.py")
    with contextlib.closing(job):
        assert job.wait(90) == [0], job.output
        assert job.attempts() == 2, job.output
    return job.output


def test_with_kill_tree_nothing_is_left(tmp_path: Path, free_port: int) -> None:
    """All are gone with their rank; at the end there is nothing to tell of."""
    output = recover(tmp_path, free_port, "--kill-tree")
    assert marked_processes(f"{MARK}={os.environ[MARK]}") == {}
    killed = re.findall(r"Killed what worker \d+ \(rank \d\) had started: (.*)", output)
    assert sum(len(line.split(", ")) for line in killed) >= STARTED, output
    assert "COMMAND has left behind" not in output


def test_without_it_each_that_is_left_is_named(tmp_path: Path, free_port: int) -> None:
    """Some live on, adopted by `run`, until the job is done; then the warning has them all."""
    mark = f"{MARK}={os.environ[MARK]}"
    output = recover(tmp_path, free_port)
    left = marked_processes(mark)
    named = output.partition("COMMAND has left behind")[2]
    assert set(map(int, re.findall(r"^  (\d+) \(", named, re.M))) == left.keys(), output
    # torchrun ends the session of a rank that it finds alive: it depends on who is reaped first.
    assert left
    eventually(lambda: not kill_marked(mark))
