"""Where elastic-timer is right and torch.distributed.elastic.timer is not: D1 to D18.

Every test here fails on the behaviour of torch 2.13.0. Deadlines are checked by clocks outside the
server: a death is never seen before the deadline that the worker itself took note of, and at most
ALLOWED_LATENESS after it, a bound for busy machines where upstream is 10 s late or more.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import inspect
import linecache
import logging
import multiprocessing
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
    LocalTimerClient,
    LocalTimerServer,
    TimerClient,
    _clock,
    configure,
    expires,
    file_based_local_timer,
)
from elastic_timer._worker import scopes
from tests.servers import Link, Serve, ServerProcess
from tests.support import (
    FAR,
    LAST_PID,
    Fork,
    assert_reaped_in_time,
    eventually,
    is_alive,
    overrun,
    process_state,
    running,
    start_with_pid,
    wait_dead,
    wire_line,
    write_raw,
)


def exit_at_once(channel: Any, client: TimerClient, after: float) -> None:
    """A worker that acquires a timer, reports, waits for leave and exits without releasing."""
    deadline = time.monotonic() + after
    client.acquire("never released", time.time() + after)
    channel.send(deadline)
    channel.recv()
    os._exit(0)


def fork_and_live_on() -> int:
    """Fork a child that sleeps; returns its pid once its hooks for the fork have been run."""
    reader, writer = os.pipe()
    forked = os.fork()
    if not forked:
        os.write(writer, b"\0")
        time.sleep(FAR)
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    return forked


def step_clock(seconds: float) -> None:
    """Set the wall clock of this process by so much, as its server sees it."""
    _clock.epoch = functools.partial(stepped, _clock.epoch, seconds)


def stepped(real_time: Callable[[], float], step: float) -> float:
    return real_time() + step


# D1 ---------------------------------------------------------------------------------------------


class ScopeRecorder(TimerClient):
    """Notes scopes and does nothing else."""

    def __init__(self) -> None:
        self.acquired: list[str] = []
        self.released: list[str] = []

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        self.acquired.append(scope_id)

    def release(self, scope_id: str) -> None:
        self.released.append(scope_id)


def current_line() -> int:
    frame = inspect.currentframe()
    assert frame is not None
    assert frame.f_back is not None
    return frame.f_back.f_lineno


def test_d01_default_scope_is_the_callers_line() -> None:
    """Two unnamed blocks have two scopes, each the file and line of its own `expires`."""
    recorder = ScopeRecorder()
    with expires(after=1, client=recorder):
        first = current_line() - 1
        with expires(after=1, client=recorder):
            second = current_line() - 1
    assert recorder.acquired == [f"{__file__}#{first}", f"{__file__}#{second}"]
    assert recorder.released == [f"{__file__}#{second}", f"{__file__}#{first}"]


def test_d01_default_scope_of_async_with_is_the_callers_line() -> None:
    """`async with` names its scope after the caller's file and line, too."""
    recorder = ScopeRecorder()

    async def main() -> int:
        async with expires(after=1, client=recorder):
            return current_line() - 1

    line = asyncio.run(main())
    assert recorder.acquired[0].startswith(f"{__file__}#{line}")
    assert recorder.released == recorder.acquired


def test_d01_default_scope_of_a_decorator_is_the_functions() -> None:
    """A decorated function's scope is where it stands, whoever calls it from wherever."""
    recorder = ScopeRecorder()
    before = current_line()

    @expires(after=1, client=recorder)
    def function() -> None:
        pass

    after = current_line()
    function()
    function()
    assert len(set(recorder.acquired)) == 1
    file, _, line = recorder.acquired[0].rpartition("#")
    assert file == __file__
    assert before < int(line) < after


def overrun_around_a_short_block(channel: Any, client: TimerClient, after: float) -> None:
    deadline = time.monotonic() + after
    with expires(after=after, client=client):
        with expires(after=FAR, client=client):
            pass
        channel.send(deadline)
        time.sleep(FAR)


def test_d01_inner_block_leaves_the_outer_timer_alone(link: Link, fork_worker: Fork) -> None:
    """A worker whose unnamed inner block has ended is still reaped for its outer one."""
    with running(link.server(0.05)):
        worker = fork_worker(overrun_around_a_short_block, link.client, 0.25)
        assert_reaped_in_time(worker, worker.receive())


# D2 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("quiet", [True, False], ids=["idle", "busy"])
def test_d02_reaped_at_the_deadline_whatever_max_interval(
    link: Link, fork_worker: Fork, quiet: bool
) -> None:
    """The watchdog wakes up for the earliest deadline, not when `max_interval` is over."""
    with running(link.server(20)):
        if not quiet:
            for number in range(50):
                link.client.acquire(f"scope {number}", time.time() + FAR)
        worker = fork_worker(overrun, link.client, 0.25)
        assert_reaped_in_time(worker, worker.receive())


