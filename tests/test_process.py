"""The hold on a worker's process: nobody else is ever taken for it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_timer._server import process as _process
from elastic_timer._server.process import (
    ProcessHandle,
    SpareDescriptor,
    is_running,
    name_of,
    refusal,
    state_of,
    user_of,
)
from tests.support import (
    NOBODY,
    Fork,
    ForkedWorker,
    eventually,
    is_alive,
    no_more_descriptors,
    wait_dead,
    wait_to_be_killed,
)

HAS_PIDFD = hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal")
HAS_PROC = os.path.exists("/proc/self/stat")


@pytest.fixture
def worker(fork_worker: Fork) -> ForkedWorker:
    """A process that waits."""
    return fork_worker(wait_to_be_killed)


@pytest.fixture(
    params=[
        pytest.param(
            "pidfd", marks=pytest.mark.skipif(not HAS_PIDFD, reason="no pidfd on this system")
        ),
        pytest.param(
            "start-time", marks=pytest.mark.skipif(not HAS_PROC, reason="no /proc on this system")
        ),
        "number",
    ]
)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way to hold a process: what the others need is taken away."""
    if request.param != "pidfd":
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    if request.param == "number":
        monkeypatch.setattr(_process, "stat_of", lambda pid: None)
    return str(request.param)


# ProcessHandle ----------------------------------------------------------------------------------


def test_signal_reaches_the_process(worker: ForkedWorker, way: str) -> None:
    """A signal that is sent arrives."""
    with ProcessHandle(worker.pid) as process:
        assert (process.pidfd is not None) == (way == "pidfd")
        assert not process.has_exited()
        process.send(signal.SIGTERM)
        assert worker.wait() == -signal.SIGTERM


def test_process_that_was_waited_for_has_exited(worker: ForkedWorker, way: str) -> None:
    """Once it was reaped it has exited, and a signal to it is a ProcessLookupError."""
    with ProcessHandle(worker.pid) as process:
        worker.process.kill()
        worker.wait()
        assert process.has_exited()
        with pytest.raises(ProcessLookupError):
            process.send(signal.SIGTERM)


def test_zombie_has_exited(worker: ForkedWorker, way: str) -> None:
    """One that ended and was not waited for yet has exited; a number alone cannot tell."""
    with ProcessHandle(worker.pid) as process:
        worker.process.kill()
        wait_dead(worker)
        assert process.has_exited() == (way != "number")


def test_no_such_process(worker: ForkedWorker, way: str) -> None:
    """A process that is gone cannot be held."""
    worker.process.kill()
    worker.wait()
    with pytest.raises(ProcessLookupError):
        ProcessHandle(worker.pid)


def test_closing_twice_does_no_harm(worker: ForkedWorker, way: str) -> None:
    """The descriptor is given back once."""
    process = ProcessHandle(worker.pid)
    process.close()
    process.close()


