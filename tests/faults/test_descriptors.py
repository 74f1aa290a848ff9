"""No descriptors left: in the server's process, and in a worker's."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from elastic_timer import TimerClient, expires
from tests.faults.support import deaths, use_up_descriptors
from tests.servers import Link, ServerProcess
from tests.support import (
    ALLOWED_LATENESS,
    FAR,
    Fork,
    assert_reaped_in_time,
    eventually,
    is_alive,
    overrun,
)

LIMIT = 64
WORKERS = 200


def limit_descriptors() -> None:
    """Let this process have few descriptors, as a small container might."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT))


def test_more_workers_than_descriptors(
    link: Link,
    serve: Callable[..., ServerProcess],
    fork_worker: Fork,
    bystanders: Callable[[int], list[int]],
) -> None:
    """With 64 descriptors for 200 workers those who overrun are killed in time, no other is."""
    server = serve(link.server, limit_descriptors)
    pids = bystanders(WORKERS)
    for pid in pids:
        link.put(pid, "block", time.time() + FAR)
    eventually(lambda: server.ask("len(server._timers)") == WORKERS)
    stuck, patient = pids[::2], pids[1::2]
    deadline = time.monotonic() + 0.3
    for pid in stuck:
        link.put(pid, "block", time.time() + 0.3)
    ends = deaths(stuck, timeout=20)
    assert min(ends.values()) >= deadline
    assert max(ends.values()) < deadline + 2 * ALLOWED_LATENESS  # The last of a hundred.
    assert all(map(is_alive, patient))
    assert server.log().count("no descriptors left") == 1
    # The exits of those that have no descriptor are noticed too.
    for pid in patient:
        os.kill(pid, signal.SIGTERM)
    eventually(lambda: not server.ask("len(server._timers)"))
    # With descriptors to be had again all is as before.
    worker = fork_worker(overrun, link.client, 0.2)
    assert_reaped_in_time(worker, worker.receive())
    server.stop()


def start_without_descriptors(channel: Any, link: Link, left: int) -> None:
    """A server's process that has `left` descriptors to start with, and plenty later."""
    server = link.server()
    taken = use_up_descriptors(LIMIT)
    for _ in range(left):
        os.close(taken.pop())
    try:
        server.start()
    except OSError as error:
        channel.send(error.errno)
    else:
        channel.send(0)
    channel.recv()
    for descriptor in taken:
        os.close(descriptor)
    server.start()
    channel.send("started")
    channel.recv()
    stopping = time.monotonic()
    server.stop()
    channel.send(time.monotonic() - stopping)


@pytest.mark.parametrize("left", range(6))
def test_server_that_starts_without_descriptors(link: Link, fork_worker: Fork, left: int) -> None:
    """`start()` raises, or the server works once it has descriptors: it is never a silent one."""
    server = fork_worker(start_without_descriptors, link, left)
    problem = server.receive()
    assert problem in (0, errno.EMFILE)
    if problem and link.kind == "file":
        with pytest.raises(BrokenPipeError):
            link.client.acquire("into the void", time.time() + FAR)
    assert server.ask("have descriptors again") == "started"
    worker = fork_worker(overrun, link.client, 0.2)
    assert_reaped_in_time(worker, worker.receive())
    assert server.ask("stop") < ALLOWED_LATENESS


def enter_without_descriptors(channel: Any, client: TimerClient, soon: bool) -> None:
    """A worker that has no descriptor left, or has one again after a moment."""
    taken = use_up_descriptors(LIMIT)
    if soon:
        signal.signal(signal.SIGALRM, lambda *_: os.close(taken[0]))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with expires(after=FAR, client=client):
            channel.send("entered")
    except BrokenPipeError as error:
        channel.send(str(error))


@pytest.mark.parametrize("soon", [True, False])
def test_worker_without_descriptors(file_link: Link, fork_worker: Fork, soon: bool) -> None:
    """A worker that has none waits about a second for one, then is told what it lacks."""
    with file_link.server():
        worker = fork_worker(enter_without_descriptors, file_link.client, soon)
        outcome = worker.receive()
        assert outcome == "entered" if soon else os.strerror(errno.EMFILE) in outcome
        assert worker.wait() == 0
