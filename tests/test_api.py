"""What both variants share: names, requests, `configure`, `expires`, the base server's round."""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import logging
import pickle
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

import elastic_timer
from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
    LocalTimerClient,
    LocalTimerServer,
    MultiprocessingRequestQueue,
    RequestQueue,
    TimerClient,
    TimerRequest,
    TimerServer,
    configure,
    debug_info_logging,
    expires,
    file_based_local_timer,
)
from elastic_timer._server.callbacks import flush_log
from tests.support import eventually

REQUIRED = inspect.Parameter.empty


class RecordingClient(TimerClient):
    """Notes what it was asked, and when."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        self.calls.append(("acquire", scope_id, expiration_time))

    def release(self, scope_id: str) -> None:
        self.calls.append(("release", scope_id))

    @property
    def steps(self) -> list[tuple[str, str]]:
        return [call[:2] for call in self.calls]


@pytest.fixture
def client() -> RecordingClient:
    """The process's client, for this test."""
    recorder = RecordingClient()
    configure(recorder)
    return recorder


# Names and signatures ---------------------------------------------------------------------------


def test_package_exports_every_contract_name() -> None:
    """All names of the contract can be imported from the package and are in its `__all__`."""
    names = {
        "configure",
        "current",
        "expires",
        "TimerClient",
        "TimerRequest",
        "TimerServer",
        "RequestQueue",
        "FileTimerClient",
        "FileTimerRequest",
        "FileTimerServer",
        "LocalTimerClient",
        "LocalTimerServer",
        "MultiprocessingRequestQueue",
    }
    assert names <= set(elastic_timer.__all__)
    assert all(hasattr(elastic_timer, name) for name in names)


SIGNATURES: list[tuple[Callable[..., object], list[tuple[str, object]]]] = [
    (
        TimerRequest.__init__,
        [("worker_id", REQUIRED), ("scope_id", REQUIRED), ("expiration_time", REQUIRED)],
    ),
    (TimerClient.acquire, [("scope_id", REQUIRED), ("expiration_time", REQUIRED)]),
    (TimerClient.release, [("scope_id", REQUIRED)]),
    (RequestQueue.size, []),
    (RequestQueue.get, [("size", REQUIRED), ("timeout", REQUIRED)]),
    (
        TimerServer.__init__,
        [("request_queue", REQUIRED), ("max_interval", REQUIRED), ("daemon", True)],
    ),
    (TimerServer.register_timers, [("timer_requests", REQUIRED)]),
    (TimerServer.clear_timers, [("worker_ids", REQUIRED)]),
    (TimerServer.get_expired_timers, [("deadline", REQUIRED)]),
    (TimerServer._reap_worker, [("worker_id", REQUIRED)]),
    (TimerServer._reap_worker_no_throw, [("worker_id", REQUIRED)]),
    (TimerServer._watchdog_loop, []),
    (TimerServer._run_watchdog, []),
    (TimerServer._get_scopes, [("timer_requests", REQUIRED)]),
    (TimerServer.start, []),
    (TimerServer.stop, []),
    (configure, [("timer_client", ...)]),
    (expires, [("after", REQUIRED), ("scope", None), ("client", None)]),
    (LocalTimerClient.__init__, [("mp_queue", REQUIRED)]),
    (LocalTimerClient.acquire, [("scope_id", REQUIRED), ("expiration_time", REQUIRED)]),
    (LocalTimerClient.release, [("scope_id", REQUIRED)]),
    (MultiprocessingRequestQueue.__init__, [("mp_queue", REQUIRED)]),
    (MultiprocessingRequestQueue.size, []),
    (MultiprocessingRequestQueue.get, [("size", REQUIRED), ("timeout", REQUIRED)]),
    (
        LocalTimerServer.__init__,
        [("mp_queue", REQUIRED), ("max_interval", 60), ("daemon", True)],
    ),
    (LocalTimerServer._reap_worker, [("worker_id", REQUIRED)]),
    (
        FileTimerRequest.__init__,
        [
            ("worker_pid", REQUIRED),
            ("scope_id", REQUIRED),
            ("expiration_time", REQUIRED),
            ("signal", 0),
        ],
    ),
    (FileTimerRequest.to_json, []),
    (FileTimerClient.__init__, [("file_path", REQUIRED), ("signal", signal.SIGKILL)]),
    (FileTimerClient._open_non_blocking, []),
    (FileTimerClient._send_request, [("request", REQUIRED)]),
    (FileTimerClient.acquire, [("scope_id", REQUIRED), ("expiration_time", REQUIRED)]),
    (FileTimerClient.release, [("scope_id", REQUIRED)]),
    (
        FileTimerServer.__init__,
        [
            ("file_path", REQUIRED),
            ("run_id", REQUIRED),
            ("max_interval", 10),
            ("daemon", True),
            ("log_event", None),
        ],
    ),
    (FileTimerServer.start, []),
    (FileTimerServer.stop, []),
    (FileTimerServer.run_once, []),
    (FileTimerServer.is_process_running, [("pid", REQUIRED)]),
    (FileTimerServer._watchdog_loop, []),
    (FileTimerServer._run_watchdog, [("fd", REQUIRED)]),
    (FileTimerServer._get_requests, [("fd", REQUIRED), ("max_interval", REQUIRED)]),
    (FileTimerServer._get_scopes, [("timer_requests", REQUIRED)]),
    (FileTimerServer.register_timers, [("timer_requests", REQUIRED)]),
    (FileTimerServer.clear_timers, [("worker_pids", REQUIRED)]),
    (FileTimerServer.get_expired_timers, [("deadline", REQUIRED)]),
    (FileTimerServer._reap_worker, [("worker_pid", REQUIRED), ("signal", REQUIRED)]),
    (FileTimerServer.get_last_progress_time, []),
    (file_based_local_timer._retry, [("max_retries", REQUIRED), ("sleep_time", REQUIRED)]),
    (
        debug_info_logging.log_debug_info_for_expired_timers,
        [("run_id", REQUIRED), ("expired_timers", REQUIRED)],
    ),
]