def test_d02_earlier_deadline_overtakes_a_later_one(link: Link, fork_worker: Fork) -> None:
    """A timer that arrives later but is due earlier is looked at when it is due."""
    with running(link.server(20)):
        later = fork_worker(overrun, link.client, 0.6)
        later_deadline = later.receive()
        sooner = fork_worker(overrun, link.client, 0.2)
        assert_reaped_in_time(sooner, sooner.receive())
        assert_reaped_in_time(later, later_deadline)


# D3 ---------------------------------------------------------------------------------------------


def test_d03_server_process_outlives_a_reaped_worker(
    file_link: Link, serve: Serve, fork_worker: Fork
) -> None:
    """After a reap the server's process lives on and supervises the next worker."""
    server = serve(lambda: file_link.server(0.05))
    for _ in range(2):
        worker = fork_worker(overrun, file_link.client, 0.2)
        assert_reaped_in_time(worker, worker.receive())
        assert server.ask("server._request_count")
    assert is_alive(server)


def test_d03_upstreams_way_is_opt_in(file_link: Link, serve: Serve, fork_worker: Fork) -> None:
    """With `reap_self=True` the server's process gets the worker's signal after the worker."""
    server = serve(lambda: file_link.server(0.05, reap_self=True))
    worker = fork_worker(overrun, FileTimerClient(file_link.path, signal.SIGTERM), 0.2)
    worker.receive()
    assert worker.wait() == -signal.SIGTERM
    assert server.wait() == -signal.SIGTERM


# D4 ---------------------------------------------------------------------------------------------


class FailingServer(FileTimerServer):
    """Fails to reap for a number of times."""

    failures = 0

    def __init__(self, file_path: str, run_id: str, max_interval: float) -> None:
        super().__init__(file_path, run_id, max_interval)
        self.attempts: list[float] = []

    def _reap_worker(self, worker_pid: int, signal: int) -> bool:
        self.attempts.append(time.monotonic())
        if len(self.attempts) <= self.failures:
            return False
        return super()._reap_worker(worker_pid, signal)


def test_d04_failed_reap_is_tried_again(fifo_path: str, fork_worker: Fork) -> None:
    """A worker that could not be signalled is signalled in a later round."""
    server = FailingServer(fifo_path, "run", 0.05)
    server.failures = 3
    with running(server):
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.2)
        worker.receive()
        assert worker.wait(5) == -signal.SIGKILL
        eventually(lambda: not server._timers)
        assert len(server.attempts) == 4


def test_d04_retries_end_with_the_worker(fifo_path: str, fork_worker: Fork) -> None:
    """A worker that can never be signalled is tried until it is gone, and then forgotten."""
    server = FailingServer(fifo_path, "run", 0.05)
    server.failures = 10**9
    with running(server):
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.2)
        worker.receive()
        eventually(lambda: len(server.attempts) >= 3, timeout=5)
        worker.process.kill()
        eventually(lambda: not server._timers, timeout=5)


def test_d04_retries_are_no_busy_loop(fifo_path: str, fork_worker: Fork) -> None:
    """Between two tries lies a round: the server waits, however often it fails."""
    server = FailingServer(fifo_path, "run", 0.2)
    server.failures = 10**9
    with running(server):
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.1)
        worker.receive()
        eventually(lambda: len(server.attempts) >= 4, timeout=10)
        assert server.attempts[3] - server.attempts[0] >= 3 * 0.19


