"""The timers over a FIFO: the wire, the client, the server, its events and hooks."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
    debug_info_logging,
    expires,
    file_based_local_timer,
)
from elastic_timer._transport.fifo import FifoSource
from elastic_timer.file_based_local_timer import _retry
from tests.support import (
    FAR,
    Child,
    ForkedWorker,
    assert_reaped_in_time,
    eventually,
    is_alive,
    overrun,
    process_state,
    running,
    wait_dead,
    wire_line,
    write_raw,
)

# Forking while a watchdog thread runs is what servers are for; Python warns of it since 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

Fork = Callable[..., ForkedWorker]
Spawn = Callable[..., Child]
Event = tuple[str, "FileTimerRequest | None"]


@pytest.fixture
def server(fifo_path: str) -> Any:
    """A server that runs, for this test."""
    with running(FileTimerServer(fifo_path, "run", 0.05)) as started:
        yield started


@pytest.fixture
def client(fifo_path: str) -> FileTimerClient:
    """A client of that server."""
    return FileTimerClient(fifo_path)


@pytest.fixture
def reader(fifo_path: str) -> Any:
    """The reading end of a FIFO that no server reads."""
    os.mkfifo(fifo_path)
    descriptor = os.open(fifo_path, os.O_RDONLY | os.O_NONBLOCK)
    yield descriptor
    os.close(descriptor)


# The wire ---------------------------------------------------------------------------------------


def test_acquire_on_the_wire(reader: int, client: FileTimerClient) -> None:
    """An acquire is this one line of JSON, byte by byte as `json.dumps` writes it."""
    client.acquire("train.py#42", 1795150503.21)
    expected = (
        f'{{"version": 1, "pid": {os.getpid()}, "scope_id": "train.py#42", '
        '"expiration_time": 1795150503.21, "signal": 9}\n'
    )
    assert os.read(reader, 65536) == expected.encode()


def test_release_on_the_wire(reader: int, client: FileTimerClient) -> None:
    """A release carries the expiration time -1 and the signal 0."""
    client.release("train.py#42")
    assert json.loads(os.read(reader, 65536)) == {
        "version": 1,
        "pid": os.getpid(),
        "scope_id": "train.py#42",
        "expiration_time": -1,
        "signal": 0,
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, 0, -1, 15])
def test_signal_on_the_wire(reader: int, fifo_path: str, number: int) -> None:
    """The client's signal travels as a plain number, whatever it is."""
    FileTimerClient(fifo_path, number).acquire("s", 1.0)
    line = os.read(reader, 65536)
    assert f'"signal": {int(number)}}}\n'.encode() in line


@pytest.mark.parametrize("scope", ['quo"te\\', "line\nbreak", "\u00e9\U0001f9e8\ud800", ""])
def test_any_scope_is_one_line(reader: int, client: FileTimerClient, scope: str) -> None:
    """Whatever the scope holds, the request is one line, and reading it gives the scope back."""
    client.acquire(scope, 1.0)
    data = os.read(reader, 65536)
    assert data.count(b"\n") == 1
    assert data.endswith(b"\n")
    assert json.loads(data)["scope_id"] == scope


def test_client_keeps_nothing_open(reader: int, client: FileTimerClient) -> None:
    """Between requests nobody has the FIFO open for writing: it reads as ended."""
    client.acquire("s", 1.0)
    assert os.read(reader, 65536)
    assert os.read(reader, 65536) == b""


def test_to_json_is_what_json_dumps_makes() -> None:
    """The JSON of a request is upstream's, for whole and broken times and any scope."""
    for scope in ("s", 'q"\u00e9\n'):
        for expiration in (-1, 0, 3, 1795150503.21, 1e300, 0.1):
            request = FileTimerRequest(12, scope, expiration, signal.SIGTERM)
            expected = {
                "version": 1,
                "pid": 12,
                "scope_id": scope,
                "expiration_time": expiration,
                "signal": 15,
            }
            assert request.to_json() == json.dumps(expected)


def test_file_request_fields() -> None:
    """A file request has its version, its pid under both names, and no signal by default."""
    request = FileTimerRequest(12, "s", 1.5)
    assert (request.version, request.worker_pid, request.worker_id) == (1, 12, 12)
    assert (request.scope_id, request.expiration_time, request.signal) == ("s", 1.5, 0)
    assert FileTimerRequest(
        worker_pid=12, scope_id="s", expiration_time=1.5, signal=9
    ) != FileTimerRequest(12, "s", 1.5, 15)
    assert repr(FileTimerRequest(12, "s", 1.5, 9)) == (
        "FileTimerRequest(worker_id=12, scope_id='s', expiration_time=1.5, signal=9)"
    )