@pytest.mark.parametrize(
    ("function", "expected"), SIGNATURES, ids=[item[0].__qualname__ for item in SIGNATURES]
)
def test_signature(function: Callable[..., object], expected: list[tuple[str, object]]) -> None:
    """Names, order and defaults are the contract's; what is more has a default."""
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "self"
    ]
    for parameter, (name, default) in zip(parameters, expected, strict=False):
        assert parameter.name == name
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        if default is ...:
            assert parameter.default is not REQUIRED
        else:
            assert parameter.default == default
    assert len(parameters) >= len(expected)
    for extra in parameters[len(expected) :]:
        assert extra.default is not REQUIRED


@pytest.mark.parametrize(
    ("abstract", "methods"),
    [
        (TimerClient, {"acquire", "release"}),
        (RequestQueue, {"size", "get"}),
        (
            TimerServer,
            {"register_timers", "clear_timers", "get_expired_timers", "_reap_worker"},
        ),
    ],
)
def test_abstract_methods(abstract: type, methods: set[str]) -> None:
    """Each abstract class asks for exactly the contract's methods."""
    assert abstract.__abstractmethods__ == methods  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        abstract()


# Requests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_class", "values"),
    [(TimerRequest, (7, "scope", 1.5)), (FileTimerRequest, (7, "scope", 1.5, 9))],
)
def test_request_is_a_value(request_class: type[Any], values: tuple[Any, ...]) -> None:
    """Equal values make equal requests, any other value an unequal one; requests have no hash."""
    request = request_class(*values)
    assert request == request_class(*values)
    assert request != "something else"
    for index in range(len(values)):
        changed = [*values]
        changed[index] = "another" if index == 1 else values[index] + 1
        assert request != request_class(*changed)
    with pytest.raises(TypeError):
        hash(request)


