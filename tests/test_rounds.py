"""What a round does with workers that do not go the usual way."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from elastic_timer import FileTimerClient, FileTimerRequest, FileTimerServer, expires
from elastic_timer._server import server as _server
from elastic_timer._server.process import ProcessHandle
from elastic_timer.debug_info_logging import add_debug_info_handler, remove_debug_info_handler
from tests.servers import Link
from tests.support import (
    FAR,
    Fork,
    assert_reaped_in_time,
    eventually,
    is_alive,
    overrun,
    running,
    wait_dead,
    wait_to_be_killed,
)


def ignore_and_overrun(channel: Any, client: FileTimerClient, after: float) -> None:
    """A worker that overruns, and does not mind SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    overrun(channel, client, after)


def overrun_at_work(channel: Any, client: FileTimerClient, after: float) -> None:
    """A worker that overruns in a loop, at a low priority."""
    os.nice(10)
    channel.send(time.monotonic() + after)
    with expires(after=after, client=client):
        while True:
            pass


# The hook that signals --------------------------------------------------------------------------


def test_hook_that_raises_is_called_again(
    fifo_path: str, fork_worker: Fork, client: FileTimerClient, caplog: pytest.LogCaptureFixture
) -> None:
    """What `_reap_worker` raises is logged, others are reaped, and the worker is tried again."""

    class Raising(FileTimerServer):
        victims: tuple[int, ...] = ()

        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            if worker_pid in self.victims:
                raise SystemExit("a subclass's error")
            return super()._reap_worker(worker_pid, signal)

    with running(Raising(fifo_path, "run", 0.05)) as server:
        worker = fork_worker(overrun, client, 0.3)
        server.victims = (worker.pid,)
        worker.receive()
        eventually(lambda: f"Error signalling worker {worker.pid}" in caplog.text)
        other = fork_worker(overrun, client, 0.1)
        assert_reaped_in_time(other, other.receive())
        assert is_alive(worker)
        server.victims = ()
        assert worker.wait(5) == -signal.SIGKILL
    assert "a subclass's error" in caplog.text


def test_reap_worker_signals_neither_the_server_nor_by_a_wrong_number(
    fifo_path: str, fork_worker: Fork, caplog: pytest.LogCaptureFixture
) -> None:
    """The hook returns False, and logs why: the server's own pid, and what the system refuses."""
    worker = fork_worker(wait_to_be_killed)
    with running(FileTimerServer(fifo_path, "run")) as server:
        assert server._reap_worker(os.getpid(), 0) is False
        assert server._reap_worker(worker.pid, 1000) is False
    refused, failed = (record.getMessage() for record in caplog.records)
    assert refused == f"Refused to signal {os.getpid()}: it is the server's own process"
    assert failed.startswith(f"Worker {worker.pid} can't be sent signal 1000: [Errno ")
    assert is_alive(worker)


def test_hook_may_name_a_worker_that_never_asked(fifo_path: str, fork_worker: Fork) -> None:
    """A `get_expired_timers` of somebody's may add a process: it is killed like the others."""

    class Adding(FileTimerServer):
        added: tuple[int, ...] = ()

        def get_expired_timers(self, deadline: float) -> dict[int, list[FileTimerRequest]]:
            timers = {
                pid: [FileTimerRequest(pid, "added", deadline, signal.SIGKILL)]
                for pid in self.added
                if is_alive(pid)
            }
            return {**super().get_expired_timers(deadline), **timers}

    events: list[str] = []
    worker = fork_worker(wait_to_be_killed)
    server = Adding(fifo_path, "run", 0.05, log_event=lambda name, _: events.append(name))
    with running(server):
        server.added = (worker.pid,)
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: "kill worker process" in events)


# Requests that arrive during a round -------------------------------------------------------------


def test_overdue_timer_from_another_thread(link: Link, fork_worker: Fork) -> None:
    """Registered while the server waits, it is looked at now, not at the end of the wait."""
    with running(link.server(60)) as server:
        for _ in range(3):
            worker = fork_worker(wait_to_be_killed)
            overdue = time.time() - 1
            server.register_timers([FileTimerRequest(worker.pid, "block", overdue, signal.SIGKILL)])
            assert worker.wait(5) == -signal.SIGKILL


def test_requests_that_arrive_between_two_reaps(
    fifo_path: str, fork_worker: Fork, client: FileTimerClient
) -> None:
    """One that is overdue is not put off, and one of a worker that was left alone counts."""
    reported, stuck, late = (fork_worker(wait_to_be_killed) for _ in range(3))
    now = time.time()

    def send_more(name: str, request: FileTimerRequest | None) -> None:
        if name == "timer expired" and request is not None and request.scope_id == "only reported":
            client._send_request(FileTimerRequest(reported.pid, "next", now + FAR, signal.SIGKILL))
            client._send_request(FileTimerRequest(late.pid, "overdue", now - 9, signal.SIGKILL))

    with running(FileTimerServer(fifo_path, "run", 60, log_event=send_more)) as server:
        server.register_timers(
            [
                FileTimerRequest(reported.pid, "only reported", now - 2),
                FileTimerRequest(stuck.pid, "stuck", now - 1, signal.SIGKILL),
            ]
        )
        assert stuck.wait(5) == -signal.SIGKILL
        assert late.wait(5) == -signal.SIGKILL
        eventually(lambda: list(server._timers) == [(reported.pid, "next")])
        assert is_alive(reported)


# Workers that are gone --------------------------------------------------------------------------


