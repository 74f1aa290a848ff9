"""What is found out about expired workers before they are signalled, beside the rounds."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from elastic_timer._server.events import Event, TimerExpired
from elastic_timer.debug_info_logging import (
    add_debug_info_handler,
    set_stacks_timeout,
)
from tests.servers import Link, LooksAway
from tests.support import (
    FAR,
    Fork,
    eventually,
    is_alive,
    overrun,
    running,
    wait_dead,
    wait_to_be_killed,
)

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


class Asked:
    """Somebody's handler of debug information, in which the first inquest stays."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()

    def __call__(self, run_id: str, expired_timers: dict[int, list[str]]) -> None:
        self.begun.set()
        self.go_on.wait(60)


@pytest.fixture
def asked() -> Iterator[Asked]:
    """The handler, and no stacks."""
    handler = Asked()
    add_debug_info_handler(handler)
    set_stacks_timeout(0)
    yield handler
    handler.go_on.set()


def test_requests_are_read_while_it_is_under_way(
    link: Link, fork_worker: Fork, asked: Asked
) -> None:
    """As soon as ever: what is due in a moment is not reaped late for another one's evidence."""
    set_stacks_timeout(20)
    with running(link.server()) as server:
        worker, other = fork_worker(wait_to_be_killed), fork_worker(wait_to_be_killed)
        link.put(worker.pid, "block", time.time())
        assert asked.begun.wait(20)
        took = []
        for number in range(20):
            started = time.monotonic()
            link.put(other.pid, f"block {number}", time.time() + FAR)
            eventually(lambda: len(server._timers) == number + 2)  # noqa: B023 # Called here.
            took.append(time.monotonic() - started)
        assert is_alive(worker)
        asked.go_on.set()
        assert worker.wait() == -signal.SIGKILL
    # By far, where the first one is waited for in each round.
    assert sorted(took)[10] < 0.04, took


def test_evidence_that_comes_late_does_not_cut_short_what_was_to_be_called(
    link: Link, fork_worker: Fork, asked: Asked
) -> None:
    """The signal waits for who wants to know of it, whatever comes to its end meanwhile."""
    called, may_return = threading.Event(), threading.Event()

    def hook(event: TimerExpired[Any]) -> None:
        called.set()
        may_return.wait(60)

    with running(link.server()) as server:
        server.before_signal(hook, FAR)
        worker = fork_worker(wait_to_be_killed)
        link.put(worker.pid, "block", time.time())
        assert called.wait(20)
        asked.go_on.set()
        eventually(lambda: server._inquests.flush(0))
        other = fork_worker(wait_to_be_killed)
        link.put(other.pid, "block", time.time())
        time.sleep(0.2)
        assert is_alive(worker)
        may_return.set()
        assert worker.wait() == -signal.SIGKILL


def test_later_expiry_has_its_own(link: Link, fork_worker: Fork, asked: Asked) -> None:
    """A worker that left the block and overran another one meanwhile is looked at anew."""
    records: list[Any] = []
    set_stacks_timeout(20)
    with running(link.server()) as server:
        server.subscribe(records.append, TimerExpired)
        worker = fork_worker(wait_to_be_killed)
        link.put(worker.pid, "left", time.time())
        assert asked.begun.wait(20)
        link.put(worker.pid, "left", -1)
        link.put(worker.pid, "entered", time.time())
        eventually(lambda: server._timers.scopes(worker.pid) == ["entered"])
        asked.go_on.set()
        assert worker.wait() == -signal.SIGKILL
        (record,) = eventually(lambda: records)
    assert record.evidence is not None
    assert record.evidence["scopes"] == ["entered"]


def test_release_while_listeners_hear_of_the_expiry(file_link: Link, fork_worker: Fork) -> None:
    """Written before the signal, it counts: the worker lives on."""
    worker = fork_worker(wait_to_be_killed)
    released: list[int] = []

    def release(event: Event) -> None:
        if isinstance(event, TimerExpired) and event.pid == worker.pid:
            file_link.put(worker.pid, "block", -1)
            released.append(event.pid)

    with running(file_link.server()) as server:
        server.subscribe(release, TimerExpired)
        file_link.put(worker.pid, "block", time.time())
        eventually(lambda: released)
        other = fork_worker(overrun, file_link.client, 0.1)
        wait_dead(other)
        assert is_alive(worker)
        eventually(lambda: not server._timers)


@pytest.mark.usefixtures("_chooses_pids")
def test_number_that_was_given_away_meanwhile(
    fifo_path: str, fork_worker: Fork, asked: Asked
) -> None:
    """The inquest of a worker that has ended is none of the one that gets its number."""
    records: list[Any] = []
    set_stacks_timeout(20)
    link = Link("file", fifo_path)
    old = fork_worker(wait_to_be_killed)
    with running(LooksAway(fifo_path)) as server:
        server.subscribe(records.append, TimerExpired)
        link.put(old.pid, "block", time.time())
        assert asked.begun.wait(20)
        with server.given_away(old) as new:
            link.put(new.pid, "block", time.time())
            server.look()
            eventually(lambda: server._timers.scopes(new.pid) == ["block"])
            asked.go_on.set()
            assert new.wait(20) == -signal.SIGKILL
        (record,) = eventually(lambda: records)
    assert record.evidence is not None
    assert str(record.evidence["command"]).startswith("sleep")
