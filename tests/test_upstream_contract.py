"""What upstream's own tests ask of these modules (section 5 of the contract), in our words.

The server lives in the test's own process, as there: blocks that the test itself enters are timers
of the server's own pid. Workers that do not exist are named by negative pids, that is, process
groups, and `os.kill` is patched where they expire.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

import elastic_timer as timer
from elastic_timer import RequestQueue, TimerRequest, TimerServer
from elastic_timer.local_timer import MultiprocessingRequestQueue
from tests.support import (
    ALLOWED_LATENESS,
    Fork,
    assert_reaped_in_time,
    eventually,
    overrun,
    running,
)

INTERVAL = 0.01


# The base class ---------------------------------------------------------------------------------


class TwoRequests(RequestQueue):
    """Always holds the same two requests."""

    def size(self) -> int:
        return 2

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        return [TimerRequest(1, "test_1", 0), TimerRequest(2, "test_2", 0)]


class ThreeWorkers(TimerServer):
    """Of three expired workers one is reaped, one is not, and one reap raises."""

    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        pass

    def clear_timers(self, worker_ids: set[Any]) -> None:
        pass

    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        return {worker: [TimerRequest(worker, f"test_{worker}", 0)] for worker in (1, 2, 3)}

    def _reap_worker(self, worker_id: int) -> bool:
        if worker_id == 3:
            raise RuntimeError("not to be thrown any further")
        return worker_id == 1


def test_one_round_of_the_base_class() -> None:
    """What the queue gave is registered once; cleared are the reaped and the one that raised."""
    queue = TwoRequests()
    server = ThreeWorkers(queue, 1)
    with (
        mock.patch.object(ThreeWorkers, "register_timers") as register,
        mock.patch.object(ThreeWorkers, "clear_timers") as clear,
    ):
        server._run_watchdog()
    register.assert_called_once_with(queue.get(queue.size(), 1))
    clear.assert_called_once_with({1, 3})


# Both variants, with a server in the test's own process -----------------------------------------


@pytest.fixture(params=["file", "queue"])
def client(request: pytest.FixtureRequest, fifo_path: str) -> Iterator[timer.TimerClient]:
    """A client whose server runs in this process."""
    server: Any
    made: timer.TimerClient
    if request.param == "file":
        server = timer.FileTimerServer(fifo_path, "test", INTERVAL)
        made = timer.FileTimerClient(fifo_path)
    else:
        queue: Any = multiprocessing.get_context("spawn").Queue()
        server = timer.LocalTimerServer(queue, INTERVAL)
        made = timer.LocalTimerClient(queue)
    with running(server):
        # Upstream's tests start some servers twice.
        server.start()
        yield made


def test_exception_of_a_block_propagates(client: timer.TimerClient) -> None:
    """What the body raises comes out of the block as it is."""
    timer.configure(client)
    with pytest.raises(RuntimeError, match="foobar"), timer.expires(after=1):
        raise RuntimeError("foobar")


def test_block_without_a_client(client: timer.TimerClient) -> None:
    """Without a configured client a block is a RuntimeError."""
    timer.configure(None)
    with pytest.raises(RuntimeError), timer.expires(after=1):
        pass


def test_passed_client_is_asked_once_each(client: timer.TimerClient) -> None:
    """A client that is passed gets one acquire and one release, for the scope given."""
    timer.configure(None)
    with (
        mock.patch.object(client, "acquire", wraps=client.acquire) as acquire,
        mock.patch.object(client, "release", wraps=client.release) as release,
        timer.expires(after=1, scope="test", client=client),
    ):
        pass
    acquire.assert_called_once_with("test", mock.ANY)
    release.assert_called_once_with("test")


def test_block_that_is_left_in_time(client: timer.TimerClient) -> None:
    """The test's own process enters a block, leaves it before the deadline and lives past it."""
    timer.configure(client)
    deadline = time.monotonic() + 0.2
    with timer.expires(after=0.2):
        pass
    eventually(lambda: time.monotonic() > deadline + 0.1)


def recurse(depth: int, pause: float, after: float) -> None:
    if depth > 0:
        with timer.expires(after=after):
            recurse(depth - 1, pause, after)
            # The pause is what the block does.
            time.sleep(pause)


def recurse_in_worker(channel: Any, client: timer.TimerClient, pause: float) -> None:
    timer.configure(client)
    channel.send(time.monotonic() + 0.1)
    recurse(2, pause, 0.1)


def test_recursion_that_takes_its_time_outside_of_any_timer(client: timer.TimerClient) -> None:
    """Each call within its own limit, all together longer: the innermost timer was what counted."""
    timer.configure(client)
    recurse(4, 0.05, 0.5)


