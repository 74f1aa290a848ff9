"""Somebody's callback that blocks for long: the deadlines of others are kept all the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from elastic_timer import FileTimerRequest
from elastic_timer.debug_info_logging import (
    add_debug_info_handler,
    remove_debug_info_handler,
    stacks_timeout,
)
from tests.servers import Link
from tests.support import (
    ALLOWED_LATENESS,
    Fork,
    ForkedWorker,
    assert_reaped_in_time,
    eventually,
    overrun,
    running,
    wait_dead,
)

BLOCKED = 10.0
"""How long a callback blocks unless the test is done with it before."""

LOG_EVENT_BOUND = 1.0
"""How long the events of one round may keep the server from its work, as documented."""


@pytest.fixture
def unblocked() -> Iterator[threading.Event]:
    """What the callbacks that block wait for; the test's end does not keep them waiting."""
    event = threading.Event()
    yield event
    event.set()


def assert_none_is_later_than(bound: float, workers: dict[ForkedWorker, float]) -> None:
    """Each worker dies at its deadline (monotonic) or by the bound after it, and not before."""
    for worker, deadline in workers.items():
        died = wait_dead(worker)
        assert deadline <= died < deadline + bound + ALLOWED_LATENESS


@pytest.mark.parametrize("blocked", ["watchdog started", "timer expired", "kill worker process"])
def test_log_event_that_blocks(
    file_link: Link, fork_worker: Fork, unblocked: threading.Event, blocked: str
) -> None:
    """No reap waits for it longer than a second, and the events still come in their order."""
    events: list[tuple[str, int | None]] = []

    def log_event(name: str, request: FileTimerRequest | None) -> None:
        events.append((name, None if request is None else request.worker_pid))
        if name == blocked and len(events) < 4:
            unblocked.wait(BLOCKED)

    def serve() -> None:
        with file_link.server(log_event=log_event):
            started.set()
            stop.wait()

    started, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        workers = {}
        for after in (0.3, 0.5, 1.0, 2.0):
            worker = fork_worker(overrun, file_link.client, after)
            workers[worker] = worker.receive()
        assert_none_is_later_than(LOG_EVENT_BOUND, workers)
        unblocked.set()
        eventually(lambda: len(events) == 1 + 2 * len(workers))
    finally:
        stop.set()
        thread.join()
    expected: list[tuple[str, int | None]] = [("watchdog started", None)]
    for worker in workers:
        expected += [("timer expired", worker.pid), ("kill worker process", worker.pid)]
    assert events == [*expected, ("watchdog stopped", None)]


def test_debug_handler_that_blocks(
    link: Link, fork_worker: Fork, unblocked: threading.Event
) -> None:
    """No reap waits for it longer than the time for stacks and a second more."""

    def handler(run_id: str, expired_timers: dict[int, list[str]]) -> None:
        unblocked.wait(BLOCKED)

    add_debug_info_handler(handler)
    try:
        with running(link.server()):
            workers = {}
            for after in (0.3, 0.5, 1.0):
                worker = fork_worker(overrun, link.client, after)
                workers[worker] = worker.receive()
            assert_none_is_later_than(stacks_timeout() + 1, workers)
    finally:
        remove_debug_info_handler(handler)


def test_stop_while_a_callback_blocks(
    file_link: Link, fork_worker: Fork, unblocked: threading.Event
) -> None:
    """`stop()` waits for the round's callbacks as long as the round does, and not for their end."""
    entered = threading.Event()

    def log_event(name: str, request: FileTimerRequest | None) -> None:
        if name == "timer expired":
            entered.set()
            unblocked.wait(BLOCKED)

    with running(file_link.server(log_event=log_event)):
        worker = fork_worker(overrun, file_link.client, 0.2)
        worker.receive()
        assert entered.wait(20)
        stopping = time.monotonic()
    assert time.monotonic() - stopping < LOG_EVENT_BOUND + ALLOWED_LATENESS


def test_callback_that_blocked_is_forgiven(
    file_link: Link, fork_worker: Fork, unblocked: threading.Event
) -> None:
    """Once it has returned, events are waited for again: each comes before its worker's death."""
    alive_at_expiry: list[bool] = []
    workers: list[ForkedWorker] = []

    def log_event(name: str, request: FileTimerRequest | None) -> None:
        if name == "timer expired":
            if not alive_at_expiry:
                unblocked.wait(BLOCKED)
            alive_at_expiry.append(workers[-1].process.is_alive())

    with running(file_link.server(log_event=log_event)):
        workers.append(fork_worker(overrun, file_link.client, 0.2))
        wait_dead(workers[0])
        unblocked.set()
        eventually(lambda: alive_at_expiry)
        workers.append(fork_worker(overrun, file_link.client, 0.2))
        assert_reaped_in_time(workers[1], workers[1].receive())
    assert alive_at_expiry[1:] == [True]