@pytest.mark.skipif(not HAS_PROC, reason="no /proc on this system")
def test_number_given_to_another_process(
    worker: ForkedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a pidfd, another start time under the same number is another process: no signal."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    process = ProcessHandle(worker.pid)
    # Forged: as if the one that was held had started earlier. The real thing is in D7.
    assert process._start is not None
    process._start -= 1
    assert process.has_exited()
    with pytest.raises(ProcessLookupError):
        process.send(signal.SIGKILL)
    assert is_alive(worker)


@contextlib.contextmanager
def other_thread() -> Iterator[int]:
    """The number that the system gave to a thread of this process, which runs meanwhile."""
    numbers: list[int] = []
    done = threading.Event()

    def tell() -> None:
        numbers.append(threading.get_native_id())
        done.wait()

    thread = threading.Thread(target=tell)
    thread.start()
    try:
        yield eventually(lambda: numbers)[0]
    finally:
        done.set()
        thread.join()


@pytest.mark.skipif(not HAS_PIDFD, reason="no pidfd on this system")
def test_thread_is_no_process() -> None:
    """A thread's number is none of a process, though kill(2) would take it."""
    with other_thread() as number, pytest.raises(ProcessLookupError):
        ProcessHandle(number)


def lead_a_group(channel: Any) -> None:
    os.setpgid(0, 0)
    channel.send("leads")
    channel.recv()


def test_group_is_signalled_as_one(fork_worker: Fork) -> None:
    """A negative pid is a group: it never counts as exited, and signals go to all of it."""
    leader = fork_worker(lead_a_group)
    assert leader.receive() == "leads"
    with ProcessHandle(-leader.pid) as group:
        assert group.pidfd is None
        assert not group.has_exited()
        group.send(signal.SIGTERM)
        assert leader.wait() == -signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            group.send(signal.SIGTERM)


def exhaust_descriptors(channel: Any, victim: int) -> None:
    """Holds a process without a descriptor to be had; reports warnings, then signals it."""
    logs: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logs.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("elastic_timer").addHandler(handler)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    opened = []
    with contextlib.suppress(OSError):
        while True:
            opened.append(os.dup(0))
    handles = [ProcessHandle(victim) for _ in range(3)]
    held = [handle.pidfd for handle in handles]
    handles[0].send(signal.SIGTERM)
    for descriptor in opened:
        os.close(descriptor)
    channel.send((len(opened), held, logs))


@pytest.mark.skipif(not HAS_PIDFD, reason="no pidfd on this system")
def test_without_descriptors_the_number_is_used(worker: ForkedWorker, fork_worker: Fork) -> None:
    """With none left a process is held by its number, and that is warned of once."""
    _process._warn_once.cache_clear()
    opened, held, logs = fork_worker(exhaust_descriptors, worker.pid).receive()
    assert opened > 0
    assert held == [None] * 3
    assert len(logs) == 1
    assert "descriptors" in logs[0]
    assert worker.wait() == -signal.SIGTERM


@pytest.mark.skipif(not HAS_PROC, reason="no /proc on this system")
def test_spare_descriptor(worker: ForkedWorker) -> None:
    """Kept open, it lets /proc be read when there is no other; given back, nothing does."""
    spare = SpareDescriptor()
    with no_more_descriptors():
        assert state_of(worker.pid) == "unknown"
        with spare.lent():
            assert state_of(worker.pid) in "RS"
        assert state_of(worker.pid) == "unknown"
        with spare.lent():  # It came back.
            assert state_of(worker.pid) in "RS"
            taken = os.dup(0)  # Somebody is faster than it.
        with spare.lent():
            assert state_of(worker.pid) == "unknown"
        os.close(taken)
        spare.close()
    spare.close()


@contextlib.contextmanager
def failing_pidfd_open(monkeypatch: pytest.MonkeyPatch, number: int) -> Iterator[None]:
    def fail(pid: int, flags: int = 0) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pidfd_open", fail, raising=False)
        yield


@pytest.mark.skipif(not HAS_PIDFD, reason="no pidfd on this system")
@pytest.mark.parametrize("number", [errno.ENFILE, errno.ENOSYS, errno.EPERM])
def test_pidfd_that_cannot_be_had(
    worker: ForkedWorker, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """An old kernel or a sandbox that forbids it: the number is used, and signals arrive."""
    with failing_pidfd_open(monkeypatch, number):
        process = ProcessHandle(worker.pid)
    assert process.pidfd is None
    process.send(signal.SIGTERM)
    assert worker.wait() == -signal.SIGTERM


def signal_as_nobody(channel: Any, victim: int) -> None:
    try:
        os.setuid(NOBODY)
    except OSError:
        channel.send(None)
        return
    errors = []
    for forget in (False, True):
        if forget and hasattr(os, "pidfd_open"):
            del os.pidfd_open
        try:
            with ProcessHandle(victim) as process:
                assert not process.has_exited()
                process.send(signal.SIGKILL)
        except OSError as error:
            errors.append(type(error))
    channel.send(errors)


def test_another_users_process(worker: ForkedWorker, fork_worker: Fork) -> None:
    """It runs, and a signal to it is a PermissionError, by descriptor and by number."""
    errors = fork_worker(signal_as_nobody, worker.pid).receive()
    if errors is None:
        pytest.skip("only a privileged process becomes another user")
    assert errors == [PermissionError] * 2
    assert is_alive(worker)


# is_running -------------------------------------------------------------------------------------


def test_is_running(worker: ForkedWorker, way: str) -> None:
    """A process runs until it has ended."""
    assert is_running(os.getpid())
    assert is_running(worker.pid)
    worker.process.kill()
    worker.wait()
    assert not is_running(worker.pid)


def ask_as_nobody(channel: Any) -> None:
    """Ask for the init process, of which nothing but kill(2) tells."""
    was_root = os.getuid() == 0
    if was_root:
        with contextlib.suppress(OSError):
            os.setresuid(NOBODY, NOBODY, 0)
    may_signal = True
    try:
        os.kill(1, 0)
    except PermissionError:
        may_signal = False
    channel.send((may_signal, is_running(1)))
    if was_root:
        os.setresuid(0, 0, 0)


def test_another_users_process_runs(monkeypatch: pytest.MonkeyPatch, fork_worker: Fork) -> None:
    """By its number alone, a process that we may not signal is one that runs."""
    monkeypatch.delattr(os, "pidfd_open", raising=False)
    monkeypatch.setattr(_process, "stat_of", lambda pid: None)
    asking = fork_worker(ask_as_nobody)
    may_signal, runs = asking.receive()
    assert asking.wait() == 0
    if may_signal:
        pytest.skip("this system lets a process become no other user than init's")
    assert runs


def test_stopped_process_runs(worker: ForkedWorker, way: str) -> None:
    """A process that was stopped has not ended."""
    os.kill(worker.pid, signal.SIGSTOP)
    assert is_running(worker.pid)


def test_group_is_taken_to_run(way: str) -> None:
    """Of a group only a signal tells whether it has members."""
    assert is_running(-3)


# refusal ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pid", "reason"),
    [
        (0, "group"),
        (-1, "every process"),
        (1, "init"),
        (os.getpid(), "own process"),
        (-os.getpgrp(), "own process group"),
    ],
    ids=["zero", "everybody", "init", "own", "own-group"],
)
def test_refused(pid: int, reason: str) -> None:
    """What must never be signalled is refused with a reason to be logged."""
    text = refusal(pid)
    assert text is not None
    assert reason in text


def test_others_are_not_refused(worker: ForkedWorker) -> None:
    """Workers and groups of workers may be signalled, and so may the server's parent."""
    for pid in (worker.pid, -3, -worker.pid, os.getppid() if os.getppid() > 1 else worker.pid):
        assert refusal(pid) is None


@pytest.mark.skipif(not HAS_PROC, reason="no /proc on this system")
def test_thread_of_the_server_is_refused() -> None:
    """kill(2) on a thread's number hits all of its process."""
    with other_thread() as number:
        reason = refusal(number)
    assert reason == "it is a thread of the server's own process"


def refusal_of_own(channel: Any) -> None:
    os.setpgid(0, 0)
    channel.send([refusal(os.getpid()), refusal(-os.getpid()), refusal(os.getppid())])


def test_refusal_follows_a_fork(fork_worker: Fork) -> None:
    """In a forked child its own pid and group are refused, not its parent's."""
    own, group, parent = fork_worker(refusal_of_own).receive()
    assert own
    assert group
    assert parent is None


def test_module_needs_no_pidfd(spawn: Callable[..., Any]) -> None:
    """Where the system has none, the import works and processes are held by their numbers."""
    child = spawn(
        """
        import os, signal, sys
        for module, name in ((os, "pidfd_open"), (signal, "pidfd_send_signal")):
            if hasattr(module, name):
                delattr(module, name)
        from elastic_timer._server.process import ProcessHandle
        with ProcessHandle(os.getpid()) as process:
            print(process.pidfd, process.has_exited(), flush=True)
        """
    )
    assert child.readline() == "None False"


@pytest.mark.skipif(not HAS_PROC, reason="no /proc on this system")
def test_name_and_user(fork_worker: Callable[..., Any]) -> None:
    """Of a process that is there what the system has; of one that is gone nothing."""
    worker = fork_worker(wait_to_be_killed)
    with open("/proc/self/comm") as file:
        assert name_of(worker.pid) == file.read().rstrip("\n")
    assert user_of(worker.pid) == os.getuid()
    worker.process.kill()
    worker.process.join()
    assert (name_of(worker.pid), user_of(worker.pid)) == ("", None)
