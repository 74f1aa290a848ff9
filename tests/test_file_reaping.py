"""Whom a file server reaps, with what, and who is spared."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any

import pytest

from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
    expires,
    file_based_local_timer,
)
from tests.servers import Link, Serve
from tests.support import (
    FAR,
    Event,
    Fork,
    Spawn,
    assert_reaped_in_time,
    eventually,
    is_alive,
    overrun,
    running,
    wait_dead,
)

# Reaping ------------------------------------------------------------------------------------------


def nested(channel: Any, client: FileTimerClient) -> None:
    """One block overruns within two that have time left."""
    outer = expires(after=60, scope="outer", client=client)
    with outer, expires(after=50, scope="middle", client=client):
        overrun(channel, client, 0.2)


def test_one_expired_timer_reaps_the_worker_and_all_its_timers(
    server: FileTimerServer, client: FileTimerClient, fork_worker: Fork
) -> None:
    """The worker dies at its earliest deadline, and no timer of it is left."""
    client.acquire("bystander", time.time() + FAR)
    worker = fork_worker(nested, client)
    assert_reaped_in_time(worker, worker.receive())
    eventually(lambda: list(server._timers) == [(os.getpid(), "bystander")])


def test_the_clients_signal_is_sent(
    server: FileTimerServer, fifo_path: str, fork_worker: Fork
) -> None:
    """A worker dies of the signal that its client was made with."""
    worker = fork_worker(overrun, FileTimerClient(fifo_path, signal.SIGUSR1), 0.2)
    worker.receive()
    assert worker.wait() == -signal.SIGUSR1


def lead_a_group(channel: Any) -> None:
    os.setpgid(0, 0)
    member = os.fork()
    if not member:
        time.sleep(FAR)
    channel.send(member)
    time.sleep(FAR)


def test_negative_pid_reaps_a_process_group(
    server: FileTimerServer, client: FileTimerClient, fork_worker: Fork
) -> None:
    """A timer in the name of a negative pid kills every process of that group."""
    leader = fork_worker(lead_a_group)
    member = leader.receive()
    try:
        client._send_request(
            FileTimerRequest(-leader.pid, "group", time.time() + 0.1, signal.SIGKILL)
        )
        assert leader.wait(5) == -signal.SIGKILL
        wait_dead(member, 5)
    finally:
        if is_alive(member):
            os.kill(member, signal.SIGKILL)


@pytest.mark.parametrize("number", [0, -1])
def test_zero_or_negative_signal_only_reports(
    fifo_path: str, fork_worker: Fork, number: int
) -> None:
    """A client without a signal: the overrun is an event, the worker lives, its timers go."""
    events: list[Event] = []
    server = FileTimerServer(
        fifo_path, "run", 0.05, log_event=lambda name, request: events.append((name, request))
    )
    with running(server):
        worker = fork_worker(overrun, FileTimerClient(fifo_path, number), 0.1)
        worker.receive()
        eventually(lambda: len(events) == 2)
        eventually(lambda: not server._timers)
        name, request = events[1]
        assert name == "timer expired"
        assert request is not None
        assert (request.worker_pid, request.scope_id, request.signal) == (
            worker.pid,
            "overrun",
            number,
        )
        # A whole life of another worker later it is still there.
        second = fork_worker(overrun, FileTimerClient(fifo_path), 0.1)
        assert_reaped_in_time(second, second.receive())
        assert is_alive(worker)


def test_reap_worker_hook_is_the_only_way_out(fifo_path: str, fork_worker: Fork) -> None:
    """A subclass that overrides `_reap_worker` decides: nobody is signalled behind its back."""
    calls: list[tuple[int, int]] = []

    class Polite(FileTimerServer):
        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            calls.append((worker_pid, signal))
            return True

    with running(Polite(fifo_path, "run", 0.05)) as server:
        worker = fork_worker(overrun, FileTimerClient(fifo_path, signal.SIGTERM), 0.1)
        worker.receive()
        eventually(lambda: not server._timers and calls)
        assert calls == [(worker.pid, signal.SIGTERM)]
        assert is_alive(worker)


def test_reap_worker_says_whether_it_is_done(fifo_path: str, fork_worker: Fork) -> None:
    """True where the worker was signalled, and where it is gone already."""
    server = FileTimerServer(fifo_path, "run")
    worker = fork_worker(overrun, FileTimerClient(fifo_path), 60)
    assert server._reap_worker(worker.pid, signal.SIGTERM) is True
    assert worker.wait() == -signal.SIGTERM
    assert server._reap_worker(worker.pid, signal.SIGTERM) is True
    server.stop()


def test_reap_self_is_a_signal_that_can_be_handled(
    spawn: Spawn, fifo_path: str, fork_worker: Fork
) -> None:
    """With it the server's process, too, has the worker's signal, and may end as it likes."""
    child = spawn(
        """
        import signal, sys, elastic_timer

        def leave(number, frame):
            signal.signal(number, signal.SIG_IGN)  # It comes in every round from now on.
            sys.exit(number)

        signal.signal(signal.SIGUSR1, leave)
        with elastic_timer.FileTimerServer(sys.argv[1], "run", reap_self=True):
            print("started", flush=True)
            while True:
                signal.pause()
        """,
        fifo_path,
    )
    assert child.readline() == "started"
    worker = fork_worker(overrun, FileTimerClient(fifo_path, signal.SIGUSR1), 0.2)
    worker.receive()
    assert worker.wait() == -signal.SIGUSR1
    assert child.wait() == signal.SIGUSR1, child.stderr_text()
    assert not os.path.exists(fifo_path)


def test_each_reap_is_one_warning(
    server: FileTimerServer,
    client: FileTimerClient,
    fork_worker: Fork,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The log of a reap is one WARNING with the pid, the scopes and how late it was."""
    worker = fork_worker(overrun, client, 0.1)
    assert_reaped_in_time(worker, worker.receive())
    eventually(lambda: not server._timers)
    server.stop()
    reaps = [
        record
        for record in caplog.records
        if record.levelno == logging.WARNING
        and record.name.startswith("elastic_timer")
        and "reaped" in record.getMessage().lower()
    ]
    assert len(reaps) == 1
    message = reaps[0].getMessage()
    assert str(worker.pid) in message
    assert "overrun" in message
    assert " s after" in message


