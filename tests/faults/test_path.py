"""What others do at a server's path, for longer and to closer bounds than in the suite."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rivals import (
    assert_nobody_can_meddle,
    assert_one_of_two_starts_wins,
    endless_rubbish,
    overrun_amid_rubbish,
)
from tests.servers import Link, ServerProcess
from tests.support import Fork, wait_dead


def test_a4_one_of_two_simultaneous_starts_wins(fifo_path: str, fork_worker: Fork) -> None:
    """300 times: never both, never none, and the loser is told why."""
    assert_one_of_two_starts_wins(fifo_path, fork_worker, 300)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_c2_another_user_can_not_meddle(tmp_path: Path, fork_worker: Fork) -> None:
    """For 20 s another user, who owns the folder, tries to get at root's files and processes."""
    assert_nobody_can_meddle(tmp_path, fork_worker, 20)


@pytest.mark.alone
def test_b3_rubbish_without_end_delays_no_deadline(
    file_link: Link, serve: Callable[..., ServerProcess], fork_worker: Fork
) -> None:
    """Less than 100 ms in the median."""
    server = serve(file_link.server)
    with endless_rubbish(file_link.path):
        lateness = []
        for _ in range(9):
            worker = fork_worker(overrun_amid_rubbish, file_link.path, 0.3)
            deadline = worker.receive()
            lateness.append(wait_dead(worker) - deadline)
    assert min(lateness) >= 0
    assert statistics.median(lateness) < 0.1
    server.stop()
