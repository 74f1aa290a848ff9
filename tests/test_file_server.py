"""The file server's life: its start and stop, its FIFO, its rounds."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
    _clock,
)
from elastic_timer._transport.fifo import FifoSource
from tests.support import (
    FAR,
    Fork,
    Spawn,
    assert_reaped_in_time,
    eventually,
    overrun,
    running,
)

# The server's life --------------------------------------------------------------------------------


def test_clients_can_send_once_start_has_returned(fifo_path: str, client: FileTimerClient) -> None:
    """After `start()` the FIFO has its reader: no request has to be tried twice."""
    for _ in range(5):
        with running(FileTimerServer(fifo_path, "run", 0.05)):
            os.close(os.open(fifo_path, os.O_WRONLY | os.O_NONBLOCK))


def test_starting_twice_does_no_harm(fifo_path: str, fork_worker: Fork) -> None:
    """A second `start()` changes nothing: one thread, and workers are reaped as before."""
    server = FileTimerServer(fifo_path, "run", 0.05)
    with running(server):
        threads = set(threading.enumerate())
        server.start()
        assert set(threading.enumerate()) == threads
        worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.2)
        assert_reaped_in_time(worker, worker.receive())


def test_stopping_twice_does_no_harm(fifo_path: str) -> None:
    """`stop()` on a stopped server, and on one that was never started, does nothing."""
    server = FileTimerServer(fifo_path, "run", 0.05)
    server.start()
    server.stop()
    server.stop()
    never_started = FileTimerServer(fifo_path, "run", 0.05)
    assert os.path.exists(fifo_path)
    never_started.stop()
    assert not os.path.exists(fifo_path)


@pytest.mark.parametrize("daemon", [True, False])
def test_daemon_is_the_threads(fifo_path: str, daemon: bool) -> None:
    """`daemon` says whether the watchdog's thread lets the interpreter exit."""
    before = set(threading.enumerate())
    with running(FileTimerServer(fifo_path, "run", 5, daemon)):
        assert [thread.daemon for thread in set(threading.enumerate()) - before] == [daemon]


def test_exit_of_the_interpreter_ends_a_running_server(spawn: Spawn, fifo_path: str) -> None:
    """A program that never stops its server ends at once all the same, and leaves no FIFO."""
    child = spawn(
        """
        import sys, elastic_timer
        server = elastic_timer.FileTimerServer(sys.argv[1], "run", 60)
        server.start()
        elastic_timer.FileTimerClient(sys.argv[1]).acquire("s", 1e10)
        print("started", flush=True)
        """,
        fifo_path,
    )
    assert child.readline() == "started"
    assert child.wait(10) == 0, child.stderr_text()
    assert child.stderr_text() == ""
    assert not os.path.exists(fifo_path)


def test_forked_child_owns_nothing_of_the_server(spawn: Spawn, fifo_path: str) -> None:
    """A child that stops the server and exits leaves its parent's FIFO and watchdog alone."""
    child = spawn(
        """
        import os, sys, time
        from elastic_timer import FileTimerClient, FileTimerServer
        with FileTimerServer(sys.argv[1], "run", 60) as server:
            if not os.fork():
                server.stop()
                sys.exit()
            os.wait()
            FileTimerClient(sys.argv[1]).acquire("s", 1e10)
            while not server._timers:
                time.sleep(0.005)
            print("served", flush=True)
        """,
        fifo_path,
    )
    assert child.readline() == "served"
    assert child.wait() == 0
    assert not os.path.exists(fifo_path)