# A release that was written in time ---------------------------------------------------------------


def test_release_written_just_before_the_signal_is_honoured(
    fifo_path: str, fork_worker: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that arrives during the very round of the expiry saves the worker."""
    client = FileTimerClient(fifo_path)
    saved: list[int] = []

    def release_it(run_id: str, expired_timers: dict[int, list[str]]) -> None:
        for pid in expired_timers:
            if pid not in saved:
                client._send_request(FileTimerRequest(pid, "overrun", -1))
                saved.append(pid)

    signalled: list[int] = []

    class Watched(FileTimerServer):
        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            signalled.append(worker_pid)
            return super()._reap_worker(worker_pid, signal)

    monkeypatch.setattr(file_based_local_timer, "log_debug_info_for_expired_timers", release_it)
    with running(Watched(fifo_path, "run", 0.05)) as server:
        worker = fork_worker(overrun, client, 0.1)
        worker.receive()
        eventually(lambda: saved == [worker.pid])
        eventually(lambda: not server._timers)
        server.run_once()
    assert signalled == []
    assert is_alive(worker)


def leave_when_told(channel: Any, client: FileTimerClient, after: float) -> None:
    deadline = time.monotonic() + after
    with expires(after=after, scope="short", client=client):
        channel.send(deadline)
        channel.recv()
    channel.send("left")
    channel.recv()


def test_release_written_while_the_server_could_not_look_is_honoured(
    file_link: Link, serve: Serve, fork_worker: Fork
) -> None:
    """A server that was stopped past a deadline reads the release before it acts on the timer."""
    server = serve(lambda: file_link.server(0.05))
    worker = fork_worker(leave_when_told, file_link.client, 0.5)
    deadline = worker.receive()
    eventually(lambda: server.holds(worker.pid))
    server.pause()
    stopped_in_time = time.monotonic() < deadline
    assert worker.ask("leave") == "left"
    eventually(lambda: time.monotonic() > deadline)
    server.go_on()
    sentinel = fork_worker(overrun, file_link.client, 0.1)
    assert_reaped_in_time(sentinel, sentinel.receive())
    assert stopped_in_time
    assert is_alive(worker)
