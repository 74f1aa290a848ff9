"""What becomes of a worker that was signalled, or only reported, and lives on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from elastic_timer import FileTimerClient, FileTimerRequest, FileTimerServer, expires
from elastic_timer._server import server as server_module
from tests.servers import Link, LooksAway
from tests.support import (
    FAR,
    Child,
    Fork,
    assert_reaped_in_time,
    eventually,
    is_alive,
    overrun,
    running,
    wait_dead,
    wait_to_be_killed,
)


def acquire(pid: int, scope: str, after: float, number: int = signal.SIGKILL) -> FileTimerRequest:
    """A request in the name of a worker."""
    return FileTimerRequest(pid, scope, time.time() + after, number)


def release(pid: int, scope: str) -> FileTimerRequest:
    return FileTimerRequest(pid, scope, -1)


def ignore_sigterm(channel: Any) -> None:
    signal.signal(signal.SIGTERM, lambda *_: channel.send("SIGTERM"))
    channel.send("ready")
    while True:
        signal.pause()


# Only what has expired is dropped (A2) -----------------------------------------------------------


@pytest.mark.parametrize("number", [0, -1, signal.SIGTERM])
def test_a2_report_leaves_the_other_timers_armed(
    number: int, fifo_path: str, fork_worker: Fork
) -> None:
    """A report, or a soft signal that is ignored, and later SIGKILL: both come."""
    worker = fork_worker(ignore_sigterm)
    assert worker.receive() == "ready"
    started = time.monotonic()
    with running(FileTimerServer(fifo_path, "run")) as server:
        server.register_timers(
            [acquire(worker.pid, "soft", 0.3, number), acquire(worker.pid, "hard", 1.0)]
        )
        if number > 0:
            assert worker.receive() == "SIGTERM"
        eventually(lambda: list(server._timers) == [(worker.pid, "hard")])
        assert_reaped_in_time(worker, started + 1.0)


# After a soft signal (A7) -------------------------------------------------------------------------


def leave_on_sigterm(channel: Any, client: FileTimerClient) -> None:
    """Obeys SIGTERM by leaving the block, and goes on with other work."""

    def leave(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGTERM, leave)
    try:
        with expires(after=0.2, scope="obeys", client=client):
            time.sleep(FAR)
    except TimeoutError:
        channel.send("left")
    channel.recv()
    channel.send("lives")


@pytest.mark.parametrize("again", [False, True])
def test_a7_worker_that_obeys_is_not_killed(fifo_path: str, fork_worker: Fork, again: bool) -> None:
    """One that leaves the block, or enters it anew, is no longer followed by `kill_after`."""
    with running(FileTimerServer(fifo_path, "run", kill_after=1.0)) as server:
        client = FileTimerClient(fifo_path, signal.SIGTERM)
        worker = fork_worker(leave_on_sigterm, client)
        assert worker.receive() == "left"
        if again:
            client._send_request(acquire(worker.pid, "obeys", FAR))
        signalled = time.monotonic()
        stubborn = fork_worker(ignore_sigterm)
        assert stubborn.receive() == "ready"
        server.register_timers([acquire(stubborn.pid, "block", 0, signal.SIGTERM)])
        # Its end tells that the second of grace is over for both.
        assert stubborn.wait(10) == -signal.SIGKILL
        assert time.monotonic() > signalled + 1.0
        assert worker.ask("still there?") == "lives"


def test_a7_nothing_of_a_round_outlives_a_stop(fifo_path: str, fork_worker: Fork) -> None:
    """A worker that was signalled before `stop()` is not killed after the next `start()`."""
    server = FileTimerServer(fifo_path, "run", kill_after=0.5)
    worker = fork_worker(ignore_sigterm)
    assert worker.receive() == "ready"
    with running(server):
        server.register_timers([acquire(worker.pid, "block", 0, signal.SIGTERM)])
        assert worker.receive() == "SIGTERM"
    with running(server):
        server.register_timers([acquire(worker.pid, "block", FAR)])
        other = fork_worker(ignore_sigterm)
        assert other.receive() == "ready"
        server.register_timers([acquire(other.pid, "block", 0, signal.SIGTERM)])
        assert other.wait(10) == -signal.SIGKILL
        assert is_alive(worker)


# A hook that does not kill (A8) -------------------------------------------------------------------


def test_a8_worker_that_was_only_alerted_of_is_heard_again(
    fifo_path: str, fork_worker: Fork
) -> None:
    """A `_reap_worker` that alerts and says it is done is called for every overrun."""
    alerts: list[int] = []

    class Alerting(FileTimerServer):
        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            alerts.append(worker_pid)
            return True

    worker = fork_worker(wait_to_be_killed)
    with running(Alerting(fifo_path, "run")) as server:
        server.register_timers([acquire(worker.pid, "other", FAR)])
        for count in range(1, 4):

            def overruns(count: int = count) -> bool:
                if len(alerts) < count and not server._timers.get((worker.pid, "block")):
                    # Not taken for a moment after each alert: it could have been meant to die.
                    server.register_timers([acquire(worker.pid, "block", 0)])
                return len(alerts) >= count

            eventually(overruns)
        assert (worker.pid, "other") in server._timers
    assert set(alerts) == {worker.pid}


# The server's own process (A9) --------------------------------------------------------------------


def test_a9_reap_self_signals_once_for_each_reap(
    spawn: Callable[..., Child], fifo_path: str
) -> None:
    """A server that signals itself, too, does so as often as it has reaped."""
    child = spawn(
        """
        import os, signal, subprocess, sys, time, elastic_timer
        counted = []
        signal.signal(signal.SIGUSR1, lambda *_: counted.append(1))
        path = sys.argv[1]
        with elastic_timer.FileTimerServer(path, "run", 0.02, reap_self=True) as server:
            for reaped in (1, 2):
                worker = subprocess.Popen(["sleep", "600"])
                server.register_timers([elastic_timer.FileTimerRequest(
                    worker.pid, "block", time.time(), signal.SIGUSR1)])
                assert worker.wait() == -signal.SIGUSR1
                rounds = server.get_last_progress_time
                end = time.monotonic() + 20
                while len(counted) < reaped and time.monotonic() < end:
                    time.sleep(0.01)
                # Twenty rounds in which nothing is reaped.
                time.sleep(0.4)
                print(len(counted), flush=True)
        """,
        fifo_path,
    )
    assert child.readline() == "1"
    assert child.readline() == "2"
    assert child.wait() == 0, child.stderr_text()


# A pid that was given away while nobody looked (A11) ----------------------------------------------


@pytest.mark.usefixtures("_chooses_pids")
def test_a11_reused_pid_is_a_new_worker(
    fifo_path: str, fork_worker: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new process of that number wrote while the server looked away: it is watched."""
    client = FileTimerClient(fifo_path)
    old = fork_worker(wait_to_be_killed)
    with running(LooksAway(fifo_path)) as server:
        client._send_request(acquire(old.pid, "old", FAR))
        eventually(lambda: server._timers)
        with server.given_away(old) as new:
            client._send_request(acquire(new.pid, "new", 0.5))
            server.look()
            assert new.wait(20) == -signal.SIGKILL


