"""The timers over a queue: client, request queue and server, with queues of many kinds."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.queues
import os
import pickle
import queue
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any
from unittest import mock

import pytest

from elastic_timer import (
    LocalTimerClient,
    LocalTimerServer,
    MultiprocessingRequestQueue,
    TimerRequest,
    expires,
)
from tests.support import (
    FAR,
    Fork,
    assert_reaped_in_time,
    eventually,
    is_alive,
    overrun,
    running,
)

FORK: Any = multiprocessing.get_context("fork")


@pytest.fixture
def mp_queue() -> Any:
    """A queue as most users have it; its own thread may still be writing when a test ends."""
    return FORK.Queue()


# Client and queue -------------------------------------------------------------------------------


def test_requests_in_the_queue(mp_queue: Any) -> None:
    """Acquire and release are plain requests of this pid, there as soon as the call returns."""
    client = LocalTimerClient(mp_queue)
    client.acquire("s", 123.5)
    assert mp_queue.qsize() == 1
    client.release("s")
    assert mp_queue.qsize() == 2
    assert mp_queue.get(timeout=5) == TimerRequest(os.getpid(), "s", 123.5)
    assert mp_queue.qsize() == 1
    release = mp_queue.get(timeout=5)
    assert release == TimerRequest(os.getpid(), "s", -1)
    assert type(release) is TimerRequest
    assert mp_queue.qsize() == 0
    assert mp_queue.empty()
    with pytest.raises(queue.Empty):
        mp_queue.get_nowait()


def send_numbered(channel: Any, client: LocalTimerClient, count: int) -> None:
    for number in range(count):
        client.acquire(str(number), time.time() + FAR)
    channel.send("done")


def test_qsize_and_get_are_true_for_many_writers(mp_queue: Any, fork_worker: Fork) -> None:
    """Four processes write without a lock: nothing is lost, torn or miscounted, in order each."""
    client = LocalTimerClient(mp_queue)
    workers = [fork_worker(send_numbered, client, 100) for _ in range(4)]
    assert [worker.receive() for worker in workers] == ["done"] * 4
    assert mp_queue.qsize() == 400
    received: dict[int, list[str]] = {worker.pid: [] for worker in workers}
    for left in range(399, -1, -1):
        request = mp_queue.get(timeout=5)
        received[request.worker_id].append(request.scope_id)
        assert mp_queue.qsize() == left
    assert list(received.values()) == [[str(number) for number in range(100)]] * 4


def test_client_goes_along_with_put(mp_queue: Any) -> None:
    """What others `put` into the same queue arrives as before."""
    client = LocalTimerClient(mp_queue)
    for number in range(50):
        mp_queue.put(number)
        client.acquire(str(number), 1.0)
    received = [mp_queue.get(timeout=5) for _ in range(100)]
    numbers = [item for item in received if isinstance(item, int)]
    scopes = [item.scope_id for item in received if isinstance(item, TimerRequest)]
    assert numbers == list(range(50))
    assert scopes == [str(number) for number in range(50)]
    assert mp_queue.qsize() == 0


def test_shared_pipe_stays_blocking(mp_queue: Any) -> None:
    """Others write to the same pipe with `put`: its blocking mode is not the client's to change."""
    LocalTimerClient(mp_queue).acquire("s", 1.0)
    assert os.get_blocking(mp_queue._writer.fileno())
    assert os.get_blocking(mp_queue._reader.fileno())
    assert mp_queue.get(timeout=5).scope_id == "s"


def test_server_that_does_not_read_costs_a_second(mp_queue: Any) -> None:
    """With the pipe full a request fails after about a second; what was sent before is there."""
    client = LocalTimerClient(mp_queue)
    sent = 0
    waited = 0.0
    while not waited:
        started = time.monotonic()
        try:
            client.acquire("x" * 3000, time.time() + FAR)
            sent += 1
        except BrokenPipeError:
            waited = time.monotonic() - started
    assert 0.5 < waited < 5
    assert sent > 10
    assert mp_queue.qsize() == sent
    for _ in range(sent):
        assert mp_queue.get(timeout=5).scope_id == "x" * 3000
    assert mp_queue.empty()


def test_full_bounded_queue_costs_a_second() -> None:
    """A queue with `maxsize` takes that many; one more waits for about a second and fails."""
    bounded = FORK.Queue(maxsize=2)
    client = LocalTimerClient(bounded)
    client.acquire("a", 1.0)
    client.acquire("b", 1.0)
    assert bounded.full()
    started = time.monotonic()
    with pytest.raises(BrokenPipeError):
        client.acquire("c", 1.0)
    assert 0.5 < time.monotonic() - started < 5
    assert bounded.get(timeout=5).scope_id == "a"
    client.acquire("d", 1.0)
    assert [bounded.get(timeout=5).scope_id for _ in range(2)] == ["b", "d"]
    assert bounded.empty()