# D5 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "malformed",
    [
        b"rubbish\n",
        b"{\n",
        b"\xff\xfe\x00\n",
        b"[1, 2]\n",
        b"null\n",
        b'{"version": 1, "pid": 12}\n',
        b'{"pid": {}, "scope_id": [], "expiration_time": null, "signal": {}}\n',
        b"[" * 400 + b"\n",
        b'{"version": 1, "pid": 1e999, "scope_id": "s", "expiration_time": "x", "signal": 9}\n',
    ],
    ids=lambda data: ascii(data[:20].decode(errors="replace")),
)
def test_d05_malformed_line_is_dropped_alone(
    fifo_path: str, malformed: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the lines read together only the malformed one is lost, with a warning that shows it."""
    server = FileTimerServer(fifo_path, "run", 0.05)
    with running(server):
        FileTimerClient(fifo_path).acquire("first", time.time() + FAR)
        write_raw(fifo_path, wire_line(scope_id="before") + malformed + wire_line(scope_id="after"))
        eventually(lambda: len(server._timers) == 3, timeout=5)
        assert {scope for _, scope in server._timers} == {"first", "before", "after"}
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1


def test_d05_warning_truncates_the_line(fifo_path: str, caplog: pytest.LogCaptureFixture) -> None:
    """The log shows the head of a malformed line, not kilobytes of it."""
    server = FileTimerServer(fifo_path, "run", 0.05)
    with running(server):
        write_raw(fifo_path, b"HEAD" + b"x" * 3000 + b"TAIL\n" + wire_line())
        eventually(lambda: server._timers, timeout=5)
    message = caplog.text
    assert "HEAD" in message
    assert "TAIL" not in message
    assert len(message) < 1500


def test_d05_overrunner_amid_rubbish_is_reaped(fifo_path: str, fork_worker: Fork) -> None:
    """A real worker whose request has rubbish before and behind it is reaped at its deadline."""
    with running(FileTimerServer(fifo_path, "run", 1)):
        FileTimerClient(fifo_path).acquire("first", time.time() + FAR)
        write_raw(fifo_path, b"rubbish\n" * 20)
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.3)
        deadline = worker.receive()
        write_raw(fifo_path, b"rubbish\n" * 20)
        assert_reaped_in_time(worker, deadline)


# D6 ---------------------------------------------------------------------------------------------


@pytest.fixture
def signals_sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every signal that this process sends is noted and not sent: one of them is kill(-1, 9)."""
    sent: list[tuple[Any, ...]] = []

    def record(*args: Any) -> None:
        # Signal 0 is a question, not a signal.
        if args[1] != 0:
            sent.append(args)

    monkeypatch.setattr(os, "kill", record)
    monkeypatch.setattr(os, "killpg", record)
    if hasattr(signal, "pidfd_send_signal"):
        monkeypatch.setattr(signal, "pidfd_send_signal", record)
    return sent


FORBIDDEN_PIDS: dict[str, Callable[[], int]] = {
    "zero": lambda: 0,
    "everybody": lambda: -1,
    "init": lambda: 1,
    "own": os.getpid,
    "own-group": lambda: -os.getpgrp(),
}


@pytest.mark.parametrize("name", FORBIDDEN_PIDS)
def test_d06_pids_that_are_never_signalled(
    link: Link,
    signals_sent: list[tuple[Any, ...]],
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    """Requests in the name of 0, -1, 1, the server or its group: a warning and no signal."""
    pid = FORBIDDEN_PIDS[name]()
    with running(link.server(0.05)):
        link.put(pid, "forbidden", time.time() - 1)
        # Due after it, and allowed: once this one is signalled, the other was dealt with.
        link.put(-3, "allowed", time.time() + 0.1)
        eventually(lambda: (-3, signal.SIGKILL) in signals_sent, timeout=5)
    assert signals_sent == [(-3, signal.SIGKILL)]
    assert [
        record
        for record in caplog.records
        if record.levelno == logging.WARNING
        # That one tells of every overrun, whatever comes of it.
        and record.name != "elastic_timer.debug_info_logging"
        and f" {pid} " in record.getMessage()
    ]


@pytest.mark.parametrize("name", ["own", "own-group", "zero"])
def test_d06_server_survives_a_request_in_its_own_name(
    link: Link, serve: Serve, fork_worker: Fork, name: str
) -> None:
    """With nothing patched: the server is told to kill itself, and goes on serving."""
    # A group of its own: one that shared pytest's would take it along.
    server = serve(lambda: link.server(0.05), prepare=os.setpgrp)
    target = {"own": server.pid, "own-group": -server.pid, "zero": 0}[name]
    link.put(target, "suicide", time.time() - 1)
    worker = fork_worker(overrun, link.client, 0.2)
    assert_reaped_in_time(worker, worker.receive())
    assert is_alive(server)
    eventually(lambda: not server.ask("len(server._timers)"))


# D7 ---------------------------------------------------------------------------------------------


def reuses_a_pid() -> bool:
    process = subprocess.Popen(["true"])
    process.wait()
    again = start_with_pid(process.pid)
    if again is None:
        return False
    again.kill()
    again.wait()
    return True


def pid_can_be_reused() -> bool:
    """Probes the capability by doing it, more than once, as others may be given the pid first."""
    return any(reuses_a_pid() for _ in range(9))


@pytest.fixture
def reuse_pid() -> Iterator[Callable[[int], subprocess.Popen[bytes] | None]]:
    """Gives a free pid to a bystander, if it still is; skips where the kernel does not let us."""
    if not pid_can_be_reused():
        pytest.skip(f"no permission to choose a pid through {LAST_PID}")
    bystanders = []

    def reuse(pid: int) -> subprocess.Popen[bytes] | None:
        process = start_with_pid(pid)
        if process is not None:
            bystanders.append(process)
        return process

    yield reuse
    for process in bystanders:
        process.kill()
        process.wait()


@pytest.mark.usefixtures("_chooses_pids")
def test_d07_bystander_with_a_reused_pid_lives(
    link: Link,
    serve: Serve,
    fork_worker: Fork,
    reuse_pid: Callable[[int], subprocess.Popen[bytes] | None],
) -> None:
    """A process that got a dead worker's pid while the server could not look is not signalled."""
    server = serve(lambda: link.server(0.05))
    bystander = None
    while bystander is None:  # Others on this machine may be given the pid first.
        server.go_on()
        worker = fork_worker(exit_at_once, link.client, 0.5)
        deadline = worker.receive()
        eventually(functools.partial(server.holds, worker.pid))
        # Stopped, it can see neither the exit nor the new process before the deadline.
        server.pause()
        worker.send("leave")
        assert worker.wait() == 0
        bystander = reuse_pid(worker.pid)
    eventually(lambda: time.monotonic() > deadline)
    server.go_on()
    sentinel = fork_worker(overrun, link.client, 0.2)
    assert_reaped_in_time(sentinel, sentinel.receive())
    assert bystander.poll() is None


# D8 ---------------------------------------------------------------------------------------------


def flood(channel: Any, client: TimerClient, pairs: int) -> None:
    """Acquires and releases as fast as it goes; sends how many pairs went through, or the error."""
    try:
        for number in range(pairs):
            client.acquire(f"scope {number % 7}", time.time() + FAR)
            client.release(f"scope {number % 7}")
    except Exception as error:
        channel.send(repr(error))
    else:
        channel.send(pairs)


def test_d08_busy_clients_see_no_error_and_nothing_is_lost(
    fifo_path: str, fork_worker: Fork
) -> None:
    """However long `max_interval` is, two flooding clients are served; every request counts."""
    server = FileTimerServer(fifo_path, "run", 10)
    with running(server):
        workers = [fork_worker(flood, FileTimerClient(fifo_path), 2000) for _ in range(2)]
        assert [worker.receive() for worker in workers] == [2000, 2000]
        eventually(lambda: server._request_count == 2 * 2 * 2000)
        eventually(lambda: not server._timers)


def flood_until_error(channel: Any, client: TimerClient) -> None:
    """Acquires until that fails; sends how many went through, the error and how long it took."""
    sent = 0
    while True:
        started = time.monotonic()
        try:
            client.acquire("x" * 300, time.time() + FAR)
        except Exception as error:
            channel.send((sent, type(error), time.monotonic() - started))
            channel.recv()
            return
        sent += 1


def stopped_server(link: Link, serve: Serve) -> ServerProcess:
    """A server that has had its first request and was then stopped by a signal."""
    server = serve(lambda: link.server(5))
    link.client.acquire("first", time.time() + FAR)
    eventually(lambda: server.ask("server._request_count") == 1)
    server.pause()
    return server


def test_d08_client_waits_for_a_full_pipe_then_raises(
    file_link: Link, serve: Serve, fork_worker: Fork
) -> None:
    """With the server stopped a client waits for a second or so; what it sent is not lost."""
    server = stopped_server(file_link, serve)
    worker = fork_worker(flood_until_error, file_link.client)
    sent, error, waited = worker.receive()
    assert sent > 0
    assert error is BrokenPipeError
    assert 0.5 < waited < 5
    server.go_on()
    eventually(lambda: server.ask("server._request_count") >= 1 + sent)
    assert server.ask("server._request_count") == 1 + sent


def test_d08_full_pipe_only_delays_the_client(
    file_link: Link, serve: Serve, fork_worker: Fork
) -> None:
    """A server that goes on reading within the second gets the request that had to wait."""
    server = stopped_server(file_link, serve)
    filler = fork_worker(flood_until_error, file_link.client)
    sent, _, _ = filler.receive()
    assert sent > 0
    late = fork_worker(flood, file_link.client, 1)
    # Sleeping within its first request: it has found the pipe full.
    eventually(lambda: process_state(late.pid) == "S")
    server.go_on()
    assert late.receive() == 1
    eventually(lambda: server.ask("server._request_count") == 1 + sent + 2)


# D9 ---------------------------------------------------------------------------------------------


def test_d09_stop_returns_at_once_with_the_thread_gone(link: Link, fork_worker: Fork) -> None:
    """`stop()` does not wait for `max_interval`, idle or with timers, and leaves no thread."""
    before = set(threading.enumerate())
    server = link.server(4)
    for is_idle in (True, False):
        server.start()
        if not is_idle:
            worker = fork_worker(overrun, link.client, 60)
            worker.receive()
            eventually(lambda: server._timers)
        started = time.monotonic()
        server.stop()
        assert time.monotonic() - started < 2
        assert not [thread for thread in threading.enumerate() if thread not in before]
    assert is_alive(worker)


def test_d09_server_can_be_started_again(link: Link, fork_worker: Fork) -> None:
    """Start, stop, start: the second time it supervises as well as the first."""
    server = link.server(1)
    with running(server):
        pass
    with running(server):
        worker = fork_worker(overrun, link.client, 0.3)
        assert_reaped_in_time(worker, worker.receive())


def test_d09_server_is_a_context_manager(link: Link, fork_worker: Fork) -> None:
    """`with` starts the server and stops it, also where the body raises."""
    before = set(threading.enumerate())
    server = link.server(1)
    with contextlib.suppress(LookupError), server as entered:
        assert entered is server
        worker = fork_worker(overrun, link.client, 0.3)
        assert_reaped_in_time(worker, worker.receive())
        raise LookupError
    assert not set(threading.enumerate()) - before


# D10 --------------------------------------------------------------------------------------------


def test_d10_step_forward_kills_nobody(link: Link, serve: Serve, fork_worker: Fork) -> None:
    """An hour's step of the wall clock leaves a worker alone that has a minute left."""
    server = serve(lambda: link.server(0.05))
    patient = fork_worker(overrun, link.client, 60)
    patient.receive()
    eventually(lambda: server.holds(patient.pid))
    server.ask("step(3600)", step=step_clock)
    # On the stepped clock this one is due 0.3 s after the step; it shows that rounds were run.
    sentinel = fork_worker(overrun, link.client, 3600.3)
    deadline = sentinel.receive() - 3600
    assert_reaped_in_time(sentinel, deadline)
    assert is_alive(patient)
    assert server.holds(patient.pid)


def test_d10_step_back_immortalises_nobody(link: Link, serve: Serve, fork_worker: Fork) -> None:
    """A timer registered before the clock was set back by an hour is kept to the second."""
    server = serve(lambda: link.server(0.05))
    worker = fork_worker(overrun, link.client, 0.6)
    deadline = worker.receive()
    eventually(lambda: server.holds(worker.pid))
    server.ask("step(-3600)", step=step_clock)
    assert_reaped_in_time(worker, deadline)


# D11 --------------------------------------------------------------------------------------------


def hold_the_gil(channel: Any, client: TimerClient, after: float) -> None:
    """Stuck in C with the GIL held, right after the block was entered."""
    sleep = ctypes.PyDLL(None).sleep
    # No other thread gets a turn between the acquire and the call into C.
    sys.setswitchinterval(1000)
    channel.send(time.monotonic() + after)
    with expires(after=after, scope="stuck", client=client):
        sleep(600)


def test_d11_worker_that_holds_the_gil_is_reaped(queue_link: Link, fork_worker: Fork) -> None:
    """The request of a worker whose threads never run again has reached the server."""
    with running(queue_link.server(1)):
        worker = fork_worker(hold_the_gil, queue_link.client, 0.4)
        assert_reaped_in_time(worker, worker.receive())


def acquire_and_die(channel: Any, client: TimerClient) -> None:
    sys.setswitchinterval(1000)
    client.acquire("last words", time.time() + FAR)
    os.kill(os.getpid(), signal.SIGKILL)


def test_d11_request_has_left_when_acquire_returns(fork_worker: Fork) -> None:
    """A worker killed right after `acquire()` has sent its request."""
    queue: Any = multiprocessing.get_context("fork").Queue()
    for _ in range(10):
        worker = fork_worker(acquire_and_die, LocalTimerClient(queue))
        assert worker.wait() == -signal.SIGKILL
        request = queue.get(timeout=5)
        assert (request.worker_id, request.scope_id) == (worker.pid, "last words")
    assert queue.empty()


def die_holding_the_lock(channel: Any, queue: Any) -> None:
    queue._wlock.acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def test_d11_lock_of_a_dead_worker_blocks_nobody(fork_worker: Fork) -> None:
    """A worker killed while it held the queue's lock does not silence the others."""
    queue: Any = multiprocessing.get_context("fork").Queue()
    client = LocalTimerClient(queue)
    with running(LocalTimerServer(queue, 1)) as server:
        killed = fork_worker(die_holding_the_lock, queue)
        assert killed.wait() == -signal.SIGKILL
        worker = fork_worker(overrun, client, 0.3)
        assert_reaped_in_time(worker, worker.receive())
        finished = fork_worker(flood, client, 5)
        assert finished.receive() == 5
        assert finished.wait() == 0
        eventually(lambda: not server._timers)


# D12 --------------------------------------------------------------------------------------------


def make_regular_file(path: str) -> None:
    Path(path).write_text("precious")


def make_link_to_a_fifo(path: str) -> None:
    os.mkfifo(path + ".target")
    os.symlink(path + ".target", path)


def make_dangling_link(path: str) -> None:
    os.symlink(path + ".nowhere", path)


def make_socket(path: str) -> None:
    # A socket's path may be too long for its address: bind within its folder.
    here = os.getcwd()
    os.chdir(os.path.dirname(path))
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.basename(path))
    finally:
        os.chdir(here)


@pytest.mark.parametrize(
    "make",
    [make_regular_file, os.mkdir, make_link_to_a_fifo, make_dangling_link, make_socket],
    ids=["file", "folder", "link-to-fifo", "dangling-link", "socket"],
)
def test_d12_what_is_no_fifo_is_never_replaced(fifo_path: str, make: Callable[[str], None]) -> None:
    """Whatever is no FIFO at the path is an error for the server and stays as it is."""
    make(fifo_path)
    before = os.lstat(fifo_path)
    with pytest.raises(FileExistsError, match=r"timers\.fifo"):
        FileTimerServer(fifo_path, "run")
    after = os.lstat(fifo_path)
    assert (before.st_ino, before.st_mode, before.st_mtime_ns, before.st_size) == (
        after.st_ino,
        after.st_mode,
        after.st_mtime_ns,
        after.st_size,
    )


def test_d12_left_over_fifo_is_replaced_and_private(fifo_path: str) -> None:
    """A FIFO that lies there is replaced; the new one is for its owner only, whatever the umask."""
    os.mkfifo(fifo_path)
    os.chmod(fifo_path, 0o666)
    inode = os.stat(fifo_path).st_ino
    before = os.umask(0)
    try:
        server = FileTimerServer(fifo_path, "run", 0.1)
    finally:
        os.umask(before)
    made = os.lstat(fifo_path)
    server.stop()
    assert stat.S_ISFIFO(made.st_mode)
    assert stat.S_IMODE(made.st_mode) == 0o600
    assert inode  # The number itself may be used again.
    assert not os.path.lexists(fifo_path)


def test_d12_mode_is_0600_under_a_strict_umask(fifo_path: str) -> None:
    """A umask that takes everything away leaves the owner reading and writing."""
    before = os.umask(0o777)
    try:
        server = FileTimerServer(fifo_path, "run", 0.1)
    finally:
        os.umask(before)
    mode = stat.S_IMODE(os.lstat(fifo_path).st_mode)
    server.stop()
    assert mode == 0o600


def test_d12_stop_leaves_anothers_file_alone(fifo_path: str) -> None:
    """What has come to lie at the path since is not removed by `stop()`."""
    server = FileTimerServer(fifo_path, "run", 0.1)
    with running(server):
        os.unlink(fifo_path)
        Path(fifo_path).write_text("precious")
    assert Path(fifo_path).read_text() == "precious"


def test_d12_stop_leaves_another_servers_fifo_alone(fifo_path: str, fork_worker: Fork) -> None:
    """A server that was started later on the same path keeps its FIFO when the first one stops."""
    first = FileTimerServer(fifo_path, "first", 0.1)
    second = FileTimerServer(fifo_path, "second", 0.1)
    first.stop()
    with running(second):
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.2)
        assert_reaped_in_time(worker, worker.receive())