@pytest.mark.parametrize(
    "request_object", [TimerRequest(("any", 1), "scope", -1), FileTimerRequest(7, "scope", 1.5, 9)]
)
def test_request_survives_pickling(request_object: TimerRequest) -> None:
    """Every pickle protocol brings back an equal request of the same class."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        if protocol < 2:  # Slots cannot be pickled by the two oldest ones.
            continue
        copy = pickle.loads(pickle.dumps(request_object, protocol))
        assert type(copy) is type(request_object)
        assert copy == request_object


@pytest.mark.parametrize(
    "request_object", [TimerRequest(1, "scope", 2.0), FileTimerRequest(1, "scope", 2.0)]
)
def test_request_has_slots(request_object: TimerRequest) -> None:
    """A request carries no dictionary: an attribute that it does not have cannot be set."""
    with pytest.raises(AttributeError):
        request_object.unknown = 1  # type: ignore[attr-defined]


def test_base_and_file_request_are_never_equal() -> None:
    """A file request says more than a plain one, so the two never compare equal."""
    assert TimerRequest(1, "s", 2.0) != FileTimerRequest(1, "s", 2.0)
    assert FileTimerRequest(1, "s", 2.0) != TimerRequest(1, "s", 2.0)


# configure --------------------------------------------------------------------------------------


def test_no_client_is_a_runtime_error_on_entry() -> None:
    """Without a client the body of a block does not run; making the object alone does no harm."""
    configure(None)
    block = expires(after=1)
    with pytest.raises(RuntimeError, match="configure"), block:
        pytest.fail("the body ran")


def test_no_client_is_a_runtime_error_of_the_decorated_call() -> None:
    """Decorating needs no client yet; the call does, and the body does not run without."""

    @expires(after=1)
    def body() -> None:
        pytest.fail("the body ran")

    @expires(after=1)
    async def async_body() -> None:
        pytest.fail("the body ran")

    with pytest.raises(RuntimeError):
        body()
    with pytest.raises(RuntimeError):
        asyncio.run(async_body())


def test_configure_none_unsets_the_client(client: RecordingClient) -> None:
    """`configure(None)` takes the client away again."""
    with expires(after=1, scope="s"):
        pass
    configure(None)
    with pytest.raises(RuntimeError), expires(after=1):
        pass
    assert len(client.calls) == 2


def test_configure_from_the_environment(monkeypatch: pytest.MonkeyPatch, fifo_path: str) -> None:
    """Without argument the client is made for the FIFO that the environment names."""
    monkeypatch.setenv("TORCHELASTIC_TIMER_FILE", fifo_path)
    with FileTimerServer(fifo_path, "run", max_interval=0.05) as server:
        configure()
        with expires(after=30, scope="from the environment"):
            eventually(lambda: server._request_count == 1)
        eventually(lambda: server._request_count == 2)


def test_configure_from_an_empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the variable is unset the error names it, and the client stays what it was."""
    monkeypatch.delenv("TORCHELASTIC_TIMER_FILE", raising=False)
    with pytest.raises(RuntimeError, match="TORCHELASTIC_TIMER_FILE"):
        configure()


# expires ----------------------------------------------------------------------------------------


def test_with_acquires_then_releases(client: RecordingClient) -> None:
    """One acquire with the epoch time `after` from now on entry, one release on exit."""
    before = time.time()
    block = expires(after=60, scope="s")
    with block as handle:
        after = time.time()
        assert len(client.calls) == 1
    assert handle is block
    (_, scope, expiration), release = client.calls
    assert scope == "s"
    assert before + 60 <= expiration <= after + 60
    assert release == ("release", "s")


def test_explicit_client_wins_over_the_configured_one(client: RecordingClient) -> None:
    """A client that is passed gets both requests, the configured one none."""
    other = RecordingClient()
    with expires(after=1, scope="s", client=other):
        pass
    assert other.steps == [("acquire", "s"), ("release", "s")]
    assert client.calls == []


def test_explicit_client_needs_no_configured_one() -> None:
    """A client that is passed is enough."""
    other = RecordingClient()
    with expires(1, "s", other):
        pass
    assert other.steps == [("acquire", "s"), ("release", "s")]


@pytest.mark.parametrize("error", [ValueError("body"), KeyboardInterrupt(), SystemExit(3)])
def test_body_that_raises_is_released(client: RecordingClient, error: BaseException) -> None:
    """Whatever the body raises is released and reaches the caller unchanged."""
    with pytest.raises(type(error)) as caught, expires(after=1, scope="s"):
        raise error
    assert caught.value is error
    assert client.steps == [("acquire", "s"), ("release", "s")]