def test_too_large_request_names_limit_and_size(mp_queue: Any) -> None:
    """What one atomic write cannot take is a RuntimeError with both figures; nothing is sent."""
    client = LocalTimerClient(mp_queue)
    with pytest.raises(RuntimeError, match=rf"{select.PIPE_BUF}.* \d{{4}}"):
        client.acquire("x" * select.PIPE_BUF, 1.0)
    assert mp_queue.qsize() == 0
    client.acquire("x" * (select.PIPE_BUF - 500), 1.0)
    assert mp_queue.get(timeout=5).worker_id == os.getpid()


def test_closed_queue_is_a_value_error(mp_queue: Any) -> None:
    """A queue that this process has closed says so, as its `put` does."""
    client = LocalTimerClient(mp_queue)
    mp_queue.close()
    with pytest.raises(ValueError, match="closed"):
        client.acquire("s", 1.0)


@pytest.mark.parametrize("expiration", [float("nan"), float("inf")])
def test_expiration_must_be_finite(mp_queue: Any, expiration: float) -> None:
    """A time that is none never enters the queue."""
    with pytest.raises(ValueError, match="finite"):
        LocalTimerClient(mp_queue).acquire("s", expiration)
    assert mp_queue.qsize() == 0


def acquire_in_spawned(client: LocalTimerClient) -> None:
    client.acquire("spawned", 1.0)


def test_client_can_be_handed_to_a_spawned_process() -> None:
    """A client goes to a child of any start method, also after it was used here."""
    context = multiprocessing.get_context("spawn")
    spawn_queue: Any = context.Queue()
    client = LocalTimerClient(spawn_queue)
    client.acquire("here", 1.0)
    process = context.Process(target=acquire_in_spawned, args=(client,))
    process.start()
    process.join()
    assert process.exitcode == 0
    requests = [spawn_queue.get(timeout=5) for _ in range(2)]
    assert [(item.worker_id, item.scope_id) for item in requests] == [
        (os.getpid(), "here"),
        (process.pid, "spawned"),
    ]
    process.close()


# Queues of other kinds --------------------------------------------------------------------------


class Pickling:
    """A connection whose objects go through a pickler of its own, the rest to the connection."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def send(self, item: object) -> None:
        self.connection.send_bytes(ForkingPickler.dumps(item))

    def recv(self) -> Any:
        return pickle.loads(self.connection.recv_bytes())

    def __getattr__(self, name: str) -> Any:
        if name == "connection":
            raise AttributeError(name)
        return getattr(self.connection, name)


class TorchLikeQueue(multiprocessing.queues.Queue):  # type: ignore[type-arg]
    """A subclass that wraps both ends of the pipe, as torch's does."""

    def __init__(self) -> None:
        super().__init__(ctx=FORK)
        attributes: Any = self
        attributes._reader = Pickling(attributes._reader)
        attributes._writer = Pickling(attributes._writer)
        attributes._send = attributes._writer.send
        attributes._recv = attributes._reader.recv


class QueueWithoutSize(multiprocessing.queues.Queue):  # type: ignore[type-arg]
    """As on macOS, where `qsize` is missing."""

    def __init__(self) -> None:
        super().__init__(ctx=FORK)

    def qsize(self) -> int:
        raise NotImplementedError


@contextlib.contextmanager
def manager_queue() -> Iterator[Any]:
    # A busy machine has the manager killed that takes too long to end, and its folder stay behind.
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(tempfile, "tempdir", folder),
        FORK.Manager() as manager,
    ):
        yield manager.Queue()


QUEUES: dict[str, Callable[[], Any]] = {
    "queue": lambda: contextlib.nullcontext(FORK.Queue()),
    "spawn-queue": lambda: contextlib.nullcontext(multiprocessing.get_context("spawn").Queue()),
    "bounded": lambda: contextlib.nullcontext(FORK.Queue(maxsize=8)),
    "joinable": lambda: contextlib.nullcontext(FORK.JoinableQueue()),
    "simple": lambda: contextlib.nullcontext(FORK.SimpleQueue()),
    "torch-like": lambda: contextlib.nullcontext(TorchLikeQueue()),
    "without-qsize": lambda: contextlib.nullcontext(QueueWithoutSize()),
    "manager": manager_queue,
    "thread": lambda: contextlib.nullcontext(queue.Queue()),
}