def test_failing_round_ends_nothing(
    fifo_path: str, fork_worker: Fork, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in one round is logged and the loop goes on: the next worker is reaped."""

    class Clumsy(FileTimerServer):
        failed = False

        def register_timers(self, timer_requests: list[FileTimerRequest]) -> None:
            if timer_requests and not self.failed:
                self.failed = True
                raise RuntimeError("the first requests are dropped")
            super().register_timers(timer_requests)

    client = FileTimerClient(fifo_path)
    with running(Clumsy(fifo_path, "run", 0.05)) as server:
        client.acquire("dropped", time.time() + FAR)
        eventually(lambda: server.failed)
        worker = fork_worker(overrun, client, 0.3)
        assert_reaped_in_time(worker, worker.receive())
    assert "the first requests are dropped" in caplog.text


def test_round_goes_through_the_hooks_of_a_subclass(
    fifo_path: str, client: FileTimerClient
) -> None:
    """`_run_watchdog` has `_get_requests` read the FIFO and `register_timers` take what it read."""
    calls: list[tuple[str, Any]] = []

    class Hooked(FileTimerServer):
        def _run_watchdog(self, fd: Any) -> None:
            calls.append(("run", fd))
            super()._run_watchdog(fd)

        def _get_requests(self, fd: Any, max_interval: float) -> list[FileTimerRequest]:
            calls.append(("get", (fd, max_interval)))
            requests = super()._get_requests(fd, max_interval)
            calls.append(("got", requests))
            return requests

        def register_timers(self, timer_requests: list[FileTimerRequest]) -> None:
            calls.append(("register", timer_requests))
            super().register_timers(timer_requests)

    with running(Hooked(fifo_path, "run", 10)) as server:
        client.acquire("s", time.time() + FAR)
        eventually(lambda: server._timers)
    descriptor = calls[0][1]
    request = server._timers[(os.getpid(), "s")]
    assert calls[:4] == [
        ("run", descriptor),
        ("get", (descriptor, 10)),
        ("got", [request]),
        ("register", [request]),
    ]


def test_one_round_serves_a_burst(fifo_path: str, client: FileTimerClient) -> None:
    """Requests that come within the gathering time of 10 ms share a round."""
    server = FileTimerServer(fifo_path, "run", 10)
    rounds: list[None] = []
    run_watchdog = server._run_watchdog

    def count(fd: int) -> None:
        rounds.append(None)
        run_watchdog(fd)

    server._run_watchdog = count  # type: ignore[method-assign]
    with running(server):
        started = time.monotonic()
        for number in range(500):
            client.acquire(str(number), time.time() + FAR)
        duration = time.monotonic() - started
        eventually(lambda: server._request_count == 500)
        assert len(rounds) <= duration / 0.01 + 3


def test_burst_fits_into_the_pipe(server: FileTimerServer, fifo_path: str) -> None:
    """The pipe holds a megabyte, where the system lets anybody have that much."""
    limit = Path("/proc/sys/fs/pipe-max-size")
    if not limit.exists() or int(limit.read_text()) < 1 << 20:
        pytest.skip(f"{limit} does not allow it")
    descriptor = os.open(fifo_path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        assert fcntl.fcntl(descriptor, fcntl.F_GETPIPE_SZ) >= 1 << 20
    finally:
        os.close(descriptor)


def test_missing_folder_fails_at_the_call(tmp_path: Path) -> None:
    """A FIFO path whose folder is missing is an error that names the path."""
    path = str(tmp_path / "missing" / "timers.fifo")
    with pytest.raises(FileNotFoundError, match=r"folder.*missing/timers\.fifo"):
        FileTimerServer(path, "run")


@pytest.mark.parametrize(
    "option", [{"max_interval": 0}, {"max_interval": float("nan")}, {"kill_after": 0}]
)
def test_time_that_is_none_fails_at_the_call(fifo_path: str, option: dict[str, float]) -> None:
    """A time of nothing is an error that names the argument; no FIFO is made."""
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be a positive number"):
        FileTimerServer(fifo_path, "run", **option)  # type: ignore[arg-type]
    assert not os.path.exists(fifo_path)


def test_fifo_that_is_not_open_has_no_descriptor(fifo_path: str) -> None:
    """Between `start()` and `stop()` alone there is one to read from."""
    fifo = FifoSource(fifo_path, FileTimerRequest)
    with pytest.raises(ValueError, match=r"timers\.fifo is not open"):
        fifo.fileno()
    fifo.open()
    fifo.fileno()
    fifo.close()
    with pytest.raises(ValueError, match="is not open"):
        fifo.fileno()


def test_removed_fifo_is_made_again(
    server: FileTimerServer,
    fifo_path: str,
    client: FileTimerClient,
    fork_worker: Fork,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Held timers are kept, and clients find the new one."""
    client.acquire("held", time.time() + FAR)
    eventually(lambda: server._timers)
    os.unlink(fifo_path)
    worker = fork_worker(overrun, client, 1)
    assert_reaped_in_time(worker, worker.receive())
    assert (os.getpid(), "held") in server._timers
    assert f"The FIFO {fifo_path} was removed; made it anew" in caplog.text


def test_replaced_fifo_is_one_error(
    server: FileTimerServer,
    fifo_path: str,
    client: FileTimerClient,
    fork_worker: Fork,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However often it is looked for; with the path free again the server serves on."""

    def errors() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]

    os.unlink(fifo_path)
    Path(fifo_path).touch()
    (error,) = eventually(errors)
    assert "something else was put in its place" in error
    looks = threading.Semaphore(0)
    is_missing = server._source.is_missing

    def look() -> bool:
        looks.release()
        return is_missing()

    monkeypatch.setattr(server._source, "is_missing", look)
    for _ in range(2):
        assert looks.acquire(timeout=20)
    os.unlink(fifo_path)
    worker = fork_worker(overrun, client, 1)
    assert_reaped_in_time(worker, worker.receive())
    assert errors() == [error]


def test_platform_without_fifos(spawn: Spawn, fifo_path: str) -> None:
    """Without `os.mkfifo` the import works, and the server is a clear error."""
    child = spawn(
        """
        import os, sys
        del os.mkfifo
        import elastic_timer
        try:
            elastic_timer.FileTimerServer(sys.argv[1], "run")
        except NotImplementedError as error:
            print(error, flush=True)
        """,
        fifo_path,
    )
    assert "no FIFOs" in child.readline()
    assert child.wait() == 0


def test_run_once_serves_all_and_ends(
    fifo_path: str, client: FileTimerClient, fork_worker: Fork
) -> None:
    """`run_once` serves what was sent: valid timers stay, expired ones reap; the FIFO goes."""
    before = set(threading.enumerate())
    server = FileTimerServer(fifo_path, "run", 10)
    server.start()
    worker = fork_worker(overrun, client, 60)
    worker.receive()
    client.acquire("valid", time.time() + FAR)
    client._send_request(FileTimerRequest(worker.pid, "due", time.time() - 1, signal.SIGKILL))
    server.run_once()
    assert set(threading.enumerate()) == before
    assert not os.path.exists(fifo_path)
    assert server._request_count == 3
    assert list(server._timers) == [(os.getpid(), "valid")]
    assert worker.wait() == -signal.SIGKILL


def test_run_once_without_start(fifo_path: str) -> None:
    """On a server that was never started `run_once` removes the FIFO and nothing else."""
    server = FileTimerServer(fifo_path, "run", 10)
    server.run_once()
    assert not os.path.exists(fifo_path)
    assert server._request_count == 0


# Progress -----------------------------------------------------------------------------------------


def test_last_progress_time(fifo_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a client shows up it is the present; then it is the time of the last round."""
    server = FileTimerServer(fifo_path, "run", 0.05)
    shift = 0.0
    real_time = _clock.epoch
    monkeypatch.setattr(_clock, "epoch", lambda: real_time() + shift)
    assert isinstance(server.get_last_progress_time(), int)
    with running(server):
        shift = 1000.0
        assert abs(server.get_last_progress_time() - _clock.epoch()) < 5
        before = int(_clock.epoch())
        FileTimerClient(fifo_path).acquire("s", _clock.epoch() + FAR)
        eventually(lambda: server._timers)
        # Rounds go on, and with them the time of the last one.
        shift = 2000.0
        eventually(lambda: server.get_last_progress_time() >= before + 1000)
    last = server.get_last_progress_time()
    shift = 3000.0
    assert server.get_last_progress_time() == last