def test_failed_acquire_is_not_released() -> None:
    """Where acquiring fails, the body does not run and nothing is released."""

    class Failing(RecordingClient):
        def acquire(self, scope_id: str, expiration_time: float) -> None:
            raise BrokenPipeError("no server")

    failing = Failing()
    with pytest.raises(BrokenPipeError), expires(after=1, scope="s", client=failing):
        pytest.fail("the body ran")
    assert failing.calls == []


def test_interrupted_acquire_is_released() -> None:
    """Ctrl-C within the acquire: it may have been sent, so it is released, and Ctrl-C goes on."""

    class Interrupted(RecordingClient):
        def acquire(self, scope_id: str, expiration_time: float) -> None:
            super().acquire(scope_id, expiration_time)
            raise KeyboardInterrupt

    client = Interrupted()
    with pytest.raises(KeyboardInterrupt), expires(after=1, scope="s", client=client):
        pytest.fail("the body ran")
    assert client.steps == [("acquire", "s"), ("release", "s")]


def test_interrupted_release_is_tried_again() -> None:
    """Ctrl-C within the release: one more try, and Ctrl-C wins even over the body's exception."""

    class Interrupted(RecordingClient):
        def release(self, scope_id: str) -> None:
            super().release(scope_id)
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            raise OSError("and then this")

    client = Interrupted()
    with pytest.raises(KeyboardInterrupt), expires(after=1, scope="s", client=client):
        raise LookupError("the body's own")
    assert client.steps == [("acquire", "s"), ("release", "s"), ("release", "s")]


def test_one_object_is_one_block_at_a_time(client: RecordingClient) -> None:
    """The same object may be entered again once it was left, not while it is entered."""
    block = expires(after=1, scope="s")
    with block, pytest.raises(RuntimeError, match="entered"), block:
        pytest.fail("the body ran")
    with block:
        pass
    assert client.steps == [("acquire", "s"), ("release", "s")] * 2


def test_leaving_what_was_not_entered_does_nothing(client: RecordingClient) -> None:
    """An exit without an entry, as an exit stack may cause it, releases nothing."""
    expires(after=1, scope="s").__exit__(None, None, None)
    assert client.calls == []


def test_client_configured_later_serves_an_earlier_object(client: RecordingClient) -> None:
    """The client is looked up on entry, not when the object is made."""
    block = expires(after=1, scope="s")
    later = RecordingClient()
    configure(later)
    with block:
        pass
    assert later.steps == [("acquire", "s"), ("release", "s")]
    assert client.calls == []


@pytest.mark.parametrize("after", [float("nan"), float("inf"), float("-inf")])
def test_after_must_be_finite(client: RecordingClient, after: float) -> None:
    """A time that is none is refused at the call, before anything is sent."""
    with pytest.raises(ValueError, match="after"):
        expires(after=after)
    assert client.calls == []


def test_after_may_be_no_time_at_all(client: RecordingClient) -> None:
    """A block may be due at once: that is the server's business."""
    with expires(after=0, scope="s"):
        pass
    assert client.calls[0][2] <= time.time()


def test_decorator_times_each_call(client: RecordingClient) -> None:
    """Each call is a block of its own: fresh deadline, arguments and result handed through."""

    @expires(after=10, scope="f")
    def add(left: int, *, right: int) -> int:
        """Docstring."""
        assert client.steps[-1] == ("acquire", "f")
        return left + right

    assert client.calls == []
    assert add(1, right=2) == 3
    assert add(3, right=4) == 7
    assert client.steps == [("acquire", "f"), ("release", "f")] * 2
    assert client.calls[2][2] > client.calls[0][2]
    assert (add.__name__, add.__doc__) == ("add", "Docstring.")


def test_decorator_releases_after_an_exception(client: RecordingClient) -> None:
    """A decorated function that raises is released, its exception reaches the caller."""

    @expires(after=10, scope="f")
    def fail() -> None:
        raise LookupError("body")

    with pytest.raises(LookupError, match="body"):
        fail()
    assert client.steps == [("acquire", "f"), ("release", "f")]


