"""The file client: when it tries again, when it gives up, what it refuses."""

from __future__ import annotations

import copy
import json
import os
import pickle
import select
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from elastic_timer import (
    FileTimerClient,
    FileTimerServer,
    file_based_local_timer,
)
from elastic_timer._transport.pipe import has_room
from elastic_timer._transport.wire import acquire_line
from elastic_timer.file_based_local_timer import _retry
from tests.support import (
    FAR,
    Fork,
    eventually,
    overrun,
    running,
)

# The client ---------------------------------------------------------------------------------------


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

    def noted_has_room(fd: int, timeout: float) -> bool:
        waiting.set()
        return has_room(fd, timeout)

    client = FileTimerClient(fifo_path)
    os.mkfifo(fifo_path)
    first = os.open(fifo_path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fill(client)
        monkeypatch.setattr(file_based_local_timer, "has_room", noted_has_room)
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
    line = acquire_line("", expiration_time, 9)
    return select.PIPE_BUF - len(line)


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


@pytest.mark.parametrize("is_required", [True, False])
def test_client_can_be_handed_to_a_spawned_process(
    reader: int, fifo_path: str, is_required: bool
) -> None:
    """Its pickle is a client as it is, and its copy; on no Python is that said to end."""
    client = FileTimerClient(fifo_path, required=is_required)
    for its_copy in (pickle.loads(pickle.dumps(client)), copy.deepcopy(client)):
        its_copy.release("s")
        assert json.loads(os.read(reader, 1 << 16))["scope_id"] == "s"


def test_one_client_serves_every_forked_child(
    server: FileTimerServer, client: FileTimerClient, fork_worker: Fork
) -> None:
    """A client made before the fork acquires in the name of the child that uses it."""
    workers = [fork_worker(overrun, client, 60) for _ in range(2)]
    for worker in workers:
        worker.receive()
    keys = {(worker.pid, "overrun") for worker in workers}
    eventually(lambda: set(server._timers) == keys)


# _retry -------------------------------------------------------------------------------------------


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
