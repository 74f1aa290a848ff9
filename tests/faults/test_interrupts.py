"""A signal handler that interrupts whatever a process is doing, a thousand times a second."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from elastic_timer import TimerClient, expires
from tests.servers import Link, Serve
from tests.support import FAR, Fork, assert_reaped_in_time, eventually, overrun

PAIRS = 1000
INTERVAL = 0.001

interrupts = 0


def count(*_: object) -> None:
    """Count how often this process was interrupted."""
    global interrupts
    interrupts += 1


def storm() -> None:
    """Have every system call of this process interrupted; none is restarted by the kernel."""
    signal.signal(signal.SIGALRM, count)
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, INTERVAL, INTERVAL)


def storm_on_other_threads() -> None:
    """The same for the threads that are started, which the main thread leaves it to."""
    storm()
    threading.Thread.start = _start_then_block  # type: ignore[method-assign, assignment]


_start = threading.Thread.start


def _start_then_block(thread: threading.Thread) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    _start(thread)  # It inherits the mask of the one who starts it.
    if threading.current_thread() is threading.main_thread():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})


def send_pairs_in_a_storm(channel: Any, client: TimerClient) -> None:
    """A worker that is in and out of a block all the time, interrupted at any point."""
    storm()
    for _ in range(PAIRS):
        with expires(after=FAR, scope="short", client=client):
            pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    channel.send(interrupts)
    channel.recv()


def overrun_in_a_storm(channel: Any, client: TimerClient, after: float) -> None:
    """A worker that overruns its block, interrupted all the while."""
    storm()
    overrun(channel, client, after)


@pytest.mark.parametrize("prepare", [storm, storm_on_other_threads])
def test_interrupted_server(
    link: Link, serve: Serve, fork_worker: Fork, prepare: Callable[[], None]
) -> None:
    """A server whose system calls are all interrupted counts every request, and reaps in time."""
    server = serve(link.server, prepare)
    sender = fork_worker(send_pairs_in_a_storm, link.client)
    patient = fork_worker(overrun, link.client, FAR)
    patient.receive()
    for _ in range(3):
        worker = fork_worker(overrun_in_a_storm, link.client, 0.3)
        assert_reaped_in_time(worker, worker.receive())
    assert sender.receive() > 0
    eventually(lambda: server.ask("list(server._timers)") == [(patient.pid, "overrun")])
    if link.kind == "file":
        assert server.ask("server._request_count") == 2 * PAIRS + 4
    assert "Error" not in server.log()
    server.stop()


def wait_in_a_storm(channel: Any, client: TimerClient) -> None:
    """A worker that sends until the pipe is full, and reports how long it then waited."""
    storm()
    started = time.monotonic()
    try:
        while True:
            client.acquire("s", time.time() + FAR)
            started = time.monotonic()
    except BrokenPipeError:
        channel.send(time.monotonic() - started)


def test_interrupted_client_keeps_its_patience(link: Link, serve: Serve, fork_worker: Fork) -> None:
    """Interrupts make a client neither give up early on a full pipe nor wait much longer."""
    server = serve(link.server)
    server.pause()
    worker = fork_worker(wait_in_a_storm, link.client)
    assert 0.9 < worker.receive(timeout=60) < 3
    server.go_on()
    server.stop()