@pytest.fixture(params=QUEUES)
def any_queue(request: pytest.FixtureRequest) -> Any:
    """One queue of each kind."""
    with QUEUES[request.param]() as made:
        yield made
        # Its thread, where a `put` has started one, would outlive the test.
        if hasattr(made, "join_thread"):
            made.close()
            made.join_thread()


def test_client_works_with_any_queue(any_queue: Any) -> None:
    """Whoever reads the queue gets the requests whole and in order."""
    client = LocalTimerClient(any_queue)
    client.acquire("s", 12.5)
    client.release("s")
    assert any_queue.get() == TimerRequest(os.getpid(), "s", 12.5)
    assert any_queue.get() == TimerRequest(os.getpid(), "s", -1)
    assert any_queue.empty()


def test_server_works_with_any_queue(
    request: pytest.FixtureRequest, any_queue: Any, fork_worker: Fork
) -> None:
    """A server reaps an overrunner that reaches it through a queue of any kind."""
    client = LocalTimerClient(any_queue)
    with running(LocalTimerServer(any_queue, 1)) as server:
        if isinstance(any_queue, queue.Queue):
            # It does not leave the process: somebody here has to ask in the worker's name.
            worker = fork_worker(overrun, Silent(any_queue), 0.15)
            deadline = worker.receive()
            any_queue.put(TimerRequest(worker.pid, "overrun", time.time() + 0.15))
        else:
            worker = fork_worker(overrun, client, 0.15)
            deadline = worker.receive()
        assert_reaped_in_time(worker, deadline)
        client.acquire("s", time.time() + FAR)
        eventually(lambda: (os.getpid(), "s") in server._timers)
        client.release("s")
        eventually(lambda: not server._timers)


class Silent(LocalTimerClient):
    """Sends nothing."""

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        pass


def test_joinable_queue_counts_its_tasks() -> None:
    """Requests in a JoinableQueue are tasks like others: `task_done` and `join` work."""
    joinable = FORK.JoinableQueue()
    client = LocalTimerClient(joinable)
    client.acquire("s", 1.0)
    client.release("s")
    for _ in range(2):
        joinable.get(timeout=5)
        joinable.task_done()
    joinable.join()
    joinable.close()
    joinable.join_thread()


# MultiprocessingRequestQueue --------------------------------------------------------------------


def test_request_queue_size_and_get(mp_queue: Any) -> None:
    """`size` counts what waits; `get` takes up to that many, in order."""
    client = LocalTimerClient(mp_queue)
    requests = MultiprocessingRequestQueue(mp_queue)
    assert requests.size() == 0
    for name in "abc":
        client.acquire(name, 1.0)
    assert requests.size() == 3
    assert [request.scope_id for request in requests.get(2, 5)] == ["a", "b"]
    assert requests.size() == 1
    assert [request.scope_id for request in requests.get(1, 5)] == ["c"]
    assert requests.size() == 0


def test_request_queue_waits_at_most_the_timeout(mp_queue: Any) -> None:
    """What is there when the time is up is returned, be it nothing."""
    requests = MultiprocessingRequestQueue(mp_queue)
    started = time.monotonic()
    assert requests.get(1, 0.1) == []
    LocalTimerClient(mp_queue).acquire("s", 1.0)
    assert requests.get(5, 0.1) == [TimerRequest(os.getpid(), "s", 1.0)]
    assert 0.19 <= time.monotonic() - started < 5


def test_request_queue_returns_early_with_all_it_was_asked_for(mp_queue: Any) -> None:
    """Once `size` requests are there, the rest of the time is not waited for."""
    requests = MultiprocessingRequestQueue(mp_queue)
    thread = threading.Thread(target=LocalTimerClient(mp_queue).acquire, args=("late", 1.0))
    thread.start()
    started = time.monotonic()
    assert [request.scope_id for request in requests.get(1, 60)] == ["late"]
    assert time.monotonic() - started < 30
    thread.join()


def test_request_queue_without_qsize() -> None:
    """Where the queue cannot be counted, requests are still got."""
    uncounted = QueueWithoutSize()
    requests = MultiprocessingRequestQueue(uncounted)
    LocalTimerClient(uncounted).acquire("s", 1.0)
    assert [item.scope_id for item in requests.get(max(1, requests.size()), 5)] == ["s"]


# The server -------------------------------------------------------------------------------------


def test_defaults_of_the_server(mp_queue: Any) -> None:
    """Made with a queue alone it has upstream's interval of a minute, and starts and stops."""
    server = LocalTimerServer(mp_queue)
    assert server._max_interval == 60
    server.start()
    server.stop()


