"""Workers that do not die of the signal they are sent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_timer import FileTimerClient, FileTimerServer
from tests.servers import Link, Serve
from tests.support import (
    ALLOWED_LATENESS,
    FAR,
    Fork,
    assert_reaped_in_time,
    eventually,
    is_alive,
    overrun,
    process_state,
    wait_dead,
    wire_line,
    write_raw,
)

KILL_AFTER = 0.5


@pytest.fixture
def terminating(fifo_path: str) -> FileTimerClient:
    """A client that asks for SIGTERM."""
    return FileTimerClient(fifo_path, signal.SIGTERM)


def ignore_and_overrun(channel: Any, client: FileTimerClient, after: float) -> None:
    """A worker that overruns, and does not mind SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: channel.send("had SIGTERM"))
    # sleep() goes on after a handler.
    overrun(channel, client, after)


@pytest.mark.parametrize("kill_after", [KILL_AFTER, 2 * KILL_AFTER])
def test_kill_after(
    file_link: Link,
    serve: Serve,
    fork_worker: Fork,
    terminating: FileTimerClient,
    kill_after: float,
) -> None:
    """A worker that outlives its signal by `kill_after` seconds gets SIGKILL then, not before."""
    server = serve(lambda: file_link.server(kill_after=kill_after))
    worker = fork_worker(ignore_and_overrun, terminating, 0.3)
    deadline = worker.receive()
    assert worker.receive() == "had SIGTERM"
    died = wait_dead(worker)
    assert deadline + kill_after <= died < deadline + kill_after + ALLOWED_LATENESS
    assert worker.wait() == -signal.SIGKILL
    eventually(lambda: "outlived signal 15" in server.log())
    server.stop()


def test_kill_after_is_for_those_who_need_it(
    file_link: Link, serve: Serve, fork_worker: Fork, terminating: FileTimerClient
) -> None:
    """A worker that dies of its signal gets no other one."""
    server = serve(lambda: file_link.server(kill_after=KILL_AFTER))
    worker = fork_worker(overrun, terminating, 0.2)
    deadline = worker.receive()
    assert wait_dead(worker) >= deadline
    assert worker.wait() == -signal.SIGTERM
    server.stop()
    assert "outlived" not in server.log()


def test_kill_after_is_off_by_default(
    file_link: Link, serve: Serve, fork_worker: Fork, terminating: FileTimerClient
) -> None:
    """Without it a worker that does not mind its signal has that one signal and lives on."""
    server = serve(file_link.server)
    worker = fork_worker(ignore_and_overrun, terminating, 0.2)
    worker.receive()
    assert worker.receive() == "had SIGTERM"
    sentinel = fork_worker(overrun, file_link.client, 2 * KILL_AFTER)
    assert_reaped_in_time(sentinel, sentinel.receive())
    assert is_alive(worker)
    assert not worker._channel.poll()
    server.stop()


def test_kill_after_follows_no_group(file_link: Link, serve: Serve, fork_worker: Fork) -> None:
    """A process group has its one signal; nothing would tell when it is a later one's number."""
    server = serve(lambda: file_link.server(kill_after=KILL_AFTER))
    leader = fork_worker(lead_a_stubborn_group)
    assert leader.receive() == "leads"
    write_raw(file_link.path, wire_line(pid=-leader.pid, expiration_time=time.time(), signal=15))
    assert leader.receive() == "had SIGTERM"
    sentinel = fork_worker(overrun, file_link.client, 2 * KILL_AFTER)
    assert_reaped_in_time(sentinel, sentinel.receive())
    assert is_alive(leader)
    server.stop()


def lead_a_stubborn_group(channel: Any) -> None:
    """The leader and only member of a process group, who does not mind SIGTERM."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, lambda *_: channel.send("had SIGTERM"))
    channel.send("leads")
    time.sleep(FAR)


PTRACE_SEIZE = 0x4206
PTRACE_DETACH = 17
PTRACE_O_TRACEEXIT = 0x40


def trace(request: int, pid: int, options: int = 0) -> bool:
    """ptrace(2); whether it worked."""
    call = ctypes.CDLL(None).ptrace
    call.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    return bool(call(request, pid, None, options) == 0)


@pytest.fixture
def hold_at_exit() -> Iterator[Callable[[int], None]]:
    """`hold_at_exit(pid)`: keep a child in the kernel on its way out, until the test is over.

    A debugger may stop a process there, and does in the middle of a SIGKILL. A worker that hangs in
    a driver or on a dead network disk is in the same place, but takes a broken disk to make.
    """
    held = []

    def hold(pid: int) -> None:
        if not sys.platform.startswith("linux") or not trace(PTRACE_SEIZE, pid, PTRACE_O_TRACEEXIT):
            pytest.skip("this system does not let a process trace its child")
        held.append(pid)

    yield hold
    for pid in held:
        trace(PTRACE_DETACH, pid)


def test_worker_that_does_not_die_of_sigkill(
    link: Link,
    serve: Serve,
    fork_worker: Fork,
    bystanders: Callable[[int], list[int]],
    hold_at_exit: Callable[[int], None],
) -> None:
    """After five seconds it is reported once, with its state; others are seen to meanwhile."""
    server = serve(link.server)
    (pid,) = bystanders(1)
    hold_at_exit(pid)
    deadline = time.monotonic() + 0.3
    link.put(pid, "block", time.time() + 0.3)
    other = fork_worker(overrun, link.client, 1)
    assert_reaped_in_time(other, other.receive())
    eventually(lambda: "ERROR" in server.log())
    assert 5 <= time.monotonic() - deadline < 5 + ALLOWED_LATENESS
    state = process_state(pid)
    assert state == "t"
    reports = [line for line in server.log().splitlines() if line.startswith("ERROR")]
    assert len(reports) == 1
    assert f"Worker {pid} is still there 5 s after SIGKILL, in state {state}" in reports[0]
    last = fork_worker(overrun, link.client, 0.2)
    assert_reaped_in_time(last, last.receive())
    assert not server.ask("len(server._timers)")
    assert server.log().count("ERROR") == 1
    server.stop()


class Deaf(FileTimerServer):
    """Says that it signalled a worker, and did not."""

    def _reap_worker(self, worker_pid: int, signal: int) -> bool:
        return True


def test_worker_that_a_hook_spares_is_told_of_each_time(
    file_link: Link, serve: Serve, fork_worker: Fork
) -> None:
    """(A8) What it overruns later is told of too, and nobody says that it hangs in the kernel."""
    server = serve(lambda: Deaf(file_link.path, "run", 60))
    worker = fork_worker(overrun, file_link.client, 0.2)
    worker.receive()
    for count in range(1, 4):
        eventually(lambda: server.log().count(f"Reaped worker {worker.pid} ") == count)  # noqa: B023
        assert server.ask("server._signalled") == {}  # No report can come of these any more.
        time.sleep(0.3)  # What arrives earlier is taken for that of a process about to die.
        write_raw(file_link.path, wire_line(pid=worker.pid, scope_id="x", expiration_time=1))
    assert is_alive(worker)
    server.stop()
