"""A worker's pid that another process has now, where the server holds no descriptor of the worker.

With descriptors, the usual case, this is D7 in `test_differences.py`.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_timer import FileTimerServer, TimerClient
from tests.faults.support import use_up_descriptors
from tests.servers import Link, Serve
from tests.support import (
    FAR,
    LAST_PID,
    Fork,
    assert_reaped_in_time,
    eventually,
    is_alive,
    overrun,
    start_with_pid,
)

# They would take the pids from each other.
pytestmark = pytest.mark.xdist_group("choose pids")


def without_pidfd() -> None:
    """Make this process one of a system that has no pidfd."""
    del os.pidfd_open


@pytest.fixture
def reuse_pid() -> Iterator[Callable[..., int]]:
    """Gives a pid that is free to a bystander; skips where the kernel does not let us."""
    processes = []

    def reuse(pid: int, **options: Any) -> int:
        process = start_with_pid(pid, **options)
        if process is None:
            pytest.skip(f"this system does not let a process choose a pid through {LAST_PID}")
        processes.append(process)
        return process.pid

    yield reuse
    for process in processes:
        process.kill()
        process.wait()


def acquire_and_leave(channel: Any, client: TimerClient, after: float) -> None:
    """A worker that leaves, when told, with its timer still running."""
    client.acquire("never released", time.time() + after)
    channel.send(time.monotonic() + after)
    channel.recv()


@pytest.mark.parametrize("prepare", [without_pidfd, use_up_descriptors])
def test_bystander_with_a_reused_pid_lives(
    link: Link,
    serve: Serve,
    fork_worker: Fork,
    reuse_pid: Callable[..., int],
    prepare: Callable[[], object],
) -> None:
    """Held by pid and start time, a worker is not mistaken for the next process of its number."""
    server = serve(link.server)
    server.ask("prepare()", prepare=prepare)
    worker = fork_worker(acquire_and_leave, link.client, 0.5)
    deadline = worker.receive()
    eventually(lambda: server.holds(worker.pid))
    server.pause()  # It can see neither the exit nor the new process before the deadline.
    worker.send("leave")
    assert worker.wait() == 0
    bystander = reuse_pid(worker.pid)
    eventually(lambda: time.monotonic() > deadline)
    server.go_on()
    eventually(lambda: not server.holds(worker.pid))
    sentinel = fork_worker(overrun, link.client, 0.2)
    assert_reaped_in_time(sentinel, sentinel.receive())
    assert is_alive(bystander)


def test_bystanders_group_with_a_reused_number_lives(
    file_link: Link, serve: Serve, fork_worker: Fork, reuse_pid: Callable[..., int]
) -> None:
    """A process group is held by its leader's start: a later group of its number is not it."""
    server = serve(file_link.server)
    leader = subprocess.Popen(["sleep", str(FAR)], start_new_session=True)
    deadline = time.monotonic() + 0.5
    file_link.put(-leader.pid, "group", time.time() + 0.5)
    eventually(lambda: server.holds(-leader.pid))
    server.pause()
    leader.kill()
    leader.wait()
    bystander = reuse_pid(leader.pid, start_new_session=True)
    eventually(lambda: time.monotonic() > deadline)
    server.go_on()
    eventually(lambda: not server.holds(-leader.pid))
    assert is_alive(bystander)


class Misled(FileTimerServer):
    """A server that is told by its platform that whoever was there is still there."""

    @staticmethod
    def is_process_running(pid: int) -> bool:
        return True


def test_forged_reuse_signals_no_number(file_link: Link, serve: Serve, fork_worker: Fork) -> None:
    """Though the number seems to run, a signal goes to the process that was held, which is gone."""
    server = serve(
        lambda: Misled(file_link.path, "run", 60),
        # Whoever had the number now would be hit by this.
        lambda: setattr(os, "kill", lambda pid, number: os._exit(99)),
    )
    worker = fork_worker(acquire_and_leave, file_link.client, 0.5)
    worker.receive()
    eventually(lambda: server.holds(worker.pid))
    worker.send("leave")
    assert worker.wait() == 0
    eventually(lambda: not server.holds(worker.pid))
    sentinel = fork_worker(overrun, file_link.client, 0.2)
    assert_reaped_in_time(sentinel, sentinel.receive())
    server.stop()