def send_long_requests(channel: Any, client: FileTimerClient, number: int, count: int) -> None:
    for index in range(count):
        client.acquire(f"{number}-{index}-" + str(number) * (3000 + index), time.time() + FAR)
    channel.send("done")
    # Its timers would go with it.
    channel.recv()


def test_lines_of_concurrent_clients_are_never_mixed(
    server: FileTimerServer, client: FileTimerClient, fork_worker: Fork
) -> None:
    """Each request is one atomic write: of four clients' long lines none is torn."""
    clients = [fork_worker(send_long_requests, client, number, 60) for number in range(4)]
    assert [worker.receive() for worker in clients] == ["done"] * 4
    eventually(lambda: server._request_count == len(server._timers) == 240)
    for (pid, scope), request in list(server._timers.items()):
        number, index, tail = scope.split("-")
        assert tail == number * (3000 + int(index))
        assert request.worker_pid == pid == clients[int(number)].pid


# The client -------------------------------------------------------------------------------------


def failed_acquire(path: str) -> tuple[BrokenPipeError, float]:
    """The error of an acquire that cannot succeed, and how long it took."""
    started = time.monotonic()
    with pytest.raises(BrokenPipeError) as caught:
        FileTimerClient(path).acquire("s", time.time() + 60)
    return caught.value, time.monotonic() - started


def test_no_server_is_a_broken_pipe_after_a_second(tmp_path: Path) -> None:
    """No FIFO, one that nobody reads, a regular file: the client tries for a second, then raises.

    The error says where it looked, and the regular file swallowed nothing.
    """
    paths = [str(tmp_path / name) for name in ("missing", "unread", "regular")]
    os.mkfifo(paths[1])
    Path(paths[2]).touch()
    with ThreadPoolExecutor() as threads:
        for path, (error, duration) in zip(paths, threads.map(failed_acquire, paths), strict=True):
            assert 0.85 <= duration < 5
            assert path in str(error)
    assert Path(paths[2]).read_bytes() == b""


def test_server_that_appears_within_the_second_is_found(
    fifo_path: str, client: FileTimerClient
) -> None:
    """A client that was there first goes on trying, and its request arrives."""
    thread = threading.Thread(target=client.acquire, args=("early", time.time() + 60))
    thread.start()
    with running(FileTimerServer(fifo_path, "run", 0.05)) as server:
        eventually(lambda: (os.getpid(), "early") in server._timers)
        thread.join()


LONG = "x" * 3000  # Two of these fit in no page of a pipe.


def fill(client: FileTimerClient) -> tuple[str, float]:
    """Send until that fails; what the client says then, and how many seconds it took to."""
    while True:
        started = time.monotonic()
        try:
            client.acquire(LONG, time.time() + FAR)
        except BrokenPipeError as error:
            return str(error), time.monotonic() - started


def test_full_pipe_is_a_broken_pipe_after_a_second(reader: int, client: FileTimerClient) -> None:
    """A client whose server does not read waits for about a second, then says so."""
    told, seconds = fill(client)
    assert "does not read" in told
    assert 0.85 <= seconds < 5