@pytest.mark.parametrize("seconds", [0, -1, float("nan")])
def test_max_interval_must_be_positive(mp_queue: Any, seconds: float) -> None:
    """A pause between rounds that is none is an error at the call."""
    with pytest.raises(ValueError, match="max_interval must be a positive number"):
        LocalTimerServer(mp_queue, seconds)


def test_starting_twice_does_no_harm(mp_queue: Any, fork_worker: Fork) -> None:
    """A second `start()` changes nothing: one thread, and workers are reaped as before."""
    with running(LocalTimerServer(mp_queue, 0.05)) as server:
        threads = set(threading.enumerate())
        server.start()
        assert set(threading.enumerate()) == threads
        worker = fork_worker(overrun, LocalTimerClient(mp_queue), 0.2)
        assert_reaped_in_time(worker, worker.receive())


@pytest.mark.parametrize("daemon", [True, False])
def test_daemon_is_the_threads(mp_queue: Any, daemon: bool) -> None:
    """`daemon` says whether the watchdog's thread lets the interpreter exit."""
    before = set(threading.enumerate())
    with running(LocalTimerServer(mp_queue, 5, daemon)):
        assert [thread.daemon for thread in set(threading.enumerate()) - before] == [daemon]


def test_register_expire_and_clear_by_hand(mp_queue: Any) -> None:
    """The three methods work on a server that was not started, as upstream's do."""
    server = LocalTimerServer(mp_queue)
    now, pid = time.time(), os.getpid()
    due = TimerRequest(pid, "due", now + 50)
    later = TimerRequest(pid, "later", now + 200)
    group = TimerRequest(-3, "group", now + 50)
    server.register_timers([due, later, group])
    assert server._timers[(pid, "due")] == due
    assert server.get_expired_timers(now + 49) == {}
    assert server.get_expired_timers(now + 51) == {pid: [due], -3: [group]}
    server.clear_timers({-3})
    assert set(server._timers) == {(pid, "due"), (pid, "later")}
    server.register_timers([TimerRequest(pid, "due", -1)])
    assert list(server._timers) == [(pid, "later")]
    server.clear_timers({pid})
    assert not server._timers
    server.stop()


def test_released_worker_lives(mp_queue: Any, fork_worker: Fork) -> None:
    """A worker that leaves its block in time outlives its deadline."""
    client = LocalTimerClient(mp_queue)

    def finish(channel: Any) -> None:
        with expires(after=0.2, scope="short", client=client):
            pass
        channel.send("left")
        channel.recv()

    with running(LocalTimerServer(mp_queue, 0.05)):
        worker = fork_worker(finish)
        assert worker.receive() == "left"
        sentinel = fork_worker(overrun, client, 0.3)
        assert_reaped_in_time(sentinel, sentinel.receive())
        assert is_alive(worker)


def test_exit_of_a_worker_drops_its_timers(mp_queue: Any, fork_worker: Fork) -> None:
    """A worker that exits without releasing leaves no timer, others keep theirs."""
    client = LocalTimerClient(mp_queue)
    with running(LocalTimerServer(mp_queue, 10)) as server:
        workers = [fork_worker(overrun, client, 60) for _ in range(2)]
        for worker in workers:
            worker.receive()
        eventually(lambda: len(server._timers) == 2)
        os.kill(workers[0].pid, signal.SIGTERM)
        eventually(lambda: list(server._timers) == [(workers[1].pid, "overrun")])
        assert workers[0].wait() == -signal.SIGTERM


def test_failed_reap_is_tried_again(mp_queue: Any, fork_worker: Fork) -> None:
    """A worker that could not be signalled is signalled in a later round."""
    attempts: list[int] = []

    class Failing(LocalTimerServer):
        def _reap_worker(self, worker_id: int) -> bool:
            attempts.append(worker_id)
            return len(attempts) > 3 and super()._reap_worker(worker_id)

    with running(Failing(mp_queue, 0.05)) as server:
        worker = fork_worker(overrun, LocalTimerClient(mp_queue), 0.2)
        worker.receive()
        assert worker.wait(5) == -signal.SIGKILL
        eventually(lambda: not server._timers)
    assert attempts == [worker.pid] * 4


def test_exception_of_a_reap_counts_as_reaped(mp_queue: Any, fork_worker: Fork) -> None:
    """Where `_reap_worker` raises, the timers are dropped and the server goes on."""
    attempts: list[int] = []

    class Raising(LocalTimerServer):
        def _reap_worker(self, worker_id: int) -> bool:
            attempts.append(worker_id)
            if len(attempts) == 1:
                raise RuntimeError("a subclass's error")
            return super()._reap_worker(worker_id)

    client = LocalTimerClient(mp_queue)
    with running(Raising(mp_queue, 0.05)) as server:
        spared = fork_worker(overrun, client, 0.1)
        spared.receive()
        eventually(lambda: attempts and not server._timers)
        worker = fork_worker(overrun, client, 0.1)
        assert_reaped_in_time(worker, worker.receive())
        assert is_alive(spared)


