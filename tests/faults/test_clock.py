"""The wall clock is set by an hour, forward and back, for the server and for its workers."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable

import pytest

from elastic_timer import _clock, api
from tests.servers import Link, Serve
from tests.support import Fork, assert_reaped_in_time, eventually, is_alive, overrun

HOUR = 3600.0


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """`set_clock(seconds)`: the wall clock of this process and its forks is off by so much.

    The host's own clock is left alone: others live by it.
    """
    offset = mmap.mmap(-1, 8)
    real_time = _clock.epoch

    def off() -> float:
        (shift,) = struct.unpack("d", offset[:8])
        return real_time() + float(shift)

    # What servers ask, and what clients do.
    monkeypatch.setattr(_clock, "epoch", off)
    monkeypatch.setattr(api, "epoch", off)

    def set_clock(seconds: float) -> None:
        offset[:8] = struct.pack("d", seconds)

    set_clock(0)
    return set_clock


@pytest.mark.parametrize("step", [HOUR, -HOUR])
def test_step_of_the_clock(
    link: Link, serve: Serve, fork_worker: Fork, set_clock: Callable[[float], None], step: float
) -> None:
    """Timers from before the step, between two steps and after them are all kept to the second."""
    server = serve(link.server)
    patient = fork_worker(overrun, link.client, 60)
    patient.receive()
    stuck = []
    for clock in (step, 0.0, step):
        worker = fork_worker(overrun, link.client, 2)
        stuck.append((worker, worker.receive()))
        eventually(lambda pid=worker.pid: server.holds(pid))  # type: ignore[misc]
        set_clock(clock)
    worker = fork_worker(overrun, link.client, 1)
    stuck.append((worker, worker.receive()))
    for worker, deadline in stuck:
        assert_reaped_in_time(worker, deadline)
    assert is_alive(patient)
    assert server.holds(patient.pid)
    server.stop()


def test_clock_that_is_set_all_the_time(
    link: Link, serve: Serve, fork_worker: Fork, set_clock: Callable[[float], None]
) -> None:
    """A clock that jumps while a timer is held moves its deadline in neither direction."""
    server = serve(link.server)
    worker = fork_worker(overrun, link.client, 1)
    deadline = worker.receive()
    eventually(lambda: server.holds(worker.pid))
    for number in range(20):
        set_clock((HOUR, -HOUR, 0.5, -0.5)[number % 4])
        assert server.ask("server.register_timers([])") is None
    assert_reaped_in_time(worker, deadline)
    server.stop()