def test_recursion_whose_innermost_call_overruns(
    client: timer.TimerClient, fork_worker: Fork
) -> None:
    """The innermost block of a recursion hangs: the worker is killed."""
    worker = fork_worker(recurse_in_worker, client, 60)
    assert_reaped_in_time(worker, worker.receive())


def test_worker_that_overruns(client: timer.TimerClient, fork_worker: Fork) -> None:
    """A worker reaped with the default signal has the exit code -9."""
    worker = fork_worker(overrun, client, 0.1)
    assert_reaped_in_time(worker, worker.receive())


def enter_block(client: timer.TimerClient, after: float, duration: float) -> None:
    timer.configure(client)
    with timer.expires(after=after):
        time.sleep(duration)


@pytest.mark.long
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_stuck_and_happy_workers_of_every_start_method(method: str) -> None:
    """Of two workers exactly the stuck one dies, with -9; the other exits with 0."""
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    client = timer.LocalTimerClient(queue)
    plans = [(0.2, 60.0), (60.0, 0.05)]
    processes = [context.Process(target=enter_block, args=(client, *plan)) for plan in plans]
    with running(timer.LocalTimerServer(queue, max_interval=INTERVAL)):
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [-signal.SIGKILL, 0]
    if method == "forkserver":
        stop_fork_server()