# D13 --------------------------------------------------------------------------------------------


def test_d13_body_exception_wins_over_a_failed_release(
    fifo_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the server gone, the caller gets the body's exception; the failed release is logged."""
    server = FileTimerServer(fifo_path, "run", 0.1)

    def body() -> None:
        with expires(after=60, scope="orphan", client=FileTimerClient(fifo_path)):
            server.stop()
            raise LookupError("the body's own")

    with running(server), pytest.raises(LookupError, match="the body's own"):
        body()
    assert any(
        record.levelno >= logging.WARNING and "orphan" in record.getMessage()
        for record in caplog.records
    )


def test_d13_failed_release_propagates_where_nothing_else_went_wrong(fifo_path: str) -> None:
    """A body without an exception: the failed release is the error, here as upstream.

    What differs is that a decorated coroutine is held to the same.
    """
    server = FileTimerServer(fifo_path, "run", 0.1)

    @expires(after=60, client=FileTimerClient(fifo_path))
    async def body() -> None:
        server.stop()

    with running(server), pytest.raises(BrokenPipeError):
        asyncio.run(body())


# D14 --------------------------------------------------------------------------------------------


def test_d14_log_event_that_raises_prevents_nothing(
    fifo_path: str, fork_worker: Fork, caplog: pytest.LogCaptureFixture
) -> None:
    """A callback that always raises: the server starts, reaps and stops, and logs the errors."""

    def log_event(name: str, request: FileTimerRequest | None) -> None:
        raise RuntimeError("the callback's own")

    with running(FileTimerServer(fifo_path, "run", 0.1, True, log_event)):
        for _ in range(2):
            worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.2)
            assert_reaped_in_time(worker, worker.receive())
    assert "the callback's own" in caplog.text