def test_a11_timers_from_before_a_stop_are_not_a_new_workers(
    fifo_path: str, fork_worker: Fork
) -> None:
    """Those of a stopped server are dropped, also where a worker of that number comes first."""
    worker = fork_worker(wait_to_be_killed)
    server = FileTimerServer(fifo_path, "run")
    with running(server):
        server.register_timers([acquire(worker.pid, "old", 0.3)])
    server.register_timers([acquire(worker.pid, "new", FAR)])
    with running(server):
        other = fork_worker(overrun, FileTimerClient(fifo_path), 0.5)
        assert_reaped_in_time(other, other.receive())
        assert is_alive(worker)
        eventually(lambda: list(server._timers) == [(worker.pid, "new")])


def test_release_of_another_block_does_not_forgive(fifo_path: str, fork_worker: Fork) -> None:
    """One that leaves some other block than that it was signalled for is killed as announced."""
    with running(FileTimerServer(fifo_path, "run", kill_after=0.3)) as server:
        worker = fork_worker(ignore_sigterm)
        assert worker.receive() == "ready"
        server.register_timers([acquire(worker.pid, "block", 0, signal.SIGTERM)])
        assert worker.receive() == "SIGTERM"
        server.register_timers([release(worker.pid, "other"), release(os.getpid(), "block")])
        assert worker.wait(10) == -signal.SIGKILL


def test_release_while_another_is_reaped(
    file_link: Link, fork_worker: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are due at once; what is written while the first is signalled saves the second."""
    # However short a time ago it was read.
    monkeypatch.setattr(server_module, "_MOMENT", 20.0)
    pids = [fork_worker(wait_to_be_killed).pid for _ in range(2)]
    reaped: list[int] = []

    class Server(FileTimerServer):
        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            reaped.append(worker_pid)
            for pid in pids:
                file_link.put(pid, "block", -1)
            return super()._reap_worker(worker_pid, signal)

    server = Server(file_link.path, "run")
    server.start()
    for pid in pids:
        file_link.put(pid, "block", 1.0)
    server.run_once()  # The last round waits for all evidence, and then sees to all.
    assert len(reaped) == 1
    eventually(lambda: [is_alive(pid) for pid in pids].count(False) == 1)


def test_end_while_another_is_reaped(file_link: Link, fork_worker: Fork) -> None:
    """Two are due at once; the second has ended by the time that the first is signalled."""
    workers = [fork_worker(wait_to_be_killed) for _ in range(2)]
    reaped: list[int] = []

    class Server(FileTimerServer):
        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            reaped.append(worker_pid)
            for worker in workers:
                os.kill(worker.pid, signal)
                wait_dead(worker)
            return True

    server = Server(file_link.path, "run")
    server.start()
    for worker in workers:
        file_link.put(worker.pid, "block", 1.0)
    server.run_once()
    assert len(reaped) == 1
