"""What a file server tells of a round: its events and the debug hook."""

from __future__ import annotations

import logging
import signal
import time

import pytest

from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
    debug_info_logging,
    file_based_local_timer,
)
from tests.support import (
    Event,
    Fork,
    eventually,
    is_alive,
    overrun,
    running,
    wait_dead,
    wire_line,
    write_raw,
)

# Events -------------------------------------------------------------------------------------------


def test_events_of_a_server_without_traffic(fifo_path: str) -> None:
    """Start and stop are events without a request, each time."""
    events: list[Event] = []
    server = FileTimerServer(
        fifo_path, "run", 0.05, log_event=lambda name, request: events.append((name, request))
    )
    with running(server):
        assert events == [("watchdog started", None)]
    with running(server):
        pass
    assert events == [("watchdog started", None), ("watchdog stopped", None)] * 2


def test_events_of_a_reap(fifo_path: str, fork_worker: Fork) -> None:
    """A worker's expired timers, oldest first, up to the first with a signal; then the kill."""
    events: list[Event] = []
    dead_at_event: list[bool] = []

    def log_event(name: str, request: FileTimerRequest | None) -> None:
        events.append((name, request))
        if name == "kill worker process":
            # Signalled by now: it dies in any case.
            dead_at_event.append(bool(eventually(lambda: not is_alive(worker), 5)))

    with running(FileTimerServer(fifo_path, "run", 10, log_event=log_event)):
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 60)
        worker.receive()
        now = time.time()
        requests = [
            FileTimerRequest(worker.pid, "fourth", now - 1, signal.SIGKILL),
            FileTimerRequest(worker.pid, "second", now - 3, -1),
            FileTimerRequest(worker.pid, "third", now - 2, signal.SIGTERM),
            FileTimerRequest(worker.pid, "first", now - 4, 0),
        ]
        write_raw(fifo_path, b"".join(f"{item.to_json()}\n".encode() for item in requests))
        assert worker.wait(5) == -signal.SIGTERM
    _, second, third, first = requests
    assert events == [
        ("watchdog started", None),
        ("timer expired", first),
        ("timer expired", second),
        ("timer expired", third),
        ("kill worker process", third),
        ("watchdog stopped", None),
    ]
    assert dead_at_event == [True]


def test_events_without_a_positive_signal(fifo_path: str, fork_worker: Fork) -> None:
    """All expired timers of a worker without a signal are told of, and it is not killed.

    (A2) They alone are dropped: the one that has time left is held on, and kills it in the end.
    """
    events: list[Event] = []
    server = FileTimerServer(
        fifo_path, "run", 10, log_event=lambda name, request: events.append((name, request))
    )
    with running(server):
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 60)
        worker.receive()
        eventually(lambda: server._timers)
        now = time.time()
        lines = [
            wire_line(pid=worker.pid, scope_id="newer", expiration_time=now - 1, signal=-9),
            wire_line(pid=worker.pid, scope_id="older", expiration_time=now - 2, signal=0),
        ]
        write_raw(fifo_path, b"".join(lines))
        eventually(lambda: len(events) == 3)
        eventually(lambda: len(server._timers) == 1)
        assert is_alive(worker)
        assert list(server._timers) == [(worker.pid, "overrun")]
        # It counts still.
        write_raw(
            fifo_path,
            wire_line(pid=worker.pid, scope_id="overrun", expiration_time=now, signal=9),
        )
        wait_dead(worker)
        eventually(lambda: len(events) >= 5)
    assert [(name, request and request.scope_id) for name, request in events] == [
        ("watchdog started", None),
        ("timer expired", "older"),
        ("timer expired", "newer"),
        ("timer expired", "overrun"),
        ("kill worker process", "overrun"),
        ("watchdog stopped", None),
    ]


# The debug hook -----------------------------------------------------------------------------------


def test_debug_hook_is_called_before_the_kill(
    fifo_path: str, fork_worker: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the run's id and, by pid, the JSON of the expired timers, while the worker lives."""
    calls: list[tuple[str, dict[int, list[str]], bool]] = []

    def hook(run_id: str, expired_timers: dict[int, list[str]]) -> None:
        calls.append((run_id, expired_timers, is_alive(worker)))

    with running(FileTimerServer(fifo_path, "the run", 10)) as server:
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 60)
        worker.receive()
        eventually(lambda: server._timers)
        monkeypatch.setattr(file_based_local_timer, "log_debug_info_for_expired_timers", hook)
        now = time.time()
        due = [FileTimerRequest(worker.pid, name, now - 1, signal.SIGKILL) for name in "ab"]
        write_raw(fifo_path, b"".join(f"{item.to_json()}\n".encode() for item in due))
        assert worker.wait(5) == -signal.SIGKILL
    expired = [call for call in calls if call[1]]
    assert len(expired) == 1
    run_id, mapping, alive = expired[0]
    assert run_id == "the run"
    assert list(mapping) == [worker.pid]
    assert sorted(mapping[worker.pid]) == [item.to_json() for item in due]
    assert alive


def test_debug_hook_is_called_in_every_round(
    fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds without anything expired call it with an empty mapping."""
    calls: list[tuple[str, dict[int, list[str]]]] = []
    monkeypatch.setattr(
        file_based_local_timer,
        "log_debug_info_for_expired_timers",
        lambda run_id, expired_timers: calls.append((run_id, expired_timers)),
    )
    with running(FileTimerServer(fifo_path, "run", 0.01)):
        eventually(lambda: len(calls) >= 3)
    assert calls[:3] == [("run", {})] * 3


def test_debug_info_is_silent_about_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """An empty mapping is not worth a record."""
    with caplog.at_level(logging.DEBUG):
        debug_info_logging.log_debug_info_for_expired_timers("run", {})
    assert not caplog.records


def test_failed_reap_is_reported_once(
    fifo_path: str, fork_worker: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retries neither repeat the debug information nor the events of the expiry."""
    reported: list[int] = []
    events: list[str] = []
    attempts: list[int] = []

    class Failing(FileTimerServer):
        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            attempts.append(worker_pid)
            return len(attempts) > 3 and super()._reap_worker(worker_pid, signal)

    monkeypatch.setattr(
        file_based_local_timer,
        "log_debug_info_for_expired_timers",
        lambda run_id, expired_timers: reported.extend(expired_timers),
    )
    server = Failing(fifo_path, "run", 0.05, log_event=lambda name, _: events.append(name))
    with running(server):
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.1)
        worker.receive()
        assert worker.wait(5) == -signal.SIGKILL
        eventually(lambda: not server._timers)
    assert reported == [worker.pid]
    assert events == [
        "watchdog started",
        "timer expired",
        "kill worker process",
        "watchdog stopped",
    ]
