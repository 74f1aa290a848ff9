"""What a reaped rank has started: torchrun's agent leaves it alone, `--kill-tree` does not."""

from __future__ import annotations

import os
import re
import sys

import pytest

from tests.interop.conftest import JOBS, MARK, Job, Launch
from tests.support import eventually, kill_marked, marked_processes

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "2", "--standalone"]
TORCHRUN += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
# The processes that left_behind.py starts.
STARTED = 6


def recover(launch: Launch, *options: str) -> Job:
    """Run the job with a rank that hangs, is reaped, and is started anew."""
    command = [*TORCHRUN, str(JOBS / "left_behind.py"), "1", "outside"]
    job = launch("-m", "elastic_timer", "run", *options, "--", *command)
    assert job.wait() == 0, job.output
    assert "rank 1 has finished attempt 1" in job.output
    return job


def test_with_kill_tree_nothing_is_left(launch: Launch) -> None:
    """All are gone with their rank; at the end there is nothing to tell of."""
    job = recover(launch, "--kill-tree")
    assert marked_processes(f"{MARK}={os.environ[MARK]}") == {}
    killed = re.findall(r"Killed what worker \d+ had started: (.*)", job.output)
    assert sum(len(line.split(", ")) for line in killed) >= STARTED
    assert "COMMAND has left behind" not in job.output


def test_without_it_each_that_is_left_is_named(launch: Launch) -> None:
    """They live on, adopted by `run`, until the job is done; then the warning has them all."""
    mark = f"{MARK}={os.environ[MARK]}"
    job = recover(launch)
    left = marked_processes(mark)
    named = job.output.partition("COMMAND has left behind")[2]
    assert set(map(int, re.findall(r"^  (\d+) \(", named, re.M))) == left.keys(), job.output
    assert len(left) >= STARTED
    eventually(lambda: not kill_marked(mark))