def test_d14_debug_hook_that_raises_prevents_nothing(
    fifo_path: str,
    fork_worker: Fork,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A debug hook that raises is logged; the worker is reaped."""

    def hook(run_id: str, expired_timers: dict[int, list[str]]) -> None:
        if expired_timers:
            raise RuntimeError("the hook's own")

    monkeypatch.setattr(file_based_local_timer, "log_debug_info_for_expired_timers", hook)
    with running(FileTimerServer(fifo_path, "run", 0.1)):
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.2)
        assert_reaped_in_time(worker, worker.receive())
    assert "the hook's own" in caplog.text


# D15 --------------------------------------------------------------------------------------------


def test_d15_forked_child_does_not_keep_the_fifo_open(
    file_link: Link, serve: Serve, fork_worker: Fork
) -> None:
    """With the server dead a client gets BrokenPipeError, though a child of the server lives on."""
    server = serve(lambda: file_link.server(0.05))
    file_link.client.acquire("first", time.time() + FAR)
    eventually(lambda: server.ask("server._request_count") == 1)
    orphan = server.ask("fork()", fork=fork_and_live_on)
    try:
        server.kill()
        with pytest.raises(BrokenPipeError):
            file_link.client.acquire("into the void", time.time() + FAR)
        assert is_alive(orphan)
    finally:
        os.kill(orphan, signal.SIGKILL)
        wait_dead(orphan)


# D16 --------------------------------------------------------------------------------------------


def test_d16_request_of_a_reaped_worker_is_dropped(file_link: Link, fork_worker: Fork) -> None:
    """A request that arrives from a worker already reaped (still a zombie here) is no timer."""
    events: list[tuple[str, Any]] = []
    server = file_link.server(0.05)
    server._log_event = lambda name, request: events.append((name, request))
    with running(server):
        worker = fork_worker(overrun, file_link.client, 0.2)
        wait_dead(worker, 5 + worker.receive() - time.monotonic())
        count = server._request_count
        file_link.put(worker.pid, "late", time.time() + FAR)
        eventually(lambda: server._request_count == count + 1)
        eventually(lambda: not server._timers, timeout=5)


def test_d16_request_of_a_worker_about_to_die_is_dropped(
    fifo_path: str, fork_worker: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither is one from a worker that was killed and did not die of it yet."""
    reaped: list[int] = []

    def take_its_time(self: FileTimerServer, worker_pid: int, signal: int) -> bool:
        """Say that the signal was sent, which has no effect yet."""
        reaped.append(worker_pid)
        return True

    monkeypatch.setattr(FileTimerServer, "_reap_worker", take_its_time)
    client = FileTimerClient(fifo_path)
    with running(FileTimerServer(fifo_path, "run", 0.05)) as server:
        worker = fork_worker(overrun, client, 0.1)
        worker.receive()
        eventually(lambda: reaped and not server._timers)
        for pid in (worker.pid, os.getpid()):
            client._send_request(FileTimerRequest(pid, "late", time.time() + FAR, 9))
        eventually(lambda: server._timers)
        assert list(server._timers) == [(os.getpid(), "late")]


def test_d16_request_of_a_worker_long_gone_is_dropped(queue_link: Link, fork_worker: Fork) -> None:
    """A request from a worker that has exited is no timer."""
    gone = fork_worker(flood, queue_link.client, 0)
    gone.receive()
    assert gone.wait() == 0
    with running(queue_link.server(0.05)) as server:
        queue_link.put(gone.pid, "late", time.time() + FAR)
        queue_link.put(os.getpid(), "marker", time.time() + FAR)
        eventually(lambda: (os.getpid(), "marker") in server._timers)
        eventually(lambda: list(server._timers) == [(os.getpid(), "marker")], timeout=5)


# D17 --------------------------------------------------------------------------------------------


def at_depth(depth: int, function: Callable[[], float]) -> float:
    return function() if depth == 0 else at_depth(depth - 1, function)


def cost_of_default_scope() -> float:
    """Seconds that one unnamed block takes here; the least of many, so that load is left out."""
    recorder = ScopeRecorder()

    def once() -> float:
        started = time.perf_counter()
        with expires(after=1, client=recorder):
            pass
        return time.perf_counter() - started

    return min(once() for _ in range(300))


def cost_of_explicit_scope() -> float:
    recorder = ScopeRecorder()

    def once() -> float:
        started = time.perf_counter()
        with expires(after=1, scope="named", client=recorder):
            pass
        return time.perf_counter() - started

    return min(once() for _ in range(300))


def test_d17_default_scope_costs_about_as_much_as_a_name() -> None:
    """Naming an unnamed block is one frame look-up: it adds little to what a block costs."""
    assert at_depth(40, cost_of_default_scope) < 5 * at_depth(40, cost_of_explicit_scope)


def test_d17_cost_does_not_grow_with_the_depth_of_the_stack() -> None:
    """At depth 600 an unnamed block costs what it costs at depth 0."""
    assert at_depth(600, cost_of_default_scope) < 3 * cost_of_default_scope()


def block_at_line(line: int, file: str, before: str = "") -> Callable[[TimerClient], float]:
    """A function with an unnamed block at a line of its file; what it returns is the cost of it.

    Args:
        line: The line, from 4 on.
        file: The name of the file.
        before: What stands in each line of the function before it.
    """
    source = "\n".join(
        [
            "def once(client):",
            *[f"  {before}"] * (line - 3),
            "  started = clock()",
            "  with expires(after=1, client=client): pass",
            "  return clock() - started",
        ]
    )
    names: dict[str, Any] = {"clock": time.perf_counter, "expires": expires}
    exec(compile(source, file, "exec"), names)
    once: Callable[[TimerClient], float] = names["once"]
    return once


def test_d17_cost_does_not_grow_with_the_length_of_the_function() -> None:
    """After 3,000 lines that are skipped an unnamed block costs what it costs after one."""
    recorder = ScopeRecorder()
    short = block_at_line(4, "short.py")
    long = block_at_line(3004, "long.py", "if not client: print(client, client)")
    traced_before = sys.gettrace()
    sys.settrace(None)  # What measures the tests' coverage asks for the line's number, too.
    try:
        costs = [min(once(recorder) for _ in range(300)) for once in (short, long)]
    finally:
        sys.settrace(traced_before)
    assert costs[1] < 4 * costs[0]


def test_d01_default_scopes_of_more_places_than_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of functions made anew under one name each block has its own line, whenever it is entered."""
    monkeypatch.setattr(scopes, "_MOST_PLACES", 10)
    recorder = ScopeRecorder()
    blocks = [block_at_line(line, "cell.py") for line in (*range(4, 40), 4)]
    blocks.append(block_at_line(4, "cell.py", "clock()"))
    for block in blocks * 2:
        block(recorder)
    first, again = recorder.acquired[: len(blocks)], recorder.acquired[len(blocks) :]
    assert first[:-1] == [f"cell.py#{line}" for line in (*range(4, 40), 4)]
    assert first[-1].startswith("cell.py#4@")  # It stands at another place of that line's code.
    assert first == again
    assert len(scopes._places) <= 10


def test_d17_entering_reads_no_source_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a list of frames is built nor a source line looked up."""
    used: list[str] = []
    recorder = ScopeRecorder()
    with monkeypatch.context() as patch:
        for module, name in [
            (inspect, "stack"),
            (inspect, "getframeinfo"),
            (linecache, "getline"),
            (linecache, "getlines"),
            (linecache, "checkcache"),
        ]:
            real = getattr(module, name)

            def noted(*args: Any, _real: Any = real, _name: str = name, **kwargs: Any) -> Any:
                used.append(_name)
                return _real(*args, **kwargs)

            patch.setattr(module, name, noted)
        with expires(after=1, client=recorder):
            pass
    assert used == []
    assert len(recorder.acquired) == 1


# D18 --------------------------------------------------------------------------------------------


def unnamed(client: TimerClient, after: float, body: Callable[[], object]) -> None:
    """One block, whoever enters it."""
    with expires(after=after, client=client):
        body()


def overrun_in_one_of_two_threads(channel: Any, client: TimerClient, after: float) -> None:
    entered = threading.Event()

    def stuck() -> None:
        entered.set()
        time.sleep(FAR)

    deadline = time.monotonic() + after
    threading.Thread(target=unnamed, args=(client, after, stuck), daemon=True).start()
    entered.wait()
    thread = threading.Thread(target=unnamed, args=(client, FAR, lambda: None))
    thread.start()
    thread.join()
    unnamed(client, FAR, lambda: None)
    channel.send(deadline)
    time.sleep(FAR)


def test_d18_thread_that_leaves_does_not_disarm_another(link: Link, fork_worker: Fork) -> None:
    """Of two threads in one unnamed block one leaves, the other hangs: the worker is reaped."""
    with running(link.server(0.05)):
        worker = fork_worker(overrun_in_one_of_two_threads, link.client, 0.3)
        assert_reaped_in_time(worker, worker.receive())


def overrun_in_one_of_two_tasks(channel: Any, client: TimerClient, after: float) -> None:
    async def block(duration: float, seconds: float) -> None:
        with expires(after=seconds, client=client):
            await asyncio.sleep(duration)

    async def main() -> None:
        deadline = time.monotonic() + after
        stuck = asyncio.ensure_future(block(FAR, after))
        await asyncio.sleep(0)
        await asyncio.ensure_future(block(0, FAR))
        channel.send(deadline)
        await stuck

    asyncio.run(main())


def test_d18_task_that_leaves_does_not_disarm_another(link: Link, fork_worker: Fork) -> None:
    """Of two tasks in one unnamed block one leaves, the other hangs: the worker is reaped."""
    with running(link.server(0.05)):
        worker = fork_worker(overrun_in_one_of_two_tasks, link.client, 0.3)
        assert_reaped_in_time(worker, worker.receive())


def test_d18_scopes_of_threads_differ_and_recursion_shares_one() -> None:
    """The main thread's scope is `file#line`, others carry more; one thread's calls share one."""
    recorder = ScopeRecorder()
    configure(recorder)

    def recursive(depth: int, pause: Callable[[], object]) -> None:
        with expires(after=1):
            recursive(depth - 1, pause) if depth else pause()

    recursive(2, lambda: None)
    (main_scope,) = set(recorder.acquired)
    assert main_scope.rpartition("#")[2].isdecimal()
    recorder.acquired.clear()
    # Both are within the block at the same time: their identities differ.
    barrier = threading.Barrier(2)
    threads = [
        threading.Thread(target=recursive, args=(1, lambda: barrier.wait(20))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    scopes = set(recorder.acquired)
    assert len(recorder.acquired) == 4
    assert len(scopes) == 2
    assert main_scope not in scopes
    assert all(scope.startswith(main_scope) for scope in scopes)
    assert set(recorder.released) == {main_scope} | scopes


def test_d18_scopes_of_tasks_differ() -> None:
    """Two tasks at one line at the same time have two scopes that begin with `file#line`."""
    recorder = ScopeRecorder()

    async def block(both: list[None], entered: asyncio.Event) -> None:
        with expires(after=1, client=recorder):
            both.append(None)
            if len(both) == 2:
                entered.set()
            await entered.wait()

    async def main() -> None:
        both: list[None] = []
        entered = asyncio.Event()
        await asyncio.gather(block(both, entered), block(both, entered))

    asyncio.run(main())
    assert len(set(recorder.acquired)) == 2
    assert set(recorder.released) == set(recorder.acquired)
    assert all(scope.startswith(f"{__file__}#") for scope in recorder.acquired)


def test_d18_thread_may_leave_from_a_context_it_entered(fork_worker: Fork) -> None:
    """What was acquired is released under the same name, wherever the exit happens."""
    recorder = ScopeRecorder()
    with contextlib.ExitStack() as stack:
        stack.enter_context(expires(after=1, client=recorder))
        thread = threading.Thread(target=stack.close)
        thread.start()
        thread.join()
    assert recorder.released == recorder.acquired
    assert recorder.acquired[0].rpartition("#")[0] == __file__