def test_recursion_acquires_the_same_scope_again(client: RecordingClient) -> None:
    """One recursive function holds one scope, however deep it is."""

    @expires(after=10)
    def descend(depth: int) -> None:
        if depth:
            descend(depth - 1)

    descend(3)
    assert [kind for kind, _ in client.steps] == ["acquire"] * 4 + ["release"] * 4
    assert len({scope for _, scope in client.steps}) == 1


def test_decorator_of_a_callable_without_code(client: RecordingClient) -> None:
    """What is no function written in Python has the decorator's own place as its scope."""
    line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
    measure = expires(after=10)(functools.partial(len, "four"))
    assert measure() == 4
    assert client.steps[0] == ("acquire", f"{__file__}#{line}")


def test_generator_functions_cannot_be_decorated() -> None:
    """Their call returns before the body runs: a timer around it would guard nothing."""

    def generate() -> Iterator[int]:
        yield 1

    async def generate_async() -> AsyncIterator[int]:
        yield 1

    for function in (generate, generate_async):
        with pytest.raises(TypeError, match="generator"):
            expires(after=1)(function)


def test_decorator_times_a_coroutine_while_it_runs(client: RecordingClient) -> None:
    """The timer of an async function spans its awaits, not just the making of the coroutine."""

    @expires(after=10, scope="c")
    async def body(value: int) -> int:
        assert client.steps == [("acquire", "c")]
        await asyncio.sleep(0)
        assert client.steps == [("acquire", "c")]
        return value

    assert inspect.iscoroutinefunction(body)

    async def main() -> int:
        coroutine = body(7)
        assert client.calls == []
        return await coroutine

    assert asyncio.run(main()) == 7
    assert client.steps == [("acquire", "c"), ("release", "c")]


def test_async_with(client: RecordingClient) -> None:
    """`async with` acquires on entry and releases on exit, whatever the body did."""

    async def main() -> None:
        async with expires(after=10, scope="a"):
            assert client.steps == [("acquire", "a")]
        async with expires(after=10, scope="b"):
            raise LookupError("body")

    with pytest.raises(LookupError, match="body"):
        asyncio.run(main())
    assert client.steps == [("acquire", "a"), ("release", "a"), ("acquire", "b"), ("release", "b")]


def test_cancelled_task_is_released(client: RecordingClient) -> None:
    """A task that is cancelled within its block leaves no timer behind."""

    async def main() -> None:
        entered = asyncio.Event()

        @expires(after=10, scope="c")
        async def wait() -> None:
            entered.set()
            await asyncio.Event().wait()

        task = asyncio.ensure_future(wait())
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert client.steps == [("acquire", "c"), ("release", "c")]


def test_entering_imports_nothing(client: RecordingClient) -> None:
    """Entering a block loads no module: it is on the hot path of training loops."""
    with expires(after=1):
        pass
    modules = set(sys.modules)
    with expires(after=1), expires(after=1, scope="s"):
        pass
    assert set(sys.modules) == modules


# One round of the base class --------------------------------------------------------------------


class ListQueue(RequestQueue):
    """A queue as a user of upstream would write one."""

    def __init__(self, calls: list[Any], requests: list[TimerRequest], size: int) -> None:
        self.calls = calls
        self.requests = requests
        self._size = size

    def size(self) -> int:
        self.calls.append("size")
        return self._size

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        self.calls.append(("get", size, timeout))
        return self.requests


class RecordingServer(TimerServer):
    """Notes every hook that a round calls."""

    def __init__(
        self,
        requests: list[TimerRequest],
        expired: dict[Any, list[TimerRequest]],
        *,
        size: int = 0,
        max_interval: float = 0.5,
    ) -> None:
        self.calls: list[Any] = []
        self.expired = expired
        super().__init__(ListQueue(self.calls, requests, size), max_interval)

    def register_timers(self, timer_requests: list[TimerRequest]) -> None:
        self.calls.append(("register", timer_requests))

    def clear_timers(self, worker_ids: set[Any]) -> None:
        self.calls.append(("clear", worker_ids))

    def get_expired_timers(self, deadline: float) -> dict[Any, list[TimerRequest]]:
        self.calls.append(("expired", deadline))
        return self.expired

    def _reap_worker(self, worker_id: Any) -> bool:
        self.calls.append(("reap", worker_id))
        if worker_id == "raises":
            raise RuntimeError("a subclass's error")
        return bool(worker_id == "reaped")