def stop_fork_server() -> None:
    """It lives until the interpreter's end otherwise, and the test is held to leave nothing."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]


# MultiprocessingRequestQueue --------------------------------------------------------------------


def test_request_queue_get() -> None:
    """Nothing there: nothing after the timeout; one there: that one, though two were wanted."""
    queue: Any = multiprocessing.Queue()
    requests = MultiprocessingRequestQueue(queue)
    assert requests.get(1, timeout=0.01) == []
    request = TimerRequest(1, "test", 0)
    queue.put(request)
    assert requests.get(2, timeout=0.3) == [request]


def put_at_intervals(channel: Any, queue: Any, count: int, interval: float) -> None:
    channel.send("started")
    for number in range(count):
        queue.put(TimerRequest(number, "test_scope", 0))
        # The interval is what is asked for.
        time.sleep(interval)
    queue.close()
    queue.join_thread()


def test_request_queue_get_waits_for_the_size_it_was_asked_for(fork_worker: Fork) -> None:
    """Requests that trickle in are gathered until there are as many as asked for."""
    queue: Any = multiprocessing.get_context("fork").Queue()
    requests = MultiprocessingRequestQueue(queue)
    producer = fork_worker(put_at_intervals, queue, 10, 0.02)
    assert producer.receive() == "started"
    started = time.monotonic()
    assert [request.worker_id for request in requests.get(10, timeout=20)] == list(range(10))
    assert time.monotonic() - started < 15


def test_request_queue_get_returns_less_when_the_time_is_up(fork_worker: Fork) -> None:
    """Of requests that trickle in, those that came within the timeout are returned."""
    queue: Any = multiprocessing.get_context("fork").Queue()
    requests = MultiprocessingRequestQueue(queue)
    producer = fork_worker(put_at_intervals, queue, 1000, 0.02)
    assert producer.receive() == "started"
    started = time.monotonic()
    received = requests.get(1000, timeout=0.2)
    assert 0.2 <= time.monotonic() - started < 5
    assert [request.worker_id for request in received] == list(range(len(received)))
    assert 1 <= len(received) < 1000


# The queue server -------------------------------------------------------------------------------


@pytest.fixture
def queue() -> Any:
    """A queue of the default kind."""
    return multiprocessing.Queue()


@pytest.fixture
def queue_server(queue: Any) -> Iterator[timer.LocalTimerServer]:
    """Not started; stopped at the end all the same."""
    server = timer.LocalTimerServer(queue, INTERVAL)
    yield server
    server.stop()


def assert_ten_rounds_in_ten_intervals(server: Any, send: Callable[[], None]) -> None:
    """`_run_watchdog` runs ten times in 0.1 s, give or take one; tried anew on a busy machine."""
    server._run_watchdog = mock.MagicMock(wraps=server._run_watchdog)

    def attempt() -> bool:
        server._run_watchdog.reset_mock()
        started = time.monotonic()
        server.start()
        send()
        # The time itself is what the rounds are counted in.
        time.sleep(10 * INTERVAL)
        elapsed = time.monotonic() - started
        server.stop()
        count = server._run_watchdog.call_count
        assert count <= (time.monotonic() - started) / INTERVAL + 1
        return 9 <= count <= 11 and elapsed < 11 * INTERVAL

    eventually(attempt, message="never nine to eleven rounds in ten intervals")


def test_queue_server_runs_ten_rounds_in_ten_intervals(
    queue_server: timer.LocalTimerServer,
) -> None:
    """With an interval of 0.01 s and no traffic: ten rounds in 0.1 s, give or take one."""
    assert_ten_rounds_in_ten_intervals(queue_server, lambda: None)


def test_queue_server_round_with_an_empty_queue(queue_server: timer.LocalTimerServer) -> None:
    """A round by hand, on a server that was not started, works with nothing to do."""
    queue_server._run_watchdog()
    assert len(queue_server._timers) == 0


def test_queue_server_expired_timer(queue: Any, queue_server: timer.LocalTimerServer) -> None:
    """One expired timer of a worker: one signal, and all its timers are gone after one round."""
    queue.put(TimerRequest(-3, "test1", time.time() - 60))
    queue.put(TimerRequest(-3, "test2", time.time() + 60))
    with mock.patch("os.kill") as kill:
        queue_server._run_watchdog()
    assert len(queue_server._timers) == 0
    kill.assert_called_once_with(-3, signal.SIGKILL)


def test_queue_server_release(queue: Any, queue_server: timer.LocalTimerServer) -> None:
    """Acquired and released before the round: no timer, no signal."""
    queue.put(TimerRequest(-3, "test1", time.time() + 60))
    queue.put(TimerRequest(-3, "test1", -1))
    with mock.patch("os.kill") as kill:
        queue_server._run_watchdog()
    assert len(queue_server._timers) == 0
    kill.assert_not_called()


def test_queue_server_valid_timers(queue: Any, queue_server: timer.LocalTimerServer) -> None:
    """Timers with time left are held, by pid and scope, and nobody is signalled."""
    keys = [(-3, "test1"), (-3, "test2"), (-2, "test1"), (-2, "test2")]
    for pid, scope in keys:
        queue.put(TimerRequest(pid, scope, time.time() + 60))
    with mock.patch("os.kill") as kill:
        queue_server._run_watchdog()
    assert len(queue_server._timers) == 4
    for key in keys:
        assert key in queue_server._timers
    kill.assert_not_called()


# The file server --------------------------------------------------------------------------------


@pytest.fixture
def file_server(fifo_path: str) -> Iterator[timer.FileTimerServer]:
    """Not started; stopped at the end all the same."""
    server = timer.FileTimerServer(fifo_path, "test", INTERVAL)
    yield server
    server.stop()


@pytest.fixture
def file_client(fifo_path: str) -> timer.FileTimerClient:
    """A client of that server."""
    return timer.FileTimerClient(fifo_path)


def expired_timer(pid: int, scope: str) -> timer.FileTimerRequest:
    return timer.FileTimerRequest(pid, scope, time.time() - 60, signal.SIGKILL)


def valid_timer(pid: int, scope: str) -> timer.FileTimerRequest:
    return timer.FileTimerRequest(pid, scope, time.time() + 60, signal.SIGKILL)


def release_timer(pid: int, scope: str) -> timer.FileTimerRequest:
    return timer.FileTimerRequest(pid, scope, -1)


def test_file_client_without_a_server(fifo_path: str) -> None:
    """Entering a block without a server is a BrokenPipeError."""
    timer.configure(timer.FileTimerClient(fifo_path))
    with pytest.raises(BrokenPipeError), timer.expires(after=0.1):
        pytest.fail("the body ran")


@pytest.mark.parametrize("requests", [0, 1])
def test_file_server_runs_ten_rounds_in_ten_intervals(
    file_server: timer.FileTimerServer, file_client: timer.FileTimerClient, requests: int
) -> None:
    """Ten rounds in 0.1 s, give or take one, with no traffic and with one request."""

    def send() -> None:
        for _ in range(requests):
            file_client._send_request(valid_timer(-3, "test0"))

    assert_ten_rounds_in_ten_intervals(file_server, send)


def sent_back_to_back(client: timer.FileTimerClient, *requests: timer.FileTimerRequest) -> bool:
    """Send requests; False where the machine was so busy that they cannot be called that."""
    started = time.monotonic()
    for request in requests:
        client._send_request(request)
    return time.monotonic() - started < INTERVAL / 2


def test_file_server_expired_timer(fifo_path: str, file_client: timer.FileTimerClient) -> None:
    """An expired and a valid timer back to back, then `run_once`: one signal, no timer left."""

    def attempt() -> bool:
        server = timer.FileTimerServer(fifo_path, "test", INTERVAL)
        with mock.patch("os.kill") as kill:
            server.start()
            undisturbed = sent_back_to_back(
                file_client, expired_timer(-3, "test1"), valid_timer(-3, "test2")
            )
            server.run_once()
        kill.assert_called_once_with(-3, signal.SIGKILL)
        assert not undisturbed or len(server._timers) == 0
        return undisturbed

    eventually(attempt)


def test_file_server_release(fifo_path: str, file_client: timer.FileTimerClient) -> None:
    """Acquire a, release a, release b back to back: no timer at once, without waiting for it."""

    def attempt() -> bool:
        server = timer.FileTimerServer(fifo_path, "test", INTERVAL)
        with mock.patch("os.kill") as kill:
            server.start()
            undisturbed = sent_back_to_back(
                file_client,
                valid_timer(-3, "a"),
                release_timer(-3, "a"),
                release_timer(-3, "b"),
            )
            held = len(server._timers)
            server.stop()
        kill.assert_not_called()
        assert not undisturbed or held == 0
        return undisturbed

    eventually(attempt)


def test_file_server_valid_timers(
    file_server: timer.FileTimerServer, file_client: timer.FileTimerClient
) -> None:
    """Timers with time left outlive `run_once`, by pid and scope, and nobody is signalled."""
    keys = [(-3, "test1"), (-3, "test2"), (-2, "test1"), (-2, "test2")]
    with mock.patch("os.kill") as kill:
        file_server.start()
        for key in keys:
            file_client._send_request(valid_timer(*key))
        file_server.run_once()
    assert len(file_server._timers) == 4
    for key in keys:
        assert key in file_server._timers
    kill.assert_not_called()


def send_requests(channel: Any, client: timer.FileTimerClient, count: int) -> None:
    for number in range(count):
        client.acquire(f"test_scope_{number}", time.time() + 60)
    channel.send("done")
    channel.recv()


def test_file_server_counts_every_request_of_ten_processes(
    file_server: timer.FileTimerServer, file_client: timer.FileTimerClient, fork_worker: Fork
) -> None:
    """Ten processes sending twenty requests each: 200 are counted once `run_once` returns."""
    file_server.start()
    workers = [fork_worker(send_requests, file_client, 20) for _ in range(10)]
    assert [worker.receive() for worker in workers] == ["done"] * 10
    file_server.run_once()
    assert file_server._request_count == 200
    assert len(file_server._timers) == 200


def acquire_and_exit(channel: Any, client: timer.FileTimerClient, after: float) -> None:
    deadline = time.monotonic() + after
    client.acquire("test_scope", time.time() + after)
    channel.send(deadline)
    channel.recv()
    os._exit(0)


@pytest.fixture
def reaped() -> Iterator[list[tuple[float, int, int]]]:
    """When `_reap_worker` was called, and what with; nobody is signalled."""
    calls: list[tuple[float, int, int]] = []

    def note(self: timer.FileTimerServer, worker_pid: int, signal: int) -> bool:
        calls.append((time.monotonic(), worker_pid, signal))
        return True

    with mock.patch.object(timer.FileTimerServer, "_reap_worker", note):
        yield calls


def test_file_server_worker_that_exits_without_releasing(
    file_server: timer.FileTimerServer,
    file_client: timer.FileTimerClient,
    fork_worker: Fork,
    reaped: list[tuple[float, int, int]],
) -> None:
    """Its timers vanish long before their deadline, and it is never signalled."""
    file_server.start()
    worker = fork_worker(acquire_and_exit, file_client, 60)
    deadline = worker.receive()
    eventually(lambda: file_server._timers)
    worker.send("exit")
    assert worker.wait() == 0
    eventually(lambda: not file_server._timers)
    assert time.monotonic() < deadline
    assert reaped == []


def test_file_server_worker_that_exits_and_is_claimed_to_run(
    file_server: timer.FileTimerServer,
    file_client: timer.FileTimerClient,
    fork_worker: Fork,
    reaped: list[tuple[float, int, int]],
) -> None:
    """Where the patched `is_process_running` says that it runs, it is reaped at its deadline."""
    with mock.patch.object(timer.FileTimerServer, "is_process_running", return_value=True):
        file_server.start()
        worker = fork_worker(acquire_and_exit, file_client, 0.5)
        deadline = worker.receive()
        worker.send("exit")
        assert worker.wait() == 0
        eventually(lambda: reaped and not file_server._timers)
    ((at, pid, number),) = reaped
    assert (pid, number) == (worker.pid, signal.SIGKILL)
    assert deadline <= at < deadline + ALLOWED_LATENESS


def test_file_server_worker_claimed_to_run_before_its_request_arrives(
    file_server: timer.FileTimerServer,
    file_client: timer.FileTimerClient,
    fork_worker: Fork,
    reaped: list[tuple[float, int, int]],
) -> None:
    """The claim also counts for a worker that was gone when its request was read."""
    worker = fork_worker(acquire_and_exit, file_client, 60)
    worker.process.kill()
    worker.wait()
    with mock.patch.object(timer.FileTimerServer, "is_process_running", return_value=True):
        file_server.start()
        file_client._send_request(expired_timer(worker.pid, "test1"))
        file_server.run_once()
    assert [call[1:] for call in reaped] == [(worker.pid, signal.SIGKILL)]