def test_server_that_dies_with_its_pipe_full_is_outlived(
    fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that waits for room as its server goes sends its request to the next one."""
    waiting = threading.Event()
    real_has_room = file_based_local_timer.has_room

    def has_room(fd: int, timeout: float) -> bool:
        waiting.set()
        return real_has_room(fd, timeout)

    client = FileTimerClient(fifo_path)
    os.mkfifo(fifo_path)
    first = os.open(fifo_path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fill(client)
        monkeypatch.setattr(file_based_local_timer, "has_room", has_room)
        late = threading.Thread(target=client.acquire, args=(LONG, time.time() + FAR))
        late.start()
        assert waiting.wait(20)
    finally:
        os.close(first)
    with running(FileTimerServer(fifo_path, "run")) as server:
        late.join()
        eventually(lambda: list(server._timers) == [(os.getpid(), LONG)])


def largest_scope(expiration_time: float) -> int:
    """How long a scope may be for its request to fill PIPE_BUF exactly, newline included."""
    return (
        select.PIPE_BUF - len(FileTimerRequest(os.getpid(), "", expiration_time, 9).to_json()) - 1
    )


def test_largest_request_fits(server: FileTimerServer, client: FileTimerClient) -> None:
    """A request of exactly PIPE_BUF bytes is sent."""
    expiration_time = time.time() + FAR
    scope = "x" * largest_scope(expiration_time)
    client.acquire(scope, expiration_time)
    eventually(lambda: (os.getpid(), scope) in server._timers)


def test_too_large_request_names_limit_and_size(
    server: FileTimerServer, client: FileTimerClient
) -> None:
    """One byte more is a RuntimeError that names both figures, and nothing is sent."""
    expiration_time = time.time() + FAR
    scope = "x" * (largest_scope(expiration_time) + 1)
    with pytest.raises(RuntimeError) as caught:
        client.acquire(scope, expiration_time)
    assert str(select.PIPE_BUF) in str(caught.value)
    assert str(select.PIPE_BUF + 1) in str(caught.value)
    client.acquire("marker", expiration_time)
    eventually(lambda: server._timers)
    assert list(server._timers) == [(os.getpid(), "marker")]


def test_client_refuses_a_signal_that_does_not_exist(fifo_path: str) -> None:
    """A mistake in the signal shows when the client is made, not when a worker overruns."""
    with pytest.raises(ValueError, match="1000"):
        FileTimerClient(fifo_path, 1000)


def test_one_client_serves_every_forked_child(
    server: FileTimerServer, client: FileTimerClient, fork_worker: Fork
) -> None:
    """A client made before the fork acquires in the name of the child that uses it."""
    workers = [fork_worker(overrun, client, 60) for _ in range(2)]
    for worker in workers:
        worker.receive()
    keys = {(worker.pid, "overrun") for worker in workers}
    eventually(lambda: set(server._timers) == keys)


# _retry -----------------------------------------------------------------------------------------


def test_retry_returns_the_first_success() -> None:
    """Tries go on until one succeeds; arguments and result are handed through."""
    tries: list[int] = []

    @_retry(max_retries=5, sleep_time=0.001)
    def work(value: int, *, fail: int) -> int:
        tries.append(value)
        if len(tries) <= fail:
            raise OSError("not yet")
        return value + 1

    assert work(7, fail=2) == 8
    assert tries == [7, 7, 7]


def test_retry_raises_after_the_last_try() -> None:
    """After the last try its exception is raised, without one more pause."""
    times: list[float] = []

    @_retry(max_retries=3, sleep_time=0.02)
    def work() -> None:
        times.append(time.monotonic())
        raise LookupError(len(times))

    with pytest.raises(LookupError, match="3"):
        work()
    assert len(times) == 3
    assert times[2] - times[0] >= 0.04


# The server's life ------------------------------------------------------------------------------


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
    fifo = FifoSource(fifo_path, Fields)
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
    monkeypatch.setattr(server._source, "is_missing", lambda: looks.release() or is_missing())
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


# Timers -----------------------------------------------------------------------------------------


def test_timers_are_keyed_by_pid_and_scope(
    server: FileTimerServer, client: FileTimerClient
) -> None:
    """`_timers` maps (pid, scope) to the request; a re-acquire replaces, a release removes."""
    pid = os.getpid()
    first, second = time.time() + FAR, time.time() + 2 * FAR
    client.acquire("a", first)
    client.acquire("b", first)
    client.acquire("a", second)
    eventually(lambda: server._request_count == 3)
    eventually(lambda: len(server._timers) == 2)
    assert server._timers[(pid, "a")] == FileTimerRequest(pid, "a", second, signal.SIGKILL)
    assert (pid, "b") in server._timers
    client.release("a")
    client.release("never acquired")
    eventually(lambda: server._request_count == 5)
    eventually(lambda: list(server._timers) == [(pid, "b")])


def test_register_expire_and_clear_by_hand(fifo_path: str) -> None:
    """The three methods work on a server that was not started, as upstream's do."""
    server = FileTimerServer(fifo_path, "run")
    now, pid = time.time(), os.getpid()
    due = FileTimerRequest(pid, "due", now + 50, 9)
    later = FileTimerRequest(pid, "later", now + 200, 9)
    group = FileTimerRequest(-3, "group", now + 50, 9)
    server.register_timers([due, later, group])
    assert server.get_expired_timers(now + 49) == {}
    assert server.get_expired_timers(now + 51) == {pid: [due], -3: [group]}
    server.clear_timers({-3})
    assert set(server._timers) == {(pid, "due"), (pid, "later")}
    server.register_timers([FileTimerRequest(pid, "due", -1)])
    assert list(server._timers) == [(pid, "later")]
    assert server._request_count == 4
    server.stop()


def test_clear_timers_also_drops_those_of_processes_that_are_gone(
    fifo_path: str, fork_worker: Fork
) -> None:
    """`clear_timers` of nobody in particular leaves only the timers of processes that run."""
    server = FileTimerServer(fifo_path, "run")
    worker = fork_worker(overrun, FileTimerClient(fifo_path, 0), 60)
    pids = worker.pid, os.getpid()
    server.register_timers([FileTimerRequest(pid, "s", time.time() + FAR, 9) for pid in pids])
    assert len(server._timers) == 2
    worker.process.kill()
    worker.wait()
    server.clear_timers(set())
    assert list(server._timers) == [(os.getpid(), "s")]
    server.stop()


def test_is_process_running(fork_worker: Fork, fifo_path: str) -> None:
    """A process runs until it has ended; it can be asked of the class."""
    worker = fork_worker(overrun, FileTimerClient(fifo_path), 60)
    assert FileTimerServer.is_process_running(os.getpid())
    assert FileTimerServer.is_process_running(worker.pid)
    worker.process.kill()
    worker.wait()
    assert not FileTimerServer.is_process_running(worker.pid)


def test_get_scopes(fifo_path: str) -> None:
    """The scopes of requests, in their order."""
    server = FileTimerServer(fifo_path, "run")
    assert server._get_scopes([FileTimerRequest(1, name, 0) for name in "ba"]) == ["b", "a"]
    server.stop()


def test_exit_of_a_worker_drops_its_timers_unsignalled(fifo_path: str, fork_worker: Fork) -> None:
    """A worker that exits without releasing leaves no timer; only it is affected; no event."""
    events: list[Event] = []
    server = FileTimerServer(
        fifo_path, "run", 10, log_event=lambda name, request: events.append((name, request))
    )
    with running(server):
        workers = [fork_worker(overrun, FileTimerClient(fifo_path), 60) for _ in range(2)]
        for worker in workers:
            worker.receive()
        eventually(lambda: len(server._timers) == 2)
        os.kill(workers[0].pid, signal.SIGTERM)
        eventually(lambda: list(server._timers) == [(workers[1].pid, "overrun")])
        assert workers[0].wait() == -signal.SIGTERM
        assert events == [("watchdog started", None)]


# Reaping ----------------------------------------------------------------------------------------


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


def test_library_configures_no_logging(spawn: Spawn) -> None:
    """Importing sets no level and no handler anywhere."""
    child = spawn(
        """
        import logging
        import elastic_timer
        from elastic_timer import api, file_based_local_timer, local_timer
        loggers = [logging.getLogger()] + [
            logger for logger in logging.Logger.manager.loggerDict.values()
            if isinstance(logger, logging.Logger) and logger.name.startswith("elastic_timer")
        ]
        assert len(loggers) > 3
        assert all(not logger.handlers for logger in loggers)
        assert all(logger.level == 0 for logger in loggers[1:])
        print("fine", flush=True)
        """
    )
    assert child.readline() == "fine"


# A release that was written in time -------------------------------------------------------------


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


def start_server(channel: Any, fifo_path: str) -> None:
    with running(FileTimerServer(fifo_path, "run", 0.05)) as server:
        channel.send("started")
        while True:
            channel.recv()
            channel.send(len(server._timers))


def test_release_written_while_the_server_could_not_look_is_honoured(
    fifo_path: str, fork_worker: Fork
) -> None:
    """A server that was stopped past a deadline reads the release before it acts on the timer."""
    client = FileTimerClient(fifo_path)
    server = fork_worker(start_server, fifo_path)
    assert server.receive() == "started"
    worker = fork_worker(leave_when_told, client, 0.5)
    deadline = worker.receive()
    eventually(lambda: server.ask("timers") == 1)
    os.kill(server.pid, signal.SIGSTOP)
    eventually(lambda: process_state(server.pid) == "T")
    stopped_in_time = time.monotonic() < deadline
    assert worker.ask("leave") == "left"
    eventually(lambda: time.monotonic() > deadline)
    os.kill(server.pid, signal.SIGCONT)
    sentinel = fork_worker(overrun, client, 0.1)
    assert_reaped_in_time(sentinel, sentinel.receive())
    assert stopped_in_time
    assert is_alive(worker)


# Progress ---------------------------------------------------------------------------------------


def test_last_progress_time(fifo_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a client shows up it is the present; then it is the time of the last round."""
    server = FileTimerServer(fifo_path, "run", 0.05)
    shift = 0.0
    real_time = time.time
    monkeypatch.setattr(time, "time", lambda: real_time() + shift)
    assert isinstance(server.get_last_progress_time(), int)
    with running(server):
        shift = 1000.0
        assert abs(server.get_last_progress_time() - time.time()) < 5
        before = int(time.time())
        FileTimerClient(fifo_path).acquire("s", time.time() + FAR)
        eventually(lambda: server._timers)
        # Rounds go on, and with them the time of the last one.
        shift = 2000.0
        eventually(lambda: server.get_last_progress_time() >= before + 1000)
    last = server.get_last_progress_time()
    shift = 3000.0
    assert server.get_last_progress_time() == last


# Events (section 3) -----------------------------------------------------------------------------


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
    """All expired timers of a worker without a signal are told of, and it is not killed."""
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
        # All timers of the worker are dropped, the one that had time left with them.
        eventually(lambda: not server._timers)
    assert [(name, request and request.scope_id) for name, request in events] == [
        ("watchdog started", None),
        ("timer expired", "older"),
        ("timer expired", "newer"),
        ("watchdog stopped", None),
    ]
    assert is_alive(worker)


# The debug hook ---------------------------------------------------------------------------------


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
