"""Where workers are: the block each is in, since when, and how often it has entered it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from elastic_timer._server.job import Job, Standing
from tests.servers import Link
from tests.support import FAR, Child, Spawn, eventually, running

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")


@pytest.fixture
def server(link: Link) -> Iterator[Any]:
    """A server of either kind."""
    with running(link.server()) as started:
        yield started


def worker(spawn: Spawn, **environment: str) -> Child:
    """A process that does nothing, started with these variables."""
    child = spawn("print('there', flush=True); input()", env=environment)
    assert child.readline() == "there"
    return child


def standing(server: Any, pid: int) -> Standing:
    """Where the server has a worker."""
    found = {each.pid: each for each in server._workers.standings([pid])}
    one: Standing = found[pid]
    return one


def enter(link: Link, server: Any, pid: int, scope: str, after: float = FAR) -> None:
    """Acquire a timer in a worker's name; the server holds it on return."""
    link.put(pid, scope, time.time() + after)
    eventually(lambda: (pid, scope) in server._timers)


def leave(link: Link, server: Any, pid: int, scope: str) -> None:
    """Release a timer in a worker's name; the server holds it no longer."""
    link.put(pid, scope, -1)
    eventually(lambda: (pid, scope) not in server._timers)


def test_passes(link: Link, server: Any, spawn: Spawn) -> None:
    """Each entry is one, whichever thread's it is; another deadline within the block is none."""
    pid = worker(spawn).pid
    for _ in range(3):
        enter(link, server, pid, "train.py#42")
        enter(link, server, pid, "train.py#42@thread-7f")
        leave(link, server, pid, "train.py#42@thread-7f")
        request = server._timers[pid, "train.py#42"]
        link.put(pid, "train.py#42", time.time() + 2 * FAR)
        eventually(lambda request=request: server._timers[pid, "train.py#42"] is not request)  # type: ignore[misc]
        leave(link, server, pid, "train.py#42")
    enter(link, server, pid, "save.py#1")
    assert server._workers.passes(pid) == {"train.py#42": 6, "save.py#1": 1}
    assert server._workers.passes(os.getpid()) == {}
    assert standing(server, pid).passes == {"train.py#42": 6, "save.py#1": 1}


def test_the_most_urgent_timer_tells_the_block(link: Link, server: Any, spawn: Spawn) -> None:
    """And since when it is held, which another deadline does not change."""
    pid = worker(spawn).pid
    enter(link, server, pid, "epoch.py#1@task-ab", 2 * FAR)
    entered = time.monotonic()
    enter(link, server, pid, "train.py#42")
    inner = standing(server, pid)
    assert (inner.block, inner.expired) == ("train.py#42", False)
    leave(link, server, pid, "train.py#42")
    outer = standing(server, pid)
    assert outer.block == "epoch.py#1"
    assert outer.seconds is not None
    assert outer.seconds >= time.monotonic() - entered - 0.1
    link.put(pid, "epoch.py#1@task-ab", time.time() + FAR)
    eventually(lambda: standing(server, pid).deadline != outer.deadline)
    again = standing(server, pid)
    assert again.seconds is not None
    assert again.seconds > outer.seconds
    leave(link, server, pid, "epoch.py#1@task-ab")
    assert standing(server, pid)[4:7] == (None, None, None)


def test_those_of_its_job_are_with_it(link: Link, server: Any, spawn: Spawn) -> None:
    """Nobody else is, and nobody at all with a worker that has no job."""
    job = {"TORCHELASTIC_RUN_ID": "nightly", "WORLD_SIZE": "2"}
    first, second = (worker(spawn, **job, RANK=rank).pid for rank in "01")
    other = worker(spawn, TORCHELASTIC_RUN_ID="daily", WORLD_SIZE="2", RANK="0").pid
    alone, unknown = worker(spawn).pid, worker(spawn).pid
    for pid in (first, second, other, alone):
        enter(link, server, pid, "train.py#42")
    leave(link, server, second, "train.py#42")

    def pids(*named: int) -> set[int]:
        return {each.pid for each in server._workers.standings(named)}

    assert pids(first) == pids(second) == {first, second}
    assert pids(other, alone) == {other, alone}
    assert pids(alone) == {alone}
    assert pids(unknown) == set()
    assert standing(server, first)[1:3] == (0, None)


def test_standing_by_itself() -> None:
    """Peers have those with a rank in a job; who holds no timer has none that is due."""
    job = Job("nightly", 2, None)
    assert Standing(1, 0, None, job).is_in_a_job() is True
    assert Standing(1, None, None, job).is_in_a_job() is False
    assert Standing(1, 0, None, None).is_in_a_job() is False
    assert Standing(1, None, None, None).is_in_a_job() is False
    assert Standing(1, 0, None, job).expired is False