def test_round_of_a_subclass_written_for_upstream(caplog: pytest.LogCaptureFixture) -> None:
    """One round asks and tells everything once, in upstream's order."""
    requests = [TimerRequest("reaped", "scope", 1.0)]
    expired = {name: [TimerRequest(name, "s", 0)] for name in ("reaped", "refuses", "raises")}
    server = RecordingServer(requests, expired, size=3)
    before = time.time()
    server._run_watchdog()
    calls = server.calls
    assert calls[:3] == ["size", ("get", 3, 0.5), ("register", requests)]
    name, deadline = calls[3]
    assert name == "expired"
    assert before <= deadline <= time.time()
    assert calls[4:] == [
        ("reap", "reaped"),
        ("reap", "refuses"),
        ("reap", "raises"),
        ("clear", {"reaped", "raises"}),
    ]
    assert flush_log(20)
    assert "a subclass's error" in caplog.text


def test_empty_queue_is_still_asked_for_one_request() -> None:
    """With nothing in the queue one request is waited for, and nobody is cleared."""
    server = RecordingServer([], {}, size=0)
    server._run_watchdog()
    assert server.calls[1] == ("get", 1, 0.5)
    assert server.calls[-1] == ("clear", set())


def test_reap_worker_no_throw(caplog: pytest.LogCaptureFixture) -> None:
    """An exception counts as reaped and is logged with its traceback; results pass through."""
    server = RecordingServer([], {})
    assert server._reap_worker_no_throw("reaped") is True
    assert server._reap_worker_no_throw("refuses") is False
    assert flush_log(20)
    assert not caplog.records
    assert server._reap_worker_no_throw("raises") is True
    assert flush_log(20)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert caplog.records[0].exc_info is not None


def test_get_scopes() -> None:
    """The scopes of requests, in their order."""
    server = RecordingServer([], {})
    assert server._get_scopes([TimerRequest(1, name, 0) for name in "ba"]) == ["b", "a"]


class CountingServer(RecordingServer):
    """Runs rounds whose first one fails."""

    def __init__(self) -> None:
        super().__init__([], {}, max_interval=0.01)
        self.rounds = itertools.count(1)
        self.third_round = threading.Event()

    def _run_watchdog(self) -> None:
        number = next(self.rounds)
        if number == 1:
            raise RuntimeError("the first round fails")
        if number >= 3:
            self.third_round.set()
            # Rounds as short as a queue's that never waits.
            time.sleep(self._max_interval)


@pytest.fixture
def counting_server() -> Iterator[CountingServer]:
    """Stopped at the end."""
    server = CountingServer()
    yield server
    server.stop()


def test_loop_outlives_a_failing_round(
    counting_server: CountingServer, caplog: pytest.LogCaptureFixture
) -> None:
    """An error in one round is logged and the loop goes on."""
    counting_server.start()
    assert counting_server.third_round.wait(20)
    counting_server.stop()
    assert flush_log(20)
    assert "the first round fails" in caplog.text


def test_stop_ends_the_loop(counting_server: CountingServer) -> None:
    """After `stop()` no thread of the server is left; stopping again does no harm."""
    before = set(threading.enumerate())
    counting_server.start()
    assert counting_server.third_round.wait(20)
    counting_server.stop()
    eventually(lambda: not set(threading.enumerate()) - before)
    counting_server.stop()


def test_starting_twice_does_no_harm(counting_server: CountingServer) -> None:
    """A second `start()` changes nothing: the thread stays the only one."""
    counting_server.start()
    threads = set(threading.enumerate())
    counting_server.start()
    assert set(threading.enumerate()) == threads


def test_stop_without_start() -> None:
    """A server that was never started can be stopped."""
    RecordingServer([], {}).stop()
