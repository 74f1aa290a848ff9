"""The reap is the cure: a job with a real process group goes on with its next attempt.

Each way of starting torchrun that the documentation recommends is tried once or twice here. For
figures, also of the ways that fail: `python -m tests.interop.recovery`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import pytest

from tests.interop.conftest import MARK, Launch
from tests.interop.recovery import RECOMMENDED, RUN, Training
from tests.support import REPOSITORY, marked_processes

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")

TRIED = [
    ("standalone", "outside"),
    ("standalone", "item"),
    ("one node", "inside"),
    ("one node", "loader"),
    ("c10d", "outside"),
    ("c10d", "loader"),
]


@pytest.mark.parametrize(("way", "where"), TRIED)
def test_recovers(way: str, where: str, tmp_path: Path, free_port: int) -> None:
    """All overrun, as they wait for the one that hangs; the restarted ranks find each other.

    Nothing of the first attempt is left, not even the loader's process that hangs.
    """
    job = Training(RECOMMENDED[way], where, tmp_path, free_port, "--kill-tree")
    with contextlib.closing(job):
        assert set(job.wait(90)) == {0}, job.output
        assert job.attempts() == 2, job.output
        assert marked_processes(f"{MARK}={os.environ[MARK]}") == {}, job.output


def test_what_is_left_is_named(tmp_path: Path, free_port: int) -> None:
    """Without `--kill-tree` the loader's process may be left; the log of its node says so."""
    job = Training(RECOMMENDED["one node"], "loader", tmp_path, free_port)
    with contextlib.closing(job):
        assert set(job.wait(90)) == {0}, job.output
        left = marked_processes(f"{MARK}={os.environ[MARK]}")
        assert all(f"\n  {pid} (" in job.output for pid in left), job.output


def test_every_way_is_tried() -> None:
    """No way is recommended that is not tested."""
    assert {way for way, _ in TRIED} == set(RECOMMENDED)


def test_the_users_own_value_wins(launch: Launch) -> None:
    """`run` sets what makes the restart reliable; what the user has set stays."""
    show = "import os; print(os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'])"
    for env, expected in (({}, "1"), ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}, "0")):
        job = launch(*RUN, "--", sys.executable, "-c", show, env=env)
        assert job.wait() == 0, job.output
        assert job.output.strip() == expected


def test_documented() -> None:
    """The page on torchrun names the variable."""
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in (REPOSITORY / "docs" / "torchrun.md").read_text()