def test_worker_that_ends_while_its_expiry_is_reported(
    fifo_path: str, fork_worker: Fork, client: FileTimerClient
) -> None:
    """Late, but gone before the signal: no event, and no signal to whoever gets its number."""
    reported, events = threading.Event(), []

    def end_it(run_id: str, expired_timers: dict[int, list[str]]) -> None:
        for pid in expired_timers:
            os.kill(pid, signal.SIGTERM)
            wait_dead(pid)
        reported.set()

    server = FileTimerServer(fifo_path, "run", log_event=lambda name, _: events.append(name))
    add_debug_info_handler(end_it)
    try:
        with running(server):
            worker = fork_worker(overrun, client, 0.1)
            assert reported.wait(20)
            eventually(lambda: not server._timers)
    finally:
        remove_debug_info_handler(end_it)
    assert worker.wait() == -signal.SIGTERM
    assert events == ["watchdog started", "watchdog stopped"]


def test_exit_that_is_noticed_in_a_round_that_fails(
    fifo_path: str, fork_worker: Fork, client: FileTimerClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it is the last one before a stop, the next start has to do with other workers."""

    class Failing(FileTimerServer):
        failures = 0
        fails = False

        def register_timers(self, timer_requests: list[FileTimerRequest]) -> None:
            if self.fails:
                self.failures += 1
                raise LookupError("not this time")
            super().register_timers(timer_requests)

    server = Failing(fifo_path, "run")
    with running(server):
        worker = fork_worker(overrun, client, FAR)
        eventually(lambda: server._timers.holds(worker.pid))
        server.fails = True
        worker.process.kill()
        eventually(lambda: server.failures)
    server.fails = False
    with running(server):
        other = fork_worker(overrun, client, 0.1)
        assert_reaped_in_time(other, other.receive())
    assert "not this time" in caplog.text
    assert "KeyError" not in caplog.text


def test_worker_that_was_never_there_but_is_said_to_run(
    fifo_path: str, fork_worker: Fork, client: FileTimerClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is signalled in its place, whoever may have its number by then; its timers go."""
    gone = fork_worker(wait_to_be_killed)
    gone.process.kill()
    gone.wait()

    class Misled(FileTimerServer):
        @staticmethod
        def is_process_running(pid: int) -> bool:
            return True

    with caplog.at_level("INFO"), running(Misled(fifo_path, "run")) as server:
        client._send_request(FileTimerRequest(gone.pid, "block", time.time(), signal.SIGKILL))
        eventually(lambda: f"Worker {gone.pid} is gone already" in caplog.text)
        eventually(lambda: not server._timers)


def test_exit_that_no_descriptor_tells_of(
    fifo_path: str,
    fork_worker: Fork,
    client: FileTimerClient,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the system's limit on watched descriptors workers are asked, and reaped in time."""
    server = FileTimerServer(fifo_path, "run", 60)
    watch = server._loop.watch

    def limited_watch(fd: int, what: object) -> None:
        if isinstance(what, int):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        watch(fd, what)

    # Forged: the limit (epoll(7)) is that of the whole user, and large.
    monkeypatch.setattr(server._loop, "watch", limited_watch)
    with running(server):
        leaving = fork_worker(overrun, client, FAR)
        eventually(lambda: server._timers.holds(leaving.pid))
        leaving.process.kill()
        eventually(lambda: not server._timers.holds(leaving.pid))
        stuck = fork_worker(overrun, client, 0.2)
        assert_reaped_in_time(stuck, stuck.receive())
    assert f"The exit of worker {leaving.pid} can't be waited for" in caplog.text


# After the signal -------------------------------------------------------------------------------


def test_second_signal_is_tried_until_it_is_sent(fifo_path: str, fork_worker: Fork) -> None:
    """A worker that outlives `kill_after` gets SIGKILL, also where that fails at first."""
    kills: list[float] = []

    class Reluctant(FileTimerServer):
        def _reap_worker(self, worker_pid: int, number: int) -> bool:
            if number == signal.SIGKILL:
                kills.append(time.monotonic())
                if len(kills) == 1:
                    return False
            return super()._reap_worker(worker_pid, number)

    with running(Reluctant(fifo_path, "run", kill_after=0.3)):
        worker = fork_worker(ignore_and_overrun, FileTimerClient(fifo_path, signal.SIGTERM), 0.2)
        deadline = worker.receive()
        assert worker.wait() == -signal.SIGKILL
    first, second = kills
    assert first >= deadline + 0.3
    assert second - first >= 0.9


@pytest.mark.parametrize(
    ("hang", "told"),
    [
        (overrun, "in state S; it hangs in the kernel, which alone can end it"),
        (overrun_at_work, "in state R; it is about to end, and slow at that"),
    ],
)
def test_worker_that_outlives_sigkill_is_reported_once(
    hang: Callable[..., None],
    told: str,
    fifo_path: str,
    fork_worker: Fork,
    client: FileTimerClient,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One error with its state and what that means, and the rounds go on."""
    monkeypatch.setattr(_server, "UNKILLABLE_AFTER", 0.3)
    send = ProcessHandle.send
    spared: list[int] = []

    # Forged: what hangs in the kernel for seconds would hang the test's machine.
    def send_in_vain(process: ProcessHandle, number: int) -> None:
        if process.pid not in spared:
            send(process, number)

    monkeypatch.setattr(ProcessHandle, "send", send_in_vain)
    with running(FileTimerServer(fifo_path, "run", 0.05)):
        worker = fork_worker(hang, client, 0.2)
        spared.append(worker.pid)
        deadline = worker.receive()
        eventually(lambda: f"Worker {worker.pid} is still there" in caplog.text)
        assert time.monotonic() >= deadline + 0.3
        other = fork_worker(overrun, client, 0.5)
        assert_reaped_in_time(other, other.receive())
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert told in errors[0]
    assert is_alive(worker)
