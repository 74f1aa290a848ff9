"""A job whose timers are optional outlives its server."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from tests.interop.conftest import JOBS, Launch, read_lines
from tests.support import eventually

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")

RANKS = 2
TORCHRUN = f'"{sys.executable}" -m torch.distributed.run --standalone --local-addr 127.0.0.1'


def test_run_is_killed_in_the_middle(launch: Launch, tmp_path: Path) -> None:
    """Without `run` the job ends well, at its first attempt; each rank has warned once of it."""
    record, timers, status = tmp_path / "record", tmp_path / "timers", tmp_path / "status"
    record.touch()
    script = f'{TORCHRUN} --nproc-per-node {RANKS} "{JOBS / "optional.py"}" "{tmp_path}"'
    # Of torchrun itself nobody is told any more how it ended.
    shell = ["sh", "-c", f'{script}; echo $? > "{status}.new"; mv "{status}.new" "{status}"']
    job = launch("-m", "elastic_timer", "run", "--timer-file", str(timers), "--", *shell)
    eventually(lambda: len(read_lines(record)) == RANKS, 60, f"{job.output} is not half-way")
    job.process.kill()
    assert job.wait() == -signal.SIGKILL
    timers.unlink()  # It has been left there, as nobody could remove it.
    (tmp_path / "go").touch()
    eventually(status.exists, 60, f"{job.output} does not end")
    assert status.read_text() == "0\n", job.output
    finished = [line for line in read_lines(record) if line["event"] == "finished"]
    warned = re.findall(r"^process (\d+): Blocks run without deadlines", job.output, re.M)
    assert sorted(map(int, warned)) == sorted(line["pid"] for line in finished)
    assert len(finished) == RANKS
    assert max(line["slowest"] for line in finished) < 1