def test_reap_worker_says_whether_it_is_done(mp_queue: Any, fork_worker: Fork) -> None:
    """True where the worker was killed, and where it is gone already."""
    server = LocalTimerServer(mp_queue)
    worker = fork_worker(overrun, LocalTimerClient(mp_queue), 60)
    assert server._reap_worker(worker.pid) is True
    assert worker.wait() == -signal.SIGKILL
    assert server._reap_worker(worker.pid) is True
    server.stop()


class ForeignRequest:
    """Somebody else's class with the three attributes."""

    def __init__(self, worker_id: int, scope_id: str, expiration_time: float) -> None:
        self.worker_id = worker_id
        self.scope_id = scope_id
        self.expiration_time = expiration_time


def test_requests_of_another_class_count(mp_queue: Any) -> None:
    """What has the three attributes is a request, such as those of upstream's class."""
    with running(LocalTimerServer(mp_queue, 0.05)) as server:
        mp_queue.put(ForeignRequest(os.getpid(), "foreign", time.time() + FAR))
        eventually(lambda: list(server._timers) == [(os.getpid(), "foreign")])
        mp_queue.put(ForeignRequest(os.getpid(), "foreign", -1))
        eventually(lambda: not server._timers)


def test_request_of_upstreams_needs_no_upstream(mp_queue: Any) -> None:
    """A worker's torch may send its requests to a server that has no torch to load them with."""
    assert "torch" not in sys.modules
    # Forged: pickled is the name of the class, which would have to be found for that.
    ours = pickle.dumps(TimerRequest(os.getpid(), "theirs", 1.0), protocol=2)
    theirs = ours.replace(b"elastic_timer.api\n", b"torch.distributed.elastic.timer.api\n")
    assert theirs != ours
    mp_queue._writer.send_bytes(theirs)
    (request,) = MultiprocessingRequestQueue(mp_queue).get(1, 5)
    assert type(request) is TimerRequest
    assert request == TimerRequest(os.getpid(), "theirs", 1.0)


def explode() -> None:
    raise RuntimeError("unpickled")


class Unpicklable:
    """Raises wherever it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return explode, ()


class Touchy:
    """Can be unpickled, and not be looked at."""

    @property
    def worker_id(self) -> int:
        sys.exit("not for you")


@pytest.mark.parametrize(
    "rubbish",
    [
        "a string",
        Unpicklable(),
        Touchy(),
        TimerRequest("no pid", "s", 1e10),
        TimerRequest(12, ["unhashable"], 1e10),  # type: ignore[arg-type]
        TimerRequest(12, "s", "late"),  # type: ignore[arg-type]
        TimerRequest(12, "s", float("nan")),
    ],
    ids=["string", "unpicklable", "touchy", "no-pid", "no-scope", "no-time", "nan"],
)
def test_rubbish_in_the_queue_is_dropped_alone(
    mp_queue: Any, rubbish: object, caplog: pytest.LogCaptureFixture
) -> None:
    """What is no request is dropped with a warning; requests around it count."""
    with running(LocalTimerServer(mp_queue, 0.05)) as server:
        client = LocalTimerClient(mp_queue)
        client.acquire("before", time.time() + FAR)
        mp_queue.put(rubbish)
        mp_queue.put(TimerRequest(os.getpid(), "after", time.time() + FAR))
        eventually(lambda: len(server._timers) == 2)
        scopes = {scope for _, scope in server._timers}
    assert scopes == {"before", "after"}
    assert [record.levelname for record in caplog.records].count("WARNING") == 1


def test_queue_can_be_used_on_after_the_server(mp_queue: Any) -> None:
    """A stopped server leaves the queue open: another server, or whoever, reads on."""
    client = LocalTimerClient(mp_queue)
    with running(LocalTimerServer(mp_queue, 0.05)) as first:
        client.acquire("first", time.time() + FAR)
        eventually(lambda: first._timers)
    client.acquire("between", time.time() + FAR)
    assert mp_queue.qsize() == 1
    with running(LocalTimerServer(mp_queue, 0.05)) as second:
        eventually(lambda: list(second._timers) == [(os.getpid(), "between")])
    client.acquire("last", 1.0)
    assert mp_queue.get(timeout=5).scope_id == "last"
