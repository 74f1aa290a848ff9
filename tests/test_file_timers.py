"""The timers that a file server holds, and until when."""

from __future__ import annotations

import os
import signal
import time

from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
)
from tests.support import (
    FAR,
    Event,
    Fork,
    eventually,
    overrun,
    running,
)


def test_timers_are_keyed_by_pid_and_scope(
    server: FileTimerServer, client: FileTimerClient
) -> None:
    """`_timers` maps (pid, scope) to the request; a re-acquire replaces, a release removes."""
    pid = os.getpid()
    first, second = time.time() + FAR, time.time() + 2 * FAR
    client.acquire("a", first)
    client.acquire("b", first)
    client.acquire("a", second)
    eventually(lambda: server._request_count == 3)
    eventually(lambda: len(server._timers) == 2)
    assert server._timers[(pid, "a")] == FileTimerRequest(pid, "a", second, signal.SIGKILL)
    assert (pid, "b") in server._timers
    client.release("a")
    client.release("never acquired")
    eventually(lambda: server._request_count == 5)
    eventually(lambda: list(server._timers) == [(pid, "b")])


def test_register_expire_and_clear_by_hand(fifo_path: str) -> None:
    """The three methods work on a server that was not started, as upstream's do."""
    server = FileTimerServer(fifo_path, "run")
    now, pid = time.time(), os.getpid()
    due = FileTimerRequest(pid, "due", now + 50, 9)
    later = FileTimerRequest(pid, "later", now + 200, 9)
    group = FileTimerRequest(-3, "group", now + 50, 9)
    server.register_timers([due, later, group])
    assert server.get_expired_timers(now + 49) == {}
    assert server.get_expired_timers(now + 51) == {pid: [due], -3: [group]}
    server.clear_timers({-3})
    assert set(server._timers) == {(pid, "due"), (pid, "later")}
    server.register_timers([FileTimerRequest(pid, "due", -1)])
    assert list(server._timers) == [(pid, "later")]
    assert server._request_count == 4
    server.stop()


def test_clear_timers_also_drops_those_of_processes_that_are_gone(
    fifo_path: str, fork_worker: Fork
) -> None:
    """`clear_timers` of nobody in particular leaves only the timers of processes that run."""
    server = FileTimerServer(fifo_path, "run")
    worker = fork_worker(overrun, FileTimerClient(fifo_path, 0), 60)
    pids = worker.pid, os.getpid()
    server.register_timers([FileTimerRequest(pid, "s", time.time() + FAR, 9) for pid in pids])
    assert len(server._timers) == 2
    worker.process.kill()
    worker.wait()
    server.clear_timers(set())
    assert list(server._timers) == [(os.getpid(), "s")]
    server.stop()


def test_is_process_running(fork_worker: Fork, fifo_path: str) -> None:
    """A process runs until it has ended; it can be asked of the class."""
    worker = fork_worker(overrun, FileTimerClient(fifo_path), 60)
    assert FileTimerServer.is_process_running(os.getpid())
    assert FileTimerServer.is_process_running(worker.pid)
    worker.process.kill()
    worker.wait()
    assert not FileTimerServer.is_process_running(worker.pid)


def test_get_scopes(fifo_path: str) -> None:
    """The scopes of requests, in their order."""
    server = FileTimerServer(fifo_path, "run")
    assert server._get_scopes([FileTimerRequest(1, name, 0) for name in "ba"]) == ["b", "a"]
    server.stop()


def test_exit_of_a_worker_drops_its_timers_unsignalled(fifo_path: str, fork_worker: Fork) -> None:
    """A worker that exits without releasing leaves no timer; only it is affected; no event."""
    events: list[Event] = []
    server = FileTimerServer(
        fifo_path, "run", 10, log_event=lambda name, request: events.append((name, request))
    )
    with running(server):
        workers = [fork_worker(overrun, FileTimerClient(fifo_path), 60) for _ in range(2)]
        for worker in workers:
            worker.receive()
        eventually(lambda: len(server._timers) == 2)
        os.kill(workers[0].pid, signal.SIGTERM)
        eventually(lambda: list(server._timers) == [(workers[1].pid, "overrun")])
        assert workers[0].wait() == -signal.SIGTERM
        assert events == [("watchdog started", None)]
