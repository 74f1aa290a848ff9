"""A server and its path: rivals that are given the same one, and others who write to it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import FileTimerClient, FileTimerServer
from tests.rivals import (
    assert_nobody_can_meddle,
    assert_one_of_two_starts_wins,
    endless_rubbish,
    overrun_amid_rubbish,
)
from tests.support import (
    FAR,
    Fork,
    assert_reaped_in_time,
    eventually,
    overrun,
    running,
    wait_dead,
)


def test_a3_path_of_a_running_server_is_refused(fifo_path: str, fork_worker: Fork) -> None:
    """A second server at the path is an error, and the first serves on."""
    with running(FileTimerServer(fifo_path, "first", 60)):
        inode = os.stat(fifo_path).st_ino
        with pytest.raises(FileExistsError, match=r"reads it already.*timers\.fifo"):
            FileTimerServer(fifo_path, "second")
        assert os.stat(fifo_path).st_ino == inode
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.2)
        assert_reaped_in_time(worker, worker.receive())


def test_a3_server_that_was_made_first_is_refused_too(fifo_path: str) -> None:
    """Whoever starts first has the path; the other can start once it is free again."""
    first = FileTimerServer(fifo_path, "first", 60)
    with running(FileTimerServer(fifo_path, "second", 60)) as second:
        for _ in range(2):
            with pytest.raises(FileExistsError, match="reads it already"):
                first.start()
        first.stop()
        FileTimerClient(fifo_path).acquire("s", time.time() + FAR)
        eventually(lambda: second._timers)
    with running(first):
        FileTimerClient(fifo_path).acquire("s", time.time() + FAR)
        eventually(lambda: first._timers)


def serve_until_killed(channel: Any, path: str) -> None:
    with FileTimerServer(path, "run", 60):
        channel.send("started")
        channel.recv()


def test_a3_path_of_a_server_that_was_killed_is_free(fifo_path: str, fork_worker: Fork) -> None:
    """What a killed server has left behind is replaced at once."""
    killed = fork_worker(serve_until_killed, fifo_path)
    assert killed.receive() == "started"
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert os.path.exists(fifo_path)
    with running(FileTimerServer(fifo_path, "run", 60)):
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.2)
        assert_reaped_in_time(worker, worker.receive())


def test_a4_one_of_two_simultaneous_starts_wins(fifo_path: str, fork_worker: Fork) -> None:
    """20 times here, 300 times in tests/faults."""
    assert_one_of_two_starts_wins(fifo_path, fork_worker, 20)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_c2_another_user_can_not_meddle(tmp_path: Path, fork_worker: Fork) -> None:
    """1 s here, 20 s in tests/faults."""
    assert_nobody_can_meddle(tmp_path, fork_worker, 1)


@pytest.mark.alone
def test_b3_rubbish_without_end_delays_no_deadline(fifo_path: str, fork_worker: Fork) -> None:
    """With `yes` writing into the FIFO workers are reaped, if not to the ms: see tests/faults."""
    with running(FileTimerServer(fifo_path, "run", 60)), endless_rubbish(fifo_path):
        lateness = []
        for _ in range(3):
            worker = fork_worker(overrun_amid_rubbish, fifo_path, 0.3)
            deadline = worker.receive()
            lateness.append(wait_dead(worker) - deadline)
        assert min(lateness) >= 0
        assert sorted(lateness)[1] < 1
